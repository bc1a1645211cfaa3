"""How much of a graph is stored at one time, and how `memory` bounds the samples of refit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration.live import COPIES, live_elements, samples_within
from fxmerge.calibration.patches import ENTRIES, FEWEST, enough

ROOT = Path(__file__).resolve().parents[2]
X = torch.randn(2, 3, 8, 8)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return torch.relu(self.two(torch.tanh(y))) + y


def chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize(
    ("model", "elements"),
    [
        (chain(), 2 * (8 * 6 * 6 + 8 * 6 * 6)),  # the convolution's output and the ReLU's
        (Skip(), 2 * 3 * (8 * 8 * 8)),  # what is added at the end, and two of the branch
    ],
    ids=["chain", "skip"],
)
def test_what_is_stored_by_hand(model: nn.Module, elements: int) -> None:
    captured = fxmerge.analyze(model, X).captured
    assert live_elements(captured) == elements
    assert live_elements(captured, [n.name for n in captured.module.graph.nodes]) == 0


@pytest.mark.parametrize("memory", [0.001, 0.01, 0.5])
def test_as_many_samples_as_fit(memory: float) -> None:
    captured = fxmerge.analyze(chain(), X).captured
    count, each = samples_within(captured, 2, memory), 2 * 8 * 6 * 6 * 4 * COPIES
    assert count * each <= memory * 2**30 < (count + 1) * each
    assert samples_within(captured, 2, 1e-9) == 1


def test_positions_of_wide_layers() -> None:
    assert enough(65536, 4608) == FEWEST
    assert enough(65536, 4608, 0.5) == 2 * 4608  # twice as many as unknowns, though they take more
    assert enough(65536, 64, 0.01) == int(0.01 * 2**30 / 16 / 4 / 64)
    assert enough(65536, 256, 100.0) == ENTRIES // 256


def used(result: fxmerge.Result) -> int:
    return int(re.search(r"([\d,]+) (?:probes|calib)", result.report.text())[1].replace(",", ""))  # type: ignore[index]


def test_a_merge_uses_fewer_samples() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(chain(), nn.Flatten(), nn.Linear(64, 3)).eval(), torch.rand(2, 3, 8, 8)
    few = fxmerge.merge(model, x, ratio=0.25, memory=64 * 2 * 8 * 6 * 6 * 4 * COPIES / 2**30)
    assert used(few) == 64 < used(fxmerge.merge(model, x, ratio=0.25))
    data = [torch.rand(16, 3, 8, 8) for _ in range(32)]
    some = fxmerge.merge(model, x, ratio=0.25, memory=256 * 2 * 8 * 6 * 6 * 4 * COPIES / 2**30, calibration=data)
    assert used(some) == 256
    assert "left out for their memory" in " ".join(some.report.text().split())


SCRIPT = """
import sys, torch, fxmerge
from torch import nn
torch.set_num_threads(1)
def held(kind):
    return int(next(l for l in open("/proc/self/status") if l.startswith(kind)).split()[1]) / 2**20
torch.manual_seed(0)
body = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU()]
body += [nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.SiLU()]
model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
fxmerge.merge(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), torch.rand(2, 3, 8, 8), ratio=0.5)
before = held("VmRSS")
result = fxmerge.merge(model, torch.rand(2, 3, 160, 160), ratio=0.25, samples=160, memory=float(sys.argv[1]))
print(held("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_is_below_the_bound() -> None:
    def peak(memory: float) -> float:
        command = [sys.executable, "-c", SCRIPT, str(memory)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert peak(0.3) < 0.3
    assert peak(0.0) > 0.5
