"""Decisions of a graph, such as which experts a token is sent to, that refit takes over from the original.

A merged graph would send some tokens to other experts than the original does, and the rows of an expert's layer would
be other tokens. On refit's data both graphs therefore choose what the original chooses, each with its own scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.held_out import FOLDS, HELD_OUT
from fxmerge.graph.ops import plain_name
from fxmerge.ir.provenance import Layer, Provenance
from fxmerge.rules.over_axes import Ordered

if TYPE_CHECKING:
    from fxmerge.calibration.paired_run import PairedRun

_ROWS = ("index", "index_select", "getitem")  # rules that take rows by their numbers
_CHOOSING = ("topk", "max", "argmax")


def decisions(module: fx.GraphModule, facts: Provenance) -> frozenset[str]:
    """The nodes that choose among channels which all stay, as a router chooses experts, by name."""
    held = (n for n in module.graph.nodes if facts.kinds.get(n.name) == "unknown")
    return frozenset(node.name for node in held if plain_name(node) in _CHOOSING)


def as_decided(node: fx.Node, scores: Any, made: Any, chosen: Any) -> Any:
    """What a node gives for these scores where it chooses as the original does.

    made, chosen: what it gives by itself, and in the original
    """
    if isinstance(chosen, Tensor):
        return chosen if isinstance(made, Tensor) and made.shape == chosen.shape else made
    if not isinstance(scores, Tensor) or len(chosen) != 2 or chosen[1].shape != made[1].shape:
        return made
    names = ("input", "k", "dim") if plain_name(node) == "topk" else ("input", "dim", "keepdim")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    dim, indices = given.get("dim", -1), chosen[1]
    if indices.dim() < scores.dim():
        return Ordered(scores.gather(dim, indices.unsqueeze(dim)).squeeze(dim), indices)
    return Ordered(scores.gather(dim, indices), indices)


def rows_of(node: fx.Node, facts: Provenance) -> fx.Node | None:
    """The node that tells which position each row of a layer's input is, as in layer(x[i]); None if there is none."""
    at = _first(node)
    while at is not None:
        index: Any = at.args[-1] if facts.rules.get(at.name) in _ROWS else None
        index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
        if isinstance(index, fx.Node):
            return index
        at = _first(at)
    return None


def row_folds(paired: PairedRun, node: fx.Node, counts: Sequence[int]) -> list[Tensor] | None:
    """The fold of each row of a layer whose rows are taken from positions of the samples, (rows,) by batch; or None.

    counts: the rows of each batch
    """
    index = rows_of(node, paired.facts)
    known = None if index is None else paired.original.values.get(index.name)
    if known is None:
        return None
    held, found = any(bool((folds == HELD_OUT).any()) for folds in paired.folds), []
    for at, count, own in zip(known, counts, paired.folds, strict=True):
        if not isinstance(at, Tensor) or at.shape != (count,) or not len(own):
            return None
        most = int(at.max()) + 1 if count else 0
        each = -(-most // len(own))  # positions of a sample
        of_position = own.repeat_interleave(each) if held else torch.arange(most) * FOLDS // max(most, 1)
        found.append(of_position[at.cpu()])
    return found


def real_rows(paired: PairedRun, node: fx.Node) -> list[Tensor | None] | None:
    """Which rows of such a layer are not padding, (rows,) bool by batch, or None for all; None if it is not known."""
    index = rows_of(node, paired.facts)
    known = None if index is None else paired.original.values.get(index.name)
    if known is None:
        return None
    found: list[Tensor | None] = []
    for number, at in enumerate(known):
        count, batch = int(at.max()) + 1 if len(at) else 0, paired.original.batches[number]
        real = paired.padding.real(node.name, batch, (count, 1)) if paired.padding is not None else None
        found.append(None if real is None else real.flatten().cpu()[at.cpu()])
    return found


def expert_rows(ends: Sequence[Tensor], expert: int) -> list[Tensor]:
    """The rows of one expert, by batch, of a layer whose rows are sorted by expert. ends: the offsets, by batch"""
    return [torch.arange(int(e[expert - 1]) if expert else 0, int(e[expert])) for e in ends]


def is_routed(layer: Layer, facts: Provenance) -> bool:
    """Is it a layer of experts whose rows are sorted by expert?"""
    return layer.is_stacked and facts.rules.get(layer.node) == "grouped_mm"


def routed_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The input and the offsets of such a layer."""
    given = [node.args[0] if node.args else node.kwargs.get("input")]
    given.append(node.args[2] if len(node.args) > 2 else node.kwargs.get("offs"))
    source, offsets = given
    return (source, offsets) if isinstance(source, fx.Node) and isinstance(offsets, fx.Node) else None


def _first(node: fx.Node) -> fx.Node | None:
    given = node.args[0] if node.args else None
    return given if isinstance(given, fx.Node) else None
