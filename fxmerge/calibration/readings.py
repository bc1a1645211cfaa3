"""Survey: one run of the original on refit's batches, for what has to be known before channels are chosen.

`readings` gives each group's consumers the second moments of their patches, which `repair` selects by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.epilogue import behind, pair
from fxmerge.calibration.paired_run import Lockstep, Settings, line
from fxmerge.calibration.patches import enough, form_of, input_of, patches, rows_of, sample
from fxmerge.graph.eval_mode import evaluating
from fxmerge.ir.capture import Capture
from fxmerge.ir.groups import Group
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.methods.evidence import Reading
from fxmerge.methods.least_squares import second_moments
from fxmerge.weights.by_path import at
from fxmerge.weights.disk_tensor import beside

WIDEST = 8192  # columns of all blocks together: a consumer with more is left out


def readings(
    captured: Capture,
    facts: Provenance,
    groups: Sequence[Group],
    batches: Sequence[Sequence[Any]],
    settings: Settings,
    stage: Callable[[str], None] = lambda name: None,
) -> dict[str, tuple[Reading, ...]]:
    """Group name -> how its consumers see it; consumers that are no layers (attention scores) are not among them."""
    consumers: dict[str, list[tuple[Group, Any]]] = {}
    for group in groups:
        for member in group.consumers:
            consumers.setdefault(member.layer.node, []).append((group, member))
    found: dict[str, list[Reading]] = {g.name: [] for g in groups}
    module = captured.module
    norms = {layer.node: layer for layer in facts.layers if layer.op == "batch_norm"}
    generator = torch.Generator().manual_seed(settings.seed)
    with evaluating(module), torch.no_grad():
        run = Lockstep(pair(module, facts), batches, settings)
        for step in run:
            members = consumers.get(step.node.name, ())
            if not members:
                continue
            layer = members[0][1].layer
            stage(f"survey {layer.module}")
            made = _consumer(run, step.node, step.outputs, layer, norms, settings, generator)
            if made is None:
                continue
            gram, weight, width = made
            for group, member in members:
                columns = member.where[:, :, None] * width + torch.arange(width)
                found[group.name].append(Reading(gram, weight, member.channels, columns.flatten(1)))
    return {name: tuple(parts) for name, parts in found.items()}


def _consumer(
    run: Lockstep, node: fx.Node, outputs: Sequence[Tensor], layer: Layer, norms: dict[str, Layer],
    settings: Settings, generator: torch.Generator,
) -> tuple[Tensor, Tensor, int] | None:  # fmt: skip
    """(gram (g p, g p), weight (o, g p) in units of what follows, columns for each place).

    None where it is no layer, or its inputs are not finite.
    """
    module = run.original.module
    owner = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    weight = at(module, layer.params["weight"])
    form = form_of(node, layer, owner, weight)
    if form is None:
        return None
    rows = rows_of(weight, form).double()
    blocks, width = form.groups, rows.size(2)
    if blocks * width > WIDEST:
        return None
    index_of = sample(outputs, form, enough(settings.rows, blocks * width), generator, settings.reduce)
    inputs = run.original.values[input_of(node, layer.op).name]
    parts = [patches(x, form, index) for x, index in zip(inputs, index_of, strict=True)]
    gram = _diagonal(second_moments(parts, settings.reduce)[1])
    if not bool(torch.isfinite(gram).all()):
        return None
    whole = _diagonal(rows)
    norm = behind(module, node, norms, set()).norm
    if norm is not None:
        whole = whole * line(module, norm, *run.statistics(norm, outputs))[0][:, None]
    assert layer.reads is not None
    return beside(weight, gram.cpu()), beside(weight, whole.cpu()), blocks * width // layer.reads.numel()


def _diagonal(blocks: Tensor) -> Tensor:
    """(g, a, b) as one (g a, g b) with the blocks on its diagonal."""
    g, a, b = blocks.shape
    whole = blocks.new_zeros(g, a, g, b)
    whole[torch.arange(g), :, torch.arange(g)] = blocks
    return whole.view(g * a, g * b)
