"""Load merged weights into a model of the user's own class: narrower tensors, and the attributes that hold their sizes.

A weight that the class computes by `torch.nn.utils.parametrize` becomes a plain parameter in the copy (`folded.py` says
how other computed tensors are treated). The code of the class does not change, so an attribute that holds a width
(`head_dim`, `hidden_dim`) has to follow. The merged graph shows which literals changed in which submodule. Attributes
of that submodule with the old value are set to the new one, and a choice of them is accepted if the outputs on the
example inputs are those of the merged model.

If the code leaves the scale of an attention to torch, the narrower heads change that scale from 1/sqrt(d) to
1/sqrt(d_new). The rows that produce the queries are multiplied by sqrt(d_new / d) to compensate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.export.check import Expected
from fxmerge.export.folded import computed, plain_copy, recomputed
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance
from fxmerge.weights.disk_tensor import DiskTensor, beside
from fxmerge.weights.layout import resize, resize_recurrent
from fxmerge.weights.memory_format import MEMORY_FORMATS

_TRIALS = 64  # choices of attributes that are tried, at most
_CONSTANT = (
    "lifted_tensor",
    "_tensor_constant",
)  # prefixes of the names that torch.export and torch.fx give to constants


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a model of the user's class needs in addition to the merged tensors.

    refused:    why the class cannot take the merged tensors, or ""
    attributes: {path of an attribute: the integer to set it to}
    rows:       {parameter: [(first row, end of the rows, factor to multiply them by)]}
    unused:     tensors of the class that the merged model does not have, because the example run did not use them
    sources:    tensors that only the class has, from which it computes tensors of the merged model
    computed:   the tensors of the merged model that the class computes from its own
    formats:    {parameter: "channels_last" or "channels_last_3d"} of those that are not contiguous
    """

    refused: str = ""
    attributes: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, Sequence[tuple[int, int, float]]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Fit:
        """Inverse of `json`. Raises FxMergeError for other data."""
        try:
            attributes = {str(k): int(v) for k, v in data["attributes"].items()}
            rows = {str(k): [(int(a), int(b), float(f)) for a, b, f in v] for k, v in data["rows"].items()}
            names = {k: tuple(map(str, data.get(k, ()))) for k in ("unused", "sources", "computed")}
            formats = {str(k): str(v) for k, v in data.get("formats", {}).items()}
            if not set(formats.values()) <= set(MEMORY_FORMATS):
                raise ValueError(f"unknown memory formats {formats}")
            return Fit(refused=str(data["refused"]), attributes=attributes, rows=rows, formats=formats, **names)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FxMergeError(f"the record about the user's own class is damaged: {error!r}") from error


