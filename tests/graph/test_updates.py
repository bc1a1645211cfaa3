"""Statements that update a tensor in place, and whose own value nobody reads, stay in the merged graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.silencing import error_of_silence


class Shifted(nn.Module):
    """Tokens that are moved by one, behind a start token, as an encoder-decoder makes its decoder's inputs."""

    def __init__(self, exported: bool) -> None:
        super().__init__()
        self.table, self.fc1, self.fc2 = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 4)
        self.exported = exported

    def forward(self, ids: Tensor) -> Tensor:
        if self.exported and ids.shape[1] < 2:  # torch.fx's tracer cannot follow this
            raise ValueError("too short")
        moved = ids.new_zeros(ids.shape)
        moved[:, 1:] = ids[:, :-1].clone()
        moved[:, 0] = 17
        moved.masked_fill_(moved == 5, 3)
        return self.fc2(torch.relu(self.fc1(self.table(moved))))


@pytest.mark.parametrize("exported", [True, False])
def test_tokens_that_are_shifted_in_place(exported: bool) -> None:
    torch.manual_seed(0)
    ids, unseen = torch.randint(0, 16, (3, 9)), torch.randint(0, 16, (4, 9))
    error, result = error_of_silence(Shifted(exported), ids, unseen, ratio=0.5)
    assert error < 1e-6
    assert [g for g in result.plan.groups if len(g.kept) < g.channels]


class Doubling(nn.Module):
    """An update by a method, as a statement, in a model with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.seen = nn.Linear(8, 12), nn.Linear(12, 4), 0
        self.fc1.register_forward_hook(lambda module, args, out: out + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        h.mul_(2)
        return self.fc2(h)


def test_an_update_by_a_method_in_a_model_with_hooks() -> None:
    torch.manual_seed(0)
    error, result = error_of_silence(Doubling(), torch.randn(3, 8), torch.randn(5, 8), ratio=0.5)
    assert error < 1e-6
    assert "mul_" in [node.target for node in result.module.graph.nodes]  # torch.fx's tracer was enough
    assert [g for g in result.plan.groups if len(g.kept) < g.channels]
