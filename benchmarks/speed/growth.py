"""Time and memory of merging, by depth and width: `python -m benchmarks.speed.growth --out docs/growth.md`.

Each synthetic network is merged in its own process, on one thread. Measured are the CPU seconds of the whole call of
`fxmerge.merge`, and its peak memory in excess of the memory that the process had before (libraries, and the model if
it is in memory). Costs grow as parameters ** e; the exponent e is fitted to the larger half of a series, where constant
costs, such as that of tracing, are negligible. `--most` leaves out larger networks.

The series `on disk` merges weights that stay in files and saves the result. Its models are larger than the memory used.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import fxmerge
from benchmarks.harness.memory import peak_memory, reset_peak_memory
from benchmarks.harness.page import pyplot, save_plot

MOST = 300_000_000  # parameters of a model in memory; four times as many on disk
MIB = 2**20


@dataclass(frozen=True)
class Net:
    """A stack of layers of equal width: linear, or convolutions with BatchNorm."""

    kind: str  # "linear" or "conv"
    depth: int
    width: int

    def model(self) -> nn.Module:
        return Stack(self.kind, self.depth, self.width).eval()

    def example(self) -> Tensor:
        return torch.randn(2, self.width, *[4, 4][: 2 * (self.kind == "conv")])


class Stack(nn.Module):
    def __init__(self, kind: str, depth: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            if kind == "conv":
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            else:
                layers += [nn.Linear(width, width), nn.ReLU()]
        if kind == "conv":
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 10)
        for layer in layers:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(layer.weight)  # activations keep their scale over many layers

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


@dataclass(frozen=True)
class Series:
    """Networks that differ in one size, and the options of their merges."""

    title: str
    nets: tuple[Net, ...]
    options: Mapping[str, Any]
    on_disk: bool = False


def _depths(kind: str, width: int, *depths: int) -> tuple[Net, ...]:
    return tuple(Net(kind, depth, width) for depth in depths)


def _widths(kind: str, depth: int, *widths: int) -> tuple[Net, ...]:
    return tuple(Net(kind, depth, width) for width in widths)


PLAIN = {"refit": "none", "decomposition": "mostsim"}
PRUNE = {"refit": "none", "decomposition": "prune"}
SERIES: dict[str, Series] = {
    "depth": Series("depth, linear, width 1024", _depths("linear", 1024, 16, 32, 64, 128, 256, 512, 1024), PLAIN),
    "conv": Series("depth, convolutions, width 256", _depths("conv", 256, 16, 32, 64, 128, 256, 512), PLAIN),
    "refit": Series("depth, linear, width 256, with refit", _depths("linear", 256, 8, 16, 32, 64), {}),
    "prune": Series("width, prune, 8 layers", _widths("linear", 8, 512, 1024, 2048, 4096, 8192), PRUNE),
    "mostsim": Series("width, mostsim, 8 layers", _widths("linear", 8, 512, 1024, 2048, 4096, 8192), PLAIN),
    "disk": Series("on disk, depth, width 1024", _depths("linear", 1024, 64, 128, 256, 512, 1024), PLAIN, on_disk=True),
}


@dataclass(frozen=True)
class Point:
    """The measurements of one merge."""

    depth: int
    width: int
    parameters: int
    seconds: float  # CPU seconds
    peak: int  # bytes in excess of the memory before the merge
    model: int  # bytes


def write_layers(net: Net, folder: Path) -> None:
    """Write random weights with one file for each tensor, so that only one tensor is in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = net.model().state_dict()
    for name, value in state.items():
        scale = (2 / value.size(-1)) ** 0.5 if value.dim() > 1 else 0.0
        save_file({name: torch.randn(value.shape, generator=generator).mul_(scale)}, folder / f"{name}.safetensors")


def measure(net: Net, options: Mapping[str, Any], on_disk: bool) -> Point:
    """Merge a network in this process. A small merge comes first, so that imports are not measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = Net(net.kind, 2, 8)
    with tempfile.TemporaryDirectory() as place:
        fxmerge.merge(small.model(), small.example(), **options).save(Path(place, "small"))
        if on_disk:
            files = Path(place, "weights")
            files.mkdir()
            command = [sys.executable, "-m", "benchmarks.speed.growth", "--write", str(files), *_net_flag(net)]
            subprocess.run(command, check=True)
            model = fxmerge.on_disk(net.model, files)
        else:
            model = net.model()
        parameters = sum(p.numel() for p in model.parameters())
        before, start = reset_peak_memory(), time.process_time()
        result = fxmerge.merge(model, net.example(), **options)
        if on_disk:
            result.save(Path(place, "merged"))
        seconds = time.process_time() - start
        return Point(net.depth, net.width, parameters, seconds, peak_memory() - before, 4 * parameters)


def _net_flag(net: Net) -> list[str]:
    return ["--net", json.dumps(asdict(net))]


def point(key: str, net: Net) -> Point:
    """Measure a network in its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.speed.growth", "--series", key, *_net_flag(net)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    return Point(**json.loads(done.stdout.splitlines()[-1]))


