"""Exported models take the sizes that the model takes: any length, any image; where they cannot, they raise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge.graph import compare
from fxmerge.graph.compare import difference
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Sentence(nn.Module):
    """An encoder of tokens with positions, a mask and a mean over them. Unpacking sizes stops symbolic tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(40, 16), nn.Embedding(32, 16)
        self.register_buffer("ids", torch.arange(32)[None])
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        randomised(self, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.words(tokens) + self.places(self.ids[:, :length])
        q, k, v = (*[t.view(batch, length, 4, 4).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)],)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        x = x + self.out(a.transpose(1, 2).reshape(batch, length, -1))
        x = x + self.down(F.gelu(self.up(x)))
        weight = mask[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


def sentences(batch: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 1 :] = 0
    return torch.randint(40, (batch, length)), mask


SIZES = [(4, 12), (1, 12), (3, 2), (2, 19), (1, 31), (5, 3)]


def test_a_sentence_encoder_takes_any_length(tmp_path: Path) -> None:
    model = Sentence().eval()
    result = plain_merge(model, sentences(4, 12), ratio=0.0)
    assert result.analysis.captured.route == "export"
    result.save(tmp_path / "o")
    for merged in (result.module, fxmerge.load(tmp_path / "o")):
        for size in SIZES:
            inputs = sentences(*size)
            with torch.no_grad():
                assert difference([model(*inputs)], [merged(*inputs)]) < 1e-6, size
    with pytest.raises(AssertionError, match=r"input tokens \(axis 1\) must have a size that is at most 3[12]"):
        result.module(*sentences(2, 33))


def test_the_merged_model_is_the_same_from_an_example_of_any_length() -> None:
    """The groups, and the function that is left, do not depend on the length of the example."""
    model = Sentence().eval()
    one, other = (plain_merge(model, sentences(3, n), ratio=0.5) for n in (12, 17))
    assert [(g.name, g.kept) for g in one.plan.groups] == [(g.name, g.kept) for g in other.plan.groups]
    assert {g.channels for g in one.analysis.grouping.groups} == {16, 24}
    for size in SIZES:
        inputs = sentences(*size)
        with torch.no_grad():
            assert difference([one.module(*inputs)], [other.module(*inputs)]) < 1e-6


@pytest.mark.slow
def test_calibration_of_several_lengths() -> None:
    torch.manual_seed(0)
    model = Sentence().eval()
    batches = [sentences(8, n) for n in (5, 9, 12, 20, 31) for _ in range(4)]
    unseen = [sentences(4, n) for n in (4, 13, 27)]

    def off(refit: str, **given: object) -> float:
        merged = fxmerge.merge(model, sentences(4, 12), ratio=0.5, refit=refit, **given).module
        with torch.no_grad():
            return sum(float((merged(*x) - model(*x)).square().sum()) for x in unseen)

    assert off("calibration", calibration=batches) < 0.5 * off("none")


class Padded(nn.Module):
    """Convolutions with padding by a call; the list stops symbolic tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, 2), nn.Linear(8, 4)
        randomised(self, 3)

    def forward(self, x: Tensor) -> Tensor:
        (x,) = (*[self.a(F.pad(x, (0, 1, 0, 1)))],)
        if x.size(0) > 0:
            x = self.b(F.pad(torch.relu(x), (0, 1, 0, 1)))
        return self.o(torch.relu(x).mean((2, 3)))


def test_images_of_any_size() -> None:
    model = Padded().eval()
    merged = plain_merge(model, torch.randn(2, 3, 32, 32), ratio=0.0)
    assert merged.analysis.captured.route == "export"
    for size in ((32, 32), (17, 40), (64, 21)):
        x = torch.randn(3, 3, *size)
        with torch.no_grad():
            assert difference([model(x)], [merged.module(x)]) < 1e-6


class Shuffled(nn.Module):
    """A ShuffleNet's block and a small feature pyramid, as in detectors for phones."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 16, 3, 4, 1), nn.Conv2d(8, 8, 1)
        self.down, self.last, self.head = nn.Conv2d(16, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 4, 1)
        self.scaled = scaled
        randomised(self, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        samples, channels, height, width = x.data.size()
        assert channels % 4 == 0
        x = x.reshape(samples * channels // 2, 2, height * width).permute(1, 0, 2)
        one, two = x.reshape(2, -1, channels // 2, height, width)
        wide = torch.relu(self.down(torch.cat((one, self.branch(two)), 1)))
        last = torch.relu(self.last(wide))
        up = F.interpolate(last, scale_factor=2) if self.scaled else F.interpolate(last, size=wide.shape[2:])
        return self.head(torch.cat((up, wide), 1)), last


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 has no condition on the pyramid")
@pytest.mark.parametrize("scaled", [False, True])
def test_a_detector_takes_other_images(scaled: bool) -> None:
    """torch.export's conditions on sizes hold an `or` there."""
    model = Shuffled(scaled).eval()
    merged = plain_merge(model, torch.randn(2, 3, 64, 64), ratio=0.0)
    assert merged.analysis.captured.route == "export"
    for size in ((64, 64), (32, 96), (128, 160), (50, 70)):
        x = torch.randn(3, 3, *size)
        if scaled and size == (50, 70):
            with pytest.raises(AssertionError, match="must have a size that is"):
                merged.module(x)
        else:
            with torch.no_grad():
                assert difference(list(model(x)), list(merged.module(x))) < 1e-6


class Same(Padded):
    """As much padding as makes the next size a quotient, whose formula grows from layer to layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(4):
            short = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
            x = torch.relu(self.b(F.pad(x, (short[1] // 2, short[1] - short[1] // 2, short[0], 0))))
        return self.o(x.mean((2, 3)))


class Many(Padded):
    """Short formulas in many tensors."""

    def forward(self, x: Tensor) -> Tensor:
        (x,) = (*[self.a(x)],)
        if x.size(0) > 0:
            for _ in range(400):
                x = torch.relu(self.b(F.pad(x, (0, 1, 0, 1)))) if x.size(2) > 15 else torch.relu(x)
        return self.o(x.mean((2, 3)))


class Divided(Sentence):
    """Returns something else while it is exported, in all lengths but that of the example."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = super().forward(tokens, mask) * tokens.size(1)
        return x / 12 if torch.compiler.is_exporting() else x / tokens.size(1)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 writes other formulas")
@pytest.mark.parametrize(
    ("model", "example", "other"),
    [
        pytest.param(Same(), (torch.randn(2, 3, 65, 65),), (torch.randn(2, 3, 66, 65),), marks=pytest.mark.slow),
        pytest.param(Many(), (torch.randn(2, 3, 65, 65),), (torch.randn(2, 3, 66, 65),), marks=pytest.mark.slow),
        (Divided(), sentences(4, 12), sentences(4, 9)),
    ],
    ids=["long formulas", "many formulas", "another function"],
)
def test_sizes_that_cannot_vary_raise(model: nn.Module, example: tuple[Tensor], other: tuple[Tensor]) -> None:
    result = plain_merge(model.eval(), example, ratio=0.0)
    assert result.analysis.captured.route == "export"
    fewer = tuple(x[:1] for x in example)
    with torch.no_grad():
        assert difference([model(*fewer)], [result.module(*fewer)]) < 1e-6
        with pytest.raises(AssertionError, match="must have the shape"):
            result.module(*other)


class Counted(Sentence):
    """Checks a number read from a tensor against the lengths of both inputs, which have a symbol each."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        longest = mask.sum(1).max().item()
        torch._check(longest <= tokens.size(1))
        torch._check(longest <= mask.size(1))
        return self.down(F.gelu(self.up(self.words(tokens)))) * mask.sum()


def test_assertions_of_numbers_read_from_tensors_do_not_fix_a_length() -> None:
    model = Counted().eval()
    result = plain_merge(model, sentences(4, 12), ratio=0.0)
    given = sentences(3, 7)
    with torch.no_grad():
        assert difference([model(*given)], [result.module(*given)]) < 1e-6


class Masked(Sentence):
    """Leaves out a random half of the tokens, as masked autoencoders do."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return super().forward(tokens, mask * (torch.rand(tokens.shape) < 0.5))


def test_random_numbers_do_not_fix_a_size() -> None:
    model = Masked().eval()
    result = plain_merge(model, sentences(4, 12), ratio=0.0)
    given = sentences(3, 7)
    assert difference(compare.outputs(model, given), compare.outputs(result.module, given)) < 1e-6


class Picked(Sentence):
    """The mask is indexed by the samples of the tokens: torch.export gives the two a symbol each."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        samples, places = torch.arange(tokens.size(0))[:, None], torch.arange(tokens.size(1))
        return super().forward(tokens, mask[samples, places])


def test_inputs_that_are_single_samples_together() -> None:
    model = Picked().eval()
    result = plain_merge(model, sentences(4, 12), ratio=0.0)
    assert result.analysis.captured.route == "export"
    for samples in (1, 2, 5):
        given = sentences(samples, 7)
        with torch.no_grad():
            assert difference([model(*given)], [result.module(*given)]) < 1e-6
    tokens, mask = sentences(2, 7)
    with pytest.raises(AssertionError, match="must agree"):
        result.module(tokens, mask[:1])


class Anchored(Padded):
    """Keeps a table together with the shape that it was made for, as the head of a YOLO keeps its anchors."""

    shape: object = None

    def forward(self, x: Tensor) -> Tensor:
        (x,) = (*[torch.relu(self.a(x))],)
        if self.shape != x.shape:
            self.shape, self.table = x.shape, torch.arange(x.size(-1), dtype=x.dtype).cos()
        return self.o((self.b(x * self.table)).mean((2, 3)))


def test_what_forward_keeps_for_the_sizes_of_the_example_is_no_constant() -> None:
    model, x = Anchored().eval(), torch.randn(2, 3, 32, 32)
    merged = plain_merge(model, x, ratio=0.0)
    assert merged.analysis.captured.route == "export"
    assert model.shape is None
    for size in ((2, 32, 32), (1, 32, 32), (3, 17, 41)):
        given = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            assert difference([model(given)], [merged.module(given)]) < 1e-6


def test_what_the_users_model_had_kept_before_may_fix_a_size_but_not_silently() -> None:
    model, x = Anchored().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model(torch.randn(2, 3, 20, 20))
        shape = model.shape
        merged = plain_merge(model, x, ratio=0.0)
        assert model.shape == shape
        assert difference([model(x)], [merged.module(x)]) < 1e-6
        for size in ((1, 32, 32), (2, 20, 20), (2, 17, 41)):
            given = torch.randn(size[0], 3, *size[1:])
            try:
                found = merged.module(given)
            except AssertionError:
                continue
            assert difference([model(given)], [found]) < 1e-6
