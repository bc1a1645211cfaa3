"""A graph that tracing has frozen in evaluation mode says so when it is put in training mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
Middle = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3), nn.Dropout(0.5)
        self.middle, self.p = middle, 0.0

    def forward(self, x: Tensor) -> Tensor:
        flag = self.training
        y = torch.relu(self.norm(self.a(x)))
        return self.b(self.middle(self, y) if flag is not None else y)  # type: ignore[no-any-return]


def noisy(net: Net, y: Tensor) -> Tensor:
    return y + torch.randn_like(y) if net.training else y


def attended(net: Net, y: Tensor) -> Tensor:
    t = y.unflatten(1, (4, -1))
    return F.scaled_dot_product_attention(t, t, t, dropout_p=0.5 if net.training else 0.0, scale=0.5).flatten(1)


FROZEN: dict[str, Middle] = {
    "dropout": lambda net, y: F.dropout(y, 0.5, net.training),
    "dropout by name": lambda net, y: F.dropout(y, p=0.5, training=net.training),
    "alpha dropout": lambda net, y: F.alpha_dropout(y, 0.5, net.training),
    "attention": attended,
    "a branch": noisy,
}
SAME: dict[str, Middle] = {
    "a module": lambda net, y: net.drop(y),
    "a probability of 0": lambda net, y: F.dropout(y, net.p, net.training),
    "a branch not taken": lambda net, y: F.dropout(y, net.p) if net.training and net.p > 0 else y,
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_graph_of_evaluation_mode_does_not_train(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(FROZEN[name]).eval(), torch.randn(8, 6)
    result = plain_merge(model, x, ratio=0.5)
    result.save(tmp_path / "saved")
    for module in (result.module, copy.deepcopy(result.module), fxmerge.load(tmp_path / "saved")):
        with pytest.raises(RuntimeError, match=r"forward of this model reads self.training.*load\(folder, model=MyNet"):
            module.train()
        assert not module.eval().training
    assert model.train().training
    own = fxmerge.load(tmp_path / "saved", model=Net(FROZEN[name])).train()
    assert not torch.equal(own(x), own(x))  # the remedy trains


@pytest.mark.parametrize("name", SAME)
def test_a_graph_that_is_the_same_in_training_mode_trains(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(SAME[name]).train(), torch.randn(8, 6)
    module = plain_merge(model, x, ratio=0.5).module
    assert module.training
    before = module.get_submodule("norm").running_mean.clone()  # type: ignore[operator, union-attr]
    module(x)
    assert not torch.equal(module.get_submodule("norm").running_mean, before)  # type: ignore[arg-type]


def encoder(dropout: float) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)


class Attended(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Attended, encoder])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_of_torch_drops_its_weights_only_in_training_mode(
    make: Callable[[float], nn.Module], dropout: float
) -> None:
    """The graph that torch.fx traces holds the attention of evaluation mode, which drops nothing."""
    torch.manual_seed(0)
    module = plain_merge(make(dropout).eval(), torch.randn(3, 5, 16), ratio=0.5).module
    if dropout:
        with pytest.raises(RuntimeError, match=r"reads self.training"):
            module.train()
        return
    x = torch.randn(3, 5, 16)
    assert torch.equal(module.train()(x), module.eval()(x))
