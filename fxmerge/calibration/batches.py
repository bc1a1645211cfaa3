"""The batches that refit runs on, from calibration data or from probes, and each process's share of them.

Calibration data are tensors, tuples (whose further entries, such as labels, are ignored), dicts, a DataLoader, or a
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
from fxmerge.graph.inputs import bind, is_exported
from fxmerge.graph.nested import fresh
from fxmerge.graph.outputs import returned
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance, batch_norms
from fxmerge.methods.probes import PROBES, probes
from fxmerge.options import Options
from fxmerge.weights.by_path import at

Batches = list[list[Any]]  # by batch, the values of the graph's placeholders
ELEMENTS = 2**27  # of the largest activation over all batches, at most: half a GiB in float32
FEWEST, USUAL, MOST = 128, 512, 4096  # numbers of probes, unless `Options.samples` is given
SMALL, FORWARD = 2**22, 5e11  # for all probes: elements of the largest activation, FLOPs of a forward pass


def with_data(options: Options, given: Any) -> Options:
    """The options with refit on calibration data, if there is any. Raises FxMergeError where they contradict it."""
    if given is None and options.refit == "calibration":
        raise FxMergeError("refit='calibration' needs batches of inputs; give merge(..., calibration=batches)")
    if given is not None and options.refit == "none":
        raise FxMergeError("refit='none' and calibration= contradict each other; give one of them")
    return options if given is None else options.replace(refit="calibration")


def fed(
    captured: Capture, facts: Provenance, options: Options, batches: Any, mismatch: Callable[[Batches], float]
) -> Batches:
    """This process's share of the user's batches, or of probes of the family with the smallest mismatch.

    Raises FxMergeError where the batches do not fit the model, UnprobedError where the model does not run on probes.
    """
    limit = samples_at_most(captured)
    if options.refit == "calibration":
        found = given(captured, batches, limit)
        if fault := refused(captured, found[0]):
            raise FxMergeError(f"the model {fault} on a calibration batch; give inputs as its forward takes them")
        return share(found)
    size = batch_size(captured) if is_exported(captured.module) else options.batch
    words, normed = vocabularies(captured, facts), bool(batch_norms(facts))

    def made(family: str, count: int) -> Batches:
        whole = max(1, min(count, limit) // size) * size  # the last batch is as large as the others
        inputs = list(captured.inputs)
        return probes(family, inputs, vocabularies=words, count=whole, batch=size, seed=options.seed)

    if fault := refused(captured, made(next(iter(PROBES)), size)[0]):
        raise UnprobedError(f"refit is left out, as the model {fault} on probes; give merge(..., calibration=batches)")
    family = options.probes
    if family == "auto":
        off = {name: mismatch(made(name, size)) if normed else 0.0 for name in PROBES}
        family = min(off, key=lambda name: off[name])
    return share(made(family, options.samples or enough(captured)))


class UnprobedError(FxMergeError):
    """Raised where the model does not run on probes."""


def refused(captured: Capture, values: Sequence[Any]) -> str:
    """How the model fails on these values of its placeholders; "" where its outputs are finite."""
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
    """The number of probes: more where activations are small, fewer where a forward pass is expensive."""
    wanted = max(USUAL, min(MOST, SMALL // largest_activation(captured)))
    each = cost(captured.module, captured.inputs).flops / batch_size(captured)
    return max(FEWEST, min(wanted, int(FORWARD / max(each, 1))))


def samples_at_most(captured: Capture) -> int:
    """The number of samples at which the largest activation has ELEMENTS."""
    return max(1, ELEMENTS // largest_activation(captured))


def largest_activation(captured: Capture) -> int:
    """The number of elements of the largest activation, for one sample."""
    largest = max((int(torch.Size(s).numel()) for s in captured.shapes.values()), default=1)
    return max(1, largest // max(batch_size(captured), 1))


def batch_size(captured: Capture) -> int:
    """The batch size of the example inputs: the first axis of the first tensor."""
    return next((v.size(0) for v in captured.inputs if isinstance(v, Tensor) and v.dim()), 1)


def given(captured: Capture, batches: Any, limit: int) -> list[list[Any]]:
    """The user's batches as values of the graph's placeholders, at most about `limit` samples of them.

    Raises FxMergeError where the batches do not fit the model.
    """
    if isinstance(batches, (Tensor, Mapping)):
        batches = [batches]
    if not isinstance(batches, Iterable):
        what = type(batches).__name__
        raise FxMergeError(f"calibration is of type {what}; give an iterable of batches, or a DataLoader")
    found: list[list[Any]] = []
    total = 0
    for batch in islice(batches, limit):
        values = _placed(captured, batch)
        count = next((len(v) for v in values if isinstance(v, Tensor) and v.dim()), 0)
        if count == 0:
            raise FxMergeError("a calibration batch holds no samples; give tensors with at least one sample")
        found.append(values)
        total += count
        if total >= limit:
            break
    if not found:
        raise FxMergeError("calibration holds no batches; a generator can be read only once")
    if is_exported(captured.module):
        found = _regrouped(captured, found, batch_size(captured))
    return found


def _placed(captured: Capture, batch: Any) -> list[Any]:
    """One batch as values of the placeholders, on the devices and in the dtypes of the example inputs."""
    names = list(captured.kwargs)
    if isinstance(batch, Mapping):
        placeholders = [str(n.target) for n in captured.module.graph.nodes if n.op == "placeholder"]
        wanted = names or placeholders[: len(captured.args)]
        missing = [name for name in wanted if name not in batch]
        if missing:
            has = ", ".join(map(str, batch))
            raise FxMergeError(f"a calibration batch has no {', '.join(missing)}; it has {has}")
        args, kwargs = tuple(batch[n] for n in wanted if not names), {n: batch[n] for n in names}
    else:
        parts = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, (tuple, list)) else None
        count = len(names) or len(captured.args)
        if parts is None or len(parts) < count:
            what = type(batch).__name__ if parts is None else f"{type(batch).__name__} of {len(parts)}"
            raise FxMergeError(f"a calibration batch is a {what}; the model takes {count} inputs, give a tuple")
        args = () if names else parts[:count]
        kwargs = dict(zip(names, parts, strict=False))
    values = bind(captured.module, args, kwargs)
    for value, example in zip(values, captured.inputs, strict=True):
        if isinstance(example, Tensor) and not (isinstance(value, Tensor) and value.dim() == example.dim()):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise FxMergeError(f"a calibration batch has {got} where the example inputs have {tuple(example.shape)}")
    return [v.to(e) if isinstance(e, Tensor) else v for v, e in zip(values, captured.inputs, strict=True)]


def _regrouped(captured: Capture, batches: Sequence[list[Any]], size: int) -> list[list[Any]]:
    """The batches in the shapes of the example inputs: as they are, or the same samples in batches of `size`.

    A smaller last batch is dropped. Inputs whose first axis is not that of the samples are taken from the first batch.
    Raises FxMergeError where samples cannot be told apart, as where the first axis is a sequence.
    """
    if all(_shapes(batch) == _shapes(captured.inputs) for batch in batches):
        return list(batches)
    columns = []
    for parts, example in zip(zip(*batches, strict=True), captured.inputs, strict=True):
        if not isinstance(example, Tensor) or not example.dim():
            columns.append([parts[0]])
        elif example.size(0) == size and len({part.shape[1:] for part in parts}) == 1:
            whole = torch.cat(parts)
            if len(whole) < size:
                raise FxMergeError(f"calibration holds {len(whole)} samples; the exported model takes {size} at a time")
            columns.append(list(torch.split(whole[: len(whole) // size * size], size)))
        elif all(part.shape == example.shape for part in parts):
            columns.append([parts[0]])
        else:
            other = next(tuple(part.shape) for part in parts if part.shape != example.shape)
            raise FxMergeError(
                f"a calibration batch has an input of shape {other} where the exported model takes "
                f"{tuple(example.shape)}; give batches in the shapes of the example inputs"
            )
    length = max(map(len, columns))
    if any(len(column) not in (1, length) for column in columns):
        raise FxMergeError(
            "calibration batches have other numbers of samples in different inputs of the exported model"
        )
    return [list(row) for row in zip(*(c * length if len(c) == 1 else c for c in columns), strict=True)]


def _shapes(values: Sequence[Any]) -> list[tuple[int, ...] | None]:
    return [tuple(v.shape) if isinstance(v, Tensor) else None for v in values]


def vocabularies(captured: Capture, facts: Provenance) -> dict[int, int]:
    """Placeholder number -> vocabulary size, for the placeholders that hold token ids."""
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
    """This process's share of the batches. Raises FxMergeError where some process would have none."""
    rank, size = rank_and_size()
    if size > len(batches):
        raise FxMergeError(
            f"refit has {len(batches)} batches for {size} processes; give at least {size}, or a smaller batch size"
        )
    return list(batches[rank::size])
