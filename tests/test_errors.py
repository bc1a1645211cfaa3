"""Bad input: every mistake is an FxMergeError that says what was wrong, and no other exception gets out."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError, Options, Plan
from fxmerge.errors import first_line
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        out: Tensor = self.b(torch.relu(self.a(x)))
        return out


class Raising(Branching):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("a mistake of the user's own")


class Random(Branching):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(()).item()


class NoTensor(Branching):
    def forward(self, x: Tensor) -> str:
        return "text"


def mlp() -> nn.Module:
    return NETS["mlp"]()[0]


def spoiled(value: float) -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("b.weight")[0, 0] = value
    return model


class Bounded(Branching):
    """A mask, or a bound, as a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.maximum(torch.relu(self.a(x)), self.bound))
        return out


def bounded(value: float) -> nn.Module:
    model = Bounded()
    model.register_buffer("bound", torch.tensor(value))
    return model


def infinite_norm() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    norm.running_var[3] = float("inf")  # type: ignore[index]
    return norm


X, ROWS = torch.zeros(4, 12), torch.ones(3, 4)
residual, image = NETS["residual"]()

Case = tuple[Callable[[], Any], str]
CASES: dict[str, Case] = {
    "a class": (lambda: plain_merge(Branching, ROWS), r"model is a type, not a torch.nn.Module; call it"),  # type: ignore[arg-type]
    "a function": (lambda: plain_merge(torch.relu, X), r"not a torch.nn.Module"),  # type: ignore[arg-type]
    "None": (lambda: plain_merge(None, X), r"model is a NoneType"),  # type: ignore[arg-type]
    "a state_dict": (lambda: plain_merge(mlp().state_dict(), X), r"model is a OrderedDict"),  # type: ignore[arg-type]
    "wrong width": (lambda: plain_merge(mlp(), torch.zeros(4, 11)), r"does not run on these.*\(4, 11\)"),
    "wrong axes": (lambda: plain_merge(residual, torch.zeros(3)), r"does not run on these.*\(3,\)"),
    "wrong dtype": (lambda: plain_merge(mlp(), X.long()), r"does not run on these example inputs"),
    "too many": (lambda: plain_merge(mlp(), (X, X)), r"does not run on these.*positional arguments"),
    "too few": (lambda: plain_merge(mlp(), ()), r"does not run on these.*missing"),
    "wrong name": (lambda: plain_merge(mlp(), {"y": X}), r"does not run on these.*'y'"),
    "a number": (lambda: plain_merge(mlp(), 5), r"example_inputs is a int; give a tensor, a tuple"),
    "a shape's text": (lambda: plain_merge(mlp(), "4,12"), r"example_inputs is a str"),
    "no inputs": (lambda: plain_merge(mlp(), None), r"example_inputs is a NoneType"),
    "a shape": (lambda: plain_merge(mlp(), (4, 12)), r"does not run on these example inputs"),
    "NaN": (lambda: plain_merge(spoiled(float("nan")), X), r"b.weight holds NaN or infinity"),
    "infinity": (lambda: fxmerge.analyze(spoiled(float("inf")), X), r"b.weight holds NaN or infinity"),
    "NaN in a buffer": (lambda: plain_merge(bounded(float("nan")), ROWS), r"bound holds NaN; a model"),
    "infinite statistics": (
        lambda: plain_merge(nn.Sequential(nn.Linear(4, 8), infinite_norm(), nn.Linear(8, 2)), ROWS),
        r"1.running_var holds NaN or infinity",
    ),
    "a model that raises": (lambda: plain_merge(Raising(), ROWS), r"does not run.*KeyError: .a mistake"),
    "a lazy module": (
        lambda: plain_merge(nn.Sequential(nn.LazyLinear(4), nn.ReLU()), ROWS),
        r"0.weight has no shape yet \(a lazy module\); run the model once",
    ),
    "a wrapper without forward": (
        lambda: plain_merge(nn.ModuleDict({"model": Branching()}), ROWS),
        r"ModuleDict has no forward of its own; give the part that computes, such as .model",
    ),
    "a list of models": (
        lambda: plain_merge(nn.ModuleList([mlp(), mlp()]), X),
        r"ModuleList has no forward of its own; give a model that can be called",
    ),
    "unknown option": (lambda: plain_merge(mlp(), X, ration=0.5), r"unknown option 'ration'; the options are ratio"),
    "options of a wrong type": (lambda: plain_merge(mlp(), X, {"ratio": 0.5}), r"options is a dict; give fxmerge.Op"),  # type: ignore[arg-type]
    "options as a number": (lambda: plain_merge(mlp(), X, 0.5), r"options is a float"),  # type: ignore[arg-type]
    "analyze's options": (lambda: fxmerge.analyze(mlp(), X, 0.5), r"options is a float"),  # type: ignore[arg-type]
    "ratio 1": (lambda: plain_merge(mlp(), X, ratio=1.0), r"ratio is 1.0; .*0 <= ratio < 1"),
    "ratio as text": (lambda: plain_merge(mlp(), X, ratio="half"), r"ratio is 'half'"),
    "keep nothing": (lambda: plain_merge(mlp(), X, keep={"a": 0}), r"keep\['a'\] is 0; give an integer number"),
    "keep a typo": (lambda: plain_merge(mlp(), X, keep={"aa": 3}), r"keep: 'aa' matches no group; the groups are a"),
    "keep too many": (lambda: plain_merge(mlp(), X, keep={"a": 17}), r"keep asks for 17 channels of a, which has 16"),
    "keep no rectangle": (
        lambda: plain_merge(*NETS["grouped"](), keep={"g": 7}),
        r"keep asks for 7 channels of g, which has 16,? in 4",
    ),
    "ignore a typo": (lambda: plain_merge(mlp(), X, ignore=("conv9",)), r"ignore: 'conv9' matches no module"),
    "ignore as text": (lambda: plain_merge(mlp(), X, ignore="a"), r"ignore is the string 'a'"),
    "unknown selection": (lambda: plain_merge(mlp(), X, selection="l3"), r"selection is 'l3'; choose one of l1, l2"),
    "no plan": (lambda: Plan.from_json("{}"), r"not a plan of version"),
    "no JSON": (lambda: Plan.from_json("ratio: 0.5"), r"it is not JSON"),
    "a plan for another model": (
        lambda: fxmerge.apply(plain_merge(mlp(), X).plan, residual, image),
        r"the plan's group .* of 1\d channels .* in this model",
    ),
    "a pass without inputs": (
        lambda: fxmerge.MergePass()(torch.fx.symbolic_trace(mlp())),
        r"input x has no shape in its metadata; give MergePass",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_bad_input(what: str) -> None:
    bad, message = CASES[what]
    with pytest.raises(FxMergeError, match=message) as caught:
        bad()
    assert type(caught.value) is FxMergeError
    assert "\n" not in str(caught.value)


def plan_json() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plain_merge(mlp(), X, ratio=0.5).plan.json())
    return found


def damage(path: str, value: Any) -> str:
    """The JSON text of a plan with one entry replaced, or removed where the value is `...`."""
    data = plan_json()
    *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    inner: Any = data
    for part in way:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(data)


DAMAGE: list[tuple[str, Any]] = [
    ("fxmerge_plan", 99), ("fxmerge_plan", ...), ("options", ...), ("options", 5), ("options.ratio", 2),
    ("options.ratio", None), ("options.new", 1), ("options.keep", 3), ("groups", ...), ("groups", 7), ("groups", None),
    ("groups.0", 5), ("groups.0", None), ("groups.0", []), ("groups.0.name", ...), ("groups.0.channels", ...),
    ("groups.0.channels", "many"), ("groups.0.channels", None), ("groups.0.kept", []), ("groups.0.kept", [3, 3]),
    ("groups.0.kept", [-1]), ("groups.0.kept", [16]), ("groups.0.kept", "all"), ("groups.0.kept", 4),
    ("groups.0.kept", [[1]]), ("groups.0.kept", [None]), ("groups.0.kept", ["x"]), ("groups.0.partners", 1),
    ("groups.0.partners", [1]), ("groups.0.partners.0", {}), ("groups.0.partners.0.new", 1),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), DAMAGE, ids=[f"{path}={value}" for path, value in DAMAGE])
