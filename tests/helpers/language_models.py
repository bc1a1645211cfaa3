"""A small Llama with random weights, the same in every run."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def llama(vocabulary: int = 60, layers: int = 2) -> nn.Module:
    """Skips the test where transformers is not installed."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return made
