"""The values at the end of a graph are computed again instead of stored, and the result is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration import batches, stream
from fxmerge.calibration.tail import Recomputed, tail
from fxmerge.capture.capture_model import capture

WORDS, WIDTH, LENGTH = 96, 12, 5


class Speaker(nn.Module):
    """A small language model: its head is much wider than all before it."""

    def __init__(self, softmax: Any = None) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.head, self.softmax = nn.Linear(WIDTH, WORDS), softmax or (lambda y: y.log_softmax(-1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.down(torch.relu(self.up(x)))
        out: Tensor = self.softmax(self.head(x))
        return out


def speaker(**kwargs: Any) -> tuple[nn.Module, Tensor, list[Tensor]]:
    model, ids = Speaker(**kwargs).eval(), torch.randint(WORDS, (40, LENGTH))
    return model, ids[:2], list(ids.split(4))


def ends(model: nn.Module, ids: Tensor) -> frozenset[str]:
    captured = capture(model, ids)
    return tail(captured.module, {layer.node for layer in provenance(captured).layers})


def test_the_tail_is_the_last_layer_and_what_follows() -> None:
    model, ids, _ = speaker()
    assert ends(model, ids) == {"head", "log_softmax", "output"}


def test_there_is_none_where_an_op_is_in_place() -> None:
    model, ids, _ = speaker(softmax=lambda y: y.log_softmax(-1).add_(1))
    assert ends(model, ids) == frozenset()


def test_merged_and_refitted_as_if_all_were_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, data = speaker()
    found = []
    for large in (2**40, 0):
        monkeypatch.setattr(stream, "LARGE", large)
        result = fxmerge.merge(model, ids, ratio=0.25, calibration=data)
        assert any(layer.solved for layer in result.report.refitted)
        found.append(result.module(torch.cat(data)))
    assert torch.equal(*found)


def test_recomputed_values_are_not_stored() -> None:
    runs: list[int] = []
    values = Recomputed(lambda number: runs.append(number) or torch.tensor(number), range(4))
    assert [int(v) for v in values] == [0, 1, 2, 3] and len(values) == 4
    assert int(values[-1]) == 3 and runs == [0, 1, 2, 3]  # the last one is stored
    assert [int(v) for v in values[1:3]] == [1, 2] and runs == [0, 1, 2, 3, 1, 2]
    values.forget()
    assert int(values[3]) == 3 and len(runs) == 7


def test_the_head_does_not_limit_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples as fit without the head's outputs and the embedding's weights; the report says what is left."""
    model, ids, data = speaker()
    monkeypatch.setattr(batches, "ELEMENTS", 40 * LENGTH * 24)
    report = fxmerge.merge(model, ids, ratio=0.25, calibration=data).report
    assert "refit ran on 40 calibration samples\n" in report.text()
    monkeypatch.setattr(batches, "ELEMENTS", 8 * LENGTH * 24)
    report = fxmerge.merge(model, ids, ratio=0.25, calibration=data).report
    assert "refit ran on 8 calibration samples, the others left out for their memory\n" in report.text()


def test_fewer_probes_where_each_holds_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, _ = speaker()
    captured = capture(model, ids)
    monkeypatch.setattr(batches, "FORWARD", 0)
    for tokens, count in ((2**13, 128), (20 * LENGTH, 20), (1, 1)):
        monkeypatch.setattr(batches, "TOKENS", tokens)
        assert batches.enough(captured, provenance(captured)) == count
