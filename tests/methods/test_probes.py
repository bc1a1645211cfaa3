"""Probes: what is told from an example, variants of it, and what stays together in several inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxmerge.methods.probe_statistics import looks_real, neighbours, placed
from fxmerge.methods.probe_tokens import tokens
from fxmerge.methods.probe_variants import augmented, cropped, moved
from fxmerge.methods.probes import PROBES, probed, probes
from tests.helpers.smooth import seeded, smooth


def rows_of(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.flatten(1).tolist()}


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("shape", [(2, 7), (2, 3, 16), (2, 3, 16, 12), (2, 1, 4, 4, 4), (2,)])
def test_without_data_probes_are_standard_and_seeded(name: str, shape: tuple[int, ...]) -> None:
    example = torch.zeros(shape)
    one, two = (PROBES[name](example, 40, seeded()) for _ in range(2))
    assert one.shape == (40, *shape[1:])
    assert torch.equal(one, two)
    assert abs(float(one.mean())) < 0.5
    assert 0.5 < float(one.std()) < 1.5


WAVE = torch.sin(torch.arange(400.0) / 7)
REAL = {
    "images": 100 + 50 * smooth(2, 3, 32, 32, axes=2),
    "one image": smooth(1, 1, 16, 16, axes=2),
    "steps last": smooth(2, 5, 60, axes=1),
    "steps first": smooth(2, 5, 60, axes=1).transpose(1, 2),
    "spectrogram": smooth(2, 1, 20, 100, axes=2),
    "audio": torch.stack([WAVE, WAVE.roll(3)]),
    "one-hot": F.one_hot(torch.randint(4, (2, 50), generator=seeded()), 4).float().transpose(1, 2),
    "many features": torch.randn(40, 6, generator=seeded()) + 3,
}
NOISE = {
    "randn": torch.randn(2, 3, 32, 32, generator=seeded()),
    "rand": torch.rand(2, 3, 8, 8, generator=seeded()),
    "small": torch.randn(1, 3, 4, 4, generator=seeded()),
    "channels of other levels": torch.randn(2, 3, 16, 16, generator=seeded()) + 9 * torch.eye(3)[0, :, None, None],
    "sequence": torch.randn(2, 16, 100, generator=seeded()),
    "zeros": torch.zeros(2, 3, 8, 8),
    "ones": torch.ones(2, 40),
    "few features": torch.randn(2, 6, generator=seeded()),
    "not finite": torch.full((2, 3, 8, 8), torch.nan),
}  # fmt: skip


@pytest.mark.parametrize("name", [*REAL, *NOISE])
def test_data_and_noise_are_told_apart(name: str) -> None:
    assert looks_real((REAL | NOISE)[name]) == (name in REAL)


@pytest.mark.parametrize("name", REAL)
def test_the_example_family_holds_the_example_and_stays_in_its_range(name: str) -> None:
    x = REAL[name]
    made = PROBES["example"](x, 90, seeded())
    assert made.shape == (90, *x.shape[1:])
    assert torch.equal(made[: len(x)], x)
    if x.dim() > 2 or name == "audio":
        assert x.min() - 1e-4 <= made.min() and made.max() <= x.max() + 1e-4
    assert torch.isfinite(made).all() and len(rows_of(made)) > 80
    assert abs(float(made.mean() - x.mean())) < 0.4 * float(x.std())
    assert 0.6 < float(made.std() / x.std()) < 1.4


def test_all_samples_of_a_large_example_are_used() -> None:
    x = smooth(50, 3, 8, 8, axes=2)
    assert torch.equal(PROBES["example"](x, 50, seeded()), x)
    assert torch.equal(PROBES["example"](x, 60, seeded())[:50], x)


def test_noise_is_not_cropped() -> None:
    """Crops that are resized have neighbours that are alike; noise of another family does not repeat the example."""
    made = PROBES["example"](NOISE["randn"], 8, seeded())
    assert not rows_of(made) & rows_of(NOISE["randn"])
    assert torch.equal(made, placed(NOISE["randn"], PROBES["leaves"](NOISE["randn"], 8, seeded())))


def test_features_have_the_mean_and_the_covariance_of_the_example() -> None:
    mix = torch.randn(5, 5, generator=seeded(1))
    x = torch.randn(400, 5, generator=seeded(2)) @ mix + torch.tensor([0.0, 1, 50, -3, 7])
    made = PROBES["example"](x, 4000, seeded())[400:]
    assert (made.mean(0) - x.mean(0)).abs().max() < 0.15 * x.std(0).max()
    assert (made.T.corrcoef() - x.T.corrcoef()).abs().max() < 0.1


@pytest.mark.parametrize("name", ["white", "pink", "leaves"])
def test_families_are_moved_to_the_statistics_of_each_channel(name: str) -> None:
    level, spread = torch.tensor([10.0, 130.0, 250.0]).view(3, 1, 1), torch.tensor([2.0, 40.0, 8.0]).view(3, 1, 1)
    x = level + spread * smooth(4, 3, 16, 16, axes=2)
    (batch,) = probes(name, [x], tables={}, count=200, batch=200, seed=0)
    made = batch[0]
    assert isinstance(made, Tensor)
    for channel in range(3):
        assert abs(float(made[:, channel].mean() - x[:, channel].mean())) < 0.3 * float(x[:, channel].std())
        assert 0.7 < float(made[:, channel].std() / x[:, channel].std()) < 1.1
    assert x.min() <= made.min() and made.max() <= x.max()


def test_statistics_that_say_nothing_are_left_out() -> None:
    drawn = torch.randn(50, 3, 8, 8, generator=seeded())
    assert torch.equal(placed(torch.zeros(2, 3, 8, 8), drawn), drawn)
    x = smooth(2, 3, 8, 8, axes=2)
    x[:, 1] = 0.5  # one channel is constant: it gets the deviation of all
    made = placed(x, drawn)
    assert torch.isfinite(made).all() and 0.3 < float(made[:, 1].std() / x.std()) < 1.1
    one = placed(torch.tensor([[20.0, 30.0, 40.0]]), torch.randn(500, 3, generator=seeded()))
    assert abs(float(one.mean()) - 30) < 2 and abs(float(one.std()) - 10) < 1 and float(one.min()) >= 0


def test_a_crop_of_a_ramp_is_a_ramp() -> None:
    """A crop of the image 3 row + column, without turning, has the slopes 3 s and s (flipped: -s) for one side s."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    made = cropped((3 * rows + columns).expand(40, 1, 32, 32), seeded(), turn=0.0)[:, 0, 8:24, 8:24]
    down, across = made.diff(dim=1), made.diff(dim=2)
    assert (down - down.mean((1, 2), keepdim=True)).abs().max() < 1e-3
    assert (across - across.mean((1, 2), keepdim=True)).abs().max() < 1e-3
    ratio = down.mean((1, 2)) / across.mean((1, 2))
    assert {float(r.sign()) for r in ratio} == {1.0, -1.0}
    assert ratio.abs().min() > 3 * 3 / 4 - 0.01 and ratio.abs().max() < 3 * 4 / 3 + 0.01
    assert 0.2 < float(across.abs().mean()) < 0.9


