"""Values between the waists of a graph are computed again instead of stored, and the result is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration import stream
from fxmerge.calibration.epilogue import pair
from fxmerge.calibration.paired_run import PairedRun, Settings
from fxmerge.calibration.tail import Recomputed
from fxmerge.calibration.waists import between
from fxmerge.capture.capture_model import capture
from tests.helpers.small_llama import LENGTH, WIDTH, made


def test_waists_are_the_residual_stream() -> None:
    model, ids, _ = made(depth=1)
    captured = capture(model, ids)
    found = between(captured.module, provenance(captured).kinds)
    assert {"words", "add", "add_1"} <= found.waists
    assert {"layers_0_one", "silu", "mul"} <= found.cheap
    assert {"layers_0_q", "layers_0_gate", "layers_0_up", "scaled_dot_product_attention"} <= found.costly
    assert not found.waists & (found.cheap | found.costly) and not found.cheap & found.costly


def test_nothing_between_waists_is_computed_again_where_an_op_is_in_place() -> None:
    model, ids, _ = made(depth=1, wide=lambda x: x + torch.relu(x).mul_(2))
    captured = capture(model, ids)
    found = between(captured.module, provenance(captured).kinds)
    assert "relu" not in found.cheap and "silu" in found.cheap


def test_what_is_stored_does_not_grow_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each node, the elements that are stored: the stream, queries, keys, values and what attention returns."""
    monkeypatch.setattr(stream, "WIDE", 0)
    most = []
    for depth in (1, 3):
        model, ids, data = made(depth=depth)
        captured = capture(model, ids)
        facts = provenance(captured)
        settings = Settings(rows=64, seed=0, held=False, reduce=lambda value: value)
        stored = [0]
        with torch.no_grad():
            run = PairedRun(pair(captured.module, facts), [[d] for d in data], settings)
            for _ in run:
                held = [v for v in run.original.values.values() if not isinstance(v, Recomputed)]
                values = [t for v in held for t in v if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
                stored.append(sum(t.numel() for t in values if t.is_floating_point()))
        most.append(max(stored) / (48 * LENGTH * WIDTH))
    assert most[0] == most[1] < 8  # in copies of the stream; all values of an MLP together are 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", ["repair", "l2"])
def test_merged_and_refitted_as_if_all_were_stored(
    selection: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, data = made()
    model.to(dtype)
    found = []
    for wide in (2**40, 0):
        monkeypatch.setattr(stream, "WIDE", wide)
        result = fxmerge.merge(model, ids, ratio=0.25, calibration=data, selection=selection)
        found.append((result.plan, result.report.refitted, result.module.state_dict()))
    (plan, records, state), (other_plan, other_records, other_state) = found
    assert plan == other_plan and records == other_records and any(r.after < r.before for r in records)
    assert all(torch.equal(value, other_state[name]) for name, value in state.items())
