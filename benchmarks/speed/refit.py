"""What a merge with refit costs: `python -m benchmarks.speed refit --out docs`.

Each network is merged in its own process, on one thread, with the default options: random weights, and probes or
`--samples` random inputs as calibration data. The measure is the CPU time of the whole merge as a multiple of one
forward pass of the original over the samples that refit ran on, which is timed in the same process right after it: it
depends on the machine less than seconds do. Memory is the peak in excess of what the process had before, model
included.

Each row is appended to speed.jsonl as soon as it is known, and a later run measures missing rows only. speed.md is
written from that file.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fxmerge
from benchmarks.harness import process
from benchmarks.harness.rows import Row, append_row, read_rows
from benchmarks.networks.models import resnet56
from benchmarks.speed.growth import MIB, peak_memory, reset_peak_memory
from benchmarks.speed.vgg16 import by_stage, random_batch_norm
from fxmerge.calibration.held_out import samples as samples_of
from fxmerge.graph.eval_mode import computing, evaluating
from fxmerge.pipeline import Prepared, prepared
from fxmerge.weights.files import write_text

KEY = ("network", "samples")
BATCH = 16  # samples of a batch of calibration data
LIMIT = 7200.0  # CPU seconds of a row
SHOWN = 0.05  # share of the time of the stages that the page lists


@dataclass(frozen=True)
class Network:
    """A network with random weights, and what its inputs look like.

    library: that has to be installed for it
    options: of the merge, besides the default ones
    """

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample
    library: str = "torch"
    tokens: int = 0  # the size of the vocabulary; 0 for images
    options: Mapping[str, Any] | None = None

    def inputs(self, count: int) -> torch.Tensor:
        """Random inputs, the same in every run."""
        generator = torch.Generator().manual_seed(count)
        if self.tokens:
            return torch.randint(self.tokens, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        import torchvision

        model: nn.Module = torchvision.models.get_model(name)
        return model

    return made


def _efficientnet() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("efficientnet_lite0")
    return model


def _llama() -> nn.Module:
    """A model of SmolLM2-135M's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _yolo() -> nn.Module:
    from ultralytics import YOLO

    model: nn.Module = YOLO("yolov8n.yaml").model
    return model


MLPS = {"keep": {"*.mlp.*": 0.8, "*": 1.0}}
NETWORKS: dict[str, Network] = {
    "resnet18": Network(_torchvision("resnet18"), (3, 224, 224), "torchvision"),
    "resnet50": Network(_torchvision("resnet50"), (3, 224, 224), "torchvision"),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2"), (3, 224, 224), "torchvision"),
    "efficientnet_lite0": Network(_efficientnet, (3, 224, 224), "timm"),
    "vit_b_16": Network(_torchvision("vit_b_16"), (3, 224, 224), "torchvision"),
    "resnet56": Network(resnet56, (3, 32, 32)),
    "llama": Network(_llama, (256,), "transformers", tokens=49152, options=MLPS),
    "yolov8n": Network(_yolo, (3, 320, 320), "ultralytics"),
}


def findings(name: str, samples: int) -> Iterator[Row]:
    """Merge a network in this process. samples: of calibration data, or 0 for probes"""
    network = NETWORKS[name]
    torch.manual_seed(0)
    fxmerge.merge(nn.Linear(4, 4), torch.zeros(1, 4))  # imports what is imported on first use
    model, example = random_batch_norm(network.model()), network.inputs(2)
    data = list(network.inputs(samples).split(BATCH)) if samples else None
    yield {"parameters": sum(p.numel() for p in model.parameters())}
    yield measured(model, example, data, network.options or {})


