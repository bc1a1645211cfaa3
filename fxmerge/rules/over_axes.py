"""Rules of ops that reorder, accumulate or transform the entries along an axis: sort, cumsum, fft, ...

Along an axis that holds no channels, each channel is mapped by itself. Along the channels, a result depends on the
order or the number of all of them, so the channels stay.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxmerge.ir.labels import along, varying, without
from fxmerge.ir.provenance import Lab
from fxmerge.rules.context import RuleContext, resized
from fxmerge.rules.elementwise import reduced, reduction_rule
from fxmerge.rules.movement import execute
from fxmerge.rules.rule import Answer, Operand, Rule, Unknown

Dims = int | list[int] | tuple[int, ...] | None
Ordered = namedtuple("Ordered", ["values", "indices"])  # as torch.return_types.sort has them


def _apart(x: Lab, dims: Dims) -> bool:
    """Do the labels vary along none of these axes?"""
    return not along(dims, x.t) & set(varying(x.t))


def along_axis(ctx: RuleContext, input: Operand, dim: Dims = -1, *rest: Operand, **kwargs: Operand) -> Lab | Unknown:
    """Sums or ranks along an axis: cumsum, argsort. The result has the input's axes."""
    if not isinstance(input, Lab) or ctx.shape is None:
        return Unknown("is not called on one activation, or gives several tensors")
    if not isinstance(dim, int) or not _apart(input, dim):
        return Unknown("runs along the channels")
    return resized(input, ctx.shape)


def ordered(ctx: RuleContext, input: Operand, dim: Operand = -1, *rest: Operand, **kwargs: Operand) -> Answer:
    """sort, cummax, cummin: values along an axis and the places that they came from."""
    if not isinstance(input, Lab):
        return Unknown("is not called on one activation")
    if not isinstance(dim, int) or not _apart(input, dim):
        return Unknown("runs along the channels")
    return Ordered(input, input)


def sort(
    ctx: RuleContext, input: Operand, dim: int = -1, descending: bool = False, stable: bool = False, **kwargs: Operand
) -> Answer:
    """Entries along an axis in ascending order."""
    return ordered(ctx, input, dim)


def msort(ctx: RuleContext, input: Operand) -> Lab | Unknown:
    """Entries along the first axis in ascending order."""
    return along_axis(ctx, input, 0)


def argsort(
    ctx: RuleContext, input: Operand, dim: int = -1, descending: bool = False, stable: bool = False, **kwargs: Operand
) -> Lab | Unknown:
    """The order of the entries along an axis."""
    return along_axis(ctx, input, dim)


def topk(ctx: RuleContext, input: Operand, k: Operand, dim: int = -1, *rest: Operand, **kwargs: Operand) -> Answer:
    """The k largest entries along an axis."""
    if not isinstance(input, Lab) or not isinstance(k, int):
        return Unknown("is not called on one activation with a number")
    if not _apart(input, dim):
        return Unknown("runs along the channels")
    shape = list(input.t.shape)
    shape[dim % len(shape)] = k
    taken = resized(input, shape)
    return taken if isinstance(taken, Unknown) else Ordered(taken, taken)


def ranked(
    ctx: RuleContext, input: Operand, k: Operand = None, dim: Dims = -1, keepdim: bool = False, **kwargs: Operand
) -> Answer:
    """kthvalue: one entry along an axis, and its place."""
    if not isinstance(input, Lab):
        return Unknown("is not called on one activation")
    if not _apart(input, dim):
        return Unknown("runs along the channels")
    taken = Lab(without(input.t, along(dim, input.t), keepdim))
    return Ordered(taken, taken)


def mode(ctx: RuleContext, input: Operand, dim: int = -1, keepdim: bool = False) -> Answer:
    """The most frequent entry along an axis, and its place."""
    return ranked(ctx, input, None, dim, keepdim)


def places(ctx: RuleContext, input: Operand, dim: Dims = None, keepdim: bool = False, **kwargs: Operand) -> Answer:
    """argmax and argmin. Places along an axis of channels are numbers of channels, which change."""
    if isinstance(input, Lab) and not _apart(input, dim):
        return Unknown("gives the numbers of channels")
    return reduction_rule(ctx, input, dim, keepdim)


def quantile(
    ctx: RuleContext, input: Operand, q: Operand, dim: Dims = None, keepdim: bool = False, **kwargs: Operand
) -> Answer:
    """A quantile along an axis, for one q."""
    if not isinstance(q, (int, float)):
        return Unknown("is called with several quantiles")
    return reduction_rule(ctx, input, dim, keepdim)


VarMean = namedtuple("VarMean", ["var", "mean"])
StdMean = namedtuple("StdMean", ["std", "mean"])
MinMax = namedtuple("MinMax", ["min", "max"])
_PAIRS: dict[str, Callable[..., Any]] = {"var_mean": VarMean, "std_mean": StdMean, "aminmax": MinMax}


