"""What a rule records, and what is left of it when the rule gives up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.ir import Lab, Param
from fxmerge.rules import AsKind, Operand, RuleContext, Unknown
from tests.helpers.netmaking import Net, one_thread, randomised, raw  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def analysed() -> fxmerge.Analysis:
    def wiring(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.c(torch.hypot(m.a(x), m.b(x)) * m.p)
        return out

    parts = {name: nn.Linear(3, 8) for name in "ab"}
    model = randomised(Net(wiring, **parts, p=raw(8), c=nn.Linear(8, 2))).eval()
    return fxmerge.analyze(model, torch.randn(4, 3), heads="both")


def records_all(ctx: RuleContext, input: Operand, other: Operand) -> Lab:
    """A rule that records a fact of every sort."""
    assert isinstance(input, Lab) and isinstance(other, Lab)
    labels = ctx.along(input, 1)
    param = Param("p", torch.zeros(8))
    ctx.tie(input.t, other.t)
    ctx.pin(labels[:1], "is pinned")
    ctx.block(labels.view(2, 4))
    ctx.bond(labels.view(2, 4))
    ctx.numbered([2], [labels.view(2, 4)])
    ctx.mix(labels)
    ctx.layer("mine", {"weight": param}, carries=ctx.elements(param))
    ctx.tie(labels, ctx.axis(param, 0))
    ctx.contraction(input.t, other.t, ("ab", "ab"), "ab")
    ctx.freeze(param, "is frozen")
    return input


def gives_up(ctx: RuleContext, input: Operand, other: Operand) -> Unknown:
    records_all(ctx, input, other)
    return Unknown("takes too much")


def fails(ctx: RuleContext, input: Operand, other: Operand) -> Lab:
    records_all(ctx, input, other)
    raise ValueError("too much")


def wraps(ctx: RuleContext, input: Operand, other: Operand) -> AsKind:
    records_all(ctx, input, other)
    return AsKind("mixer", Unknown("takes too much"))


def known_of(facts: Any) -> dict[str, Any]:
    sorts = ("ties", "blocks", "bonds", "mixers", "layers", "contractions", "params")
    counts = {name: len(getattr(facts, name)) for name in sorts}
    return {**counts, "axes": sum(len(p.axes) for p in facts.params.values()), "kind": facts.kinds["hypot"]}


@pytest.mark.parametrize("rule", [gives_up, fails, wraps])
def test_facts_of_a_rule_that_gives_up_are_taken_back(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of an op without a rule, and all that the call touches is pinned, with the reason."""
    monkeypatch.delitem(fxmerge.RULES, "hypot")
    without = analysed()
    monkeypatch.setitem(fxmerge.RULES, "hypot", fxmerge.Rule("hypot", "tie", records_all, (torch.hypot,)))
    recorded = known_of(analysed().facts)
    assert all(recorded[sort] > count for sort, count in known_of(without.facts).items() if sort != "kind")
    monkeypatch.setitem(fxmerge.RULES, "hypot", fxmerge.Rule("hypot", "tie", rule, (torch.hypot,)))
    found = analysed()
    assert known_of(found.facts) == known_of(without.facts)
    assert found.facts.kinds["hypot"] == "unknown"
    reason = "is called in a way that its rule does not know (too much)" if rule is fails else "takes too much"
    assert {r.name: r.reason for r in found.refusals if r.name in "ab"} == dict.fromkeys("ab", f"hypot {reason}")


def test_a_rule_may_say_that_a_call_is_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def tied(ctx: RuleContext, input: Operand, other: Operand) -> AsKind:
        assert isinstance(input, Lab) and isinstance(other, Lab)
        ctx.tie(input.t, other.t)
        return AsKind("tie", input)

    monkeypatch.setitem(fxmerge.RULES, "hypot", fxmerge.Rule("hypot", "per_channel", tied, (torch.hypot,)))
    found = analysed()
    assert found.facts.kinds["hypot"] == "tie"
    assert [(g.name, g.channels, g.ties) for g in found.grouping.groups] == [("a", 8, ("hypot",))]
    assert max(fxmerge.verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
