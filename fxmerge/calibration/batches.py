"""The batches that refit runs on, from calibration data or from probes, and each process's share of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.epilogue import SOLVED
from fxmerge.calibration.held_out import HELD_OUT, of_samples, sample_folds, samples
from fxmerge.calibration.live import samples_within
from fxmerge.calibration.tail import tail
from fxmerge.calibration.trial_runs import refused
from fxmerge.calibration.user_data import given
from fxmerge.calibration.words import vocabularies
from fxmerge.errors import FxMergeError
from fxmerge.graph.cost import cost
from fxmerge.graph.distributed import rank_and_size
from fxmerge.graph.nested import holds_tensors
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import Provenance, batch_norms
from fxmerge.methods.probe_statistics import is_image, looks_real
from fxmerge.methods.probe_variants import augmented
from fxmerge.methods.probes import ALIKE, EXAMPLE, OF_EXAMPLE, PROBES, probed, probes
from fxmerge.options import Options
from fxmerge.weights.by_path import at

Batches = list[Sequence[Any]]  # by batch, the values of the graph's placeholders, as a list or as a `SampleRun`
ELEMENTS = 2**27  # of the largest activation over all batches, at most: half a GiB in float32
FEWEST, USUAL, MOST = 128, 512, 4096  # numbers of probes, unless `Options.samples` is given
SMALL, FORWARD = 2**22, 5e11  # for all probes: elements of the largest activation, FLOPs of a forward pass
TOGETHER = 2**22  # of the largest activation in a batch of probes, or LEAST probes: joint steps take whole batches,
LEAST = 8  # and few images have positions enough
BATCHES = 512  # at most, unless `Options.samples` is given: small ones cost as much time as large ones
TOKENS = 2**13  # so many are enough where a forward pass is expensive
PLENTY, MOSTLY = 4, 0.9  # rows for each column, and a share of the FLOPs: see `determines`
ROWS = 64  # the first layers see at least so many rows of an example that probes are made of


def with_data(options: Options, given: Any) -> Options:
    """The options with refit on calibration data, if there is any. Raises FxMergeError where they contradict it."""
    if given is None and options.refit == "calibration":
        raise FxMergeError("refit='calibration' needs batches of inputs; give merge(..., calibration=batches)")
    if given is not None and options.refit == "none":
        raise FxMergeError("refit='none' and calibration= contradict each other; give one of them")
    return options if given is None else options.replace(refit="calibration")


@dataclass(frozen=True, kw_only=True)
class Fed:
    """This process's share of the batches, and what they hold.

    made:    the number of leading batches that hold the user's own samples; the others hold variants of these, or
             probes
    real:    whether the batches hold data or variants of data, and no synthetic numbers alone
    source:  what refit ran on, for the report
    alike:   whether half of the batches is the example as it is, which determines the layers; they are not moved
    """

    batches: Batches
    made: int
    real: bool
    source: str
    alike: bool = False


def fed(
    captured: Capture, facts: Provenance, options: Options, batches: Any, mismatch: Callable[[Batches], float]
) -> Fed:
    """The user's batches and variants of their samples, or probes of the family with the smallest mismatch.

    Raises FxMergeError where the batches do not fit the model, UnprobedError where the model does not run on probes.
    """
    if any(map(holds_tensors, captured.inputs)):
        error = FxMergeError(
            "an argument of the model holds several tensors, and torch.export, which would make each of them an input, "
            "cannot capture the model; give a model whose forward takes each tensor by itself"
        )
        raise error if options.refit == "calibration" else UnprobedError(f"refit is left out: {error}")
    limit = samples_at_most(captured, facts, options.memory)
    if options.refit == "calibration":
        found, more_given = given(captured, batches, limit, batch_size(captured))
        if fault := refused(captured, found[0]):
            raise FxMergeError(f"the model {fault} on a calibration batch; give inputs as its forward takes them")
        taken = _even([*found], captured)
        mine, (rank, size) = share(taken), rank_and_size()
        wanted = min(limit, options.samples or enough(captured, facts))
        more = variants(captured, mine, wanted // size, options.seed + rank)
        text = f"{sum(map(samples, taken)):,} calibration samples"
        if more_given:
            text += ", the others left out for their memory"
        if more:
            text += f" and {sum(map(samples, more)) * size:,} variants of them"
        return Fed(batches=mine + more, made=len(mine), real=True, source=text)
    own = batch_size(captured)
    tables, normed = vocabularies(captured.module, facts), bool(batch_norms(facts))

    def made(family: str, count: int) -> Batches:
        whole = max(1, min(count, limit) // size) * size  # the last batch is as large as the others
        inputs = list(captured.inputs)
        return [*probes(family, inputs, tables=tables, count=whole, batch=size, seed=options.seed)]

    several = min(options.batch, limit)
    fewer = min(several, max(LEAST, TOGETHER // largest_activation(captured, facts)))
    for size in dict.fromkeys((fewer, own)):  # its code may hold the example's batch size
        if not (fault := refused(captured, made(next(iter(PROBES)), size)[0])):
            break
    else:
        raise UnprobedError(f"refit is left out, as the model {fault} on probes; give merge(..., calibration=batches)")
    real = example_counts(captured, facts)
    family, count = options.probes, options.samples or enough(captured, facts)
    if family == "auto":
        others = [name for name in PROBES if name not in OF_EXAMPLE]
        if real and determines(captured, facts):
            family = ALIKE
        elif normed:  # fitted to the norms, they are more diverse than variants of an example
            family = min(others, key=lambda name: mismatch(made(name, max(several, size))))
        elif real:
            family = EXAMPLE
        else:
            family = others[0]
    if not options.samples:
        count = min(count, BATCHES * size)
        if family in OF_EXAMPLE:
            count = max(count, own)  # all samples of the example are used
    mine = share(_even(made(family, count), captured))
    real = real and family in OF_EXAMPLE
    text = _described(captured, family if probed(captured.inputs) else "", sum(map(samples, mine)), real, bool(tables))
    return Fed(batches=mine, made=0, real=real, source=text, alike=family == ALIKE)


def example_counts(captured: Capture, facts: Provenance) -> bool:
    """Whether probes can be made of the example inputs: their floating-point inputs are data and not noise, and the
    first layers that read them see at least ROWS rows of them.
    """
    inputs, names = captured.inputs, [n for n in captured.module.graph.nodes if n.op == "placeholder"]
    places = [at for at in probed(inputs) if inputs[at].dim() > 1]
    readers = {layer.node: layer for layer in facts.layers if layer.reads is not None}

    def rows(start: fx.Node) -> int:
        """The most rows that one of the first layers after a placeholder sees."""
        most, waiting, seen = 0, [start], {start}
        while waiting:
            source = waiting.pop()
            for node in source.users:
                layer = readers.get(node.name)
                recurrent = layer is not None and layer.operation.is_recurrent  # its outputs are a tuple
                shape = captured.shapes.get((source if recurrent else node).name)
                if layer is not None and shape is not None and layer.writes is not None:
                    each = shape[-1] if recurrent else len(layer.writes)
                    most = max(most, torch.Size(shape).numel() // max(1, each))
                elif node not in seen:
                    seen.add(node)
                    waiting.append(node)
        return most

    return bool(places) and all(looks_real(inputs[at].detach()) and rows(names[at]) >= ROWS for at in places)


def determines(captured: Capture, facts: Provenance) -> bool:
    """Whether the example alone has rows enough: PLENTY for each column of a layer's patches, in layers that together
    take MOSTLY of the FLOPs.
    """
    flops = {True: 0.0, False: 0.0}
    for layer in facts.layers:
        shape = captured.shapes.get(layer.node)
        if layer.op not in SOLVED or layer.writes is None or shape is None:
            continue
        outputs, weight = len(layer.writes), at(captured.module, layer.params["weight"])
        rows, columns = torch.Size(shape).numel() / max(outputs, 1), weight.numel() / max(outputs, 1)
        flops[rows >= PLENTY * columns] += rows * weight.numel()
    return flops[True] > 0 and flops[True] >= MOSTLY * sum(flops.values())


def variants(captured: Capture, batches: Batches, wanted: int, seed: int) -> Batches:
    """Batches of variants of the user's samples, one of each batch in turn, until there are `wanted` samples in all.

    None where the user's samples are nearly as many, or where the inputs have no variants. Samples that are held out
    have none.
    """
    found: Batches = []
    missing = wanted - sum(map(samples, batches))
    sources = [
        _rows(batch, (folds != HELD_OUT).nonzero().flatten())
        for batch, folds in zip(batches, sample_folds([samples(batch) for batch in batches]), strict=True)
        if not (folds == HELD_OUT).all()
    ]
    while missing >= samples(batch := sources[len(found) % len(sources)]):
        made = {}
        for place in probed(batch):
            generator = torch.Generator().manual_seed(seed + len(found))  # the same for all inputs of a sample
            if (values := augmented(batch[place], len(batch[place]), generator)) is not None:
                made[place] = values.to(batch[place])
        if not made:
            break
        found.append([made.get(place, value) for place, value in enumerate(batch)])
        missing -= samples(batch)
    return found


def _rows(batch: Sequence[Any], index: Tensor) -> Sequence[Any]:
    """As many samples as the batch has, from those with these indices in turn."""
    count = samples(batch)
    return of_samples(batch, index[torch.arange(count) % len(index)])


def _described(captured: Capture, family: str, count: int, real: bool, words: bool) -> str:
    """What probes are made of, for the report."""
    n, text = batch_size(captured), f"{count:,} probes"
    inputs = f"the {n:,} example inputs" if n > 1 else "the one example input"
    floats = [captured.inputs[at] for at in probed(captured.inputs)]
    if real and family == ALIKE:
        return f"{text} made from {inputs} (half of them as they are, flipped or moved)"
    if real:
        of = "crops, flips, colours; half dead leaves" if any(map(is_image, floats)) else "half noise like them"
        return f"{text} made from {inputs} ({of})"
    if words:
        return f"{text} made from the tokens of {inputs} and of the vocabulary"
    return f"{text} ({family})" if family else text


class UnprobedError(FxMergeError):
    """Raised where the model does not run on probes."""


def enough(captured: Capture, facts: Provenance) -> int:
    """The number of probes: more where activations are small, fewer where a forward pass is expensive."""
    wanted = max(USUAL, min(MOST, SMALL // largest_activation(captured, facts)))
    each = cost(captured.module, captured.inputs).flops / batch_size(captured)
    fewest = FEWEST
    for place in vocabularies(captured.module, facts):  # each token is a row of every layer
        fewest = min(fewest, max(1, TOKENS * batch_size(captured) // captured.inputs[place].numel()))
    return max(fewest, min(wanted, int(FORWARD / max(each, 1))))


def samples_at_most(captured: Capture, facts: Provenance, memory: float) -> int:
    """The number of samples at which the largest activation has ELEMENTS, and all take `memory` GiB, if it is not 0."""
    most = max(1, ELEMENTS // largest_activation(captured, facts))
    if not memory:
        return most
    return min(most, samples_within(captured, batch_size(captured), memory, _apart(captured, facts)))


def largest_activation(captured: Capture, facts: Provenance) -> int:
    """The number of elements of the largest activation that is stored in a paired run, for one sample."""
    graph = captured.module.graph
    stored = {node.name for node in graph.nodes if node.op != "get_attr"}.difference(_apart(captured, facts))
    largest = max((int(torch.Size(s).numel()) for name, s in captured.shapes.items() if name in stored), default=1)
    return max(1, largest // max(batch_size(captured), 1))


def _apart(captured: Capture, facts: Provenance) -> frozenset[str]:
    """The nodes whose values are not stored."""
    layers = {layer.node for layer in facts.layers}
    return tail(captured.module, layers) if captured.recorded is None else frozenset()


def batch_size(captured: Capture) -> int:
    """The batch size of the example inputs: the first axis of the first tensor."""
    return next((v.size(0) for v in captured.inputs if isinstance(v, Tensor) and v.dim()), 1)


def _even(batches: Batches, captured: Capture) -> Batches:
    """The batches that are run: of a model that is divided among processes, as many for each of them."""
    size = rank_and_size()[1] if captured.sharding else 1
    return batches[: max(len(batches) // size, 1) * size]


def share(batches: Sequence[Sequence[Any]]) -> Batches:
    """This process's share of the batches. Raises FxMergeError where some process would have none."""
    rank, size = rank_and_size()
    if size > len(batches):
        raise FxMergeError(
            f"refit has {len(batches)} batches for {size} processes; give at least {size}, or a smaller batch size"
        )
    return list(batches[rank::size])
