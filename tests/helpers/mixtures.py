"""Small mixtures of experts of transformers, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5", reason="stacks experts since version 5")

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# class -> its configuration, and that of the width of its experts
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": ({"intermediate_size": 16, "num_local_experts": 4}, "intermediate_size"),
    "Qwen3Moe": ({"moe_intermediate_size": 16, "num_experts": 4, "norm_topk_prob": True}, "moe_intermediate_size"),
    "GptOss": ({"intermediate_size": 16, "num_local_experts": 4}, "intermediate_size"),
    "DeepseekV3": (
        {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
         "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
         "head_dim": 4},
        "moe_intermediate_size",
    ),
}  # fmt: skip


def model_of(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    made = kind(kind.config_class(**TEXT | KINDS[name][0] | more)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.3) if p.dim() > 1 else p.add_(0.1 * torch.randn(p.shape))
    return made


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(input_ids=ids)
    return (found["logits"] if isinstance(found, dict) else found.logits).detach()


def divided_work() -> dict[str, Any]:
    """Arguments of `merge` for two processes, the first of which sees one token only, and no row of most experts."""
    batches = [torch.full((8, 12), 7), tokens(8, 12, seed=1), torch.full((8, 12), 7), tokens(8, 12, seed=2)]
    given = [{"input_ids": ids} for ids in batches]
    return {"example_inputs": {"input_ids": tokens(2, 12)}, "ratio": 0.5, "calibration": given}
