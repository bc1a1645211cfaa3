"""Small nets with one op between a producer and a consumer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.helpers.netmaking import randomised

Op = Callable[[Any, Any], Any]  # (net, activation) -> what the consumer reads
CONVS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
WIDTH, SIDE = 8, 4  # the activation is (2, WIDTH, SIDE, ...), or (2, WIDTH)


@dataclass(frozen=True)
class Sample:
    """How to use one spelling of an op between a producer and a consumer.

    dims:           the spatial dimensions of the activation
    reads:          the input channels of the consumer, which is a Linear where `flat`
    consumer_dims:  the spatial dimensions of the consumer's input, where they differ from `dims`
    before:         brings the activation into the op's domain
    exact:          False where dropping a channel changes the others
    double:         False where the op does not take float64, which the oracles compute in
    merged:         False where the channels must stay, for `reason`
    """

    op: Op
    dims: int = 2
    reads: int = WIDTH
    flat: bool = False
    consumer_dims: int | None = None
    width: int = WIDTH
    before: Callable[[Any], Any] = lambda x: x
    exact: bool = True
    double: bool = True
    merged: bool = True
    reason: str = ""
    parts: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[nn.Module, Tensor]:
        """The net with random weights, and an input for it."""
        torch.manual_seed(0)
        net = Sandwich(self)
        dtype = torch.float64 if self.double else torch.float32
        randomised(net, 1).to(dtype).eval()
        return net, torch.randn(2, 3, *[SIDE] * self.dims, dtype=torch.float64).to(dtype)


class Sandwich(nn.Module):
    """consumer(op(before(producer(x)))), with a second producer for ops of two operands."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        consumer_dims = sample.dims if sample.consumer_dims is None else sample.consumer_dims
        self.op, self.before = sample.op, sample.before
        self.producer = _layer(sample.dims, 3, sample.width)
        if "second" in sample.parts:
            self.second = _layer(sample.dims, 3, sample.width)
        for name, part in sample.parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            elif part is not None:
                setattr(self, name, part)
        self.consumer = nn.Linear(sample.reads, 5) if sample.flat else _layer(consumer_dims, sample.reads, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.input = x
        out: Tensor = self.consumer(self.op(self, self.before(self.producer(x))))
        return out


def _layer(dims: int, into: int, out: int) -> nn.Module:
    return nn.Linear(into, out) if dims == 0 else CONVS[dims](into, out, 3, padding=1)


def call(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is traced as a single node, whatever it does inside."""

    def invoke(*args: Any, **kwargs: Any) -> Any:
        nested = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
        proxy = next((a for a in nested if isinstance(a, fx.Proxy)), None)
        if proxy is None:
            return target(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", target, args, kwargs)

    return invoke


def digit(key: Any) -> int:
    """The number of dimensions in a name: 2 for nn.AvgPool2d and F.avg_pool2d."""
    name = key if isinstance(key, str) else key.__name__
    return int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else 2


def spelled(key: Any, *args: Any, module: tuple[Any, ...] | None = None, **facts: Any) -> Sample:
    """A sample of an op called with x and `args`; a module class is called with `module`, or else with `args`."""
    then = facts.pop("then", lambda x: x)
    if inspect.isclass(key):
        made = key(*(args if module is None else module))
        return Sample(lambda m, x: then(m.part(x)), parts={"part": made}, **facts)
    if isinstance(key, str):
        return Sample(lambda m, x: then(getattr(x, key)(*args)), **facts)
    return Sample(lambda m, x: then(call(key)(x, *args)), **facts)
