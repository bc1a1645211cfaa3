"""The bulk run of random nets: a seed always gives the same net, and what is wrong is printed with its seed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.coverage import random_nets
from tests.helpers.random_nets import made
from tests.helpers.random_steps import STEPS


def test_a_seed_gives_the_same_net() -> None:
    assert random_nets.source_of(5) == random_nets.source_of(5) != random_nets.source_of(6)


@pytest.mark.parametrize("first", [step.name for step in STEPS if step.write.__module__.endswith("random_attention")])
def test_every_new_step_writes_nets_that_run(first: str) -> None:
    for seed in range(3):
        model, inputs = made(random_nets.source_of(seed, steps=2, first=first))
        model(*inputs)


def test_steps_that_are_left_out_are_not_taken() -> None:
    tensors = ("attention_scale_tensor",)
    assert any("new_tensor" in random_nets.source_of(seed) for seed in range(200))
    assert not any("new_tensor" in random_nets.source_of(seed, off=tensors) for seed in range(200))


def test_what_is_wrong_is_printed_and_counted(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    found = iter([AssertionError("permutation: much"), ValueError("no"), None])

    def check(source: str) -> None:
        error = next(found)
        if error is not None:
            raise error

    monkeypatch.setattr(random_nets, "check", check)
    assert random_nets.main(["--count", "3", "--seed", "7"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed 7: oracle: permutation: much"
    assert lines[1].startswith("seed 8: crash: ValueError: no (")
    assert lines[2].startswith("3 nets, 1 with a red oracle, 1 crashes")
