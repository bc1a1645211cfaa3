"""Silent non-events speak: nothing merged, a ratio below one channel, random weights, training mode; words."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from torch import nn

from fxmerge.report.reports import Report
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(4, 6)


def net(norm: bool = False) -> nn.Module:
    layers = [nn.Linear(6, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 2)).eval()


def notices(model: nn.Module, **options: Any) -> tuple[str, ...]:
    """The notices, which the text and the JSON hold too."""
    report: Report = plain_merge(model, X, **options).report
    text = " ".join(report.text(width=400).split())
    assert all(notice in text for notice in report.notices)
    assert json.loads(report.json())["notes"][: len(report.notices)] == list(report.notices)
    return report.notices


def test_nothing_to_say() -> None:
    assert notices(net(), ratio=0.5) == ()
    assert notices(net(), ratio=0, keep={"0": 4}) == ()
    assert notices(net(), ratio=0.5, keep={"0": 16}) == ()
    assert notices(net(), budget={"params": 0.6}) == ()


def test_a_ratio_below_one_channel() -> None:
    nothing, small = notices(net(), ratio=0.02)
    assert nothing.startswith("nothing was merged: every group keeps all")
    assert small == "ratio 0.02 is too small to drop one channel from 0, 2, with at most 16 channels; they keep all"
    (small,) = notices(net(), ratio=0.04)  # 0.64 of 16 channels, 0.32 of 8
    assert "from 2, with at most 8 channels" in small
    (small,) = notices(net(), ratio=0.5, round_to=8)
    assert "a multiple of 8 channels (round_to) from 2," in small
    assert notices(net(), ratio=0) == ("nothing was merged: every group keeps all of its channels",)


def test_nothing_was_merged() -> None:
    assert notices(nn.Linear(6, 2).eval()) == (
        "nothing was merged: no layer of this model has channels that can be dropped, for the reasons above",
    )
    assert notices(net(), ignore=["*"]) == ("nothing was merged: every group is left out, for the reasons above",)


def test_random_weights() -> None:
    """Until one value of one norm has moved; a network without norms cannot tell."""
    model = net(norm=True)
    (random,) = notices(model)
    assert random.startswith("the weights look random: every norm still has the values it starts with")
    model(X)
    assert notices(model) == (random,)
    model.train()(X)
    assert notices(model.eval()) == ()
    assert "random" in notices(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)).eval())[0]


def test_training_mode() -> None:
    """It is told as it was during the merge."""
    model = net().train()
    (told,) = notices(model)
    assert "training mode, and so is result.module" in told
    result = plain_merge(model, X)
    assert result.module.training
    model.eval()
    assert result.report.notices == (told,)


def test_similarity_is_explained_where_it_is_shown() -> None:
    merged = plain_merge(net(), X, decomposition="mostsim").report.text()
    assert "\nsimilarity: how alike dropped channels and what replaces them are" in merged
    assert "similarity" not in plain_merge(net(), X, decomposition="prune").report.text()


def test_what_the_scope_leaves_out_says_why() -> None:
    model, x = NETS["residual"]()
    refused = {r.name: r.reason for r in plain_merge(model, x, scope="internal").report.refusals}
    assert refused["stem"].startswith('is excluded by scope="internal": 2 layers produce these channels')


def test_stages_are_logged_and_nothing_is_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="fxmerge"):
        plain_merge(net(), X)
    stages = [record.getMessage() for record in caplog.records if record.name == "fxmerge"]
    assert stages[0] == "capture" and {"provenance", "groups", "verify"} <= set(stages)
    caplog.clear()
    plain_merge(net(), X)
    assert not [r for r in caplog.records if r.name == "fxmerge"]
    assert capfd.readouterr() == ("", "")