def test_sequences_are_moved_in_a_circle() -> None:
    x = smooth(3, 40, 5, axes=1)
    made = moved(x, 1, seeded(), stretch=1.0)
    for one, other in zip(x, made, strict=True):
        assert any(torch.equal(one.roll(-k, 0), other) for k in range(40))


@pytest.mark.parametrize("steps", [1, 2])
def test_noise_beside_a_sequence_is_smooth_along_its_steps(steps: int) -> None:
    x = smooth(2, 5, 60, axes=1).movedim(2, steps)
    noise = PROBES["example"](x, 200, seeded())[torch.arange(200) // 2 % 2 == 0][2:]
    assert neighbours(noise, steps) > 0.3 > neighbours(noise, 3 - steps)


def test_the_user_s_samples_get_close_variants() -> None:
    x = smooth(4, 3, 16, 16, axes=2)
    made = augmented(x, 12, seeded())
    assert made is not None and made.shape == (12, 3, 16, 16) and not rows_of(made) & rows_of(x)
    assert augmented(torch.randn(40, 6), 10, seeded()) is None
    assert augmented(NOISE["randn"], 10, seeded()) is None
    assert augmented(smooth(4, 1, 16, 16, axes=2).flatten(1), 10, seeded()) is None  # a shift would wrap the rows
    assert augmented(torch.randint(9, (4, 12)), 10, seeded()) is None
    sequence = augmented(smooth(2, 5, 60, axes=1), 6, seeded())
    assert sequence is not None and torch.allclose(
        sequence.sum(2), smooth(2, 5, 60, axes=1).sum(2).repeat(3, 1), atol=1e-4
    )


TABLE = torch.randn(300, 8, generator=seeded(3))


def test_tokens_are_those_of_the_example_and_of_the_vocabulary() -> None:
    x = torch.randint(5, 300, (3, 20), generator=seeded(4))
    x[:, 0], x[:, -1] = 1, 2
    made = tokens(x, TABLE, 300, seeded())
    assert made.dtype == x.dtype and torch.equal(made[:3], x)
    assert set(made[:, 0].tolist()) == {1} and set(made[:, -1].tolist()) == {2}
    own = torch.tensor([len(set(a.tolist()) & set(x[i % 3].tolist())) for i, a in enumerate(made)])
    turn = torch.arange(300) // 3
    assert own[turn % 2 == 1].float().mean() > 12 > 6 > own[(turn % 2 == 0) & (turn > 0)].float().mean()
    assert made.min() >= 0 and made.max() < 300
    assert len(rows_of(made)) > 280


@pytest.mark.parametrize("embedded", [False, True])
def test_tokens_at_padding_are_kept_and_the_last_before_it(embedded: bool) -> None:
    x = torch.randint(5, 300, (2, 12), generator=seeded(4))
    x[0, 7], x[0, 8:], x[1, 11] = 2, 0, 2
    mask = (x != 0).long()
    tables = {0: TABLE, 1: TABLE[:2]} if embedded else {0: TABLE}
    found = probes("leaves", [x, mask], tables=tables, count=40, batch=16, seed=0)
    ids, masks = (torch.cat([batch[i] for batch in found]) for i in (0, 1))  # type: ignore[misc]
    assert torch.equal(masks, mask.repeat(20, 1))
    assert torch.equal(ids[masks == 0], torch.zeros(int((masks == 0).sum()), dtype=torch.int64))
    assert set(ids[::2, 7].tolist()) == {2} and set(ids[1::2, 11].tolist()) == {2}


def test_equal_tokens_say_nothing() -> None:
    drawn = tokens(torch.zeros(2, 6, dtype=torch.int64), TABLE[:9], 500, seeded())
    assert drawn.shape == (500, 6)
    assert set(drawn.flatten().tolist()) == set(range(9))


def test_positions_and_segments_are_repeated() -> None:
    ids = torch.randint(5, 300, (2, 12), generator=seeded(4))
    positions, segments = torch.arange(12).expand(2, 12), torch.zeros(2, 12, dtype=torch.int64)
    given = [ids, positions, segments]
    for batch in probes("white", given, tables={0: TABLE, 1: TABLE, 2: TABLE[:2]}, count=8, batch=4, seed=0):
        assert torch.equal(batch[1], positions.repeat(2, 1)) and torch.equal(batch[2], segments.repeat(2, 1))  # type: ignore[arg-type]


def test_floating_point_masks_are_no_probes() -> None:
    ids, mask = torch.randint(5, 300, (2, 12), generator=seeded(4)), torch.ones(2, 12)
    scores = torch.zeros(2, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    assert probed([ids, mask, scores, torch.rand(2, 12)]) == [3]


def test_inputs_of_one_sample_are_changed_alike() -> None:
    """Two images of a pair: where they are equal, their variants are."""
    one = smooth(3, 3, 16, 16, axes=2)
    two, count = one.clone(), torch.tensor([5, 6, 7])
    for batch in probes("example", [one, two, count], tables={}, count=30, batch=15, seed=0):
        assert torch.equal(batch[0], batch[1])  # type: ignore[arg-type]
        assert torch.equal(batch[2], count.repeat(5))  # type: ignore[arg-type]
