"""One small net for each spelling of each rule.

SAMPLES maps a rule's name to a function from a spelling's key (a module class, a function, a method's name) to a
`Sample`. A rule without a row here, or a spelling that its row cannot make, fails tests/rules/test_rules.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fxmerge.graph.ops import Aten
from tests.helpers import op_samples
from tests.helpers.layer_samples import (
    addmm,
    attention,
    baddbmm,
    batch_norm,
    conv,
    embedding,
    embedding_bag,
    enter,
    instance_norm,
    linear,
    matmul,
    mixer,
    prelu,
    sampled,
    scores,
)
from tests.helpers.netmaking import raw
from tests.helpers.query_samples import query
from tests.helpers.recurrent_samples import RECURRENT
from tests.helpers.sandwich import SIDE, WIDTH, Sample, call, digit, spelled


def by_dims(*args: Any) -> Callable[[Any], Sample]:
    return lambda key: spelled(key, *args, dims=digit(key))


def two(key: Any) -> Sample:
    """An op on two activations, the second of which is positive."""
    if isinstance(key, str):
        return Sample(lambda m, x: getattr(x, key)(torch.sigmoid(m.second(m.input))), parts={"second": None})
    return Sample(lambda m, x: call(key)(x, torch.sigmoid(m.second(m.input))), parts={"second": None})


def aten(name: str, overload: str, *args: Any, **facts: Any) -> Sample:
    """An op as torch.export spells it."""
    return spelled(getattr(getattr(torch.ops.aten, name), overload), *args, **facts)


def identity(key: Any) -> Sample:
    if isinstance(key, Aten):
        return aten(key.name, "default", then=lambda x: x + 0.0)
    if key in ("float", "double", "half", "bfloat16"):
        return Sample(lambda m, x: getattr(x, key)().to(x.dtype))
    if key == "to":
        return Sample(lambda m, x: x.to(torch.float32).to(x.dtype))
    return spelled(key)


def type_as(key: Any) -> Sample:
    return Sample(lambda m, x: x.float().type_as(x))


def dropout(key: Any) -> Sample:
    return spelled(key, 0.5, False, module=(0.5,), dims=digit(key))


def flat(*args: Any, into: int = WIDTH * SIDE * SIDE, **facts: Any) -> Callable[[Any], Sample]:
    return lambda key: spelled(key, *args, reads=into, flat=True, **facts)


def view(key: Any) -> Sample:
    if key in ("view_as", "reshape_as"):
        return Sample(lambda m, x: getattr(x, key)(x.relu().flatten(1)), reads=128, flat=True)
    return flat((2, WIDTH * SIDE * SIDE))(key)


def transpose(key: Any) -> Sample:
    if isinstance(key, Aten):
        return aten(key.name, "default", dims=0, then=lambda x: x.t())
    if key in ("adjoint", torch.adjoint):
        return spelled(key, dims=0, then=lambda x: x.t())
    if key in ("t", torch.t):
        return spelled(key, dims=0, then=lambda x: x.t())
    return spelled(key, 1, 3, reads=WIDTH, flat=True)


def extreme(key: Any) -> Sample:
    return spelled(key, 2, True, then=lambda pair: pair[0] * pair.values + pair[1])


def joined(key: Any) -> Sample:
    return Sample(lambda m, x: call(key)([x, x.relu()], 1), reads=2 * WIDTH)


def alongside(key: Any, *args: Any) -> Sample:
    """An op on two activations over a spatial axis."""
    op = key(*args) if inspect.isclass(key) else key
    given = () if inspect.isclass(key) else args

    def compare(m: Any, x: Any) -> Any:
        other = m.second(m.input)
        return m.part(x, other) if inspect.isclass(key) else call(key)(x, other, *given)

    return Sample(compare, consumer_dims=1, parts={"second": None, **({"part": op} if inspect.isclass(key) else {})})


def bilinear(key: Any) -> Sample:
    """Its inputs must stay; that its outputs may go is tested apart."""
    if inspect.isclass(key):
        part = {"part": key(8, 3, 6)}
        return Sample(lambda m, x: m.part(x, m.input), dims=0, reads=6, parts=part, merged=False, reason="bilinear")
    parts = {"w": raw(6, 8, 3)}
    op = lambda m, x: call(key)(x, m.input, m.w)  # noqa: E731
    return Sample(op, dims=0, reads=6, parts=parts, merged=False, reason="bilinear")


def grouped_mm(key: Any) -> Sample:
    """Takes widths that are multiples of 16 bytes; transformers has an op of its own for where torch's does not run."""
    if isinstance(key, Aten):
        pytest.importorskip("transformers.integrations.moe")
        key = torch.ops.transformers.grouped_mm_fallback.default
    parts = {"w": raw(2, 16, 16), "ends": torch.tensor([1, 2], dtype=torch.int32)}
    op = lambda m, x: call(key)(x.relu(), m.w, offs=m.ends)  # noqa: E731
    return Sample(op, dims=0, width=16, reads=16, double=False, parts=parts)


