"""Calibration: what refit runs on, from batches that users give or from probes, and how it is shared between ranks.

Batches come as tensors, tuples (what the model does not take, such as labels, is ignored), dicts, a DataLoader or a
generator, which is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.errors import FxMergeError, first_line
from fxmerge.graph.cost import cost
from fxmerge.graph.distributed import rank_and_size
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.inputs import bind, fixed_batch
from fxmerge.graph.nested import fresh
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance
from fxmerge.methods.probes import PROBES, probes
from fxmerge.options import Options
from fxmerge.weights.by_path import at

Batches = list[list[Any]]  # by batch, values of the graph's placeholders
ELEMENTS = 2**27  # of the largest activation over all batches, at most: half a GiB in float32
FEWEST, USUAL, MOST = 128, 512, 4096  # probes, unless told
SMALL, FORWARD = 2**22, 5e11  # elements of the largest activation over all probes; FLOPs of a forward pass of them


def fed(
    captured: Capture, facts: Provenance, options: Options, batches: Any, mismatch: Callable[[Batches], float]
) -> Batches:
    """This process's share of what refit runs on: the user's batches, or probes of the family of least mismatch.

    Raises FxMergeError for what is no batch of this model, UnprobedError where the model does not run on probes.
    """
    limit = samples_at_most(captured)
    if options.refit == "calibration":
        found = given(captured, batches, limit)
        if fault := refused(captured, found[0]):
            raise FxMergeError(f"the model {fault} on a batch of calibration; give inputs as its forward takes them")
        return share(found)
    size = batch_size(captured) if fixed_batch(captured.module) else options.batch
    words, normed = vocabularies(captured, facts), any(layer.op == "batch_norm" for layer in facts.layers)

    def made(family: str, count: int) -> Batches:
        whole = max(1, min(count, limit) // size) * size  # the last batch is as large as the others
        return probes(family, list(captured.inputs), words, whole, size, options.seed)

    if fault := refused(captured, made(next(iter(PROBES)), size)[0]):
        raise UnprobedError(f"refit is left out, as the model {fault} on probes; give merge(..., calibration=batches)")
    family = options.probes
    if family == "auto":
        off = {name: mismatch(made(name, size)) if normed else 0.0 for name in PROBES}
        family = min(off, key=lambda name: off[name])
    return share(made(family, options.samples or enough(captured)))


class UnprobedError(FxMergeError):
    """The model does not run on probes."""


def refused(captured: Capture, values: Sequence[Any]) -> str:
    """What the model does wrong on these values of its placeholders; "" where its outputs are finite numbers."""
    interpreter = fx.Interpreter(captured.module)
    interpreter.extra_traceback = False
    try:
        with evaluating(captured.module), torch.no_grad():
            outputs = interpreter.run(*fresh(list(values)), enable_io_processing=False)
    except Exception as error:
        return f"fails ({type(error).__name__}: {first_line(error)})"
    finite = all(bool(torch.isfinite(y).all()) for y in returned(outputs))
    return "" if finite else "gives NaN or infinity"


def enough(captured: Capture) -> int:
    """How many probes: more where activations are small, fewer where a forward pass takes long."""
    wanted = max(USUAL, min(MOST, SMALL // largest_activation(captured)))
    each = cost(captured.module, captured.inputs).flops / batch_size(captured)
    return max(FEWEST, min(wanted, int(FORWARD / max(each, 1))))


def samples_at_most(captured: Capture) -> int:
    """How many samples keep the largest activation within bounds."""
    return max(1, ELEMENTS // largest_activation(captured))


def largest_activation(captured: Capture) -> int:
    """Elements of the largest activation of one sample."""
    largest = max((int(torch.Size(s).numel()) for s in captured.shapes.values()), default=1)
    return max(1, largest // max(batch_size(captured), 1))


def batch_size(captured: Capture) -> int:
    """The example's: the first axis of its first tensor."""
    return next((v.size(0) for v in captured.inputs if isinstance(v, Tensor) and v.dim()), 1)


