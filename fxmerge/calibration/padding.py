"""Padding: positions of a batch that a mask among the inputs switches off, and that are therefore no rows for refit.

A mask is an input of integers or booleans, (batch, length), whose name has "mask" in it. Whether it is zero at padding
(an attention_mask) or elsewhere (a key_padding_mask), its name does not tell. So the model is run: positions are
padding if other inputs may change there without a change of the outputs anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.nested import fresh
from fxmerge.graph.outputs import agree, returned
from fxmerge.ir.capture import Capture


@dataclass(frozen=True)
class Padding:
    """The masks among the inputs of a graph.

    masks:  {number of a placeholder: whether its mask is nonzero at padding}
    nodes:  the nodes that depend on inputs that are masked: others may be as long by chance
    """

    masks: Mapping[int, bool]
    nodes: frozenset[str]

    def real(self, node: str, batch: Sequence[Any], shape: Sequence[int]) -> Tensor | None:
        """Which positions of a node's value are not padding, (batch, length) bool; None if its axes are others.

        The two axes come first, or are one: a value of this shape can be viewed as (batch, length, ...).
        """
        found: Tensor | None = None
        for number, inverted in self.masks.items() if node in self.nodes else ():
            mask = _mask(batch[number])
            if mask is None or not (tuple(shape[:2]) == mask.shape or (len(shape) == 2 and shape[0] == mask.numel())):
                continue
            own = (mask != 0) != inverted
            found = own if found is None else found | own
        return found if found is not None and not bool(found.all()) else None

    def of(self, node: str, batch: Sequence[Any], value: Tensor) -> Tensor:
        """The entries of a value that are not padding, with one axis in place of the two if there are others."""
        real = self.real(node, batch, value.shape)
        return value if real is None else value.reshape(*real.shape, *rest(value.shape, real))[real]


def rest(shape: Sequence[int], real: Tensor) -> Sequence[int]:
    """The axes of a value after those of `real`."""
    return shape[2:] if tuple(shape[:2]) == real.shape else shape[1:]


def padding_of(captured: Capture, batches: Sequence[Sequence[Any]]) -> Padding | None:
    """The masks that switch off positions of these batches; None if there are none."""
    placeholders = [n for n in captured.module.graph.nodes if n.op == "placeholder"]
    named = [n for n, node in enumerate(placeholders) if "mask" in str(node.target).lower()]
    masks = {}
    for number in named:
        for inverted in (False, True):
            batch = next((b for b in batches if _some(b[number], inverted)), None)
            if batch is not None and _switches_off(captured, batch, number, inverted, named):
                masks[number] = inverted
                break
    if not masks:
        return None
    masked = {n for batch in batches for number in masks for n in _others(batch, number, named)}
    reached = {placeholders[n] for n in masked}
    for node in captured.module.graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return Padding(masks, frozenset(node.name for node in reached))


def _mask(value: Any) -> Tensor | None:
    is_mask = isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
    return value if is_mask else None


def _some(value: Any, inverted: bool) -> bool:
    """Whether a mask leaves some positions of each sample, and switches off others."""
    mask = _mask(value)
    real = (mask != 0) != inverted if mask is not None else None
    return real is not None and bool(real.any(1).all()) and not bool(real.all())


def _others(batch: Sequence[Any], number: int, named: Sequence[int]) -> list[int]:
    """The inputs with the axes of a mask."""
    shape = batch[number].shape
    return [n for n, v in enumerate(batch) if n not in named and isinstance(v, Tensor) and v.shape[:2] == shape]


def _switches_off(captured: Capture, batch: Sequence[Any], number: int, inverted: bool, named: Sequence[int]) -> bool:
    """Whether other inputs may change where the mask switches off without a change of the outputs anywhere else."""
    off = (batch[number] != 0) == inverted
    changed = list(batch)
    for n in _others(batch, number, named):
        changed[n] = torch.where(off.view(*off.shape, *[1] * (batch[n].dim() - 2)), _other(batch[n]), batch[n])
    moved = any(isinstance(v, Tensor) and not torch.equal(v, w) for v, w in zip(batch, changed, strict=True))
    if not moved:
        return False
    runner = fx.Interpreter(captured.module)
    runner.extra_traceback = False
    try:
        with evaluating(captured.module), torch.no_grad():
            before, after = (
                returned(runner.run(*fresh(list(values)), enable_io_processing=False)) for values in (batch, changed)
            )
    except Exception:  # the user's code may raise anything on values that it was not written for
        return False
    output = Padding({number: inverted}, frozenset(["output"]))
    one, other = ([output.of("output", batch, y) for y in values] for values in (before, after))
    return agree(one, other, 1e-5)


def _other(value: Tensor) -> Tensor:
    """Other values in the range of these."""
    return torch.where(value == value.max(), value.min(), value.max())
