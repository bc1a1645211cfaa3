"""Models with control flow are recorded, merged part by part, and returned in the user's own class."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import verify
from fxmerge.graph import compare

torch.manual_seed(0)
X = torch.randn(2, 3, 8, 8)


def body(inside: int = 16, outside: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, inside, 3, padding=1), nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, outside, 1)
    )


class Base(nn.Module):
    """A stem, two bodies and a head, which subclasses connect in different ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = body(), body()
        self.head = nn.Linear(8, 5)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.running_mean)
                nn.init.uniform_(m.running_var, 0.5, 2)
        self.eval()

    def top(self, h: Tensor) -> Tensor:
        return self.head(h.mean((2, 3)))


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.one(h) if x.sum() > 0 else self.one(h) + self.two(h)
        return self.top(h)


class Check(nn.Module):
    """Reads the value of its input in its own code."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError("too bright")
        return x


class Levels(Base):
    """Its own code reads no values, so that channels are followed through lists, pooling and in-place writes."""

    def __init__(self) -> None:
        super().__init__()
        self.check = Check()

    def forward(self, images: list[Tensor]) -> dict[str, Any]:
        maps = [self.stem(self.check(i)) for i in images]
        maps = [self.two(self.one(m)) for m in maps]
        pooled = torch.zeros(2, *maps[0].shape[:2], dtype=maps[0].dtype)
        for at in range(len(maps)):
            pooled[at] = maps[at].mean((2, 3))
        return {"scores": self.head(pooled.sum(0)), "count": len(maps)}


class Loop(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for _ in range(1 + int(x.abs().sum()) % 3):
            h = self.one(h)
        return self.top(h)


class Numpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.stem(x))
        h = torch.from_numpy(np.flip(h.detach().numpy(), 1).copy())
        return self.top(self.two(h))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.flip(1).clone()


class Custom(Levels):
    """An autograd function, whose forward is recorded like any other code."""

    def forward(self, images: list[Tensor]) -> Tensor:
        h = Reverse.apply(self.one(self.stem(self.check(images[0]))))
        return self.top(self.two(h))


class Open(nn.Module):
    """Takes keyword arguments that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, h: Tensor, **kwargs: Any) -> Tensor:
        return self.outer(self.inner(h).relu())


class Unvisited(Levels):
    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.stem(self.check(x)))
        return self.top(self.two(h) if self.training else h)


class Weights(Levels):
    """Glue that uses a parameter directly."""

    def forward(self, images: list[Tensor]) -> Tensor:
        total: Any = 0
        for x in images:
            total = total + self.one(F.conv2d(self.check(x), self.stem.weight, self.stem.bias, padding=1))
        return self.top(self.two(total))


IMAGES = [X, X.flip(0)]


def merged(model: nn.Module, inputs: Any, **changes: Any) -> fxmerge.Result:
    return fxmerge.merge(model, inputs, **{"ratio": 0.5, "decomposition": "prune", "refit": "none", **changes})


def kill_half(model: Base) -> None:
    """Makes every second channel inside both bodies zero for any input."""
    with torch.no_grad():
        for part in (model.one, model.two):
            part[0].weight[::2] = 0
            for t in (part[0].bias, part[1].weight, part[1].bias):
                t[::2] = 0


