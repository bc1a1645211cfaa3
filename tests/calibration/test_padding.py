"""Padded positions of a batch are no rows for refit: what is there changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration.padding import padding_of
from fxmerge.capture.capture_model import capture
from tests.helpers.language_models import llama
from tests.helpers.netmaking import one_thread, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Encoder(nn.Module):
    """Attention over tokens, an MLP, and an output for each token."""

    def __init__(self, inverted: bool = False, pooled: bool = False, leaks: bool = False) -> None:
        super().__init__()
        self.inverted, self.pooled, self.leaks = inverted, pooled, leaks
        self.embed, self.qkv, self.out = nn.Embedding(40, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)
        randomised(self, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        real = mask == 0 if self.inverted else mask != 0
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        score = (q @ k.transpose(-1, -2) / 4).masked_fill(~real[:, None, :], float("-inf"))
        x = x + self.out(score.softmax(-1) @ v)
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        if self.leaks:
            x = x - x.mean(1, keepdim=True)
        y = self.head(x)
        return (y * real[..., None]).sum(1) / real.sum(1, keepdim=True) if self.pooled else y


def batches(inverted: bool, other: bool, count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Padded on the right, each sample to a length of its own. other: with other tokens at the padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        tokens = torch.randint(40, (8, 11), generator=generator)
        real = torch.arange(11) < torch.randint(2, 12, (8, 1), generator=generator)
        padding = torch.randint(40, (8, 11), generator=generator) * other
        mask = ~real if inverted else real.long()
        found.append((torch.where(real, tokens, padding), mask))
    return found


SETTINGS: list[dict[str, Any]] = [
    {"ratio": 0.5},
    {"budget": {"flops": 0.6}},
    {"ratio": 0.5, "rows": 200},
    {"ratio": 0.5, "decomposition": "lstsq", "selection": "l2"},
]


@pytest.mark.slow
@pytest.mark.parametrize("given", SETTINGS, ids=["ratio", "budget", "few rows", "lstsq"])
@pytest.mark.parametrize("kind", ["mask", "inverted", "pooled"])
def test_what_is_at_the_padding_changes_nothing(given: dict[str, Any], kind: str) -> None:
    model = Encoder(inverted=kind == "inverted", pooled=kind == "pooled").eval()

    def merged(other: bool) -> fxmerge.Result:
        data = batches(model.inverted, other)
        return fxmerge.merge(model, batches(model.inverted, False)[0], calibration=data, **given)

    one, two = merged(False), merged(True)
    assert any(r.after < r.before for r in one.report.refitted)
    assert ", without padding" in one.report.text(400)
    assert one.plan.groups == two.plan.groups
    state = two.module.state_dict()
    assert state.keys() == one.module.state_dict().keys()
    for name, value in one.module.state_dict().items():
        assert torch.allclose(value, state[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
def test_refit_of_a_language_model() -> None:
    model = llama(vocabulary=40)
    states, example = [], {"input_ids": torch.randint(40, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.long)}
    for other in (False, True):
        data = [{"input_ids": tokens, "attention_mask": mask} for tokens, mask in batches(False, other)]
        result = fxmerge.merge(model, example, calibration=data, ratio=0.5)
        assert ", without padding" in result.report.text(400)
        states.append(result.module.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("leaks", [False, True])
def test_a_mask_that_does_not_switch_off_is_no_padding(leaks: bool) -> None:
    """Where a position that is masked moves the outputs elsewhere, it is a row like any other."""
    data = batches(False, False)
    captured = capture(Encoder(leaks=leaks).eval(), data[0])
    found = padding_of(captured, [list(batch) for batch in data])
    assert (found is None) == leaks
    assert padding_of(captured, [[data[0][0], torch.ones(8, 11, dtype=torch.long)]]) is None
