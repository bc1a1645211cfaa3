"""Joint steps: the layers that write channels and those that read them, fitted together.

Refit solves one layer at a time, each towards the original's outputs. If nothing but a layer B reads the outputs of a
layer A, they need not be the original's: it is enough that B can compute the original's outputs from them. With the ops
h between the two layers, the energy

    E(A, B) = |r(B(h(A x)))|^2 / 2N + pull,     N output positions

(the residual r is defined in `targets`) is lowered from the solved weights by L-BFGS, until it stops falling on the
output positions that are held out. Likewise for a region of several layers (see `regions`): the energies of its ends
are added, each divided by the variance of its targets and multiplied by the mean of these variances, and no end may get
worse.

The coordinates in which the weights move are those of `coordinates`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxmerge.calibration.paired_run import PairedRun, moments
from fxmerge.calibration.patches import (
    at_positions,
    by_position,
    input_of,
    patches,
    positions,
    scaled_by_position,
)
from fxmerge.graph.kernels import without_faults
from fxmerge.methods.least_squares import Reduce, second_moments
from fxmerge.refit import solve
from fxmerge.refit.coordinates import Coordinates
from fxmerge.refit.layer_weights import LayerWeights
from fxmerge.refit.regions import Region
from fxmerge.refit.targets import Target

STEPS = 24  # of L-BFGS, at most, without a line search: these coordinates do not need one
PATIENCE = 4  # steps without a gain that is worth them; the best one is taken
GAIN = 0.03  # what is worth a step: a share of all that the held-out positions have gained so far, or of what is left
HISTORY = 10  # steps that L-BFGS remembers
PASSES = 36  # the cost of as many steps as are usual, in forward passes; a backward pass costs two
BUDGET = 5e12  # FLOPs of all joint steps of a refit together, at most
POSITIONS = 8  # output positions for each weight of an output, at least: with fewer, the layers are fitted to noise
ENOUGH = 2**16  # output positions; more hardly improve the fit
ROWS = 8192  # output positions for the Gram matrices, which only define coordinates
MOST = 30.0  # the largest ridge of a layer


def affordable(flops: float, count: int, device: torch.device, reduce: Reduce) -> int:
    """How many of `count` batches are used, the same share on every process; 0 where BUDGET does not allow one.

    flops: of a forward pass of all regions for one batch
    """
    totals = reduce(torch.tensor([PASSES * flops * count, float(count)], dtype=torch.float64, device=device))
    share = min(1.0, BUDGET / max(float(totals[0]), 1.0))
    return max(1, int(share * count)) if share * float(totals[1]) >= 1 else 0


@dataclass(frozen=True, kw_only=True)
class End:
    """What the outputs of a region's last layer should be, for the batches that are used.

    held: (positions,) bool by batch: the output positions that only judge the steps
    used: the same of those that are fitted; the others are padding
    """

    targets: Sequence[Target]
    held: Sequence[Tensor]
    used: Sequence[Tensor]

    def first(self, count: int) -> End:
        """The same for the first batches."""
        return End(targets=self.targets[:count], held=self.held[:count], used=self.used[:count])

    def variance(self, reduce: Reduce) -> float:
        """The variance of the targets as the residual measures it, the sum over the channels."""
        first, seen = self.targets[0], [one | other for one, other in zip(self.held, self.used, strict=True)]
        if all(bool(s.all()) for s in seen):
            _, found = moments([target.outputs for target in self.targets], first.axis, reduce)
        else:
            rows = [t.outputs.movedim(t.axis, -1).flatten(0, -2)[s] for t, s in zip(self.targets, seen, strict=True)]
            _, found = moments(rows, 1, reduce)
        return float((found * first.affine.gain.to(found).square()).sum())


def fit(
    run: PairedRun,
    region: Region,
    weights: Mapping[str, LayerWeights],
    ends: Mapping[str, End],
    *,
    ridges: Mapping[str, float],
    seed: int,
) -> bool:
    """Lower E by changing the weights of a region's layers in place; False where they are left unchanged.

    weights, ends:  of the region's layers and of its ends, by node
    ridges:         by node, the share of the Gram's mean diagonal by which a layer is pulled towards its weights
    """
    if any(held.weight.dtype not in (torch.float32, torch.float64) for held in weights.values()):
        return False
    return _Joint(run, region, weights, ends, ridges=ridges, seed=seed).run()


def along(
    run: PairedRun, nodes: Sequence[fx.Node], number: int, fitted: Container[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values of these nodes for one batch, and the outputs of the fitted layers among them, before shifts."""
    values: dict[str, Any] = {}
    outputs: dict[str, Tensor] = {}
    inside = set(nodes)
    for node in nodes:
        value = run.again(node, values, number)
        if node.name in fitted:
            outputs[node.name] = value
            if not inside.isdisjoint(node.users):
                value = value.clone()  # for ops that write in place
        values[node.name] = run.shifted(node, value)
    return values, outputs


