"""Each selector against a loop written from its description, and against cases whose answer is plain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from torch import Tensor

from fxmerge import SELECTORS
from fxmerge.methods.evidence import Candidates
from fxmerge.methods.selection import select

Rows = list[list[float]]
Correct = Callable[[Candidates, int, list[int]], bool]


def candidates(n: int, channels: int = 3, kernel: int = 4, seed: int = 0) -> Candidates:
    """n filters with random kernels, and rows that are the kernels and a bias."""
    generator = torch.Generator().manual_seed(seed)
    kernels = torch.randn(n, channels, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return Candidates((kernels.flatten(1), bias), kernels, seed)


def best(scores: list[float], count: int) -> list[int]:
    """Of equal scores the later stays."""
    return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)[:count])


def naive_l1(c: Candidates, count: int) -> list[int]:
    return best([math.fsum(abs(x) for x in row) for row in c.rows.tolist()], count)


def naive_l2(c: Candidates, count: int) -> list[int]:
    return best([math.sqrt(math.fsum(x * x for x in row)) for row in c.rows.tolist()], count)


def naive_gm(c: Candidates, count: int) -> list[int]:
    rows: Rows = c.rows.tolist()
    return best([math.fsum(math.dist(a, b) for b in rows) for a in rows], count)


def reprune_clusters(c: Candidates, count: int) -> list[list[int]]:
    """Join the two clusters with the smallest mean distance until `count` are left."""
    rows: Rows = c.rows.tolist()
    clusters = [[i] for i in range(len(rows))]

    def apart(pair: tuple[int, int]) -> float:
        a, b = clusters[pair[0]], clusters[pair[1]]
        return math.fsum(math.dist(rows[i], rows[j]) for i in a for j in b) / (len(a) * len(b))

    while len(clusters) > count:
        i, j = min(itertools.combinations(range(len(clusters)), 2), key=apart)
        clusters[i] += clusters.pop(j)
    return clusters


def is_reprune(c: Candidates, count: int, found: list[int]) -> bool:
    """One from each cluster, none of it nearer to its mean (both of a pair are equally near)."""
    rows: Rows = c.rows.tolist()
    good = True
    for members in reprune_clusters(c, count):
        mean = [math.fsum(rows[i][d] for i in members) / len(members) for d in range(len(rows[0]))]
        off = {i: math.dist(rows[i], mean) for i in members}
        chosen = [i for i in members if i in found]
        good &= len(chosen) == 1 and off[chosen[0]] <= min(off.values()) + 1e-9
    return good


def kernel_clusters(c: Candidates, count: int) -> list[set[tuple[int, frozenset[int]]]]:
    """For each filter the (input channel, members) of the clusters its kernels lie in, all cut at one height."""
    n, channels, _ = c.kernels.shape
    joins = []
    for j in range(channels):
        clusters = {i: frozenset([i]) for i in range(n)}
        steps = []
        for at, (a, b, height, _) in enumerate(linkage(c.kernels[:, j].numpy(), "ward")):
            clusters[n + at] = clusters[int(a)] | clusters[int(b)]
            steps.append((float(height), clusters[n + at]))
        joins.append(steps)
    cutoff = max(steps[n - count - 1][0] for steps in joins)  # n - count joins leave `count` clusters
    lies_in: list[set[tuple[int, frozenset[int]]]] = [set() for _ in range(n)]
    for j, steps in enumerate(joins):
        for i in range(n):
            around = [frozenset([i])] + [members for height, members in steps if height <= cutoff and i in members]
            lies_in[i].add((j, max(around, key=len)))
    return lies_in


def naive_reprune_kernel(c: Candidates, count: int) -> list[int]:
    """Greedy maximum coverage; the larger norm decides between equals."""
    n = len(c.kernels)
    if count >= n:
        return list(range(n))
    lies_in, norms = kernel_clusters(c, count), c.kernels.flatten(1).norm(dim=1).tolist()
    covered: set[tuple[int, frozenset[int]]] = set()
    chosen: list[int] = []
    for _ in range(count):
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: (len(lies_in[i] - covered), norms[i])))
        covered |= lies_in[chosen[-1]]
    return sorted(chosen)


CORRECT: dict[str, Correct] = {
    "l1": lambda c, count, found: found == naive_l1(c, count),
    "l2": lambda c, count, found: found == naive_l2(c, count),
    "gm": lambda c, count, found: found == naive_gm(c, count),
    "random": lambda c, count, found: True,  # any subset will do
    "reprune": is_reprune,
    "reprune-kernel": lambda c, count, found: found == naive_reprune_kernel(c, count),
    "repair": lambda c, count, found: found == naive_l2(c, count),  # without readings; with them: test_refit.py
}


def test_every_selector_has_a_case() -> None:
    assert set(CORRECT) == set(SELECTORS)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize(("n", "channels", "kernel"), [(3, 1, 1), (5, 2, 9), (9, 4, 3), (16, 3, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(name: str, n: int, channels: int, kernel: int, seed: int) -> None:
    c = candidates(n, channels, kernel, seed)
    before = c.rows.clone(), c.kernels.clone()
    for count in range(1, n + 1):
        found = SELECTORS[name](c, count)
        assert found.dtype == torch.int64
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == count
        assert 0 <= int(found.min()) <= int(found.max()) < n
        assert torch.equal(found, SELECTORS[name](c, count))
        assert CORRECT[name](c, count, found.tolist())
    assert torch.equal(before[0], c.rows)
    assert torch.equal(before[1], c.kernels)


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize(("n", "channels"), [(1, 2), (2, 2), (2, 1), (4, 3)])
def test_small_groups(name: str, n: int, channels: int) -> None:
    c = candidates(n, channels)
    assert SELECTORS[name](c, n).tolist() == list(range(n))
    one = SELECTORS[name](c, 1).tolist()
    assert len(one) == 1
    assert 0 <= one[0] < n


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("cells", [[0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 1] * 4, [1, 0, 0, 1, 2, 3, 3, 2]])
def test_select_keeps_equally_many_of_each_cell(name: str, cells: list[int]) -> None:
    c, owner = candidates(8, seed=3), torch.tensor(cells)
    size = 8 // (max(cells) + 1)
    for counts in range(1, size + 1):
        found = select(name, c, owner, (counts,) * (max(cells) + 1))
        assert found.tolist() == sorted(set(found.tolist()))
        assert torch.bincount(owner[found], minlength=max(cells) + 1).tolist() == [counts] * (max(cells) + 1)
        for cell in range(max(cells) + 1):  # each cell as if it were alone
            inside = [i for i in range(8) if cells[i] == cell]
            alone = SELECTORS[name](Candidates((c.rows[inside],), c.kernels[inside], c.seed), counts)
            assert [i for i in found.tolist() if i in inside] == [inside[i] for i in alone.tolist()]


@pytest.mark.parametrize("name", SELECTORS)
def test_select_counts_of_each_cell(name: str) -> None:
    owner = torch.tensor([0, 2, 2, 1, 0, 2, 0, 2])
    found = select(name, candidates(8, seed=3), owner, (3, 1, 2))
    assert found.tolist() == sorted(set(found.tolist()))
    assert torch.bincount(owner[found]).tolist() == [3, 1, 2]


Case = tuple[str, Rows, int, list[int]]
BY_HAND: list[Case] = [
    ("l1", [[1, 0], [0, -1], [0.5, 0.5], [-1, 0]], 2, [2, 3]),  # all equal: the later stay
    ("l2", [[3, 4], [5, 0], [0, -5], [1, 1]], 2, [1, 2]),
    ("l1", [[3, 4], [5, 0], [0, -6], [1, 1]], 2, [0, 2]),
    ("gm", [[0], [1], [2]], 1, [2]),  # both ends are 3 from the others: the later stays
    ("gm", [[0], [1], [2]], 2, [0, 2]),
    ("gm", [[0, 0], [1, 0], [0, 1], [50, 50], [0.3, 0.3]], 1, [3]),
    ("l1", [[0, 0], [1e-6, 0], [0, 0], [2, 1]], 2, [1, 3]),  # dead rows go first
    ("l2", [[0, 0], [1e-6, 0], [0, 0], [2, 1]], 2, [1, 3]),
    ("reprune", [[0.0], [9.0], [9.3], [9.1], [30.0]], 3, [0, 3, 4]),  # the nearest to each mean
    ("reprune", [[1.0], [1.0], [1.0]], 2, []),  # equal rows: any two
]


@pytest.mark.parametrize(("name", "rows", "count", "expected"), BY_HAND)
def test_by_hand(name: str, rows: Rows, count: int, expected: list[int]) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    found = SELECTORS[name](Candidates((values,), values[:, :, None]), count).tolist()
    assert len(set(found)) == count
    assert not expected or found == expected


def clustered(sizes: list[int], seed: int, spread: float) -> tuple[Candidates, Tensor]:
    """Filters around far-apart centres, shuffled, and which centre each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.eye(len(sizes), 12, dtype=torch.float64).repeat(1, 2).view(len(sizes), 2, 12)
    owner = torch.cat([torch.full((s,), i) for i, s in enumerate(sizes)])
    owner = owner[torch.randperm(len(owner), generator=generator)]
    kernels = centres[owner] + spread * torch.randn(len(owner), 2, 12, generator=generator, dtype=torch.float64)
    return Candidates((kernels.flatten(1),), kernels), owner


