"""The error for a file of weights that cannot be read."""

from __future__ import annotations

from pathlib import Path

from fxmerge.errors import FxMergeError


def unreadable(path: Path, error: Exception) -> FxMergeError:
    """The error for a file that is not a safetensors file. For a file of torch.save, it says how to convert it."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:
        start = b""
    if start != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle
        return FxMergeError(f"cannot read weights from {path}: {error}")
    made = str(path.with_suffix(".safetensors"))
    return FxMergeError(
        f"{path} is a pickle written by torch.save, not a safetensors file; fxmerge reads no pickles, as reading one "
        "can run code. Convert its state_dict once:\n"
        "    import torch; from safetensors.torch import save_file\n"
        f"    save_file({{k: v.clone() for k, v in torch.load({str(path)!r}, weights_only=True).items()}}, {made!r})"
    )
