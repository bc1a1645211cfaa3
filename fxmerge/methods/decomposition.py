"""Decompositions, which express all channels of a group by the kept ones: x ~ up @ (down @ x) + shift.

DECOMPOSITIONS maps a name to a function of `Evidence` and the kept channels, which returns (down, up).

Let row_i be the coefficients of channel i in the group's common coordinates: its producers' weights, each times the
gain of the BatchNorms after it, so that x_i = row_i . input + b_i. From the inner products of the rows alone:

    cos_ij   = <row_i, row_j> / (|row_i| |row_j|)
    S_ij     = |row_i| / |row_j|                      the scale at which channel j replaces channel i
    B_ij     = b_i - S_ij b_j                         the constant that remains

With one producer and its BatchNorm this is Neuron Merging (Kim et al., NeurIPS 2020, section 3.2): |row_i| =
|w_i| |gamma_i| / std_i gives S_ij = s (gamma_i / gamma_j)(std_j / std_i). Two channels with gammas of opposite signs
have the opposite cosine, so that neither is a candidate for the other. `push` transforms `up` from the common
coordinates through the per-channel affine maps before one consumer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.methods.evidence import Evidence, PublishedForm
from fxmerge.methods.linalg import coordinates, others, pairs

MIN_COSINE = 1e-9  # the rows of a channel and its partner must have a positive inner product


@dataclass(frozen=True)
class DownUp:
    """A decomposition x ~ up @ (down @ x) in the common coordinates."""

    down: Tensor | None  # (k, n); None where channels are only selected, for the rows of the identity at the kept ones
    up: Tensor  # (n, k)
    cosine: Tensor  # (n,) with each channel's partner: 1 for kept channels, 0 for dropped ones without a partner


def selection_rows(kept: Tensor, channels: int) -> Tensor:
    """The rows of the identity at the kept channels: (k, n), stored transposed."""
    columns = torch.zeros(channels, len(kept), dtype=torch.float64)
    columns[kept, torch.arange(len(kept))] = 1
    return columns.T


def prune(evidence: Evidence, kept: Tensor) -> DownUp:
    """Dropped channels have no partners: their rows of `up` are zero."""
    up = selection_rows(kept, len(evidence.bias)).T
    return DownUp(None, up, up.sum(1))


def mostsim(evidence: Evidence, kept: Tensor) -> DownUp:
    """Each dropped channel becomes a multiple of its most similar kept channel (MostSim, Algorithms 1 to 3)."""
    mapping = prune(evidence, kept)
    dropped = others(kept, len(evidence.bias))  # (m,)
    inner = pairs(evidence.inner, dropped, kept)
    norm = inner.square.clamp(min=0).sqrt()
    solid = norm > norm.max() * 1e-9  # a channel with zero weights has no partner, and is none
    norm = torch.where(solid, norm, 1)
    cosine = (inner.across / norm[kept]).div_(norm[dropped][:, None])  # (m, k)
    offset: Tensor | None
    if evidence.published is not None:
        scale, offset, able = _published_pairs(evidence.published, norm, dropped, kept)
        solid = solid & able
    else:
        scale, offset = _pairs(evidence, norm, dropped, kept)
        if not evidence.scalable:  # only an equal channel is a partner: 2<a,b> / (|a|^2 + |b|^2) is 1 exactly if a = b
            cosine *= 2 * scale / (1 + scale.square())
            scale = torch.ones_like(scale)
    possible = _possible(evidence, solid, cosine, dropped, kept)
    if offset is None:
        distance = -cosine
    else:  # lam (1 - cos) + (1 - lam) minmax(|B| / S), without the constant lam
        low, span = _range(offset, possible)
        distance = offset.sub_(low).mul_((1 - evidence.lam) / span).sub_(cosine, alpha=evidence.lam)
    if possible is not None:
        distance.masked_fill_(~possible, torch.inf)
    best = distance.argmin(1, keepdim=True)  # (m, 1) of (m, k)
    closest, nearest, by = (t.gather(1, best)[:, 0] for t in (cosine, distance, scale))
    found = torch.isfinite(nearest)
    if evidence.threshold:
        found &= closest >= evidence.threshold
    carried = dropped[found]
    mapping.up[carried, best[found, 0]] = by[found]
    mapping.cosine[carried] = closest[found]
    return mapping


def least_squares_scales(mapping: DownUp) -> DownUp:
    """The same partners with the scale that loses least, which is the cosine times the ratio of the norms."""
    equal = mapping.cosine > 1 - 1e-6  # to the precision of inner products in float32
    return DownUp(mapping.down, mapping.up * torch.where(equal, 1, mapping.cosine)[:, None], mapping.cosine)


def _pairs(evidence: Evidence, norm: Tensor, dropped: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """S and |B| / S of each pair, (m, k). The latter is None without a BatchNorm, and |b_i - b_j| without scaling."""
    scale = torch.outer(norm[dropped], 1 / norm[kept])
    if not evidence.centred:
        return scale, None
    left, right = evidence.bias[dropped][:, None], evidence.bias[kept][None, :]
    if not evidence.scalable:
        return scale, (left - right).abs_()
    return scale, torch.addcmul(left, scale, right, value=-1).abs_().div_(scale)


def _published_pairs(form: PublishedForm, norm: Tensor, dropped: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S and |B| / S of each pair as the published code has them, (m, k), and the channels that may be paired, (n,).

    That code exchanges the indices i and j, and uses `var` for the standard deviation:

        S_ij = |w_i| / |w_j| (gamma_j / gamma_i) (var_i / var_j)
        B_ij = (gamma_j / var_j) (|w_i| / |w_j| (mean_i - var_i beta_i / gamma_i) - mean_j) + beta_j

    It divides by gamma; a channel with a gamma of 0 is excluded here.
    """
    solid = form.gamma.abs() > form.gamma.abs().max() * 1e-9
    gamma = torch.where(solid, form.gamma, 1)
    gain = gamma / form.var.clamp(min=1e-30)
    each = (gain / norm)[kept]  # the factors of S and B that depend on j
    scale = torch.outer((norm / gain)[dropped], each)
    constant = (form.beta - gain * form.mean)[kept]
    offset = torch.addcmul(constant[None, :], (norm * (form.mean - form.beta / gain))[dropped][:, None], each[None, :])
    return scale, offset.abs_().div_(scale), solid


