"""The lines of `__init__` in generated code: the layers, parameters and buffers of a graph module, under its names."""

from __future__ import annotations

from collections.abc import Container, Iterator

import torch
from torch import Tensor, fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.export.source.constructors import LAYERS, constructor, created
from fxmerge.export.source.containers import (
    assigned,
    children,
    form_of,
    in_order,
    parameter_form,
    reached,
)
from fxmerge.export.source.names import literal
from fxmerge.weights.memory_format import MEMORY_FORMATS, memory_format
from fxmerge.weights.stored_tensor import StoredTensor


class Init:
    """The lines that create what a graph module holds, without indentation, and the imports that they need."""

    def __init__(self, root: fx.GraphModule, imports: set[str]) -> None:
        self.root, self.imports = root, imports
        self.called = {id(root.get_submodule(str(n.target))) for n in root.graph.nodes if n.op == "call_module"}
        self.fetched = {str(n.target) for n in root.graph.nodes if n.op == "get_attr"}
        self.floats = {t.dtype for t in [*root.parameters(), *root.buffers()] if _is_float(t)}
        self.known: dict[int, str] = {}  # module or parameter -> its code
        self.ties: list[str] = []
        self.frozen: set[int] = set()  # parameters that are created frozen
        self.lines = [*self._walk(root, "self", ""), *self.ties, *self._last()]

    def _last(self) -> Iterator[str]:
        """The lines that change what was created as a whole: its dtype, its memory format, its frozen parameters."""
        if self._whole is not None:
            yield f"self.to({literal(self._whole)})"
        yield from self._formats()
        for path, value in self.root.named_parameters():
            if not value.requires_grad and _is_float(value) and id(value) not in self.frozen:
                yield f"{reached('self', self.root, path)}.requires_grad_(False)"

    def _formats(self) -> Iterator[str]:
        """The lines that store tensors as channels_last: the whole model where all may be, or else one by one."""
        tensors = {k: v for k, v in self.root.state_dict(keep_vars=True).items() if not isinstance(v, StoredTensor)}
        for name, memory in MEMORY_FORMATS.items():
            these = [path for path, value in tensors.items() if memory_format(value) == name]
            dims = tensors[these[0]].dim() if these else 0
            if these and all(v.is_contiguous(memory_format=memory) for v in tensors.values() if v.dim() == dims):
                yield f"self.to(memory_format=torch.{name})"
                continue
            for place in (reached("self", self.root, path) for path in these):
                yield f"{place}.data = {place}.data.to(memory_format=torch.{name})"

    @property
    def _whole(self) -> torch.dtype | None:
        """The dtype that the model as a whole is converted to, or None."""
        (dtype,) = self.floats if len(self.floats) == 1 else (torch.float32,)
        return None if dtype == torch.float32 or dtype.is_complex else dtype

    def _walk(self, owner: nn.Module, code: str, path: str) -> Iterator[str]:
        yield from self._tensors(owner, code, path)
        listed = form_of(owner) == "list"
        for name in sorted(children(owner), key=int) if listed else children(owner):
            child = owner.get_submodule(name)
            place, inner = reached(code, owner, name), f"{path}.{name}".lstrip(".")
            if id(child) in self.known:
                yield self._put(owner, code, name, self.known[id(child)])
                continue
            self.known[id(child)] = place
            if id(child) in self.called or type(child) in LAYERS:
                yield self._put(owner, code, name, constructor(child, self.imports) + self._cast(child))
                yield from self._layer(child, place, inner)
            else:
                made = _container(child)
                if owner is self.root or not listed or made != "nn.Module()":
                    yield self._put(owner, code, name, made)
                yield from self._walk(child, place, inner)

    def _layer(self, layer: nn.Module, code: str, path: str) -> Iterator[str]:
        """The lines for what a layer holds besides what its constructor creates; notes its parameters."""
        if children(layer) and not isinstance(layer, nn.Sequential):
            raise FxMergeError(f"{path} is a {type(layer).__name__}, which cannot be written with plain layers")
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise FxMergeError(
                f"{path} has forward hooks, which plain code does not have; remove them before the merge"
            )
        dtype = self._whole or next(iter(self._own_floats(layer) if self._cast(layer) else ()), torch.float32)
        made = dict(created(layer).named_modules(remove_duplicate=False))
        for inner, owner in layer.named_modules(remove_duplicate=False):
            fresh = {**made[inner]._parameters, **made[inner]._buffers}
            same = {name for name, value in _tensors(owner).items() if _alike(value, fresh.get(name), dtype)}
            here = f"{path}.{inner}".rstrip("."), reached(code, layer, inner) if inner else code
            yield from self._tensors(owner, here[1], here[0], same)
        for inner, value in layer.named_parameters(remove_duplicate=False):
            place = reached(code, layer, inner)
            if self.known.setdefault(id(value), place) != place:
                self.ties.append(f"{place} = {self.known[id(value)]}")

    def _tensors(self, owner: nn.Module, code: str, path: str, made: Container[str] = ()) -> Iterator[str]:
        """The lines that create the parameters and buffers of one module, except those in `made`."""
        form = parameter_form(owner)
        parameters = {k: v for k, v in owner._parameters.items() if v is not None and k not in made}
        if form == "list":
            parameters = dict(sorted(parameters.items(), key=lambda item: int(item[0])))
        for name, value in parameters.items():
            place = reached(code, owner, name)
            tied = id(value) in self.known
            if tied:
                self.ties.append(assigned(code, owner, name, self.known[id(value)]))
            if not tied or form == "list":
                new = f"nn.Parameter({_empty(value)}{'' if value.requires_grad else ', requires_grad=False'})"
                yield f"{code}.append({new})" if form == "list" else assigned(code, owner, name, new)
            if not tied:
                self.known[id(value)] = place
                self.frozen.add(id(value))
        loose = {k: v for k, v in vars(owner).items() if isinstance(v, Tensor)}
        for name, held in [*owner._buffers.items(), *loose.items()]:
            kept = name in owner._buffers and name not in owner._non_persistent_buffers_set
            if held is not None and name not in made and (kept or f"{path}.{name}".lstrip(".") in self.fetched):
                yield f"{code}.register_buffer({literal(name)}, {_empty(held)})"

    def _put(self, owner: nn.Module, code: str, name: str, made: str) -> str:
        """The line that gives a module its child."""
        form = form_of(owner)
        if owner is self.root and form == "list":
            return f"self.append({made})"
        if form == "names":
            return f"{code}.add_module({literal(name)}, {made})"
        return f"{reached(code, owner, name)} = {made}"

    def _own_floats(self, layer: nn.Module) -> set[torch.dtype]:
        """The floating-point dtypes of the tensors that a layer's constructor creates."""
        made = created(layer).state_dict()
        return {t.dtype for name, t in layer.state_dict().items() if name in made and t.is_floating_point()}

    def _cast(self, layer: nn.Module) -> str:
        own = self._own_floats(layer) if len(self.floats) > 1 else set()
        return f".to({literal(own.pop())})" if len(own) == 1 and torch.float32 not in own else ""


def _container(module: nn.Module) -> str:
    """The code that creates what holds the children and parameters of a module that is not a layer."""
    names = children(module)
    if in_order(names):
        return f"nn.ModuleList(nn.Module() for _ in range({len(names)}))"
    if names:
        return "nn.ModuleDict()" if form_of(module) == "dict" else "nn.Module()"
    return {"list": "nn.ParameterList()", "dict": "nn.ParameterDict()"}.get(parameter_form(module), "nn.Module()")


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _tensors(owner: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in {**owner._parameters, **owner._buffers}.items() if value is not None}


def _alike(value: Tensor, made: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a constructor creates such a tensor; its floating-point tensors are converted to `dtype`."""
    if made is None or made.shape != value.shape or isinstance(made, nn.Parameter) != isinstance(value, nn.Parameter):
        return False
    return value.dtype == (dtype if made.is_floating_point() else made.dtype)


def _empty(value: Tensor) -> str:
    sizes = ", ".join(map(str, value.shape)) or "()"
    dtype = "" if value.dtype in (torch.float32,) else f", dtype={literal(value.dtype)}"
    return f"torch.empty({sizes}{dtype})"
