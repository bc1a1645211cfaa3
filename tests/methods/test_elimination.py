"""The order of elimination, against elimination by solving every subset anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxmerge.methods import elimination
from fxmerge.methods.elimination import RIDGE, Orders, curve, eliminate
from fxmerge.methods.evidence import Reading

N = 10  # channels


def reading(columns: int, outputs: int, seed: int, first: int = 0) -> Reading:
    """A layer that reads N - first channels of a group, with some columns each."""
    generator, n = torch.Generator().manual_seed(seed), N - first
    spread = torch.randn(n * columns, n * columns, generator=generator, dtype=torch.float64)
    rows = torch.randn(300, n * columns, generator=generator, dtype=torch.float64) @ spread
    weight = torch.randn(outputs, n * columns, generator=generator, dtype=torch.float64)
    return Reading(rows.T @ rows, weight, torch.arange(first, N), torch.arange(n * columns).view(n, columns))


def loss(readings: list[Reading], gone: list[int]) -> float:
    """What the consumers' outputs lose without these channels once all other columns are solved again."""
    total = 0.0
    for r in readings:
        h = r.gram + RIDGE * r.gram.diagonal().mean() * torch.eye(len(r.gram), dtype=torch.float64)
        k = torch.cat([r.columns[i] for i, c in enumerate(r.channels.tolist()) if c not in gone])
        solved = torch.linalg.solve(h[k][:, k], h[k] @ r.weight.T)
        rest = r.weight @ h @ r.weight.T - r.weight @ h[:, k] @ solved
        total += float(rest.trace() / (r.weight @ r.gram @ r.weight.T).trace())
    return total


def greedy(readings: list[Reading], candidates: list[int], drop: int) -> list[int]:
    """Each time the candidate without which the loss grows least."""
    gone: list[int] = []
    for _ in range(drop):
        left = [c for c in candidates if c not in gone]
        gone.append(min(left, key=lambda c: loss(readings, [*gone, c])))
    return gone


@pytest.mark.parametrize("columns", [(1,), (3,), (1, 2)])
@pytest.mark.parametrize("candidates", [list(range(N)), [1, 2, 5, 6, 9]])
@pytest.mark.parametrize("wide", [1024, 1])
def test_the_order_is_that_of_the_least_losses(
    columns: tuple[int, ...], candidates: list[int], wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all channels and of one cell's. wide: 1 computes in float32"""
    monkeypatch.setattr(elimination, "WIDE", wide)
    readings = [reading(q, 4, seed, first=seed) for seed, q in enumerate(columns)]
    drop = len(candidates) - 2
    gone = greedy(readings, candidates, drop)
    found = Orders().of(readings, torch.tensor(candidates), drop)
    assert [candidates[at] for at in found.removed.tolist()] == gone
    wanted = torch.tensor([loss(readings, gone[: k + 1]) for k in range(drop)], dtype=torch.float64)
    torch.testing.assert_close(found.losses, wanted, rtol=1e-8 if wide > 1 else 1e-3, atol=1e-8)


@pytest.mark.parametrize("outputs", [(4, 30), (20, 20, 3)])
@pytest.mark.parametrize("of_zero", [False, True])
def test_readings_of_the_same_patches_are_solved_together(
    outputs: tuple[int, ...], of_zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, keys and values, with more outputs than columns. of_zero: a column that no output reads"""
    own = reading(1, 4, seed=1)
    weights = [torch.randn(o, N, generator=torch.Generator().manual_seed(o), dtype=torch.float64) for o in outputs]
    if of_zero:
        for weight in weights:
            weight[:, 3] = 0
    shared = [replace(own, weight=weight) for weight in weights]
    readings, every, drop = [*shared, reading(1, 4, seed=2)], torch.arange(N), N - 2
    gone, made = greedy(readings, every.tolist(), drop), []
    monkeypatch.setattr(elimination, "_inverse", lambda gram, own=elimination._inverse: made.append(gram) or own(gram))
    found = Orders().of(readings, every, drop)
    assert len(made) == 2
    assert found.removed.tolist() == gone
    wanted = torch.tensor([loss(readings, gone[: k + 1]) for k in range(drop)], dtype=torch.float64)
    torch.testing.assert_close(found.losses, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rounds", [elimination.ROUNDS, 3])
def test_one_order_serves_all_counts(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 rounds, several channels leave at once. What is asked for first makes no difference."""
    monkeypatch.setattr(elimination, "ROUNDS", rounds)
    readings, every = [reading(2, 5, seed=4)], torch.arange(N)
    deep = Orders()
    whole = curve(readings, every, 1, deep)
    known = [(readings, k, eliminate(readings, every, k, deep)) for k in range(1, N)]
    monkeypatch.setattr(elimination, "_descent", None)  # nothing is computed anew below
    assert [eliminate(readings, every, k, deep).tolist() for _, k, _ in known] == [kept.tolist() for *_, kept in known]
    torch.testing.assert_close(curve(readings, every, 4, deep)[4:], whole[4:])
    monkeypatch.undo()
    monkeypatch.setattr(elimination, "ROUNDS", rounds)
    shallow = Orders()
    for k in range(N - 1, 0, -1):  # deeper each time
        assert eliminate(readings, every, k, shallow).tolist() == known[k - 1][2].tolist()
        assert eliminate(readings, every, k).tolist() == known[k - 1][2].tolist()
    smaller: set[int] = set()
    for _, _, kept in known:
        assert smaller < set(kept.tolist())
        smaller = set(kept.tolist())


def test_an_order_is_that_of_its_readings_and_candidates() -> None:
    orders = Orders()
    first, second = reading(1, 4, seed=5), reading(1, 4, seed=6)
    cells: list[Tensor] = [torch.arange(5), torch.arange(5, N)]
    for own in ([first], [second], [first, second]):
        for cell in cells:
            known, alone = orders.of(own, cell, 3), Orders().of(own, cell, 3)
            assert known.removed.tolist() == alone.removed.tolist()
    assert orders.of([first], cells[0], 3).removed.tolist() != orders.of([second], cells[0], 3).removed.tolist()
