"""All oracles on one random net."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge import Options, Plan, verify
from fxmerge.graph import compare
from fxmerge.plan import GroupPlan
from tests.helpers.netmaking import plain_merge
from tests.helpers.outputs import leaves
from tests.helpers.random_nets import made

EXACT = 1e-10


def check(source: str) -> None:
    """Runs all oracles on one net; raises AssertionError where one is red."""
    model, inputs = made(source)
    same = plain_merge(model, inputs, ratio=0.0)
    if "MultiheadAttention" in source:  # expanded: the same sums in another order
        assert same.report.verdict.error < 1e-12
    else:
        assert same_bits(model, same.module, inputs), "ratio 0 is not the identity"
    found = same.analysis
    moved = verify.permutation(found.captured, found.facts, found.grouping)
    lined_up = [g.name for g in found.groups if g.partners]  # other channels can be dropped, but not permuted
    assert all(moved[name] < EXACT for name in lined_up), f"permutation: {moved}"
    shapes = [t.shape for t in compare.outputs(model, inputs)]
    for decomposition in ("prune", "mostsim"):
        result = plain_merge(model, inputs, ratio=0.5, decomposition=decomposition)
        after = compare.outputs(result.module, inputs)
        assert [t.shape for t in after] == shapes
        assert all(bool(torch.isfinite(t).all()) for t in after), "outputs are not finite"
        refused = {r.name for r in result.report.refusals}
        assert {p.name for p in result.plan.groups} | refused >= {g.name for g in found.groups if min_cell(g) > 1}
    silent = verify.silence(found.captured, found.facts, found.grouping, result.plan)
    assert all(error < EXACT for error in silent.errors.values()), f"silence: {silent}"
    if not any(g.mixers for g in found.groups):
        copied, args, kept = verify.duplicate(found.captured, found.facts, found.grouping)
        sizes = {g.name: g.channels for g in found.groups}
        plans = tuple(GroupPlan(name, sizes[name], tuple(index.tolist())) for name, index in kept.items())
        merged = fxmerge.apply(Plan(Options(threshold=0.0, refit="none"), plans), copied, args)
        assert merged.report.verdict.error < 1e-8, f"duplicates: {merged.report.verdict.error}"


def min_cell(group: fxmerge.Group) -> int:
    return int(torch.bincount(group.cells).min())


def same_bits(model: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    with torch.no_grad():
        one, two = (leaves(m(*(x.clone() for x in inputs))) for m in (model, other))
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
