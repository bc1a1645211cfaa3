"""Rewrite: the only stage that writes (refit aside), and it writes on a copy.

Two moves, in this order. *Absorb*, at full width: a reader's columns W become W up at the kept places and its bias
gains W shift; a writer's rows become down rows where the decomposition mixes them. *Slice*: every parameter drops the
places whose labels have gone, by the one index map that provenance found; modules' own sizes and the graph's literal
sizes follow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from .ir import Group, Layer, Member, Merge, ParamLabels, Provenance
from .resizing import Call
from .weights import columns, from_columns, gather, parameter, places

# module attribute -> axis of the weight that it tells the size of
_SIZES: dict[str, int] = {
    "in_features": 1,
    "out_features": 0,
    "num_features": 0,
    "num_parameters": 0,
    "num_channels": 0,
    "embedding_dim": 1,
}


def survivors(facts: Provenance, atom: Tensor, kept: Sequence[tuple[Group, Tensor]]) -> Tensor:
    """alive (label_count,): does the label's channel stay?"""
    alive = torch.ones(int(atom.max()) + 1, dtype=torch.bool)
    for group, index in kept:
        alive[group.atoms] = False
        alive[group.atoms[index]] = True
    return alive[atom]


class Rewriter:
    """A merged copy in the making: `absorb` each group, then `finish`. The module it is made from is left alone."""

    def __init__(self, module: fx.GraphModule, facts: Provenance) -> None:
        self.module, self.facts = copy.deepcopy(module), facts
        self.held = dict(facts.params)

    def absorb(self, merge: Merge) -> None:
        """At full width: let the kept channels' writers and readers take over what the others did."""
        with torch.no_grad():
            if merge.down is not None:
                _absorb_writers(self.module, self.held, merge, merge.down)
            _absorb_readers(self.module, self.held, merge)

    def finish(self, alive: Tensor, edits: Mapping[str, Call]) -> fx.GraphModule:
        """Slice every parameter, put sizes right, and recompile: fresh code, the same names and metadata."""
        with torch.no_grad():
            for labels in self.held.values():
                if any(not bool(alive[t].all()) for t in places(labels)):
                    gather(self.module, labels, lambda flat: alive[flat].nonzero().flatten())
        for layer in self.facts.layers:
            _resize_module(self.module, layer)
        _edit(self.module, self.facts, edits)
        self.module.graph.lint()
        self.module.recompile()
        return self.module


def _absorb_readers(module: fx.GraphModule, held: dict[str, ParamLabels], merge: Merge) -> None:
    done: set[str] = set()
    for reader, part in zip(merge.group.readers, merge.readers, strict=bool(merge.readers)):
        path = reader.layer.params["weight"]
        if path in done:
            continue  # a module that is used twice absorbs once
        done.add(path)
        weight = parameter(module, path)
        rows = columns(weight, reader.layer).to(torch.float64, copy=True)
        own = rows[reader.where]  # (m, copies, out/groups * kernel)
        shift, (here, local) = part.shift[reader.channels], reader.local(merge.kept)
        if bool(shift.any()):
            gained = _gained(reader, own, shift, weight)
            _move_bias(module, held, reader.layer, lambda bias: bias + gained)  # noqa: B023
        up = part.up[reader.channels][:, here].to(rows)  # partners stand in the same layers: nothing is cut off
        rows[reader.where[local]] = torch.einsum("mk,mcx->kcx", up, own)
        weight.copy_(from_columns(rows, weight, reader.layer))


def _gained(reader: Member, own: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """W shift, (out,): each place adds shift times the sum of its kernel to the outputs of its block."""
    layer = reader.layer
    out = weight.size(1) if layer.transposed else weight.size(0) // layer.groups
    each = torch.einsum("n,ncok->nco", shift.to(own), own.reshape(*own.shape[:2], out, -1))
    block = reader.where // (columns(weight, layer).size(0) // layer.groups)  # (n, copies)
    blocks = own.new_zeros(layer.groups, out)
    return blocks.index_add_(0, block.flatten().to(own.device), each.flatten(0, 1)).flatten()


def _move_bias(
    module: fx.GraphModule, held: dict[str, ParamLabels], layer: Layer, change: Callable[[Tensor], Tensor]
) -> None:
    """Change a layer's bias, in float64; a layer without one gets one, whose places are the rows of its weight."""
    if "bias" in layer.params:
        bias = parameter(module, layer.params["bias"])
        bias.copy_(change(bias.double()))
        return
    path = layer.params["weight"]
    weight = parameter(module, path)
    owner, _, name = path.rpartition(".")
    home = module.get_submodule(owner)
    node = next(n for n in module.graph.nodes if n.name == layer.node)
    added = "bias" if node.op == "call_module" else f"{name}_bias"
    old = home._parameters.get(added)
    out_axis = 1 if layer.transposed else 0
    none = weight.new_zeros(weight.size(out_axis))
    fresh = change((old if old is not None else none).double()).to(weight)
    home._parameters[added] = nn.Parameter(fresh, requires_grad=weight.requires_grad)
    added_path = f"{owner}.{added}".lstrip(".")
    if path in held:
        held[added_path] = ParamLabels(added_path, {0: held[path].axes[out_axis]})
    if node.op != "call_module" and old is None:
        with module.graph.inserting_before(node):
            fetched = module.graph.get_attr(added_path)
        node.args = (*node.args[:2], fetched, *node.args[3:])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "bias"}


