"""RuleContext: one call as its rule sees it, and the methods by which the rule records facts."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.errors import source_line
from fxmerge.ir.capture import Capture
from fxmerge.ir.labels import FIXED, numbers, rows, simplify, spread, thin, varying
from fxmerge.ir.layer_ops import LayerOp
from fxmerge.ir.provenance import Block, Bond, Contraction, Grid, Lab, Layer, Param, Stack
from fxmerge.rules.call_names import call_name, layer_name
from fxmerge.rules.facts import FactsBuilder, pins_of
from fxmerge.rules.routing import routing
from fxmerge.rules.rule import Operand, Unknown
from fxmerge.rules.ties import tied
from fxmerge.weights.by_path import at


class RuleContext:
    """One call as its rule sees it, and the methods by which the rule records facts.

    rule_name:  the name of the rule's row in `RULES`
    target:     the function, the name of the method, or the module that is called
    shape:      of the tensor that the call returned in the example run; None where it returned something else
    """

    def __init__(self, facts: FactsBuilder, capture: Capture, node: fx.Node, rule_name: str, target: Any) -> None:
        self._facts, self._capture, self._node = facts, capture, node
        self.rule_name, self.target = rule_name, target
        self.shape: tuple[int, ...] | None = capture.shapes.get(node.name)

    # labels of parameters and activations

    def fresh(self, count: int) -> Tensor:
        """Labels for places that no parameter writes, (count,)."""
        return self._facts.fresh(count)

    def axis(self, param: Param, axis: int, groups: int = 1) -> Tensor:
        """The labels along one axis of a parameter, made at its first use: (size,), or (groups * size,)."""
        size = param.value.size(axis) * groups
        known = self._facts.axes.get((param.path, axis))
        if known is None:
            known = self._facts.axes[param.path, axis] = self._facts.fresh(size)
            if groups > 1:
                self._facts.groups.setdefault(param.path, groups)
        if known.numel() != size:
            self.freeze(param, "is used with different numbers of groups")
            return torch.zeros(size, dtype=torch.int64)
        return known

    def elements(self, param: Param) -> Tensor:
        """A label for each element of a raw parameter, made at its first use; shaped like the parameter."""
        return self._facts.labelled_elements(param)

    def raw(self, labels: Tensor) -> list[Param]:
        """The raw parameters that have elements among these labels."""
        inside = [path for path, own in self._facts.elements.items() if bool(torch.isin(own, labels).any())]
        return [Param(path, at(self._capture.module, path)) for path in inside]

    def along(self, x: Lab, axis: int) -> Tensor:
        """The label at each place along an axis, (size,). All labels at one place are tied to each other."""
        size = x.t.size(axis)
        places = thin(x.t).movedim(axis, 0).flatten(1) if x.t.dim() > 1 else thin(x.t)[:, None]
        if places.size(1) > 1:
            self.tie(places[:, :1].expand_as(places), places)
        return places[:, 0].expand(size).clone()

    def shared_along(self, x: Lab, axis: int) -> Tensor:
        """The label at each place along an axis, (size,), for parameters that all blocks of x share."""
        if not self.whole or not set(varying(x.t)) - {axis}:
            return self.along(x, axis)
        shared = self.fresh(x.t.size(axis))
        self.meet(x.t, spread(shared, [s if a == axis else 1 for a, s in enumerate(x.t.shape)], axis))
        return shared

    def mixing(self, x: Lab) -> Lab | Unknown:
        """The activation after an op that mixes its places: all labels at the places of one channel are tied.

        Places are the axes after batch and channels; without a batch axis, which holds no labels, those after the
        first. Where only they hold labels, it is the channels that the op would mix: Unknown.
        """
        held = varying(x.t)
        first = 1 if x.t.dim() == 3 and 0 in held else 2
        if all(axis < first for axis in held):
            return x
        if all(axis >= first for axis in held):
            return Unknown("mixes the channels")
        one = x.t[tuple(slice(0, 1) if axis >= first else slice(None) for axis in range(x.t.dim()))]
        self.tie(one.expand_as(x.t), x.t)
        return Lab(simplify(one.expand_as(x.t)))

    @property
    def whole(self) -> bool:
        """May whole blocks of channels leave (heads of attention, groups of a convolution)?"""
        return self._facts.whole

    def tie(self, left: Tensor, right: Tensor) -> None:
        """These labels are dropped together or not at all, position by position. A label that meets FIXED is pinned."""
        self._laid_out_alike(left, right)
        ties, pins = tied(self._node, left, right)
        self._facts.ties += ties
        self._facts.pins += pins

    def pin(self, labels: Tensor, reason: str) -> None:
        """These channels stay."""
        self._facts.pin(self._node, labels, reason)

    def freeze(self, param: Operand, reason: str) -> None:
        """This parameter keeps its shape. Other operands are ignored."""
        if isinstance(param, Param):
            self._facts.freeze(self._node, param, reason)

    def want(self, constant: Operand, labels: Tensor) -> None:
        """A constant meets these labels; if it can be made as wide as they are, `analysis.constants` will do so."""
        self._facts.want(constant, labels)

    def block(self, rows: Tensor, outer: tuple[int, ...] = (), *, leaves_whole: bool = True) -> None:
        """Each of these rows, (blocks, size), loses equally many channels. outer, leaves_whole: see `ir.Block`."""
        self._facts.blocks.append(Block(rows, self._node.name, source_line(self._node), outer, leaves_whole))

    def hold_places(self, labels: Tensor, held: Collection[int], *, single: bool) -> None:
        """No channel may come to another place along the `held` axes, whatever leaves along the others.

        single: is there one value of something else for each place along `held`? Then all places lose equally many.
        """
        axes = varying(labels)
        inside = tuple(at for at, axis in enumerate(axes) if axis in held)
        if inside and len(inside) < len(axes):
            self._grid(labels, inside, single)

    def stack(
        self, param: Param, labels: Tensor, key: fx.Node | None, *, rows: Tensor | None = None, axis: int = 0
    ) -> None:
        """The first axis of a parameter numbers experts (`ir.provenance.Stack`). key: None if places have all."""
        source = routing(key) if key is not None else ""
        self._facts.stacks.append(Stack(self._node.name, param.path, labels, len(param.value), source, rows, axis))

    def operand(self, index: int, name: str) -> fx.Node | None:
        """The node of an argument of the call, by its position or its name."""
        given = self._node.args[index] if index < len(self._node.args) else self._node.kwargs.get(name)
        given = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given
        return given if isinstance(given, fx.Node) else None

    def _laid_out_alike(self, *operands: Tensor) -> None:
        """Operands that meet position by position are packed along the same axis when channels leave."""
        if all(len(varying(t)) > 1 for t in operands) and operands[0] is not operands[-1]:
            for t in operands:
                self._grid(t, (), False)

    def _grid(self, labels: Tensor, held: tuple[int, ...], single: bool) -> None:
        axes = varying(labels)
        small = labels[tuple(slice(None) if axis in axes else 0 for axis in range(labels.dim()))]
        self._facts.grids.append(Grid(small, self._node.name, source_line(self._node), held, single))

    def bond(
        self,
        rows: Tensor,
        *,
        held: Tensor | None = None,
        ties: tuple[Tensor, Tensor] | None = None,
        pins: tuple[Tensor, str] | None = None,
    ) -> None:
        """Each of these rows, (blocks, size), leaves whole while `held` stays; otherwise `ties` and `pins` hold.

        See `ir.Bond`.
        """
        kept_ties, kept_pins = tied(self._node, *ties) if ties is not None else ([], [])
        if pins is not None:
            kept_pins += pins_of(self._node, *pins)
        if not self.whole:
            self._facts.ties += kept_ties
            self._facts.pins += kept_pins
            return
        stays = pins_of(self._node, held, "is shared by blocks that leave whole") if held is not None else []
        self._facts.bonds.append(Bond(rows, self._node.name, tuple(stays), tuple(kept_ties), tuple(kept_pins)))

    def meet(self, a: Tensor, b: Tensor) -> None:
        """Tie two operands; but blocks of `a` along axes where `b` has size 1 may leave whole while `b` stays.

        As everywhere, the channels inside a block lie along the last axis that labels vary along.
        """
        alone = [axis for axis in varying(a) if b.size(axis) == 1]
        if self.whole and alone and varying(a)[-1] not in alone:
            self._laid_out_alike(a, b)
            self.bond(rows(a, alone), held=b, ties=(a, b))
        else:
            self.tie(a, b)

    def numbered(self, sizes: Sequence[int], blocks: Sequence[Tensor]) -> Tensor:
        """A label for each of some blocks, shaped `sizes`, dropped with its block. blocks: rows, (blocks, size)."""
        number = self.fresh(prod(sizes)).view(tuple(sizes))
        self._facts.block_numbers.append(number.flatten())
        self.bond(torch.cat([number.view(-1, 1), *blocks], 1), pins=(number, "numbers the blocks of other channels"))
        return number

    def is_number(self, labels: Tensor) -> bool:
        """Are these the numbers of blocks, not channels?"""
        known = torch.cat([torch.zeros(1, dtype=torch.int64), *self._facts.block_numbers])
        return bool(torch.isin(thin(labels), known).all())

    def counted(self, a: Tensor, b: Tensor) -> bool:
        """Has b one value for each block of a, and no channels? Then it is recorded that they are dropped together."""
        blocks = [axis for axis in varying(a) if b.size(axis) > 1]
        if not blocks or varying(a)[-1] in blocks or not self.is_number(b):
            return False
        inside = rows(a, blocks)
        if bool((inside == FIXED).any()) or torch.unique(inside).numel() < inside.numel():
            return False
        number = b[tuple(slice(None) if axis in blocks else 0 for axis in range(b.dim()))]
        self.block(inside)
        self.bond(torch.cat([number.reshape(-1, 1), inside], 1))
        return True

    def mix(self, labels: Tensor, axes: Collection[int] | None = None) -> None:
        """Each of these channels changes with the others, as in a LayerNorm: dropping one is not exact for the rest.

        axes: those that the op mixes along; the channels keep their places along the others
        """
        if axes is not None:
            self.hold_places(labels, set(varying(labels)) - set(axes), single=False)
        self._facts.mixers.append((self._node.name, numbers(labels)))

    def layer(
        self,
        op: str | LayerOp,
        params: Mapping[str, Operand],
        *,
        reads: Tensor | None = None,
        writes: Tensor | None = None,
        carries: Tensor | None = None,
        groups: int = 1,
        transposed: bool = False,
        eps: float = 0.0,
        batch_statistics: bool = False,
        inner: bool = False,
    ) -> None:
        """Record a layer. params: slot ("weight", "bias") -> parameter, or None; the rest as in `ir.Layer`."""
        node = self._node
        paths = {slot: param.path for slot, param in params.items() if isinstance(param, Param)}
        name = str(node.target) if node.op == "call_module" else layer_name(next(iter(paths.values()), ""))
        self._facts.layers.append(
            Layer(
                node=node.name,
                module=name or node.name,
                operation=op if isinstance(op, LayerOp) else LayerOp(op),
                params=paths,
                reads=reads,
                writes=writes,
                carries=carries,
                groups=groups,
                transposed=transposed,
                eps=eps,
                batch_statistics=batch_statistics,
                inner=inner,
            )
        )

    def contraction(self, a: Tensor, b: Tensor, letters: tuple[str, str], out: str) -> None:
        """Record a sum of products of two activations, with a letter for each axis as in einsum."""
        self._facts.contractions.append(Contraction(self._node.name, a, b, letters, out))

    # the call in its graph

    @property
    def called(self) -> str:
        """The name of what is called, for messages."""
        return call_name(self._node)

    def uses(self, index: int, name: str) -> bool:
        """Does the graph use one of the several values that the call returns?"""
        for user in self._node.users:
            taken = user.args[1] if user.target in (operator.getitem, getattr) and user.args[0] is self._node else None
            if taken is None or (taken in (index, name) and user.users):
                return True
        return False

    def example(self, attribute: str) -> torch.dtype | torch.device | None:
        """The "dtype" or "device" that the first operand had in the example run; None where it was not a tensor."""
        source = self._node.args[0]
        known = self._capture.dtypes if attribute == "dtype" else self._capture.devices
        return known.get(source.name) if isinstance(source, fx.Node) else None


def resized(x: Lab, shape: Sequence[int]) -> Lab | Unknown:
    """The same labels on another shape of as many axes; Unknown where labels vary along an axis that changes size."""
    small = x.t
    for axis in range(small.dim()):
        if small.dim() == len(shape) and small.size(axis) != shape[axis]:
            if axis in varying(small):
                return Unknown("changes the size of the channel axis")
            small = small.narrow(axis, 0, 1)
    return Lab(simplify(torch.broadcast_to(small, tuple(shape))))
