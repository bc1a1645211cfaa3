"""RULES: what each op does to labels. One row for one mathematical op; its spellings stand in the row.

A rule is a function `rule(ctx, *args, **kwargs)` with the op's own functional signature. Operands arrive as `Lab`
(an activation's labels), `Param` (a parameter) or plain Python values and constant tensors. It returns what the op
gives in the same terms, and tells `ctx` what it learnt: `ctx.tie`, `ctx.pin`, `ctx.block`, `ctx.layer`. An op without
a row pins everything that it touches: unknown is never "elementwise".

To teach fxmerge an op of your own:

    fxmerge.RULES["my_gate"] = fxmerge.per_channel("my_gate", MyGate, my_gate_function, commutes=False)
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import movement, writers
from .ir import Kind, Lab, Param

Spelling = Any  # a module class, a function, a method name, or Module(...)


@dataclass(frozen=True)
class Module:
    """A module class and the functional arguments that its attributes stand for."""

    cls: type[nn.Module]
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """One op: its kind, what it does to labels, and every way of spelling it.

    commutes: f(s x) = s f(x) for every s > 0 (ReLU, pooling, any linear map); False is the safe answer
    """

    name: str
    kind: Kind
    apply: Callable[..., Any]
    spellings: tuple[Spelling, ...]
    commutes: bool | Callable[..., bool] = field(default=False)


def per_channel_rule(ctx: Any, x: Any, *rest: Any, **kwargs: Any) -> Any:
    """Each channel is mapped by itself; axes that change size must not be the ones that labels vary along."""
    others = [*rest, *kwargs.values()]
    if not isinstance(x, Lab) or any(isinstance(a, (Lab, Param)) for a in others):
        return ctx.unknown("takes more than one activation or parameter here")
    shape = ctx.shape
    if shape is None:
        return ctx.unknown("gives something other than one tensor")
    if tuple(shape) == tuple(x.t.shape):
        return x
    if len(shape) != x.t.dim():
        return ctx.unknown("changes the number of axes")
    return ctx.resized(x, shape)


def per_channel(name: str, *spellings: Spelling, commutes: bool | Callable[..., bool] = False) -> Rule:
    """A row for an op that treats every channel alike and alone: activations, pooling, dropout, ..."""
    return Rule(name, "per_channel", per_channel_rule, spellings, commutes)


def reduction_rule(ctx: Any, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """A reduction over axes that labels do not vary along; over channels it pins (it would weigh them anew)."""
    if not isinstance(x, Lab):
        return ctx.unknown("reduces something that is no activation")
    dims = range(x.t.dim()) if dim is None else ([dim] if isinstance(dim, int) else list(dim))
    axes = {d % max(x.t.dim(), 1) for d in dims}
    if axes & set(movement.varying_axes(x)):
        return ctx.unknown("reduces over the channels")
    out = x.t
    for axis in sorted(axes, reverse=True):
        out = out.narrow(axis, 0, 1) if keepdim else out.select(axis, 0)
    if ctx.shape is None or tuple(out.shape) != tuple(ctx.shape):
        return ctx.unknown("gives something other than one tensor")
    return Lab(out)


def _reduction(name: str, *spellings: Spelling, commutes: bool = False) -> Rule:
    return Rule(name, "per_channel", reduction_rule, spellings, commutes)


def softmax_rule(ctx: Any, x: Any, dim: int | None = None, *rest: Any, **kwargs: Any) -> Any:
    """Softmax is per channel along any axis that labels do not vary along, and a mixer along one that they do."""
    if not isinstance(x, Lab) or dim is None:
        return ctx.unknown("does not say its axis")
    if dim % x.t.dim() in movement.varying_axes(x):
        ctx.mix(x.t)
    return x


def prelu_rule(ctx: Any, x: Any, weight: Any) -> Any:
    if isinstance(weight, Param) and weight.value.numel() > 1 and isinstance(x, Lab):
        return writers.carry(ctx, "prelu", x, {"weight": weight}, axis=min(1, x.t.dim() - 1))
    return x


def query_rule(ctx: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Shapes, dtypes and devices: plain values, read off the operand."""
    return ctx.query(x, *args, **kwargs)


