"""benchmarks.speed refit: the figures of a small network, and a run that resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.speed import refit
from benchmarks.speed.refit import Network, main, measured
from tests.helpers.netmaking import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()


@pytest.mark.parametrize("count", [0, 24])
def test_figures_of_a_small_network(count: int) -> None:
    torch.manual_seed(0)
    data = [torch.randn(count, 3, 8, 8)] if count else None
    row = measured(small(), torch.randn(2, 3, 8, 8), data, {"ratio": 0.5, "samples": count or 64})
    assert row["used"] == (count or 64)
    assert {"capture", "refit", "verify"} <= row["stages"].keys()
    assert 0 < sum(row["stages"].values()) <= row["seconds"]
    assert 0 < row["forward"] < row["seconds"]
    assert 0.2 < row["flops"] < 0.8


def test_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that the file has is not measured again, and the page has rows of both runs."""
    asked: list[str] = []
    row = {"seconds": 30.0, "forward": 2.0, "peak": 3 * 2**20, "parameters": 2**18, "used": 7}
    row |= {"stages": {"refit": 20.0}}

    def found(function: object, arguments: tuple[str, int], limit: float) -> tuple[dict[str, object], float]:
        asked.append(arguments[0])
        return ({"ended": "stopped after 1 s"} if arguments[0] == "b" else row), 0.0

    monkeypatch.setattr(refit, "NETWORKS", {n: Network(small, (3, 8, 8)) for n in "ab"})
    monkeypatch.setattr(refit.process, "measured", found)
    monkeypatch.setattr(refit.process, "preload", lambda *names: None)
    main(["--out", str(tmp_path), "--only", "a"])
    main(["--out", str(tmp_path)])
    assert asked == ["a", "b"]
    assert [json.loads(line)["network"] for line in (tmp_path / "speed.jsonl").read_text().splitlines()] == ["a", "b"]
    page = (tmp_path / "speed.md").read_text()
    assert "| a | 7 probes | 30.0 | 15.0 | 3 | 1 | refit 67% |" in page
    assert "| b | probes | stopped after 1 s |" in page
