"""The report of a merge whose class cannot take it names the groups to leave whole; the tests follow its advice."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import fxmerge
from fxmerge.pipeline import Prepared
from fxmerge.weights import stored_tensor


class Reduction(nn.Module):
    """Takes the width of its input for that of its convolution's output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return self.conv(x).reshape(b, c, h // 2, w // 2)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.reduce = nn.Conv2d(width, 2 * width, 1), Reduction(2 * width)
        self.down = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.reduce(torch.relu(self.up(x)))))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return y


def test_what_the_code_cannot_take_is_named_and_leaving_it_whole_helps() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 6, 8, 8)
    wider = {"blocks.*.up": 0.75}
    result = fxmerge.merge(net, x, ratio=0.5, refit="none", keep=wider)
    assert result.model is None
    text = " ".join(result.report.text(400).split())
    assert re.search(r"\(RuntimeError at \S*test_left_whole.py:\d+, in Reduction.forward\)", text)
    (found,) = re.findall(r"there is one with keep=(\{.*?\}), which leaves these groups whole", text)
    keep = ast.literal_eval(found)
    assert keep == {"blocks.*.up": 1.0, "blocks.*.reduce.conv": 1.0}
    advised = fxmerge.merge(net, x, ratio=0.5, refit="none", keep=keep)
    assert type(advised.model) is Net
    torch.testing.assert_close(advised.model(x), advised.module(x))
    assert [g.name for g in advised.plan.groups if len(g.kept) < g.channels] == ["blocks.0.down", "blocks.1.down"]


class Watchful(nn.Module):
    """Compares the width of its input with a number, which is in no call of its graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_channels, self.conv = width, nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.num_channels:
            raise ValueError("wrong channels")
        y: Tensor = self.conv(x)
        return y


def test_a_number_that_is_only_compared_follows() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), Watchful(12)).eval(), torch.randn(2, 3, 4, 4)
    result = fxmerge.merge(net, x, ratio=0.5, refit="none")
    assert result.model is not None
    torch.testing.assert_close(result.model(x), result.module(x))
    assert result.model.get_submodule("2").num_channels == 6


class Pooling(nn.Module):
    """nn.MultiheadAttention computes its three weights from one parameter, and asks for heads of the full width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.relu(self.fc1(self.attention(x, x, x, need_weights=False)[0])))
        return y


def test_weights_that_the_class_computes_are_named_and_leaving_them_whole_helps() -> None:
    torch.manual_seed(0)
    net, x = Pooling().eval(), torch.randn(2, 5, 16)
    result = fxmerge.merge(net, x, ratio=0.5, refit="none")
    assert result.model is None
    text = " ".join(result.report.text(400).split())
    (found,) = re.findall(r"there is one with keep=(\{.*?\}), which leaves these groups whole", text)
    advised = fxmerge.merge(net, x, ratio=0.5, refit="none", keep=ast.literal_eval(found))
    assert type(advised.model) is Pooling
    torch.testing.assert_close(advised.model(x), advised.module(x))
    assert "fc1" in {g.name for g in advised.plan.groups if len(g.kept) < g.channels}


