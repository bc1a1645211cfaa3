"""The sentence on top of the page: what was done, with which data, and what is lost."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.graph.compare import Verdict
from fxmerge.report.headline import merged
from tests.helpers.drawings import data_of
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


def replaced(report: Any, **changes: Any) -> Any:
    """What the sentence is made from, with some of it changed."""
    fields = ("captured", "plan", "before", "after", "verdict", "source", "handed_out")
    return SimpleNamespace(**{name: getattr(report, name) for name in fields} | changes)


def sentence(report: Any) -> str:
    text = data_of(report.html())["summary"]["sentence"]
    assert isinstance(text, str)
    assert text.endswith(".")
    return text


def test_without_refit_no_data_was_used() -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5)
    text = sentence(result.report)
    assert "without training" in text
    assert "no data was used" in text
    assert "2 groups of layers dropped 50.0 % of their channels" in text  # 6 of 12 and 8 of 16
    left = sum(p.numel() for p in result.module.parameters()) / sum(p.numel() for p in model.parameters())
    assert f"{100 * left:.1f} % of the parameters" in text
    with torch.no_grad():
        off = (result.module(x) - model(x)).norm() / model(x).norm()
    assert f"off by {100 * off:.1f} %" in text


def test_it_names_the_data_of_refit() -> None:
    model, x = NETS["residual"]()
    result = fxmerge.merge(model, x, ratio=0.5, refit="synthetic", samples=16)
    assert result.report.source
    assert f"refit ran on {result.report.source}" in sentence(result.report)
    images = torch.randn(24, *x.shape[1:])
    result = fxmerge.merge(model, x, ratio=0.5, calibration=[images])
    assert "refit ran on 24 calibration samples" in sentence(result.report)


def test_it_says_when_refit_was_not_handed_out() -> None:
    model, x = NETS["residual"]()
    report = plain_merge(model, x, ratio=0.5).report
    other = replaced(report, source="", handed_out=SimpleNamespace(name="pruned"))
    assert "refit was no closer to the original" in merged(other)
    assert "is the one pruned" in merged(other)


def test_it_tells_of_branches_that_were_dropped() -> None:
    model, x = NETS["residual"]()
    report = plain_merge(model, x, ratio=0.5).report
    one = replaced(report, plan=replace(report.plan, branches=("layer1.0",)))
    assert "2 groups of layers dropped 50.0 % of their channels and 1 residual branch left, " in merged(one)
    alone = replaced(report, plan=replace(report.plan, groups=(), branches=("layer1.0", "layer1.1")))
    assert "smaller without training: 2 residual branches left, " in merged(alone)


def test_nothing_merged_and_an_analysis() -> None:
    model, x = NETS["residual"]()
    assert sentence(plain_merge(model, x, ratio=0.5, ignore=("*",)).report).startswith("fxmerge found nothing in ")
    text = sentence(fxmerge.analyze(model, x).report)
    assert "found 2 groups of layers" in text
    assert "1 layer whose channels must stay" in text
    assert text.endswith("nothing was changed.")
    assert "found no group of layers" in sentence(fxmerge.analyze(nn.Linear(8, 16), torch.randn(4, 8)).report)


class Indices(nn.Module):
    """Returns integers only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).argmax(-1)  # type: ignore[no-any-return]


def test_integers_only() -> None:
    torch.manual_seed(0)
    x, model = torch.randn(200, 6), Indices().eval()
    result = plain_merge(model, x, ratio=0.8)
    differing = (result.module(x) != model(x)).double().mean().item()
    assert 0 < differing < 1
    assert f"{100 * differing:.1f} % of its outputs on the example inputs differ" in sentence(result.report)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict(nan, "all zeros"), "could not be measured (all zeros)"),
        (Verdict(1234.5), "off by a factor of 1.23e+03"),
        (Verdict(0.0), "off by 0.0 %"),
    ],
)
def test_losses_in_words(verdict: Verdict, words: str) -> None:
    model, x = NETS["residual"]()
    report = plain_merge(model, x, ratio=0.5).report
    assert words in merged(replaced(report, verdict=verdict))
