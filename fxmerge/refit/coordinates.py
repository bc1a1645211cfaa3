"""Coordinates of a layer's weights in which the energy of joint steps is nearly isotropic.

Let a layer have weights W (o, p), and patches with Gram matrix G about their mean. Its weights move in coordinates V,
by Kronecker factors (Martens & Grosse, 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature", section 3):

    W = W0 + K'^-1 V L^-1,    L L' = G + ridge d I,  d = mean(diag G),    K K' = S + LEAST mean(diag S) I
    S = sum J'J / N

where J is the derivative of r by the layer's outputs at one of its positions, and the sum is over all of them: a layer
before a stride has several positions for each of the N at the end. The gradient of r times random signs has the mean
square J'J (Hutchinson, 1990). The pull is ridge d tr(DW' S DW) / 2 for DW = W - W0, which is the pull that
`least_squares` has for one layer alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fxmerge.calibration.patches import matrices_of, weight_of
from fxmerge.refit.layer_weights import LayerWeights

LEAST = 1e-3  # the ridge of S, which `solve.RIDGE` is for G


class Coordinates:
    """A layer's weights W0 + K'^-1 V L^-1 and its bias b0 + K'^-1 v - DW mean, by the leaf `at`: V with v as a column.

    mean, gram: of the patches, (g, p) and (g, p, p), of which gram is overwritten; square: S, (g, o, o)
    """

    def __init__(self, held: LayerWeights, mean: Tensor, gram: Tensor, square: Tensor, ridge: float) -> None:
        self.held, self.mean = held, mean if held.bias is not None else torch.zeros_like(mean)
        self.start = matrices_of(held.weight.detach(), held.form).to(torch.float64, copy=True)  # (g, o, p)
        blocks = self.start.shape[:2]
        self.bias = None if held.bias is None else held.bias.detach().to(torch.float64, copy=True).view(blocks)
        self.square = _ridged(square, LEAST * _level(square))
        if held.bias is None:  # moments about zero
            gram += mean[:, :, None] * mean[:, None]
        pull = ridge * _level(gram)  # (g, 1, 1)
        precise = held.weight.dtype  # weights and slopes use the same factors: rounding only changes the coordinates
        self.left = _inverse_factor(self.square, precise)  # K^-1
        self.right = _inverse_factor(_ridged(gram, pull), precise)  # L^-1
        self.mean, self.pull, self.square = (t.to(precise) for t in (self.mean, pull, self.square))
        shape = (*self.start.shape[:2], self.start.size(2) + (self.bias is not None))
        self.at = torch.zeros(shape, dtype=precise, device=self.start.device, requires_grad=True)

    def write(self) -> None:
        """Write the weights and the bias to the layer."""
        moved, width = self.left.mT @ self.at.detach(), self.start.size(2)
        self.change = moved[..., :width] @ self.right  # DW (g, o, p)
        self.held.weight.data.copy_(weight_of(self.start + self.change, self.held.form, self.held.weight))
        if self.held.bias is not None and self.bias is not None:
            offset = self.bias + moved[..., width] - (self.change @ self.mean[..., None])[..., 0]
            self.held.bias.data.copy_(offset.view_as(self.held.bias))

    def slope(self, slopes: Mapping[int, Tensor]) -> Tensor:
        """Set the gradient of `at`, given the gradients of |r|^2 / 2N where it was written, and return the pull."""
        pulled = self.pull * (self.square @ self.change)
        slope = matrices_of(slopes[id(self.held.weight)], self.held.form) + pulled
        if self.held.bias is not None:
            by_bias = slopes[id(self.held.bias)].view(self.start.shape[:2])
            slope = slope - by_bias[..., None] * self.mean[:, None]
        slope = slope.to(self.at) @ self.right.mT
        if self.held.bias is not None:
            slope = torch.cat([slope, by_bias[..., None].to(slope)], -1)
        self.at.grad = self.left @ slope
        return (pulled * self.change).sum(dtype=torch.float64) / 2


def _inverse_factor(square: Tensor, precise: torch.dtype) -> Tensor:
    """K^-1 for K K' = `square`, (g, n, n), float64. Raises RuntimeError where there is no Cholesky factor."""
    factor = torch.linalg.cholesky(square).to(precise)
    inverse: Tensor = torch.linalg.solve_triangular(factor, _eye(factor), upper=False)
    return inverse


def _ridged(square: Tensor, ridge: Tensor) -> Tensor:
    """`square` with a ridge (g, 1, 1) added to its diagonal, in place: a copy may take hundreds of megabytes."""
    square.diagonal(dim1=-2, dim2=-1).add_(ridge[..., 0])
    return square


def _level(square: Tensor) -> Tensor:
    """mean(diag) of each matrix, 1 where all is zero: (g, 1, 1)."""
    level = square.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(level > 0, level, 1.0)[:, None, None]


def _eye(square: Tensor) -> Tensor:
    return torch.eye(square.size(-1), dtype=square.dtype, device=square.device)
