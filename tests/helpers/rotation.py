"""The rotation oracle: where nothing hinders it, any rotation of a group's channels leaves the outputs as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fxmerge.graph import compare
from fxmerge.ir.groups import Group
from fxmerge.result import Analysis
from fxmerge.rewrite.rotate import rotated


def drawn(group: Group, seed: int = 0) -> Tensor:
    """A random orthogonal matrix for each strand, which mixes the channels of each cell: (strands, n, n).

    With a norm that subtracts the mean of the channels, it keeps the vector of ones, and has one dimension less.
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(group.strands.count, group.channels, group.channels, dtype=torch.float64)
    for own in found:
        for cell in group.cells.unique():
            inside = (group.cells == cell).nonzero().flatten()
            m, centred = len(inside), int(group.factors.centred)
            noise = torch.randn(m - centred, m - centred, generator=generator, dtype=torch.float64)
            mixing = torch.block_diag(torch.eye(centred, dtype=torch.float64), torch.linalg.qr(noise)[0])
            if centred:
                first = torch.cat([torch.ones(m, 1).double(), torch.randn(m, m - 1, generator=generator).double()], 1)
                basis = torch.linalg.qr(first)[0]  # its first column is in the direction of ones
                mixing = basis @ mixing @ basis.T
            own[inside[:, None], inside] = mixing
    return found


def rotation_errors(found: Analysis) -> dict[str, float]:
    """{group with linear paths: the relative error of the outputs of the rotated graph}, on the example inputs."""
    captured, errors = found.captured, {}
    expected = compare.outputs(captured.module, captured.inputs)
    for group in found.groups:
        if not group.nonlinear:
            module = rotated(captured, [(group, drawn(group))]).module
            before = [captured.module.get_parameter(p.layer.params["weight"]) for p in group.producers]
            after = [module.get_parameter(p.layer.params["weight"]) for p in group.producers]
            assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
            errors[group.name] = compare.difference(expected, compare.outputs(module, captured.inputs))
    return errors
