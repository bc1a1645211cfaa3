"""What a merged model costs, counted by running it, against its price."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxmerge.graph.cost import flops_by_node
from fxmerge.planning.counted import parameters_within
from fxmerge.planning.price import flops_price, parameters_price
from tests.helpers.netmaking import plain_merge


def counted(module: nn.Module, inputs: Any) -> int:
    counter = FlopCounterMode(display=False)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad(), counter:
        module.eval()(*given)
    return int(counter.get_total_flops())


def check_prices(model: nn.Module, inputs: Any, **options: Any) -> int:
    """Merge; compare the prices of the widths that were kept with the merged model's own counts."""
    result = plain_merge(model.eval(), inputs, decomposition="prune", **options)
    found = result.analysis
    named = {g.name: g for g in found.groups}
    counts = {p.name: tuple(torch.bincount(named[p.name].cells[list(p.kept)]).tolist()) for p in result.plan.groups}
    parts = (found.facts, found.groups, found.grouping)
    flops = flops_price(*parts, flops_by_node(found.captured.module, found.captured.inputs))
    size = parameters_price(*parts, parameters_within(found.captured.module, ()))
    assert flops.original == pytest.approx(counted(found.captured.module, inputs), rel=1e-12)
    assert flops(counts) == pytest.approx(counted(result.module, inputs), rel=1e-12)
    assert flops({}) == pytest.approx(flops.original) and size({}) == pytest.approx(size.original)
    assert size.original == pytest.approx(sum(p.numel() for p in found.captured.module.parameters()), rel=1e-12)
    assert size(counts) == pytest.approx(sum(p.numel() for p in result.module.parameters()), rel=1e-12)
    return len(counts)