@pytest.mark.parametrize("name", ["reprune", "reprune-kernel"])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [5, 1, 3], [2, 2, 2, 2, 2], [12, 1]])
@pytest.mark.parametrize("spread", [0.1, 0.0])
def test_one_from_each_cluster(name: str, sizes: list[int], spread: float) -> None:
    """Also with spread 0, where each cluster is one filter many times: two equal filters never both stay."""
    for seed in range(5):
        c, owner = clustered(sizes, seed, spread)
        assert sorted(owner[SELECTORS[name](c, len(sizes))].tolist()) == list(range(len(sizes)))


@pytest.mark.parametrize("seed", range(10))
def test_reprune_never_keeps_both_of_two_equal_filters(seed: int) -> None:
    c = candidates(6, seed=seed)
    generator = np.random.default_rng(seed)
    copies = torch.from_numpy(generator.permutation(np.concatenate([np.arange(6), generator.integers(6, size=5)])))
    doubled = c.only(copies)
    for count in range(1, 7):
        kept = copies[SELECTORS["reprune"](doubled, count)].tolist()
        assert len(set(kept)) == count


@pytest.mark.parametrize("seed", range(8))
def test_reprune_kernel_covers_as_much_as_greedy(seed: int) -> None:
    c = candidates(10, 5, 9, seed)
    for count in (2, 4, 7):
        lies_in = kernel_clusters(c, count)
        found, naive = SELECTORS["reprune-kernel"](c, count).tolist(), naive_reprune_kernel(c, count)
        assert len(set().union(*(lies_in[i] for i in found))) == len(set().union(*(lies_in[i] for i in naive)))


def test_random_is_uniform_and_seeded() -> None:
    rows = torch.zeros(10, 1)
    picks = [SELECTORS["random"](Candidates((rows,), rows[:, :, None], seed), 4) for seed in range(500)]
    share = torch.bincount(torch.cat(picks), minlength=10) / 500
    assert ((share - 0.4).abs() < 5 * (0.4 * 0.6 / 500) ** 0.5).all()
    assert len({tuple(p.tolist()) for p in picks}) > 100  # of 210 subsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_l1_decides_near_the_cut_by_the_published_sums(seed: int, dtype: torch.dtype) -> None:
    """Rows whose l1 norms differ by roundings only: kept are those that summing one term after another prefers."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.rand(64, 600, generator=generator) + 1e-5 * torch.rand(64, 1, generator=generator)).to(dtype)
    rows[8:] = rows[:8].repeat(7, 1)[:, torch.randperm(600, generator=generator)]
    rows[::3] = rows[::3].flip(1)
    order = torch.argsort(torch.linalg.vector_norm(rows, 1, dim=1), stable=True)
    for count in (1, 20, 33, 64):
        found = SELECTORS["l1"](Candidates((rows,), rows[:, :, None]), count)
        assert torch.equal(found, order[64 - count :].sort().values)
