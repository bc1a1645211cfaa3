"""Which modules of a merged model fetch weights by themselves, and what is said without processes.

tests/capture/test_sharded.py merges in two processes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import fxmerge
from fxmerge.weights import shards


class Net(nn.Module):
    """One layer of its own, one whose weight is also read directly, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.tied.weight
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.tied(self.act(self.read(self.own(x))))) @ self.read.weight
        return y


def test_a_module_whose_weights_something_else_reads_leaves_them_to_the_graph() -> None:
    graph = fx.symbolic_trace(Net())
    assert shards._units(graph, ["own", "tied"]) == ["own", ""]
    assert shards._units(nn.Sequential(graph, nn.Linear(4, 2)), ["0.own", "1", ""]) == ["0.own", "0", "1", ""]


def test_a_users_own_class_is_divided_as_it_was_from_the_inside_out() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    assert shards._units(model, ["", "0", "0.0", "2"]) == ["0.0", "0", ""]  # 2 is no module of this one


def test_a_whole_model_is_left_as_it_is() -> None:
    model = nn.Linear(4, 4)
    found, sharding = shards.undivided(model)
    assert found is model and sharding is None and shards.divided(model, None) is model


def test_a_tensor_that_fully_shard_did_not_divide_is_refused() -> None:
    class Elsewhere(torch.Tensor):
        __module__ = "torch.distributed.tensor"
        placements = ("Shard(dim=1)",)

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean = torch.zeros(2).as_subclass(Elsewhere)
    with pytest.raises(fxmerge.FxMergeError, match=r"1\.running_mean is divided among processes as 'Shard\(dim=1\)'"):
        fxmerge.analyze(model, torch.zeros(3, 2))


def test_the_older_wrapper_is_refused() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"

    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(fxmerge.FxMergeError, match="0 is wrapped in FullyShardedDataParallel, which hides its weights"):
        fxmerge.analyze(model, torch.zeros(3, 2))
