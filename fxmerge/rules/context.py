"""Context: what a rule sees of the run that calls it, and where it says what it learnt."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.errors import source_line
from fxmerge.graph import nested
from fxmerge.ir.labels import FIXED, fixed, numbers, rows, simplify, spread, thin, varying
from fxmerge.ir.provenance import Block, Bond, Contraction, Lab, Layer, Param, Pin, Tie
from fxmerge.rules import movement


class Context:
    """What a rule sees of the run, and where it says what it learnt."""

    def __init__(self, run: Any, node: fx.Node, rule_name: str, target: Any, operands: Sequence[Any]) -> None:
        self._run: Any = run
        self._node, self._operands = node, operands
        self.rule_name, self.target = rule_name, target
        self.shape = run.capture.shapes.get(node.name)
        self.kind: str | None = None  # a rule may say that this call is of another kind than its row

    def fresh(self, count: int) -> Tensor:
        """Labels for places that no parameter writes."""
        labels: Tensor = self._run.new(count)
        return labels

    def axis(self, param: Param, axis: int, groups: int = 1) -> Tensor:
        """The labels along one axis of a parameter, made on first sight: (size,), or (groups * size,)."""
        known: dict[int, Tensor] = self._run.axes.setdefault(param.path, {})
        if axis not in known:
            known[axis] = self._run.new(param.value.size(axis) * groups)
        if groups > 1:
            self._run.groups[param.path] = groups
        if known[axis].numel() != param.value.size(axis) * groups:
            self.freeze(param, "is used with different numbers of groups")
            return torch.zeros(param.value.size(axis) * groups, dtype=torch.int64)
        return known[axis]

    def elements(self, param: Param) -> Tensor:
        """A label for each element of a raw parameter."""
        known: dict[str, Tensor] = self._run.elements
        if param.path not in known:
            known[param.path] = self._run.new(param.value.numel()).view(param.value.shape)
        return known[param.path]

    def along(self, x: Lab, axis: int) -> Tensor:
        """The label at each place along an axis, (size,); what else stands at that place is tied to it."""
        size = x.t.size(axis)
        places = thin(x.t).movedim(axis, 0).flatten(1) if x.t.dim() > 1 else thin(x.t)[:, None]
        if places.size(1) > 1:
            self.tie(places[:, :1].expand_as(places), places)
        return places[:, 0].expand(size).clone()

    def carried(self, x: Lab, axis: int) -> Tensor:
        """The label at each place along an axis, (size,), for parameters that all blocks of x share."""
        if not self.whole or not set(varying(x.t)) - {axis}:
            return self.along(x, axis)
        shared = self.fresh(x.t.size(axis))
        self.meet(x.t, spread(shared, [s if a == axis else 1 for a, s in enumerate(x.t.shape)], axis))
        return shared

    def mixing(self, x: Lab) -> Lab | None:
        """An activation whose places an op mixes: what stands at the places of a channel becomes one.

        Places are the axes behind batch and channels; without a batch axis, which holds no labels, those behind the
        first. None where channels stand along no other axis: then it is they that are mixed.
        """
        held = varying(x.t)
        first = 1 if x.t.dim() == 3 and 0 in held else 2
        if all(axis < first for axis in held):
            return x
        if all(axis >= first for axis in held):
            return None
        one = x.t[tuple(slice(0, 1) if axis >= first else slice(None) for axis in range(x.t.dim()))]
        self.tie(one.expand_as(x.t), x.t)
        return Lab(simplify(one.expand_as(x.t)))

    def resized(self, x: Lab, shape: Sequence[int]) -> Any:
        """The same labels on another shape of as many axes, where labels do not vary along an axis that changes."""
        small = x.t
        for axis in range(small.dim()):
            if small.dim() == len(shape) and small.size(axis) != shape[axis]:
                if axis in varying(small):
                    return self.unknown("changes the size of the channel axis")
                small = small.narrow(axis, 0, 1)
        return Lab(simplify(torch.broadcast_to(small, tuple(shape))))

    @property
    def whole(self) -> bool:
        """May whole blocks of channels leave (heads of attention, groups of a convolution)?"""
        return bool(self._run.whole)

    def tie(self, left: Tensor, right: Tensor) -> None:
        """Labels that become equal, position by position; those that meet FIXED are pinned."""
        left, right = thin(left), thin(right)
        if left.shape != right.shape:
            left, right = self._met(left, right)
        left, right = left.flatten(), right.flatten()
        if not bool(torch.minimum(left, right).all()):  # FIXED is 0, and no label is less
            for one, other in ((left, right), (right, left)):
                self.pin(other[one == FIXED], "meets values that are not channels of a layer")
            here = (left != FIXED) & (right != FIXED)
            left, right = left[here], right[here]
        differ = left != right
        if not bool(differ.all()):
            left, right = left[differ], right[differ]
        if left.numel():
            self._run.ties.append(Tie(self._node.name, left, right))

    def _met(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Two label tensors laid over each other; each axis that is only one's own is tied by itself."""
        sizes = list(zip(left.shape, right.shape, strict=False)) if left.dim() == right.dim() else []
        alone = [(left, [b == 1 for _, b in sizes]), (right, [a == 1 for a, _ in sizes])]
        firsts = [t[tuple(slice(0, 1) if spread else slice(None) for spread in s)] for t, s in alone]
        if sizes and all(f.numel() < t.numel() for f, (t, _) in zip(firsts, alone, strict=True)):
            for first, (t, _) in zip(firsts, alone, strict=True):  # not each of one with each of the other
                self.tie(first, t)
            left, right = firsts
        met: tuple[Tensor, Tensor] = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]
        return met

    def pin(self, labels: Tensor, reason: str) -> None:
        self._run.pins += self._pins(labels, reason)

    def _pins(self, labels: Tensor, reason: str) -> list[Pin]:
        found = numbers(labels)
        return [Pin(found, reason, self._node.name, source_line(self._node))] if found.numel() else []

    def freeze(self, param: Any, reason: str) -> None:
        """This parameter may not change its shape."""
        if isinstance(param, Param):
            self._run.frozen.setdefault(param.path, (f"{param.path} {reason}", self._node))

    def block(self, rows: Tensor) -> None:
        self._run.blocks.append(Block(rows, self._node.name))

    def bond(
        self,
        rows: Tensor,
        *,
        held: Tensor | None = None,
        ties: tuple[Tensor, Tensor] | None = None,
        pins: tuple[Tensor, str] | None = None,
    ) -> None:
        """Rows (blocks, size) that leave whole, `held` labels staying; else `ties` and `pins` hold (see `ir.Bond`)."""
        run, known_ties, known_pins = self._run, len(self._run.ties), len(self._run.pins)
        if ties is not None:
            self.tie(*ties)
        if pins is not None:
            self.pin(*pins)
        if self.whole:
            otherwise = tuple(run.ties[known_ties:]), tuple(run.pins[known_pins:])
            del run.ties[known_ties:], run.pins[known_pins:]
            stays = self._pins(held, "is shared by blocks that leave whole") if held is not None else []
            run.bonds.append(Bond(rows, self._node.name, tuple(stays), *otherwise))

    def meet(self, a: Tensor, b: Tensor) -> None:
        """Tie two operands; but blocks of `a` along axes where `b` has size 1 may leave whole, `b` staying as it is.

        As everywhere, what is inside of a block stands along the last axis that labels vary along.
        """
        alone = [axis for axis in varying(a) if b.size(axis) == 1]
        if self.whole and alone and varying(a)[-1] not in alone:
            self.bond(rows(a, alone), held=b, ties=(a, b))
        else:
            self.tie(a, b)

    def numbered(self, sizes: Sequence[int], blocks: Sequence[Tensor]) -> Tensor:
        """A label for each of some blocks, shaped `sizes`, which lives as long as the block: rows of (blocks, size)."""
        number = self.fresh(prod(sizes)).view(tuple(sizes))
        self._run.numbers.append(number.flatten())
        self.bond(torch.cat([number.view(-1, 1), *blocks], 1), pins=(number, "numbers the blocks of other channels"))
        return number

    def counted(self, a: Tensor, b: Tensor) -> bool:
        """Has b one value for each block of a, and no channels? Then blocks leave with it or lose width."""
        blocks = [axis for axis in varying(a) if b.size(axis) > 1]
        known = torch.cat([torch.zeros(1, dtype=torch.int64), *self._run.numbers])
        if not blocks or varying(a)[-1] in blocks or not bool(torch.isin(thin(b), known).all()):
            return False
        inside = rows(a, blocks)
        if bool((inside == FIXED).any()) or torch.unique(inside).numel() < inside.numel():
            return False
        number = b[tuple(slice(None) if axis in blocks else 0 for axis in range(b.dim()))]
        self.block(inside)
        self.bond(torch.cat([number.reshape(-1, 1), inside], 1))
        return True

    def mix(self, labels: Tensor) -> None:
        self._run.mixers.append((self._node.name, numbers(labels)))

    def layer(self, op: str, params: dict[str, str], **facts: Any) -> None:
        called = self._node.op == "call_module"
        name = str(self._node.target) if called else layer_name(next(iter(params.values()), ""))
        self._run.layers.append(Layer(self._node.name, name or self._node.name, op, params, **facts))

    def contraction(self, a: Tensor, b: Tensor, letters_a: str, letters_b: str) -> None:
        self._run.contractions.append(Contraction(self._node.name, a, b, (letters_a, letters_b)))

    def takes(self, index: int, name: str) -> bool:
        """Does the graph use one of the several values that the op gives?"""
        for user in self._node.users:
            taken = user.args[1] if user.target in (operator.getitem, getattr) and user.args[0] is self._node else None
            if taken is None or (taken in (index, name) and user.users):
                return True
        return False

    def query(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """A shape, a dtype, a device: read off the operand; a dtype or device off what the example run showed."""
        if self.target is getattr and args[0] in TRANSPOSES:
            self.kind = "movement"
            return movement.execute(self, x, *args)
        if self.target is getattr and hasattr(x, "_fields"):  # one of several values
            self.kind = "movement"
            return getattr(x, args[0])
        if self.target is getattr and isinstance(x, Lab):
            name, source = args[0], self._node.args[0]
            if name in ("dtype", "device") and isinstance(source, fx.Node):
                found = getattr(self._run.capture, name + "s").get(source.name)
                return found if found is not None else self.unknown(f"asks for .{name}")
            if name not in ("shape", "ndim", "is_cuda", "requires_grad", "itemsize", "layout"):
                return self.unknown(f"asks for .{name}")
            return getattr(x.t, name)
        plain = x.t if isinstance(x, Lab) else x.value if isinstance(x, Param) else x
        return movement.run(self.target, (plain, *args), kwargs)

    @property
    def called(self) -> str:
        return self._node.target if isinstance(self._node.target, str) else _name(self._node.target)

    def said(self, why: str) -> str:
        """A reason, with the op that it is of."""
        return f"{self.called} {why}" if why.split(" ")[0] in _VERBS else f"{self.called}: {why}"

    def unknown(self, why: str = "has no rule") -> Any:
        """Pin all that this op touches; what it gives holds no channels."""
        called, reason = self.called, self.said(why)
        for operand in nested.leaves(list(self._operands)):
            if isinstance(operand, Lab):
                self.pin(operand.t, reason)
            elif isinstance(operand, Param):
                self.freeze(operand, f"is used by {called}, which {why}")
        if self._node.op == "call_module":
            owner = self._run.capture.module.get_submodule(str(self._node.target))
            for name, value in [*owner.named_parameters(), *owner.named_buffers()]:
                self.freeze(Param(f"{self._node.target}.{name}", value), f"belongs to {called}, which {why}")
        self.kind = "unknown"
        return Lab(fixed(self.shape)) if self.shape is not None else Opaque()


TRANSPOSES = ("T", "mT")  # attributes that are movements
_VERBS = {"has", "takes", "gives", "changes", "reduces", "is", "does", "meets", "spreads", "joins", "asks", "maps"}


def layer_name(path: str) -> str:
    """What users call the layer that a parameter is of: its module, or the parameter itself."""
    owner, _, name = path.rpartition(".")
    return owner if owner and name in ("weight", "bias") else path


class Opaque:
    """What an op without a rule gave when it was no single tensor; whatever takes it apart has no rule either."""


def _name(target: Any) -> str:
    return getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)