def narrowed(model: nn.Module, tensors: Mapping[str, Tensor], fit: Fit) -> nn.Module:
    """A copy of the user's model whose tensors are replaced, by name, by `tensors`.

    Raises FxMergeError if the names are not those of the model, or if a tensor is larger than the model's own.
    """
    copied, kind = plain_copy(model), type(model).__name__
    modules = dict(copied.named_modules(remove_duplicate=False))
    own = copied.state_dict(keep_vars=True)
    first_name = {id(value): name for name, value in reversed(own.items())}
    ties = {name: first_name[id(value)] for name, value in own.items()}
    tensors = {**{n: tensors[t] for n, t in ties.items() if t in tensors}, **tensors}
    missing = sorted(set(own) - set(tensors) - set(fit.unused))
    if missing:
        raise FxMergeError(
            f"{kind} has {_some(missing)}, which the merged model does not have; pass the model that was merged"
        )
    for path, number in fit.attributes.items():
        owner_path, _, last = path.rpartition(".")
        owner = modules.get(owner_path)
        if owner is None or type(vars(owner).get(last)) is not int:
            raise FxMergeError(f"{kind} has no integer attribute {path}; pass the model that was merged")
        setattr(owner, last, number)
    made: dict[str, Tensor] = {}
    for name, value in tensors.items():
        path, _, last = name.rpartition(".")
        owner = modules.get(path)
        if owner is None or last not in {**owner._parameters, **owner._buffers}:
            if name in fit.computed or last.startswith(_CONSTANT) or (owner is not None and last in vars(owner)):
                continue  # a constant of the graph, which the class creates itself
            raise FxMergeError(f"{kind} has no {name}, which the merged model has; pass the model that was merged")
        old: Tensor | None = getattr(owner, last)
        if old is not None and not _inside(value.shape, old.shape):
            shapes = f"{tuple(old.shape)} in {kind} and {tuple(value.shape)} in the merged model"
            raise FxMergeError(f"{name} has shape {shapes}; pass the model that was merged")
        tie = ties.get(name, name)
        if tie not in made:
            scaled = fit.rows.get(name, ())
            place = value.device if old is None or old.is_meta else old.device
            fresh = value.detach().to(place, copy=True) if scaled else value.detach().clone().to(place)
            for first, end, factor in scaled:
                fresh[first:end] *= factor
            fresh = beside(value, fresh)
            if name in fit.formats and not isinstance(fresh, DiskTensor):
                fresh = fresh.to(memory_format=MEMORY_FORMATS[fit.formats[name]])
            trained = value.is_floating_point() if old is None else old.requires_grad
            made[tie] = nn.Parameter(fresh, trained) if last in owner._parameters else fresh
        setattr(owner, last, made[tie])
        if last in ("weight", "running_mean") and old is not None and old.shape != value.shape:
            _follow(owner, made[tie])
    for module in modules.values():
        if isinstance(module, nn.MultiheadAttention):
            module.embed_dim = module.out_proj.in_features
            module.head_dim = module.embed_dim // module.num_heads
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            resize_recurrent(module)
    return copied


def _inside(shape: Sequence[int], other: Sequence[int]) -> bool:
    return len(shape) == len(other) and all(a <= b for a, b in zip(shape, other, strict=True))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _follow(owner: nn.Module, sized: Tensor) -> None:
    """Update the sizes that a layer holds as attributes to those of its new weight."""
    groups, transposed = getattr(owner, "groups", 1), getattr(owner, "transposed", False)
    if groups > 1 and groups == owner.in_channels:  # depthwise
        groups = sized.size(0) // (1 if transposed else int(owner.out_channels) // groups)  # type: ignore[arg-type]
        transposed = False  # sized by its channels
    resize(owner, sized.shape, groups, transposed)


def fitted(
    captured: Capture, merged: nn.Module, facts: Provenance, alive: Tensor, tensors: Mapping[str, Tensor],
    *, expected: Expected, sources: Mapping[str, Tensor], formats: Mapping[str, str],
) -> Fit:  # fmt: skip
    """What the user's class needs to take the merged tensors, found by trial; `refused` is set if it cannot.

    tensors: the merged model's
    sources: those that the class needs besides (see `folded.sources`)
    """
    model = captured.model
    if model is None or isinstance(model, fx.GraphModule):
        return Fit(refused="the model that was merged was a graph, which has no class of its own")
    rows = _queries(captured, merged, facts, alive) if isinstance(merged, fx.GraphModule) else {}
    changed = dict(_changed(captured, merged, model)) if isinstance(merged, fx.GraphModule) else {}
    counted = dict(_counted(merged, model))
    kinds = {path: _kind(model, path) for path in changed}  # layers of one class use an attribute alike
    known = list(dict.fromkeys(kinds.values()))
    given = {**tensors, **sources}
    unused = tuple(sorted(set(plain_copy(model).state_dict()) - set(given)))
    common: Any = {
        "unused": unused, "sources": tuple(sources), "computed": tuple(computed(captured)), "formats": formats
    }  # fmt: skip
    why = "its outputs on the example inputs differ"
    sets = (set(c) for size in range(len(known), -1, -1) for c in itertools.combinations(known, size))
    for chosen in itertools.islice(sets, _TRIALS):
        attributes = counted | {path: number for path, number in changed.items() if kinds[path] in chosen}
        for factors in [rows, {}] if rows else [rows]:
            fit = Fit(attributes=attributes, rows=factors, **common)
            try:
                own = narrowed(model, given, fit)
                if expected.error(own, calls=1) <= 1 and expected.error(own) <= 1:
                    return fit
            except FxMergeError as error:
                return Fit(refused=str(error))
            except Exception as error:  # the user's code may raise anything on sizes that it was not written for
                why = f"its code does not run on the narrower tensors ({type(error).__name__})"
    from_own = recomputed(captured, tensors)
    if from_own:
        return Fit(refused=f"the code of {type(model).__name__} cannot take them: {from_own}")
    return Fit(refused=f"the code of {type(model).__name__} has sizes that cannot be changed from outside: {why}")