def exponent(points: Sequence[Point], cost: str) -> float:
    """The exponent e of cost ~ parameters ** e, a least-squares fit of logarithms; NaN for fewer than two points.

    Only the larger half of the points is used.
    """
    larger = sorted(points, key=lambda p: p.parameters)[len(points) // 2 - (len(points) == 2) :]
    if len(larger) < 2:
        return math.nan
    x, y = (np.log([getattr(p, name) for p in larger]) for name in ("parameters", cost))
    return float(np.polyfit(x, y, 1)[0])


def markdown(found: Mapping[str, Sequence[Point]]) -> str:
    """The tables of the page: exponents first, then one table for each series."""
    parts = ["| cost grows as parameters ** e | time | memory |", "|---|---|---|"]
    for key, points in found.items():
        slopes = (f"{exponent(points, cost):.2f}" for cost in ("seconds", "peak"))
        parts.append(f"| {SERIES[key].title} | " + " | ".join(slopes) + " |")
    for key, points in found.items():
        parts += ["", f"## {SERIES[key].title}", ""]
        sizes = "model on disk, MiB | peak, MiB" if SERIES[key].on_disk else "model, MiB | peak above the model, MiB"
        parts += [f"| layers | width | parameters | CPU s | {sizes} |", "|---|---|---|---|---|---|"]
        for p in points:
            cells = f"{p.parameters:,}", f"{p.seconds:.2f}", f"{p.model / MIB:,.0f}", f"{p.peak / MIB:,.0f}"
            parts.append(" | ".join([f"| {p.depth}", str(p.width), *cells]) + " |")
    return "\n".join([*parts, ""])


def plot(found: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Time and memory against parameters, both axes logarithmic."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for key, points in found.items():
        x = [p.parameters for p in points]
        axes[0].loglog(x, [p.seconds for p in points], marker="o", label=SERIES[key].title)
        axes[1].loglog(x, [p.peak / MIB for p in points], marker="o")
    sizes = np.array(sorted(p.parameters for points in found.values() for p in points))
    axes[1].loglog(sizes, 4 * sizes / MIB, color="grey", linestyle=":", label="the model itself")
    axes[0].set(xlabel="parameters", ylabel="CPU seconds", title="time")
    axes[1].set(xlabel="parameters", ylabel="MiB", title="peak memory of the merge")
    axes[1].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    save_plot(figure, path)


HEAD = """# Growth

`python -m benchmarks.speed.growth --out docs/growth.md` writes this page. Each network is merged at ratio 0.5 in its
own process, on one thread. Time is that of the whole call of `fxmerge.merge`, in CPU seconds. Memory is the peak in
excess of the memory that the process had before; it includes the merged model.

Every stage is linear in depth. With width w, the parameters grow as w ** 2, and so does the cost of `prune`. `mostsim`
compares each channel with every other: w ** 2 inner products of w numbers, w ** 3 in total, so that its exponent is at
least 1.5.

![time and memory against parameters](growth.svg)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.growth", description="Merge cost by size.")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="the page; the plot is written next to it")
    parser.add_argument("--only", nargs="+", choices=SERIES, default=list(SERIES), help="series to run")
    parser.add_argument("--most", type=float, default=MOST, help="largest network, in parameters (on disk: 4 times)")
    parser.add_argument("--series", choices=SERIES, help=argparse.SUPPRESS)
    parser.add_argument("--net", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.net:
        net = Net(**json.loads(args.net))
        if args.write:
            write_layers(net, args.write)
        else:
            series = SERIES[args.series]
            print(json.dumps(asdict(measure(net, series.options, series.on_disk))))
        return
    console = Console(stderr=True, highlight=False)
    found: dict[str, list[Point]] = {}
    for key in args.only:
        for net in SERIES[key].nets:
            with torch.device("meta"):
                size = sum(p.numel() for p in net.model().parameters())
            if size <= args.most * (4 if SERIES[key].on_disk else 1):
                one = point(key, net)
                found.setdefault(key, []).append(one)
                console.print(
                    f"{SERIES[key].title}: {one.depth} layers of {one.width}, {one.parameters:,} parameters, "
                    f"{one.seconds:.2f} s, {one.peak / MIB:.0f} MiB",
                    markup=False,
                )
    if args.out is None:
        print(markdown(found), end="")
        return
    try:
        plot(found, args.out.with_suffix(".svg"))
    except ImportError:
        console.print("no plot: pip install matplotlib")
    args.out.write_text(HEAD + "\n" + markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
