"""Weights that serve several calls, as in siamese towers and the heads of a pyramid: solved on the rows of all calls.

The rows of a call are gathered when the paired run reaches it, and the weight is solved at its last call. What the
merged graph computed from the earlier calls is then out of date, so that the run starts again, with all weights that
have been solved so far. Calls that read what another call of the same weight gave have no such order, and stay as they
are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxmerge.ir.provenance import Layer
from fxmerge.refit.sites import Site
from fxmerge.refit.solve import Rows

SERVES = "unchanged: one weight serves several calls"
DEPENDENT = f"{SERVES}, one of which reads what another gave"
UNLIKE = f"{SERVES} of different kinds"
COSTLY = f"{SERVES}, and to solve it takes too long"


@dataclass(frozen=True)
class Shared:
    """A weight and the nodes that call it, in execution order; why it cannot be solved, or "".

    after: the nodes that depend on any of its calls
    """

    path: str
    calls: tuple[str, ...]
    after: frozenset[str]
    reason: str = ""


@dataclass
class Gathered:
    """What has been gathered of a shared weight in one run: for each call its site, rows and output moments."""

    shared: Shared
    sites: list[Site] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def whole(self) -> Rows:
        """The rows of all calls."""
        return Rows(
            [p for r in self.rows for p in r.patches],
            [t for r in self.rows for t in r.targets],
            [f for r in self.rows for f in r.folds],
        )

    @property
    def output_moments(self) -> tuple[Tensor, Tensor] | None:
        """The mean and the variance of the outputs over all calls, (o,), (o,); None where a call has no BatchNorm."""
        if any(site.epilogue.norm is None for site in self.sites):
            return None
        means, variances = (torch.stack(values) for values in zip(*self.moments, strict=True))
        share = torch.tensor([float(sum(y.numel() for y in site.visit.outputs)) for site in self.sites]).to(means)
        share = (share / share.sum())[:, None]
        mean = (share * means).sum(0)
        return mean, (share * (variances + (means - mean).square())).sum(0)


def shared_weights(layers: Sequence[Layer], graph: fx.Graph) -> dict[str, Shared]:
    """The weights that several of these layers use, by path."""
    nodes = {node.name: node for node in graph.nodes}
    order = {name: number for number, name in enumerate(nodes)}
    users: dict[str, list[Layer]] = {}
    for layer in layers:
        if "weight" in layer.params and layer.node in nodes:
            users.setdefault(layer.params["weight"], []).append(layer)
    found = {}
    for path, using in users.items():
        if len(using) > 1:
            calls = tuple(sorted((layer.node for layer in using), key=order.__getitem__))
            after = _after([nodes[call] for call in calls])
            reason = "" if _alike(using, nodes) else UNLIKE
            found[path] = Shared(path, calls, after, reason or (DEPENDENT if after & {*calls} else ""))
    return found


def _after(starts: Sequence[fx.Node]) -> frozenset[str]:
    """The nodes that depend on any of these."""
    found: set[fx.Node] = set()
    ahead = [user for node in starts for user in node.users]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += node.users
    return frozenset(node.name for node in found)


def _alike(using: Sequence[Layer], nodes: Mapping[str, fx.Node]) -> bool:
    """Whether all calls are of one module, or of functions that take all the same parameters, each once."""
    first, node = using[0], nodes[using[0].node]
    if len({layer.node for layer in using}) < len(using):
        return False
    return all(
        layer.operation == first.operation
        and layer.groups == first.groups
        and dict(layer.params) == dict(first.params)
        and nodes[layer.node].op == node.op
        and (node.op != "call_module" or nodes[layer.node].target == node.target)
        for layer in using
    )
