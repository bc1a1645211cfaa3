"""Pricing: what a merged model costs is known before it is built, to the last FLOP and parameter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fxmerge
import tests.helpers.nets  # noqa: F401  (fills NETS)
from fxmerge.graph.cost import flops_by_node
from fxmerge.planning.price import flops_price
from tests.helpers.netmaking import NETS, one_thread, plain_merge  # noqa: F401
from tests.helpers.prices import check_prices

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("heads", ["width", "whole", "both"])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("name", NETS)
def test_a_price_is_what_the_merged_net_costs(name: str, ratio: float, heads: str) -> None:
    check_prices(*NETS[name](), ratio=ratio, heads=heads)


@pytest.mark.parametrize(("name", "heads"), [
    ("resnet18", "width"), ("mobilenet_v2", "width"), ("regnet_x_400mf", "whole"),
    *(pytest.param(name, "width", marks=pytest.mark.slow)
      for name in ("regnet_x_400mf", "densenet121", "shufflenet_v2_x0_5", "googlenet", "efficientnet_b0", "swin_t")),
])  # fmt: skip
def test_a_price_is_what_the_merged_published_net_costs(name: str, heads: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    assert check_prices(models.get_model(name, weights=None), torch.randn(1, 3, 64, 64), heads=heads) > 10


def test_a_price_is_what_a_merged_dense_net_costs() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.DenseNet(growth_rate=8, block_config=(2, 3, 2), num_init_features=16, num_classes=10)
    assert check_prices(model, torch.randn(1, 3, 32, 32)) > 10


@pytest.mark.parametrize("heads", ["width", "whole", "both"])
def test_a_price_is_what_the_merged_transformer_costs(heads: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    assert check_prices(models.VisionTransformer(**sizes), torch.randn(1, 3, 32, 32), heads=heads) > 4


@pytest.mark.parametrize("name", ["gate", "encoder", "unet"])
def test_the_gradient_is_what_one_channel_more_costs(name: str) -> None:
    """Prices are products of widths: a group that both reads and writes a layer makes a square of its own."""
    model, x = NETS[name]()
    found = fxmerge.analyze(model, x)
    flops = flops_by_node(found.captured.module, found.captured.inputs)
    price = flops_price(found.facts, found.groups, found.grouping, flops)
    k = price.full * 0.5
    value, slope = price.gradient(k)
    assert value == pytest.approx(price.at(k))
    for cell in range(len(k)):
        step = np.eye(len(k))[cell] * 1e-4
        assert slope[cell] == pytest.approx((price.at(k + step) - price.at(k - step)) / 2e-4, rel=1e-6)
