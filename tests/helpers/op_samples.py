"""Samples of maths on each entry, on two operands, along axes, and of writes to places that an index gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxmerge.graph.ops import Aten
from tests.helpers.netmaking import raw
from tests.helpers.sandwich import WIDTH, Sample, call, spelled


def invoke(key: Any, *args: Any, **kwargs: Any) -> Any:
    """The op on some operands, spelled as a method of the first one or as a function."""
    return getattr(args[0], key)(*args[1:], **kwargs) if isinstance(key, str) else call(key)(*args, **kwargs)


def unary(key: Any) -> Sample:
    return spelled(key)


def within(before: Callable[[Any], Any]) -> Callable[[Any], Sample]:
    """An op on values that are brought into its domain."""
    return lambda key: spelled(key, before=before)


def as_numbers(before: Callable[[Any], Any] = lambda x: x) -> Callable[[Any], Sample]:
    """An op that gives truth values, as numbers."""
    return lambda key: Sample(lambda m, x: invoke(key, x).to(torch.float64) + 0.5, before=before)


def of_truth(key: Any) -> Sample:
    """An op on truth values; in place too, so on a tensor of its own."""
    return Sample(lambda m, x: invoke(key, x > 0.1).to(torch.float64) + 0.5)


def with_gaps(x: Any) -> Any:
    """Some values NaN."""
    return x.sqrt()


def clamp(key: Any) -> Sample:
    """Bounds that are numbers; with a tensor, bounds for each channel."""
    name = key if isinstance(key, str) else key.__name__
    if "min" in name or "max" in name:
        return spelled(key, 0.1)
    if name.startswith("clip"):
        return spelled(key, -0.5, 0.5)
    bounds = {"low": raw(WIDTH, 1, 1), "high": raw(WIDTH, 1, 1)}
    return Sample(lambda m, x: invoke(key, x, m.low - 1, m.high + 1), parts=bounds)


def quantised(key: Any) -> Sample:
    """Rounded to a grid, which is not so fine that no value changes."""
    return Sample(lambda m, x: call(key)(x.float(), 0.1, 0, -128, 127).double())


def second(m: Any) -> Any:
    """A second activation, positive."""
    return torch.sigmoid(m.second(m.input))


def two(key: Any) -> Sample:
    """An op on two activations."""
    return Sample(lambda m, x: invoke(key, x, second(m)), parts={"second": None})


def two_positive(key: Any) -> Sample:
    return Sample(lambda m, x: invoke(key, torch.sigmoid(x), second(m)), parts={"second": None})


def two_truths(key: Any) -> Sample:
    return Sample(lambda m, x: x * invoke(key, x > 0.1, second(m) < 0.5), parts={"second": None})


def close(key: Any) -> Sample:
    return Sample(lambda m, x: x * invoke(key, x.round(), second(m).round()), parts={"second": None})


def lerp(key: Any) -> Sample:
    """Three operands, the weight a parameter of each channel."""
    return Sample(
        lambda m, x: invoke(key, x, m.second(m.input), m.share), parts={"second": None, "share": raw(WIDTH, 1, 1)}
    )


def addcdiv(key: Any) -> Sample:
    return Sample(
        lambda m, x: invoke(key, x, m.second(m.input), torch.sigmoid(x) + 1, value=0.5), parts={"second": None}
    )


def along(*args: Any, **facts: Any) -> Callable[[Any], Sample]:
    """An op along a spatial axis, which keeps its length."""
    return lambda key: spelled(key, *args, **facts)


def pair(key: Any) -> Sample:
    """Both results of two reductions at once."""
    if "aminmax" in str(key):
        return Sample(lambda m, x: _difference(invoke(key, x, dim=3, keepdim=True)))
    return Sample(lambda m, x: _difference(call(key)(x, 3, keepdim=True)))


def _difference(found: Any) -> Any:
    return 2 * found[0] - found[1]


def spectrum(*args: Any) -> Callable[[Any], Sample]:
    """A Fourier transform over spatial axes, which are averaged so that their number does not matter."""

    def op(key: Any) -> Sample:
        def real(m: Any, x: Any) -> Any:
            found = call(key)(x, *args)
            return found.abs() if key.__name__.startswith("fft_h") else found.real

        return Sample(real)

    return op


def like(key: Any) -> Sample:
    """Random numbers of an activation's shape, which do not count."""
    if key is torch.randint_like:
        return Sample(lambda m, x: x + 0.5 + 0 * call(key)(x, 5))
    return Sample(lambda m, x: x + 0.5 + 0 * call(key)(x).nan_to_num(0.0, 0.0, 0.0))