def measured(model: nn.Module, example: torch.Tensor, data: Any, changes: Mapping[str, Any]) -> Row:
    """The CPU seconds of a merge, by stage too, those of one forward pass over its samples, and its peak memory."""
    marks: list[tuple[str, float]] = []

    def stage(name: str, done: float = 0.0) -> None:
        marks.append((name.split()[0], time.process_time()))

    options = fxmerge.Options(**changes | ({"refit": "calibration"} if data else {}))
    reset_peak_memory()
    before, start = peak_memory(), time.process_time()
    ready = prepared(model, example, options, data, stage)
    result = ready.merged(options)
    end, peak = time.process_time(), peak_memory() - before
    stages = by_stage([*marks, ("", end)])
    used = sum(map(samples_of, ready.data.batches))
    return {
        "seconds": end - start, "peak": peak, "stages": stages, "used": used, "forward": forward(ready),
        "flops": result.report.after.flops / result.report.before.flops,
    }  # fmt: skip


def forward(ready: Prepared) -> float:
    """CPU seconds of one pass of the original over all batches; for a recorded model, from one of its example."""
    captured = ready.captured
    with computing(), torch.no_grad(), evaluating(captured.module):
        if captured.recorded is not None:
            module, batches = captured.recorded.host, [captured.args]
        else:
            module, batches = captured.module, ready.data.batches
        module(*batches[0])  # what is allocated and compiled on first use
        start = time.process_time()
        for batch in batches:
            module(*batch)
        seconds = time.process_time() - start
    return seconds * sum(map(samples_of, ready.data.batches)) / sum(map(samples_of, batches))


def markdown(rows: Mapping[tuple[Any, ...], Row]) -> str:
    """The table of the page."""
    columns = ("network", "samples", "CPU s", "forward passes", "peak, MiB", "model, MiB", "stages")
    lines = [f"| {' | '.join(columns)} |", "|---|--:|--:|--:|--:|--:|---|"]
    for (name, samples), row in rows.items():
        if "seconds" not in row:
            lines.append(f"| {name} | {samples or 'probes'} | {row.get('ended', 'failed')} | | | | |")
            continue
        shares = sorted(((seconds / row["seconds"], stage) for stage, seconds in row["stages"].items()), reverse=True)
        stages = ", ".join(f"{stage} {share:.0%}" for share, stage in shares if share > SHOWN)
        what = f"{samples}" if samples else f"{row['used']} probes"
        lines.append(
            f"| {name} | {what} | {row['seconds']:.1f} | {row['seconds'] / row['forward']:.1f} | "
            f"{row['peak'] / MIB:,.0f} | {4 * row['parameters'] / MIB:,.0f} | {stages} |"
        )
    return "\n".join([*lines, ""])


HEAD = """# What refit costs

`python -m benchmarks.speed refit --out docs` writes this page: the whole of `fxmerge.merge` with the default options,
on one thread. Weights are random. A forward pass is one of the original over all samples that refit ran on, in the same
process. Memory is the peak in excess of what the process had before the merge, the model included.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed refit", description="What refit costs.")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for speed.jsonl and speed.md")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks to measure")
    parser.add_argument("--samples", type=int, default=0, help="calibration samples; 0 for probes (default)")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help="CPU seconds of each network")
    parser.add_argument("--again", action="store_true", help="also measure rows that the file already has")
    args = parser.parse_args(argv)
    console, path = Console(stderr=True, highlight=False), args.out / "speed.jsonl"
    process.preload(__name__)
    for name in args.only:
        if importlib.util.find_spec(NETWORKS[name].library) is None:
            console.print(f"{name} left out: {NETWORKS[name].library} is not installed", markup=False)
        elif args.again or (name, args.samples) not in read_rows(path, KEY):
            found, _ = process.measured(findings, (name, args.samples), args.limit)
            append_row(path, {"network": name, "samples": args.samples, **found})
            console.print(f"{name}: {found.get('ended', '')}{found.get('seconds', 0):.0f} s", markup=False)
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(args.out / "speed.md", f"{HEAD}\n{markdown(read_rows(path, KEY))}")


if __name__ == "__main__":
    main()
