"""Merged models of Hugging Face: `result.model` generates, and `from_pretrained` reads what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxmerge
from fxmerge import FxMergeError
from fxmerge.export.check import difference
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.slow import slow_but

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48} | TOKENS
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
CAUSAL: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED | {"tie_word_embeddings": True},
    "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | TOKENS,
    "GPTNeoXForCausalLM": TEXT | {"max_position_embeddings": 64},
}
OTHERS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": TEXT,
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                                   "decoder_start_token_id": 0} | TOKENS,
    "ViTForImageClassification": {k: v for k, v in TEXT.items() if k not in TOKENS}
    | {"image_size": 16, "patch_size": 4, "num_labels": 6},
}  # fmt: skip
AUTO = {
    "BertForSequenceClassification": "AutoModelForSequenceClassification",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ViTForImageClassification": "AutoModelForImageClassification",
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    made = kind(kind.config_class(**{**CAUSAL, **OTHERS}[name])).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return made


def inputs(name: str) -> dict[str, Tensor]:
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    tokens = {"input_ids": torch.randint(3, 60, (2, 9))}
    if name.startswith("T5"):
        return tokens | {"decoder_input_ids": torch.randint(3, 60, (2, 5))}
    return tokens | {"attention_mask": torch.ones(2, 9, dtype=torch.long)}


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        made = model(**given)
    found: Tensor = made["logits"]
    return found


def loaded(name: str, folder: Path) -> Any:
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize("name", slow_but([*CAUSAL][:1], [*CAUSAL, *OTHERS]))
@pytest.mark.parametrize("refit", ["none", pytest.param("synthetic", marks=pytest.mark.slow)])
def test_saved_and_loaded_by_an_auto_class(name: str, refit: str, tmp_path: Path) -> None:
    """On inputs that the merge has not seen, of another length; with the biases that refit adds."""
    model = model_of(name)
    result = fxmerge.merge(model, inputs(name), ratio=0.3, refit=refit, samples=32)
    own = result.model
    assert type(own) is type(model)
    result.save_pretrained(tmp_path / "m")
    again = loaded(name, tmp_path / "m")
    torch.manual_seed(1)
    given = {k: v[:1, :7] if v.dim() == 2 else v[:1] for k, v in inputs(name).items()}
    expected = logits(result.module, given)
    assert difference([expected], [logits(own, given)]) < 1e-5
    assert difference([expected], [logits(again, given)]) < 1e-5
    assert sum(p.numel() for p in again.parameters()) < 0.9 * sum(p.numel() for p in model.parameters())
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("name", slow_but([], CAUSAL))
def test_generates_what_its_own_argmax_is(name: str, tmp_path: Path) -> None:
    """Greedy generation with the class's cache, against argmax of the graph module without one."""
    result = plain_merge(model_of(name), inputs(name), ratio=0.3)
    prompt = torch.randint(3, 60, (2, 4))
    tokens = prompt
    for _ in range(12):
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        tokens = torch.cat([tokens, logits(result.module, given)[:, -1:].argmax(-1)], 1)
    result.save_pretrained(tmp_path / "m")
    for model in (result.model, loaded(name, tmp_path / "m")):
        found = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert torch.equal(found, tokens)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == model.config.tie_word_embeddings


@pytest.mark.slow
def test_widths_that_a_configuration_has_are_a_plain_model(tmp_path: Path) -> None:
    """The width of the MLPs alone: no code in the folder, and the class itself reads it."""
    model, given = model_of("LlamaForCausalLM"), inputs("LlamaForCausalLM")
    result = plain_merge(model, given, ratio=0.5, ignore=("*self_attn*", "*embed*"))
    result.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.rglob("*.py"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["intermediate_size"], config["hidden_size"]) == (24, 32)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert difference([logits(result.module, given)], [logits(again, given)]) < 1e-5


@pytest.mark.slow
def test_whole_heads_are_a_plain_model(tmp_path: Path) -> None:
    """Key-value heads leave together with their queries."""
    model, given = model_of("LlamaForCausalLM"), inputs("LlamaForCausalLM")
    result = plain_merge(model, given, ratio=0.5, heads="whole", ignore=("*embed*",))
    result.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["num_attention_heads"]) == (1, 2)
    assert "fxmerge" not in config
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert difference([logits(result.module, given)], [logits(again, given)]) < 1e-5


@pytest.mark.slow
def test_what_is_not_written(tmp_path: Path) -> None:
    plain = plain_merge(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)), torch.randn(2, 4))
    with pytest.raises(FxMergeError, match=r"Sequential is not a model of Hugging Face transformers; use result.save"):
        plain.save_pretrained(tmp_path / "m")
    result = plain_merge(model_of("LlamaForCausalLM"), inputs("LlamaForCausalLM"), ratio=0.5)
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "mine.txt").write_text("")
    with pytest.raises(FxMergeError, match=r"mine.txt, which fxmerge did not write"):
        result.save_pretrained(tmp_path / "n")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text("{}")
    result.save_pretrained(tmp_path / "t")
    result.save_pretrained(tmp_path / "t")
    assert (tmp_path / "t" / "tokenizer.json").read_text() == "{}"