def full_like(key: Any) -> Sample:
    return Sample(lambda m, x: x + call(key)(x, 0.3))


IDS = torch.tensor([1, 0])


def index(shape: tuple[int, ...] = (2, 1, 1, 1)) -> dict[str, Any]:
    return {"second": None, "ids": IDS.view(shape)}


def scatter(key: Any) -> Sample:
    """Samples are sent to one another, with an index that is expanded over the channels."""
    name = (key if isinstance(key, str) else key.__name__).rstrip("_")
    more = ("amax",) if name == "scatter_reduce" else ()

    def op(m: Any, x: Any) -> Any:
        sent = m.second(m.input)
        return invoke(key, x.clone(), 0, m.ids.expand_as(sent), sent, *more)

    return Sample(op, parts=index())


def index_copy(key: Any) -> Sample:
    more = ("mean",) if "reduce" in str(key) else ()
    return Sample(lambda m, x: invoke(key, x.clone(), 0, m.ids, m.second(m.input), *more), parts=index((2,)))


def index_fill(key: Any) -> Sample:
    return Sample(lambda m, x: invoke(key, x.clone(), 2, m.ids, 0.5), parts=index((2,)))


def gather(key: Any) -> Sample:
    return Sample(lambda m, x: invoke(key, x, 0, m.ids.expand(-1, x.shape[1], 4, 4)), parts=index())


def take(key: Any) -> Sample:
    return Sample(lambda m, x: invoke(key, x, m.ids, 0), parts=index())


def index_put(key: Any) -> Sample:
    return Sample(lambda m, x: invoke(key, x.clone(), (m.ids,), m.second(m.input)), parts=index((2,)))


def setitem(key: Any) -> Sample:
    """A range of rows, and a range of channels, written by another activation."""

    def op(m: Any, x: Any) -> Any:
        whole, sent = x.clone(), m.second(m.input)
        invoke(key, whole, (slice(None), slice(None), slice(1, 3)), sent[:, :, 1:3])
        invoke(key, whole, (slice(None), slice(2, 6)), sent[:, 2:6] * 2)
        return whole

    return Sample(op, parts={"second": None})


def copy(key: Any) -> Sample:
    if isinstance(key, Aten):
        written = call(torch.ops.aten.copy_.default)
        return Sample(lambda m, x: written(x.clone(), m.second(m.input)), parts={"second": None})
    return Sample(lambda m, x: getattr(x.clone(), key)(m.second(m.input)), parts={"second": None})


def part(key: Any) -> Sample:
    """slice_scatter and select_scatter."""
    if "select" in str(key):
        return Sample(lambda m, x: invoke(key, x, m.second(m.input)[:, :, 1], 2, 3), parts={"second": None})
    return Sample(lambda m, x: invoke(key, x, m.second(m.input)[:, :, 1:3], 2, 0, 2), parts={"second": None})


def fill(key: Any) -> Sample:
    """A view of an activation is set to a number."""
    given = () if key == "zero_" else (0.5,)
    if not (isinstance(key, str) and key.endswith("_")) and not getattr(key, "__name__", "").endswith("_"):
        return Sample(lambda m, x: x + invoke(key, x, *given))

    def op(m: Any, x: Any) -> Any:
        whole = x.clone()
        invoke(key, whole[:, :, 1], *given)
        return whole

    return Sample(op)


def places(key: Any) -> Sample:
    """The places of the largest entries of each channel."""
    return Sample(lambda m, x: invoke(key, x, 2, True).double())


def counted(key: Any) -> Sample:
    return Sample(lambda m, x: x.amax(3) + invoke(key, x > 0.1, 3), consumer_dims=1)


