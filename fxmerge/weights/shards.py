"""Weights that are divided among processes by `fully_shard` (FSDP2): fetched one at a time, and divided again.

`undivided` makes a plain copy of a model whose weights are `StoredTensor` objects. Each process keeps its rows, and an
op on a weight gathers the rows of all processes. All processes must therefore run the same ops in the same order, which
is checked each time. `divided` calls `fully_shard` on a merged model as it was called on the original.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from fxmerge.errors import FxMergeError
from fxmerge.ir.capture import ShardCall, Sharding
from fxmerge.weights import stored_tensor
from fxmerge.weights.by_path import Weights
from fxmerge.weights.copy import deep_copy
from fxmerge.weights.stored_tensor import Backing, StoredTensor

_DTENSOR = ("torch.distributed.tensor", "torch.distributed._tensor")
_OF_FSDP = ("__composable_api", "_is_fsdp_managed_module", "_fsdp_use_orig_params")  # fields that fully_shard adds


def is_divided(value: Tensor) -> bool:
    """Whether each process holds a part of the tensor, which is a DTensor."""
    return type(value).__module__.startswith(_DTENSOR)


def undivided(model: nn.Module) -> tuple[nn.Module, Sharding | None]:
    """A copy of a model in its own classes that fetches its weights from all processes; the model if it is whole.

    Raises FxMergeError where weights are divided in another way than by `fully_shard` along their first axis.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for path, module in modules.items():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise FxMergeError(
                f"{path or 'the model'} is wrapped in FullyShardedDataParallel, which hides its weights; merge the "
                "model before it is wrapped, or divide it by fully_shard"
            )
    paths = [path for path, m in modules.items() if _is_fsdp(m)]
    for path in paths:
        modules[path].reshard()  # after a forward, the outermost weights are whole until then
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parts: dict[str, Any] = {path: value for path, value in tensors.items() if is_divided(value)}
    for path, value in parts.items():
        if not any(_within(path, outer) for outer in paths) or not _by_rows(value):
            raise FxMergeError(
                f"{path} is divided among processes as {_placements(value)}; fxmerge takes models that fully_shard "
                "(FSDP2) divided along the first axis. For others, save the full state_dict "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) to "
                "safetensors, and merge fxmerge.on_disk(make, files), which reads one layer at a time"
            )
    if not parts:
        return model, None
    calls = []
    for path in reversed(paths):
        mesh = next((v.device_mesh for name, v in parts.items() if _within(name, path)), None)
        if mesh is not None:
            calls.append(ShardCall(path=path, mesh=mesh, settings=_settings(modules[path])))
    _count_alike(next(iter(parts.values())))
    with _plain(model):
        copied = deep_copy(model, tensors.values())
    into = Weights(copied)
    for path, value in parts.items():
        into.replace(path, _stored(value))
    return copied, Sharding(calls=tuple(calls))


def divided(module: nn.Module, sharding: Sharding | None) -> nn.Module:
    """A copy of a merged model on which `fully_shard` is called as on the original; the model itself if that was whole.

    In a graph, only the modules that it calls fetch their own weights. The outermost one fetches all others.
    """
    if sharding is None:
        return module
    from torch.distributed.fsdp import fully_shard  # takes a second

    copied = deep_copy(module, [*module.parameters(), *module.buffers()])
    for path in _units(copied, [call.path for call in sharding.calls]):
        near = next(call for call in sharding.calls if _within(path, call.path) or call is sharding.calls[-1])
        fully_shard(copied.get_submodule(path), mesh=near.mesh, **near.settings)
    return copied


@contextmanager
def written_once(path: str | Path, sharding: Sharding | None) -> Iterator[Path]:
    """The path to write to. Of several processes, the first has this path, and the others one in a temporary folder.

    So all of them do the same, and go on when it is done.
    """
    if sharding is None:
        yield Path(path)
        return
    mesh = sharding.calls[-1].mesh
    with tempfile.TemporaryDirectory(prefix="fxmerge-") as aside:
        yield Path(aside, Path(path).name) if any(mesh.get_coordinate()) else Path(path)
    for axis in range(mesh.ndim):
        distributed.barrier(group=mesh.get_group(axis))