CASES: dict[str, tuple[type[Base], Any, set[str]]] = {
    "branch": (Branch, X, {"one.0", "two.0"}),
    "levels": (Levels, (IMAGES,), {"stem", "one.0", "one.3", "two.0", "two.3"}),
    "unvisited": (Unvisited, X, {"one.0"}),
    "loop": (Loop, X, {"one.0"}),
    "numpy": (Numpy, X, {"one.0"}),
    "custom function": (Custom, (IMAGES[:1],), {"stem", "one.0", "one.3", "two.0", "two.3"}),
    "functional": (Weights, (IMAGES,), {"stem", "one.0", "one.3", "two.0", "two.3"}),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_and_permutation(name: str) -> None:
    cls, inputs, expected = CASES[name]
    analysis = fxmerge.analyze(cls(), inputs)
    if name == "branch":
        expected = expected - ({"two.0"} if X.sum() > 0 else set())
    assert {g.name for g in analysis.groups} == expected
    errors = verify.permutation(analysis.captured, analysis.facts, analysis.grouping)
    assert errors and max(errors.values()) < 1e-10


@pytest.mark.parametrize("name", [n for n in CASES if n != "unvisited"])
def test_dead_channels_go_and_the_class_stays(name: str) -> None:
    cls, inputs, expected = CASES[name]
    model = cls()
    kill_half(model)
    keep = {n: 1.0 for n in ("stem", "one.3", "two.3") if n in expected}
    result = merged(model, inputs, keep=keep)
    if result.analysis.captured.route == "recorded":
        assert type(result.module) is cls
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    for scale in (1.0, -1.0, 0.3, 1.7):  # other values take other branches, and run loops more often
        other = torch.utils._pytree.tree_map(lambda t: t * scale, args)  # noqa: B023
        before, after = compare.outputs(model, other), compare.outputs(result.module, other)
        assert compare.difference(before, after) < 1e-5
    parameters = sum(p.numel() for p in result.module.parameters())
    assert parameters < 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_the_routes() -> None:
    routes = {n: fxmerge.analyze(c(), i).captured.route for n, (c, i, _) in CASES.items()}
    assert set(routes.values()) == {"recorded"}, routes


def test_the_callers_model_is_left_alone() -> None:
    model = Branch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = {m: set(vars(m)) for m in model.modules()}
    merged(model, X)
    assert {m: set(vars(m)) for m in model.modules()} == names
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_refusals_say_who_looked() -> None:
    reasons = " ".join(r.reason for r in fxmerge.analyze(Branch(), X).refusals)
    assert "reads the value of a tensor" in reasons
    assert "did not run its submodule two" in " ".join(r.reason for r in fxmerge.analyze(Unvisited(), X).refusals)


def test_the_report_says_what_refit_ran_on() -> None:
    report = fxmerge.merge(Branch(), X, samples=24).report
    assert report.refitted and "by the model's own code" in report.text(400)
    notes = json.loads(report.json())["notes"]
    assert any("of 24 samples, on which the model takes another path" in note for note in notes)
    assert not fxmerge.merge(Branch(), X, refit="none").report.refitted


def test_what_other_code_asks_a_part_for_is_kept() -> None:
    class Asking(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.one.width = 8

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.one.width

    result = merged(Asking(), X)
    assert result.module(X).shape == (2, 5) and isinstance(result.module.one, torch.fx.GraphModule)


def test_plan_report_and_gradients() -> None:
    model = Branch()
    result = merged(model, X)
    again = fxmerge.apply(result.plan, model, X)
    assert torch.equal(again.module(X), result.module(X))
    assert "one.0" in result.report.text() and result.report.after.flops < result.report.before.flops
    result.module(X).sum().backward()
    assert all(p.grad is not None for p in result.module.one.parameters())


def test_arguments_that_a_part_does_not_use_stay() -> None:
    model = Branch()
    model.head = Open()
    result = merged(model, X)
    assert result.module.head.inner.out_features == 6 and "kwargs" in str(inspect.signature(result.module.head.forward))
    assert result.module(X).shape == model(X).shape == (2, 5)


def test_a_module_that_does_not_run_stays_tied() -> None:
    """As T5's `shared`, whose weight its encoder and decoder read through modules of their own."""

    class Shared(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.spare, self.alone = nn.Conv2d(8, 16, 3), nn.Linear(8, 8)
            self.spare.weight = self.one[0].weight

    model = Shared()
    whole, half = merged(model, X, ratio=0.0).module, merged(model, X).module
    assert dict(whole.one.named_parameters())["0.weight"] is whole.spare.weight is not model.spare.weight
    assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in model.parameters())
    assert half(X).shape == model(X).shape and half.spare.weight.shape == (16, 8, 3, 3)


def test_two_names_stay_one_module() -> None:
    class Twice(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.one

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.top(self.alias(self.one(h)) if x.sum() > -1e9 else h)

    result = merged(Twice(), X)
    assert result.module.alias is result.module.one and result.report.after.parameters < result.report.before.parameters


def test_a_script_is_refused() -> None:
    class Scripted(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.jit.trace(self.one, torch.randn(1, 8, 8, 8))

    with pytest.raises(fxmerge.FxMergeError, match="one is a ScriptModule"):
        merged(Scripted(), X)
