"""Rewrites a copy of the captured graph module: the kept channels absorb the dropped ones, then parameters are sliced.

1. Absorb, at full width: at the kept places, a consumer's columns W become W up, and its bias gains W shift. Where the
   decomposition mixes channels, a producer's rows become down rows.
2. Slice: every parameter loses the places of dropped labels, by the index map that provenance found. Then the sizes
   that modules keep, and the literal sizes in the graph, are updated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.graph.nested import tree
from fxmerge.graph.ops import updates
from fxmerge.ir.capture import SIZE_CHECK
from fxmerge.ir.groups import Member, Merge
from fxmerge.ir.labels import compact
from fxmerge.ir.provenance import Layer, ParamLabels, Provenance, blocks_left
from fxmerge.methods.linalg import BITE, precise
from fxmerge.rewrite.slicing import gather, places
from fxmerge.rules.resize import Call
from fxmerge.weights.by_path import fetch_bias
from fxmerge.weights.copy import sharing_copy
from fxmerge.weights.layout import columns, from_columns, from_out_first, out_first, resize

_WITHOUT_BIAS = ("matrix", "embedding", "experts")  # ops that take no bias (except addmm): a node after them adds it


class Rewriter:
    """A merged copy of a graph module, which is not changed: call `absorb` for each group, then `finish`."""

    def __init__(self, module: fx.GraphModule, facts: Provenance) -> None:
        self.module, self.weights = sharing_copy(module)
        self.facts, self.held = facts, dict(facts.params)
        self.nodes: dict[str, fx.Node] = {n.name: n for n in self.module.graph.nodes}
        self.partners: dict[str, list[Partners]] = {}  # path of a weight -> columns to add when it is sliced

    def absorb(self, merge: Merge) -> None:
        """Lets the kept channels of a group absorb the dropped ones, in its producers and consumers, at full width."""
        with torch.no_grad():
            if merge.down is not None:
                self._absorb_producers(merge, merge.down)
            if merge.consumers:
                self._absorb_consumers(merge)
            for path, factor in merge.norms.items():
                weight = self.weights.own(path)
                weight.copy_(weight * factor)

    def finish(self, alive: Tensor, edits: Mapping[str, Call]) -> fx.GraphModule:
        """Slices every parameter, updates sizes, and recompiles. Names and metadata of nodes stay.

        alive: bool (label_count,), the labels that stay
        edits: the calls that replace those of nodes, by name
        """
        with torch.no_grad():
            for labels in self.held.values():
                if labels.path in self.partners:
                    self._slice_and_add(labels, alive)
                elif any(not bool(alive[t].all()) for t in places(labels)):
                    gather(self.weights, labels, lambda flat: alive[flat].nonzero().flatten())
            self.weights.own_all()
        for layer in self.facts.layers:
            self._resize(layer, alive)
        self._edit(edits)
        self.module.graph.lint()
        self.module.recompile()
        return self.module

    def _absorb_consumers(self, merge: Merge) -> None:
        done: set[tuple[str, bytes]] = set()
        for consumer, part in zip(merge.group.consumers, merge.consumers, strict=True):
            path = consumer.layer.params["weight"]
            if consumer.place in done:
                continue  # a module that is called twice absorbs once
            done.add(consumer.place)
            shift, (here, local) = part.shift[consumer.channels], consumer.local(merge.kept)
            up = part.up
            if len(consumer.channels) != merge.group.channels:
                up = up[..., consumer.channels, :][..., here]
            plain = up.dim() == 2 and not bool(shift.any())
            partners = _partners(consumer, up, local) if plain else None
            if partners is not None:
                self.partners.setdefault(path, []).append(partners)
                continue
            weight = self.weights.own(path)
            rows = precise(columns(weight, consumer.layer)).clone()
            own = rows[consumer.where]  # (m, copies, out/groups * kernel)
            if bool(shift.any()):
                gained = _gained(consumer, own, shift, weight)
                self._move_bias(consumer.layer, lambda bias: bias + gained)  # noqa: B023
            form = "mk,mcx->kcx" if up.dim() == 2 else "cmk,mcx->kcx"
            rows[consumer.where[local]] = torch.einsum(form, up.to(rows), own)
            weight.copy_(from_columns(rows, weight, consumer.layer))

    def _slice_and_add(self, labels: ParamLabels, alive: Tensor) -> None:
        """W[:, kept] + the sum of scale * W[:, dropped], for the rows that stay, in chunks of `linalg.BITE` rows."""
        value = self.weights[labels.path].detach()
        device, exact = value.device, torch.promote_types(value.dtype, torch.float32)
        rows = (alive[labels.axes[0]].nonzero().flatten() if 0 in labels.axes else torch.arange(len(value))).to(device)
        stays = alive[labels.axes[1]]
        place = torch.cumsum(stays, 0) - 1  # the new place of each column that stays
        kept, shape = stays.nonzero().flatten().to(device), (1, -1, *[1] * (value.dim() - 2))
        parts = []
        for part in self.partners[labels.path]:
            here = stays[part.target]  # not for a target whose block is dropped
            scale = part.scale[here].to(device, exact).view(shape)
            parts.append((part.source[here].to(device), place[part.target[here]].to(device), scale))
        sliced = value.new_empty(len(rows), len(kept), *value.shape[2:])
        for some, target in zip(torch.split(rows, BITE), torch.split(sliced, BITE), strict=True):
            whole = value.index_select(0, some).to(exact)
            total = target if target.dtype == exact else whole.new_empty(target.shape)
            torch.index_select(whole, 1, kept, out=total)
            for source, into, scale in parts:
                total.index_add_(1, into, whole.index_select(1, source).mul_(scale))
            if total is not target:
                target.copy_(total)
        self.weights.put(labels.path, sliced)

    def _absorb_producers(self, merge: Merge, mixing: Tensor) -> None:
        """rows_k = (1 / gain_k) sum_i down_ki gain_i rows_i; the bias likewise, in the group's common coordinates."""
        done: set[tuple[str, bytes]] = set()
        for producer, (gain, constant_gain, constant) in zip(merge.group.producers, merge.gains, strict=True):
            if producer.place in done:
                continue
            done.add(producer.place)
            weight = self.weights.own(producer.layer.params["weight"])
            first = out_first(weight, producer.layer)
            rows = precise(first.flatten(1)).clone()
            here, local = producer.local(merge.kept)
            down = mixing[here][:, producer.channels]  # (k', m)
            own_gain, own_constant = gain[producer.channels], constant[producer.channels]
            inverse = torch.where(own_gain[local] == 0, 0.0, 1 / own_gain[local])
            mix = inverse[:, None] * down * own_gain[None, :]
            rows[producer.where[local]] = torch.einsum("km,mcx->kcx", mix.to(rows), rows[producer.where])
            weight.copy_(from_out_first(rows.reshape(first.shape), weight, producer.layer))
            of_constants = constant_gain[producer.channels]

            def mean_bias(bias: Tensor) -> Tensor:
                whole = of_constants[:, None] * bias[producer.where] + own_constant[:, None]  # noqa: B023
                target = down.to(whole) @ whole - own_constant[local][:, None]  # noqa: B023
                divisor = of_constants[local][:, None]  # noqa: B023
                return bias.index_put((producer.where[local],), torch.where(divisor == 0, 0.0, target / divisor))  # noqa: B023

            self._move_bias(producer.layer, mean_bias)

    def _move_bias(self, layer: Layer, change: Callable[[Tensor], Tensor]) -> None:
        """Changes a layer's bias, in float64. A layer without a bias gets one, with the labels of its weight's rows."""
        if "bias" in layer.params:
            bias = self.weights.own(layer.params["bias"])
            bias.copy_(change(precise(bias)))
            return
        if layer.operation.is_recurrent or layer.bare or layer.writes_apart:
            return  # the module of a recurrent layer has biases everywhere or nowhere
        path, node = layer.params["weight"], self.nodes[layer.node]
        weight, out_axis = self.weights[path], int(layer.transposed) + layer.is_stacked
        owner, _, name = path.rpartition(".")
        takes_one = layer.op not in _WITHOUT_BIAS
        added = f"{owner}.{'bias' if node.op == 'call_module' and takes_one else name + '_bias'}".lstrip(".")
        known = added in self.held
        old = self.weights[added] if known else weight.new_zeros(len(out_first(weight, layer)))
        new = change(precise(old)).to(weight)
        if not known and not bool(new.any()):
            return
        self.weights.add(added, new, weight.requires_grad)
        if path in self.held:
            self.held[added] = ParamLabels(added, {0: self.held[path].axes[out_axis]})
        for user in self.facts.layers if not known else ():  # every call that uses this weight
            served = takes_one and self.nodes[user.node].op == "call_module"
            if user.params.get("weight") == path and "bias" not in user.params and not served:
                self._feed(user, added)

    def _feed(self, layer: Layer, path: str) -> None:
        """Makes the parameter at `path` the bias of a call; where the op takes none, a node after the call adds it."""
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

    def _resize(self, layer: Layer, alive: Tensor) -> None:
        """Updates the sizes that a layer's module keeps: groups, and those of its weight (see `layout.resize`)."""
        node, groups = self.nodes[layer.node], blocks_left(layer, alive)
        if node.op != "call_module":
            return
        owner = self.module.get_submodule(str(node.target))
        for attribute in ("groups", "num_groups"):
            if hasattr(owner, attribute):
                setattr(owner, attribute, groups)
        weight = self.weights[layer.params["weight"]] if "weight" in layer.params else None
        sized = weight if weight is not None else getattr(owner, "running_mean", None)
        if isinstance(sized, Tensor):
            resize(owner, sized.shape, groups, layer.transposed)
        elif layer.operation.is_norm:  # without parameters: its sizes are those of what it normalises
            left = compact(self.facts.labels[layer.node], alive)
            last = len(getattr(owner, "normalized_shape", ()))
            if left:
                resize(owner, left[0].shape[-last:] if last else left[0].shape[1:2], groups, layer.transposed)

    def _edit(self, edits: Mapping[str, Call]) -> None:
        """Replaces the calls of nodes, and erases size queries that are no longer used."""

        def here(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return self.nodes[leaf.name]
            if isinstance(leaf, Call):  # a value that is computed for this call alone
                kind = "call_method" if isinstance(leaf.target, str) else "call_function"
                return self.module.graph.create_node(kind, leaf.target, tree(here, leaf.args), tree(here, leaf.kwargs))
            return leaf

        for name, call in edits.items():
            node = self.nodes[name]
            if node.op == "call_function" and isinstance(call.target, str):
                node.op = "call_method"
            node.target = call.target
            with self.module.graph.inserting_before(node):
                node.args, node.kwargs = tree(here, tuple(call.args)), tree(here, dict(call.kwargs))
        for node in [
            n for n in reversed(self.module.graph.nodes) if n.op in ("call_function", "call_method") and not n.users
        ]:
            query = self.facts.kinds.get(node.name) == "query" and not updates(self.module, node)  # `fill_` does
            if query and not node.meta.get(SIZE_CHECK):
                self.module.graph.erase_node(node)


@dataclass(frozen=True)
class Partners:
    """Columns of a weight that are added to others: W[:, target] += scale * W[:, source]."""

    source: Tensor
    target: Tensor
    scale: Tensor


def _partners(consumer: Member, up: Tensor, local: Tensor) -> Partners | None:
    """The columns to add for an `up` with at most one entry per row, 1 for kept channels; None for any other `up`."""
    row, into = up.nonzero().unbind(1)  # rows ascending
    own = up[local, torch.arange(len(local))]
    layer = consumer.layer
    if (
        layer.groups > 1
        or layer.transposed
        or layer.is_stacked
        or bool((row[1:] == row[:-1]).any())
        or bool((own != 1).any())
    ):
        return None
    moves = torch.ones(len(up), dtype=torch.bool).index_fill_(0, local, False)[row]
    row, into = row[moves], into[moves]
    scale = up[row, into].repeat_interleave(consumer.where.size(1))
    return Partners(consumer.where[row].flatten(), consumer.where[local[into]].flatten(), scale)


def _gained(consumer: Member, own: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """W shift, (out,): each place adds its shift times the sum of its kernel to the outputs of its group."""
    layer = consumer.layer
    out = weight.size(1) if layer.transposed else weight.size(0) // layer.groups
    form = "n,ncok->nco" if shift.dim() == 1 else "nc,ncok->nco"
    each = torch.einsum(form, shift.to(own), own.reshape(*own.shape[:2], out, -1))
    block = consumer.where // (columns(weight, layer).size(0) // layer.groups)  # (n, copies)
    blocks = own.new_zeros(layer.groups, out)
    return blocks.index_add_(0, block.flatten().to(own.device), each.flatten(0, 1)).flatten()
