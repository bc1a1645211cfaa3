"""The published algorithm as run by benchmarks.peers, and the page of benchmarks.peers."""

from __future__ import annotations

import torch
from torch import nn

import fxmerge
from benchmarks.networks.models import lenet_300_100, resnet
from benchmarks.paper.neuron_merging import chains, neuron_merging
from benchmarks.peers import compare as peers
from benchmarks.speed.vgg16 import random_batch_norm


def counts(model: nn.Module) -> dict[str, int]:
    return {name: round(len(model.get_submodule(name).weight) / 2) for name, _, _ in chains(model)}  # type: ignore[arg-type]


def by_fxmerge(model: nn.Module, x: torch.Tensor, decomposition: str) -> nn.Module:
    options = fxmerge.Options(
        scope="internal", keep=counts(model), selection="l1", refit="none", decomposition=decomposition,
        mostsim_scale="reference", threshold=0.1,
    )  # fmt: skip
    return fxmerge.merge(model, x, options).module


def test_published_algorithm_and_fxmerge_give_the_same_network() -> None:
    torch.manual_seed(0)
    for model, x in (
        (lenet_300_100().eval(), torch.randn(4, 784)),
        (random_batch_norm(resnet(8)), torch.randn(4, 3, 32, 32)),
    ):
        with torch.no_grad():
            for merge, decomposition in ((True, "mostsim"), (False, "prune")):
                found = neuron_merging(model, counts(model), 0.1, merge)(x)
                torch.testing.assert_close(found, by_fxmerge(model, x, decomposition)(x), rtol=1e-3, atol=1e-3)
            assert len(chains(model)) in (2, 3)


def test_a_page_has_a_row_for_each_method() -> None:
    figures = {"accuracy": 90.0, "cpu": 1.5, "wall": 2.0, "peak": 30.0, "parameters": 1000, "flops": 2000}
    page = peers.markdown("resnet56", {0.5: dict.fromkeys(peers.METHODS, figures)})
    assert all(f"| 50% | {method} | 90.00 | 1.50 | 30 | 1,000 | 2,000 |" in page for method in peers.METHODS)
