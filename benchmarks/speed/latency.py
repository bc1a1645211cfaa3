"""How fast merged models run, beside what their FLOPs promise: `python -m benchmarks.speed.latency --out docs`.

Each model is merged to half its FLOPs (`--flops`), with kept channels a multiple of 1, 8, 16 and 32, and timed in turns
with its original, eagerly and compiled. The ideal is the ratio of FLOPs; what keeps a model from it is told by the
profiler: the kinds of ops that did not get faster as their share of the ideal. Weights are random, which no clock sees,
and merging takes no refit. Writes latency.md.
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
REMOTE = 0.05  # of the merged model's time: what keeps less from the ideal is not told


@dataclass(frozen=True)
class Row:
    """One merged model: what its FLOPs promise, how much faster it is, by mode, and what is in the way."""

    model: str
    round_to: int
    ideal: float
    faster: dict[str, float]
    noise: float
    held: str


def merged(model: nn.Module, x: Tensor, flops: float, round_to: int) -> fxmerge.Result:
    """Half the FLOPs, shared out evenly: the shapes are what counts here."""
    return fxmerge.merge(
        model, x, budget={"flops": flops}, allocation="uniform", round_to=round_to, decomposition="prune", refit="none"
    )


def kind_of(op: str) -> str:
    """torch has several kernels for one op, and a narrower layer may be given another one."""
    return next((kind for kind, parts in KINDS.items() if any(part in op for part in parts)), op)


def seconds_by_kind(model: nn.Module, x: Tensor, calls: int = 7) -> dict[str, float]:
    """Seconds that each kind of op takes of an eager forward pass: the least of some passes, as a machine is noisy."""
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


def held(model: nn.Module, small: nn.Module, x: Tensor, share: float) -> str:
    """The kinds of ops that take more of the merged model's time than `share` of what they took before."""
    return in_the_way(seconds_by_kind(model, x), seconds_by_kind(small, x), share)


def in_the_way(before: Mapping[str, float], after: Mapping[str, float], share: float) -> str:
    """The three worst, each with what is left of its seconds."""
    whole = sum(after.values())
    extra = {op: after[op] - share * before.get(op, 0.0) for op in after}
    worst = sorted((op for op in extra if extra[op] > REMOTE * whole), key=lambda op: -extra[op])[:3]
    return ", ".join(f"{op} {after[op] / before[op]:.2f}" if before.get(op) else f"{op} (new)" for op in worst) or "-"


def rows(name: str, args: argparse.Namespace, console: Console) -> list[Row]:
    """One model with each `--round-to`."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = torchvision.models.get_model(name).eval().to(device)
    x = torch.randn(args.batch, 3, args.image, args.image, device=device)
    originals = {mode: MODES[mode](model) for mode in args.modes}
    found = []
    for round_to in args.round_to:
        result = merged(model, x, args.flops, round_to)
        share = result.report.after.flops / result.report.before.flops
        faster, noise = {}, 0.0
        for mode in args.modes:
            timing = compared(originals[mode], MODES[mode](result.module), (x,), {}, args.seconds)
            faster[mode], noise = 1 / timing.share, max(noise, timing.noise)
        found.append(Row(name, round_to, 1 / share, faster, noise, held(model, result.module, x, share)))
        told = ", ".join(f"{mode} {value:.2f}" for mode, value in faster.items())
        console.print(f"{name}, multiples of {round_to}: ideal {1 / share:.2f}, {told}", markup=False)
    torch.compiler.reset()
    return found


def markdown(found: Sequence[Row], args: argparse.Namespace) -> str:
    """The page."""
    given = " ".join(f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}"
                     for k, v in vars(args).items() if k != "out")  # fmt: skip
    lines = [
        "# Speed of merged models",
        "",
        f"`python -m benchmarks.speed.latency --out docs {given}`, torch {torch.__version__}:",
        "times as fast as the original, both timed in turns in one run. The ideal is the original's FLOPs over the",
        "merged model's. The last column names the kinds of ops (eager) that keep it from the ideal, with the share of",
        "their time that is left; (new): the original's ran inside a fused kernel of torch's.",
        "",
        "| model | multiples of | ideal | " + " | ".join(args.modes) + " | +- | in the way |",
        "|---|" + "--:|" * (len(args.modes) + 3) + "---|",
    ]
    for row in found:
        told = " | ".join(f"{row.faster[mode]:.2f}" for mode in args.modes)
        lines.append(f"| {row.model} | {row.round_to} | {row.ideal:.2f} | {told} | {row.noise:.1%} | {row.held} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.latency", description="Speed of merged models.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of torchvision")
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 8, 16, 32], metavar="N")
    parser.add_argument("--modes", nargs="+", choices=[*MODES], default=[*MODES])
    parser.add_argument("--flops", type=float, default=0.5, help="share that may remain")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--image", type=int, default=224, help="pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each pair, at most")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where latency.md goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(stderr=True, highlight=False)
    found = [row for name in args.models for row in rows(name, args, console)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "latency.md", markdown(found, args))


if __name__ == "__main__":
    main()
