"""The networks of the tables in Neuron Merging (Kim et al., NeurIPS 2020): settings, checkpoints, images and flags.

benchmarks.paper, benchmarks.accuracy and benchmarks.peers measure these networks.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks.data import DATASETS, Split, mean_and_std, normalise
from benchmarks.networks.models import lenet_300_100, read_safetensors, resnet56, vgg16, wrn_40_4

VGG_CIFAR10 = (32, 64, 128, 128, *[256] * 9)
VGG_CIFAR100 = (32, 64, 128, 128, 256, 256, 256, 512, 512, 256, 256, 256, 256)

BATCH = 250  # images per forward pass; ResNet-56 takes 1.5 times as long with batches that do not fit the cache

Ratio = float | None  # None: the table has one size of the network, given by its kept channels


@dataclass(frozen=True)
class Network:
    """One network of the tables and its published settings."""

    title: str  # the `model` in a checkpoint's metadata starts with it, ignoring case and punctuation
    dataset: str
    build: Callable[[], nn.Module]
    sizes: Callable[[nn.Module, Ratio], dict[str, Any]]  # returns `ratio` or `keep` for fxmerge.merge
    ratios: tuple[Ratio, ...]  # used when there is no reference file
    threshold: float = 0.1
    lam: float = 0.85


def equal_share(_: nn.Module, ratio: Ratio) -> dict[str, Any]:
    """Every layer drops the same share of its channels."""
    return {"ratio": ratio}


def by_stage(prefix: str, widen: int) -> Callable[[nn.Module, Ratio], dict[str, Any]]:
    """Three stages of blocks: (1 - ratio) of the base widths 16, 32 and 64, rounded down, times `widen`."""

    def sizes(_: nn.Module, ratio: Ratio) -> dict[str, Any]:
        assert ratio is not None
        kept = [int(base * (1 - ratio)) * widen for base in (16, 32, 64)]
        return {"keep": {f"{prefix}{stage}.*": width for stage, width in enumerate(kept, 1)}}

    return sizes


def by_convolution(widths: Sequence[int]) -> Callable[[nn.Module, Ratio], dict[str, Any]]:
    """One number of kept channels for each convolution, in order."""

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


def find_weights(network: Network, folder: Path, preferred: str | None = None) -> Path:
    """The safetensors file whose metadata name this network and data set.

    If several files fit, the one named `preferred` is chosen, or else the first. FileNotFoundError if none fits.
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
    """The results of the published code for a network, from `folder`/KEY.json; empty if there is no such file."""
    path = folder / f"{key}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def images(
    network: Network, metadata: Mapping[str, str], data: Path, split: Split, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """The first `count` images of a split (None: all), normalised, and their labels.

    FileNotFoundError if the data set is not in `data`, or if there is no loader for it.
    """
    if network.dataset not in DATASETS:
        raise FileNotFoundError(f"benchmarks.networks.data has no loader for {network.dataset}")
    x, y = DATASETS[network.dataset](data, split)
    return normalise(x[:count], *mean_and_std(metadata), flatten=network.dataset == "Fashion-MNIST"), y[:count]


def flags(command: str, description: str, choices: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with the flags of the benchmarks that measure these networks: `python -m benchmarks.COMMAND`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{command}", description=description)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--weights", required=True, type=Path, metavar="DIR", help="folder of safetensors files")
    parser.add_argument("--only", choices=[*choices], nargs="+", default=[*choices], help="default: all of them")
    parser.add_argument(
        "--reference", type=Path, metavar="DIR", help="results of the published code; default: WEIGHTS/../reference"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments, set the number of threads, and fill in the default of --reference."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.reference = args.reference or args.weights.resolve().parent / "reference"
    return args
