"""Variants of the example that are moved so that the outputs are diverse: which move, how far, and what for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration import diverse_outputs, fit_probes
from fxmerge.calibration.diverse_outputs import diversified, output_channels
from fxmerge.calibration.paired_run import Settings
from fxmerge.capture.capture_model import capture
from fxmerge.options import Options
from fxmerge.progress import silent
from tests.helpers.netmaking import one_thread, randomised  # noqa: F401
from tests.helpers.smooth import smooth

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = Settings(rows=1000, seed=0, held=False, reduce=lambda value: value)


class Classifier(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.Conv2d(16, 24, 3, padding=1, stride=2)
        self.head = nn.Linear(24, classes)
        randomised(self, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def images(seed: int, count: int) -> Tensor:
    return 100 + 40 * smooth(count, 3, 16, 16, axes=2, seed=seed)


def moved(model: nn.Module, batches: list[list[Any]], shown: int = 2) -> list[list[Any]]:
    """shown: the samples of the example"""
    captured = capture(model.eval(), tuple(value[:shown] for value in batches[0]))
    return diversified(captured, provenance(captured), batches, SETTINGS)


def test_drawn_channels_are_raised_by_small_moves() -> None:
    model, x = Classifier(), images(0, 64)
    ((after,),) = moved(model, [[x]])
    with torch.no_grad():
        before, now = model(x), model(after)
    assert float(now.var(0).sum()) > 1.5 * float(before.var(0).sum())
    moves = (after - x) / x.std()
    assert 0 < float(moves.abs().max()) <= diverse_outputs.STEPS * diverse_outputs.RATE * 2
    assert x.min() <= after.min() and after.max() <= x.max()


def test_the_same_in_every_run_and_another_channel_in_every_batch() -> None:
    model, x = Classifier(), images(0, 8)
    first, second = moved(model, [[x], [x]]), moved(model, [[x], [x]])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], first[1][0])


class Several(nn.Module):
    """Outputs with the channels on different axes, one channel, and no channel that depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.line, self.one = nn.Conv2d(3, 4, 1), nn.Linear(16, 5), nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Any:
        maps = self.maps(x)
        tokens = maps.flatten(2).transpose(1, 2)
        return {"maps": maps, "rest": [tokens, self.line(x), self.one(x)]}, maps.mean((2, 3)).softmax(-1)


def test_the_channels_of_every_output() -> None:
    captured = capture(Several().eval(), (torch.randn(2, 3, 8, 16),))
    assert sorted(output_channels(captured, provenance(captured)).values()) == [(1, 4), (1, 4), (2, 4), (3, 5)]


@pytest.mark.parametrize("case", ["one channel", "no gradient", "integers", "no budget", "as many samples"])
def test_what_cannot_move_stays(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rounded(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.round().long().float())

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(20, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.relu(self.e(x)))

    monkeypatch.setattr(diverse_outputs, "BUDGET", 0.0 if case == "no budget" else 4e12)
    kinds = {"one channel": lambda: Classifier(1), "no gradient": Rounded, "integers": Embedded}
    batches = [[torch.randint(20, (4, 6)) if case == "integers" else images(0, 10)]]
    ((after,),) = moved(kinds.get(case, Classifier)(), batches, 10 if case == "as many samples" else 2)
    assert torch.equal(after, batches[0][0])


def data(model: nn.Module, given: Any = None, **changes: Any) -> Any:
    captured = capture(model.eval(), images(0, 2))
    options = Options(refit="synthetic" if given is None else "calibration", **changes)
    return fit_probes.refit_data(
        captured, provenance(captured), options, given=given, settings=SETTINGS, stage=silent
    )


def test_every_second_batch_of_probes_moves_and_no_sample_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [images(1, 4), images(2, 4)]
    found = [data(Classifier(), samples=256), data(Classifier(), own, samples=24)]
    assert ["diverse outputs" in x.source for x in found] == [True, False]
    monkeypatch.setattr(fit_probes, "diversified", lambda captured, facts, batches, settings: batches)
    still = [data(Classifier(), samples=256), data(Classifier(), own, samples=24)]
    pairs = [zip(x.batches, y.batches, strict=True) for x, y in zip(found, still, strict=True)]
    stays = [[torch.equal(a[0], b[0]) for a, b in pair] for pair in pairs]
    assert stays == [[True, False, True, False], [True] * 6]
    assert not any("diverse outputs" in x.source for x in still)


def test_probes_that_are_fitted_to_norms_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    monkeypatch.setattr(fit_probes, "diversified", lambda *_, **__: pytest.fail("moved"))
    assert data(Normed(), samples=128, probes="example").batches


@pytest.mark.slow
def test_what_the_merged_model_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that is trained on 32 kinds of textures, and merged with two of them."""
    torch.manual_seed(0)
    kernels = F.avg_pool2d(torch.randn(96, 3, 9, 9), 3, 1, 1).view(32, 3, 3, 9, 9)

    def textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        noise, kinds = torch.randn(count, 3, 24, 24, generator=g), torch.randint(32, (count,), generator=g)
        drawn = torch.stack([F.conv2d(n[None], kernels[k])[0] for n, k in zip(noise, kinds, strict=True)])
        return drawn / drawn.std((1, 2, 3), keepdim=True), kinds

    model = Classifier(32)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(400):
        x, kinds = textures(64, step)
        adam.zero_grad()
        F.cross_entropy(model(x), kinds).backward()  # type: ignore[no-untyped-call]
        adam.step()
    x, fresh = textures(64, 1000)[0], textures(512, 2000)[0]
    model.eval()

    def divergence() -> float:
        result = fxmerge.merge(model, x[:2], ratio=0.25, samples=256)
        with torch.no_grad():
            wanted, found = model(fresh).log_softmax(1), result.module(fresh).log_softmax(1)
        return float((wanted.exp() * (wanted - found)).sum(1).mean())

    better = divergence()
    monkeypatch.setattr(fit_probes, "diversified", lambda captured, facts, batches, settings: batches)
    assert better < 0.97 * divergence()