def first(*args: Any, **facts: Any) -> Callable[[Any], Sample]:
    """An op that returns values and places, both of which are used."""
    return lambda key: spelled(key, *args, then=lambda pair: pair[0] + pair[1], **facts)


def size(made: Callable[[Any, tuple[int, ...]], Any]) -> Callable[[Any], Sample]:
    """A constant of a literal size, which must become as narrow as what it is added to."""

    def op(key: Any) -> Sample:
        shape = (2, WIDTH, 4, 4)
        return Sample(lambda m, x: x + made(key, shape).to(x.dtype))

    return op


def cosine(key: Any) -> Sample:
    return spelled(key)


_MATHS = """exp exp2 expm1 sin cos tan atan sinh cosh asinh sinc erf erfc i0 round floor ceil trunc frac sign sgn
sigmoid tanh square reciprocal i0 abs neg positive deg2rad rad2deg conj"""

SAMPLES: dict[str, Callable[[Any], Sample]] = {
    **dict.fromkeys(_MATHS.split(), unary),
    **dict.fromkeys(["log", "log2", "log10", "log1p", "sqrt", "rsqrt", "logit", "lgamma", "digamma"],
                    within(torch.sigmoid)),
    **dict.fromkeys(["asin", "acos", "atanh", "erfinv"], within(lambda x: 0.9 * x.sin())),
    "acosh": within(lambda x: 9 + x),
    **dict.fromkeys(["real", "imag"], lambda key: Sample(lambda m, x: invoke(key, torch.fft.fft(x)))),
    **dict.fromkeys(["isnan", "isfinite"], as_numbers(with_gaps)),
    **dict.fromkeys(["isinf", "isposinf"], as_numbers(lambda x: (500 * x).exp().exp())),
    "isneginf": as_numbers(lambda x: x.relu().log()),
    "signbit": as_numbers(),
    "angle": lambda key: spelled(key, before=lambda x: x),
    "nan_to_num": lambda key: Sample(lambda m, x: invoke(key, x.sqrt(), 0.5)),
    **dict.fromkeys(["logical_not", "bitwise_not"], of_truth),
    **dict.fromkeys(["clamp", "clamp_min", "clamp_max"], clamp),
    **dict.fromkeys(["fake_quantize_per_tensor"], quantised),
    **dict.fromkeys(["fmod", "remainder", "floor_divide", "atan2", "hypot", "copysign", "fmax", "fmin", "ldexp",
                     "logaddexp", "logaddexp2", "heaviside"], two),
    **dict.fromkeys(["pow", "float_power", "xlogy"], two_positive),
    **dict.fromkeys(["logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"],
                    two_truths),
    "isclose": close,
    "lerp": lerp,
    "addcdiv": addcdiv,
    **dict.fromkeys(["cumsum", "cumprod", "logcumsumexp"], along(2)),
    "diff": along(1, 3),
    "sort": first(2),
    "msort": along(),
    **dict.fromkeys(["cummax", "cummin"], first(2)),
    "argsort": lambda key: Sample(lambda m, x: invoke(key, x, 2).double()),
    "topk": first(3, 3),
    "kthvalue": first(2, 2, True),
    "mode": first(3, True),
    **dict.fromkeys(["argmax", "argmin"], places),
    "quantile": along(0.3, 2, True),
    **dict.fromkeys(["prod", "nansum", "nanmean"], along(3, consumer_dims=1)),
    **dict.fromkeys(["any", "all", "count_nonzero"], counted),
    **dict.fromkeys(["var_mean", "std_mean", "aminmax"], pair),
    "fft": spectrum(4, 3),
    "fft2": spectrum(),
    "fftn": spectrum((4, 4), (2, 3)),
    "fftshift": along(3),
    "random_like": like,
    "empty_like": like,
    "full_like": full_like,
    "setitem": setitem,
    "index_put": index_put,
    "copy": copy,
    **dict.fromkeys(["slice_scatter", "select_scatter"], part),
    "scatter": scatter,
    "index_copy": index_copy,
    "index_fill": index_fill,
    "gather": gather,
    "take_along_dim": take,
    **dict.fromkeys(["fill", "zero"], fill),
}  # fmt: skip
