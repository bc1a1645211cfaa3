"""Selectors, which choose the channels that are kept. SELECTORS maps a name to a function of tensors.

A selector takes `Candidates` (n channels) and a count k, and returns the k indices of the kept channels, ascending.

    l1, l2          the channels with the largest norms of the producers' rows (Li et al., ICLR 2017)
    gm              those farthest from all others, so that channels near the geometric median are dropped (He et al.,
                    CVPR 2019)
    random          a uniform random choice
    reprune         agglomerative clustering of the filters into k clusters, with one representative each (2020)
    reprune-kernel  Ward clustering of the kernels of each input channel, then greedy maximum coverage (AAAI 2024)
    repair          those whose removal re-solved consumers can compensate least (`elimination`); it needs refit's data,
                    and is l2 without data
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fxmerge.methods.elimination import eliminate
from fxmerge.methods.evidence import Candidates
from fxmerge.methods.linalg import BITE, distances


def largest(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores, ascending; among equal scores the later, as in the published code."""
    order = torch.argsort(scores, stable=True)
    return order[len(order) - count :].sort().values


def l1(channels: Candidates, count: int) -> Tensor:
    """The largest sums of absolute values, summed one term after another as in the published code.

    Pairwise summation is several times as fast. It decides all rows except those whose sums cannot be told from the
    last kept one, given the error of d roundings of positive terms; only these are summed term by term. A few rows are
    processed at a time, as |x| of all of them takes memory.
    """
    if channels.terms:
        return largest(channels.combined([part.abs().sum(1) for part in channels.taken], torch.add), count)
    rows = channels.rows
    sums = torch.cat([some.abs().sum(1) for some in torch.split(rows, BITE // 4)])
    last = sums.sort().values[len(sums) - max(count, 1)]
    slack = (rows.size(1) + BITE) * torch.finfo(rows.dtype).eps  # for two sums, each with an error of at most d eps / 2
    near = ((sums - last).abs() <= slack * last).nonzero().flatten()
    return largest(sums.index_copy_(0, near, torch.linalg.vector_norm(rows[near], 1, dim=1)), count)


def l2(channels: Candidates, count: int) -> Tensor:
    """The largest Euclidean norms of the rows."""
    return largest(channels.norms, count)


def gm(channels: Candidates, count: int) -> Tensor:
    """The largest sums of distances to the other rows."""
    return largest(distances(channels.rows).sum(0), count)


def random(channels: Candidates, count: int) -> Tensor:
    """A uniform random choice by the candidates' seed."""
    generator = torch.Generator().manual_seed(channels.seed)
    return torch.randperm(len(channels), generator=generator)[:count].sort().values


def reprune(channels: Candidates, count: int) -> Tensor:
    """Average-linkage clustering by the rows' Euclidean distances; of each cluster the row nearest to its mean."""
    from scipy.cluster.hierarchy import linkage

    rows = channels.rows.double()
    if count >= len(rows):
        return torch.arange(len(rows))
    apart = distances(rows).cpu().numpy()
    tree = linkage(apart[np.triu_indices(len(rows), 1)], method="average")
    member = torch.nn.functional.one_hot(torch.from_numpy(_exactly(tree, count)), count).to(rows)  # (n, k)
    means = (member.T @ rows) / member.sum(0)[:, None]
    off = (rows - member @ means).square().sum(1)  # (n,) squared distance to the mean of the own cluster
    off = torch.where(member > 0, off[:, None], torch.inf)
    nearest = off <= off.amin(0) * (1 + 1e-9)  # the first of equally near rows, whatever the rounding
    return nearest.to(torch.int8).argmax(0).sort().values.cpu()


def _exactly(tree: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Cluster numbers 0..count-1 from a dendrogram, cut to exactly `count` clusters even if heights are tied."""
    n = len(tree) + 1
    parent = np.arange(2 * n - 1)
    for at in range(n - count):  # the first n - k merges; children point to the merged cluster
        parent[tree[at, :2].astype(int)] = n + at
    while (parent[parent] != parent).any():
        parent = parent[parent]
    return np.unique(parent[:n], return_inverse=True)[1].astype(np.int64)


def reprune_kernel(channels: Candidates, count: int) -> Tensor:
    """REPrune (Park et al., AAAI 2024): the dendrograms of all input channels are cut at one height, and their clusters
    covered.

    The height is the maximum over input channels of the height at which the channel's Ward dendrogram has k clusters.
    Filters are then chosen one by one: each time the filter whose kernels are in most clusters that are not covered
    yet, and among equal ones that with the largest norm.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    kernels = channels.kernels.double().cpu()
    n = len(kernels)
    if count >= n:
        return torch.arange(n)
    if n == 2 or kernels.size(1) == 0:
        return l2(channels, count)
    trees = [linkage(kernels[:, j].numpy(), method="ward") for j in range(kernels.size(1))]
    cutoff = max(tree[n - count - 1, 2] for tree in trees)
    clusters = np.stack([fcluster(tree, cutoff, criterion="distance") - 1 for tree in trees], 1)  # (n, in)
    offset = np.concatenate([[0], np.cumsum(clusters.max(0) + 1)])
    of_filter = torch.from_numpy(
        clusters + offset[:-1]
    )  # (n, in) the number of its cluster, unique over input channels
    uncovered = torch.ones(int(offset[-1]), dtype=torch.float64)
    norms = torch.linalg.vector_norm(kernels.flatten(1), dim=1)
    tie_break = norms / (norms.max() * 2 + 1e-300)  # < 1, so that it only decides between filters with equal coverage
    left = torch.ones(n, dtype=torch.bool)
    for _ in range(count):
        gain = uncovered[of_filter].sum(1) + tie_break
        choice = int(torch.where(left, gain, -torch.inf).argmax())
        left[choice] = False
        uncovered[of_filter[choice]] = 0
    return (~left).nonzero().flatten()


def repair(channels: Candidates, count: int) -> Tensor:
    """The channels that remain after `eliminate`; `l2` without readings."""
    index = torch.arange(len(channels)) if channels.index is None else channels.index
    seeing = [r for r in channels.readings if bool(torch.isin(r.channels, index).any())]
    return eliminate(seeing, index, count, channels.orders) if seeing else l2(channels, count)


SELECTORS: dict[str, Callable[[Candidates, int], Tensor]] = {
    "l1": l1,
    "l2": l2,
    "gm": gm,
    "random": random,
    "reprune": reprune,
    "reprune-kernel": reprune_kernel,
    "repair": repair,
}


def select(name: str, channels: Candidates, cells: Tensor, counts: Sequence[int]) -> Tensor:
    """The kept channels, ascending: counts[c] of each cell c."""
    kept = []
    for cell, count in enumerate(counts):
        index = (cells == cell).nonzero().flatten()
        kept.append(index[SELECTORS[name](channels.only(index), count).cpu()])
    return torch.cat(kept).sort().values
