"""Time and memory of merging, by depth and width: `python -m benchmarks.speed.growth --out docs/growth.md`.

Each synthetic network is merged in its own process, on one thread. Measured are the CPU seconds of the whole call of
`fxmerge.merge`, and its peak memory in excess of the memory that the process had before (libraries, and the model if
it is in memory). Costs grow as parameters ** e; the exponent e is fitted to the larger half of a series, where constant
costs, such as that of tracing, are negligible. `--most` leaves out larger networks.

The series `on disk` merges weights that stay in files and saves the result. Its models are larger than the memory used.
The series `llama` does so with the layers of a 7B Llama and calibration samples, for few layers and samples, from which
the page extrapolates to 32 layers and 128 samples. It needs 10 GiB of disk in TMPDIR and 6 GiB of memory.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
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
from fxmerge.calibration.patches import FEWEST

MOST = 300_000_000  # parameters of a model in memory; four times as many on disk
MIB = 2**20
WORDS, TOKENS = 32000, 512  # of the Llama's vocabulary; in a sample
STORED = 10  # of a sample's residual stream: itself, queries, keys, values and attention's outputs, in two graphs
WHOLE = 32, 128  # the layers and samples that the series `llama` is extrapolated to


@dataclass(frozen=True)
class Net:
    """A stack of layers of equal width: linear, convolutions with BatchNorm, or those of a Llama in bfloat16."""

    kind: str  # "linear", "conv" or "llama"
    depth: int
    width: int
    samples: int = 0  # of TOKENS tokens each, for calibration

    def model(self) -> nn.Module:
        if self.kind == "llama":
            return llama(self.depth, self.width)
        return Stack(self.kind, self.depth, self.width).eval()

    def example(self) -> Any:
        if self.kind == "llama":
            return {"input_ids": torch.randint(WORDS, (2, 16))}
        return torch.randn(2, self.width, *[4, 4][: 2 * (self.kind == "conv")])

    def calibration(self) -> list[dict[str, Tensor]] | None:
        """One sample in a batch."""
        return [{"input_ids": torch.randint(WORDS, (1, TOKENS))} for _ in range(self.samples)] or None


def llama(depth: int, width: int) -> nn.Module:
    """A Llama whose sizes are to each other as those of the one with 7B parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, width // 128)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11008 // 4096,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=WORDS,
        use_cache=False,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


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
MLP = {"keep": {"*.mlp.*": 0.8, "*": 1.0}}
PRUNE = {"refit": "none", "decomposition": "prune"}
SERIES: dict[str, Series] = {
    "depth": Series("depth, linear, width 1024", _depths("linear", 1024, 16, 32, 64, 128, 256, 512, 1024), PLAIN),
    "conv": Series("depth, convolutions, width 256", _depths("conv", 256, 16, 32, 64, 128, 256, 512), PLAIN),
    "refit": Series("depth, linear, width 256, with refit", _depths("linear", 256, 8, 16, 32, 64), {}),
    "prune": Series("width, prune, 8 layers", _widths("linear", 8, 512, 1024, 2048, 4096, 8192), PRUNE),
    "mostsim": Series("width, mostsim, 8 layers", _widths("linear", 8, 512, 1024, 2048, 4096, 8192), PLAIN),
    "disk": Series("on disk, depth, width 1024", _depths("linear", 1024, 64, 128, 256, 512, 1024), PLAIN, on_disk=True),
    "llama": Series(
        "on disk, 7B Llama, with calibration samples",
        (Net("llama", 1, 4096, 4), Net("llama", 1, 4096, 16), Net("llama", 2, 4096, 4)),
        MLP,
        on_disk=True,
    ),
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
    samples: int = 0


def write_layers(net: Net, folder: Path) -> None:
    """Write random weights with one file for each tensor, so that only one tensor is in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = net.model().state_dict()
    for name, value in state.items():
        scale = (2 / value.size(-1)) ** 0.5 if value.dim() > 1 else 0.0
        made = torch.randn(value.shape, generator=generator).mul_(scale) + float(name.endswith("norm.weight"))
        save_file({name: made.to(value.dtype)}, folder / f"{name}.safetensors")


def measure(net: Net, options: Mapping[str, Any], on_disk: bool) -> Point:
    """Merge a network in this process. A small merge comes first, so that imports are not measured."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = Net(net.kind, 2, 128 if net.samples else 8, min(net.samples, 2))
    with tempfile.TemporaryDirectory() as place:
        fxmerge.merge(small.model(), small.example(), calibration=small.calibration(), **options).save(
            Path(place, "small")
        )
        if on_disk:
            files = Path(place, "weights")
            files.mkdir()
            command = [sys.executable, "-m", "benchmarks.speed.growth", "--write", str(files), *_net_flag(net)]
            subprocess.run(command, check=True)
            model = fxmerge.on_disk(net.model, files)
        else:
            model = net.model()
        parameters = sum(p.numel() for p in model.parameters())
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        data = net.calibration()
        before, start = reset_peak_memory(), time.process_time()
        result = fxmerge.merge(model, net.example(), calibration=data, **options)
        if on_disk:
            result.save(Path(place, "merged"))
        seconds = time.process_time() - start
        return Point(net.depth, net.width, parameters, seconds, peak_memory() - before, size, net.samples)


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


def _fitted(found: Mapping[str, Sequence[Point]]) -> dict[str, Sequence[Point]]:
    """The series to which exponents are fitted."""
    return {key: points for key, points in found.items() if key != "llama"}


def extrapolated(points: Sequence[Point]) -> str:
    """The series `llama` in words, for WHOLE layers and samples.

    Two points differ in depth only, and two in the samples only. Time is linear in both. Memory does not depend on
    depth. It grows with the samples, up to the positions that a layer is solved on; from there on, with STORED only.
    """
    one, more, two = points
    layer, start = two.seconds - one.seconds, 2 * one.seconds - two.seconds
    sample = (more.seconds - one.seconds) / (more.samples - one.samples)
    held, full = (more.peak - one.peak) / (more.samples - one.samples), min(WHOLE[1], FEWEST // TOKENS)
    stream = STORED * TOKENS * one.width * 2
    hours = (start + WHOLE[0] * (layer + sample * (WHOLE[1] - one.samples))) / 3600
    peak = max(one.peak, two.peak) + held * (full - one.samples) + stream * (WHOLE[1] - full)
    return textwrap.fill(
        f"Extrapolated, not measured: another layer costs {layer:,.0f} CPU seconds. Another sample costs at most "
        f"{sample:,.1f} of them for each layer (the head is counted with every one), and {held / MIB:,.0f} MiB up to "
        f"{full} samples, where layers are solved on as many positions as they ever are; from there on "
        f"{stream / MIB:,.0f} MiB, {STORED} copies of its residual stream. The {WHOLE[0]} layers of a 7B Llama with "
        f"{WHOLE[1]} samples thus take at most {hours:,.1f} CPU hours on one thread, and {peak / 2**30:,.1f} GiB.",
        120,
    )


def markdown(found: Mapping[str, Sequence[Point]]) -> str:
    """The tables of the page: exponents first, then one table for each series."""
    parts = [] if not _fitted(found) else ["| cost grows as parameters ** e | time | memory |", "|---|---|---|"]
    for key, points in _fitted(found).items():
        slopes = (f"{exponent(points, cost):.2f}" for cost in ("seconds", "peak"))
        parts.append(f"| {SERIES[key].title} | " + " | ".join(slopes) + " |")
    for key, points in found.items():
        parts += ["", f"## {SERIES[key].title}", ""]
        sizes = "model on disk, MiB | peak, MiB" if SERIES[key].on_disk else "model, MiB | peak above the model, MiB"
        if key == "llama":
            parts += [LLAMA, ""]
        parts += [f"| layers | width | parameters | CPU s | {sizes} |", "|---|---|---|---|---|---|"]
        for p in points:
            cells = f"{p.parameters:,}", f"{p.seconds:.2f}", f"{p.model / MIB:,.0f}", f"{p.peak / MIB:,.0f}"
            layers = f"{p.depth}, {p.samples} samples" if p.samples else str(p.depth)
            parts.append(" | ".join([f"| {layers}", str(p.width), *cells]) + " |")
        if key == "llama" and len(points) == 3:
            parts += ["", extrapolated(points)]
    return "\n".join([*parts, ""]).lstrip("\n")


def plot(found: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Time and memory against parameters, both axes logarithmic."""
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    found = _fitted(found)
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


LLAMA = f"""`python -m benchmarks.speed.growth --only llama` measures this table alone: layers of hidden size 4,096 with
an MLP of 11,008 channels, 32 heads and a vocabulary of {WORDS:,}, with random weights in bfloat16. The MLPs keep 80 %
of their channels, and refit runs on calibration samples of {TOKENS} random tokens."""

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
