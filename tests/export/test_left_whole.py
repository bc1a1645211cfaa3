"""The report of a merge whose class cannot take it names the groups to leave whole; the tests follow its advice."""

from __future__ import annotations

import ast
import re

import torch
from torch import Tensor, nn

import fxmerge


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
