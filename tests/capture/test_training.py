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
    t = y.unflatten(1, (4, 4))
    return F.scaled_dot_product_attention(t, t, t, dropout_p=0.5 if net.training else 0.0).flatten(1)


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
