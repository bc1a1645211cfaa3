"""Models that take tuples, lists and dicts of tensors: each tensor is an input of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.capture import symbolic


class Reader(nn.Module):
    """Embeds tokens; takes them with their lengths in one argument, as its data loader gives them."""

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key = key
        self.table, self.a, self.b = nn.Embedding(30, 8), nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, batch: Any) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(self.table(batch[self.key]))))
        return y


class Stateful(nn.Module):
    """An LSTM whose state is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.b = nn.Linear(4, 16), nn.LSTMCell(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, c = self.cell(torch.relu(self.a(x)), state)
        return self.b(h), (h, c)


def lengths(count: int) -> Tensor:
    return torch.full((count,), 7)


def tokens(count: int) -> Tensor:
    return torch.randint(0, 30, (count, 7))


FORMS: dict[str, tuple[nn.Module, Callable[[int], Any]]] = {
    "tuple": (Reader(0), lambda n: ((tokens(n), lengths(n)),)),
    "list": (Reader(0), lambda n: ([tokens(n), lengths(n)],)),
    "dict": (Reader("ids"), lambda n: {"batch": {"ids": tokens(n), "lengths": lengths(n)}}),
    "state": (Stateful(), lambda n: (torch.randn(n, 4), (torch.randn(n, 8), torch.randn(n, 8)))),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_they_are_refitted_with_data_and_without(form: str, given: bool) -> None:
    torch.manual_seed(0)
    model, make = FORMS[form]
    model.eval()
    result = fxmerge.merge(model, make(2), ratio=0.5, calibration=[make(16) for _ in range(4)] if given else None)
    assert "a" in {g.name for g in result.plan.groups}
    assert "relative error on samples held out: refitted" in result.report.text()
    unseen = make(5)
    args, kwargs = ((), unseen) if isinstance(unseen, dict) else (unseen, {})
    found, expected = result.module(*args, **kwargs), model(*args, **kwargs)
    first = found[0] if isinstance(found, tuple) else found
    assert first.shape == (expected[0] if isinstance(expected, tuple) else expected).shape
    assert result.model is not None
    again = result.model(*args, **kwargs)
    assert torch.allclose(again[0] if isinstance(again, tuple) else again, first, atol=1e-5)


def test_refit_is_left_out_where_torch_export_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("not exportable")

    monkeypatch.setattr(symbolic, "export", fails)
    model, pair = Reader(0).eval(), (tokens(4), lengths(4))
    result = fxmerge.merge(model, (pair,), ratio=0.5)
    assert "refit is left out: an argument of the model holds several tensors" in result.report.text(width=400)
    assert result.module(pair).shape == model(pair).shape
    with pytest.raises(fxmerge.FxMergeError, match=r"^an argument of the model holds several tensors"):
        fxmerge.merge(model, (pair,), ratio=0.5, calibration=[(pair,)])
