"""Drops whole experts: makes the capture of the model without them, which is then merged in the model's place.

Stacks lose the experts' matrices, the router loses their rows, and literals that follow the number of experts change.
All nodes keep their names. Some tokens are now sent to other experts, so that inside a mixture the rows of this graph
are not those of the whole model. Refit therefore compares it with a third graph, in which both are computed: the nodes
of the mixture, under their own names, as in the graph without the experts, and, under other names, as in the whole
model. What follows the mixture reads the latter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.nested import fresh
from fxmerge.ir.capture import Capture, Cut
from fxmerge.ir.mixtures import Mixture, Sized, Thinned
from fxmerge.ir.provenance import Provenance
from fxmerge.weights.by_path import at
from fxmerge.weights.copy import sharing_copy
from fxmerge.weights.layout import resize

Decided = Sequence[tuple[Mixture, Thinned]]


def without_experts(captured: Capture, facts: Provenance, decided: Decided) -> Capture:
    """The capture in which each mixture has the experts that stay."""
    module, weights = sharing_copy(captured.module)
    named: dict[str, fx.Node] = {node.name: node for node in module.graph.nodes}
    for mixture, thinned in decided:
        kept = torch.tensor(thinned.kept)
        for path, axis in mixture.tensors.items():
            value = weights[path].detach()
            weights.put(path, value.index_select(axis, kept.to(value.device)))
            owner = module.get_submodule(path.rpartition(".")[0])
            if isinstance(owner, nn.Linear):
                resize(owner, owner.weight.shape, 1, False)
        for size in mixture.sizes:
            _resize(named[size.node], size, len(kept), mixture.groups)
    module.recompile()
    seen = _Shapes(module)
    with evaluating(module), torch.no_grad():
        seen.run(*fresh(list(captured.inputs)), enable_io_processing=False)
    starts = frozenset(user.name for m, _ in decided for user in named[m.end].users)
    return replace(
        captured,
        module=module,
        shapes={**captured.shapes, **seen.shapes},
        cut=Cut(
            whole=captured, facts=facts, dropped=(), starts=starts, left={}, thinned=tuple(t for _, t in decided),
            target=_both(captured, module, [mixture for mixture, _ in decided]),
        ),
    )  # fmt: skip


class _Shapes(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def _resize(node: fx.Node, size: Sized, experts: int, groups: int) -> None:
    """Writes the new number of experts into a literal of a call."""
    number = {"all": experts, "last": experts - 1, "each": experts // groups}[size.size]
    first, *rest = size.place

    def changed(value: Any, place: Sequence[int | str]) -> Any:
        if not place:
            return number
        return type(value)([changed(v, place[1:]) if i == place[0] else v for i, v in enumerate(value)])

    if isinstance(first, int):
        node.update_arg(first, changed(node.args[first], rest))
    else:
        node.update_kwarg(first, changed(node.kwargs[first], rest))


def _both(captured: Capture, thin: fx.GraphModule, mixtures: Sequence[Mixture]) -> fx.GraphModule:
    """The graph that has the nodes of the mixtures twice: without the experts, and as in the whole model."""
    module, _ = sharing_copy(thin)
    whole = {node.name: node for node in captured.module.graph.nodes}
    named = {node.name: node for node in module.graph.nodes}
    for mixture in mixtures:
        end, copies = named[mixture.end], dict[fx.Node, fx.Node]()
        readers = list(end.users)
        paths = {path: _add(module, captured, path) for path in mixture.tensors}
        for name in mixture.nodes:
            with module.graph.inserting_after(named[name]):
                copied = module.graph.node_copy(whole[name], partial(_copy_of, copies, named))
            for source in whole[name].all_input_nodes:
                if source.op == "get_attr" and str(source.target) in paths:
                    with module.graph.inserting_before(copied):
                        copied.replace_input_with(named[source.name], module.graph.get_attr(paths[str(source.target)]))
            if copied.op == "call_module" and any(path.startswith(f"{copied.target}.") for path in paths):
                copied.target = _with_module(module, captured, str(copied.target))
            copies[whole[name]] = copied
        for reader in readers:
            reader.replace_input_with(end, copies[whole[mixture.end]])
    module.graph.lint()
    module.recompile()
    return module


def _copy_of(copies: Mapping[fx.Node, fx.Node], named: Mapping[str, fx.Node], node: fx.Node) -> fx.Node:
    """The node of the new graph that a copied node reads in place of one of the whole model."""
    return copies.get(node, named[node.name])


def _add(module: fx.GraphModule, captured: Capture, path: str) -> str:
    """Adds a parameter or buffer of the whole model beside the one that lacks some of it. Returns its path."""
    owner, _, last = path.rpartition(".")
    held = module.get_submodule(owner)
    name, value = f"{last}_of_all", at(captured.module, path)
    while hasattr(held, name):
        name += "_"
    if isinstance(value, nn.Parameter):
        held.register_parameter(name, value)
    else:
        held.register_buffer(name, value, persistent=False)
    return f"{owner}.{name}".lstrip(".")


def _with_module(module: fx.GraphModule, captured: Capture, path: str) -> str:
    """Adds a layer of the whole model beside the one that lacks some of it. Returns its path."""
    name = f"{path}_of_all"
    while hasattr(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]):
        name += "_"
    module.add_submodule(name, captured.module.get_submodule(path))
    return name
