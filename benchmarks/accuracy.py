"""Accuracy after merging without fine-tuning: `python -m benchmarks.accuracy --data DIR --weights DIR --out docs`.

Each network and ratio by every method, beside what the published code gave on the same weights and images; writes
accuracy.md and, with matplotlib, accuracy.svg (accuracy against parameters left). Test images only measure: what refit
calibrates on are the first training images, without their labels.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fxmerge
from benchmarks.data import DATASETS, accuracy, mean_and_std, normalise
from benchmarks.models import load_checkpoint
from benchmarks.paper import BATCH, NETWORKS, Network, find_weights, read_reference

METHODS: dict[str, dict[str, Any]] = {
    "prune": {"decomposition": "prune", "refit": "none", "selection": "l1"},
    "mostsim": {"refit": "none", "selection": "l1"},
    "fold": {"decomposition": "fold", "refit": "none", "selection": "l1"},
    "lstsq": {"decomposition": "lstsq", "refit": "none", "selection": "l1"},
    "refit, no data": {"refit": "synthetic", "selection": "repair"},
    "refit, training images": {"refit": "calibration", "selection": "repair"},
}
CASES: dict[str, tuple[tuple[float, ...], int, int | None]] = {  # ratios, images for calibration, test images
    "lenet": ((0.5, 0.6, 0.7, 0.8), 5000, None),
    "resnet56": ((0.3, 0.5), 500, 2000),
}


@dataclass(frozen=True)
class Cell:
    """One merged model: top-1 accuracy in % and parameters."""

    network: str
    ratio: float
    method: str
    accuracy: float
    parameters: int
    seconds: float


def images(network: Network, metadata: Mapping[str, str], data: Path, split: Any, count: int | None) -> Any:
    """The first `count` images of a split, normalised, and their labels."""
    x, y = DATASETS[network.dataset](data, split)
    return normalise(x[:count], *mean_and_std(metadata), flatten=network.dataset == "Fashion-MNIST"), y[:count]


def cells(key: str, data: Path, weights: Path, scope: str, console: Console) -> tuple[float, list[Cell]]:
    """(accuracy of the original, its merged models)"""
    network, (ratios, calibration, count) = NETWORKS[key], CASES[key]
    model = network.build().eval()
    metadata = load_checkpoint(find_weights(network, weights), model)
    x, y = images(network, metadata, data, "test", count)
    train: Tensor = images(network, metadata, data, "train", calibration)[0]
    found = []
    for ratio in ratios:
        for method, options in METHODS.items():
            given = list(train.split(100)) if method == "refit, training images" else None
            start = time.perf_counter()
            settings = fxmerge.Options(scope=scope, ratio=ratio, threshold=network.threshold, **options)
            merged = fxmerge.merge(model, x[:2], settings, calibration=given).module
            seconds = time.perf_counter() - start
            size = sum(p.numel() for p in merged.parameters())
            found.append(Cell(key, ratio, method, accuracy(merged, x, y, BATCH), size, seconds))
            console.print(f"{key} {ratio:.0%} {method}: {found[-1].accuracy:.2f} ({seconds:.0f} s)", markup=False)
    return accuracy(model, x, y, BATCH), found


def published(key: str, folder: Path) -> dict[float, float]:
    """Ratio -> the best accuracy of any criterion that the published code gave."""
    best: dict[float, float] = {}
    for row in read_reference(key, folder).get("rows", []):
        best[row["ratio"]] = max(best.get(row["ratio"], 0.0), row["merge"])
    return best


def markdown(key: str, original: float, rows: Sequence[Cell], reference: Mapping[float, float]) -> str:
    """A network's table."""
    ratios, calibration, count = CASES[key]
    title = f"## {NETWORKS[key].title}, {NETWORKS[key].dataset}\n\n"
    title += f"{f'first {count:,}' if count else 'all'} test images, original {original:.2f} %; "
    title += f"{calibration:,} unlabelled training images for calibration; published: best criterion, all test images"
    lines = ["| dropped | " + " | ".join([*METHODS, "published code"]) + " |", "|---" * (len(METHODS) + 2) + "|"]
    for ratio in ratios:
        by = {c.method: f"{c.accuracy:.2f}" for c in rows if c.ratio == ratio}
        value = f"{reference[ratio]:.2f}" if ratio in reference else "-"
        lines.append(f"| {ratio:.0%} | " + " | ".join([*(by[m] for m in METHODS), value]) + " |")
    return "\n".join([title, "", *lines, ""])


def plot(results: Mapping[str, tuple[float, list[Cell]]], path: Path) -> None:
    """Accuracy against parameters left, one panel a network."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False)
    for axis, (key, (original, rows)) in zip(axes[0], results.items(), strict=True):
        for method in METHODS:
            chosen = sorted((c for c in rows if c.method == method), key=lambda c: c.parameters)
            axis.plot([c.parameters / 1000 for c in chosen], [c.accuracy for c in chosen], marker="o", label=method)
        axis.axhline(original, color="grey", linestyle=":")
        axis.set(title=NETWORKS[key].title, xlabel="thousand parameters left", ylabel="top-1 accuracy, %")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description="Accuracy without fine-tuning.")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--weights", required=True, type=Path, metavar="DIR", help="folder of safetensors files")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where accuracy.md and .svg go")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES), help="default: all networks")
    parser.add_argument("--scope", choices=("internal", "all"), default="internal")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="published cells; default: beside --weights")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.reference or args.weights.resolve().parent / "reference"
    console = Console(stderr=True, highlight=False)
    results = {key: cells(key, args.data, args.weights, args.scope, console) for key in args.only}
    parts = [markdown(key, *result, published(key, folder)) for key, result in results.items()]
    head = "# Accuracy without fine-tuning\n\nTop-1 accuracy in %. `python -m benchmarks.accuracy` makes this page.\n"
    try:
        plot(results, args.out / "accuracy.svg")
        head += "\n![accuracy against parameters left](accuracy.svg)\n"
    except ImportError:
        console.print("no plot: pip install matplotlib")
    (args.out / "accuracy.md").write_text("\n".join([head, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
