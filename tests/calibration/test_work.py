"""What is said of the work that is done: by layer, and while a merge runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge import api
from fxmerge.calibration.paired_run import Settings
from fxmerge.calibration.work import shares_of_work
from fxmerge.progress import Stage


def test_the_share_of_each_layer_is_that_of_its_products() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    analysis = fxmerge.analyze(model, torch.zeros(3, 4))
    # 30 rows: the outputs; of 20 of them, patches by patches and by outputs; then the solutions
    first = 30 * 4 * 8 + 20 * (4 * 4 + 4 * 8) + 2 * 4**3
    second = 30 * 8 * 2 + 20 * (8 * 8 + 8 * 2) + 2 * 8**3
    settings = Settings(rows=20, seed=0, held=False, reduce=lambda value: value)
    shares = shares_of_work(analysis.facts, analysis.captured.module, 30, settings, 2.0)
    ahead = {layer.node: shares[layer.node] for layer in analysis.facts.layers}
    assert list(ahead.values()) == pytest.approx([0, first / (first + second)])


@pytest.mark.slow
def test_stages_of_a_merge_tell_how_much_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {}

    @contextmanager
    def kept() -> Iterator[Stage]:
        def stage(name: str, done: float = 0.0) -> None:
            seen.setdefault(name.partition(" ")[0], []).append(done)

        yield stage

    monkeypatch.setattr(api, "progress", kept)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())))
    fxmerge.merge(model, torch.randn(8, 16), ratio=0.5)
    for kind in ("survey", "selection", "refit"):
        assert seen[kind] == sorted(seen[kind]) and 0.4 < max(seen[kind]) < 1, kind
