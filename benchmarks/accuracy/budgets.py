"""Accuracy at a budget of FLOPs: `python -m benchmarks.accuracy.budgets --data DIR --weights DIR --out docs`.

Runs `fxmerge.sweep` with each allocator on ResNet-56 (CIFAR-10), without data, for the inner channels and for all
channels. The tables are written at the end of accuracy.md and the curves to budgets.svg. With --points DIR a stopped
run continues where it stopped. Test images are only used to measure accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

import fxmerge
from benchmarks.accuracy.ratios import BUDGETS
from benchmarks.harness.page import pyplot, save_plot
from benchmarks.networks.data import accuracy
from benchmarks.networks.models import load_checkpoint
from benchmarks.networks.published import BATCH, NETWORKS, find_weights, flags, images, parse

SCOPES = {"internal": "inner channels", "all": "all channels"}
SHARES = (0.7, 0.5, 0.35)
IMAGES = 2000
Curves = Mapping[str, fxmerge.Sweep]  # allocator -> its curve


def curves(
    scope: str, shares: Sequence[float], data: Path, weights: Path, points: Path | None, console: Console
) -> dict[str, fxmerge.Sweep]:
    """The curve of each allocator: top-1 accuracy in % on the first IMAGES test images, at each budget."""
    network = NETWORKS["resnet56"]
    model = network.build().eval()
    metadata = load_checkpoint(find_weights(network, weights), model)
    x, y = images(network, metadata, data, "test", IMAGES)

    def top1(module: object) -> float:
        return accuracy(module, x, y, BATCH)  # type: ignore[arg-type]

    found = {}
    for allocation in fxmerge.ALLOCATORS:
        options = fxmerge.Options(scope=scope, allocation=allocation, threshold=network.threshold)
        folder = points / f"{scope}-{allocation}" if points else None
        found[allocation] = fxmerge.sweep(model, x[:2], shares, top1, options=options, out=folder)
        console.print(f"{scope} {allocation}\n{found[allocation].text()}", markup=False, soft_wrap=True)
    return found


def markdown(results: Mapping[str, Curves]) -> str:
    """One table for each scope. A row is a budget; its cells are accuracy and parameters left with each allocator."""
    lines = [f"{BUDGETS}\n", "## ResNet-56, CIFAR-10, at a budget of FLOPs\n"]
    first = next(iter(next(iter(results.values())).values()))
    original, shares = first.original, " ".join(f"{p.asked:g}" for p in first.points)
    lines.append(
        f"`python -m benchmarks.accuracy.budgets --shares {shares}`; first {IMAGES:,} test images, original "
        f"{original.value:.2f} %; refit, no data. `uniform`: every group keeps the same share; `greedy`: "
        "the share depends on the group's own error.\n"
    )
    if len(first.points) > 1:
        lines.append("![accuracy against FLOPs left](budgets.svg)\n")
    for scope, found in results.items():
        lines.append(f"{SCOPES[scope]}:\n")
        lines.append("| FLOPs left | " + " | ".join(f"{a} | parameters left" for a in found) + " |")
        lines.append("|---" * (1 + 2 * len(found)) + "|")
        for at, share in enumerate(p.asked for p in next(iter(found.values())).points):
            cells = []
            for curve in found.values():
                point = curve.points[at]
                figures = f"{point.value:.2f} | {point.parameters / original.parameters:.1%}"
                cells.append("not met | -" if point.failed else figures)
            lines.append(f"| {share:.0%} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(results: Mapping[str, Curves], path: Path) -> None:
    """Accuracy against FLOPs left, with one panel for each scope."""
    figure, axes = pyplot().subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False, sharey=True)
    for axis, (scope, found) in zip(axes[0], results.items(), strict=True):
        for allocation, curve in found.items():
            met = [p for p in curve.points if not p.failed]
            axis.plot([100 * p.left for p in met], [p.value for p in met], marker="o", label=allocation)
            axis.axhline(curve.original.value, color="grey", linestyle=":")
        axis.set(title=f"ResNet-56, {SCOPES[scope]}", xlabel="FLOPs left, %", ylabel="top-1 accuracy, %")
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    save_plot(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = flags("accuracy.budgets", "Measure accuracy at budgets of FLOPs.", SCOPES)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for accuracy.md and budgets.svg")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="budgets: shares of the original FLOPs")
    parser.add_argument("--points", type=Path, metavar="DIR", help="folder for finished points, to resume a run")
    args = parse(parser, argv)
    console = Console(stderr=True, highlight=False)
    results = {scope: curves(scope, args.shares, args.data, args.weights, args.points, console) for scope in args.only}
    page = args.out / "accuracy.md"
    before = page.read_text(encoding="utf-8").partition(BUDGETS)[0].rstrip() + "\n\n" if page.is_file() else ""
    page.write_text(before + markdown(results), encoding="utf-8")
    if len(args.shares) < 2:
        return  # a single point is not a curve
    try:
        plot(results, args.out / "budgets.svg")
    except ImportError:
        console.print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main()
