"""Patches: every linear layer and convolution as a matrix product, so that one least-squares solver serves them all.

A layer with g groups computes, at each output position, out = W p + b with a patch p of its input, (g, in/g * kernel).
`patches` gathers the patches at chosen positions. `matrices_of` turns the layer's weight into W (g, out/g, p), and
`weight_of` turns W back. A transposed convolution is a plain convolution of the input with stride - 1 zeros between its
entries, with the kernel flipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxmerge.graph.nested import leaves
from fxmerge.graph.ops import overload_name
from fxmerge.ir.provenance import Layer
from fxmerge.methods.least_squares import Reduce

_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "matrix": ("input", "weight"),
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "depthwise": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
_DEFAULTS: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
FEWEST = 16384  # positions that a wide layer is solved on, unless `Settings.rows` is smaller
SALIENT = 0.5  # the share of positions that are drawn by salience, where it is known
ENTRIES = 2**24  # entries of the patches that a narrow layer is solved on, at most


@dataclass(frozen=True, kw_only=True)
class Form:
    """A layer's geometry. Sizes have one entry for each spatial axis, none for a linear layer."""

    op: str  # linear, matrix, conv, depthwise or conv_transpose
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()  # before, after
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "constant"

    @property
    def spatial(self) -> int:
        return len(self.kernel)

    @property
    def transposed(self) -> bool:
        return self.op == "conv_transpose"


def operands(node: fx.Node, op: str) -> dict[str, Any]:
    """The arguments of a call, nodes and plain values, by the parameter names of torch's functions."""
    names = _ARGUMENTS[op]
    target = node.target
    overload = overload_name(target)
    name = overload or (target if isinstance(target, str) else getattr(target, "__name__", ""))
    if overload is not None:
        names = tuple(a.name for a in target._schema.arguments)  # type: ignore[union-attr]
    if name == "einsum":
        given: list[fx.Node] = [leaf for leaf in leaves((node.args, dict(node.kwargs))) if isinstance(leaf, fx.Node)]
        return dict(zip(("weight", "input"), sorted(given, key=lambda n: n.op != "get_attr"), strict=True))
    if name in ("matmul", "mm", "bmm", "tensordot"):
        names = ("input", "weight")
    if name == "addmm":
        names = ("bias", "input", "weight")
        as_here = {"input": "bias", "self": "bias", "mat1": "input", "mat2": "weight"}
    else:
        as_here = {"a": "input", "self": "input"} | dict.fromkeys(("b", "other", "mat2", "tensor2"), "weight")
    kwargs = {as_here.get(key, key): value for key, value in node.kwargs.items()}
    return dict(zip(names, node.args, strict=False)) | kwargs


def input_of(node: fx.Node, op: str) -> fx.Node:
    """The node of the activation that a layer's call reads."""
    source: fx.Node = node.all_input_nodes[0] if node.op == "call_module" else operands(node, op)["input"]
    return source


