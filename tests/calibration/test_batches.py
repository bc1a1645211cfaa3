"""What refit runs on: probes from the example or not, variants of the user's samples, and what the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration.batches import determines, example_counts, variants, vocabularies
from fxmerge.calibration.fit_probes import RefitData, refit_data
from fxmerge.calibration.held_out import samples
from fxmerge.calibration.paired_run import Settings
from fxmerge.calibration.trial_runs import first_samples, takes_any_batch
from fxmerge.capture.capture_model import capture
from fxmerge.options import Options
from fxmerge.progress import silent
from tests.helpers.netmaking import one_thread, randomised  # noqa: F401
from tests.helpers.smooth import smooth

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(nn.Module):
    """Convolutions without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        randomised(self, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


class Flat(nn.Module):
    """The same image, read by a linear layer: a sample is one row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3 * 16 * 16, 8), nn.Linear(8, 4)
        randomised(self, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(x.flatten(1))))


class Words(nn.Module):
    """Tokens and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.head = nn.Embedding(50, 8), nn.Linear(8, 12), nn.Linear(12, 4)
        randomised(self, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head((torch.relu(self.a(self.table(ids))) * mask[..., None]).mean(1))


IMAGES = 100 + 40 * smooth(2, 3, 16, 16, axes=2)


def data(model: nn.Module | torch.export.ExportedProgram, inputs: Any, given: Any = None, **options: Any) -> RefitData:
    captured = capture(model.eval() if isinstance(model, nn.Module) else model, inputs)
    refit = "synthetic" if given is None else "calibration"
    settings = Settings(rows=1000, seed=0, held=given is None, reduce=lambda value: value)
    chosen = Options(refit=refit, **options)
    return refit_data(
        captured, provenance(captured), chosen, given=given, settings=settings, stage=silent
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "x", "counts"),
    [
        (Plain(), IMAGES, True),
        (Plain(), torch.randn(2, 3, 16, 16), False),
        (Plain(), torch.zeros(2, 3, 16, 16), False),
        (Flat(), IMAGES, False),
        (Flat(), 100 + 40 * smooth(80, 3, 16, 16, axes=2), True),
    ],
    ids=["images", "noise", "zeros", "few rows", "many rows"],
)
def test_an_example_counts_if_it_is_data_and_has_rows(model: nn.Module, x: Tensor, counts: bool) -> None:
    captured = capture(model.eval(), x)
    assert example_counts(captured, provenance(captured)) == counts


def test_probes_are_made_from_images_and_streams_are_not_held() -> None:
    image = IMAGES[:1]  # too few rows for the second convolution
    found = data(Plain(), image, samples=128)
    assert not found.held and found.made == 0
    assert found.source == (
        "128 probes made from the one example input (crops, flips, colours; half dead leaves); "
        "every second batch moved, for diverse outputs"
    )
    assert torch.equal(found.batches[0][0][:1], image)


class Denoiser(nn.Module):
    """Images in, images out: an example of a few images has thousands of rows for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        randomised(self, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.head(torch.relu(self.b(torch.relu(self.norm(self.a(x))))))


LARGE = 100 + 40 * smooth(2, 3, 32, 32, axes=2)


@pytest.mark.parametrize(
    ("model", "x", "enough"),
    [
        (Denoiser(), LARGE, True),  # 2048 rows, 4 x 72 wanted
        (Denoiser(), IMAGES[:1, :, :8], False),  # 128
        (Flat(), IMAGES, False),
        (Plain(), 100 + 40 * smooth(4, 3, 32, 32, axes=2), True),  # its head has 4 rows, but hardly any FLOPs
    ],
)
def test_an_example_determines_the_layers_if_most_have_rows_enough(model: nn.Module, x: Tensor, enough: bool) -> None:
    captured = capture(model.eval(), x)
    assert determines(captured, provenance(captured)) == enough


def test_half_of_the_probes_is_the_example_where_that_determines_the_layers() -> None:
    found = data(Denoiser(), LARGE, samples=64)
    assert found.source == "64 probes made from the 2 example inputs (half of them as they are, flipped or moved)"
    (images,) = (batch[0] for batch in found.batches)
    same = [any(torch.equal(y, z) for x in LARGE for z in (x, x.flip(-1))) for y in images]
    assert same == [True, True, False, False] * 16 and not found.held


def test_noise_is_not_used_and_streams_are_held() -> None:
    found = data(Plain(), torch.randn(2, 3, 16, 16), samples=128)
    assert found.held and found.source == "128 probes (pink)"
    assert not torch.equal(found.batches[0][0][:2], IMAGES)


class Fixed(Plain):
    """The batch size is written out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(2, 4)


@pytest.mark.parametrize("wanted", [0, 64])
def test_probes_come_in_batches_of_the_example_where_the_model_takes_no_others(
    wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxmerge.calibration.batches.BATCHES", 8)
    found = data(Fixed(), torch.randn(2, 3, 16, 16), samples=wanted)
    assert {len(batch[0]) for batch in found.batches} == {2}
    assert len(found.batches) == (32 if wanted else 8) and not found.notes


@pytest.mark.slow
def test_a_fixed_batch_size_is_refitted_as_any_other() -> None:
    torch.manual_seed(0)
    fixed, plain, x = Fixed(), Plain(), torch.randn(2, 3, 16, 16)
    plain.load_state_dict(fixed.state_dict())
    unseen = torch.randn(64, 2, 3, 16, 16)

    def off(refit: str) -> float:
        result = fxmerge.merge(fixed.eval(), x, ratio=0.5, refit=refit, samples=256)
        with torch.no_grad():
            pairs = [(result.module(x), plain(x)) for x in unseen]
        return float(sum((a - b).square().sum() for a, b in pairs))

    assert off("synthetic") < 0.7 * off("none")


def exported(free: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.AUTO},) if free else None
    return torch.export.export(Plain().eval(), (IMAGES,), dynamic_shapes=shapes)


@pytest.mark.parametrize("free", [True, False])
def test_an_exported_model_gets_the_batches_that_it_takes(free: bool) -> None:
    own = [100 + 40 * smooth(n, 3, 16, 16, axes=2) for n in (8, 8, 4)]
    probes, calibration = data(exported(free), IMAGES, samples=128), data(exported(free), IMAGES, own, samples=128)
    assert {samples(b) for b in probes.batches} == ({64} if free else {2})
    assert [samples(b) for b in calibration.batches[: calibration.made]] == ([8, 8, 4] if free else [2] * 10)
    assert takes_any_batch(capture(exported(free), IMAGES)) == free
    assert takes_any_batch(capture(Plain(), IMAGES)) and not takes_any_batch(capture(Fixed(), IMAGES))


@pytest.mark.slow
def test_an_exported_model_is_refitted_as_the_traced_one() -> None:
    own, unseen = list((100 + 40 * smooth(48, 3, 16, 16, axes=2)).split(8)), 100 + 40 * smooth(8, 3, 16, 16, axes=2)
    outputs = []
    for model in (exported(free=True), Plain().eval()):
        merged = fxmerge.merge(model, IMAGES, ratio=0.5, calibration=own, samples=64).module
        with torch.no_grad():
            outputs.append(merged(unseen))
    assert torch.allclose(*outputs, rtol=1e-3, atol=1e-3 * float(outputs[1].std()))


class Viewed(Plain):
    """Fails on images in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.relu(self.a(x)).view(x.size(0), 8 * 16 * 16)
        return self.head(torch.relu(self.b(flat.view(x.size(0), 8, 16, 16))).mean((2, 3)))


@pytest.mark.slow
def test_images_are_in_channels_last_if_the_model_takes_them() -> None:
    for model, wanted in ((Plain(), torch.channels_last), (Viewed(), torch.contiguous_format)):
        for given in (None, [100 + 40 * smooth(20, 3, 16, 16, axes=2)]):
            found = data(model, IMAGES, given, samples=64)
            assert all(batch[0].is_contiguous(memory_format=wanted) for batch in found.batches)
    assert data(Words(), (torch.randint(50, (4, 9)), torch.ones(4, 9)), samples=64).batches


def test_every_sample_of_the_example_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxmerge.calibration.batches.USUAL", 64)
    monkeypatch.setattr("fxmerge.calibration.batches.SMALL", 64)
    monkeypatch.setattr("fxmerge.calibration.batches.FORWARD", 0)
    x = smooth(192, 3, 8, 8, axes=2)
    assert torch.equal(torch.cat([batch[0] for batch in data(Plain(), x).batches]), x)


def test_calibration_samples_come_first_and_variants_have_batches_of_their_own() -> None:
    given = list((100 + 40 * smooth(20, 3, 16, 16, axes=2)).split(8))
    found = data(Plain(), IMAGES, given, samples=70)
    assert found.made == 3 and not found.held
    assert all(torch.equal(one[0], other) for one, other in zip(found.batches, given, strict=False))
    assert [samples(b) for b in found.batches] == [8, 8, 4, 8, 8, 4, 8, 8, 4, 8]
    assert found.source == "20 calibration samples and 48 variants of them"
    assert not any(torch.equal(b[0], one) for b in found.batches[3:] for one in given)
    low, high = min(float(b.min()) for b in given), max(float(b.max()) for b in given)
    assert all(low <= b[0].min() and b[0].max() <= high for b in found.batches)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Words(), (torch.randint(50, (20, 9)), torch.ones(20, 9))), (Plain(), (torch.randn(20, 3, 16, 16),))],
    ids=["tokens", "noise"],
)
def test_what_has_no_variants_stays_as_it_is(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    found = data(model, tuple(x[:2] for x in inputs), [inputs], samples=200)
    assert found.made == len(found.batches) == 1 and found.source == "20 calibration samples"


def test_enough_samples_get_no_variants() -> None:
    captured = capture(Plain().eval(), IMAGES)
    assert variants(captured, [[IMAGES]], 3, seed=0) == []
    assert len(variants(captured, [[IMAGES]], 4, seed=0)) == 1


def test_tokens_are_found_with_the_table_that_they_index() -> None:
    ids, mask = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0)), torch.ones(2, 9)
    mask[0, 6:] = 0
    model = Words()
    captured = capture(model.eval(), (ids, mask))
    ((number, table),) = vocabularies(captured.module, provenance(captured)).items()
    assert number == 0 and torch.equal(table, model.table.weight)
    found = data(model, (ids, mask), samples=128)
    assert torch.equal(found.batches[0][1], mask.repeat(32, 1)) and torch.equal(found.batches[0][0][:2], ids)
    assert found.source == "128 probes made from the tokens of the 2 example inputs and of the vocabulary"


@pytest.mark.slow
def test_the_report_says_what_refit_ran_on() -> None:
    images = 100 + 40 * smooth(20, 3, 16, 16, axes=2)
    merged = fxmerge.merge(Plain().eval(), IMAGES, ratio=0.5, samples=64)
    assert "refit ran on 64 probes made from the 2 example inputs" in merged.report.text()
    data: dict[str, Any] = {"calibration": [images], "samples": 40, "decomposition": "mostsim"}
    merged = fxmerge.merge(Plain().eval(), IMAGES, ratio=0.5, **data)
    assert "refit ran on 20 calibration samples and 20 variants of them" in merged.report.text()
    assert "refit ran on" not in fxmerge.merge(Plain().eval(), IMAGES, ratio=0.5, refit="none").report.text()


class Listener(nn.Module):
    """A streaming network: a chunk of sound and the state of an LSTM, (2, samples, features), as in voice detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(1, 12, 8, 4), nn.Conv1d(12, 10, 8, 4)
        self.cell, self.head = nn.LSTMCell(10, 6), nn.Linear(6, 1)
        randomised(self, 1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.two(torch.relu(self.one(x[:, None])))).mean(2)
        h, c = self.cell(y, (state[0], state[1]))
        return self.head(torch.relu(h)), torch.stack([h, c])


def test_states_have_the_samples_on_their_second_axis() -> None:
    model, x = Listener().eval(), (smooth(1, 256, axes=1), torch.randn(2, 1, 6))
    found = data(model, x).batches
    assert [tuple(v.shape) for v in found[0]] == [(64, 256), (2, 64, 6)] and samples(found[0]) == 64
    state = torch.cat([batch[1] for batch in found], 1)
    assert abs(float(state.std() / x[1].std()) - 1) < 0.1 and abs(float(state.mean() - x[1].mean())) < 0.1
    captured = capture(model, x)
    assert takes_any_batch(captured)
    part = first_samples(captured, found, 72)
    assert [tuple(v.shape) for v in part[1]] == [(8, 256), (2, 8, 6)]
    assert torch.equal(part[1][1], found[1][1][:, :8])
    given = [(torch.randn(16, 256), torch.randn(2, 16, 6)) for _ in range(8)]
    for more in ({}, {"calibration": given}):
        result = fxmerge.merge(model, x, ratio=0.3, **more)
        assert any(r.after < r.before for r in result.report.refitted)
