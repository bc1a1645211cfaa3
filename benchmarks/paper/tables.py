"""The tables of Neuron Merging (Kim et al., NeurIPS 2020): `python -m benchmarks.paper --data DIR --weights DIR`.

Top-1 accuracy in % without fine-tuning: the network as it is, pruned, and merged by `mostsim` with both of its scales,
beside what the published code gave on the same weights and images. A network without a weights file is left out.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxmerge
from benchmarks.networks.data import DATASETS, accuracy, mean_and_std, normalise
from benchmarks.networks.models import lenet_300_100, load_checkpoint, read_safetensors, resnet56, vgg16, wrn_40_4

CRITERIA = {"l1-norm": "l1", "l2-norm": "l2", "l2-GM": "gm"}
METHODS: dict[str, dict[str, str]] = {
    "prune": {"decomposition": "prune"},
    "reference": {"decomposition": "mostsim", "mostsim_scale": "reference"},
    "exact": {"decomposition": "mostsim", "mostsim_scale": "exact"},
}
PUBLISHED = {"prune": "prune", "reference": "merge"}  # method -> its key in the rows of reference/*.json

VGG_CIFAR10 = (32, 64, 128, 128, *[256] * 9)
VGG_CIFAR100 = (32, 64, 128, 128, 256, 256, 256, 512, 512, 256, 256, 256, 256)

BATCH = 250  # larger ones fall out of the cache: ResNet-56 then takes half as long again

Ratio = float | None  # None: the table has one size of the network, given by its kept widths


@dataclass(frozen=True)
class Network:
    """One network of the tables and its published settings."""

    title: str  # the `model` of the checkpoints' metadata begins with it, but for case and signs
    dataset: str
    build: Callable[[], nn.Module]
    sizes: Callable[[nn.Module, Ratio], dict[str, Any]]  # -> `ratio` or `keep` for fxmerge.merge
    ratios: tuple[Ratio, ...]  # where no reference file says which
    threshold: float = 0.1
    lam: float = 0.85


def equal_share(_: nn.Module, ratio: Ratio) -> dict[str, Any]:
    """Every layer gives up the same share, the rest rounded."""
    return {"ratio": ratio}


def by_stage(prefix: str, widen: int) -> Callable[[nn.Module, Ratio], dict[str, Any]]:
    """Three stages of blocks: the base widths 16, 32, 64 are cut to whole channels, then widened."""

    def sizes(_: nn.Module, ratio: Ratio) -> dict[str, Any]:
        assert ratio is not None
        kept = [int(base * (1 - ratio)) * widen for base in (16, 32, 64)]
        return {"keep": {f"{prefix}{stage}.*": width for stage, width in enumerate(kept, 1)}}

    return sizes


def by_convolution(widths: Sequence[int]) -> Callable[[nn.Module, Ratio], dict[str, Any]]:
    """One kept width for each convolution, in order."""

    def sizes(model: nn.Module, _: Ratio) -> dict[str, Any]:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        return {"keep": dict(zip(names, widths, strict=True))}

    return sizes


NETWORKS: dict[str, Network] = {
    "lenet": Network(
        "LeNet-300-100", "Fashion-MNIST", lenet_300_100, equal_share, (0.5, 0.6, 0.7, 0.8, 0.9), threshold=0.45
    ),
    "vgg16": Network("VGG-16", "CIFAR-10", vgg16, by_convolution(VGG_CIFAR10), (None,)),
    "vgg16-cifar100": Network(
        "VGG-16", "CIFAR-100", lambda: vgg16(100), by_convolution(VGG_CIFAR100), (None,), lam=0.70
    ),
    "resnet56": Network("ResNet-56", "CIFAR-10", resnet56, by_stage("layer", 1), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
    "wrn-40-4": Network("WRN-40-4", "CIFAR-10", wrn_40_4, by_stage("block", 4), (0.3, 0.5), lam=0.80),
}


@dataclass
class Row:
    """One line of a table: top-1 accuracies in %, measured and published, by method."""

    criterion: str
    ratio: Ratio
    measured: dict[str, float]
    published: dict[str, float]

    def agreements(self) -> list[bool]:
        """For each published cell: does the measured one agree to 0.01 %?"""
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


def find_weights(network: Network, folder: Path, preferred: str | None = None) -> Path:
    """The safetensors file whose metadata name this network and data set; `preferred` if there are several.

    FileNotFoundError where there is none.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    def fits(metadata: Mapping[str, str]) -> bool:
        model = plain(metadata.get("model", ""))
        return model.startswith(plain(network.title)) and metadata.get("dataset") == network.dataset

    files = [f for f in sorted(folder.glob("*.safetensors")) if not f.stem.endswith(".resume")]
    found = [f for f in files if fits(read_safetensors(f)[1])]
    if not found:
        raise FileNotFoundError(f"no weights in {folder}")
    return next((f for f in found if f.name == preferred), found[0])