def given(captured: Capture, batches: Any, limit: int) -> list[list[Any]]:
    """A user's batches as values of the graph's placeholders, at most `limit` samples of them.

    Raises FxMergeError for what is no batch of this model.
    """
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise FxMergeError(f"calibration is a {type(batches).__name__}; give an iterable of batches, or a DataLoader")
    found: list[list[Any]] = []
    total = 0
    for batch in islice(batches, limit):
        values = _placed(captured, batch)
        count = next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 0)
        if count == 0:
            raise FxMergeError("a batch of calibration holds no samples; give tensors with at least one sample")
        found.append(values)
        total += count
        if total >= limit:
            break
    if not found:
        raise FxMergeError("calibration holds no batches; a generator can be read only once")
    if fixed_batch(captured.module):
        found = _regrouped(found, batch_size(captured))
    return found


def _placed(captured: Capture, batch: Any) -> list[Any]:
    """One batch as the values of the placeholders, on the example's devices and in its dtypes."""
    names = list(captured.kwargs)
    if isinstance(batch, Mapping):
        placeholders = [str(n.target) for n in captured.module.graph.nodes if n.op == "placeholder"]
        wanted = names or placeholders[: len(captured.args)]
        missing = [name for name in wanted if name not in batch]
        if missing:
            has = ", ".join(map(str, batch))
            raise FxMergeError(f"a batch of calibration has no {', '.join(missing)}; it has {has}")
        args, kwargs = tuple(batch[n] for n in wanted if not names), {n: batch[n] for n in names}
    else:
        parts = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, (tuple, list)) else None
        count = len(names) or len(captured.args)
        if parts is None or len(parts) < count:
            what = type(batch).__name__ if parts is None else f"{type(batch).__name__} of {len(parts)}"
            raise FxMergeError(f"a batch of calibration is a {what}; the model takes {count} inputs, give a tuple")
        args = () if names else parts[:count]
        kwargs = dict(zip(names, parts, strict=False))
    values = bind(captured.module, args, kwargs)
    for value, example in zip(values, captured.inputs, strict=True):
        if isinstance(example, Tensor) and not (isinstance(value, Tensor) and value.dim() == example.dim()):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise FxMergeError(f"a batch of calibration holds {got} where the example has {tuple(example.shape)}")
    return [v.to(e) if isinstance(e, Tensor) else v for v, e in zip(values, captured.inputs, strict=True)]


def _regrouped(batches: Sequence[list[Any]], size: int) -> list[list[Any]]:
    """The same samples in batches of one size, what is left over dropped."""
    columns = []
    for parts in zip(*batches, strict=True):
        if isinstance(parts[0], Tensor) and parts[0].dim():
            whole = torch.cat(parts)
            if len(whole) < size:
                raise FxMergeError(f"calibration holds {len(whole)} samples; the exported model takes {size} at a time")
            columns.append(list(torch.split(whole[: len(whole) // size * size], size)))
        else:
            columns.append([parts[0]])
    length = max(map(len, columns))
    return [list(row) for row in zip(*(c * length if len(c) == 1 else c for c in columns), strict=True)]


def vocabularies(captured: Capture, facts: Provenance) -> dict[int, int]:
    """Placeholder -> size of the table that it looks up entries in, of those that hold token ids."""
    placeholders = [n.name for n in captured.module.graph.nodes if n.op == "placeholder"]
    found: dict[int, int] = {}
    for layer in facts.layers:
        if layer.op != "embedding":
            continue
        node = next(n for n in captured.module.graph.nodes if n.name == layer.node)
        size = at(captured.module, layer.params["weight"]).size(0)
        sources = [s.name for s in node.all_input_nodes]
        while sources:
            source = sources.pop()
            if source in placeholders:
                number = placeholders.index(source)
                found[number] = min(size, found.get(number, size))
            elif facts.kinds.get(source) in ("movement", "query", "per_channel"):
                sources += facts.sources.get(source, ())
    return found


def share(batches: Sequence[list[Any]]) -> list[list[Any]]:
    """This process's part of the batches. Raises FxMergeError where some process would have none."""
    rank, size = rank_and_size()
    if size > len(batches):
        raise FxMergeError(f"refit has {len(batches)} batches for {size} processes; give as many, or a smaller batch")
    return list(batches[rank::size])
