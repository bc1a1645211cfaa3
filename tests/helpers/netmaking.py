"""Makes small nets from a wiring of named parts: `@net(shape, part=module, ...)`, as in tests/helpers/nets.py.

All values are drawn from a fixed seed, so that no two channels are alike and no BatchNorm is trivial.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import fxmerge

plain_merge = functools.partial(fxmerge.merge, refit="none")
Made = tuple[nn.Module, Any]
Wiring = Callable[[Any, Any], Any]
NETS: dict[str, Callable[[], Made]] = {}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, on which nets this small run several times faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Parts by name, and a function of (net, input) that wires them."""

    def __init__(self, wiring: Wiring, **parts: Any) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every floating-point parameter and buffer anew: positive variances and scales, weights by their fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        norm = isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, value in held:
            if not value.is_floating_point():
                continue
            if "var" in name or "scale" in name or "gamma" in name or (norm and name == "weight"):
                drawn = 0.5 + torch.rand(value.shape, generator=generator)
            elif isinstance(module, nn.PReLU):
                drawn = 0.1 + 0.5 * torch.rand(value.shape, generator=generator)
            elif name.startswith("w") and value.dim() > 1:
                drawn = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
            else:
                drawn = 0.3 * torch.randn(value.shape, generator=generator)
            value.data = drawn.to(value)
    return model


def net(shape: tuple[int, ...], words: int = 0, **parts: Any) -> Callable[[Wiring], Wiring]:
    """Registers a wiring under its function's name. With `words`, its input is integers below `words`."""

    def register(wiring: Wiring) -> Wiring:
        name = wiring.__name__

        def make() -> Made:
            seed = zlib.crc32(name.encode())
            generator = torch.Generator().manual_seed(seed)
            numbers = torch.randint(max(words, 1), shape, generator=generator)
            example = numbers if words else torch.randn(shape, generator=generator)
            return randomised(Net(wiring, **copy.deepcopy(parts)), seed).eval(), example

        NETS[name] = make
        return wiring

    return register


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def raw(*shape: int) -> Parameter:
    """A parameter of zeros, to be randomised."""
    return Parameter(torch.zeros(shape))