def _counted(merged: nn.Module, model: nn.Module) -> Iterator[tuple[str, int]]:
    """(attribute, new number) of the groups of convolutions and norms that have fewer groups in the merged model."""
    theirs = dict(merged.named_modules(remove_duplicate=False))
    for path, own in model.named_modules(remove_duplicate=False):
        for name in ("groups", "num_groups"):
            before, now = vars(own).get(name), vars(theirs.get(path, own)).get(name)
            if type(theirs.get(path)) is type(own) and type(before) is type(now) is int and before != now:
                yield f"{path}.{name}", now


def _kind(model: nn.Module, path: str) -> tuple[type, str]:
    owner, _, name = path.rpartition(".")
    return type(model.get_submodule(owner)), name


def _changed(captured: Capture, merged: fx.GraphModule, model: nn.Module) -> Iterator[tuple[str, int]]:
    """(attribute, new number) of the user's submodules whose integer the merged graph replaces by another."""
    new, submodules = {n.name: n for n in merged.graph.nodes}, dict(model.named_modules(remove_duplicate=False))
    for node in captured.module.graph.nodes:
        if node.name not in new or node.op not in ("call_function", "call_method"):
            continue
        pairs = set(_pairs((node.args, node.kwargs), (new[node.name].args, new[node.name].kwargs)))
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        for place, owner in ((path, submodules[path]) for path in ("", *stack) if path in submodules):
            for name, value in vars(owner).items():
                for old, now in pairs:
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


def _queries(
    captured: Capture, merged: fx.GraphModule, facts: Provenance, alive: Tensor
) -> dict[str, list[tuple[int, int, float]]]:
    """{parameter: [(first row, end, sqrt(d_new / d))]} of the rows that produce the queries of an attention.

    Only for an attention whose call had no `scale` and to which the rewrite added the original one.
    """
    new = {n.name: n for n in merged.graph.nodes}
    found: dict[str, list[tuple[int, int, float]]] = {}
    for node in captured.module.graph.nodes:
        scale = new[node.name].kwargs.get("scale") if node.name in new else None
        if not isinstance(scale, float) or "scale" in node.kwargs or not isinstance(node.args[0], fx.Node):
            continue
        labels = torch.unique(facts.labels[node.args[0].name])
        labels = labels[(labels > 0) & alive[labels]]
        for layer in facts.layers:
            if layer.writes is None or not bool(torch.isin(layer.writes, labels).any()):
                continue
            kept = layer.writes[alive[layer.writes]]
            heads = captured.shapes[node.args[0].name][-3] if len(captured.shapes[node.args[0].name]) > 2 else 1
            rows = torch.isin(kept, labels).nonzero().flatten()
            factor = float((len(rows) // heads) ** 0.5 * scale)
            for path in (layer.params.get("weight"), layer.params.get("bias")):
                if path is not None:
                    found.setdefault(path, []).append((int(rows[0]), int(rows[-1]) + 1, factor))
    return found