def _possible(evidence: Evidence, solid: Tensor, cosine: Tensor, dropped: Tensor, kept: Tensor) -> Tensor | None:
    """Whether each kept channel may replace each dropped one, (m, k); None if all may."""
    one_cell = bool((evidence.cells == evidence.cells[0]).all())
    if evidence.published is not None and one_cell and bool(solid.all()):
        return None
    possible = solid[dropped][:, None] & solid[kept][None, :]
    if evidence.published is None:
        possible &= cosine > MIN_COSINE
    if not one_cell:
        possible &= evidence.cells[dropped][:, None] == evidence.cells[kept][None, :]
    return possible


def _range(values: Tensor, possible: Tensor | None) -> tuple[Tensor, Tensor]:
    """The minimum and the range of the possible entries of each row, (m, 1); a range of 0 is returned as 1."""
    if possible is None:
        low, high = torch.aminmax(values, dim=1, keepdim=True)
    else:
        low = values.masked_fill(~possible, torch.inf).amin(1, keepdim=True)
        high = values.masked_fill(~possible, -torch.inf).amax(1, keepdim=True)
    span = high - low
    return low, torch.where(span > 0, span, 1)


def fold(evidence: Evidence, kept: Tensor) -> DownUp:
    """k-means on the rows, started at the kept channels: a cluster's mean replaces its members (model folding)."""
    from scipy.cluster.vq import kmeans2

    n, inner = len(evidence.bias), evidence.inner
    assert isinstance(inner, Tensor)  # clustering needs all inner products
    points = coordinates(inner + evidence.bias[:, None] * evidence.bias[None, :])
    if points.size(1) == 0:  # all channels are zero
        points = torch.zeros(n, 1, dtype=torch.float64)
    place = torch.full((n,), -1)
    place[kept] = torch.arange(len(kept))
    cluster = torch.empty(n, dtype=torch.int64)
    for cell in range(int(evidence.cells.max()) + 1):
        inside = (evidence.cells == cell).nonzero().flatten()
        seeds = inside[place[inside] >= 0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster, which is handled below
            found = kmeans2(points[inside].numpy(), points[seeds].numpy(), minit="matrix", iter=30)[1]
        cluster[inside] = place[seeds][torch.from_numpy(found).long()]
    up = torch.nn.functional.one_hot(cluster, len(kept)).double()
    size = up.sum(0)
    empty = size == 0  # an empty cluster is represented by the kept channel that it started at
    down = torch.where(empty[:, None], selection_rows(kept, n), up.T / size.clamp(min=1)[:, None])
    norm = inner.diagonal().clamp(min=1e-300).sqrt()
    mean_norm = torch.einsum("kn,nm,km->k", down, inner, down).clamp(min=1e-300).sqrt()
    cosine = (inner @ down.T)[torch.arange(n), cluster] / (norm * mean_norm[cluster])
    return DownUp(down, up, cosine.clamp(-1, 1))


def push(
    up: Tensor, shift: Tensor, kept: Tensor, gain: Tensor, constant_gain: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor]:
    """(up, shift) after a per-channel linear map y = gain x + constant:

        y_i = sum_j up_ij (gain_i / gain_j) (y_j - constant_j) + constant_gain_i shift_i + constant_i

    A depthwise convolution multiplies constants by `constant_gain`, which is another number than its gain. A kept
    channel with a gain of 0 replaces no other channel.
    """
    own = torch.arange(len(kept))
    solid = gain[kept].abs() > gain.abs().max() * 1e-12
    inverse = torch.where(solid, 1 / torch.where(solid, gain[kept], 1), torch.zeros_like(gain[kept]))
    pushed = gain[:, None] * up * inverse[None, :]
    pushed[kept, own] = torch.where(solid, pushed[kept, own], up[kept, own])
    return pushed, constant_gain * shift + constant - pushed @ constant[kept]


# `lstsq` is `prune` in the common coordinates; its `up` is computed at each consumer by `cellwise_least_squares`.
# `auto` is `mostsim`, unless `least_loss` finds a better row of `up` at a consumer. `pca` is `auto` for groups that
# cannot be rotated (see `components`).
DECOMPOSITIONS: dict[str, Callable[[Evidence, Tensor], DownUp]] = {
    "auto": mostsim,
    "prune": prune,
    "mostsim": mostsim,
    "fold": fold,
    "lstsq": prune,
    "pca": mostsim,
}
