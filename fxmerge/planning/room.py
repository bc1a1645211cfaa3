"""The room for a budget: the groups that it is divided among, and what each width of them costs and loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxmerge.calibration.epilogue import SOLVED
from fxmerge.errors import FxMergeError
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping
from fxmerge.ir.provenance import Layer, Provenance, can_shift
from fxmerge.methods.allocation import Floats, Price
from fxmerge.options import NAMES, Options
from fxmerge.planning.counted import attentions_within, check_modules, flops_within, parameters_within, within
from fxmerge.planning.counts import rungs
from fxmerge.planning.price import cache_price, flops_price, parameters_price
from fxmerge.planning.roles import in_roles


@dataclass(frozen=True, kw_only=True)
class Room:
    """The groups that a budget is divided among, and what each width of them costs.

    ladders:  {group: its rungs, the numbers of channels that its cells may keep, (R, cells)}
    errors:   {group: the error at each rung, (R,)}
    refitted: whether layers will be re-solved, and may be given biases
    flops:    of the original, by node
    """

    captured: Capture
    facts: Provenance
    grouping: Grouping
    groups: Sequence[Group]
    ladders: Mapping[str, Floats]
    errors: Mapping[str, Floats]
    options: Options
    refitted: bool
    flops: Mapping[str, int]

    @classmethod
    def before_survey(
        cls, captured: Capture, facts: Provenance, grouping: Grouping, groups: Sequence[Group], options: Options,
        flops: Mapping[str, int],
    ) -> Room:  # fmt: skip
        """The room without errors. A group that saves nothing of what the budget counts keeps all its channels.

        Raises FxMergeError if the budget counts nothing.
        """
        check_modules(captured, options.of)
        ladders = {g.name: rungs(g, options) for g in groups}
        room = cls(
            captured=captured, facts=facts, grouping=grouping, groups=groups, ladders=ladders, errors={},
            options=options, refitted=False, flops=flops,
        )  # fmt: skip
        ((kind, _),) = options.budget.items()
        price = room.price("flops" if kind == "latency" else kind)
        if not price.original:
            where = f"the modules that match {', '.join(options.of)} have" if options.of else "the model has"
            why = f": {where} no attention whose keys and values vary with the inputs" if kind == "cache" else ""
            raise FxMergeError(f"budget asks for a share of the {NAMES[kind]}, but {where} none{why}")
        slope = price.gradient(price.full)[1]
        idle = {name for name, slot in price.slots.items() if not slope[slot].any()}
        ladders = {name: kept[:1] if name in idle else kept for name, kept in ladders.items()}
        return replace(room, ladders=ladders, errors={name: np.zeros(len(kept)) for name, kept in ladders.items()})

    @property
    def free(self) -> list[Group]:
        """The groups that may lose channels."""
        return [g for g in self.groups if len(self.ladders[g.name]) > 1]

    @property
    def roles(self) -> list[list[Group]]:
        """The groups that keep equally many channels together; each by itself, unless the options ask for it."""
        return in_roles(self.groups, self.ladders) if self.options.same_widths else [[g] for g in self.groups]

    def price(self, kind: str) -> Price:
        """What `kind` counts, in all modules or in those that the option `of` names."""
        parts, of = (self.facts, self.groups, self.grouping), self.options.of
        if kind == "flops":
            return flops_price(*parts, flops_within(self.captured, self.flops, of))
        if kind == "cache":
            return cache_price(self.groups, self.grouping, attentions_within(self.captured, self.facts, of))
        biases = [la for la in self.gaining() if not of or within(la.params["weight"].rpartition(".")[0], of)]
        return parameters_price(*parts, parameters_within(self.captured.module, of), biases)

    def gaining(self) -> list[Layer]:
        """The layers that refit will give a bias: layers without one that are downstream of a group that may narrow."""
        if not self.refitted:
            return []
        moved = {m.layer.node for g in self.free for m in (*g.producers, *g.per_channel_params)}
        starts = self.captured.cut.starts if self.captured.cut else frozenset()
        used = Counter(layer.params["weight"] for layer in self.facts.layers if "weight" in layer.params)
        layers, found = {layer.node: layer for layer in self.facts.layers if layer.op in SOLVED}, []
        for node in self.captured.module.graph.nodes:
            if node.name in starts or any(source.name in moved for source in node.all_input_nodes):
                moved.add(node.name)
                layer = layers.get(node.name)
                if layer and "bias" not in layer.params and can_shift(layer) and used[layer.params["weight"]] == 1:
                    found.append(layer)
        return found
