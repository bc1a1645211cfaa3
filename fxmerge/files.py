"""Files: whole or not at all, by a temporary name in the same folder and a rename. No pickle."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import nn


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a temporary file beside `path`, then put it in place."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        fill(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write(path, lambda there: there.write_text(text, encoding="utf-8"))


def write_weights(path: Path, module: nn.Module) -> None:
    """A module's state_dict as safetensors; a tensor under several names is written under each."""
    tensors = {k: v.detach().clone().contiguous() for k, v in module.state_dict().items()}
    write(path, lambda there: save_file(tensors, there))
