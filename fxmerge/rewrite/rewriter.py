"""Rewrite: the only stage that writes (refit aside), and it writes on a copy.

Two moves, in this order. *Absorb*, at full width: a consumer's columns W become W up at the kept places and its bias
gains W shift; a producer's rows become down rows where the decomposition mixes them. *Slice*: every parameter drops the
places whose labels have gone, by the one index map that provenance found; modules' own sizes and the graph's literal
sizes follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxmerge.ir.groups import Member, Merge
from fxmerge.ir.provenance import Layer, ParamLabels, Provenance, blocks_left
from fxmerge.methods.linalg import BITE
from fxmerge.rewrite.slicing import gather, places
from fxmerge.rules.resize import Call
from fxmerge.weights.by_path import fetch_bias
from fxmerge.weights.copy import sharing_copy
from fxmerge.weights.layout import columns, from_columns, resize

_WITHOUT_BIAS = ("matrix", "embedding")  # ops that take no bias, unless they are addmm: it is added behind them


class Rewriter:
    """A merged copy in the making: `absorb` each group, then `finish`. The module it is made from is left alone."""

    def __init__(self, module: fx.GraphModule, facts: Provenance) -> None:
        self.module, self.weights = sharing_copy(module)
        self.facts, self.held = facts, dict(facts.params)
        self.nodes: dict[str, fx.Node] = {n.name: n for n in self.module.graph.nodes}
        self.partners: dict[str, list[Partners]] = {}  # weight -> columns to add up when it is sliced

    def absorb(self, merge: Merge) -> None:
        """At full width: let the kept channels' producers and consumers take over what the others did."""
        with torch.no_grad():
            if merge.down is not None:
                self._absorb_producers(merge, merge.down)
            if merge.consumers:
                self._absorb_consumers(merge)

    def finish(self, alive: Tensor, edits: Mapping[str, Call]) -> fx.GraphModule:
        """Slice every parameter, put sizes right, and recompile: fresh code, the same names and metadata."""
        with torch.no_grad():
            for labels in self.held.values():
                if labels.path in self.partners:
                    self._slice_and_add(labels, alive)
                elif any(not bool(alive[t].all()) for t in places(labels)):
                    gather(self.weights, labels, lambda flat: alive[flat].nonzero().flatten())
            self.weights.own_all()
        for layer in self.facts.layers:
            self._resize(layer, blocks_left(layer, alive))
        self._edit(edits)
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def _absorb_consumers(self, merge: Merge) -> None:
        done: set[str] = set()
        for consumer, part in zip(merge.group.consumers, merge.consumers, strict=True):
            path = consumer.layer.params["weight"]
            if path in done:
                continue  # a module that is used twice absorbs once
            done.add(path)
            shift, (here, local) = part.shift[consumer.channels], consumer.local(merge.kept)
            up = part.up if len(consumer.channels) == merge.group.channels else part.up[consumer.channels][:, here]
            partners = _partners(consumer, up, local) if not bool(shift.any()) else None
            if partners is not None:
                self.partners.setdefault(path, []).append(partners)
                continue
            weight = self.weights.own(path)
            rows = columns(weight, consumer.layer).to(torch.float64, copy=True)
            own = rows[consumer.where]  # (m, copies, out/groups * kernel)
            if bool(shift.any()):
                gained = _gained(consumer, own, shift, weight)
                self._move_bias(consumer.layer, lambda bias: bias + gained)  # noqa: B023
            rows[consumer.where[local]] = torch.einsum("mk,mcx->kcx", up.to(rows), own)
            weight.copy_(from_columns(rows, weight, consumer.layer))

    def _slice_and_add(self, labels: ParamLabels, alive: Tensor) -> None:
        """W[:, kept] + sum of scale * W[:, dropped], for some of the rows that stay at a time (see `linalg.BITE`)."""
        value = self.weights[labels.path].detach()
        device, precise = value.device, torch.promote_types(value.dtype, torch.float32)
        rows = (alive[labels.axes[0]].nonzero().flatten() if 0 in labels.axes else torch.arange(len(value))).to(device)
        stays = alive[labels.axes[1]]
        place = torch.cumsum(stays, 0) - 1  # where a column that stays comes to stand
        kept, shape = stays.nonzero().flatten().to(device), (1, -1, *[1] * (value.dim() - 2))
        parts = []
        for part in self.partners[labels.path]:
            here = stays[part.target]  # one whose block leaves takes nobody's part
            scale = part.scale[here].to(device, precise).view(shape)
            parts.append((part.source[here].to(device), place[part.target[here]].to(device), scale))
        sliced = value.new_empty(len(rows), len(kept), *value.shape[2:])
        for some, target in zip(torch.split(rows, BITE), torch.split(sliced, BITE), strict=True):
            whole = value.index_select(0, some).to(precise)
            total = target if target.dtype == precise else whole.new_empty(target.shape)
            torch.index_select(whole, 1, kept, out=total)
            for source, into, scale in parts:
                total.index_add_(1, into, whole.index_select(1, source).mul_(scale))
            if total is not target:
                target.copy_(total)
        self.weights.put(labels.path, sliced)

    def _absorb_producers(self, merge: Merge, mixing: Tensor) -> None:
        """rows_k = (1 / gain_k) sum_i down_ki gain_i rows_i, and the constants likewise, in the common coordinates."""
        for producer, (gain, constant_gain, constant) in zip(merge.group.producers, merge.gains, strict=True):
            weight = self.weights.own(producer.layer.params["weight"])
            out_first = weight.movedim(1, 0) if producer.layer.transposed else weight
            rows = out_first.flatten(1).to(torch.float64, copy=True)
            here, local = producer.local(merge.kept)
            down = mixing[here][:, producer.channels]  # (k', m)
            own_gain, own_constant = gain[producer.channels], constant[producer.channels]
            inverse = torch.where(own_gain[local] == 0, 0.0, 1 / own_gain[local])
            mix = inverse[:, None] * down * own_gain[None, :]
            rows[producer.where[local]] = torch.einsum("km,mcx->kcx", mix.to(rows), rows[producer.where])
            whole = rows.reshape(out_first.shape)
            weight.copy_(whole.movedim(0, 1) if producer.layer.transposed else whole)
            of_constants = constant_gain[producer.channels]

            def mean_bias(bias: Tensor) -> Tensor:
                whole = of_constants[:, None] * bias[producer.where] + own_constant[:, None]  # noqa: B023
                target = down @ whole - own_constant[local][:, None]  # noqa: B023
                divisor = of_constants[local][:, None]  # noqa: B023
                return bias.index_put((producer.where[local],), torch.where(divisor == 0, 0.0, target / divisor))  # noqa: B023

            self._move_bias(producer.layer, mean_bias)

    def _move_bias(self, layer: Layer, change: Callable[[Tensor], Tensor]) -> None:
        """Change a layer's bias, in float64; a layer without one gets one, whose places are the rows of its weight."""
        if "bias" in layer.params:
            bias = self.weights.own(layer.params["bias"])
            bias.copy_(change(bias.double()))
            return
        path, node = layer.params["weight"], self.nodes[layer.node]
        weight, out_axis = self.weights[path], 1 if layer.transposed else 0
        owner, _, name = path.rpartition(".")
        takes_one = layer.op not in _WITHOUT_BIAS
        added = f"{owner}.{'bias' if node.op == 'call_module' and takes_one else name + '_bias'}".lstrip(".")
        known = added in self.held
        old = self.weights[added] if known else weight.new_zeros(weight.size(out_axis))
        new = change(old.double()).to(weight)
        if not takes_one and not known and not bool(new.any()):
            return
        self.weights.add(added, new, weight.requires_grad)
        if path in self.held:
            self.held[added] = ParamLabels(added, {0: self.held[path].axes[out_axis]})
        for user in self.facts.layers if not known else ():  # every call with this weight
            served = takes_one and self.nodes[user.node].op == "call_module"
            if user.params.get("weight") == path and "bias" not in user.params and not served:
                self._feed(user, added)

    def _feed(self, layer: Layer, path: str) -> None:
        """Let a call that has no bias of its own have the one at `path`, behind it where its op takes none."""
        node = self.nodes[layer.node]
        if layer.op not in _WITHOUT_BIAS:
            fetch_bias(node, path)
            return
        with self.module.graph.inserting_after(node):
            fetched = self.module.graph.get_attr(path)
        with self.module.graph.inserting_after(fetched):
            total = self.module.graph.call_function(torch.add, (node, fetched))
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        self.nodes[layer.node] = total

    def _resize(self, layer: Layer, groups: int) -> None:
        """Right in_channels, num_features, groups, normalized_shape: what a module keeps of its parameters' sizes."""
        node = self.nodes[layer.node]
        weight = self.weights[layer.params["weight"]] if "weight" in layer.params else None
        if node.op != "call_module":
            return
        owner = self.module.get_submodule(str(node.target))
        for attribute in ("groups", "num_groups"):
            if hasattr(owner, attribute):
                setattr(owner, attribute, groups)
        sized = weight if weight is not None else getattr(owner, "running_mean", None)
        if isinstance(sized, Tensor):
            resize(owner, sized, groups, layer.transposed)

    def _edit(self, edits: Mapping[str, Call]) -> None:

        def here(node: fx.Node) -> fx.Node:
            found: fx.Node = self.nodes[node.name]
            return found

        for name, call in edits.items():
            node = self.nodes[name]
            if node.op == "call_function" and isinstance(call.target, str):
                node.op = "call_method"
            node.target = call.target
            node.args, node.kwargs = fx.map_arg(call.args, here), fx.map_arg(call.kwargs, here)
        for node in [
            n for n in reversed(self.module.graph.nodes) if n.op in ("call_function", "call_method") and not n.users
        ]:
            if self.facts.kinds.get(node.name) == "query":
                self.module.graph.erase_node(node)  # a size that nothing asks for any more