class Averaged(nn.Module):
    """Divides by its own width, which no number outside the code holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        y: Tensor = self.fc2(h / h.shape[-1])
        return y


def test_a_class_that_returns_something_else() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6), Averaged()).eval(), torch.randn(4, 6)
    result = fxmerge.merge(net, x, ratio=0.5, refit="none")
    assert result.model is None
    text = " ".join(result.report.text(400).split())
    (found,) = re.findall(r"there is one with keep=(\{.*?\}), which leaves these groups whole", text)
    assert ast.literal_eval(found) == {"3.fc1": 1.0}
    advised = fxmerge.merge(net, x, ratio=0.5, refit="none", keep=ast.literal_eval(found))
    assert advised.model is not None
    torch.testing.assert_close(advised.model(x), advised.module(x))


@pytest.mark.parametrize("options", [
    {"ratio": 0.5, "refit": "none", "keep": {"blocks.*.up": 0.75}}, {"budget": {"params": 0.9}, "refit": "none"},
    {"ratio": 0.5, "samples": 32, "rows": 512, "keep": {"blocks.*.up": 0.75}},
    {"budget": {"flops": 0.9}, "samples": 32, "rows": 512},
], ids=str)  # fmt: skip
def test_own_class_leaves_whole_what_the_code_cannot_take(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 6, 8, 8)
    assert fxmerge.merge(net, x, **options).model is None
    result = fxmerge.merge(net, x, **options, own_class=True)
    assert type(result.model) is Net
    torch.testing.assert_close(result.model(x), result.module(x))
    narrowed = {g.name for g in result.plan.groups if len(g.kept) < g.channels}
    assert narrowed and narrowed <= {"blocks.0.down", "blocks.1.down"}
    (found,) = re.findall(r"own_class: (\S+), (\S+) stay whole", " ".join(result.report.text(400).split()))
    assert {*found} == {"blocks.*.up", "blocks.*.reduce.conv"}
    assert (result.report.spent is None) == ("ratio" in options)
    again = fxmerge.apply(result.plan, net, x)
    assert [g.kept for g in again.plan.groups] == [g.kept for g in result.plan.groups] and type(again.model) is Net


def test_own_class_of_a_model_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tensor, "SMALL", 0)
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 6, 8, 8)
    save_model(net, str(tmp_path / "w.safetensors"))
    options: dict[str, Any] = {"ratio": 0.5, "refit": "none", "keep": {"blocks.*.up": 0.75}, "own_class": True}
    one, other = (fxmerge.merge(m, x, **options) for m in (net, fxmerge.on_disk(net, tmp_path / "w.safetensors")))
    assert type(other.model) is Net and other.plan == one.plan
    torch.testing.assert_close(other.model(x), one.module(x))


def test_own_class_changes_nothing_where_the_class_takes_the_merge() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)).eval(), torch.randn(4, 6)
    one, other = (fxmerge.merge(net, x, ratio=0.5, samples=64, own_class=own) for own in (False, True))
    assert one.plan.groups == other.plan.groups and one.report.notes == other.report.notes
    torch.testing.assert_close(one.module(x), other.module(x))


class Even(nn.Module):
    """Two layers whose widths are one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, act, down in self.layers:
            x = x + down(act(up(x)).reshape(-1, self.width))
        return x


def test_own_class_lets_layers_share_a_width() -> None:
    """The first layer's channels are nearly copies, so that a budget alone would narrow it much more."""
    torch.manual_seed(0)
    net, x = Even().eval(), torch.randn(4, 5)
    with torch.no_grad():
        for p in (net.layers[0][0].weight, net.layers[0][0].bias):
            p.copy_(p[:1] + 1e-3 * torch.randn_like(p))
    options: dict[str, Any] = {"budget": {"params": 0.6}, "samples": 64}
    plain = fxmerge.merge(net, x, **options)
    assert plain.model is None and [g.name for g in plain.plan.groups] == ["layers.0.0"]
    result = fxmerge.merge(net, x, **options, own_class=True)
    assert type(result.model) is Even and result.model.width < 12
    torch.testing.assert_close(result.model(x), result.module(x))
    assert "own_class: layers of one kind share a width" in " ".join(result.report.text(400).split())


class Fixed(nn.Module):
    """The size is written in its code, so that no group of it can narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(torch.relu(self.fc1(x)).reshape(-1, 16))
        return y


def test_own_class_that_cannot_be_had_is_said() -> None:
    torch.manual_seed(0)
    net, x = Fixed().eval(), torch.randn(4, 6)
    result = fxmerge.merge(net, x, ratio=0.5, refit="none", own_class=True)
    text = " ".join(result.report.text(400).split())
    assert result.model is None and "own_class: not found" in text
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))).eval()
    text = " ".join(fxmerge.merge(traced, x, refit="none", own_class=True).report.text(400).split())
    assert "own_class: a graph of Sequential was given, and no model of its class" in text


def test_a_budget_that_the_class_leaves_no_room_for_is_not_met_at_its_cost() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 6, 8, 8)
    result = fxmerge.merge(net, x, budget={"params": 0.5}, refit="none", own_class=True)
    text = " ".join(result.report.text(400).split())
    assert result.model is None and re.search(r"own_class: not found: blocks\S+ .*stays? whole, but then", text)
    assert result.report.spent is not None and result.report.spent.left == pytest.approx(0.5, rel=0.02)


def test_a_budget_that_equal_widths_cannot_meet_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is asked for, not the equal widths that are tried for it."""
    torch.manual_seed(0)
    choose = Prepared.choose

    def choosing(self: Prepared, options: fxmerge.Options) -> Any:
        if options.same_widths:
            raise fxmerge.FxMergeError("the budget cannot be met")
        return choose(self, options)

    monkeypatch.setattr(Prepared, "choose", choosing)
    result = fxmerge.merge(Fixed().eval(), torch.randn(4, 6), budget={"params": 0.5}, refit="none", own_class=True)
    text = " ".join(result.report.text(400).split())
    assert "own_class: not found: layers of one kind share a width, but then the budget cannot be met" in text


def test_own_class_and_depth_contradict_each_other() -> None:
    with pytest.raises(fxmerge.FxMergeError, match="depth drops branches that the code of own_class runs"):
        fxmerge.Options(budget={"flops": 0.5}, depth=True, own_class=True)
