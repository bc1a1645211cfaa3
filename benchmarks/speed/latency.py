"""The speedup of merged models, next to the reduction of their FLOPs: `python -m benchmarks.speed.latency --out docs`.

Each model is merged to half its FLOPs (`--flops`), with the number of kept channels a multiple of 1, 8, 16 or 32. It is
timed alternately with the original model, eager and compiled. The ideal speedup is the ratio of FLOPs; the profiler
finds the kinds of ops with a smaller speedup. Weights are random and refit is off, since neither changes the
speed. Writes latency.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fxmerge
from fxmerge.graph.latency import compared
from fxmerge.weights.files import write_text

MODELS = ("resnet50", "vgg16", "mobilenet_v2", "convnext_tiny", "vit_b_16")
MODES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "compile": lambda model: torch.compile(model),  # type: ignore[dict-item,return-value]
}
KINDS = {"convolution": ("conv",), "attention": ("attention", "multi_head"), "linear": ("addmm", "linear")}
NEGLIGIBLE = 0.05  # share of the merged model's time; ops that lose less than this are not listed


@dataclass(frozen=True)
class Row:
    """One merged model and its speedup."""

    model: str
    round_to: int
    ideal: float  # FLOPs of the original / FLOPs of the merged model
    speedup: dict[str, float]  # by mode
    noise: float  # relative
    slow_ops: str  # kinds of ops that keep the model from the ideal


def merged(model: nn.Module, x: Tensor, flops: float, round_to: int) -> fxmerge.Result:
    """Merge to a share of the FLOPs, uniformly and without refit: only the shapes matter here."""
    return fxmerge.merge(
        model, x, budget={"flops": flops}, allocation="uniform", round_to=round_to, decomposition="prune", refit="none"
    )


def kind_of(op: str) -> str:
    """The kind of an op. torch has several kernels for one op and may choose another one for a narrower layer."""
    return next((kind for kind, parts in KINDS.items() if any(part in op for part in parts)), op)


def seconds_by_kind(model: nn.Module, x: Tensor, calls: int = 7) -> dict[str, float]:
    """Seconds of each kind of op in an eager forward pass: the minimum of several passes, to reduce noise."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if x.is_cuda else [])]
    passes: list[dict[str, float]] = []
    with torch.no_grad():
        model(x)
        for _ in range(calls):
            with profile(activities=activities) as found:
                model(x)
            times: dict[str, float] = defaultdict(float)
            for event in found.key_averages():
                own = event.self_device_time_total if x.is_cuda else event.self_cpu_time_total
                times[kind_of(event.key.removeprefix("aten::"))] += own / 1e6
            passes.append(times)
    return {kind: min(times[kind] for times in passes) for kind in passes[0]}


def slow_ops(before: Mapping[str, float], after: Mapping[str, float], share: float) -> str:
    """The kinds of ops that take more than `share` of their seconds before: the three worst, each with its share."""
    total = sum(after.values())
    extra = {op: after[op] - share * before.get(op, 0.0) for op in after}
    worst = sorted((op for op in extra if extra[op] > NEGLIGIBLE * total), key=lambda op: -extra[op])[:3]
    return ", ".join(f"{op} {after[op] / before[op]:.2f}" if before.get(op) else f"{op} (new)" for op in worst) or "-"


def rows(name: str, args: argparse.Namespace, console: Console) -> list[Row]:
    """The rows of one model, one for each value of `--round-to`."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = torchvision.models.get_model(name).eval().to(device)
    x = torch.randn(args.batch, 3, args.image, args.image, device=device)
    originals = {mode: MODES[mode](model) for mode in args.modes}
    found = []
    for round_to in args.round_to:
        result = merged(model, x, args.flops, round_to)
        share = result.report.after.flops / result.report.before.flops
        speedup, noise = {}, 0.0
        for mode in args.modes:
            timing = compared(originals[mode], MODES[mode](result.module), (x,), {}, args.seconds)
            speedup[mode], noise = 1 / timing.share, max(noise, timing.noise)
        slow = slow_ops(seconds_by_kind(model, x), seconds_by_kind(result.module, x), share)
        found.append(Row(name, round_to, 1 / share, speedup, noise, slow))
        measured = ", ".join(f"{mode} {value:.2f}" for mode, value in speedup.items())
        console.print(f"{name}, multiples of {round_to}: ideal {1 / share:.2f}, {measured}", markup=False)
    torch.compiler.reset()
    return found


def markdown(found: Sequence[Row], args: argparse.Namespace) -> str:
    """The page."""
    given = " ".join(f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}"
                     for k, v in vars(args).items() if k != "out")  # fmt: skip
    lines = [
        "# Speed of merged models",
        "",
        f"`python -m benchmarks.speed.latency --out docs {given}`, torch {torch.__version__}.",
        "",
        "Speedup over the original model; both are timed alternately in the same run. The ideal is the ratio of FLOPs.",
        "The last column lists the kinds of ops (eager) that keep the model from the ideal, with the share of their",
        "time that is left; (new): in the original model the op ran inside a fused kernel of torch.",
        "",
        "| model | multiples of | ideal | " + " | ".join(args.modes) + " | +- | slow ops |",
        "|---|" + "--:|" * (len(args.modes) + 3) + "---|",
    ]
    for row in found:
        speedups = [f"{row.speedup[mode]:.2f}" for mode in args.modes]
        cells = [row.model, str(row.round_to), f"{row.ideal:.2f}", *speedups, f"{row.noise:.1%}", row.slow_ops]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.latency", description="Time merged models.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of torchvision models")
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 8, 16, 32], metavar="N")
    parser.add_argument("--modes", nargs="+", choices=[*MODES], default=[*MODES])
    parser.add_argument("--flops", type=float, default=0.5, help="share of the FLOPs to keep")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="at most, to time one pair of models")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for latency.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True, highlight=False)
    found = [row for name in args.models for row in rows(name, args, console)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "latency.md", markdown(found, args))


if __name__ == "__main__":
    main()
