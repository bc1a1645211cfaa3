"""Models whose weights are divided among processes by FSDP2: each holds its rows, before the merge and after it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.helpers.two_processes import run_on_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of torch 2.6 does not run on CPUs"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    run_on_two("sharded_model.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("name", ["none", "calibration", "budget"])
def test_a_sharded_model_is_merged_as_a_whole_one_is(found: list[dict[str, Any]], name: str) -> None:
    """To the bit. Each process holds half of every weight, also of what is handed out, which can be trained."""
    for own in (of[name] for of in found):
        assert own["plan"] and own["weights"] and own["rows"] and own["before"] and own["gradient"]
        assert own["kinds"] == [["DTensor"], ["DTensor"]]
        assert own["classes"] == ["FSDPNet", "FSDPBlock", "FSDPLinear"]
        assert max(own["outputs"]) < 1e-6


def test_what_is_written_is_whole_and_trained(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert max(own["saved"]) < 1e-6 and own["program"] < 1e-6
        assert own["buffer"] == [0, 0, 0]  # that of a copy in memory is its own
        assert own["in memory"] == [["Parameter"], ["saved"]]  # and no other folder beside it


def test_one_process_alone_may_print_the_report(found: list[dict[str, Any]]) -> None:
    assert min(found[0]["report"]) > 1000 and "report" not in found[1]


def test_meshes_policies_and_uneven_batches(found: list[dict[str, Any]]) -> None:
    for own in found:
        placements, dtype, same = own["replicated"]
        assert "Replicate()" in placements and "Shard(dim=0)" in placements and dtype == "torch.bfloat16" and same
        assert own["uneven"][1] == ["DTensor"] and "32 calibration samples" in own["uneven"][0]


def test_what_is_refused(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert "blocks.0.up.weight is divided among processes as Shard(dim=0)" in own["refused"]
        assert "fxmerge.on_disk(make, files)" in own["refused"]
        assert "A Shrinker writes the weights of the model in place" in own["shrinker"]
        assert "are divided among processes, which fxmerge.distill does not train" in own["distilled"]
        assert "the processes do not fetch the same weight" in own["order"]
        assert own["again"] == ["DTensor"]
