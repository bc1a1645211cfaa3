"""Load merged weights into a model of the user's own class: narrower tensors, and the attributes that hold their sizes.

A weight that the class computes by `torch.nn.utils.parametrize` becomes a plain parameter in the copy (`folded.py` says
how other computed tensors are treated). The code of the class does not change, so an attribute that holds a width
(`head_dim`, `hidden_dim`) has to follow; `class_fit.py` finds out which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from fxmerge.errors import FxMergeError
from fxmerge.export.folded import plain_copy
from fxmerge.weights.layout import resize, resize_recurrent
from fxmerge.weights.memory_format import MEMORY_FORMATS
from fxmerge.weights.stored_tensor import StoredTensor, beside

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
            if name in fit.formats and not isinstance(fresh, StoredTensor):
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