def _adds_nothing(ctx: Any, *args: Any, **kwargs: Any) -> bool:
    """A sum commutes with scaling when every operand is an activation or a per-channel parameter."""
    return all(not isinstance(a, (int, float)) or a == 0 for a in args[:2]) and not any(
        isinstance(a, Tensor) for a in args
    )


def _one_factor(ctx: Any, *args: Any, **kwargs: Any) -> bool:
    """A product commutes with scaling when just one operand is an activation, and stands above the line."""
    labs = [isinstance(a, Lab) for a in args[:2]]
    return labs == [True, False] or (labs == [False, True] and "div" not in ctx.rule_name)


_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("running_mean", "running_var", "weight", "bias", "eps")

_ROWS: tuple[Rule, ...] = (
    # writers: they read the labels on their reduction axis and make new ones on their output axis
    Rule("linear", "writer", writers.linear, (Module(nn.Linear, ("weight", "bias")), F.linear)),
    Rule(
        "conv",
        "writer",
        writers.conv,
        (
            *(Module(cls, _CONV) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
            *(F.conv1d, F.conv2d, F.conv3d),
        ),
    ),
    # carriers: their own per-channel parameters follow the labels
    Rule(
        "batch_norm",
        "carrier",
        writers.batch_norm,
        (*(Module(cls, _NORM) for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)), F.batch_norm),
        commutes=True,  # its affine is pushed through exactly, by paths.push
    ),
    Rule(
        "prelu", "carrier", prelu_rule, (Module(nn.PReLU, ("weight",)), F.prelu, torch.prelu, "prelu"), commutes=True
    ),
    # ties: two labelled operands become equal, position by position
    Rule("add", "tie", writers.elementwise, (operator.add, operator.iadd, torch.add, "add", "add_"), _adds_nothing),
    Rule(
        "sub",
        "tie",
        writers.elementwise,
        (operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_"),
        _adds_nothing,
    ),
    Rule(
        "mul",
        "tie",
        writers.elementwise,
        (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_"),
        _one_factor,
    ),
    Rule(
        "div",
        "tie",
        writers.elementwise,
        (operator.truediv, operator.itruediv, torch.div, torch.true_divide, torch.divide, "div", "div_"),
        _one_factor,
    ),
    Rule("maximum", "tie", writers.elementwise, (torch.maximum, "maximum")),
    Rule("minimum", "tie", writers.elementwise, (torch.minimum, "minimum")),
    # activations that a positive factor passes through unchanged
    per_channel("relu", nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", commutes=True),
    per_channel("leaky_relu", nn.LeakyReLU, F.leaky_relu, F.leaky_relu_, commutes=True),
    per_channel("rrelu", nn.RReLU, F.rrelu, commutes=True),
    per_channel("abs", torch.abs, "abs", operator.abs, commutes=True),
    per_channel("neg", torch.neg, "neg", operator.neg, commutes=True),
    per_channel("identity", nn.Identity, "contiguous", "clone", torch.clone, "detach", "float", "double", "half",
                "bfloat16", "to", "type_as", "cpu", "cuda", commutes=True),
    per_channel("dropout", nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
                nn.FeatureAlphaDropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout,
                F.feature_alpha_dropout, torch.dropout, commutes=True),
    # activations that only the factor 1 passes through
    per_channel("relu6", nn.ReLU6, F.relu6),
    per_channel("hardtanh", nn.Hardtanh, F.hardtanh, torch.clamp, torch.clip, "clamp", "clamp_", "clip",
                "clamp_min", "clamp_max"),
    per_channel("gelu", nn.GELU, F.gelu),
    per_channel("silu", nn.SiLU, F.silu),
    per_channel("mish", nn.Mish, F.mish),
    per_channel("elu", nn.ELU, F.elu, F.elu_),
    per_channel("celu", nn.CELU, F.celu),
    per_channel("selu", nn.SELU, F.selu),
    per_channel("sigmoid", nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"),
    per_channel("logsigmoid", nn.LogSigmoid, F.logsigmoid),
    per_channel("tanh", nn.Tanh, F.tanh, torch.tanh, "tanh", "tanh_"),
    per_channel("hardsigmoid", nn.Hardsigmoid, F.hardsigmoid),
    per_channel("hardswish", nn.Hardswish, F.hardswish),
    per_channel("softplus", nn.Softplus, F.softplus),
    per_channel("softsign", nn.Softsign, F.softsign),
    per_channel("softshrink", nn.Softshrink, F.softshrink),
    per_channel("hardshrink", nn.Hardshrink, F.hardshrink),
    per_channel("tanhshrink", nn.Tanhshrink, F.tanhshrink),
    per_channel("threshold", nn.Threshold, F.threshold),
    per_channel("exp", torch.exp, "exp"),
    per_channel("log", torch.log, "log"),
    per_channel("sqrt", torch.sqrt, "sqrt"),
    per_channel("rsqrt", torch.rsqrt, "rsqrt"),
    per_channel("reciprocal", torch.reciprocal, "reciprocal"),
    per_channel("square", torch.square, "square"),
    per_channel("pow", torch.pow, "pow", operator.pow),
    per_channel("sin", torch.sin, "sin"),
    per_channel("cos", torch.cos, "cos"),
    per_channel("erf", torch.erf, "erf"),
    # pooling and interpolation: spatial axes change, channels stay
    per_channel("avg_pool", nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
                commutes=True),
    per_channel("max_pool", nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
                torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, commutes=True),
    per_channel("lp_pool", nn.LPPool1d, nn.LPPool2d, F.lp_pool1d, F.lp_pool2d, commutes=True),
    per_channel("adaptive_pool", nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
                nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, F.adaptive_avg_pool1d,
                F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
                F.adaptive_max_pool3d, commutes=True),
    per_channel("interpolate", nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate,
                F.upsample, commutes=True),
    _reduction("mean", torch.mean, "mean", commutes=True),
    _reduction("sum", torch.sum, "sum", commutes=True),
    _reduction("amax", torch.amax, "amax", commutes=True),
    _reduction("amin", torch.amin, "amin", commutes=True),
    # mixers: dropping a channel is not exact for the others
    Rule("softmax", "mixer", softmax_rule,
         (Module(nn.Softmax, ("dim",)), Module(nn.LogSoftmax, ("dim",)), F.softmax, F.log_softmax, torch.softmax,
          torch.log_softmax, "softmax", "log_softmax")),
    # movement: executed on the labels as it stands
    *(Rule(name, "movement", movement.execute, spellings, True) for name, spellings in movement.SPELLINGS.items()),
    # shapes and other plain values
    Rule("query", "query", query_rule, (getattr, "size", "dim", "ndimension", "numel", "stride", "get_device",
                                        "is_floating_point", "element_size", torch.numel, len,
                                        torch.is_tensor)),
)  # fmt: skip

RULES: dict[str, Rule] = {row.name: row for row in _ROWS}


def key(spelling: Spelling) -> Any:
    """What a graph's node is looked up by: the module class, the function, or the method's name."""
    return spelling.cls if isinstance(spelling, Module) else spelling


def spellings() -> Iterator[tuple[Any, Rule, Spelling]]:
    """(key, rule, spelling) of every row, users' own rows included."""
    for rule in RULES.values():
        for spelling in rule.spellings:
            yield key(spelling), rule, spelling


def table() -> dict[Any, tuple[Rule, Spelling]]:
    """RULES by key, as the interpreter looks them up."""
    return {k: (rule, spelling) for k, rule, spelling in spellings()}


def module_class(module: nn.Module, known: dict[Any, tuple[Rule, Spelling]]) -> type[nn.Module] | None:
    """The class in the table whose forward this module runs: itself, or a base whose forward it did not override."""
    for cls in type(module).__mro__:
        if cls in known and getattr(type(module), "forward", None) is getattr(cls, "forward", None):
            return cls
    return None


def describe(spelling: Spelling) -> str:
    """The name that users know a spelling by: `nn.ReLU`, `F.relu`, `.relu()`."""
    target = key(spelling)
    if isinstance(target, str):
        return f".{target}()"
    if inspect.isclass(target):
        return f"nn.{target.__name__}"
    return str(getattr(target, "__name__", math.nan))
