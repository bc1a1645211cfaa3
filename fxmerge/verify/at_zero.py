"""What becomes of a channel whose values are zero: whether it can be silenced without changing the other channels.

A channel that is zero where it is produced may be something else where it is read (after sigmoid, exp or cos), which
does not matter where a weight reads it, since the weight's column is silenced too. It matters where channels are summed
without a weight (queries times keys), and where a function of zero is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.graph.nested import leaves, tree
from fxmerge.graph.ops import in_place
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group, Grouping, group_of_label
from fxmerge.ir.labels import numbers
from fxmerge.ir.provenance import Lab, Layer, Provenance


class AtZero:
    """Follows silenced channels through the graph, one group at a time."""

    def __init__(self, captured: Capture, facts: Provenance, part: Grouping) -> None:
        self.captured, self.facts = captured, facts
        number = torch.from_numpy(group_of_label(part))
        self.present: dict[str, set[int]] = {}  # node -> the numbers of the groups whose channels it holds
        inside = [(name, value) for name, values in facts.values.items() for value in leaves(values)]
        for name, labels in [*facts.labels.items(), *((name, v.t) for name, v in inside if isinstance(v, Lab))]:
            self.present.setdefault(name, set()).update(number[numbers(labels)].tolist())
        self.numbers = {group.name: number for number, group in enumerate(part.groups)}
        self.layers: dict[str, list[Layer]] = {}
        for layer in facts.layers:
            self.layers.setdefault(layer.node, []).append(layer)

    def reason(self, group: Group) -> str:
        """Why a group cannot be silenced, or "" if it can."""
        number = self.numbers[group.name]
        if group.mixers:
            return f"{group.mixers[0]} couples its channels, so that the others change without one of them"
        zero: dict[str, bool] = {}  # node that holds the group's channels -> whether a silenced one is zero there
        written = {m.layer.node for m in group.producers}
        for node in self.captured.module.graph.nodes:
            sources = [n for n in self.facts.sources.get(node.name, ()) if number in self.present.get(n, ())]
            here = number in self.present.get(node.name, ())
            summed = sources and not here and self.facts.kinds.get(node.name) == "contraction"
            if summed and not any(zero.get(n, False) for n in sources):
                return f"its channels are not zero at {node.name}, which sums over them, even if they are silenced"
            if not here:
                continue
            value = None if node.name in written else self._value(node, zero)
            if value is not None and not bool(torch.isfinite(value).all()):
                return f"{node.name} is not finite where a channel is zero"
            silent = all(zero.get(n, False) for n in sources) if value is None else not bool(value.any())
            zero[node.name] = node.name in written or silent
            if in_place(node, node.target) and isinstance(node.args[0], fx.Node):
                zero[node.args[0].name] = zero[node.name]
        return ""

    def _value(self, node: fx.Node, zero: Mapping[str, bool]) -> Tensor | None:
        """What a node gives for silenced channels; None if it only moves what it is given."""
        kind = self.facts.kinds.get(node.name)
        if kind in ("movement", "query", "input", "output", "contraction", "producer"):
            return None
        for layer in self.layers.get(node.name, ()):
            if layer.carries is not None:
                divides = layer.op == "scale" and layer.operation.inverted == "activation"
                return torch.tensor(torch.inf if divides else 0.0)
        try:
            found = self._run(node, zero)
        except Exception:  # any op of the user's, on inputs that it was not written for
            return torch.ones(())
        return found if isinstance(found, Tensor) else torch.ones(())

    def _run(self, node: fx.Node, zero: Mapping[str, bool]) -> Any:
        """The node's op on zeros, with ones in place of what holds no silenced channel."""

        def operand(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            if leaf.name not in self.captured.shapes:
                return self.facts.values[leaf.name]
            dtype = self.captured.dtypes[leaf.name]
            return torch.full(self.captured.shapes[leaf.name], 0 if zero.get(leaf.name, False) else 1, dtype=dtype)

        args, kwargs = tree(operand, tuple(node.args)), tree(operand, dict(node.kwargs))
        with torch.no_grad():
            if node.op == "call_module":
                return self.captured.module.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)
