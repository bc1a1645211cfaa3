"""Decompositions against loops over pairs written from the published algorithms, and against exact cases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fxmerge import DECOMPOSITIONS
from fxmerge.methods.by_moments import least_squares
from fxmerge.methods.decomposition import fold, mostsim
from fxmerge.methods.evidence import Evidence, PublishedForm

EPS = 1e-5
LAM = 0.85


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def tensor(values: object) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


def plain(rows: np.ndarray, threshold: float = 0.0, cells: list[int] | None = None, scalable: bool = True) -> Evidence:
    """A group without BatchNorm: a bias is one more column of the rows."""
    n = len(rows)
    owner = torch.tensor(cells or [0] * n)
    return Evidence(
        inner=tensor(rows @ rows.T),
        bias=torch.zeros(n).double(),
        centred=False,
        cells=owner,
        scalable=scalable,
        threshold=threshold,
        lam=LAM,
    )


class Normed:
    """One producer and its BatchNorm: weights w (n, d), and gamma, beta, mean, var (n,)."""

    def __init__(self, n: int, d: int, seed: int) -> None:
        r = rng(seed)
        self.w, self.gamma, self.beta = r.normal(size=(n, d)), r.uniform(0.3, 2, n), r.normal(size=n)
        self.mean, self.var = r.normal(size=n), r.uniform(0.3, 3, n)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.var + EPS)

    def evidence(
        self, threshold: float = 0.1, lam: float = LAM, published: bool = False, scalable: bool = True
    ) -> Evidence:
        gain = self.gamma / self.std
        rows = self.w * gain[:, None]
        form = None
        if published:
            rows, names = self.w, ("gamma", "beta", "mean", "var")
            form = PublishedForm(**{name: tensor(getattr(self, name)) for name in names})
        cells = torch.zeros(len(rows), dtype=torch.int64)
        bias = tensor(self.beta - gain * self.mean)
        return Evidence(
            inner=tensor(rows @ rows.T),
            bias=bias,
            centred=True,
            cells=cells,
            scalable=scalable,
            threshold=threshold,
            lam=lam,
            published=form,
        )

    def forward(self, x: np.ndarray) -> np.ndarray:
        """ReLU(BatchNorm(x w')) of (samples, d)."""
        return np.maximum(self.gamma * (x @ self.w.T - self.mean) / self.std + self.beta, 0)


def expected_up(n: int, kept: list[int], chosen: dict[int, tuple[int, float]]) -> Tensor:
    """up with 1 at the kept, and {dropped: (kept, scale)}."""
    up = np.zeros((n, len(kept)))
    for at, k in enumerate(kept):
        up[k, at] = 1
    for i, (j, scale) in chosen.items():
        up[i, kept.index(j)] = scale
    return tensor(up)


def minmax(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low) if high > low else 0.0 for v in values]


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 2, 3], [0, 2, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("centred", [False, True])
def test_shapes_and_identity_at_the_kept(name: str, kept: list[int], centred: bool) -> None:
    """Three far clusters, of 0 3 6, 1 4 7 and 2 5, one kept channel in each: each stands for itself at least."""
    rows = 10 * np.eye(3, 5)[np.arange(8) % 3] + 0.01 * rng(1).normal(size=(8, 5))
    base = plain(rows)
    evidence = replace(base, centred=centred, threshold=0.1)
    found = DECOMPOSITIONS[name](evidence, torch.tensor(kept))
    assert found.up.shape == (8, len(kept))
    assert found.cosine.shape == (8,)
    assert found.up.dtype == torch.float64
    torch.testing.assert_close(found.up[kept], torch.eye(len(kept)).double(), rtol=0, atol=0)
    if found.down is not None:
        own = found.down[:, kept]
        assert found.down.shape == (len(kept), 8) and found.down.dtype == torch.float64
        assert torch.equal(own, torch.diag(own.diagonal())) and (own.diagonal() > 0).all()
    assert torch.equal((found.up != 0).sum(1), torch.ones(8)) == (name not in ("prune", "lstsq") or len(kept) == 8)
    if name != "fold":
        assert found.down is None
        assert (found.cosine[kept] == 1).all()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.45, 0.8])
