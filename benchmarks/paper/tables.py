"""The tables of Neuron Merging (Kim et al., NeurIPS 2020): `python -m benchmarks.paper --data DIR --weights DIR`.

Top-1 accuracy in % without fine-tuning: of the original network, after pruning, and after merging by `mostsim` with
either of its scales, next to the results of the published code on the same weights and images. A network without a
weights file is left out.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxmerge
from benchmarks.networks.data import accuracy
from benchmarks.networks.models import load_checkpoint
from benchmarks.networks.published import (
    BATCH,
    NETWORKS,
    Network,
    Ratio,
    find_weights,
    flags,
    images,
    parse,
    read_reference,
)

CRITERIA = {"l1-norm": "l1", "l2-norm": "l2", "l2-GM": "gm"}
METHODS: dict[str, dict[str, str]] = {
    "prune": {"decomposition": "prune"},
    "reference": {"decomposition": "mostsim", "mostsim_scale": "reference"},
    "exact": {"decomposition": "mostsim", "mostsim_scale": "exact"},
}
PUBLISHED = {"prune": "prune", "reference": "merge"}  # method -> its key in the rows of reference/*.json


@dataclass
class Row:
    """One row of a table: top-1 accuracies in %, measured and published, by method."""

    criterion: str
    ratio: Ratio
    measured: dict[str, float]
    published: dict[str, float]

    def agreements(self) -> list[bool]:
        """For each published cell, whether the measured one is equal when both are rounded to 0.01 %."""
        return [f"{self.measured[m]:.2f}" == f"{value:.2f}" for m, value in self.published.items()]


def options(network: Network, model: nn.Module, criterion: str, ratio: Ratio, method: str) -> fxmerge.Options:
    """The published settings of one cell."""
    return fxmerge.Options(
        **network.sizes(model, ratio),
        **METHODS[method],
        scope="internal",
        refit="none",
        selection=CRITERIA[criterion],
        threshold=network.threshold,
        lam=network.lam,
    )


def cells(
    network: Network, model: nn.Module, inputs: Tensor, labels: Tensor, reference: Mapping[str, Any], console: Console
) -> Iterator[Row]:
    """Measure the rows of `reference`, or every criterion and ratio if it has none. Progress goes to `console`."""
    rows = reference.get("rows") or [{"criterion": c, "ratio": r} for c in CRITERIA for r in network.ratios]
    for number, row in enumerate(rows, 1):
        found = Row(row["criterion"], row["ratio"], {}, {m: row[k] for m, k in PUBLISHED.items() if k in row})
        for method in METHODS:
            start = time.perf_counter()
            chosen = options(network, model, found.criterion, found.ratio, method)
            merged = fxmerge.merge(model, inputs[:2], chosen).module
            name = f"{network.title} {found.criterion} {_percent(found.ratio)} {method}, row {number} of {len(rows)}"
            with console.status(name):
                found.measured[method] = accuracy(merged, inputs, labels, BATCH)
            console.print(f"{name}: {found.measured[method]:.2f} ({time.perf_counter() - start:.1f} s)", markup=False)
        yield found


def _percent(ratio: Ratio) -> str:
    return "-" if ratio is None else f"{ratio:.0%}"


def table(network: Network, original: float, rows: Sequence[Row], note: str) -> Table:
    """The rows of a network; each cell with a published value is followed by that value and by the difference."""
    out = Table(title=f"{network.title} on {network.dataset}, {note}", title_justify="left")
    out.add_column("criterion")
    for name in ("dropped", "original", "prune", "publ.", "diff.", "mostsim reference", "publ.", "diff."):
        out.add_column(name, justify="right")
    out.add_column("mostsim exact", justify="right")
    for row in rows:
        values = []
        for method in METHODS:
            values.append(f"{row.measured[method]:.2f}")
            if method in row.published:
                values += [f"{row.published[method]:.2f}", f"{row.measured[method] - row.published[method]:+.2f}"]
            elif method in PUBLISHED:
                values += ["", ""]
        out.add_row(row.criterion, _percent(row.ratio), f"{original:.2f}", *values)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = flags("paper", "Measure the tables of Neuron Merging.", NETWORKS)
    parser.add_argument("--images", type=int, metavar="N", help="only the first N test images, without comparison")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    args = parse(parser, argv)
    out, err = Console(width=120, highlight=False), Console(stderr=True, highlight=False)
    results, agreements = [], []
    for key in args.only:
        network = NETWORKS[key]
        published = read_reference(key, args.reference)
        model = network.build().eval()
        try:
            path = find_weights(network, args.weights, published.get("weights"))
            inputs, labels = images(network, load_checkpoint(path, model), args.data, "test", args.images)
        except (FileNotFoundError, ValueError) as error:
            out.print(f"{network.title} on {network.dataset} left out: {error}\n", markup=False)
            continue
        if args.images is not None or path.name != published.get("weights"):
            published = {"rows": [{k: row[k] for k in ("criterion", "ratio")} for row in published.get("rows", [])]}
        original = accuracy(model, inputs, labels, BATCH)
        note = f"{len(labels):,} test images, {path.name}"
        if "original" in published:
            note += f", published original {published['original']:.2f}"
        rows = list(cells(network, model, inputs, labels, published, err))
        out.print(table(network, original, rows, note), "")
        agreements += [same for row in rows for same in row.agreements()]
        results.append(
            {"network": key, "weights": path.name, "images": len(labels), "original": original,
             "rows": [asdict(row) for row in rows]}
        )  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    out.print(f"{sum(agreements)} of {len(agreements)} cells agree with the published code to 0.01 %")
