"""Layers with many weights are solved for some of their outputs after others: the same solution, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from math import inf

import pytest
import torch
from torch import Tensor

from fxmerge.calibration import epilogue
from fxmerge.refit import solve
from fxmerge.refit.targets import Target

WIDTH, OUTPUTS, ROWS = 12, 10, 1600


def alone(value: Tensor) -> Tensor:
    return value


def problem(rectified: bool, matched: bool, centred: bool, streams: bool) -> solve.Problem:
    """A layer whose targets are a noisy linear map of its patches, in two batches."""
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    start, patches = drawn(1, OUTPUTS, WIDTH), [drawn(ROWS, 1, WIDTH) for _ in range(2)]
    own = epilogue.affine(1 + drawn(OUTPUTS).square(), drawn(OUTPUTS))
    targets = [
        Target(
            outputs=p[:, 0] @ (start[0] + drawn(OUTPUTS, WIDTH) / 3).T + drawn(ROWS, OUTPUTS),
            axis=1,
            affine=own,
            bounds=(0.0, inf) if rectified else None,
            streams=(drawn(ROWS, OUTPUTS), drawn(ROWS, OUTPUTS)) if streams else None,
        )
        for p in patches
    ]
    rows = solve.Rows(patches, targets, [torch.arange(ROWS) % solve.FOLDS for _ in range(2)])
    wanted = (drawn(OUTPUTS), 1 + drawn(OUTPUTS).square()) if matched else None
    bias = torch.zeros(1, OUTPUTS, dtype=torch.float64)
    return solve.Problem(rows=rows, start=start, bias=bias, wanted=wanted, centred=centred, reduce=alone)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("matched", [True, False])
@pytest.mark.parametrize("rectified", [True, False])
def test_in_parts_as_at_once(rectified: bool, matched: bool, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part has fewer outputs than the others."""
    given = problem(rectified, matched, centred, streams=rectified)
    whole = given.best()
    monkeypatch.setattr(solve, "AT_ONCE", 4 * WIDTH)
    assert [len(range(*part.indices(OUTPUTS))) for part in given._parts()] == [4, 4, 2]
    found = given.best()
    assert found.ridge == whole.ridge
    assert torch.allclose(found.weight, whole.weight, rtol=0, atol=1e-10)
    assert torch.allclose(found.bias, whole.bias, rtol=0, atol=1e-10)
    assert abs(found.before - whole.before) < 1e-10 and abs(found.after - whole.after) < 1e-10
    assert matched or whole.after < whole.before
    assert not torch.allclose(whole.weight, given.start, atol=1e-2)


def test_weights_in_half_precision_give_the_solution_of_the_same_values() -> None:
    given = problem(rectified=False, matched=False, centred=True, streams=False)
    start = given.start.bfloat16()
    exact, found = (replace(given, start=s).best() for s in (start.double(), start))
    assert torch.equal(found.weight, exact.weight) and found.after == exact.after


LIMITED = """
import torch
from benchmarks.harness.memory import peak_memory, reset_peak_memory
from fxmerge.calibration.epilogue import affine
from fxmerge.refit import solve
from fxmerge.refit.targets import Target

torch.set_num_threads(1)
outputs, width, rows = 2**15, 256, 1100
solve.AT_ONCE = 2**19
ones = torch.ones(outputs, dtype=torch.float64)

def problem(outputs):
    patches = torch.randn(rows, 1, width).bfloat16()
    own = affine(ones[:outputs], ones[:outputs] * 0)
    target = Target(outputs=torch.randn(rows, outputs).bfloat16(), axis=1, affine=own, bounds=None)
    given = solve.Rows([patches], [target], [torch.arange(rows) % solve.FOLDS])
    start = torch.randn(1, outputs, width).bfloat16()
    bias = ones[None, :outputs] * 0
    return solve.Problem(
        rows=given, start=start, bias=bias, wanted=None, centred=True, reduce=lambda value: value
    )

problem(16).best()
large = problem(outputs)
before = reset_peak_memory()
large.best()
print((peak_memory() - before) / (8 * outputs * width))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory as on Linux")
def test_memory_holds_few_copies_of_a_large_weight() -> None:
    """In copies of the weight in float64: R - G W0, and two new weights in their own dtype."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) < 3
