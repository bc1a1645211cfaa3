"""What the reports say about one group, one refusal or one dropped branch, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fxmerge.graph.cost import Cost, call_cost, cost
from fxmerge.graph.nested import finite
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Refusal
from fxmerge.plan import GroupPlan
from fxmerge.report.refusals import parameters_held


def producer_cost(group: Group, cost: Cost) -> tuple[int, int | None]:
    """(parameters, FLOPs) of a group's producers; None for FLOPs that could not be counted."""
    return cost.of(m.layer.node for m in group.producers)


def members(group: Group) -> dict[str, list[str]]:
    """The names of a group's layers by their part in the group."""
    parts = {
        "producers": group.producers,
        "per_channel_params": group.per_channel_params,
        "consumers": group.consumers,
    }
    return {part: list(dict.fromkeys(m.layer.module for m in members)) for part, members in parts.items()}


def group_json(group: Group) -> dict[str, Any]:
    """The entry of a group in the JSON report, without its costs."""
    return {
        "name": group.name,
        "channels": group.channels,
        **members(group),
        "mixers": list(group.mixers),
        "ties": list(group.ties),
        "internal": group.internal,
        "scale_blocks": list(group.scale_blocks),
    }


def plan_json(plan: GroupPlan | None, group: Group) -> dict[str, Any]:
    """The entries of what was decided for a group; without a plan, it keeps all channels."""
    plan = plan or GroupPlan(group.name, group.channels, tuple(range(group.channels)))
    return {
        "kept": list(plan.kept),
        "similarity": finite(plan.similarity),
        "partners": list(plan.partners),
        **({} if plan.components is None else {"components": finite(plan.components)}),
    }


def cost_json(group: Group, cost: Cost, when: str = "") -> dict[str, int | None]:
    """The entries with the cost of a group's producers."""
    parameters, flops = producer_cost(group, cost)
    return {f"parameters{when}": parameters, f"flops{when}": flops}


def refusals_json(refusals: Sequence[Refusal], captured: Capture) -> list[dict[str, Any]]:
    """The entries of the channels that are not merged."""
    return [
        {
            "name": r.name,
            "channels": r.channels,
            "parameters": parameters_held(r, captured),
            "reason": r.reason,
            "where": r.where,
        }
        for r in refusals
    ]


def branches_json(captured: Capture) -> list[dict[str, Any]]:
    """The entries of the residual branches that were dropped, in the order in which they were."""
    return [
        {
            "name": b.name,
            "layers": list(b.branch.layers),
            "parameters": b.parameters,
            "flops": b.flops,
            "loss": finite(b.loss),
        }
        for b in (captured.cut.dropped if captured.cut else ())
    ]


def experts_json(captured: Capture) -> list[dict[str, Any]]:
    """The entries of the mixtures that lost whole experts."""
    return [
        {"name": one.name, "experts": one.experts, "kept": list(one.kept), "loss": finite(one.loss)}
        for one in (captured.cut.thinned if captured.cut else ())
    ]


def original_cost(captured: Capture) -> Cost:
    """Parameters and FLOPs of the model that was captured."""
    if captured.recorded is None:
        return cost(captured.whole.module, captured.inputs)
    host = captured.recorded.host
    return call_cost(host, captured.args, captured.kwargs, captured.module, captured.inputs)