class _Rows:
    """The place of a tensor of which each process of a group holds some rows, as `torch.chunk` divides them."""

    made = 0  # so many, in all processes alike

    def __init__(self, held: Tensor, shape: tuple[int, ...], group: Any) -> None:
        """held: the rows of this process"""
        self.held, self.shape, self.group = held, shape, group
        self.dtype, self.device = held.dtype, held.device
        self.number = _Rows.made = _Rows.made + 1  # the same in all processes, if they do the same

    def read(self) -> Tensor:
        size = distributed.get_world_size(self.group)
        with torch.no_grad(), _disable_current_modes():
            _check_same(self.number, self.device, self.group)
            rows, each = -(-self.shape[0] // size), math.prod(self.shape[1:])
            padded = self.held.new_zeros(rows * each)
            padded[: self.held.numel()] = self.held.flatten()
            whole = padded.new_empty(size, rows * each)
            distributed.all_gather([_bytes(part) for part in whole], _bytes(padded), group=self.group)
            return whole.flatten()[: math.prod(self.shape)].view(self.shape)

    def __str__(self) -> str:
        return f"{len(self.held)} of {self.shape[0]} rows in this process"


@dataclass(frozen=True)
class _Shards:
    """Divides new values among the processes of a group. All take those of the first process."""

    group: Any
    device: torch.device

    def write(self, value: Tensor) -> _Rows:
        with torch.no_grad():
            whole = value.detach().to(self.device, copy=True).contiguous()
            first = distributed.get_global_rank(self.group, 0)
            distributed.broadcast(_bytes(whole), src=first, group=self.group)
            size, rank = distributed.get_world_size(self.group), distributed.get_rank(self.group)
            rows = -(-len(whole) // size)
            return _Rows(whole[rank * rows : (rank + 1) * rows].clone(), tuple(whole.shape), self.group)


def _stored(value: Any) -> Tensor:
    """A DTensor as a tensor that is fetched when it is needed; a small one is fetched now."""
    group = value.device_mesh.get_group(value.device_mesh.ndim - 1)
    held = value.to_local().detach()
    region = _Rows(held.reshape(-1, *value.shape[1:]), tuple(value.shape), group)
    if value.numel() * value.dtype.itemsize < stored_tensor.SMALL:
        return region.read()
    return StoredTensor(Backing(region, region.dtype, _Shards(group, region.device)))


def _count_alike(value: Any) -> None:
    """Lets all processes number the places of tensors alike, whatever they did before."""
    most = torch.tensor([_Rows.made], device=value.device)
    for axis in range(value.device_mesh.ndim):
        distributed.all_reduce(most, distributed.ReduceOp.MAX, value.device_mesh.get_group(axis))
    _Rows.made = int(most)


def _bytes(value: Tensor) -> Tensor:
    return value.view(-1).view(torch.uint8)


def _check_same(number: int, device: torch.device, group: Any) -> None:
    """Raises FxMergeError unless all processes are about to fetch the same tensor."""
    own = torch.tensor([number], device=device)
    all_of_them = own.new_empty(distributed.get_world_size(group), 1)
    distributed.all_gather([*all_of_them], own, group=group)
    if bool((all_of_them != number).any()):
        raise FxMergeError(
            "the processes do not fetch the same weight of a model that is divided among them; give all of them the "
            "same options and example inputs, and calibration data of the same shapes"
        )


def _is_fsdp(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__[:2])


def _within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _by_rows(value: Any) -> bool:
    *others, last = value.placements
    return bool(last.is_shard(0)) and len(others) < 2 and all(p.is_replicate() for p in others)


def _placements(value: Any) -> str:
    return ", ".join(map(repr, value.placements))


def _settings(module: Any) -> Mapping[str, Any]:
    """What `fully_shard` was told of mixed precision. It has no public way to ask for it."""
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    policy = getattr(state, "_mp_policy", None)
    return {} if policy is None else {"mp_policy": policy}


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """In this context, a model has the classes, fields and hooks that it had before `fully_shard`."""
    before = [(m, type(m), m.__dict__) for m in nn.Module.modules(model)]
    try:
        for module, cls, fields in before:
            own = {name: _without_hooks(v) for name, v in fields.items() if not name.startswith(_OF_FSDP)}
            object.__setattr__(module, "__dict__", own)
            if _is_fsdp(module):
                module.__class__ = cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)]
        yield
    finally:
        for module, cls, fields in before:
            module.__class__ = cls
            object.__setattr__(module, "__dict__", fields)


def _without_hooks(value: Any) -> Any:
    """A dict of hooks without those of `fully_shard`; any other value as it is."""
    if not isinstance(value, dict) or not any(map(_of_fsdp, value.values())):
        return value
    return type(value)((key, hook) for key, hook in value.items() if not _of_fsdp(hook))


def _of_fsdp(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    found: Any = getattr(hook, "__module__", None) if callable(hook) and not isinstance(hook, nn.Module) else None
    return isinstance(found, str) and found.startswith("torch.distributed.fsdp")


def _units(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """The modules that fetch their weights together, from the inside out."""
    modules = dict(module.named_modules())
    graphs = {path: m for path, m in modules.items() if isinstance(m, fx.GraphModule)}
    found = {p for p in paths if p in modules and not any(_within(p, graph) for graph in graphs)}
    for path, graph in graphs.items():
        found |= {f"{path}.{name}" if path else name for name in _called(graph)} | {path}
    return sorted(found, key=lambda path: (-path.count(".") - bool(path), path))


def _called(graph: fx.GraphModule) -> Iterator[str]:
    """The modules that a graph calls, and whose weights nothing else reads."""
    holders: dict[int, set[str]] = {}
    for path, value in graph.named_parameters(remove_duplicate=False):
        holders.setdefault(id(value), set()).add(path)
    fetched = [str(node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    for target in dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "call_module"):
        own = {id(v) for v in graph.get_submodule(target).parameters()}
        inside: Callable[[str], bool] = functools.partial(_within, outer=target)
        if own and all(all(map(inside, holders[i])) for i in own) and not any(map(inside, fetched)):
            yield target
