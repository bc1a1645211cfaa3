"""benchmarks.speed.device: the figures of small networks on the CPU, and a page that names what is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.speed import device
from benchmarks.speed.refit import Network
from tests.helpers.netmaking import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def small() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten(), nn.Linear(64, 5))


@pytest.fixture(scope="module")
def found() -> device.Row:
    return device.row("small", Network(small, (3, 8, 8), options={"ratio": 0.5}), CPU, 64, 32, 0.01)


def test_the_merge_of_the_same_device_is_the_same(found: device.Row) -> None:
    assert found.same
    assert found.off == 0
    assert found.agrees
    assert 0.01 < found.error < 2
    assert 0 < found.forward < found.seconds
    assert found.ideal > 1.2
    assert found.speedup["eager"] > 0


@pytest.mark.parametrize("change", [{"same": False}, {"off": 0.03}])
def test_a_merge_that_differs_is_called_one(found: device.Row, change: dict[str, float]) -> None:
    assert not replace(found, **change).agrees
    assert "| no" in device.markdown([replace(found, **change)], [], CPU, 64, 32)


def test_another_merge_on_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's merge is computed from other weights than the CPU's."""
    plain = device.merged

    def wrong(model: nn.Module, example: torch.Tensor, *rest: object) -> object:
        wrong.calls += 1  # type: ignore[attr-defined]
        if wrong.calls == 3:  # type: ignore[attr-defined]
            for p in model.parameters():
                p.data.mul_(1.5)
        return plain(model, example, *rest)  # type: ignore[arg-type]

    wrong.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(device, "merged", wrong)
    row = device.row("small", Network(small, (3, 8, 8), options={"ratio": 0.5}), CPU, 64, 32, 0.01)
    assert row.off > device.CLOSE
    assert not row.agrees


def test_the_page_names_the_rest(found: device.Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "NETWORKS", {n: Network(small, (3, 8, 8)) for n in ("a", "b", "c")})
    monkeypatch.setattr(device, "row", lambda name, *_: replace(found, network=name, seconds=30.0))
    device.main(["--out", str(tmp_path), "--only", "a", "b", "--limit", "20", "--device", "cpu"])
    page = (tmp_path / "device.md").read_text()
    assert "| a | 30.0 |" in page
    assert "No time was left for b." in page
    assert "cpu" in page
