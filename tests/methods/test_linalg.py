"""The shared linear algebra, and what is solved and sampled with it, against numpy, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import norm
from torch import Tensor, nn

import fxmerge
from fxmerge import Options
from fxmerge.methods.by_moments import least_squares
from fxmerge.methods.decomposition import push
from fxmerge.methods.linalg import coordinates, distances, gram, solve_ridge
from fxmerge.planning.statistics import moments, state, statistics
from tests.helpers.netmaking import plain_merge


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensor(values: object) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 1), (7, 3), (3, 20), (40, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_and_gram(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = normal(*shape).to(dtype)
    points = rows.double().numpy()
    found = distances(rows)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, cdist(points, points), rtol=1e-9, atol=1e-12)
    naive = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in points] for p in points]
    np.testing.assert_allclose(gram(rows), naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-7), (1e3, 1e-4)])
def test_distances_of_equal_rows(offset: float, tolerance: float) -> None:
    """Equal rows are 0 apart, others as far as scipy says; the diagonal is exactly 0 and nothing is NaN."""
    rows = (normal(5, 4) + offset)[[0, 1, 0, 2, 2, 3, 4]]
    found = distances(rows)
    assert (found.diagonal() == 0).all()
    np.testing.assert_allclose(found, cdist(rows.numpy(), rows.numpy()), rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (4, 4), (6, 2), (20, 19), (30, 1), (5, 0)])
def test_coordinates_reproduce_the_gram(n: int, rank: int) -> None:
    rows = normal(n, max(rank, 1), seed=n) * (rank > 0)
    inner = rows @ rows.T
    points = coordinates(inner)
    assert points.shape == (n, np.linalg.matrix_rank(inner.numpy()))
    torch.testing.assert_close(points @ points.T, inner, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [1, 2, 5, 17])
@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 3.0])
def test_solve_ridge_is_numpy_solve(p: int, q: int, ridge: float) -> None:
    data, right = normal(3 * p, p, seed=p), normal(p, q, seed=q + 100)
    a = (data.T @ data).numpy()
    lifted = a + ridge * np.trace(a) / p * np.eye(p)
    expected = np.linalg.solve(lifted, right.numpy())
    np.testing.assert_allclose(solve_ridge(torch.from_numpy(a), right, ridge), expected, rtol=1e-8, atol=1e-10)


SINGULAR: dict[str, tuple[list[list[float]], list[list[float]], list[list[float]]]] = {
    "zero": ([[0, 0], [0, 0]], [[0], [0]], [[0], [0]]),
    "ones": ([[1, 1], [1, 1]], [[2], [2]], [[1], [1]]),
    "a dead one": ([[4, 0], [0, 0]], [[8, 4], [0, 0]], [[2, 1], [0, 0]]),
    "one number": ([[0]], [[0, 0, 0]], [[0, 0, 0]]),
}


@pytest.mark.parametrize("case", SINGULAR)
def test_solve_ridge_singular_by_hand(case: str) -> None:
    a, b, least_norm = (torch.tensor(v, dtype=torch.float64) for v in SINGULAR[case])
    torch.testing.assert_close(solve_ridge(a, b, 0.0), least_norm, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_solve_ridge_rank_deficient(seed: int) -> None:
    """Finite and a solution without a ridge; with one the ridge solution, written by eigenvalues."""
    p = 3 + seed % 5
    factor = normal(p, 1 + seed % (p - 1), seed=seed)
    a = factor @ factor.T
    right = a @ normal(p, 2, seed=seed + 50)
    free = solve_ridge(a, right, 0.0)
    assert free.isfinite().all()
    torch.testing.assert_close(a @ free, right, rtol=1e-8, atol=1e-8)
    ridge = 1e-3
    values, vectors = np.linalg.eigh(a.numpy())
    by_eigenvalues = vectors @ ((vectors.T @ right.numpy()) / (values + ridge * values.mean())[:, None])
    np.testing.assert_allclose(solve_ridge(a, right, ridge), by_eigenvalues, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_is_lstsq_on_the_samples(seed: int) -> None:
    r = np.random.default_rng(seed)
    samples = r.normal(size=(200, 9)) @ r.normal(size=(9, 9)) + r.normal(size=9)
    kept = [0, 3, 4, 8]
    mean, covariance = samples.mean(0), np.cov(samples.T, bias=True)
    design = np.column_stack([samples[:, kept], np.ones(200)])
    solved = np.linalg.lstsq(design, samples, rcond=None)[0]
    up, shift = least_squares(tensor(mean), tensor(covariance), torch.tensor(kept), ridge=0.0)
    np.testing.assert_allclose(up, solved[:-1].T, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(shift, solved[-1], rtol=1e-7, atol=1e-7)
    among = covariance[np.ix_(kept, kept)]
    lifted = among + 1e-4 * np.trace(among) / 4 * np.eye(4)
    ridged = np.linalg.solve(lifted, covariance[kept]).T
    ridged[kept] = np.eye(4)
    by_default = least_squares(tensor(mean), tensor(covariance), torch.tensor(kept))[0]
    np.testing.assert_allclose(by_default, ridged, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("same_constant_gain", [True, False])
def test_push_is_substitution(seed: int, same_constant_gain: bool) -> None:
    """x = up x_K + shift; y = gain x + constant, where the constant part `shift` may have a gain of its own."""
    r = np.random.default_rng(seed)
    kept, n = [1, 3, 4], 7
    up, shift, gain, constant = r.normal(size=(n, 3)), r.normal(size=n), r.normal(size=n), r.normal(size=n)
    up[kept], shift[kept] = np.eye(3), 0
    own = gain if same_constant_gain else r.normal(size=n)
    inputs = (tensor(v) for v in (up, shift))
    pushed, moved = push(*inputs, torch.tensor(kept), tensor(gain), tensor(own), tensor(constant))
    for _ in range(5):
        x_kept = r.normal(size=3)
        y_kept = gain[kept] * x_kept + constant[kept]
        expected = [
            gain[i] * sum(up[i, j] * x_kept[j] for j in range(3)) + own[i] * shift[i] + constant[i] for i in range(n)
        ]
        np.testing.assert_allclose(pushed.numpy() @ y_kept + moved.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_push_past_a_kept_channel_without_gain() -> None:
    """y_1 is a constant: channel 2, which x_1 carried, is left with its own constant, and channel 1 carries itself."""
    kept, gain = torch.tensor([0, 1]), tensor([2.0, 0.0, 3.0])
    constant = tensor([1.0, 5.0, 7.0])
    up, shift = push(tensor([[1, 0], [0, 1], [0, 4]]), tensor([0, 0, 0]), kept, gain, gain, constant)
    assert up.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert shift.tolist() == [0, 0, 7]
    assert torch.equal(up @ tensor([9.0, 5.0]) + shift, tensor([9.0, 5.0, 7.0]))


def net_of(kind: str, seed: int) -> tuple[nn.Sequential, Tensor]:
    """A net with one group behind a ReLU, and example inputs; `kind` says what stands before the ReLU."""
    torch.manual_seed(seed)
    if kind.startswith("linear"):
        net = nn.Sequential(nn.Linear(6, 8, bias=kind == "linear, bias"), nn.ReLU(), nn.Linear(8, 3))
        return net.double().eval(), torch.randn(2, 6).double()
    conv = nn.Conv2d(2, 8, 3, bias=kind == "conv, bias, norm")
    net = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3))
    with torch.no_grad():
        net[1].weight.uniform_(0.3, 2).mul_(torch.randn(8).sign())
        net[1].bias.normal_()
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.3, 3)
    return net.double().eval(), torch.randn(2, 2, 8, 8).double()


def moments_of(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    analysis = fxmerge.analyze(net, x)
    (group,) = analysis.groups
    found = statistics(group, analysis.captured, state(analysis.captured.module), Options())
    return moments(found, 0, 0)


@pytest.mark.parametrize("kind", ["linear", "linear, bias", "conv, norm", "conv, bias, norm"])
@pytest.mark.parametrize("seed", range(3))
def test_moments_of_a_rectified_gaussian(kind: str, seed: int) -> None:
    """Behind a BatchNorm N(beta, gamma^2), without one N(bias, |w|^2): what a unit has for white input."""
    net, x = net_of(kind, seed)
    if kind.startswith("linear"):
        mu = net[0].bias.detach().numpy() if net[0].bias is not None else np.zeros(8)
        sigma = net[0].weight.detach().norm(dim=1).numpy()
    else:
        mu, sigma = net[1].bias.detach().numpy(), net[1].weight.detach().abs().numpy()
    mean, covariance = moments_of(net, x)
    z = mu / sigma
    first = mu * norm.cdf(z) + sigma * norm.pdf(z)
    second = (mu**2 + sigma**2) * norm.cdf(z) + mu * sigma * norm.pdf(z)
    deviation = np.sqrt(second - first**2)
    # 4,096 samples: a mean is off by deviation / 64, a variance by sqrt(kurtosis) / 64 of itself; five of these
    assert (np.abs(mean.numpy() - first) <= 5 * deviation / 64).all()
    kurtosis = np.array([relu_fourth(m, s) for m, s in zip(mu, sigma, strict=True)]) / deviation**4
    assert (np.abs(covariance.diagonal().numpy() - deviation**2) <= 5 * np.sqrt(kurtosis) / 64 * deviation**2).all()


class Sum(nn.Module):
    """Two layers on one input, added; the first is rectified, whichever is written first."""

    def __init__(self, rectified: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(6, 8)])
        self.out = nn.Linear(8, 3)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        parts = [layer(x) for layer in self.layers]
        parts[self.rectified] = parts[self.rectified].relu()
        return self.out(parts[0] + parts[1])


@pytest.mark.parametrize("rectified", [0, 1])
def test_moments_of_a_sum_take_each_part_through_its_own_steps(rectified: int) -> None:
    """E (relu(a) + b) and its deviation, for a and b that are independent: the ReLU is that of one part alone."""
    torch.manual_seed(0)
    net = Sum(rectified).double().eval()
    mean, covariance = moments_of(net, torch.randn(2, 6).double())
    one, other = net.layers[rectified], net.layers[1 - rectified]
    mu, sigma = one.bias.detach().numpy(), one.weight.detach().norm(dim=1).numpy()
    z = mu / sigma
    first = mu * norm.cdf(z) + sigma * norm.pdf(z)
    second = (mu**2 + sigma**2) * norm.cdf(z) + mu * sigma * norm.pdf(z)
    deviation = np.sqrt(second - first**2 + other.weight.detach().square().sum(1).numpy())
    assert (np.abs(mean.numpy() - first - other.bias.detach().numpy()) <= 5 * deviation / 64).all()
    assert np.allclose(covariance.diagonal().sqrt().numpy(), deviation, rtol=0.06)


def relu_fourth(mu: float, sigma: float) -> float:
    """E (relu(x) - E relu(x))^4 for x of N(mu, sigma^2), on a fine grid."""
    x = np.linspace(mu - 9 * sigma, mu + 9 * sigma, 20001)
    weight = norm.pdf(x, mu, sigma) * (x[1] - x[0])
    values = np.maximum(x, 0)
    return float(((values - (values * weight).sum()) ** 4 * weight).sum())


@pytest.mark.parametrize("seed", range(3))
def test_moments_between_channels_are_the_arc_cosine_kernel(seed: int) -> None:
    """E relu(a) relu(b) = |a| |b| (sin t + (pi - t) cos t) / 2 pi at the angle t of two rows, no bias."""
    net, x = net_of("linear", seed)
    mean, covariance = moments_of(net, x)
    rows = net[0].weight.detach().numpy()
    size = np.linalg.norm(rows, axis=1)
    angle = np.arccos(np.clip(rows @ rows.T / np.outer(size, size), -1, 1))
    product = np.outer(size, size) * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    expected = product - np.outer(size, size) / (2 * np.pi)
    assert (np.abs(covariance.numpy() - expected) <= 0.08 * np.outer(size, size)).all()
    assert (np.abs(mean.numpy() - size / np.sqrt(2 * np.pi)) <= 5 * 0.584 * size / 64).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_lstsq_is_the_best_within_each_cell(seed: int, groups: int) -> None:
    """A grouped consumer can carry a channel only by kept ones of its own group: as good as lstsq on samples there."""
    torch.manual_seed(seed)
    first, last = nn.Conv2d(4, 12, 1, bias=False), nn.Conv2d(12, 6, 1, groups=groups)
    net = nn.Sequential(first, nn.ReLU(), last).double().eval()
    x = torch.randn(20000, 4, 1, 1).double()
    result = plain_merge(net, x[:2], decomposition="lstsq", ratio=0.5)
    kept, size = torch.tensor(result.plan.groups[0].kept), 12 // groups
    with torch.no_grad():
        hidden, lost, total = net[:2](x).flatten(1), 0.0, float((result.module(x) - net(x)).square().mean(0).sum())
    for cell in range(groups):
        mine = kept[kept // size == cell]
        design = torch.cat([hidden[:, mine], torch.ones(len(x), 1).double()], 1)
        inside = hidden[:, size * cell : size * (cell + 1)]
        rest = inside - design @ torch.linalg.lstsq(design, inside).solution
        weight = last.weight.detach().view(groups, 6 // groups, size)[cell]
        lost += float((rest @ weight.T).square().mean(0).sum())
    assert lost * (1 - 1e-9) <= total <= 1.1 * lost
