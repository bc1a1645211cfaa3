"""Optimizers whose state follows the channels of a model that was narrowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxmerge.ir.groups import survivors
from fxmerge.ir.provenance import ParamLabels
from fxmerge.plan import planned
from fxmerge.result import Result
from fxmerge.rewrite.slicing import gather


class _One:
    """One tensor in place of a module's weights, for `gather`."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __getitem__(self, path: str) -> Tensor:
        return self.value

    def put(self, path: str, value: Tensor) -> None:
        self.value = value


def follow(optimizer: Optimizer, model: nn.Module, result: Result) -> None:
    """Gives an optimizer of `model` the parameters of `result.model`, with the state of the channels that are left.

    State in the shape of a parameter (momenta) is sliced as the parameter was; other state (steps) stays. A parameter
    that the merge added, such as a bias, joins the last group without state.
    """
    facts, small = result.analysis.facts, result.model
    assert small is not None
    alive = survivors(result.analysis.grouping, planned(result.analysis.groups, result.plan))
    new = dict(small.named_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    held, left = dict(optimizer.state), {*new}
    optimizer.state.clear()
    for group in optimizer.param_groups:
        followed = []
        for p in group["params"]:
            name = names.get(id(p))
            if name is None:  # a parameter of something else
                followed.append(p)
                optimizer.state[p] = held.get(p, {})
            elif name in new:
                left.discard(name)
                followed.append(new[name])
                state = {k: _sliced(v, p, new[name], facts.params.get(name), alive) for k, v in held.get(p, {}).items()}
                if state and all(v is not None for v in state.values()):
                    optimizer.state[new[name]] = state
        group["params"] = followed
    optimizer.param_groups[-1]["params"] += [new[name] for name in sorted(left) if new[name].requires_grad]


def _sliced(value: Any, old: Tensor, new: Tensor, labels: ParamLabels | None, alive: Tensor) -> Any:
    """State of a parameter for what is left of it; None if it cannot follow."""
    if not isinstance(value, Tensor) or value.shape != old.shape or not value.dim():
        return value
    if labels is not None and value.shape != new.shape:
        one = _One(value)
        gather(one, labels, lambda flat: alive[flat].nonzero().flatten())  # type: ignore[arg-type]
        value = one.value
    return value.clone(memory_format=torch.preserve_format) if value.shape == new.shape else None
