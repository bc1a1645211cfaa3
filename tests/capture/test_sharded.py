"""Models whose weights are divided among processes: the error says what to do, and that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.graph.distributed import check_whole
from tests.helpers.two_processes import run_on_two


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on CPUs")
def test_the_error_for_a_sharded_model_says_what_works(tmp_path: Path) -> None:
    run_on_two("sharded_model.py", tmp_path)
    for rank in range(2):
        said, same = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert "0.weight is divided among processes (a DTensor)" in said and "fxmerge.on_disk(make, files)" in said
        assert same


def test_a_sharded_tensor_is_named_and_others_pass() -> None:
    class Sharded(torch.Tensor):
        __module__ = "torch.distributed.tensor"

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    check_whole(model)
    model[1].running_mean = torch.zeros(2).as_subclass(Sharded)
    with pytest.raises(fxmerge.FxMergeError, match=r"1\.running_mean is divided among processes \(a Sharded\)"):
        fxmerge.analyze(model, torch.zeros(3, 2))
