"""What benchmarks.recover measures: how a network is narrowed to a budget of FLOPs, and how it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ORIGINAL = "original"
SAMPLES = 512  # training images, without labels, for the calibration of refit

# share of the FLOPs that is left
NETWORKS: Mapping[str, float] = {"resnet56": 0.5, "vgg16": 0.42}


@dataclass(frozen=True)
class Method:
    """How a network is narrowed and trained.

    options:   of `fxmerge.merge`, beside the budget
    distilled: trained with `fxmerge.distill`, without labels, else with the labels alone
    shrunk:    narrowed by `fxmerge.Shrinker` over the first half of the epochs, else by `merge` before the first
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    distilled: bool = False
    shrunk: bool = False


PRUNED = {"decomposition": "prune", "refit": "none", "allocation": "uniform"}

METHODS: Mapping[str, Method] = {
    ORIGINAL: Method(),
    "l1": Method({**PRUNED, "selection": "l1"}),
    "reprune-2020": Method({**PRUNED, "selection": "reprune"}),
    "reprune-2024": Method({"selection": "reprune-kernel", "allocation": "uniform"}, shrunk=True),
    "merged": Method({"refit": "none"}),
    "refit": Method({"refit": "calibration"}),
    "distilled": Method({"refit": "calibration"}, distilled=True),
}
EPOCHS = (0, 1, 2, 5, 10, 20, 40)
