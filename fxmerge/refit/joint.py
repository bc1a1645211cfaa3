"""Joint steps: a layer that lost output channels and the layer that reads them, fitted together.

Refit solves one layer at a time, each towards the original's outputs. If nothing but a layer B reads the outputs of a
layer A, they need not be the original's: it is enough that B can compute the original's outputs from them. With the ops
h between the two layers, the energy

    E(A, B) = |r(B(h(A x)))|^2 / 2N + pull,     N output positions

(the residual r is defined in `targets`) is lowered from the solved weights by STEPS steps of L-BFGS. Let a layer have
weights W (o, p), and patches with Gram matrix G about their mean. Its weights are optimised in coordinates V in which E
is nearly isotropic, by Kronecker factors (Martens & Grosse, 2015, "Optimizing neural networks with Kronecker-factored
approximate curvature", section 3):

    W = W0 + K'^-1 V L^-1,    L L' = G + ridge d I,  d = mean(diag G),    K K' = S + LEAST mean(diag S) I,  S = mean J'J

where J is the derivative of r by the layer's outputs at the same position. The gradient of r times random signs has the
mean square S (Hutchinson, 1990). The pull is ridge d tr(DW' S DW) / 2 for DW = W - W0, which is the pull that
`least_squares` has for one layer alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxmerge.calibration.paired_run import PairedRun
from fxmerge.calibration.patches import at_positions, by_position, matrices_of, patches, positions, weight_of
from fxmerge.methods.least_squares import Reduce, second_moments
from fxmerge.refit import solve
from fxmerge.refit.chains import Chain
from fxmerge.refit.layer_weights import LayerWeights
from fxmerge.refit.targets import Target

STEPS = 10  # of L-BFGS, without a line search: these coordinates do not need one, and the best of all steps is taken
PASSES = 3 * (STEPS + 2)  # the cost of the steps in forward passes; a backward pass costs two
BUDGET = 5e12  # FLOPs of all joint steps of a refit together, at most
POSITIONS = 8  # output positions for each weight of an output, at least: with fewer, the layers are fitted to noise
ENOUGH = 2**17  # output positions; more do not improve the fit
ROWS = 8192  # output positions for the Gram matrices, which only define coordinates
MOST = 30.0  # the largest ridge of a layer
LEAST = 1e-3  # the ridge of S, which `solve.RIDGE` is for G


def affordable(flops: float, count: int, device: torch.device, reduce: Reduce) -> int:
    """How many of `count` batches are used, the same share on every process; 0 where BUDGET does not allow one.

    flops: of a forward pass of all chains for one batch
    """
    totals = reduce(torch.tensor([PASSES * flops * count, float(count)], dtype=torch.float64, device=device))
    share = min(1.0, BUDGET / max(float(totals[0]), 1.0))
    return max(1, int(share * count)) if share * float(totals[1]) >= 1 else 0


def fit(
    run: PairedRun,
    chain: Chain,
    weights: Sequence[LayerWeights],
    targets: Sequence[Target],
    *,
    held: Sequence[Tensor],
    ridges: Sequence[float],
    seed: int,
) -> bool:
    """Lower E by changing the weights of a chain's layers in place; False where they are left unchanged.

    weights:  of the chain's layers
    targets:  of its last layer, for the batches that are used
    held:     (positions,) bool by batch: the output positions that only judge the steps
    ridges:   the share of the Gram's mean diagonal by which each layer is pulled towards its weights
    """
    if any(held.weight.dtype not in (torch.float32, torch.float64) for held in weights):
        return False
    return _Joint(run, chain, weights, targets, held=held, ridges=ridges, seed=seed).run()


def along(run: PairedRun, chain: Chain, number: int, seen: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """The input of a chain's last layer for one batch; the input and output of each earlier layer go to `seen`."""
    value, fitted = chain.inputs[number], {layer.node for layer in chain.layers}
    for node in chain.nodes[:-1]:
        before, value = value, run.again(node, value, number)
        if seen is not None and node.name in fitted:
            seen.append((before, value))
            value = value.clone()  # for ops that write in place
    return value