@pytest.mark.parametrize("seed", range(5))
def test_mostsim_without_norm_is_algorithm_2(threshold: float, seed: int) -> None:
    rows = rng(seed).normal(size=(12, 4))
    rows[5] = 0  # a dead channel goes nowhere
    kept = [1, 2, 6, 9, 11]
    chosen, cosine = {}, {}
    for i in set(range(12)) - set(kept) - {5}:
        size = {j: math.sqrt(sum(x * x for x in rows[j])) for j in (*kept, i)}
        cos = {j: sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / size[i] / size[j] for j in kept}
        j = max(kept, key=lambda j: cos[j])
        if cos[j] > 0 and cos[j] >= threshold:
            chosen[i], cosine[i] = (j, size[i] / size[j]), cos[j]
    found = mostsim(plain(rows, threshold), torch.tensor(kept))
    torch.testing.assert_close(found.up, expected_up(12, kept, chosen), rtol=1e-10, atol=1e-12)
    expected = [1.0 if i in kept else cosine.get(i, 0.0) for i in range(12)]
    torch.testing.assert_close(found.cosine, tensor(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("lam", "threshold"), [(0.85, 0.1), (0.0, 0.0), (1.0, 0.6), (0.5, 0.3)])
def test_mostsim_exact_over_pairs(lam: float, threshold: float, seed: int) -> None:
    """S = s (gamma_i/gamma_j)(std_j/std_i), B = BN_i(s x) - S BN_j(x); gammas of opposite sign and 0 included."""
    net, kept = Normed(14, 4, seed), [0, 3, 4, 8, 10, 13]
    net.gamma *= rng(seed + 50).choice([-1, 1], 14)
    net.gamma[[2, 8]] = 0
    chosen = {}
    for i in set(range(14)) - set(kept):
        pairs = []
        for j in kept:
            if net.gamma[i] * net.gamma[j] == 0:
                continue
            a, b = np.linalg.norm(net.w[i]), np.linalg.norm(net.w[j])
            cos = float(net.w[i] @ net.w[j] / a / b) * np.sign(net.gamma[i] * net.gamma[j])
            scale = a / b * abs(net.gamma[i] / net.gamma[j]) * net.std[j] / net.std[i]
            here, there = (net.beta[m] - net.gamma[m] * net.mean[m] / net.std[m] for m in (i, j))
            if cos > 0:
                pairs.append((j, scale, abs(here - scale * there) / scale, cos))
        if pairs:
            constant = minmax([p[2] for p in pairs])
            score = [lam * (1 - p[3]) + (1 - lam) * c for p, c in zip(pairs, constant, strict=True)]
            j, scale, _, cos = pairs[int(np.argmin(score))]
            if cos >= threshold:
                chosen[i] = (j, scale)
    found = mostsim(net.evidence(threshold, lam), torch.tensor(kept))
    torch.testing.assert_close(found.up, expected_up(14, kept, chosen), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("sign", "scale"), [(1, 0.5), (1, 3.0), (-1, 2.0)])
def test_an_exact_partner_is_found(sign: int, scale: float) -> None:
    """Channel 5 is ReLU(S x_2): weights scale * w_2 (with sign -1 both weights and gamma are turned)."""
    net = Normed(8, 6, 3)
    net.w[5], net.gamma[5] = sign * scale * net.w[2], sign * 1.7
    big = scale * abs(net.gamma[5] / net.gamma[2]) * net.std[2] / net.std[5]
    gain = net.gamma / net.std
    net.beta[5] = gain[5] * net.mean[5] + big * (net.beta[2] - gain[2] * net.mean[2])
    x = rng(0).normal(size=(50, 6))
    np.testing.assert_allclose(net.forward(x)[:, 5], big * net.forward(x)[:, 2], rtol=1e-9, atol=1e-12)
    kept = [0, 1, 2, 6]
    found = mostsim(net.evidence(), torch.tensor(kept))
    np.testing.assert_allclose(found.up[5], [0, 0, big, 0], rtol=1e-10)
    assert float(found.cosine[5]) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize(("gamma_i", "gamma_j"), [(-1.0, 1.0), (1.0, -1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_no_candidate(gamma_i: float, gamma_j: float) -> None:
    """Equal weights, but gammas of opposite sign or 0: nobody carries the dropped one."""
    net = Normed(3, 4, 0)
    net.w[1] = net.w[0]
    net.w[2] = np.array([-1, 1, -1, 1]) * net.w[0][[1, 0, 3, 2]]  # at a right angle to it
    net.gamma[:] = gamma_i, gamma_j, 1.0
    found = mostsim(net.evidence(), torch.tensor([1, 2]))
    assert found.up[0].tolist() == [0, 0]
    assert float(found.cosine[0]) == 0
    assert found.up.isfinite().all()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("lam", [0.85, 0.7, 0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_reference_form_over_pairs(threshold: float, lam: float, seed: int) -> None:
    """The published code's loop: indices of S and B exchanged, the variance for the deviation."""
    net, kept = Normed(12, 5, seed), [0, 2, 5, 7, 11]
    chosen = {}
    for i in set(range(12)) - set(kept):
        cos, scales, offsets = [], [], []
        for j in kept:
            a, b = np.linalg.norm(net.w[i]), np.linalg.norm(net.w[j])
            s = a / b
            cos.append(float(net.w[i] @ net.w[j] / a / b))
            scales.append(s * (net.gamma[j] / net.gamma[i]) * (net.var[i] / net.var[j]))
            inside = s * (-net.var[i] * net.beta[i] / net.gamma[i] + net.mean[i]) - net.mean[j]
            offsets.append(abs(net.gamma[j] / net.var[j] * inside + net.beta[j]) / scales[-1])
        score = [lam * (1 - c) + (1 - lam) * o for c, o in zip(cos, minmax(offsets), strict=True)]
        at = int(np.argmin(score))
        if not threshold or cos[at] >= threshold:
            chosen[i] = (kept[at], scales[at])
    found = mostsim(net.evidence(threshold, lam, published=True), torch.tensor(kept))
    torch.testing.assert_close(found.up, expected_up(12, kept, chosen), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("published", [False, True])
def test_minmax_of_equal_values_and_a_gamma_of_zero_stay_finite(published: bool) -> None:
    net = Normed(6, 3, 2)
    for value in (net.gamma, net.beta, net.mean, net.var):
        value[:] = 1  # with equal norms every pair has the same constant
    net.w /= np.linalg.norm(net.w, axis=1, keepdims=True)
    for kept in ([0], [0, 1, 2], [3, 5]):
        assert mostsim(net.evidence(0.0, published=published), torch.tensor(kept)).up.isfinite().all()
    net.gamma[4] = 0
    assert mostsim(net.evidence(0.0, published=published), torch.tensor([0, 1, 2])).up.abs().max() < 1e6


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("centred", [False, True])
def test_not_scalable_means_scale_one(seed: int, centred: bool) -> None:
    net, kept = Normed(10, 3, seed), [0, 4, 5, 9]
    net.w[2] = 2 * net.w[0]  # the same direction, and equal to nobody
    net.w[3], net.gamma[3], net.var[3] = net.w[4], net.gamma[4], net.var[4]
    net.mean[3], net.beta[3] = net.mean[4], net.beta[4]
    evidence = net.evidence(0.0, scalable=False) if centred else plain(net.w, scalable=False)
    up = mostsim(evidence, torch.tensor(kept)).up
    assert set(up.flatten().tolist()) <= {0.0, 1.0}
    assert (up.sum(1) <= 1).all()
    assert up[3].tolist() == [0, 1, 0, 0]  # its equal


@pytest.mark.parametrize("name", DECOMPOSITIONS)
@pytest.mark.parametrize("seed", range(8))
def test_cells_merge_as_if_each_were_alone(name: str, seed: int) -> None:
    """Partners are in one's own cell, and what another cell holds changes nothing."""
    net, owner = Normed(12, 3, seed), torch.arange(12) % 2
    net.beta[1::2] *= 100
    together = net.evidence(0.0, lam=0.4)
    evidence = replace(together, cells=owner)
    kept = torch.tensor([0, 1, 2, 5, 6, 7])
    found = DECOMPOSITIONS[name](evidence, kept)
    assert (found.up[owner[:, None] != owner[kept][None, :]] == 0).all()
    if found.down is not None:
        assert (found.down[owner[kept][:, None] != owner[None, :]] == 0).all()
    for cell in (0, 1):
        inside = (owner == cell).nonzero().flatten()
        inner, bias = together.inner[inside][:, inside], together.bias[inside]
        alone = replace(together, inner=inner, bias=bias, cells=torch.zeros(6, dtype=torch.int64))
        mine = owner[kept] == cell
        single = DECOMPOSITIONS[name](alone, (kept[mine] - cell) // 2)
        torch.testing.assert_close(found.up[inside][:, mine], single.up, rtol=1e-8, atol=1e-10)
        if found.down is not None:
            torch.testing.assert_close(found.down[mine][:, inside], single.down, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 5, 2], [1, 1, 1]])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_fold_finds_clusters(sizes: list[int], noise: float) -> None:
    owner = rng(0).permutation(np.repeat(np.arange(3), sizes))
    rows = 5 * rng(1).normal(size=(3, 8))[owner] + noise * rng(2).normal(size=(len(owner), 8))
    kept = sorted(int(rng(3).choice(np.flatnonzero(owner == c))) for c in range(3))
    found = fold(plain(rows), torch.tensor(kept))
    members = owner[:, None] == owner[kept][None, :]
    torch.testing.assert_close(found.up, tensor(members), rtol=0, atol=0)
    assert (found.up.sum(1) == 1).all()
    torch.testing.assert_close(found.down, tensor(members / members.sum(0)).T, rtol=1e-12, atol=0)
    means = np.stack([rows[members[:, k]].mean(0) for k in range(3)])
    np.testing.assert_allclose(found.down.numpy() @ rows, means, atol=1e-12)
    assert (found.cosine > 1 - 1e-3).all()


def test_fold_of_a_dead_group_keeps_the_kept() -> None:
    """Rows of zeros (a BatchNorm whose gammas are all 0) have no directions to cluster by, and need none."""
    found = fold(plain(np.zeros((4, 3))), torch.tensor([1, 2]))
    assert found.up.isfinite().all()
    assert found.down.isfinite().all()
    torch.testing.assert_close(found.down.sum(1), torch.ones(2).double())


@pytest.mark.parametrize("seed", range(10))
def test_order_of_the_residuals(seed: int) -> None:
    """E|x - up x_K|^2: lstsq <= mostsim <= prune. A scaled partner costs 2 (1 - cos) of a channel's power, and its
    loss costs 1: so mostsim needs the threshold 1/2 for the second."""
    r = rng(seed)
    rows = r.normal(size=(16, 5)) + 0.5
    covariance, kept = rows @ rows.T, torch.from_numpy(np.sort(r.choice(16, 4, replace=False)))
    evidence = plain(rows, threshold=0.5)

    def residual(up: Tensor) -> float:
        rest = np.eye(16)
        rest[:, kept] -= up.numpy()
        return float(np.trace(rest @ covariance @ rest.T))

    solved = least_squares(torch.zeros(16).double(), tensor(covariance), kept, ridge=1e-10)[0]
    merged, dropped = (residual(DECOMPOSITIONS[name](evidence, kept).up) for name in ("mostsim", "prune"))
    assert residual(solved) <= merged * (1 + 1e-7)
    assert merged <= dropped * (1 + 1e-12)
    assert residual(solved) < 0.99 * dropped