@dataclass(frozen=True)
class Partners:
    """Columns of a weight to be added to others: W[:, target] += scale * W[:, source]."""

    source: Tensor
    target: Tensor
    scale: Tensor


def _partners(consumer: Member, up: Tensor, local: Tensor) -> Partners | None:
    """An `up` of at most one entry a row, 1 for each kept channel itself, as a sum of columns; None for any other."""
    row, into = up.nonzero().unbind(1)  # rows ascending
    own = up[local, torch.arange(len(local))]
    layer = consumer.layer
    if layer.groups > 1 or layer.transposed or bool((row[1:] == row[:-1]).any()) or bool((own != 1).any()):
        return None
    moves = torch.ones(len(up), dtype=torch.bool).index_fill_(0, local, False)[row]
    row, into = row[moves], into[moves]
    scale = up[row, into].repeat_interleave(consumer.where.size(1))
    return Partners(consumer.where[row].flatten(), consumer.where[local[into]].flatten(), scale)


def _gained(consumer: Member, own: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """W shift, (out,): each place adds shift times the sum of its kernel to the outputs of its block."""
    layer = consumer.layer
    out = weight.size(1) if layer.transposed else weight.size(0) // layer.groups
    each = torch.einsum("n,ncok->nco", shift.to(own), own.reshape(*own.shape[:2], out, -1))
    block = consumer.where // (columns(weight, layer).size(0) // layer.groups)  # (n, copies)
    blocks = own.new_zeros(layer.groups, out)
    return blocks.index_add_(0, block.flatten().to(own.device), each.flatten(0, 1)).flatten()
