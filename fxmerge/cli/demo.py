"""The demo: merges a trained LeNet-300-100 and measures it on 2,000 Fashion-MNIST images, both in the package."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fxmerge.api import merge
from fxmerge.options import Options
from fxmerge.report.layout import Style, names, numbers, table, wrap

RATIOS = (0.5, 0.6, 0.7, 0.8)
NOTE = (
    "refit brings the outputs close to the original's on all inputs; it does not know the labels. Where pruning hardly "
    "costs accuracy, as at 50 %, the difference of a few images may fall to either side."
)
METHODS = {
    "prune": Options(decomposition="prune", refit="none"),
    "mostsim": Options(decomposition="mostsim", threshold=0.45, refit="none"),  # threshold: t of the paper for LeNet
    "refit": Options(),
}


@dataclass(frozen=True)
class Row:
    """One model: the share of channels that were dropped, the number of parameters, the top-1 accuracy in %."""

    method: str
    ratio: float
    parameters: int
    accuracy: float


class LeNet(nn.Module):
    """LeNet-300-100 (LeCun et al., 1998): 784-300-100-10 with ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.ip1, self.ip2, self.ip3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ip3(torch.relu(self.ip2(torch.relu(self.ip1(x)))))
        return out


def example() -> tuple[nn.Module, Tensor, Tensor]:
    """The model, images (2000, 784) and labels (2000,) that are included in the package."""
    assets = files("fxmerge") / "assets"
    model = LeNet()
    with as_file(assets / "lenet_300_100.safetensors") as path:
        model.load_state_dict(load_file(path))
    with as_file(assets / "fashion_mnist_2000.npz") as path, np.load(path) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
    return model.eval(), (images.flatten(1).float() / 255 - 0.5) / 0.5, labels


def run() -> list[Row]:
    """The accuracy and size of the original, and of each method at each ratio."""
    model, images, labels = example()

    def row(method: str, ratio: float, module: nn.Module) -> Row:
        with torch.no_grad():
            right = (module(images).argmax(1) == labels).double().mean()
        return Row(method, ratio, sum(p.numel() for p in module.parameters()), 100 * float(right))

    rows = [row("original", 0.0, model)]
    for ratio in RATIOS:
        for name, options in METHODS.items():
            rows.append(row(name, ratio, merge(model, images[:2], options, ratio=ratio).module))
    return rows


def as_json(rows: list[Row]) -> str:
    return json.dumps([asdict(r) for r in rows], indent=1)


def as_text(rows: list[Row], width: int = 120, ascii: bool = False) -> str:
    """A table with a row for each ratio and a column for each method."""
    original, *others = rows
    of = {(r.ratio, r.method): r for r in others}
    columns = [
        names("channels dropped", ["0 %", *(f"{100 * ratio:.0f} %" for ratio in RATIOS)]),
        numbers("parameters", [f"{r.parameters:,}" for r in (original, *(of[ratio, "prune"] for ratio in RATIOS))]),
    ]
    for m in METHODS:
        accuracies = [original.accuracy, *(of[ratio, m].accuracy for ratio in RATIOS)]
        columns.append(numbers(f"{m}, accuracy", [f"{accuracy:.2f} %" for accuracy in accuracies]))
    title = "LeNet-300-100 on 2,000 Fashion-MNIST test images, no fine-tuning"
    style = Style(ascii)
    return "\n".join([*table(title, columns, width, style), *wrap(NOTE, width, style)])


def terminal() -> tuple[int, bool]:
    """(the width of the terminal in columns, 120 if there is none; whether stdout takes ASCII characters only)."""
    try:
        "…─".encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return shutil.get_terminal_size((120, 24)).columns, True
    return shutil.get_terminal_size((120, 24)).columns, False