class _Joint:
    """The joint steps of one chain."""

    def __init__(
        self,
        run: PairedRun,
        chain: Chain,
        weights: Sequence[LayerWeights],
        targets: Sequence[Target],
        *,
        held: Sequence[Tensor],
        ridges: Sequence[float],
        seed: int,
    ) -> None:
        self.paired, self.chain, self.weights, self.seed, self.reduce = run, chain, weights, seed, run.reduce
        self.residuals = [target.residual() for target in targets]
        self.held, self.ridges = held, [min(max(ridge, solve.RIDGE), MOST) for ridge in ridges]
        self.judged = float(self.reduce(torch.stack([h.sum() for h in held]).sum().double())) > 0  # on any process
        self.leaves = [t for held in weights for t in (held.weight, held.bias) if t is not None]

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
        """The input and output of each layer for one batch."""
        seen: list[tuple[Tensor, Tensor]] = []
        last = along(self.paired, self.chain, number, seen)
        return [*seen, (last, self.paired.again(self.chain.nodes[-1], last, number))]

    def _descend(self, variables: Sequence[_Variable]) -> bool:
        moving = [variable.at for variable in variables]
        first, least, best = torch.inf, torch.inf, [at.detach().clone() for at in moving]

        def energy() -> Tensor:
            nonlocal first, least, best
            for variable in variables:
                variable.write()
            total, aside, slopes = self._slopes()
            for variable in variables:
                total = total + variable.slope(slopes)
            judged = float(aside if self.judged else total)
            first = judged if first == torch.inf else first
            if judged < least:
                least, best = judged, [at.detach().clone() for at in moving]
            return total

        torch.optim.LBFGS(
            moving, max_iter=STEPS, history_size=STEPS, tolerance_grad=0.0, tolerance_change=0.0
        ).step(energy)  # type: ignore[no-untyped-call]  # fmt: skip
        for variable, value in zip(variables, best, strict=True):
            variable.at.data.copy_(value)
            variable.write()
        return least < first

    def _slopes(self) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """|r|^2 / 2N and its gradients, by the identities of the leaves, float64; second |r|^2 of what is held out."""
        total, aside = torch.zeros(2, dtype=torch.float64, device=self.leaves[0].device)
        found, count = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in self.leaves], 0
        for number, (missed, held) in enumerate(zip(self.residuals, self.held, strict=True)):
            with torch.enable_grad():
                last = along(self.paired, self.chain, number)
                gap = missed(self.paired.again(self.chain.nodes[-1], last, number))
                squares = by_position(gap, self.weights[-1].form)
                square = squares[~held].sum() / 2
                slopes = torch.autograd.grad(square, self.leaves)
            total, count = total + square.detach(), count + int((~held).sum())
            aside = aside + squares.detach()[held].sum()
            for sum_, slope in zip(found, slopes, strict=True):
                sum_ += slope
        scale = self.reduce(torch.tensor(float(count), dtype=torch.float64, device=found[0].device))
        found = [self.reduce(slope) / scale for slope in found]
        slopes_by = {id(leaf): slope for leaf, slope in zip(self.leaves, found, strict=True)}
        return self.reduce(total) / scale, self.reduce(aside), slopes_by

    def _variables(self) -> list[_Variable]:
        """The variable of each layer; none where an op of the chain has no gradient, or a matrix no Cholesky factor."""
        batches = float(self.reduce(self.leaves[0].new_tensor(float(len(self.residuals)), dtype=torch.float64)))
        rows: list[list[Tensor]] = [[] for _ in self.weights]
        squares: list[Tensor | float] = [0.0 for _ in self.weights]
        counts = [0.0 for _ in self.weights]
        for number, missed in enumerate(self.residuals):
            generator = torch.Generator().manual_seed(self.seed)  # the same for each batch, on whichever process it is
            try:
                with torch.enable_grad():
                    seen = self._seen(number)
                    gap = missed(seen[-1][1])
                    signs = torch.randint(0, 2, gap.shape, generator=generator).to(gap) * 2 - 1
                    slopes = torch.autograd.grad((gap * signs).sum(), [out for _, out in seen])
            except RuntimeError:
                return []
            for i, (held, (before, after), slope) in enumerate(zip(self.weights, seen, slopes, strict=True)):
                count = positions(after, held.form)
                index = torch.randperm(count, generator=generator)[: -int(-ROWS // batches)]
                rows[i].append(patches(before.detach(), held.form, index.to(before.device)))
                by_row = at_positions(slope, held.form, torch.arange(count, device=slope.device)).double()
                by_row = by_row.reshape(count, held.form.groups, -1).transpose(0, 1)  # (g, rows, o)
                squares[i], counts[i] = squares[i] + by_row.mT @ by_row, counts[i] + count
        found = []
        for held, own, square, seen_at, ridge in zip(self.weights, rows, squares, counts, self.ridges, strict=True):
            assert isinstance(square, Tensor)
            mean, gram = second_moments(own, self.reduce)
            square = self.reduce(square) / self.reduce(square.new_tensor(seen_at))
            if not bool(gram.isfinite().all()) or not bool(square.isfinite().all()):
                return []
            try:
                found.append(_Variable(held, mean, gram, square, ridge))
            except RuntimeError:  # rounding errors exceed the ridge, as for inputs that are nearly constant
                return []
        return found


class _Variable:
    """A layer's weights W0 + K'^-1 V L^-1 and its bias b0 + K'^-1 v - DW mean, by the leaf `at`: V with v as a column.

    mean, gram: of the patches, (g, p) and (g, p, p); square: S, (g, o, o)
    """

    def __init__(self, held: LayerWeights, mean: Tensor, gram: Tensor, square: Tensor, ridge: float) -> None:
        self.held, self.mean = held, mean if held.bias is not None else torch.zeros_like(mean)
        self.start = matrices_of(held.weight.detach(), held.form).to(torch.float64, copy=True)  # (g, o, p)
        blocks = self.start.shape[:2]
        self.bias = None if held.bias is None else held.bias.detach().to(torch.float64, copy=True).view(blocks)
        self.square = square + LEAST * _level(square) * _eye(square)
        if held.bias is None:  # moments about zero
            gram = gram + mean[:, :, None] * mean[:, None]
        self.pull = ridge * _level(gram)  # (g, 1, 1)
        self.left = torch.linalg.cholesky(self.square)  # K
        self.right = torch.linalg.cholesky(gram + self.pull * _eye(gram))  # L
        shape = (*self.start.shape[:2], self.start.size(2) + (self.bias is not None))
        self.at = torch.zeros(shape, dtype=torch.float64, device=self.start.device, requires_grad=True)

    def _moved(self) -> tuple[Tensor, Tensor | None]:
        """DW (g, o, p), and the change of the outputs' mean (g, o)."""
        moved = torch.linalg.solve_triangular(self.left.mT, self.at.detach(), upper=True)
        width = self.start.size(2)
        change = torch.linalg.solve_triangular(self.right, moved[..., :width], upper=False, left=False)
        return change, moved[..., width] if self.bias is not None else None

    def write(self) -> None:
        """Write the weights and the bias to the layer."""
        change, shift = self._moved()
        self.held.weight.data.copy_(weight_of(self.start + change, self.held.form, self.held.weight))
        if self.held.bias is not None and self.bias is not None and shift is not None:
            offset = self.bias + shift - torch.einsum("gop,gp->go", change, self.mean)
            self.held.bias.data.copy_(offset.view_as(self.held.bias))

    def slope(self, slopes: Mapping[int, Tensor]) -> Tensor:
        """Set the gradient of `at`, given the gradients of |r|^2 / 2N, and return the pull."""
        change, _ = self._moved()
        pulled = self.pull * (self.square @ change)
        slope = matrices_of(slopes[id(self.held.weight)], self.held.form) + pulled
        if self.held.bias is not None:
            by_bias = slopes[id(self.held.bias)].view(self.start.shape[:2])
            slope = slope - by_bias[..., None] * self.mean[:, None]
        slope = torch.linalg.solve_triangular(self.right.mT, slope, upper=True, left=False)
        if self.held.bias is not None:
            slope = torch.cat([slope, by_bias[..., None]], -1)
        self.at.grad = torch.linalg.solve_triangular(self.left, slope, upper=False).contiguous()
        return (pulled * change).sum() / 2


def _level(square: Tensor) -> Tensor:
    """mean(diag) of each matrix, 1 where all is zero: (g, 1, 1)."""
    level = square.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(level > 0, level, 1.0)[:, None, None]


def _eye(square: Tensor) -> Tensor:
    return torch.eye(square.size(-1), dtype=square.dtype, device=square.device)
