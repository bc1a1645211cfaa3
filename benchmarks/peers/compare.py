"""fxmerge compared with its peers: `python -m benchmarks.peers --data DIR --weights DIR --out docs` writes peers.md.

All methods run on the same machine, weights and test images, keep the same number of channels in the same layers, and
do not fine-tune. Torch-Pruning (from PyPI) and the published Neuron Merging keep the channels with the largest l1
norms. Every merge runs in its own process, so that its peak of memory can be measured; imports and loading come first
and are not counted.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from benchmarks.accuracy.ratios import CASES, Case
from benchmarks.harness.memory import peak_memory, reset_peak_memory
from benchmarks.networks.data import accuracy
from benchmarks.networks.models import load_checkpoint
from benchmarks.networks.published import BATCH, NETWORKS, Network, find_weights, flags, images, parse
from benchmarks.paper.neuron_merging import chains, largest, neuron_merging
from fxmerge.weights.files import write_text

NAMES = ("lenet", "resnet56")


@dataclass(frozen=True)
class Task:
    """The arguments of every method."""

    network: Network
    model: nn.Module
    example: Tensor  # two images
    counts: Mapping[str, int]  # layer -> number of channels to keep
    train: Tensor  # training images, without labels


def by_fxmerge(**options: Any) -> Callable[[Task], nn.Module]:
    """A method that merges with these options."""

    def run(task: Task) -> nn.Module:
        batches = list(task.train.split(100)) if options.get("refit") == "calibration" else None
        keep = dict(task.counts)
        settings = fxmerge.Options(scope="internal", keep=keep, threshold=task.network.threshold, **options)
        return fxmerge.merge(task.model, task.example, settings, calibration=batches).module

    return run


def by_torch_pruning(task: Task) -> nn.Module:
    """Drop the channels with the smallest l1 norms through Torch-Pruning's dependency graph, like its own pruners."""
    import torch_pruning as tp

    kept = {name: largest(task.model.get_submodule(name), count) for name, count in task.counts.items()}
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(task.model, example_inputs=task.example)
        for name, channels in kept.items():
            layer = task.model.get_submodule(name)
            dropped = sorted({*range(len(layer.weight))} - {*channels.tolist()})  # type: ignore[arg-type]
            drop = tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
            graph.get_pruning_group(layer, drop, idxs=dropped).prune()
    return task.model


METHODS: dict[str, Callable[[Task], nn.Module]] = {
    "fxmerge": by_fxmerge(),
    "fxmerge, training images": by_fxmerge(refit="calibration"),
    "fxmerge, no refit": by_fxmerge(
        refit="none", selection="l1", decomposition="mostsim", mostsim_scale="reference"
    ),
    "fxmerge, prune only": by_fxmerge(refit="none", selection="l1", decomposition="prune"),
    "Torch-Pruning": by_torch_pruning,
    "neuron merging, published": lambda task: neuron_merging(task.model, task.counts, task.network.threshold),
}


def make_task(case: Case, ratio: float, data: Path, weights: Path) -> Task:
    """Load the network, its weights and its training images; every layer keeps `1 - ratio` of its channels."""
    network = NETWORKS[case.network]
    model = network.build().eval()
    metadata = load_checkpoint(find_weights(network, weights), model)
    train = images(network, metadata, data, "train", case.calibration)[0]
    widths = {name: len(model.get_submodule(name).weight) for name, _, _ in chains(model)}  # type: ignore[arg-type]
    return Task(network, model, train[:2], {n: max(1, round(w * (1 - ratio))) for n, w in widths.items()}, train)


def measure(case: Case, ratio: float, method: str, data: Path, weights: Path) -> dict[str, float]:
    """Run one method in this process: seconds, peak memory in MiB, parameters, FLOPs, and accuracy in %."""
    task = make_task(case, ratio, data, weights)
    if "fxmerge" in method:
        fxmerge.merge(nn.Linear(4, 4), torch.zeros(1, 4))  # imports what fxmerge imports on first use
    elif method == "Torch-Pruning":
        import torch_pruning  # noqa: F401
    before = reset_peak_memory()
    start, wall = time.process_time(), time.perf_counter()
    small = METHODS[method](task).eval()
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    peak = (peak_memory() - before) / 2**20
    network = NETWORKS[case.network]
    metadata = load_checkpoint(find_weights(network, weights), network.build())
    x, y = images(network, metadata, data, "test", case.images)
    size = sum(p.numel() for p in small.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(task.example[:1])
    found = {"cpu": seconds, "wall": wall, "peak": peak, "parameters": size, "flops": counter.get_total_flops()}
    return {**found, "accuracy": accuracy(small, x, y, BATCH)}


def markdown(key: str, rows: Mapping[float, Mapping[str, Mapping[str, float]]]) -> str:
    """The section of the page on one network."""
    case, network = CASES[key], NETWORKS[CASES[key].network]
    images = f"{f'first {case.images:,}' if case.images else 'all'} test images"
    lines = [f"## {network.title}, {network.dataset}", "", f"{images}; {case.calibration:,} training images.", ""]
    lines += ["| dropped | method | accuracy, % | CPU s | peak, MiB | parameters | FLOPs |"]
    lines += ["|---|---|--:|--:|--:|--:|--:|"]
    for ratio, by in rows.items():
        for method, f in by.items():
            figures = f"{f['accuracy']:.2f} | {f['cpu']:.2f} | {f['peak']:.0f} | {f['parameters']:,} | {f['flops']:,}"
            lines.append(f"| {ratio:.0%} | {method} | {figures} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = flags("peers", "Compare fxmerge with its peers.", NAMES)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for peers.md")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "RATIO", "METHOD"), help=argparse.SUPPRESS)
    args = parse(parser, argv)
    if args.one:
        key, ratio, method = args.one
        print(json.dumps(measure(CASES[key], float(ratio), method, args.data, args.weights)))
        return
    if args.out is None:
        parser.error("--out is required")
    console = Console(stderr=True, highlight=False)
    given = ["--data", str(args.data), "--weights", str(args.weights), "--threads", str(torch.get_num_threads())]
    parts = []
    for key in args.only:
        rows: dict[float, dict[str, dict[str, float]]] = {}
        for ratio in CASES[key].ratios:
            for method in METHODS:
                command = [sys.executable, "-m", "benchmarks.peers", *given, "--one", key, str(ratio), method]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise SystemExit(f"{method} failed on {key} at {ratio:.0%}:\n{run.stderr[-2000:]}")
                figures = json.loads(run.stdout.splitlines()[-1])
                rows.setdefault(ratio, {})[method] = figures
                outcome = f"{figures['accuracy']:.2f} % in {figures['cpu']:.2f} s"
                console.print(f"{key} {ratio:.0%} {method}: {outcome}", markup=False)
        parts.append(markdown(key, rows))
    head = [
        "# Comparison with peers",
        "",
        "`python -m benchmarks.peers` writes this page.",
        f"Threads: {torch.get_num_threads()}, torch {torch.__version__}.",
        "Seconds and memory are those of the merge alone; for fxmerge they include capture, analysis, rewriting and",
        "verification.",
        "",
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "peers.md", "\n".join([*head, *parts]))
