"""An exported graph says for which sizes it holds: on any other it raises, and never returns something else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.graph.compare import difference
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Base(nn.Module):
    """A net with a branch on a size, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.o = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def takes(self, x: Tensor) -> bool:
        return bool(x.size(0) > 1)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        return self.o(torch.relu(self.n(h)) if self.takes(x) else h)


class AtMost(Base):
    def takes(self, x: Tensor) -> bool:
        return bool(x.size(0) <= 6)


class Multiple(Base):
    def takes(self, x: Tensor) -> bool:
        return bool(x.size(0) % 4 == 0)


class AllBut(Base):
    def takes(self, x: Tensor) -> bool:
        return bool(x.size(0) != 3)


class Length(Base):
    def takes(self, x: Tensor) -> bool:
        return bool(x.size(1) > 4)


class Scaled(Base):
    """A length that becomes a factor."""

    def takes(self, x: Tensor) -> bool:
        return True

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * float(x.size(1)) if x.size(1) > 2 else x


class Pyramid(nn.Module):
    """A fully convolutional net that unpacks a list; sizes must fit where two scales meet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Conv2d(6, 16, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = list(torch.relu(self.a(x)).chunk(2, 1))
        return self.o(torch.cat([y[0], F.interpolate(torch.relu(self.b(y[1])), scale_factor=2.0)], 1))


# model -> (shape of the example, shapes on which the merged model must run, shapes on which it must raise)
CASES: dict[type[nn.Module], tuple[Any, list[Any], list[Any]]] = {
    Base: ((4, 6), [(2, 6), (4, 6), (9, 6)], [(1, 6)]),
    AtMost: ((4, 6), [(1, 6), (6, 6)], [(7, 6), (20, 6)]),
    Multiple: ((4, 6), [(8, 6), (40, 6)], [(1, 6), (3, 6), (6, 6)]),
    AllBut: ((4, 6), [(1, 6), (2, 6), (5, 6)], [(3, 6)]),
    Length: ((4, 6, 6), [(1, 6, 6), (4, 5, 6), (3, 9, 6)], [(4, 4, 6), (4, 3, 6)]),
    Scaled: ((4, 5, 6), [(1, 5, 6), (9, 5, 6)], [(4, 4, 6), (4, 6, 6)]),
    Pyramid: ((2, 6, 16, 16), [(1, 6, 16, 16), (2, 6, 32, 16), (2, 6, 12, 20)], [(2, 6, 17, 16), (2, 5, 16, 16)]),
}


@pytest.mark.parametrize("made", CASES)
@pytest.mark.parametrize("samples", ["example", "one sample"])
def test_is_the_original_or_raises(made: type[nn.Module], samples: str, tmp_path: Path) -> None:
    shape, runs, raises = CASES[made]
    model = made().eval()
    if samples == "one sample":
        shape, runs, raises = (1, *shape[1:]), [(1, *shape[1:])], []
    result = plain_merge(model, torch.randn(shape), ratio=0.0)
    assert result.analysis.captured.route == "export"
    result.save(tmp_path / "o")
    for merged in (result.module, copy.deepcopy(result.module), fxmerge.load(tmp_path / "o")):
        with torch.no_grad():
            for other in runs:
                x = torch.randn(other)
                assert difference([model(x)], [merged(x)]) < 1e-6, other
            for other in raises:
                with pytest.raises(AssertionError, match=r"input x .*must have .*give fxmerge example inputs"):
                    merged(torch.randn(other))


def test_inputs_must_agree_as_in_the_example() -> None:
    class Two(Base):
        def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x) + super().forward(y)

    model = Two().eval()
    merged = plain_merge(model, (torch.randn(4, 6), torch.randn(4, 6))).module
    merged(torch.randn(3, 6), torch.randn(3, 6))
    with pytest.raises(AssertionError, match="input y"):
        merged(torch.randn(3, 6), torch.randn(1, 6))


@pytest.mark.parametrize("loaded", [False, True])
def test_the_limits_of_a_program_are_kept(loaded: bool, tmp_path: Path) -> None:
    program = torch.export.export(
        Base().eval(), (torch.randn(4, 6),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2, max=8)}}
    )
    if loaded:
        torch.export.save(program, str(tmp_path / "m.pt2"))
        program = torch.export.load(str(tmp_path / "m.pt2"))
    merged = plain_merge(program, None).module
    merged(torch.randn(8, 6))
    with pytest.raises(AssertionError, match="at most 8"):
        merged(torch.randn(9, 6))


class Training(Pyramid):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.drop(self.norm(x)))


@pytest.mark.parametrize("way", ["module", "copy", "source", "inside another"])
def test_an_exported_graph_has_no_training_mode(way: str, tmp_path: Path) -> None:
    model, x = Training().train(), torch.randn(2, 6, 16, 16)
    result = plain_merge(model, x)
    assert not any(m.training for m in result.module.modules())
    result.save(tmp_path / "o")
    merged = {
        "module": lambda: result.module,
        "copy": lambda: copy.deepcopy(result.module),
        "source": lambda: fxmerge.load(tmp_path / "o"),
        "inside another": lambda: nn.Sequential(result.module),
    }[way]()
    for change in (lambda m: m.eval(), lambda m: m.train(False)):
        assert change(merged) is merged
    with pytest.raises(RuntimeError, match=r"cannot be put in training mode.*\n*.*fxmerge.load\(folder, model="):
        merged.train()
    own = fxmerge.load(tmp_path / "o", model=Training()).train()
    before = own.norm.running_mean.clone()
    own(x + 3)
    assert not torch.equal(own.norm.running_mean, before)


class TwoFrames(nn.Module):
    """Two inputs are run as one batch, whose halves are then told apart: torch.export asks whether a half is one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        if one.shape[0] > 1000:  # not for torch.fx
            return one
        first, second = torch.chunk(torch.relu(self.a(torch.cat([one, other]))), 2)
        y: Tensor = self.o(first - second)
        return y


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_conditions_on_several_sizes_do_not_exclude_the_example(batch: int) -> None:
    torch.manual_seed(0)
    model = TwoFrames().eval()
    result = fxmerge.merge(model, (torch.randn(batch, 5), torch.randn(batch, 5)), ratio=0.0, refit="none")
    assert result.analysis.captured.route == "export"
    for size in {batch, 4}:
        x = torch.randn(2, size, 5)
        with torch.no_grad():
            assert torch.allclose(result.module(x[0], x[1]), model(x[0], x[1]), atol=1e-6)
