"""A program that loads saved folders by their own model.py, where only torch, torchvision and timm can be imported.

usage: saved_alone.py FOLDER ...; reads inputs.pt and writes outputs.pt in the parent of each folder.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import Any


class Forbid(importlib.abc.MetaPathFinder):
    """Makes fxmerge, its dependencies other than torch, and the tests impossible to import."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.split(".")[0] in ("fxmerge", "safetensors", "transformers", "tests"):
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
