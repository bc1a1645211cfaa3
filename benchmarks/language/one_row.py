"""Measure one row of benchmarks.language. This runs in its own process.

Seconds are CPU seconds on one thread, which depend less on the load of the machine than wall-clock time. The peak of
memory is that of the method, in excess of what the process held before (libraries, the model, the tokens).
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from benchmarks.harness.memory import peak_memory, reset_peak_memory
from benchmarks.harness.process import Finding, caught
from benchmarks.language.llama import decoder_layers, layer_parameters
from benchmarks.language.methods import DENSE, METHODS, SAMPLES, WINDOWS, Task, warm_up
from benchmarks.real import nets
from benchmarks.real.one_row import machine


def findings(folder: Path, network: str, removed: float, method: str, seed: int) -> Iterator[Finding]:
    """All findings on one network with one method. If it fails, the last one has the error."""
    return caught(_findings(folder, network, removed, method, seed))


def _findings(folder: Path, network: str, removed: float, method: str, seed: int) -> Iterator[Finding]:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    yield {"stage": "load", **versions, "machine": machine()}
    torch.manual_seed(seed)
    net = nets.load(folder, network)
    model, _ = net.load()  # its example inputs may be of the test text
    model = model.eval()
    decoder_layers(model)  # its layout is checked
    before, whole = layer_parameters(model), sum(p.numel() for p in model.parameters())
    batches = list(net.calibration(SAMPLES)) if method != DENSE else []
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    warm_up()
    yield {"about": nets.about(net), "tokens": tokens, "size": [before, whole], "stage": "method"}
    held, start = reset_peak_memory(), time.process_time()
    with torch.no_grad():
        small = METHODS[method](Task(model, batches, removed, seed))
    seconds, peak = time.process_time() - start, peak_memory() - held
    left, left_of_whole = layer_parameters(small) / before, sum(p.numel() for p in small.parameters()) / whole
    yield {"seconds": seconds, "peak": peak, "parameters": left, "whole": left_of_whole, "stage": "evaluate"}
    yield {"perplexity": float(net.evaluate(small, windows=WINDOWS, split="test")), "stage": "done"}
