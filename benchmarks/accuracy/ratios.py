"""Accuracy after merging without fine-tuning: `python -m benchmarks.accuracy --data DIR --weights DIR --out docs`.

Measures every network at every ratio with every method, next to the results of the published code on the same weights
and images. Writes accuracy.md and, if matplotlib is installed, accuracy.svg (accuracy against parameters left). Test
images are only used to measure accuracy; the calibration data of refit are the first training images, without labels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import fxmerge
from benchmarks.harness.page import pyplot, save_plot
from benchmarks.networks.data import accuracy
from benchmarks.networks.models import load_checkpoint
from benchmarks.networks.published import (
    BATCH,
    NETWORKS,
    VGG_CIFAR10,
    Ratio,
    by_convolution,
    equal_share,
    find_weights,
    flags,
    images,
    parse,
    read_reference,
)

METHODS: dict[str, dict[str, Any]] = {
    "prune": {"decomposition": "prune", "refit": "none", "selection": "l1"},
    "mostsim": {"decomposition": "mostsim", "refit": "none", "selection": "l1"},
    "fold": {"decomposition": "fold", "refit": "none", "selection": "l1"},
    "lstsq": {"decomposition": "lstsq", "refit": "none", "selection": "l1"},
    "refit, no data": {},  # the defaults
    "refit, training images": {"refit": "calibration"},
}

BUDGETS = "<!-- benchmarks.accuracy.budgets -->"  # budgets.py writes what follows this line in accuracy.md


@dataclass(frozen=True)
class Case:
    """What one table measures."""

    network: str  # a key of NETWORKS
    scope: str
    ratios: tuple[float, ...]
    calibration: int  # number of training images
    images: int | None = None  # number of test images; None: all of them
    sizes: Callable[[nn.Module, Ratio], dict[str, Any]] = equal_share
    channels: str = ""  # which channels are dropped; "": those of the scope
    dropped: Mapping[float, str] = field(default_factory=dict)  # how a row is named; else the share of its channels


def parts_of_vgg16(model: nn.Module, ratio: Ratio) -> dict[str, Any]:
    """The paper's widths, of which each convolution drops the share `ratio`."""
    assert ratio is not None
    return by_convolution([round(width * (1 - ratio)) for width in VGG_CIFAR10])(model, None)


CASES: dict[str, Case] = {
    "lenet": Case("lenet", "internal", (0.5, 0.6, 0.7, 0.8), 5000),
    "resnet56": Case("resnet56", "internal", (0.3, 0.5), 500, 2000),
    "resnet56-all": Case("resnet56", "all", (0.3,), 500, 2000),
    "vgg16": Case(
        "vgg16", "internal", (0.0, 0.5), 512, sizes=parts_of_vgg16, channels="the paper's widths and half of them",
        dropped={0.0: "64 % of the parameters", 0.5: "91 % of the parameters"},
    ),
}


@dataclass(frozen=True)
class Cell:
    """One merged model: top-1 accuracy in %, number of parameters, and seconds of the merge."""

    ratio: float
    method: str
    accuracy: float
    parameters: int
    seconds: float


def cells(case: Case, data: Path, weights: Path, console: Console) -> tuple[float, list[Cell]]:
    """The accuracy of the original model in %, and its merged models."""
    network = NETWORKS[case.network]
    model = network.build().eval()
    metadata = load_checkpoint(find_weights(network, weights), model)
    x, y = images(network, metadata, data, "test", case.images)
    train = images(network, metadata, data, "train", case.calibration)[0]
    found = []
    for ratio in case.ratios:
        for method, options in METHODS.items():
            batches = list(train.split(100)) if method == "refit, training images" else None
            start = time.perf_counter()
            options = {"threshold": network.threshold, "lam": network.lam, **case.sizes(model, ratio), **options}
            settings = fxmerge.Options(scope=case.scope, **options)
            merged = fxmerge.merge(model, x[:2], settings, calibration=batches).module
            seconds = time.perf_counter() - start
            size = sum(p.numel() for p in merged.parameters())
            found.append(Cell(ratio, method, accuracy(merged, x, y, BATCH), size, seconds))
            cell = f"{case.network} {case.scope} {ratio:.0%} {method}"
            console.print(f"{cell}: {found[-1].accuracy:.2f} ({seconds:.0f} s)", markup=False)
    return accuracy(model, x, y, BATCH), found