def stacked(key: Any) -> Sample:
    return Sample(lambda m, x: call(key)([x, x.relu()]), reads=2 * WIDTH)


def constant(key: Any) -> Sample:
    """A constant of a literal size, which must become as narrow as what it is added to."""
    size = (2, WIDTH, SIDE, SIDE)
    given = {torch.full: (size, 0.5), torch.randint: (5, size)}.get(key, (size,))

    def op(m: Any, x: Any) -> Any:
        made = key(*given) if not isinstance(x, fx.Proxy) else x.tracer.create_proxy("call_function", key, given, {})
        if key is torch.empty:
            made = made.fill_(0.5)
        return x + made * (0.0 if key in (torch.rand, torch.randn, torch.randint) else 1.0)

    return Sample(op)


def halves(*args: Any) -> Callable[[Any], Sample]:
    return lambda key: spelled(key, *args, reads=WIDTH // 2, then=lambda pieces: pieces[0] + pieces[1])


def split(key: Any) -> Sample:
    whole = key in ("tensor_split", torch.tensor_split)
    return halves(2, 1)(key) if whole else halves([WIDTH // 2, WIDTH // 2], 1)(key)


def expand(key: Any) -> Sample:
    def mean(x: Any) -> Any:
        return x.mean((2, 3), keepdim=True)

    if key == "expand_as":
        return Sample(lambda m, x: mean(x).expand_as(x))
    shape = (2, WIDTH, SIDE, SIDE)
    return Sample(lambda m, x: getattr(mean(x), key)(shape) if isinstance(key, str) else call(key)(mean(x), shape))


def repeat(key: Any) -> Sample:
    interleaved = key in ("repeat_interleave", torch.repeat_interleave)
    return spelled(key, *((2, 1) if interleaved else ((1, 2, 1, 1),)), reads=2 * WIDTH)


def where(key: Any) -> Sample:
    if isinstance(key, str):
        return Sample(lambda m, x: getattr(x, key)(x > 0, m.second(m.input)), parts={"second": None})
    return Sample(lambda m, x: call(key)(x > 0, x, m.second(m.input)), parts={"second": None})


def compare(key: Any) -> Sample:
    value = 0.5 if (key if isinstance(key, str) else key.__name__) in ("eq", "ne") else 0.0

    def op(m: Any, x: Any) -> Any:
        y = x.clamp(-0.5, 0.5)
        return x * (getattr(y, key)(value) if isinstance(key, str) else call(key)(y, value))

    return Sample(op)


def addcmul(key: Any) -> Sample:
    if isinstance(key, str):
        return Sample(lambda m, x: getattr(x, key)(m.second(m.input), x.relu(), value=0.5), parts={"second": None})
    return Sample(lambda m, x: call(key)(x, m.second(m.input), x.relu(), value=0.5), parts={"second": None})


def masked_fill(key: Any) -> Sample:
    if isinstance(key, str):
        return Sample(lambda m, x: getattr(x, key)(x > 0.3, 0.1))
    return Sample(lambda m, x: call(key)(x, x > 0.3, 0.1))


def like(key: Any) -> Sample:
    return Sample(lambda m, x: x + (getattr(x, key)() if isinstance(key, str) else call(key)(x)))


def stochastic_depth(key: Any) -> Sample:
    function = pytest.importorskip("torchvision").ops.stochastic_depth
    return Sample(lambda m, x: call(function)(x, 0.5, "row", False))


def norm(key: Any) -> Sample:
    if isinstance(key, Aten):
        return aten(key.name, "default", 2, [3], consumer_dims=1)
    return spelled(key, 2, 3, consumer_dims=1)


def pad(key: Any) -> Sample:
    return spelled(key, (1, 2, 0, 1))


def new(key: Any) -> Sample:
    """A constant of the activation's dtype."""
    if not isinstance(key, str):
        return constant(key)
    made = {
        "new_zeros": lambda x: x.new_zeros(1),
        "new_ones": lambda x: x.new_ones(1),
        "new_full": lambda x: x.new_full((1,), 0.5),
        "new_empty": lambda x: x.new_empty(1).fill_(0.5),
        "new_tensor": lambda x: x.new_tensor(0.5),
    }[key]
    return Sample(lambda m, x: x + made(x))


def interpolate(key: Any) -> Sample:
    if not isinstance(key, Aten):
        return spelled(key, None, 2)
    return aten(key.name, "vec", None, *([] if "nearest" in key.name else [False]), [2.0, 2.0])


def index(key: Any) -> Sample:
    """Entries of a spatial axis, selected by a list of indices."""
    parts = {"ids": torch.tensor([0, 2, 3])}
    if isinstance(key, Aten):
        return Sample(lambda m, x: call(torch.ops.aten.index.Tensor)(x, [None, None, None, m.ids]), parts=parts)
    if isinstance(key, str):
        return Sample(lambda m, x: getattr(x, key)(3, m.ids), parts=parts)
    return Sample(lambda m, x: call(key)(x, 3, m.ids), parts=parts)


def unfold(key: Any) -> Sample:
    if isinstance(key, Aten):
        return aten(key.name, "default", [2, 2], [1, 1], [0, 0], [1, 1], reads=4 * WIDTH, consumer_dims=1)
    if key == "unfold":
        return spelled(key, 3, 2, 2, then=lambda x: x.mean(-1))
    return spelled(key, 2, reads=4 * WIDTH, consumer_dims=1)


def fold(key: Any) -> Sample:
    def patches(x: Any) -> Any:
        return x.flatten(2)  # 2 channels of 2 x 2 places, 16 patches

    if isinstance(key, Aten):
        return aten(key.name, "default", [8, 8], [2, 2], [1, 1], [0, 0], [2, 2], before=patches, reads=WIDTH // 4)
    return spelled(key, (8, 8), 2, 1, 0, 2, before=patches, reads=WIDTH // 4)


SIMPLE = """relu leaky_relu rrelu relu6 gelu silu mish elu celu selu logsigmoid hardsigmoid hardswish softplus softsign
softshrink hardshrink tanhshrink"""  # called with x alone

SAMPLES: dict[str, Callable[[Any], Sample]] = {
    **dict.fromkeys(SIMPLE.split(), spelled),
    **op_samples.SAMPLES,
    **RECURRENT,
    **dict.fromkeys(["add", "sub", "rsub", "mul", "div", "maximum", "minimum"], two),
    **dict.fromkeys(["mean", "sum", "amax", "amin", "var", "std", "logsumexp"], flat((2, 3), into=WIDTH)),
    **dict.fromkeys(["zeros_like", "ones_like"], like),
    **dict.fromkeys(["max", "min", "median"], extreme),
    "linear": linear,
    "conv": conv,
    "conv_transpose": conv,
    "embedding": embedding,
    "embedding_bag": embedding_bag,
    "matmul": matmul,
    "outer": lambda key: Sample(
        lambda m, x: x * call(key)(m.angles, x.new_ones(x.shape[0])).t().cos(),
        dims=0,
        parts={"angles": torch.arange(8.0)},
    ),
    "addmm": addmm,
    "baddbmm": baddbmm,
    "addcmul": addcmul,
    "enter": enter,
    "sampled": sampled,
    "einsum": lambda key: Sample(lambda m, x: call(key)("bct,bts->bcs", x, scores(m)), dims=1),
    "attention": attention,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "norm": norm,
    "normalize": lambda key: spelled(key, 2.0, 3),
    "layer_norm": mixer(WIDTH, function=(WIDTH,), dims=0),
    "rms_norm": mixer(WIDTH, function=(WIDTH,), dims=0, affine=("gamma",)),
    "group_norm": mixer(2, WIDTH, function=2),
    "where": where,
    "compare": compare,
    "masked_fill": masked_fill,
    "glu": lambda key: spelled(key, 1, reads=WIDTH // 2),
    "fold": fold,
    "stochastic_depth": stochastic_depth,
    "prelu": prelu,
    "identity": identity,
    "type_as": type_as,
    "dropout": dropout,
    "hardtanh": lambda key: spelled(key, -0.5, 0.5),
    "threshold": lambda key: spelled(key, 0.1, 0.0),
    "avg_pool": by_dims(2),
    "max_pool": by_dims(2),
    "lp_pool": by_dims(2, 2),
    "adaptive_pool": by_dims(2),
    "interpolate": interpolate,
    "softmax": lambda key: spelled(key, 2),
    "softmax2d": lambda key: spelled(key, exact=False),
    "view": view,
    "flatten": flat(1, module=()),
    "unflatten": lambda key: spelled(key, 1, (2, -1), then=lambda x: x.flatten(1, 2)),
    "squeeze": lambda key: spelled(key, 3, before=lambda x: x.amax(3, keepdim=True), consumer_dims=1),
    "unsqueeze": lambda key: spelled(key, 4, then=lambda x: x.mean(4)),
    "permute": flat((0, 2, 3, 1), into=WIDTH),
    "transpose": transpose,
    "movedim": flat(1, -1, into=WIDTH),
    "cat": joined,
    "cosine_similarity": lambda key: alongside(key, 3),
    "pairwise_distance": alongside,
    "tensordot": lambda key: Sample(
        lambda m, x: call(key)(x, m.mapping, ([3], [0])), parts={"mapping": torch.randn(4, 5)}
    ),
    "bilinear": bilinear,
    "grouped_mm": grouped_mm,
    "hstack": stacked,
    "column_stack": stacked,
    "vstack": lambda key: Sample(lambda m, x: call(key)([x, x.relu()])[1:3]),
    "dstack": lambda key: Sample(lambda m, x: call(key)([x, x.relu()])),
    "random": constant,
    "stack": lambda key: Sample(lambda m, x: call(key)([x, x.relu()], 1).flatten(1, 2), reads=2 * WIDTH),
    "chunk": halves(2, 1),
    "split": split,
    "unbind": lambda key: spelled(key, 3, then=lambda pieces: pieces[1], consumer_dims=1),
    "getitem": lambda key: spelled(key, (slice(None), slice(2, 6)), reads=4),
    "slice": lambda key: aten(key.name, "Tensor", 1, 2, 6, reads=4),
    "index": index,
    "index_select": index,
    "unfold": unfold,
    "narrow": lambda key: spelled(key, 1, 2, 4, reads=4),
    "select": lambda key: spelled(key, 3, 1, consumer_dims=1),
    "expand": expand,
    "expand_as": expand,
    "pad": pad,
    "new": new,
    "repeat": repeat,
    "roll": lambda key: spelled(key, 1, 3),
    "flip": lambda key: spelled(key, (1,)),
    "pixel_shuffle": lambda key: spelled(key, 2, width=16, reads=4),
    "pixel_unshuffle": lambda key: spelled(key, 2, reads=4 * WIDTH),
    "channel_shuffle": lambda key: spelled(key, 2),
    "query": query,
}
