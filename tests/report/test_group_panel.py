"""The numbers in the page's panel for each group, compared with the plan and with numbers counted by hand."""

from __future__ import annotations

import base64
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxmerge
from fxmerge.graph.nested import finite
from fxmerge.planning.statistics import state
from fxmerge.report.picture import group_panel
from tests.helpers.drawings import data_of
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


def square(likeness: dict[str, Any]) -> Any:
    n = len(likeness["channels"])
    bytes_ = np.frombuffer(base64.b64decode(likeness["cosines"]), dtype=np.uint8)
    full = np.eye(n)
    full[np.triu_indices(n, 1)] = bytes_ / 127 - 1
    return np.triu(full) + np.triu(full, 1).T


@pytest.mark.parametrize("name", NETS)
def test_every_page_is_made(name: str) -> None:
    model, x = NETS[name]()
    result = plain_merge(model, x, ratio=0.5)
    data = data_of(result.report.html())
    assert [g["name"] for g in data["groups"]] == [g.name for g in result.analysis.groups]
    assert {g["name"]: g["kept"] for g in data["groups"] if g["dropped"]} == {
        p.name: len(p.kept) for p in result.plan.groups
    }
    for g in data["groups"]:
        assert np.isfinite(square(g["likeness"])).all()
        assert sorted(g["likeness"]["channels"]) == list(range(g["channels"]))
        assert g["dropped"] == g["channels"] - g["kept"]
    summary = data_of(result.analysis.report.html())["summary"]
    assert summary["parameters"] == [sum(p.numel() for p in model.parameters())]


def test_the_heat_map_shows_the_cosines_that_the_merge_went_by() -> None:
    for name in ("residual", "chain_2d", "mlp", "activations", "dense"):
        model, x = NETS[name]()
        with torch.no_grad():
            for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine):
                norm.weight[::2] *= -1  # a pair of opposite gammas gets the opposite cosine
        result = plain_merge(model, x, ratio=0.5, threshold=0.0, decomposition="mostsim")
        groups = {g["name"]: g for g in data_of(result.report.html())["groups"]}
        for plan in result.plan.groups:
            like = groups[plan.name]["likeness"]
            seen = square(like)
            at = {channel: i for i, channel in enumerate(like["channels"])}
            assert [c == "1" for c in like["kept"]] == [channel in plan.kept for channel in like["channels"]]
            if groups[plan.name]["scaleBlocks"]:
                continue  # merged without rescaling: rows are compared for equality, not for parallelism
            for p in plan.partners:
                if p.into >= 0:
                    assert seen[at[p.channel], at[p.into]] == pytest.approx(p.cosine, abs=0.012), (name, plan.name)


def test_cosines_of_plain_rows() -> None:
    model = nn.Sequential(nn.Linear(5, 40, bias=False), nn.ReLU(), nn.Linear(40, 3))
    found = fxmerge.analyze(model, torch.randn(2, 5))
    at = torch.tensor([0, 7, 39])
    seen = group_panel.cosines(found.groups[0], found.captured, state(found.captured.module), fxmerge.Options(), at)
    rows = F.normalize(model[0].weight[at].detach().double())
    assert torch.allclose(seen, rows @ rows.T)


def test_wide_groups_are_sampled_evenly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 500), nn.ReLU(), nn.Linear(500, 3))
    group = data_of(plain_merge(model, torch.randn(2, 5), ratio=0.5).report.html())["groups"][0]
    channels = sorted(group["likeness"]["channels"])
    assert len(channels) == group_panel.SIDE
    assert (channels[0], channels[-1]) == (0, 499)
    assert max(b - a for a, b in itertools.pairwise(channels)) <= 8
    assert 0 < len(group["partners"]) <= group_panel.PARTNERS
    assert group["dropped"] == 250


def test_costs_of_a_group_by_hand() -> None:
    model, x = NETS["residual"]()
    group = data_of(plain_merge(model, x, ratio=0.5).report.html())["groups"][1]
    # a: 12 -> 16 channels, 3 x 3, with its BatchNorm; b: 16 -> 12; 8 of 16 are kept, and 6 of the stream's 12
    assert group["parameters"] == [12 * 16 * 9 + 16 + 32 + 16 * 12 * 9 + 12, 6 * 8 * 9 + 8 + 16 + 8 * 6 * 9 + 6]
    assert group["flops"] == [2 * 2 * 64 * 9 * (12 * 16 + 16 * 12), 2 * 2 * 64 * 9 * (6 * 8 + 8 * 6)]
    assert (group["producers"], group["per_channel_params"], group["consumers"]) == (["a"], ["an"], ["b"])


def test_refit_errors_are_shown() -> None:
    model, x = NETS["residual"]()
    result = fxmerge.merge(model, x, ratio=0.5, refit="synthetic", samples=16)
    shown = {r["name"]: r for g in data_of(result.report.html())["groups"] for r in g["refit"]}
    assert shown == {r.name: vars(r) for r in result.report.refitted if r.name in shown}
    assert {"a", "b", "fc"} <= set(shown)


def test_same_model_same_page() -> None:
    model, x = NETS["dense"]()
    one, other = (plain_merge(model, x, ratio=0.5).report.html() for _ in range(2))
    assert one == other


def test_numbers_that_json_does_not_have() -> None:
    assert finite({"a": [1.5, float("nan")], "b": (float("inf"), "x")}) == {"a": [1.5, None], "b": [None, "x"]}