def published(case: Case, folder: Path) -> dict[float, float]:
    """The best accuracy of the published code over all criteria, by ratio; empty unless `scope` is "internal".

    The published code only merges inner channels.
    """
    best: dict[float, float] = {}
    own = case.scope == "internal" and case.sizes is equal_share
    for row in read_reference(case.network, folder).get("rows", []) if own else []:
        best[row["ratio"]] = max(best.get(row["ratio"], 0.0), row["merge"])
    return best


def markdown(case: Case, original: float, rows: Sequence[Cell], reference: Mapping[float, float]) -> str:
    """The section of the page on one case."""
    network, channels = NETWORKS[case.network], "inner channels" if case.scope == "internal" else "all channels"
    channels = case.channels or channels
    title = f"## {network.title}, {network.dataset}, {channels}\n\n"
    title += f"{f'first {case.images:,}' if case.images else 'all'} test images, original {original:.2f} %; "
    title += f"{case.calibration:,} unlabelled training images for calibration; "
    title += "published: best of all criteria, all images"
    lines = ["| dropped | " + " | ".join([*METHODS, "published code"]) + " |", "|---" * (len(METHODS) + 2) + "|"]
    for ratio in case.ratios:
        by = {c.method: f"{c.accuracy:.2f}" for c in rows if c.ratio == ratio}
        value = f"{reference[ratio]:.2f}" if ratio in reference else "-"
        row = case.dropped.get(ratio, f"{ratio:.0%}")
        lines.append(f"| {row} | " + " | ".join([*(by[m] for m in METHODS), value]) + " |")
    return "\n".join([title, "", *lines, ""])


def plot(results: Mapping[str, tuple[float, list[Cell]]], path: Path) -> None:
    """Accuracy against parameters left, with one panel for each case."""
    figure, axes = pyplot().subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False)
    for axis, (key, (original, rows)) in zip(axes[0], results.items(), strict=True):
        for method in METHODS:
            chosen = sorted((c for c in rows if c.method == method), key=lambda c: c.parameters)
            axis.plot([c.parameters / 1000 for c in chosen], [c.accuracy for c in chosen], marker="o", label=method)
        axis.axhline(original, color="grey", linestyle=":")
        title = f"{NETWORKS[CASES[key].network].title}, {CASES[key].scope}"
        axis.set(title=title, xlabel="thousand parameters left", ylabel="top-1 accuracy, %")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    save_plot(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = flags("accuracy", "Measure accuracy after merging without fine-tuning.", CASES)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for accuracy.md and .svg")
    args = parse(parser, argv)
    console = Console(stderr=True, highlight=False)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {key: cells(CASES[key], args.data, args.weights, console) for key in args.only}
    parts = [markdown(CASES[key], *found, published(CASES[key], args.reference)) for key, found in results.items()]
    head = "# Accuracy without fine-tuning\n\nTop-1 accuracy in %. `python -m benchmarks.accuracy` writes this page.\n"
    try:
        plot(results, args.out / "accuracy.svg")
        head += "\n![accuracy against parameters left](accuracy.svg)\n"
    except ImportError:
        console.print("no plot: pip install matplotlib")
    page = args.out / "accuracy.md"
    kept = page.read_text(encoding="utf-8").partition(BUDGETS) if page.is_file() else ("", "", "")
    page.write_text("\n".join([head, *parts]) + "\n" * bool(kept[1]) + kept[1] + kept[2], encoding="utf-8")
