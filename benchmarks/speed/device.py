"""fxmerge on an accelerator, in one run of minutes: `python -m benchmarks.speed.device --out docs`.

Each network has random weights and is merged with random calibration data on the device:

- what the merge costs: seconds, as multiples of one forward pass of the original over the same samples, and memory;
- whether it is the merge of the CPU: both are repeated there with fewer samples and the same seed, and the merged
  models are compared on inputs that refit has not seen;
- how fast the merged model is, eager and compiled.

Without an accelerator everything runs on the CPU, which tests the script. The page names the networks that `--limit`
left no time for. Writes device.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import fxmerge
from benchmarks.harness.memory import peak_memory, reset_peak_memory
from benchmarks.real.one_row import machine
from benchmarks.speed.growth import MIB
from benchmarks.speed.refit import NETWORKS, Network
from benchmarks.speed.vgg16 import random_batch_norm
from fxmerge.graph.compare import difference, outputs
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.latency import compared, wait
from fxmerge.weights.files import write_text

NAMES = ("resnet56", "resnet18", "mobilenet_v2", "llama", "resnet50", "vit_b_16")  # the quickest first
SAMPLES, FEW, BATCH = 128, 16, 16  # of calibration: on the device, for the comparison, in a batch
TIMED = 32  # samples of a batch for the latency
CLOSE = 0.02  # relative difference of the merged models' outputs up to which they agree: sums in another order


@dataclass(frozen=True)
class Row:
    """What was measured of one network.

    seconds, forward: of the merge, and of one forward pass over its samples; peak, model: bytes
    same:       do the merges of device and CPU keep the same channels; off: the relative difference of their outputs
    error:      of the CPU's merge against the original, the scale on which `off` is to be read
    speedup:    of the merged model, by mode
    """

    network: str
    seconds: float
    forward: float
    peak: float
    model: float
    same: bool
    off: float
    error: float
    ideal: float
    speedup: Mapping[str, float]

    @property
    def agrees(self) -> bool:
        """Do device and CPU give the same merge?"""
        return self.same and self.off <= CLOSE


def accelerator() -> torch.device:
    """The device of this machine that torch computes on: CUDA, MPS, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def row(name: str, network: Network, device: torch.device, samples: int, few: int, seconds: float) -> Row:
    """Measure one network. seconds: at most, to time one pair of models"""
    torch.manual_seed(0)
    host = random_batch_norm(network.model())
    model = copy.deepcopy(host).to(device)
    example, options = network.inputs(2), dict(network.options or {})
    data = network.inputs(samples).to(device)
    merged(model, example.to(device), data[:few], options)  # what is imported and compiled on first use
    reset(device)
    before, start = used(device), time.perf_counter()
    result = merged(model, example.to(device), data, options)
    wait({device})
    took, peak = time.perf_counter() - start, used(device) - before
    once = forward(model, data, device)
    here, there = (
        merged(m, example.to(d), network.inputs(few).to(d), options) for m, d in ((model, device), (host, "cpu"))
    )
    unseen = network.inputs(few + 1)[few // 2 :]
    wanted, own = values(there.module, unseen), values(here.module, unseen.to(device))
    original = values(host, unseen)
    batch = network.inputs(TIMED if device.type != "cpu" else 2).to(device)
    modes: dict[str, Callable[[Any], Any]] = {"eager": lambda m: m}
    modes |= {"compile": torch.compile} if device.type != "cpu" else {}
    speedup = {}
    for mode, wrap in modes.items():
        timing = compared(wrap(model), wrap(result.module), (batch,), {}, seconds)
        speedup[mode] = 1 / timing.share
    torch.compiler.reset()
    return Row(
        network=name, seconds=took, forward=once, peak=peak, model=4.0 * sum(p.numel() for p in host.parameters()),
        same=[g.kept for g in here.plan.groups] == [g.kept for g in there.plan.groups],
        off=difference(wanted, own), error=difference(original, wanted),
        ideal=result.report.before.flops / result.report.after.flops, speedup=speedup,
    )  # fmt: skip


def merged(model: nn.Module, example: Tensor, data: Tensor, options: Mapping[str, Any]) -> fxmerge.Result:
    """The merge that is measured."""
    return fxmerge.merge(model, example, calibration=list(data.split(BATCH)), refit="calibration", **options)


def values(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """A model's outputs, on the CPU."""
    return [t.float().cpu() for t in outputs(model, (inputs,))]


def forward(model: nn.Module, data: Tensor, device: torch.device) -> float:
    """Seconds of one forward pass over the samples."""
    with torch.no_grad(), evaluating(model):
        model(data[:BATCH])
        wait({device})
        start = time.perf_counter()
        for batch in data.split(BATCH):
            model(batch)
        wait({device})
    return time.perf_counter() - start


def reset(device: torch.device) -> None:
    """Forgets the peak of the memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak_memory()


def used(device: torch.device) -> float:
    """The peak of the memory since `reset`, in bytes: the device's where torch counts it, else that of the process."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else float(peak_memory())


def described(device: torch.device) -> str:
    """The device, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    return f"{device.type}: {name}, torch {torch.__version__}"


def markdown(rows: Sequence[Row], missing: Sequence[str], device: torch.device, samples: int, few: int) -> str:
    """The page."""
    lines = [
        "# On an accelerator",
        "",
        f"`python -m benchmarks.speed.device --out docs`, {described(device)}. Weights and data are random.",
        "",
        f"Merges with {samples} samples, then device against CPU with {few}: the same channels are kept, and the",
        f"merged models' outputs on unseen inputs differ by less than {CLOSE:.0%}. In brackets, for scale, how far the",
        f"merged model is from the original. Speedups are those of batches of {TIMED if device.type != 'cpu' else 2}.",
        "",
        "| network | seconds | forward passes | peak, MiB | model, MiB | as on the CPU | ideal | speedup |",
        "|---|--:|--:|--:|--:|---|--:|---|",
    ]
    for one in rows:
        verdict = "yes" if one.agrees else "no" if one.same else "no: other channels"
        speeds = ", ".join(f"{mode} {speed:.2f}" for mode, speed in one.speedup.items())
        lines.append(
            f"| {one.network} | {one.seconds:.1f} | {one.seconds / one.forward:.1f} | {one.peak / MIB:,.0f} | "
            f"{one.model / MIB:,.0f} | {verdict}, {one.off:.1e} ({one.error:.2f}) | {one.ideal:.2f} | {speeds} |"
        )
    lines += ["", f"No time was left for {', '.join(missing)}."] if missing else []
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.device", description="Merge on an accelerator.")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for device.md")
    parser.add_argument("--device", type=torch.device, default=accelerator(), help="default: the accelerator, or cpu")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NAMES), help="networks to measure")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of calibration (default: {SAMPLES})")
    parser.add_argument("--few", type=int, default=FEW, help=f"for the comparison with the CPU (default: {FEW})")
    parser.add_argument("--limit", type=float, default=400, metavar="S", help="no network begins later than this")
    parser.add_argument("--seconds", type=float, default=2.0, help="at most, to time one pair of models")
    args = parser.parse_args(argv)
    console, start = Console(stderr=True, highlight=False), time.perf_counter()
    found, missing = list[Row](), list[str]()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        network = NETWORKS[name]
        longest = max((one.seconds for one in found), default=0.0)
        if importlib.util.find_spec(network.library) is None:
            console.print(f"{name} left out: {network.library} is not installed", markup=False)
            continue
        if time.perf_counter() - start + longest > args.limit:
            missing.append(name)
            continue
        found.append(row(name, network, args.device, args.samples, args.few, args.seconds))
        console.print(f"{name}: {found[-1].seconds:.1f} s, off by {found[-1].off:.1e}", markup=False)
        write_text(args.out / "device.md", markdown(found, missing, args.device, args.samples, args.few))
    write_text(args.out / "device.md", markdown(found, missing, args.device, args.samples, args.few))


if __name__ == "__main__":
    main()
