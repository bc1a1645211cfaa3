"""The attributes of a user's modules that may hold a width, and the numbers that they may have after a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxmerge.ir.capture import Capture

# in the names of attributes that hold a width, and such names
WIDTHS = ("dim", "hidden", "embed", "channel", "feature", "head_size", "width", "inner")
SHORT = frozenset(("c", "c_", "c1", "c2", "ch", "nf", "nx", "planes"))
EXPERTS = frozenset(("num_experts", "num_local_experts", "n_routed_experts"))  # attributes that count experts

Kind = tuple[type, str]  # a class of modules, and the name of an attribute
Numbers = Mapping[Kind, Sequence[Mapping[str, int]]]  # the choices for each: {path of an attribute: its new number}


def is_width(name: str) -> bool:
    return name in SHORT or name in EXPERTS or any(word in name for word in WIDTHS)


def value_at(model: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return vars(model.get_submodule(owner)).get(name)


def has_size(model: nn.Module, path: str) -> bool:
    """Whether a tensor of the attribute's own module has an axis of that size: a square layer keeps one of its two."""
    owner, value = model.get_submodule(path.rpartition(".")[0]), value_at(model, path)
    own = (*owner.parameters(recurse=False), *owner.buffers(recurse=False))
    return any(value in tensor.shape for tensor in own)


def by_tensors(model: nn.Module, after: nn.Module) -> Iterator[tuple[Kind, Mapping[str, int]]]:
    """The attributes named as widths, with what became of the axes of that size, if the same became of all."""
    there = {path for path, _ in after.named_modules(remove_duplicate=False)}  # no parametrizations, for instance
    before = {path: m for path, m in model.named_modules(remove_duplicate=False) if path in there}
    now = {name: tensor.shape for name, tensor in after.state_dict().items()}
    sizes = {n: list(zip(t.shape, now.get(n, t.shape), strict=False)) for n, t in model.state_dict().items()}
    found: dict[Kind, dict[str, int]] = {}
    for path, module in before.items():
        for name, value in vars(module).items():
            if type(value) is int and value > 1 and is_width(name) and value_at(after, f"{path}.{name}") == value:
                inside = [pairs for n, pairs in sizes.items() if not path or n.startswith(f"{path}.")]
                became = {new for pairs in inside for old, new in pairs if old == value}
                if len(became) == 1 and (number := became.pop()) != value:
                    found.setdefault((type(module), name), {})[f"{path}.{name}".lstrip(".")] = number
    yield from found.items()


def counted(merged: nn.Module, model: nn.Module) -> Iterator[tuple[str, int]]:
    """(attribute, new number) of the groups of convolutions and norms that have fewer groups in the merged model."""
    theirs = dict(merged.named_modules(remove_duplicate=False))
    for path, own in model.named_modules(remove_duplicate=False):
        for name in ("groups", "num_groups"):
            before, now = vars(own).get(name), vars(theirs.get(path, own)).get(name)
            if type(theirs.get(path)) is type(own) and type(before) is type(now) is int and before != now:
                yield f"{path}.{name}", now


def by_graph(captured: Capture, merged: fx.GraphModule, model: nn.Module) -> Numbers:
    """The attributes that may follow, by kind. An attribute may have several new numbers: one literal stays alone."""
    found: dict[Kind, dict[str, list[int]]] = {}
    for path, number in _changed(captured, merged, model):
        owner, _, name = path.rpartition(".")
        kind = (type(model.get_submodule(owner)), name)
        known = found.setdefault(kind, {}).setdefault(path, [])
        if number not in known:
            known.append(number)
    return {
        kind: [
            {path: known[min(i, len(known) - 1)] for path, known in paths.items()}
            for i in range(max(map(len, paths.values())))
        ]
        for kind, paths in found.items()
    }


def _changed(captured: Capture, merged: fx.GraphModule, model: nn.Module) -> Iterator[tuple[str, int]]:
    """(attribute, new number) of the user's submodules whose integer the merged graph replaces by another."""
    new, submodules = {n.name: n for n in merged.graph.nodes}, dict(model.named_modules(remove_duplicate=False))
    for node in captured.whole.module.graph.nodes:
        if node.name not in new or node.op not in ("call_function", "call_method"):
            continue
        pairs = set(_pairs((node.args, node.kwargs), (new[node.name].args, new[node.name].kwargs)))
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        for place, owner in ((path, submodules[path]) for path in ("", *stack) if path in submodules):
            for name, value in vars(owner).items():
                for old, now in sorted(pairs):
                    if type(value) is int and value == old:
                        yield f"{place}.{name}".lstrip("."), now


def _pairs(one: Any, other: Any) -> Iterator[tuple[int, int]]:
    """(old, new) of the integers at the same place in the arguments of a call that differ."""
    if type(one) is int and type(other) is int and one != other and one > 1 and other > 0:
        yield one, other
    elif isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)) and len(one) == len(other):
        for a, b in zip(one, other, strict=True):
            yield from _pairs(a, b)
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() & other.keys():
            yield from _pairs(one[key], other[key])
