"""Measure one row of benchmarks.real. This runs in its own process.

Seconds are CPU seconds on one thread, which depend less on the load of the machine than wall-clock time.
"""

import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.coverage.one_model import count, shapes
from benchmarks.coverage.zoo import Specimen
from benchmarks.harness.process import Finding, caught
from benchmarks.real import nets
from benchmarks.real.methods import BUDGETS, METHODS, ORIGINAL, SAMPLES, WITH_SAMPLES, Budget, Task
from fxmerge.graph.nested import leaves


def findings(folder: Path, network: str, budget: str, method: str, seed: int) -> Iterator[Finding]:
    """All findings on one network with one method. If it fails, the last one has the error."""
    return caught(_findings(folder, network, budget, method, seed))


def _findings(folder: Path, network: str, budget: str, method: str, seed: int) -> Iterator[Finding]:
    yield {"stage": "load", "torch": torch.__version__, "machine": machine()}
    torch.manual_seed(seed)
    net = nets.load(folder, network)
    yield {"about": nets.about(net), "evaluated_on": nets.evaluated_on(net)}
    model, inputs = net.load()
    specimen = Specimen(model.eval(), (inputs,) if isinstance(inputs, Tensor) else inputs)
    before, written = size(specimen), shapes(specimen.run())
    batches = None
    if method in WITH_SAMPLES:
        yield {"stage": "calibration"}
        batches = list(net.calibration(SAMPLES))
        yield {"samples": sum(len(leaves(batch)[0]) for batch in batches)}
    yield {"stage": "merge"}
    wanted = BUDGETS[budget] if method != ORIGINAL else Budget(ORIGINAL, {})
    small, seconds = METHODS[method](Task(specimen, wanted, seed, batches))
    yield {"seconds": seconds, "stage": "run"}
    merged = Specimen(small, specimen.inputs)
    after = size(merged)
    yield {"parameters": after[0] / before[0], "flops": after[1] / before[1], "size": after, "stage": "evaluate"}
    if shapes(merged.run()) != written:
        raise ValueError(f"the outputs have shapes {shapes(merged.run())} instead of {written}")
    yield {"metric": float(net.evaluate(small)), "stage": "done"}


def size(specimen: Specimen) -> tuple[int, int]:
    """The parameters of a model, and the FLOPs of one run on its inputs."""
    return count(specimen.model), specimen.flops()


def machine() -> str:
    """The processor, for the page."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
