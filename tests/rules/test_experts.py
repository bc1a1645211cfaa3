"""Mixtures of experts of transformers: each expert narrows by its own choice, on whatever tokens it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fxmerge
from fxmerge import verify
from tests.helpers.mixtures import KINDS, divided_work, logits, model_of, tokens
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.two_processes import run_on_two

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"


def halves(name: str, width: int) -> Tensor:
    """The rows of gate and up of each channel, (width, 2)."""
    at = torch.arange(width)
    return torch.stack([2 * at, 2 * at + 1] if name == "GptOss" else [at, at + width], 1)


def narrowed(name: str, model: Any, kept: Tensor, shared: Tensor, **more: Any) -> Any:
    """A model of a narrower configuration whose experts have these channels, (experts, k), of the model's.

    shared: the channels, (k,), of an expert for all tokens
    """
    width = getattr(model.config, KINDS[name][1])
    small = model_of(name, **{KINDS[name][1]: kept.size(1)} | more)
    state = model.state_dict()
    experts = "model.layers.0.mlp.experts."
    for e, own in enumerate(kept):
        rows = halves(name, width)[own]
        into = halves(name, kept.size(1))
        for key in [k for k in state if k.startswith(experts)]:
            value, target = state[key][e], dict(small.state_dict())[key]
            if key.endswith("gate_up_proj_bias"):
                target[e, into] = value[rows]
            elif key.endswith("gate_up_proj"):
                if name == "GptOss":
                    target[e][:, into] = value[:, rows]
                else:
                    target[e, into] = value[rows]
            elif key.endswith("down_proj"):
                target[e] = value[own] if name == "GptOss" else value[:, own]
            else:
                target[e] = value
    others = {k: v for k, v in state.items() if not k.startswith(experts)}
    for key, value in others.items():
        if "shared_experts" in key:
            others[key] = value[:, shared] if "down_proj" in key else value[shared]
    small.load_state_dict(others, strict=False)
    return small


def kept_of(result: fxmerge.Result, experts: int) -> Tensor:
    """The channels that each expert keeps, (experts, k)."""
    (plan,) = (p for p in result.plan.groups if p.name == EXPERTS)
    kept = torch.tensor(plan.kept)
    width = plan.channels // experts
    return torch.stack([kept[kept // width == e] % width for e in range(experts)])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_each_expert_narrows_by_its_own_choice(name: str) -> None:
    """As a model of a narrower configuration with the same weights; on other numbers of tokens, routed otherwise."""
    model = model_of(name)
    keep = {"*embed_tokens*": 1.0, "*self_attn*": 1.0}
    result = plain_merge(model, {"input_ids": tokens(2, 7)}, ratio=0.5, decomposition="prune", keep=keep)
    kept = kept_of(result, 4)
    assert kept.shape == (4, 8)
    assert len({tuple(row) for row in kept.tolist()}) > 1  # not the same channels in all experts
    shared = [torch.tensor(p.kept) for p in result.plan.groups if "shared_experts" in p.name]
    small = narrowed(name, model, kept, shared[0] if shared else kept[0])
    for shape in ((1, 3), (5, 2), (3, 11)):
        ids = tokens(*shape, seed=sum(shape))
        assert torch.allclose(logits(result.module, ids), logits(small, ids), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_experts_pass_the_oracles(name: str) -> None:
    """All groups, whatever they hold; the silenced copy runs in the user's own class, on other tokens."""
    result = plain_merge(model_of(name), {"input_ids": tokens(2, 7)}, ratio=0.5, decomposition="prune")
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    silence = verify.silence(found.captured, found.facts, found.grouping, result.plan)
    assert "all" in silence.errors
    assert max(silence.errors.values()) < 1e-9, silence


def few_tokens(model: Any) -> Tensor:
    """Tokens that are sent to some of the experts only."""
    ids, used = torch.full((2, 4), 7), set[int]()
    gate = model.model.layers[0].mlp.gate
    hook = gate.register_forward_hook(lambda m, args, out: used.update(out[2].flatten().tolist()))
    logits(model, ids)
    hook.remove()
    assert len(used) < model.config.num_local_experts
    return ids


@pytest.mark.slow
def test_experts_that_get_no_token_of_the_example_narrow_too() -> None:
    model = model_of("Mixtral", num_local_experts=8)
    keep = {"*embed_tokens*": 1.0, "*self_attn*": 1.0}
    ids = few_tokens(model)
    result = plain_merge(model, {"input_ids": ids}, ratio=0.5, decomposition="prune", keep=keep)
    kept = kept_of(result, 8)
    small, other = narrowed("Mixtral", model, kept, kept[0], num_local_experts=8), tokens(3, 11)
    assert torch.allclose(logits(result.module, other), logits(small, other), rtol=0, atol=1e-5)