def pair(ctx: RuleContext, input: Operand, dim: Operand = None, *given: Any, **kwargs: Any) -> Answer:
    """Two reductions at once: var_mean, std_mean, aminmax."""
    unbiased_first = isinstance(dim, bool)  # var_mean(x, unbiased), and var_mean(x, dim, unbiased, keepdim)
    keepdim = kwargs.get("keepdim", given[1] if len(given) > 1 else False)
    axes: Any = None if unbiased_first else dim
    if not isinstance(input, Lab):
        return Unknown("reduces something that is not an activation")
    shape = tuple(without(input.t, along(axes, input.t), bool(keepdim)).shape)
    found = reduced(ctx, input, axes, bool(keepdim), shape)
    return found if isinstance(found, Unknown) else _PAIRS[ctx.rule_name](found, found)


def transform(last: int | None) -> Callable[..., Answer]:
    """The rule of a Fourier transform over the last `last` axes if none are named. None means all."""

    def apply(
        ctx: RuleContext, input: Operand, n: Operand = None, dim: Dims = None, norm: Operand = None, *,
        s: Operand = None, **kwargs: Operand,
    ) -> Answer:  # fmt: skip
        if not isinstance(input, Lab) or ctx.shape is None:
            return Unknown("is not called on one activation")
        sizes = n if s is None else s
        axes: Dims = dim
        if dim is None and isinstance(sizes, Sequence):
            axes = tuple(range(-len(sizes), 0))
        elif dim is None and last is not None:
            axes = tuple(range(-last, 0))
        if not _apart(input, axes):
            return Unknown("transforms the channels")
        return resized(input, ctx.shape)

    return apply


def _named(*names: str, prefix: Any = torch) -> tuple[Any, ...]:
    """The functions and methods of these names, whatever torch has."""
    functions = [getattr(prefix, n) for n in names if hasattr(prefix, n)]
    return (*functions, *(n for n in names if prefix is torch and hasattr(Tensor, n)))


def _values_alone(ctx: RuleContext, *args: Operand, **kwargs: Operand) -> bool:
    """The values scale with the channel; their places do not."""
    return not ctx.uses(1, "indices")


def _no_transform(*names: str) -> tuple[Any, ...]:
    return _named(*names, prefix=torch.fft)


def difference(ctx: RuleContext, input: Operand, n: int = 1, dim: int = -1) -> Answer:
    """Differences of neighbours along an axis."""
    return along_axis(ctx, input, dim)


ROWS: tuple[Rule, ...] = (
    Rule("cumsum", "per_channel", along_axis, _named("cumsum", "cumsum_"), True),
    Rule("cumprod", "per_channel", along_axis, _named("cumprod", "cumprod_")),
    Rule("logcumsumexp", "per_channel", along_axis, _named("logcumsumexp")),
    Rule("diff", "per_channel", difference, _named("diff"), True),
    Rule("sort", "per_channel", sort, _named("sort"), _values_alone),
    Rule("msort", "per_channel", msort, _named("msort"), True),
    Rule("cummax", "per_channel", ordered, _named("cummax"), _values_alone),
    Rule("cummin", "per_channel", ordered, _named("cummin"), _values_alone),
    Rule("argsort", "per_channel", argsort, _named("argsort")),
    Rule("topk", "per_channel", topk, _named("topk"), _values_alone),
    Rule("kthvalue", "per_channel", ranked, _named("kthvalue"), _values_alone),
    Rule("mode", "per_channel", mode, _named("mode"), _values_alone),
    Rule("argmax", "per_channel", places, _named("argmax")),
    Rule("argmin", "per_channel", places, _named("argmin")),
    Rule("quantile", "per_channel", quantile, _named("quantile", "nanquantile"), True),
    Rule("prod", "per_channel", reduction_rule, _named("prod")),
    Rule("nansum", "per_channel", reduction_rule, _named("nansum"), True),
    Rule("nanmean", "per_channel", reduction_rule, _named("nanmean"), True),
    Rule("any", "per_channel", reduction_rule, _named("any")),
    Rule("all", "per_channel", reduction_rule, _named("all")),
    Rule("count_nonzero", "per_channel", reduction_rule, _named("count_nonzero")),
    *(Rule(name, "per_channel", pair, _named(name), name != "var_mean") for name in _PAIRS),
    Rule("fft", "per_channel", transform(1), _no_transform("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"), True),
    Rule("fft2", "per_channel", transform(2),
         _no_transform("fft2", "ifft2", "rfft2", "irfft2", "hfft2", "ihfft2"), True),
    Rule("fftn", "per_channel", transform(None),
         _no_transform("fftn", "ifftn", "rfftn", "irfftn", "hfftn", "ihfftn"), True),
    Rule("fftshift", "movement", execute, _no_transform("fftshift", "ifftshift"), True),
)  # fmt: skip
