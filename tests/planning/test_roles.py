"""With `same_widths`, repeated blocks get the same widths, and without `new_biases`, no layer gets a bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.export.check import difference
from fxmerge.ir.groups import Refusal
from fxmerge.planning.roles import without
from tests.helpers.language_models import llama
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, hidden, bias=False), nn.Linear(hidden, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Tower(nn.Module):
    """Four blocks of which three are as wide as each other; their weights differ much in size."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(n) for n in (20, 20, 28, 20))
        self.head = nn.Linear(12, 3)
        randomised(self, 1)
        with torch.no_grad():
            for block, size in zip(self.blocks, (0.01, 0.1, 1.0, 4.0), strict=True):
                block.down.weight.mul_(size)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def widths(module: nn.Module) -> list[int]:
    return [module.get_submodule(f"blocks.{i}.up").weight.size(0) for i in range(4)]


class Scaled(Tower):
    """Two of the blocks share a scale of their channels, and so lose the same ones; a third has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.rand(20) + 0.5 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for number, scale in ((0, 0), (1, 1), (3, 0)):
            block = self.blocks[number]
            x = x + block.down(torch.relu(block.up(x)) * self.scales[scale])
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("same_widths", [True, False])
def test_a_group_of_several_blocks_has_the_width_of_a_single_one(same_widths: bool) -> None:
    """As the two kinds of layers of Gemma 3, which have a table of rotary angles each."""
    result = plain_merge(
        Scaled().eval(), torch.randn(64, 12), budget={"params": 0.6}, ignore=("head",), same_widths=same_widths
    )
    producers = {g.name: len(g.producers) for g in result.analysis.groups if g.name.startswith("blocks")}
    assert sorted(producers.values()) == [1, 2]
    kept = dict.fromkeys(producers, 20) | {g.name: len(g.kept) for g in result.plan.groups if g.name in producers}
    assert (len(set(kept.values())) == 1) is same_widths
    assert max(kept.values()) < 20 or not same_widths


@pytest.mark.parametrize("allocation", ["greedy", "uniform"])
@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize("refit", ["none", "synthetic"])
def test_blocks_of_one_size_have_one_width_under_a_budget(allocation: str, kind: str, refit: str) -> None:
    model, x = Tower().eval(), torch.randn(64, 12)
    given: Any = {"budget": {kind: 0.6}, "ignore": ("head",), "allocation": allocation, "refit": refit, "samples": 64}
    result = fxmerge.merge(model, x, same_widths=True, new_biases=False, **given)
    found = widths(result.module)
    assert found[0] == found[1] == found[3] < 20
    left = result.report.spent.left
    assert 0.5 < left <= 0.606, "a step takes a channel of three blocks at once"


def test_without_the_option_they_differ() -> None:
    """At this budget whatever the inputs are; at 0.6, dividing it equally loses less on one in four."""
    model, x = Tower().eval(), torch.randn(64, 12)
    found = widths(plain_merge(model, x, budget={"params": 0.7}, ignore=("head",)).module)
    assert len({found[0], found[1], found[3]}) > 1


def test_what_keep_says_stays() -> None:
    model, x = Tower().eval(), torch.randn(64, 12)
    result = plain_merge(model, x, budget={"params": 0.6}, ignore=("head",), same_widths=True, keep={"blocks.1.up": 20})
    found = widths(result.module)
    assert found[1] == 20
    assert found[0] == found[3] < 20


@pytest.mark.parametrize("same_widths", [True, False])
def test_a_block_that_cannot_be_cut_keeps_the_others_of_its_role(same_widths: bool) -> None:
    groups = fxmerge.analyze(Tower().eval(), torch.randn(2, 12)).groups
    left, mates = without(groups, [Refusal("blocks.1.up", 20, "why", "")], same_widths)
    assert {g.name for g in groups} - {g.name for g in left} == {"blocks.1.up"} | {m.name for m in mates}
    assert [m.name for m in mates] == (["blocks.0.up", "blocks.3.up"] if same_widths else [])
    assert all("as wide as blocks.1.up" in m.reason for m in mates)


@pytest.mark.parametrize("decomposition", ["auto", "lstsq", "fold", "mostsim"])
@pytest.mark.parametrize("refit", ["none", "synthetic"])
def test_no_new_biases(decomposition: str, refit: str) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
            self.b, self.m = nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)
            self.o, self.w = nn.Linear(16, 8, bias=False), nn.Parameter(torch.ones(8, 4))
            randomised(self, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.n(self.a(x)))
            x = torch.relu(self.m(self.b(x))).mean((2, 3))
            return torch.relu(self.o(x)) @ self.w

    model, x = Normed().eval(), torch.randn(8, 3, 9, 9)
    given: Any = {"ratio": 0.5, "decomposition": decomposition, "refit": refit, "samples": 64}
    result = fxmerge.merge(model, x, new_biases=False, **given)
    assert {n for n, _ in result.module.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert result.model is not None
    more = fxmerge.merge(model, x, **given).module
    if (refit, decomposition) == ("synthetic", "auto"):
        assert {n for n, _ in more.named_parameters()} > {n for n, _ in model.named_parameters()}, "refit adds some"


@pytest.mark.slow
@pytest.mark.parametrize("by", [{"budget": {"params": 0.7}, "same_widths": True}, {"ratio": 0.5}])
def test_a_refitted_llama_is_a_plain_folder(by: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = llama(layers=3)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(2.0**i)  # so that a budget would be divided unequally
    batch = {"input_ids": torch.randint(3, 60, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}
    result = fxmerge.merge(
        model, batch, heads="whole", ignore=("*embed_tokens*",), new_biases=False, samples=64, **by
    )
    assert any(r.after < r.before for r in result.report.refitted)
    assert not [name for name, _ in result.module.named_parameters() if name.endswith("bias")]
    result.save_pretrained(tmp_path / "m")
    assert not list(tmp_path.rglob("*.py"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert type(again) is transformers.LlamaForCausalLM
    assert again.config.intermediate_size < 64
    given = {"input_ids": torch.randint(3, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        assert difference([result.module(**given)["logits"]], [again(**given).logits]) < 1e-5
    tokens = given["input_ids"]
    for _ in range(10):
        with torch.no_grad():
            made = result.module(input_ids=tokens, attention_mask=torch.ones_like(tokens))["logits"]
        tokens = torch.cat([tokens, made[:, -1:].argmax(-1)], 1)
    found = again.generate(**given, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(found, tokens)
