"""Joint: a layer that lost outputs and the layer that reads them, fitted together.

Refit solves one layer at a time, each towards the original's outputs. Where nothing but a layer B reads what a layer A
writes, A's outputs need not be the original's: any will do from which B can make the original's. With h between them,

    E(A, B) = |r|^2 / 2N + pull,     r = gain (B(h(A x)) - y*),     N output positions

(gain and y* as `targets` tells) is lowered from the solved weights by STEPS of L-BFGS. A layer's weights W (o, p), of
patches with Gram G about their mean, move in coordinates V in which E is about round, as Kronecker factors tell
(Martens & Grosse, 2015, "Optimizing neural networks with Kronecker-factored approximate curvature", section 3):

    W = W0 + K'^-1 V L^-1,    L L' = G + ridge d I,  d = mean(diag G),    K K' = S + LEAST mean(diag S) I,  S = mean J'J

with J the slopes of r by the layer's outputs at their own position: those of random signs times r have the mean square
S (Hutchinson, 1990). The pull, ridge d tr(DW' S DW) / 2 for DW = W - W0, is what `systems` has for one layer alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxmerge.calibration.paired_run import Lockstep
from fxmerge.calibration.patches import Form, at_positions, patches, positions, rows_of, weight_of
from fxmerge.methods.least_squares import Reduce, second_moments
from fxmerge.refit.chains import Chain
from fxmerge.refit.targets import Goal

STEPS = 10  # of L-BFGS, without a line search: in these coordinates none is needed, and the best of all steps is taken
PASSES = 3 * (STEPS + 2)  # forward passes that they cost; a backward pass costs two
BUDGET = 5e12  # FLOPs of a refit's joint steps together, at most
POSITIONS = 8  # for each weight of an output, at least: with fewer, they are fitted to chance
ENOUGH = 2**17  # positions: more bring nothing
ROWS = 8192  # positions for a Gram that only chooses coordinates
RIDGE = 3e-2
LEAST = 1e-3


@dataclass(frozen=True)
class Fitted:
    """Where a layer's weights are: the parameters themselves, which are written, and their geometry."""

    form: Form
    weight: Tensor
    bias: Tensor | None


def affordable(flops: float, count: int, device: torch.device, reduce: Reduce) -> int:
    """How many batches of `count` are used, the same share on every process; 0 where one batch of all is too much.

    flops: of a forward pass of all chains for one batch
    """
    told = reduce(torch.tensor([PASSES * flops * count, float(count)], dtype=torch.float64, device=device))
    share = min(1.0, BUDGET / max(float(told[0]), 1.0))
    return max(1, int(share * count)) if share * float(told[1]) >= 1 else 0


def fit(run: Lockstep, chain: Chain, places: Sequence[Fitted], goals: Sequence[Goal], seed: int) -> bool:
    """Lower E by the weights of a chain's layers, in place; False where it comes to nothing.

    goals: of the batches that are used
    """
    if any(place.weight.dtype not in (torch.float32, torch.float64) for place in places):
        return False
    return _Joint(run, chain, places, goals, seed).run()


