"""channels_last: weights that are stored so are stored so again after a folder or a program is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.weights.memory_format import memory_formats
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Images(nn.Module):
    """Convolutions with kernels of 3 and 1, and a parameter of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)
        self.scale = nn.Parameter(torch.rand(1, 1, 2, 3))
        self.head = nn.Linear(4 * 2 * 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        out: Tensor = self.head((y * self.scale).flatten(1))
        return out


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 2))


def whole(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)


def one(module: nn.Module) -> None:
    module.c.to(memory_format=torch.channels_last)  # type: ignore[operator, union-attr]


def three(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last_3d)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[nn.Module], None], set[str], str]] = {
    "whole": (
        Images, (2, 3, 6, 7), whole, {"a.weight", "b.weight", "c.weight", "scale"},
        "self.to(memory_format=torch.channels_last)",
    ),
    "one layer": (Images, (2, 3, 6, 7), one, {"c.weight"}, "self.c.weight.data.to(memory_format=torch.channels_last)"),
    "volumes": (
        volumes, (2, 2, 5, 5, 5), three, {"0.weight", "2.weight"}, "self.to(memory_format=torch.channels_last_3d)"
    ),
    "none": (Images, (2, 3, 6, 7), lambda module: None, set(), "super().__init__()"),
}  # fmt: skip


@pytest.mark.parametrize("route", ["traced", "exported"])
@pytest.mark.parametrize("name", CASES)
def test_formats_come_back(name: str, route: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape, convert, formats, line = CASES[name]
    model, x = make().eval(), torch.randn(shape)
    given: Any = torch.export.export(model, (x,)) if route == "exported" else model
    result = plain_merge(given, x, ratio=0.5)
    convert(result.module)
    assert set(memory_formats(result.module)) == formats
    result.save(tmp_path / "o")
    spec = importlib.util.spec_from_file_location("model", tmp_path / "o" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert line in (tmp_path / "o" / "model.py").read_text()
    loaded = [fxmerge.load(tmp_path / "o"), alone.load()]
    if route == "traced":
        loaded.append(fxmerge.load(tmp_path / "o", model=make()))
    result.save_program(tmp_path / "m.pt2")
    loaded.append(torch.export.load(tmp_path / "m.pt2").module())
    for module in loaded:
        assert memory_formats(module) == memory_formats(result.module)
        torch.testing.assert_close(module(x), result.module(x))
        for key, value in result.module.state_dict().items():
            assert torch.equal(value, module.state_dict()[key])
    torch.testing.assert_close(fxmerge.load(tmp_path / "o", on_disk=True)(x), result.module(x))