def test_a_loop_over_the_experts_in_use_is_not_frozen() -> None:
    """It cannot be traced; the experts stay in the user's code, which runs as it did."""
    model = model_of("Mixtral", num_local_experts=8)
    model.set_experts_implementation("eager")
    result = plain_merge(model, {"input_ids": few_tokens(model)}, ratio=0.5, decomposition="prune")
    assert not any("experts" in p.name for p in result.plan.groups)
    assert any("experts" in r.name and "depend on the input" in r.reason for r in result.report.refusals)
    other = tokens(3, 11)
    assert torch.allclose(logits(result.module, other), logits(model, other), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_refit_solves_each_expert_on_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the channels are copies: without them, the others carry all. An expert without tokens is not changed."""
    monkeypatch.setitem(fxmerge.SELECTORS, "first", lambda channels, count: torch.arange(count))
    model = model_of("GptOss")
    mlp, width = model.model.layers[0].mlp, 16
    first, second = halves("GptOss", width)[:8].flatten(), halves("GptOss", width)[8:].flatten()
    with torch.no_grad():
        mlp.router.bias[3] = -100.0
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            value = getattr(mlp.experts, name)
            value[..., second] = value[..., first]
    data = [{"input_ids": tokens(32, 12, seed=s)} for s in range(4)]
    options: dict[str, Any] = {"ratio": 0.5, "decomposition": "prune", "selection": "first",
                               "keep": {"*embed_tokens*": 1.0, "*self_attn*": 1.0}}  # fmt: skip
    pruned = plain_merge(model, {"input_ids": tokens(2, 7)}, **options)
    fitted = fxmerge.merge(model, {"input_ids": tokens(2, 7)}, calibration=data, **options)
    ids = tokens(6, 9, seed=99)
    right = logits(model, ids)
    lost = [float((logits(r.module, ids) - right).norm() / right.norm()) for r in (pruned, fitted)]
    assert lost[1] < 0.1 * lost[0], lost
    down = "model.layers.0.mlp.experts.down_proj"
    one, other = (r.module.get_parameter(down) for r in (pruned, fitted))
    assert torch.equal(one[3], other[3])
    whole = mlp.experts.down_proj
    assert torch.allclose(other[:3], whole[:3, :8] + whole[:3, 8:], rtol=0, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_own_class_and_plain_folder(name: str, tmp_path: Any) -> None:
    """One configuration describes the experts, whichever channels each of them has kept."""
    model = model_of(name)
    keep = {"*embed_tokens*": 1.0, "*self_attn*": 1.0}
    result = plain_merge(model, {"input_ids": tokens(2, 7)}, ratio=0.5, decomposition="prune", keep=keep)
    assert type(result.model) is type(model), result.report.text()
    ids = tokens(3, 5, seed=4)
    assert torch.allclose(logits(result.model, ids), logits(result.module, ids), rtol=0, atol=1e-5)
    if name in ("Mixtral", "Qwen3Moe"):  # the others call ops that source code cannot spell
        result.save(tmp_path / "source")
        assert "transformers" not in (tmp_path / "source" / "model.py").read_text()  # plain torch
        loaded = fxmerge.load(tmp_path / "source")
        assert torch.allclose(logits(loaded, ids), logits(result.module, ids), rtol=0, atol=1e-5)
    result.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert getattr(again.config, KINDS[name][1]) == 8
    assert torch.allclose(logits(again, ids), logits(result.module, ids), rtol=0, atol=1e-5)


def test_two_processes_of_which_one_uses_few_experts(tmp_path: Path) -> None:
    """The same bits in both, and nearly those of one process. It would wait for ever where a process that sends no row
    to an expert leaves out a sum over the processes.
    """
    run_on_two("distributed_mixture.py", tmp_path)
    for experts in (1.0, 0.5):
        one, other = (load_file(tmp_path / f"{experts}_{rank}.safetensors") for rank in range(2))
        alone = fxmerge.merge(model_of("Mixtral"), **divided_work(), experts=experts).module.state_dict()
        assert set(one) == set(alone)
        for key, value in alone.items():
            assert torch.equal(one[key], other[key])
            torch.testing.assert_close(one[key], value, rtol=0.1, atol=0.1)
