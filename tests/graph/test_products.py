"""Matrix products in bfloat16 during a merge: torch's setting inside and after, and what the user is handed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.graph.products import products
from fxmerge.verify import final_check

SETTING = torch.get_float32_matmul_precision


def test_the_setting_of_torch_comes_back() -> None:
    before = SETTING()
    with pytest.raises(KeyError), products("bfloat16"):
        assert SETTING() == "medium"
        with products("float32"):
            assert SETTING() == before
            with products("bfloat16"):
                assert SETTING() == "medium"
            assert SETTING() == before
        with products("bfloat16"):
            assert SETTING() == "medium"
        assert SETTING() == "medium"
        raise KeyError
    with products("float32"):
        assert SETTING() == before
    assert SETTING() == before


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_refit_runs_in_it_and_the_check_does_not(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    solving, checking = set(), set()
    cholesky, compare = torch.linalg.cholesky_ex, final_check.compare
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: (solving.add(SETTING()), cholesky(*a, **k))[1])
    monkeypatch.setattr(fxmerge.verify, "compare", lambda *a: (checking.add(SETTING()), compare(*a))[1])
    data = [torch.randn(32, 24) for _ in range(8)]
    before = SETTING()
    result = fxmerge.merge(net(), data[0], ratio=0.25, calibration=data, precision=precision)
    assert solving == {"medium" if precision == "bfloat16" else before}
    assert checking == {before} == {SETTING()}
    unseen = torch.randn(256, 24)
    with torch.no_grad():
        wanted, found = net()(unseen), result.module(unseen)
    plain = fxmerge.merge(net(), data[0], ratio=0.25, calibration=data)
    with torch.no_grad():
        own = plain.module(unseen)
    assert found.dtype == torch.float32
    assert (found - wanted).square().mean() < 1.1 * (own - wanted).square().mean()
    assert fxmerge.Plan.from_json(result.plan.json()).options.precision == precision
