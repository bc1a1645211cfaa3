"""Run as a program: load every saved folder by its own model.py, with only torch, torchvision and timm available.

usage: saved_alone.py FOLDER ...; each holds inputs.pt. Writes outputs.pt beside it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import Any


class Forbid(importlib.abc.MetaPathFinder):
    """A machine that has torch, torchvision and timm, but neither fxmerge nor what it is built with."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.split(".")[0] in ("fxmerge", "safetensors", "transformers", "nets", "netmaking"):
            raise ImportError(f"{fullname} is not here")


def main() -> None:
    sys.meta_path.insert(0, Forbid())
    import torch

    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        spec = importlib.util.spec_from_file_location("model", folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        args, kwargs = torch.load(folder.parent / "inputs.pt")
        with torch.no_grad():
            given = module.load()(*args, **kwargs)
        torch.save(given, folder.parent / "outputs.pt")


main()
