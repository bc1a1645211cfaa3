"""Pricing: what a merged model costs is known before it is built, to the last FLOP and parameter."""

from __future__ import annotations

from typing import Any

import nets  # noqa: F401  (fills NETS)
import pytest
import torch
from netmaking import NETS, one_thread, plain_merge  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxmerge.pricing import flops_price, parameters_price

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(module: nn.Module, inputs: Any) -> int:
    counter = FlopCounterMode(display=False)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    with torch.no_grad(), counter:
        module.eval()(*given)
    return int(counter.get_total_flops())


def check(model: nn.Module, inputs: Any, **options: Any) -> int:
    """Merge; compare the prices of the widths that were kept with the merged model's own counts."""
    result = plain_merge(model.eval(), inputs, decomposition="prune", **options)
    found = result.analysis
    named = {g.name: g for g in found.groups}
    counts = {p.name: tuple(torch.bincount(named[p.name].cells[list(p.kept)]).tolist()) for p in result.plan.groups}
    parts = (found.captured, found.facts, found.groups, found.grouping.atom)
    flops, size = flops_price(*parts), parameters_price(*parts)
    assert flops.original == pytest.approx(counted(found.captured.module, inputs), rel=1e-12)
    assert flops(counts) == pytest.approx(counted(result.module, inputs), rel=1e-12)
    assert size.original == pytest.approx(sum(p.numel() for p in found.captured.module.parameters()), rel=1e-12)
    assert size(counts) == pytest.approx(sum(p.numel() for p in result.module.parameters()), rel=1e-12)
    return len(counts)


@pytest.mark.parametrize("heads", ["width", "whole"])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("name", NETS)
def test_a_price_is_what_the_merged_net_costs(name: str, ratio: float, heads: str) -> None:
    check(*NETS[name](), ratio=ratio, heads=heads)