def read_reference(key: str, folder: Path) -> dict[str, Any]:
    """What the published code gave for a network: `folder`/KEY.json, or nothing."""
    path = folder / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def test_set(network: Network, metadata: Mapping[str, str], data: Path, images: int | None) -> tuple[Tensor, Tensor]:
    """The first `images` test images, normalised, and their labels; FileNotFoundError where they are not to be had."""
    if network.dataset not in DATASETS:
        raise FileNotFoundError(f"benchmarks.networks.data has no loader for {network.dataset}")
    x, y = DATASETS[network.dataset](data, "test")
    return normalise(x[:images], *mean_and_std(metadata), flatten=network.dataset == "Fashion-MNIST"), y[:images]


def cells(
    network: Network, model: nn.Module, inputs: Tensor, labels: Tensor, reference: Mapping[str, Any], console: Console
) -> Iterator[Row]:
    """Measure a network's rows: the reference's, else all criteria and ratios. Finished cells go to `console`."""
    wanted = reference.get("rows") or [{"criterion": c, "ratio": r} for c in CRITERIA for r in network.ratios]
    for number, row in enumerate(wanted, 1):
        found = Row(row["criterion"], row["ratio"], {}, {m: row[k] for m, k in PUBLISHED.items() if k in row})
        for method in METHODS:
            start = time.perf_counter()
            chosen = options(network, model, found.criterion, found.ratio, method)
            merged = fxmerge.merge(model, inputs[:2], chosen).module
            name = f"{network.title} {found.criterion} {_percent(found.ratio)} {method}, row {number} of {len(wanted)}"
            with console.status(name):
                found.measured[method] = accuracy(merged, inputs, labels, BATCH)
            console.print(f"{name}: {found.measured[method]:.2f} ({time.perf_counter() - start:.1f} s)", markup=False)
        yield found


def _percent(ratio: Ratio) -> str:
    return "-" if ratio is None else f"{ratio:.0%}"


def table(network: Network, original: float, rows: Sequence[Row], note: str) -> Table:
    """A network's rows, with the published value and the difference beside each cell that has one."""
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


def measuring(name: str, description: str, networks: Iterable[str]) -> argparse.ArgumentParser:
    """The flags of the benchmarks that measure networks on their data sets."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--weights", required=True, type=Path, metavar="DIR", help="folder of safetensors files")
    parser.add_argument("--only", choices=[*networks], nargs="+", default=[*networks], help="default: all networks")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="published cells; default: beside --weights")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    return parser


def measured(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags' values, threads set and the folder of published cells known."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.reference = args.reference or args.weights.resolve().parent / "reference"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = measuring("paper", "The tables of Neuron Merging.", NETWORKS)
    parser.add_argument("--images", type=int, metavar="N", help="only the first N test images: nothing is compared")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    args = measured(parser, argv)
    out, err = Console(width=120, highlight=False), Console(stderr=True, highlight=False)
    results, agreements = [], []
    for key in args.only:
        network = NETWORKS[key]
        published = read_reference(key, args.reference)
        model = network.build().eval()
        try:
            path = find_weights(network, args.weights, published.get("weights"))
            inputs, labels = test_set(network, load_checkpoint(path, model), args.data, args.images)
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
    out.print(f"{sum(agreements)} of {len(agreements)} cells agree to the digit with the published code")
