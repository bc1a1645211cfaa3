"""Layers with weights of other forms: stacked experts, grouped transposed convolutions, bilinear, computed filters.

And constants that are made as wide as the channels that they meet.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from fxmerge.graph import compare
from tests.helpers.netmaking import Net, one_thread, plain_merge, randomised, raw  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A selection that keeps the first channels, so that the copies are those that go."""
    monkeypatch.setitem(fxmerge.SELECTORS, "first", lambda channels, count: torch.arange(count))


def made(wiring: Any, *shape: int, **parts: Any) -> tuple[nn.Module, Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return randomised(Net(wiring, **copy.deepcopy(parts))).double().eval(), x


def by_bmm(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    return m.o(torch.bmm(F.relu(torch.bmm(h.expand(3, *h.shape), m.w1) + m.b1), m.w2).mean(0))


def by_einsum(m: Any, x: Any) -> Any:
    """The second weight is (experts, out, in)."""
    hidden = torch.einsum("bi,eih->beh", m.a(x).relu(), m.w1).relu()
    return m.o(torch.einsum("beh,eoh->beo", hidden, m.w2).mean(1))


def by_matmul(m: Any, x: Any) -> Any:
    return m.o((F.relu(m.a(x).relu() @ m.w1) @ m.w2).sum(0))


EXPERTS = [by_bmm, by_einsum, by_matmul]


def experts(wiring: Any) -> tuple[nn.Module, Tensor]:
    w2 = raw(3, 8, 12) if wiring is by_einsum else raw(3, 12, 8)
    return made(wiring, 16, 6, a=nn.Linear(6, 8), w1=raw(3, 8, 12), b1=raw(3, 1, 12), w2=w2, o=nn.Linear(8, 4))


@pytest.mark.parametrize("wiring", EXPERTS, ids=lambda w: w.__name__)
def test_experts(wiring: Any) -> None:
    """All experts lose the same channels; the stream and the hidden channels permute freely."""
    model, x = experts(wiring)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    found = result.analysis
    assert {p.name: (p.channels, len(p.kept)) for p in result.plan.groups} == {"a": (8, 4), "w1": (12, 6), "w2": (8, 4)}
    shapes = {n: tuple(p.shape) for n, p in result.module.named_parameters()}
    assert shapes["w1"] == (3, 4, 6)
    assert shapes["w2"] == ((3, 4, 6) if wiring is by_einsum else (3, 6, 4))
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    kept = {p.name: list(p.kept) for p in result.plan.groups}
    silenced = copy.deepcopy(model)
    with torch.no_grad():  # by hand: zero what the dropped channels feed
        for name, axis, fed in (("a", 1, "w1"), ("w1", 2 if wiring is by_einsum else 1, "w2"), ("w2", 1, "o.weight")):
            value = silenced.get_parameter(fed)
            gone = [i for i in range(value.size(axis)) if i not in kept[name]]
            value.index_fill_(axis, torch.tensor(gone), 0.0)
    other = torch.randn(5, 6, dtype=torch.float64)
    assert compare.difference(compare.outputs(silenced, (other,)), compare.outputs(result.module, (other,))) < 1e-10


@pytest.mark.parametrize("decomposition", ["mostsim", "lstsq", "fold"])
@pytest.mark.parametrize("wiring", EXPERTS, ids=lambda w: w.__name__)
def test_copies_among_experts_channels_are_merged_exactly(wiring: Any, decomposition: str) -> None:
    """Copies of hidden channels in every expert carry each other; a factor passes ReLU, and mostsim finds it."""
    model, x = experts(wiring)
    scale = 0.5 if decomposition == "mostsim" else 1.0
    with torch.no_grad():
        model.get_parameter("w1")[:, :, 6:] = scale * model.get_parameter("w1")[:, :, :6]
        model.get_parameter("b1")[:, :, 6:] = scale * model.get_parameter("b1")[:, :, :6]
    keep = {"a": 1.0, "w2": 1.0}
    result = plain_merge(model, x, ratio=0.5, decomposition=decomposition, selection="first", keep=keep)
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("w1", 6)]
    before, after = compare.outputs(model, (x,)), compare.outputs(result.module, (x,))
    assert compare.difference(before, after) < (1e-2 if decomposition == "lstsq" else 1e-9)


@pytest.mark.parametrize("wiring", EXPERTS, ids=lambda w: w.__name__)
def test_refit_around_experts(wiring: Any) -> None:
    model, x = experts(wiring)
    result = fxmerge.merge(model, x, ratio=0.25, calibration=[torch.randn(64, 6, dtype=torch.float64)])
    plain = plain_merge(model, x, ratio=0.25)
    assert float(result.report.verdict.error) < float(plain.report.verdict.error)


# the second layer of three as a product with a parameter, by what calls it and whether the weight is (out, in)
PRODUCTS: dict[str, tuple[Any, bool]] = {
    "einsum": (lambda y, w: torch.einsum("bni,io->bno", y, w), False),
    "einsum, transposed": (lambda y, w: torch.einsum("bni,oi->bno", y, w), True),
    "einsum, weight first": (lambda y, w: torch.einsum("oi,bni->bno", w, y), True),
    "einsum, dots": (lambda y, w: torch.einsum("...i,io", y, w), False),
    "einsum of a list": (lambda y, w: torch.einsum("b n i, o i -> b n o", [y, w]), True),
    "matmul by name": (lambda y, w: torch.matmul(input=y, other=w), False),
    "method by name": (lambda y, w: y.matmul(other=w), False),
    "mm by name": (lambda y, w: torch.mm(y.flatten(0, 1), mat2=w).unflatten(0, y.shape[:2]), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_weight_is_a_linear_layer(name: str, exported: bool) -> None:
    """The same plan and function as with nn.Linear, merged alone and refitted."""
    call, transposed = PRODUCTS[name]
    linear, x = made(lambda m, x: m.o(m.w(m.a(x).relu()).relu()), 4, 7, 6, a=nn.Linear(6, 8),
                     w=nn.Linear(8, 10, bias=False), o=nn.Linear(10, 3))  # fmt: skip
    model, _ = made(lambda m, x: m.o(call(m.a(x).relu(), m.w).relu()), 4, 7, 6, a=nn.Linear(6, 8),
                    w=raw(*((10, 8) if transposed else (8, 10))), o=nn.Linear(10, 3))  # fmt: skip
    weight = linear.get_parameter("w.weight").data
    model.load_state_dict({k.replace("w.weight", "w"): v for k, v in linear.state_dict().items()}
                          | {"w": weight if transposed else weight.T})  # fmt: skip
    batches = torch.randn(33, 4, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    given: Any = torch.export.export(model, (x,), strict=False).module() if exported else model
    *batches, unseen = batches
    right, lost = compare.outputs(linear, (unseen,)), {}
    for data in (None, batches):
        options = {"refit": "none"} if data is None else {"calibration": data}
        one, other = (fxmerge.merge(m, x, ratio=0.5, **options) for m in (linear, given))  # type: ignore[arg-type]
        after = compare.outputs(other.module, (unseen,))
        lost[data is None] = compare.difference(right, after)
        if data is None:
            assert [p.kept for p in one.plan.groups] == [p.kept for p in other.plan.groups]
            assert compare.difference(compare.outputs(one.module, (unseen,)), after) < 1e-9
    assert lost[False] < 0.8 * lost[True]


def up(dims: int, groups: int, functional: bool = False) -> tuple[nn.Module, Tensor]:
    conv, transposed = (nn.Conv1d, nn.ConvTranspose1d) if dims == 1 else (nn.Conv2d, nn.ConvTranspose2d)
    function = F.conv_transpose1d if dims == 1 else F.conv_transpose2d
    parts: dict[str, Any] = {"a": conv(3, 12, 1), "o": conv(16, 4, 1)}
    if functional:
        parts |= {"w": raw(12, 16 // groups, *[3] * dims), "bias": raw(16)}
        wiring: Any = lambda m, x: m.o(function(m.a(x).relu(), m.w, m.bias, 2, 1, 1, groups).relu())  # noqa: E731
    else:
        parts["up"] = transposed(12, 16, 3, 2, 1, 1, groups=groups)
        wiring = lambda m, x: m.o(m.up(m.a(x).relu()).relu())  # noqa: E731
    return made(wiring, 2, 3, *[6] * dims, **parts)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_grouped_transposed_convolutions(dims: int, functional: bool) -> None:
    model, x = up(dims, 4, functional)
    result = plain_merge(model, x, ratio=0.25, decomposition="prune")
    found = result.analysis
    name = "w" if functional else "up"
    assert {p.name: (p.channels, len(p.kept)) for p in result.plan.groups} == {"a": (12, 8), name: (16, 12)}
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    assert min(verify.overcoupling(found.captured, found.facts, found.grouping).values()) > 1e-6
    silenced, kept = copy.deepcopy(model), {p.name: p.kept for p in result.plan.groups}
    with torch.no_grad():
        for value in silenced.get_submodule("a").parameters():
            value[[i for i in range(12) if i not in kept["a"]]] = 0
        silenced.get_submodule("o").get_parameter("weight")[:, [i for i in range(16) if i not in kept[name]]] = 0
    other = torch.randn(3, 3, *[4] * dims, dtype=torch.float64)
    assert compare.difference(compare.outputs(silenced, (other,)), compare.outputs(result.module, (other,))) < 1e-10


@pytest.mark.parametrize("decomposition", ["mostsim", "lstsq", "fold"])
def test_grouped_transposed_convolutions_absorb(decomposition: str) -> None:
    """Copies of half of each group's channels, before and after the layer, are merged; refit takes the result."""
    model, x = up(2, 2)
    with torch.no_grad():
        for value in (*model.get_submodule("a").parameters(), model.get_submodule("up").get_parameter("bias")):
            each = len(value) // 2
            for start in (0, each):
                value[start + each // 2 : start + each] = value[start : start + each // 2]
        model.get_submodule("up").get_parameter("weight")[:, 4:] = model.get_submodule("up").get_parameter("weight")[
            :, :4
        ]
    options: dict[str, Any] = {"ratio": 0.5, "decomposition": decomposition, "selection": "first"}
    result = plain_merge(model, x, **options)
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("a", 6), ("up", 8)]
    error = compare.difference(compare.outputs(model, (x,)), compare.outputs(result.module, (x,)))
    assert error < (1e-2 if decomposition == "lstsq" else 1e-9)
    samples = [torch.randn(8, 3, 6, 6, dtype=torch.float64)]
    other, _ = up(2, 2)
    fitted = fxmerge.merge(other, x, calibration=samples, **options)
    assert float(fitted.report.verdict.error) < float(plain_merge(other, x, **options).report.verdict.error)


def test_outputs_of_a_bilinear_layer_are_merged() -> None:
    model, x = made(
        lambda m, x: m.o(m.bl(m.a(x).relu(), x).relu()), 8, 6, a=nn.Linear(6, 8), bl=nn.Bilinear(8, 6, 10),
        o=nn.Linear(10, 3),
    )  # fmt: skip
    with torch.no_grad():
        for value in model.get_submodule("bl").parameters():
            value[5:] = 0.5 * value[:5]
    result = plain_merge(model, x, ratio=0.5, decomposition="mostsim", selection="first")
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("bl", 5)]
    refused = {r.name: r.reason for r in result.report.refusals}
    assert refused["a"] == "is multiplied by another input in a bilinear layer"
    assert compare.difference(compare.outputs(model, (x,)), compare.outputs(result.module, (x,))) < 1e-9
    fitted = fxmerge.merge(model, x, ratio=0.5, calibration=[torch.randn(32, 6, dtype=torch.float64)])
    assert fitted.module.get_submodule("bl").get_parameter("weight").shape == (5, 8, 6)


KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]])[None, None] / 16


def repeated(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    return m.o(F.conv2d(h, m.kernel.repeat(h.shape[1], 1, 1, 1), padding=1, groups=h.shape[1]))


def expanded(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    return m.o(F.conv2d(h, (m.kernel * 2).expand(h.size(1), -1, -1, -1), None, 2, 1, 1, h.size(1)))


def upsampled(m: Any, x: Any) -> Any:
    h = m.a(x).relu()
    return m.o(F.conv_transpose2d(h, m.kernel.expand(h.size(1), 1, 3, 3), stride=2, groups=h.size(1)))


@pytest.mark.parametrize("wiring", [repeated, expanded, upsampled], ids=lambda w: w.__name__)
def test_a_filter_that_is_computed_for_each_channel(wiring: Any) -> None:
    """It is made as often as there are channels left. A factor passes it: the whole carries half a channel."""
    model, x = made(wiring, 2, 3, 8, 8, a=nn.Conv2d(3, 8, 1), o=nn.Conv2d(8, 4, 1), kernel=KERNEL)
    with torch.no_grad():
        model.get_buffer("kernel").copy_(KERNEL)
        for value in model.get_submodule("a").parameters():
            value[4:] = 0.5 * value[:4]
    result = plain_merge(model, x, ratio=0.5, selection="first")
    found = result.analysis
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("a", 4)]
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    other = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert compare.difference(compare.outputs(model, (other,)), compare.outputs(result.module, (other,))) < 1e-9


def states(m: Any, x: Any) -> Any:
    """A convolutional LSTM, whose states begin with zeros of a literal size."""
    hidden, cell = (torch.zeros(x.shape[0], 8, 4, 4, dtype=torch.float64) for _ in range(2))
    for _ in range(3):
        i, f, o, g = m.gates(torch.cat([x, hidden], 1)).chunk(4, 1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
    return m.o(hidden)


def gru(m: Any, x: Any) -> Any:
    state = x.new_zeros(x.shape[0], 8)
    for _ in range(2):
        state = torch.tanh(m.a(x) + m.u(state))
    return m.o(state)


def shifted(m: Any, x: Any) -> Any:
    h = m.a(x)
    return m.o((h + torch.full((8,), 0.3, dtype=x.dtype) + h.new_full(h.shape, 0.5)).relu())


def zeros(m: Any, x: Any) -> Any:
    return m.o((m.a(x) + torch.zeros(x.shape[0], 8, dtype=x.dtype)).relu())


LAYERS = {"a": nn.Linear(6, 8), "o": nn.Linear(8, 3)}
CONSTANTS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any], set[str]]] = {
    "states": (states, (2, 3, 4, 4), {"gates": nn.Conv2d(11, 32, 3, padding=1), "o": nn.Conv2d(8, 4, 1)}, {"gates"}),
    "gru": (gru, (4, 6), {**LAYERS, "u": nn.Linear(8, 8)}, {"a"}),
    "shifted": (shifted, (4, 6), LAYERS, {"a"}),
    "zeros": (zeros, (4, 6), LAYERS, {"a"}),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_follow(name: str) -> None:
    wiring, shape, parts, expected = CONSTANTS[name]
    model, x = made(wiring, *shape, **parts)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    found = result.analysis
    assert {p.name for p in result.plan.groups} == expected, [(r.name, r.reason) for r in found.refusals]
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    other = torch.randn(3, *shape[1:], dtype=torch.float64)  # another batch size
    assert result.module(other).shape == model(other).shape


def test_a_constant_other_than_zero_lets_no_factor_pass() -> None:
    assert fxmerge.analyze(*made(shifted, 4, 6, **LAYERS)).groups[0].scale_blocks
    assert fxmerge.analyze(*made(zeros, 4, 6, **LAYERS)).groups[0].scale_blocks == ()


NOT_EQUAL: dict[str, Any] = {
    "numbered": lambda m, x: m.o(m.a(x) + torch.ones(x.shape[0], 8, dtype=x.dtype).cumsum(1)),
    "computed from a width": lambda m, x: m.o(m.a(x) + torch.full((8,), m.a(x).shape[1] ** 0.5, dtype=x.dtype)),
}


@pytest.mark.parametrize("what", NOT_EQUAL)
def test_other_constants_hold_the_channels(what: str) -> None:
    """Where the entries differ, or a width is in them, which must not follow."""
    model, x = made(NOT_EQUAL[what], 4, 6, **LAYERS)
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    assert torch.equal(result.module(x), model(x))