def along(run: Lockstep, chain: Chain, number: int, seen: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """What the last layer reads, for one batch. seen: takes inputs and outputs of the layers before it."""
    value, fitted = chain.inputs[number], {layer.node for layer in chain.layers}
    for node in chain.nodes[:-1]:
        before, value = value, run.again(node, value, number)
        if seen is not None and node.name in fitted:
            seen.append((before, value))
            value = value.clone()  # for ops that write in place
    return value


class _Joint:
    def __init__(self, run: Lockstep, chain: Chain, places: Sequence[Fitted], goals: Sequence[Goal], seed: int) -> None:
        self.lockstep, self.chain, self.places, self.goals = run, chain, places, goals
        self.reduce, self.seed = run.reduce, seed
        self.leaves = [t for place in places for t in (place.weight, place.bias) if t is not None]

    def run(self) -> bool:
        flags = [leaf.requires_grad for leaf in self.leaves]
        try:
            for leaf in self.leaves:
                leaf.requires_grad_(True)
            variables = self._variables()
            return bool(variables) and self._descend(variables)
        finally:
            for leaf, flag in zip(self.leaves, flags, strict=True):
                leaf.requires_grad_(flag)

    def _seen(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and outputs of every layer for one batch."""
        seen: list[tuple[Tensor, Tensor]] = []
        last = along(self.lockstep, self.chain, number, seen)
        return [*seen, (last, self.lockstep.again(self.chain.nodes[-1], last, number))]

    def _descend(self, variables: Sequence[_Variable]) -> bool:
        moving = [variable.at for variable in variables]
        first, least, best = torch.inf, torch.inf, [at.detach().clone() for at in moving]

        def energy() -> Tensor:
            nonlocal first, least, best
            for variable in variables:
                variable.write()
            total, slopes = self._slopes()
            for variable in variables:
                total = total + variable.slope(slopes)
            first = float(total) if first == torch.inf else first
            if float(total) < least:
                least, best = float(total), [at.detach().clone() for at in moving]
            return total

        torch.optim.LBFGS(
            moving, max_iter=STEPS, history_size=STEPS, tolerance_grad=0.0, tolerance_change=0.0
        ).step(energy)  # type: ignore[no-untyped-call]  # fmt: skip
        for variable, value in zip(variables, best, strict=True):
            variable.at.data.copy_(value)
            variable.write()
        return least < first

    def _slopes(self) -> tuple[Tensor, dict[int, Tensor]]:
        """|r|^2 / 2N, and its slope by each leaf's identity, float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.leaves[0].device)
        found, count = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in self.leaves], 0
        for number in range(len(self.goals)):
            with torch.enable_grad():
                last = along(self.lockstep, self.chain, number)
                gap = self.goals[number].missed(self.lockstep.again(self.chain.nodes[-1], last, number))
                square = gap.square().sum() / 2
                slopes = torch.autograd.grad(square, self.leaves)
            total, count = total + square.detach(), count + positions(gap, self.places[-1].form)
            for sum_, slope in zip(found, slopes, strict=True):
                sum_ += slope
        scale = self.reduce(torch.tensor(float(count), dtype=torch.float64, device=found[0].device))
        found = [self.reduce(slope) / scale for slope in found]
        return self.reduce(total) / scale, {id(leaf): slope for leaf, slope in zip(self.leaves, found, strict=True)}

    def _variables(self) -> list[_Variable]:
        """Each layer's, from its patches and S; none where an op on the way has no gradient, or a matrix no root."""
        batches = float(self.reduce(self.leaves[0].new_tensor(float(len(self.goals)), dtype=torch.float64)))
        rows: list[list[Tensor]] = [[] for _ in self.places]
        squares: list[Tensor | float] = [0.0 for _ in self.places]
        counts = [0.0 for _ in self.places]
        for number, goal in enumerate(self.goals):
            generator = torch.Generator().manual_seed(self.seed)  # anew: no matter which process has the batch
            try:
                with torch.enable_grad():
                    seen = self._seen(number)
                    missed = goal.missed(seen[-1][1])
                    signs = torch.randint(0, 2, missed.shape, generator=generator).to(missed) * 2 - 1
                    slopes = torch.autograd.grad((missed * signs).sum(), [out for _, out in seen])
            except RuntimeError:
                return []
            for i, (place, (before, after), slope) in enumerate(zip(self.places, seen, slopes, strict=True)):
                count = positions(after, place.form)
                index = torch.randperm(count, generator=generator)[: -int(-ROWS // batches)]
                rows[i].append(patches(before.detach(), place.form, index.to(before.device)))
                by_row = at_positions(slope, place.form, torch.arange(count, device=slope.device)).double()
                by_row = by_row.reshape(count, place.form.groups, -1).transpose(0, 1)  # (g, rows, o)
                squares[i], counts[i] = squares[i] + by_row.mT @ by_row, counts[i] + count
        found = []
        for place, own, square, seen_at in zip(self.places, rows, squares, counts, strict=True):
            assert isinstance(square, Tensor)
            mean, gram = second_moments(own, self.reduce)
            square = self.reduce(square) / self.reduce(square.new_tensor(seen_at))
            if not bool(gram.isfinite().all()) or not bool(square.isfinite().all()):
                return []
            try:
                found.append(_Variable(place, mean, gram, square))
            except RuntimeError:  # rounding outweighs the ridge: inputs that hardly move
                return []
        return found


class _Variable:
    """A layer's weights W0 + K'^-1 V L^-1 and its bias b0 + K'^-1 v - DW mean."""

    def __init__(self, place: Fitted, mean: Tensor, gram: Tensor, square: Tensor) -> None:
        self.place, self.mean = place, mean if place.bias is not None else torch.zeros_like(mean)
        self.start = rows_of(place.weight.detach(), place.form).to(torch.float64, copy=True)  # (g, o, p)
        blocks = self.start.shape[:2]
        self.bias = None if place.bias is None else place.bias.detach().to(torch.float64, copy=True).view(blocks)
        self.square = square + LEAST * _level(square) * _eye(square)
        if place.bias is None:  # about zero
            gram = gram + mean[:, :, None] * mean[:, None]
        self.pull = RIDGE * _level(gram)  # (g, 1, 1)
        self.left = torch.linalg.cholesky(self.square)  # K
        self.right = torch.linalg.cholesky(gram + self.pull * _eye(gram))  # L
        shape = (*self.start.shape[:2], self.start.size(2) + (self.bias is not None))
        self.at = torch.zeros(shape, dtype=torch.float64, device=self.start.device, requires_grad=True)

    def _moved(self) -> tuple[Tensor, Tensor | None]:
        """DW and by what the outputs' mean moves."""
        moved = torch.linalg.solve_triangular(self.left.mT, self.at.detach(), upper=True)
        width = self.start.size(2)
        change = torch.linalg.solve_triangular(self.right, moved[..., :width], upper=False, left=False)
        return change, moved[..., width] if self.bias is not None else None

    def write(self) -> None:
        change, shift = self._moved()
        self.place.weight.data.copy_(weight_of(self.start + change, self.place.form, self.place.weight))
        if self.place.bias is not None and self.bias is not None and shift is not None:
            offset = self.bias + shift - torch.einsum("gop,gp->go", change, self.mean)
            self.place.bias.data.copy_(offset.view_as(self.place.bias))

    def slope(self, slopes: Mapping[int, Tensor]) -> Tensor:
        """The pull; E's slope by V is put where the optimizer looks for it."""
        change, _ = self._moved()
        pulled = self.pull * (self.square @ change)
        slope = rows_of(slopes[id(self.place.weight)], self.place.form) + pulled
        if self.place.bias is not None:
            by_bias = slopes[id(self.place.bias)].view(self.start.shape[:2])
            slope = slope - by_bias[..., None] * self.mean[:, None]
        slope = torch.linalg.solve_triangular(self.right.mT, slope, upper=True, left=False)
        if self.place.bias is not None:
            slope = torch.cat([slope, by_bias[..., None]], -1)
        self.at.grad = torch.linalg.solve_triangular(self.left, slope, upper=False).contiguous()
        return (pulled * change).sum() / 2


def _level(square: Tensor) -> Tensor:
    """mean(diag) of each matrix, 1 where all is zero: (g, 1, 1)."""
    level = square.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(level > 0, level, 1.0)[:, None, None]


def _eye(square: Tensor) -> Tensor:
    return torch.eye(square.size(-1), dtype=square.dtype, device=square.device)