def form_of(node: fx.Node, layer: Layer, owner: nn.Module | None, weight: Tensor) -> Form | None:
    """The geometry of a call; None where the op is unknown or a size is computed in the graph."""
    if layer.op not in _ARGUMENTS:
        return None
    if layer.op in ("linear", "matrix"):
        return Form(op="matrix" if layer.transposed else "linear")
    settings = {k: getattr(owner, k) for k in _DEFAULTS if hasattr(owner, k)} if owner is not None else {}
    settings = _DEFAULTS | (settings or {k: v for k, v in operands(node, layer.op).items() if k in _DEFAULTS})
    if any(isinstance(leaf, fx.Node) for leaf in leaves(list(settings.values()))):
        return None
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_each(settings[k], len(kernel)) for k in ("stride", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if settings["padding"] == "valid":
        padding = [(0, 0)] * len(kernel)
    elif settings["padding"] == "same":
        padding = [(r // 2, r - r // 2) for r in reach]
    else:
        padding = [(p, p) for p in _each(settings["padding"], len(kernel))]
    mode = getattr(owner, "padding_mode", "zeros")
    if layer.op == "conv_transpose":
        more = _each(settings["output_padding"], len(kernel))
        padding = [(r - p, r - p + o) for r, (p, _), o in zip(reach, padding, more, strict=True)]
    return Form(
        op=layer.op,
        kernel=kernel,
        stride=stride,
        padding=tuple(padding),
        dilation=dilation,
        groups=int(settings["groups"]),
        padding_mode="constant" if mode == "zeros" else str(mode),
    )


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(int(v) for v in (values * count if len(values) == 1 else values))


def matrices_of(weight: Tensor, form: Form) -> Tensor:
    """A layer's weight as W (g, out/g, p), one matrix for each group."""
    if form.op == "linear":
        return weight[None]
    if form.op == "matrix":
        return weight.T[None]
    if form.transposed:
        split = weight.reshape(form.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return split.flip(list(range(3, split.dim()))).flatten(3).flatten(2)
    return weight.reshape(form.groups, -1, prod(weight.shape[1:]))


def weight_of(matrices: Tensor, form: Form, like: Tensor) -> Tensor:
    """The inverse of `matrices_of`: W (g, out/g, p) in the shape and dtype of the weight `like`."""
    if form.op == "linear":
        weight = matrices[0]
    elif form.op == "matrix":
        weight = matrices[0].T
    elif form.transposed:
        split = matrices.reshape(form.groups, matrices.size(1), -1, *form.kernel)
        weight = split.flip(list(range(3, split.dim()))).transpose(1, 2)
    else:
        weight = matrices
    return weight.reshape(like.shape).to(like)


def positions(out: Tensor, form: Form) -> int:
    """The number of output positions in a layer's output."""
    return out.numel() // out.size(channel_axis(out, form)) if out.numel() else 0


def enough(rows: int, width: int, memory: float = 0.0) -> int:
    """The number of positions to solve a layer on, with patches of `width` entries each.

    It is `rows`, or fewer so that the patches have at most ENTRIES together; but never fewer than FEWEST for that
    reason, so that there are more positions than unknowns. Where `memory` (GiB) is not 0, the patches take at most a
    sixteenth of it in float32, and have at least twice as many positions as entries.
    """
    count = min(rows, max(FEWEST, ENTRIES // max(width, 1)))
    return count if not memory else min(count, max(2 * width, int(memory * 2**24 / max(width, 1))))


def sample(
    outputs: Sequence[Tensor], form: Form, rows: int, generator: torch.Generator, reduce: Reduce,
    real: Sequence[Tensor | None] | None = None, salience: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """About `rows` output positions at random, the same share of each batch: ascending indices, by batch.

    real:     the positions to choose from, (positions,) bool by batch; None for all
    salience: (positions,) by batch: half of the positions are drawn in proportion to it, some of them several times,
              and more of a batch that has more of it; None for uniformly
    """
    among = [None if own is None else own.nonzero().flatten().cpu() for own in real or [None] * len(outputs)]
    counts = [positions(y, form) if own is None else len(own) for y, own in zip(outputs, among, strict=True)]
    total = float(reduce(torch.tensor(float(sum(counts)), dtype=torch.float64, device=outputs[0].device)))
    share, found = rows / max(total, 1), []
    often = None if salience is None else _oftenness(salience, among, total, reduce)
    for number, (y, count, own) in enumerate(zip(outputs, counts, among, strict=True)):
        if often is not None:
            index = _systematic(often[number] * min(share, 1), generator)
        elif share < 1:
            index = torch.randperm(count, generator=generator)[: max(1, round(count * share))].sort().values
        else:
            index = torch.arange(count)
        index = index if own is None else own[index]
        found.append(index.to(y.device))
    return found


def _oftenness(
    salience: Sequence[Tensor], among: Sequence[Tensor | None], total: float, reduce: Reduce
) -> list[Tensor] | None:
    """By batch, how often each position is drawn where all are drawn once on average; None if all salience is 0.

    among: the positions to draw from, or None for all; total: their number, on all processes
    """
    pairs = zip(salience, among, strict=True)
    own = [s.cpu().double() if index is None else s.cpu().double()[index] for s, index in pairs]
    whole = float(reduce(torch.stack([s.sum() for s in own]).sum().to(salience[0].device)))
    return [1 - SALIENT + s * (SALIENT * total / whole) for s in own] if whole > 0 else None


def _systematic(often: Tensor, generator: torch.Generator) -> Tensor:
    """Ascending indices, each about `often` times: rounded up or down so that the sum is kept (systematic sampling)."""
    bounds = often.cumsum(0) - torch.rand((), dtype=torch.float64, generator=generator)
    times = bounds.floor().diff(prepend=bounds.new_full((1,), -1.0)).long()
    return torch.arange(len(often)).repeat_interleave(times) if int(times.sum()) else often.argmax()[None]


def by_position(out: Tensor, form: Form) -> Tensor:
    """The sum of the squares of the channels of a layer's output at each position: (positions,)."""
    return _channels_at_end(out, form).square().sum(-1).flatten()


def scaled_by_position(out: Tensor, form: Form, factors: Tensor) -> Tensor:
    """A layer's output with the channels at each position multiplied by a factor. factors: (positions,)"""
    moved = _channels_at_end(out, form)
    scaled = moved * factors.view(moved.shape[:-1])[..., None]
    return scaled.movedim(-1, channel_axis(out, form)) if out.dim() > 1 else scaled[0]


def channel_axis(out: Tensor, form: Form) -> int:
    """The axis of the channels in a layer's output."""
    return out.dim() - form.spatial - 1


def at_positions(out: Tensor, form: Form, index: Tensor) -> Tensor:
    """A layer's output at the positions with these indices: (rows, out)."""
    moved = _channels_at_end(out, form)
    return moved[torch.unravel_index(index, moved.shape[:-1])]


def _channels_at_end(out: Tensor, form: Form) -> Tensor:
    """A layer's output, (*positions, out)."""
    return _lined_up(out.movedim(channel_axis(out, form), -1))


def _lined_up(x: Tensor) -> Tensor:
    """A vector as a row; other tensors, whose last axis is the channels, unchanged."""
    return x[None] if x.dim() == 1 else x


def patches(x: Tensor, form: Form, index: Tensor) -> Tensor:
    """The patches of a layer's input for the output positions with these indices: (rows, g, p)."""
    if not form.spatial:
        x = _lined_up(x)
        return x[torch.unravel_index(index, x.shape[:-1])][:, None]
    lead = x.shape[: x.dim() - form.spatial - 1]
    x = x.reshape(-1, *x.shape[len(lead) :])
    if form.transposed:
        sizes = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], form.stride, strict=True)]
        stuffed = x.new_zeros(*x.shape[:2], *sizes)
        stuffed[(slice(None), slice(None), *(slice(None, None, t) for t in form.stride))] = x
        x = stuffed
    stride = (1,) * form.spatial if form.transposed else form.stride
    pads = [p for pair in reversed(form.padding) for p in pair]
    x = F.pad(x, pads, mode=form.padding_mode) if any(pads) else x
    windows, channels = x, x.size(1)
    for axis, (kernel, step, gap) in enumerate(zip(form.kernel, stride, form.dilation, strict=True), 2):
        windows = windows.unfold(axis, gap * (kernel - 1) + 1, step)[..., ::gap]
    windows = windows.movedim(1, 1 + form.spatial)  # (n, *out, channels, *kernel)
    taken = windows[torch.unravel_index(index, windows.shape[: 1 + form.spatial])]
    return taken.reshape(len(index), form.groups, channels // form.groups * prod(form.kernel))
