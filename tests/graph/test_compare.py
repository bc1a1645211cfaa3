"""The verdict of a merge: what cannot be measured is not 0, and every output counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.graph import compare
from fxmerge.graph.compare import Verdict, difference, measured
from tests.helpers.netmaking import plain_merge


class Ends(nn.Module):
    """A small network with an end of its own."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.o, self.end = nn.Linear(6, 16), nn.Linear(16, 3), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.o(torch.relu(self.a(x))))


class Noisy(nn.Module):
    """Noise in the middle: of the hidden width, or of one place that all widths share."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.o, self.noise = nn.Linear(6, 16), nn.Linear(16, 3), noise

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.noise(torch.relu(self.a(x))))
        return out


def verdict(model: nn.Module, ratio: float = 0.5) -> tuple[Verdict, Any, str]:
    torch.manual_seed(0)
    report = plain_merge(model.eval(), torch.randn(4, 6), ratio=ratio).report
    return report.verdict, json.loads(report.json()), report.text(width=200)


UNMEASURABLE = {
    "all zeros": (lambda y: y * 0, "all zeros"),
    "no rows": (lambda y: y[:0], "no elements"),
    "no columns, two outputs": (lambda y: (y[:, :0], y[:0]), "no elements"),
    "all infinite": (lambda y: y / torch.zeros(1), "not finite"),
    "all NaN": (lambda y: y * torch.full((1,), math.nan), "not finite"),
}


@pytest.mark.parametrize("name", UNMEASURABLE)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_what_cannot_be_measured_is_said(name: str, ratio: float) -> None:
    end, why = UNMEASURABLE[name]
    found, data, text = verdict(Ends(end), ratio)
    assert math.isnan(found.error) and why in found.reason
    assert data["error"] is None and data["error_reason"] == found.reason
    assert "on the example inputs: not measurable (" in text and why in text


def test_entries_that_are_infinite_in_both_are_left_out() -> None:
    """The rest is measured, as without the mask."""
    hidden = torch.tensor([True, False, False])
    one, other = Ends(lambda y: y.masked_fill(hidden, -math.inf)), Ends(lambda y: y.masked_fill(hidden, 0.0))
    other.load_state_dict(one.state_dict())
    masked, plain = verdict(one)[0], verdict(other)[0]
    assert masked == plain and 0.01 < masked.error < 2


def test_a_merged_model_that_overflows_has_an_infinite_error() -> None:
    found = measured([torch.ones(3)], [torch.tensor([1.0, math.inf, 1.0])])
    assert found.error == math.inf and "merged model's outputs are not finite" in found.reason


RANDOM = {
    "dropout that is always on": lambda h: F.dropout(h, 0.5, training=True),
    "noise of the hidden width": lambda h: h + torch.randn(h.shape),
    "noise that follows": lambda h: h + torch.randn_like(h),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_outputs_are_not_measurable(name: str) -> None:
    """Where the merged model takes as many numbers as the original, they are the same, and the error counts."""
    noise = RANDOM[name]
    found, data, _ = verdict(Noisy(noise))
    result = plain_merge(Noisy(noise).eval(), torch.randn(4, 6), ratio=0.5)
    if any(len(p.kept) < p.channels for p in result.plan.groups):
        assert math.isnan(found.error) and "random" in found.reason and data["error"] is None
    else:
        assert found.error == 0
    assert verdict(Noisy(noise), ratio=0.0)[0] == Verdict(0.0)


def test_the_same_noise_in_both_is_no_reason() -> None:
    """One number for each row, after which the draws of both models are the same."""
    found, _, _ = verdict(Noisy(lambda h: h * torch.rand(len(h), 1)))
    assert 0.01 < found.error < 2 and not found.reason


@pytest.mark.parametrize("rows", ["as the input", "given"])
def test_a_generator_of_the_models_own(rows: str) -> None:
    """A graph that keeps one generator takes other numbers at each run: the error is not measurable, or it is right."""
    model = Noisy(
        lambda h: h
        + torch.randn(h.shape[0] if rows == "given" else h.shape, generator=torch.Generator().manual_seed(1)).view(
            len(h), -1
        )[:, :1]
    ).eval()
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    try:
        result = plain_merge(model, x, ratio=0.5)
    except fxmerge.FxMergeError:
        return
    found = result.report.verdict
    if math.isnan(found.error):
        assert "random" in found.reason
    else:
        before, after = model(x), result.module(x)
        assert found.error == pytest.approx(float((before - after).norm() / before.norm()))


def test_integers_count_as_the_share_of_entries_that_differ() -> None:
    torch.manual_seed(0)
    model, x = Ends(lambda y: (y, y.argmax(1), y > 0)).eval(), torch.randn(40, 6)
    result = plain_merge(model, x, ratio=0.7)
    before, after = model(x), result.module(x)
    wrong = [int((before[i] != after[i]).sum()) for i in (1, 2)]
    found = result.report.verdict
    assert found.differing == sum(wrong) / (40 + 120) > 0
    assert found.error == pytest.approx(float((before[0] - after[0]).norm() / before[0].norm()))
    assert json.loads(result.report.json())["error_of_integers"] == found.differing
    assert "share of the integer outputs' entries that differ" in result.report.text(width=200)


def test_a_model_of_labels_only() -> None:
    torch.manual_seed(0)
    model, x = Ends(lambda y: y.argmax(1)).eval(), torch.randn(40, 6)
    result = plain_merge(model, x, ratio=0.7)
    assert result.report.verdict.error == float((model(x) != result.module(x)).double().mean()) > 0
    assert plain_merge(model, x, ratio=0.0).report.verdict == Verdict(0.0, differing=0.0)


def test_complex_outputs_count() -> None:
    """Imaginary parts alone, and beside a real output that is right."""

    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Linear(6, 16, dtype=torch.cfloat), nn.Linear(16, 3, dtype=torch.cfloat)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.real, self.o(self.a(x))

    torch.manual_seed(0)
    model, x = Spectrum().eval(), torch.randn(8, 6, dtype=torch.cfloat)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    before, after = model(x)[1], result.module(x)[1]
    error = float((before - after).abs().square().sum() / before.abs().square().sum()) ** 0.5
    assert result.report.verdict.error == pytest.approx(error) and error > 0


@pytest.mark.parametrize("size", [1.0, 1e5])
def test_a_large_output_does_not_hide_another(size: float) -> None:
    """A table of anchors beside the scores, say: it is right in both, and the scores are not."""
    torch.manual_seed(0)
    model, x = Ends(lambda y: (torch.full_like(y, size), y)).eval(), torch.randn(40, 6)
    result = plain_merge(model, x, ratio=0.5)
    before, after = model(x)[1], result.module(x)[1]
    assert result.report.verdict.error == pytest.approx(float((before - after).norm() / before.norm())) != 0


def test_an_output_of_zeros_is_measured_by_the_others() -> None:
    zeros, ones = torch.zeros(2), torch.ones(4)  # |(zeros, ones)| = 2
    assert difference([zeros, ones], [torch.tensor([0.0, 0.5]), ones]) == pytest.approx(0.25)
    assert difference([ones * 1e-20, ones], [ones * 0, ones]) < 1e-19


def test_large_outputs_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any strides, and with the last piece shorter; a difference in any of them is found."""
    monkeypatch.setattr(compare, "PIECE", 7)
    one = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).T
    for place in range(one.numel()):
        other = one.clone()
        other[place // 5, place % 5] += 1
        assert compare.difference([one], [other]) == pytest.approx(1 / float(one.norm()), rel=1e-5)