def _absorb_writers(module: fx.GraphModule, held: dict[str, ParamLabels], merge: Merge, mixing: Tensor) -> None:
    """rows_k = (1 / gain_k) sum_i down_ki gain_i rows_i, and the constants likewise, in the common coordinates."""
    for writer, (gain, constant_gain, constant) in zip(merge.group.writers, merge.gains, strict=True):
        weight = parameter(module, writer.layer.params["weight"])
        out_first = weight.movedim(1, 0) if writer.layer.transposed else weight
        rows = out_first.flatten(1).to(torch.float64, copy=True)
        here, local = writer.local(merge.kept)
        down = mixing[here][:, writer.channels]  # (k', m)
        own_gain, own_constant = gain[writer.channels], constant[writer.channels]
        inverse = torch.where(own_gain[local] == 0, 0.0, 1 / own_gain[local])
        mix = inverse[:, None] * down * own_gain[None, :]
        rows[writer.where[local]] = torch.einsum("km,mcx->kcx", mix.to(rows), rows[writer.where])
        whole = rows.reshape(out_first.shape)
        weight.copy_(whole.movedim(0, 1) if writer.layer.transposed else whole)
        of_constants = constant_gain[writer.channels]

        def mean_bias(bias: Tensor) -> Tensor:
            whole = of_constants[:, None] * bias[writer.where] + own_constant[:, None]  # noqa: B023
            target = down @ whole - own_constant[local][:, None]  # noqa: B023
            divisor = of_constants[local][:, None]  # noqa: B023
            return bias.index_put((writer.where[local],), torch.where(divisor == 0, 0.0, target / divisor))  # noqa: B023

        _move_bias(module, held, writer.layer, mean_bias)


def _resize_module(module: fx.GraphModule, layer: Layer) -> None:
    """Right in_channels, num_features, groups, normalized_shape: the sizes that a module keeps of its parameters."""
    node = next(n for n in module.graph.nodes if n.name == layer.node)
    groups = layer.groups
    weight = parameter(module, layer.params["weight"]) if "weight" in layer.params else None
    if layer.op == "depthwise" and weight is not None and layer.carries is not None:
        groups = layer.groups * weight.size(0) // layer.carries.numel()
    if node.op != "call_module":
        return
    owner = module.get_submodule(str(node.target))
    if layer.op == "depthwise":
        owner.groups = groups  # type: ignore[assignment]
    sized = weight if weight is not None else getattr(owner, "running_mean", None)
    if not isinstance(sized, Tensor):
        return
    for attribute, axis in _SIZES.items():
        if isinstance(getattr(owner, attribute, None), int) and axis < sized.dim():
            setattr(owner, attribute, sized.size(axis))
    into, out = (0, 1) if layer.transposed else (1, 0)
    if hasattr(owner, "in_channels") and hasattr(owner, "out_channels"):
        owner.in_channels = sized.size(into) * groups  # type: ignore[assignment]
        owner.out_channels = sized.size(out)  # type: ignore[assignment]
    if hasattr(owner, "normalized_shape"):
        owner.normalized_shape = tuple(sized.shape)  # type: ignore[assignment]


def _edit(module: fx.GraphModule, facts: Provenance, edits: Mapping[str, Call]) -> None:
    by_name: dict[str, fx.Node] = {n.name: n for n in module.graph.nodes}

    def here(node: fx.Node) -> fx.Node:
        return by_name[node.name]

    for name, call in edits.items():
        node = by_name[name]
        if node.op == "call_function" and isinstance(call.target, str):
            node.op = "call_method"
        node.target = call.target
        node.args, node.kwargs = fx.map_arg(call.args, here), fx.map_arg(call.kwargs, here)
    for node in [n for n in reversed(module.graph.nodes) if n.op in ("call_function", "call_method") and not n.users]:
        if facts.kinds.get(node.name) == "query":
            module.graph.erase_node(node)  # a size that nothing asks for any more