def test_a_damaged_plan(path: str, value: Any) -> None:
    with pytest.raises(FxMergeError):
        Plan.from_json(damage(path, value))


def test_a_good_plan_passes_the_same_way() -> None:
    assert Plan.from_json(damage("options.seed", 4)).options == Options(seed=4, refit="none")


def test_a_plan_that_breaks_blocks_is_refused() -> None:
    """Kept channels that are no rectangle, in a hand-edited plan."""
    model, x = NETS["grouped"]()
    plan = plain_merge(model, x, ratio=0.5).plan
    data = json.loads(plan.json())
    next(g for g in data["groups"] if g["name"] == "g")["kept"] = [0, 1, 2, 3, 4, 5, 6, 8]
    with pytest.raises(FxMergeError):
        fxmerge.apply(Plan.from_json(json.dumps(data)), model, x)


def test_a_model_with_randomness_says_so() -> None:
    with pytest.raises(FxMergeError):
        plain_merge(Random(), ROWS)


def test_a_model_without_a_tensor_for_output() -> None:
    result = plain_merge(NoTensor(), ROWS)
    assert math.isnan(result.report.verdict.error)
    assert result.report.verdict.reason == "the model returns no tensors of numbers"
    assert "not measurable" in result.report.text()


@pytest.mark.parametrize(
    "model",
    [nn.Identity(), nn.ReLU(), nn.Linear(12, 3), nn.Sequential(), nn.Flatten()],
    ids=lambda m: type(m).__name__,
)
def test_nothing_to_merge_is_no_error(model: nn.Module) -> None:
    result = plain_merge(model.eval(), torch.randn(X.shape))
    assert result.plan.groups == ()
    assert result.report.verdict.error == 0
    assert result.report.text()
    assert json.loads(result.report.json())["groups"] == []


def test_an_empty_batch() -> None:
    """There is nothing to measure on: either it is refused, or the channels are found all the same."""
    with contextlib.suppress(FxMergeError):
        result = plain_merge(mlp(), torch.zeros(0, 12))
        assert [p.name for p in result.plan.groups] == ["a", "b"]


def test_an_infinite_buffer_is_no_mistake() -> None:
    """Masks and bounds are: a model with one is merged."""
    model = bounded(-float("inf"))
    result = plain_merge(model, ROWS, ratio=0.5)
    assert [len(g.kept) for g in result.plan.groups] == [4]
    assert bool(torch.isfinite(result.module(ROWS)).all())


def test_the_first_line_of_a_message_has_no_colours() -> None:
    assert first_line(ValueError("\x1b[96mstep 2/3\x1b[0m failed\nmore")) == "step 2/3 failed"
    assert first_line(KeyError()) == "KeyError"
