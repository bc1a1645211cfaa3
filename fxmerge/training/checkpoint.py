"""What a training loop needs to go on after an interruption, in one safetensors file without pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from fxmerge.errors import FxMergeError
from fxmerge.weights.files import write_tensors

VERSION = "1"


def save(path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, progress: Mapping[str, Any]) -> None:
    """Writes the states of modules and of an optimizer, and plain values, under a temporary name, then renames."""
    tensors = {f"{n}/{k}": t.contiguous() for n, module in modules.items() for k, t in module.state_dict().items()}
    state = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for key, held in state["state"].items():
        for name, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value.contiguous()
            else:
                numbers.setdefault(str(key), {})[name] = value
    plain = {"groups": state["param_groups"], "numbers": numbers, "progress": dict(progress)}
    write_tensors(path, tensors, {"fxmerge_training": VERSION, "state": json.dumps(plain)})


def restore(path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer) -> dict[str, Any]:
    """Puts the states back, and returns the plain values. Raises FxMergeError for another file or other modules."""
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise FxMergeError(f"cannot read the checkpoint {path}: {error}; delete it to begin anew") from error
    if metadata.get("fxmerge_training") != VERSION:
        raise FxMergeError(f"{path} is not a checkpoint of this version of fxmerge; delete it to begin anew")
    plain = json.loads(metadata["state"])
    state: dict[int, dict[str, Any]] = {int(key): dict(held) for key, held in plain["numbers"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, key, slot = name.split("/")
            state.setdefault(int(key), {})[slot] = value
    try:
        for name, module in modules.items():
            start = f"{name}/"
            module.load_state_dict({k[len(start) :]: t for k, t in tensors.items() if k.startswith(start)})
        optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
    except (RuntimeError, ValueError, KeyError) as error:
        raise FxMergeError(
            f"the checkpoint {path} is of another model or another optimizer: {error}; delete it to begin anew"
        ) from error
    found: dict[str, Any] = plain["progress"]
    return found