class _Joint:
    """The joint steps of one region."""

    def __init__(
        self,
        run: PairedRun,
        region: Region,
        weights: Mapping[str, LayerWeights],
        ends: Mapping[str, End],
        *,
        ridges: Mapping[str, float],
        seed: int,
    ) -> None:
        self.paired, self.region, self.weights, self.seed, self.reduce = run, region, weights, seed, run.reduce
        self.residuals = {name: [target.residual() for target in end.targets] for name, end in ends.items()}
        self.held = {name: end.held for name, end in ends.items()}
        self.used = {name: end.used for name, end in ends.items()}
        self.batches = len(next(iter(self.held.values())))
        self.ridges = {name: min(max(ridges.get(name, solve.RIDGE), solve.RIDGE), MOST) for name in weights}
        self.units = self._units(ends)
        self.leaves = [t for held in weights.values() for t in (held.weight, held.bias) if t is not None]

    def _units(self, ends: Mapping[str, End]) -> dict[str, float]:
        """By end, the factor of its energy: the mean variance of the ends, as a multiple of its own."""
        if len(ends) == 1:
            return dict.fromkeys(ends, 1.0)
        variances = {name: max(end.variance(self.reduce), 1e-300) for name, end in ends.items()}
        mean = sum(variances.values()) / len(variances)
        return {name: mean / variance for name, variance in variances.items()}

    def run(self) -> bool:
        flags = [leaf.requires_grad for leaf in self.leaves]
        try:
            for leaf in self.leaves:
                leaf.requires_grad_(True)
            judged = all(judging for _, judging in self._counts.values())
            variables = self._variables() if judged else []
            return bool(variables) and self._descend(variables)
        finally:
            for leaf, flag in zip(self.leaves, flags, strict=True):
                leaf.requires_grad_(flag)

    def _descend(self, variables: Sequence[Coordinates]) -> bool:
        moving = [variable.at for variable in variables]
        first: dict[str, float] = {}
        least, best = torch.inf, [at.detach().clone() for at in moving]
        mark, since = torch.inf, 0  # the last energy that was worth its steps, and the steps since

        def energy() -> Tensor:
            nonlocal first, least, best, mark, since
            for variable in variables:
                variable.write()
            total, judged, slopes = self._slopes()
            for variable in variables:
                total = total + variable.slope(slopes)
            first, since = first or judged, since + 1
            if sum(judged.values()) < least and all(judged[name] <= first[name] for name in judged):
                least, best = sum(judged.values()), [at.detach().clone() for at in moving]
                if least <= mark - GAIN * min(sum(first.values()) - least, least):
                    mark, since = least, 0
            return total

        optimiser = torch.optim.LBFGS(
            moving, max_iter=1, history_size=HISTORY, tolerance_grad=0.0, tolerance_change=0.0
        )  # fmt: skip
        for _ in range(STEPS):
            optimiser.step(energy)  # type: ignore[no-untyped-call]
            if since >= PATIENCE:
                break
        for variable, value in zip(variables, best, strict=True):
            variable.at.data.copy_(value)
            variable.write()
        return least < sum(first.values())

    def _slopes(self) -> tuple[Tensor, dict[str, float], dict[int, Tensor]]:
        """E without the pull; by end, the same on the positions that are held out; its gradients, by the leaves'
        identities.
        """
        counts = self._counts
        total = torch.zeros((), dtype=torch.float64, device=self.leaves[0].device)
        aside = torch.zeros(len(counts), dtype=torch.float64, device=total.device)
        found = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in self.leaves]
        for number in range(self.batches):
            with torch.enable_grad():
                _, outputs = along(self.paired, self.region.nodes, number, self.residuals)
            slopes_at_ends = []
            for place, (name, residuals) in enumerate(self.residuals.items()):
                residual, form = residuals[number], self.weights[name].form
                missed = residual(outputs[name].detach())
                squares = by_position(missed, form)
                held, fitted, (used, judging) = self.held[name][number], self.used[name][number], counts[name]
                total += squares[fitted].sum() * (self.units[name] / (2 * used))
                aside[place] += squares[held].sum() * (self.units[name] / (2 * judging))
                shares = fitted.to(missed) * (self.units[name] / used)
                slopes_at_ends.append(scaled_by_position(residual.slope(missed), form, shares))
            ends = [outputs[name] for name in self.residuals]
            with without_faults((held.weight, held.form.stride) for held in self.weights.values()):
                slopes = torch.autograd.grad(ends, self.leaves, slopes_at_ends)
            for sum_, slope in zip(found, slopes, strict=True):
                sum_ += slope
        judged = dict(zip(counts, self.reduce(aside).tolist(), strict=True))
        slopes_by = {id(leaf): self.reduce(slope) for leaf, slope in zip(self.leaves, found, strict=True)}
        return self.reduce(total), judged, slopes_by

    @cached_property
    def _counts(self) -> dict[str, tuple[float, float]]:
        """By end, the number of output positions that are fitted and of those that judge, on all processes."""
        found = {}
        for name, held in self.held.items():
            pairs = zip(self.used[name], held, strict=True)
            counts = torch.stack([torch.stack([u.sum(), h.sum()]) for u, h in pairs]).sum(0).double()
            used, judging = self.reduce(counts).tolist()
            found[name] = max(used, 1.0), judging
        return found

    def _variables(self) -> list[Coordinates]:
        """The variable of each layer; none where an op has no gradient, or a matrix no Cholesky factor."""
        batches = float(self.reduce(self.leaves[0].new_tensor(float(self.batches), dtype=torch.float64)))
        rows: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        squares: dict[str, Tensor] = {}
        seen = {name: sum(counts) for name, counts in self._counts.items()}  # output positions
        nodes = {node.name: node for node in self.region.nodes}
        sources = {layer.node: input_of(nodes[layer.node], layer.op).name for layer in self.region.layers}
        for number in range(self.batches):
            generator = torch.Generator().manual_seed(self.seed)  # the same for each batch, on whichever process it is
            try:
                with torch.enable_grad():
                    values, outputs = along(self.paired, self.region.nodes, number, self.weights)
                    noise = torch.zeros((), device=self.leaves[0].device)
                    for name, missed in self.residuals.items():
                        gap = missed[number](outputs[name])
                        signs = torch.randint(0, 2, gap.shape, generator=generator).to(gap) * 2 - 1
                        known = (self.held[name][number] | self.used[name][number]).to(gap)
                        noisy = scaled_by_position(gap * signs, self.weights[name].form, known)
                        noise = noise + noisy.sum() * (self.units[name] / seen[name]) ** 0.5
                    slopes = torch.autograd.grad(noise, list(outputs.values()))
            except RuntimeError:
                return []
            for (name, out), slope in zip(outputs.items(), slopes, strict=True):
                form, source = self.weights[name].form, sources[name]
                before = values[source] if source in values else self.paired.merged.values[source][number]
                count = positions(out, form)
                (real,) = self.paired.real(name, [out], form, number)
                among = torch.arange(count) if real is None else real.nonzero().flatten().cpu()
                index = among[torch.randperm(len(among), generator=generator)[: -int(-ROWS // batches)]]
                rows[name].append(patches(before.detach(), form, index.to(before.device)))
                by_row = at_positions(slope, form, torch.arange(count, device=slope.device)).double()
                by_row = by_row.reshape(count, form.groups, -1).transpose(0, 1)  # (g, rows, o)
                square = by_row.mT @ by_row
                squares[name] = squares[name] + square if name in squares else square
        found = []
        for name, held in self.weights.items():
            mean, gram = second_moments(rows.pop(name), self.reduce)
            square = self.reduce(squares[name])
            if not bool(gram.isfinite().all()) or not bool(square.isfinite().all()):
                return []
            try:
                found.append(Coordinates(held, mean, gram, square, self.ridges[name]))
            except RuntimeError:  # rounding errors exceed the ridge, as for inputs that are nearly constant
                return []
        return found
