"""Models on the meta device can be analysed like models with weights, but not merged."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError
from tests.helpers.nets import NETS


@pytest.mark.parametrize("name", NETS)
def test_analysis_is_that_of_the_model_with_weights(name: str) -> None:
    model, x = NETS[name]()
    before, after = fxmerge.analyze(model, x), fxmerge.analyze(copy.deepcopy(model).to("meta"), x)
    assert [(g.name, g.atoms.tolist()) for g in after.groups] == [(g.name, g.atoms.tolist()) for g in before.groups]
    assert after.refusals == before.refusals
    assert after.report.text() == before.report.text() and after.report.json() == before.report.json()


class Table(nn.Module):
    """A model that symbolic tracing cannot follow, with a buffer of indices into the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.arange(8).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))[:, self.order]  # type: ignore[index]
        if y.dim() > 1:
            y = y * 2
        out: Tensor = self.b(y)
        return out


def test_exported_and_with_a_buffer_of_values() -> None:
    model, x = Table().eval(), torch.randn(2, 6)
    bare = copy.deepcopy(model)
    bare.a.to("meta"), bare.b.to("meta")
    before, after = fxmerge.analyze(model, x), fxmerge.analyze(bare, x)
    assert before.captured.route == after.captured.route == "export"
    assert [g.atoms.tolist() for g in after.groups] == [g.atoms.tolist() for g in before.groups] != []


def test_what_needs_values_says_so() -> None:
    model, x = NETS["mlp"]()
    bare = copy.deepcopy(model).to("meta")
    with pytest.raises(FxMergeError, match=r"fxmerge\.on_disk"):
        fxmerge.merge(bare, x)
    with pytest.raises(FxMergeError, match=r"fxmerge\.on_disk"):
        fxmerge.apply(fxmerge.merge(model, x, refit="none").plan, bare, x)
    found = fxmerge.analyze(bare, x)
    with pytest.raises(FxMergeError, match="no values to verify"):
        fxmerge.verify.permutation(found.captured, found.facts, found.grouping)
    assert bare.state_dict().keys() == model.state_dict().keys()
    assert all(p.is_meta for p in bare.parameters())  # as it was


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return y if y.sum() > 0 else -y


def test_a_forward_that_asks_for_values_is_refused() -> None:
    with torch.device("meta"):
        bare = Asking()
    with pytest.raises(FxMergeError, match="weights on the meta device have no values"):
        fxmerge.analyze(bare, torch.randn(2, 6))
