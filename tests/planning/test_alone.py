"""What one group alone costs, against the real merged graph with only that group narrowed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import Options
from fxmerge.calibration.division import judging
from fxmerge.calibration.whole_run import WholeRun
from fxmerge.graph.outputs import returned
from fxmerge.pipeline import Prepared, prepared
from fxmerge.planning import error_curves
from fxmerge.planning.alone import calibrated, losses_alone
from fxmerge.planning.error_curves import scaled
from fxmerge.planning.room import Room
from fxmerge.planning.scope import in_scope
from fxmerge.progress import silent
from tests.helpers.netmaking import one_thread, randomised  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")


class Attending(nn.Module):
    """Attention and a gated MLP on a residual stream without norms, and scores of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        out: Tensor = self.head(x)
        return out


def attending() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Attending().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model, torch.randint(40, (2, 7))


def data(x: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    if not x.is_floating_point():
        return [torch.randint(40, (32, 7), generator=generator)]
    return [torch.randn(32, *x.shape[1:], generator=generator)]


def of(model: nn.Module, x: Tensor) -> tuple[Prepared, Options, Room]:
    options = Options(budget={"params": 0.6})
    ready = prepared(model, x, options, data(x), silent)
    options = options.replace(refit=ready.options.refit)
    groups = in_scope(ready.found[1], options)[0]
    return ready, options, Room.before_survey(ready.captured, *ready.found, groups, options, ready.flops)


def measured(ready: Prepared, options: Options, room: Room) -> dict[str, tuple[int, float]]:
    return losses_alone(
        room, lambda counts: ready.selection(room.free, counts, options), ready.data.batches, ready.settings,
        readings=ready.readings(room.free), tensors=ready.tensors, stage=silent,
    )  # fmt: skip


def by_hand(model: nn.Module, small: nn.Module, x: Tensor, words: bool) -> float:
    """The relative error by the definition; for words, the share of what the outputs tell of them."""
    with torch.no_grad():
        y, z = (returned(m(x))[0].double() for m in (model, small))
    if not words:
        return float((y - z).square().sum() / (y - y.mean()).square().sum())
    p, logs, others = y.softmax(-1), y.log_softmax(-1), z.log_softmax(-1)
    told = F.kl_div(p.mean((0, 1)).log().expand_as(p), p, reduction="none").sum(-1)
    return float((p * (logs - others)).sum() / told.sum())


@pytest.mark.parametrize("make", [NETS["mlp"], NETS["chain_2d"], NETS["residual"], attending])
def test_it_is_the_error_with_only_that_group_narrowed(make: Any) -> None:
    model, x = make()
    ready, options, room = of(model, x)
    found = measured(ready, options, room)
    assert set(found) == {g.name for g in room.free}
    held = judging(ready.captured, ready.data.batches, ready.settings)[0][0]
    for group in room.free:
        rung, loss = found[group.name]
        counts = {group.name: tuple(map(int, room.ladders[group.name][rung]))}
        chosen = ready.choice(options, ready.selection([group], counts, options), (), ready.data.batches, ())
        small = ready.draft(chosen).graph
        close = 0.3 if any(isinstance(m, nn.Conv2d) for m in model.modules()) else 1e-3  # constants before padding
        assert loss == pytest.approx(by_hand(model, small, held[0], make is attending), rel=close, abs=1e-7), group.name


def test_values_that_are_run_again_are_kept_while_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a deep model, the memory for them is that of a few activations, not of all."""
    layers = [part for _ in range(20) for part in (nn.Linear(8, 8), nn.ReLU())]
    model, x = randomised(nn.Sequential(*layers)), torch.randn(2, 8)
    kept: list[int] = []
    again = WholeRun.again

    def counted(self: WholeRun, node: Any, given: Any, number: int) -> Any:
        kept.append(len(given))
        return again(self, node, given, number)

    monkeypatch.setattr(WholeRun, "again", counted)
    assert measured(*of(model, x))
    assert max(kept) <= 2


def test_the_model_is_not_changed() -> None:
    model, x = attending()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured(*of(model, x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_curves_are_scaled_to_what_was_measured_and_grow_beyond() -> None:
    ladder = np.array([[10.0], [8.0], [6.0], [2.0]])
    errors = np.array([0.0, 0.1, 0.4, 0.5])
    # at the second rung 0.02: a factor of 0.2; beyond, at least 0.02 times the squares of 2 and of 4
    assert calibrated(errors, ladder, 1, 0.02, 9.0) == pytest.approx([0, 0.02, 0.08, 0.32])
    # at the third rung: below it the curve is scaled by a tenth
    assert calibrated(errors, ladder, 2, 0.04, 9.0) == pytest.approx([0, 0.01, 0.04, 0.16])
    # where nothing was lost, the curve counts by the typical factor
    assert calibrated(errors, ladder, 1, 0.0, 3.0) == pytest.approx([0, 0.3, 1.2, 4.8])


def test_factors_are_drawn_towards_their_median() -> None:
    """A group that loses ten times the median weighs 10^0.7 times as much; one that was not measured, as the median."""
    ladder = np.array([[10.0], [5.0]])
    names = ["rare", "middle", "usual", "unknown"]
    groups: Any = [SimpleNamespace(name=name, consumers=(), producers=()) for name in names]
    errors = {name: np.array([0.0, 0.5]) for name in names}
    alone = {"rare": (1, 0.2), "middle": (1, 0.02), "usual": (1, 0.002)}
    found = scaled(errors, groups, ladders=dict.fromkeys(names, ladder), sensitivity={}, alone=alone, power=0.7)
    assert {name: own[1] for name, own in found.items()} == pytest.approx(
        {"rare": 0.02 * 10**0.7, "middle": 0.02, "usual": 0.02 * 10**-0.7, "unknown": 0.02}
    )


@pytest.mark.parametrize(("words", "power"), [(True, 1.0), (False, error_curves.ALONE)])
def test_divergences_of_words_count_as_they_are(words: bool, power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 30 if words else 7)).eval()
    given: list[float] = []
    drawn = error_curves.scaled
    monkeypatch.setattr(error_curves, "scaled", lambda *a, **k: given.append(k["power"]) or drawn(*a, **k))
    ids = torch.randint(30, (64, 6))
    fxmerge.merge(model, ids[:2], budget={"params": 0.8}, calibration=ids.split(16))
    assert given == [power]
