"""Samples of ops with parameters of their own, of contractions and of normalisations."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torchvision  # noqa: F401  # registers roi_align
from torch import nn

from fxmerge.graph.ops import Aten
from tests.helpers.netmaking import raw
from tests.helpers.sandwich import WIDTH, Sample, call, digit


def linear(key: Any) -> Sample:
    if key is nn.Linear:
        return Sample(lambda m, x: m.part(x.relu()), dims=0, parts={"part": nn.Linear(8, 8)})
    return Sample(lambda m, x: call(key)(x.relu(), m.w, m.b), dims=0, parts={"w": raw(8, 8), "b": raw(8)})


def conv(key: Any) -> Sample:
    dims = digit(key)
    if inspect.isclass(key):
        return Sample(lambda m, x: m.part(x.relu()), dims=dims, parts={"part": key(8, 8, 3, padding=1)})
    parts = {"w": raw(8, 8, *[3] * dims), "b": raw(8)}
    return Sample(lambda m, x: call(key)(x.relu(), m.w, m.b, 1, 1), dims=dims, parts=parts)


def batch_norm(key: Any) -> Sample:
    if inspect.isclass(key):
        return Sample(lambda m, x: m.part(x), dims=digit(key), parts={"part": key(WIDTH)})
    parts = {"mean": torch.zeros(WIDTH), "var": torch.ones(WIDTH), "gamma": raw(WIDTH), "beta": raw(WIDTH)}
    return Sample(lambda m, x: call(key)(x, m.mean, m.var, m.gamma, m.beta), parts=parts)


def prelu(key: Any) -> Sample:
    if inspect.isclass(key):
        return Sample(lambda m, x: m.part(x), parts={"part": key(WIDTH)})
    parts = {"slope": raw(WIDTH)}
    if isinstance(key, str):
        return Sample(lambda m, x: getattr(x, key)(m.slope), parts=parts)
    return Sample(lambda m, x: call(key)(x, m.slope), parts=parts)


def embedding(key: Any) -> Sample:
    parts: dict[str, Any] = {"ids": torch.tensor([2, 4])}
    if inspect.isclass(key):
        return Sample(lambda m, x: x + m.part(m.ids), dims=0, parts={"part": key(5, 8), **parts})
    return Sample(lambda m, x: x + call(key)(m.ids, m.w), dims=0, parts={"w": raw(5, 8), **parts})


def embedding_bag(key: Any) -> Sample:
    parts: dict[str, Any] = {"ids": torch.tensor([[2, 4, 1], [0, 0, 3]])}
    if inspect.isclass(key):
        return Sample(lambda m, x: x + m.part(m.ids), dims=0, parts={"part": key(5, 8, mode="sum"), **parts})
    return Sample(lambda m, x: x + call(key)(m.ids, m.w), dims=0, parts={"w": raw(5, 8), **parts})


def scores(m: Any) -> Any:
    """A (2, SIDE, SIDE) tensor computed from the input, which has no channels."""
    return m.input.transpose(1, 2).matmul(m.input)


def matmul(key: Any) -> Sample:
    if key in ("mm", torch.mm):  # products of matrices mix the samples
        return Sample(lambda m, x: call(torch.mm)(_gram(m), x) if key is torch.mm else _gram(m).mm(x), dims=0)
    if isinstance(key, str):
        return Sample(lambda m, x: getattr(x, key)(scores(m)), dims=1)
    return Sample(lambda m, x: call(key)(x, scores(m)), dims=1)


def _gram(m: Any) -> Any:
    return m.input.matmul(m.input.transpose(0, 1))


def addmm(key: Any) -> Sample:
    parts = {"w": raw(8, 8), "b": raw(8)}
    if isinstance(key, str):
        return Sample(lambda m, x: m.b.addmm(x.relu(), m.w), dims=0, parts=parts)
    return Sample(lambda m, x: call(key)(m.b, x.relu(), m.w), dims=0, parts=parts)


def baddbmm(key: Any) -> Sample:
    """The added tensor has no channels; it is the same for all of them."""
    if isinstance(key, str):
        return Sample(lambda m, x: m.input[:, :1].baddbmm(x, scores(m), alpha=0.5), dims=1)
    return Sample(lambda m, x: call(key)(m.input[:, :1], x, scores(m), beta=2), dims=1)


def attention(key: Any) -> Sample:
    def attend(m: Any, x: Any) -> Any:
        tokens = m.input.transpose(1, 2)
        return call(key)(tokens, tokens, x.transpose(1, 2))

    return Sample(attend, dims=1, reads=WIDTH, flat=True)


def instance_norm(key: Any) -> Sample:
    if inspect.isclass(key):
        made = key(WIDTH, affine=True, track_running_stats=True)
        return Sample(lambda m, x: m.part(x), dims=digit(key), parts={"part": made})
    parts = {"mean": torch.zeros(WIDTH), "var": torch.ones(WIDTH), "gamma": raw(WIDTH), "beta": raw(WIDTH)}
    return Sample(lambda m, x: call(key)(x, m.mean, m.var, m.gamma, m.beta, False), parts=parts)


def mixer(*module: Any, function: Any, dims: int = 2, affine: tuple[str, ...] = ("gamma", "beta")) -> Any:
    """A normalisation over channels."""

    def sample(key: Any) -> Sample:
        if inspect.isclass(key):
            return Sample(lambda m, x: m.part(x), dims=dims, exact=False, parts={"part": key(*module)})
        parts = {name: raw(WIDTH) for name in affine}
        op = lambda m, x: call(key)(x, function, *[getattr(m, name) for name in affine])  # noqa: E731
        return Sample(op, dims=dims, exact=False, parts=parts)

    return sample


def enter(key: Any) -> Sample:
    """The input of a part of a recorded model."""
    return Sample(lambda m, x: call(key)(x))


def sampled(key: Any) -> Sample:
    """Values at given places: a grid for each sample, or regions of interest."""
    parts = {"places": torch.rand(2, 3, 5, 2, generator=torch.Generator().manual_seed(0))}
    if not isinstance(key, Aten):
        return Sample(lambda m, x: call(key)(x, m.places, align_corners=False), parts=parts)
    if key.name == "grid_sampler":
        return Sample(lambda m, x: call(torch.ops.aten.grid_sampler.default)(x, m.places, 0, 0, False), parts=parts)
    roi_align = torch.ops.torchvision.roi_align.default
    parts = {"places": torch.tensor([[0, 0, 0, 2, 2], [1, 1, 0, 3, 2], [0, 0, 1, 3, 3]])}
    return Sample(lambda m, x: call(roi_align)(x, m.places.to(x.dtype), 1.0, 2, 2, 2, False), parts=parts)
