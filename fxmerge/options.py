"""Options: everything that users can set, in one frozen dataclass; the CLI's flags are its fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fxmerge.errors import FxMergeError
from fxmerge.methods.allocation import ALLOCATORS
from fxmerge.methods.decomposition import DECOMPOSITIONS
from fxmerge.methods.probes import PROBES
from fxmerge.methods.selection import SELECTORS

BUDGETS = ("flops", "params", "latency")
CHOICES: dict[str, tuple[str, ...]] = {
    "scope": ("internal", "all"),
    "heads": ("width", "whole", "both"),
    "allocation": tuple(ALLOCATORS),
    "selection": tuple(SELECTORS),
    "decomposition": tuple(DECOMPOSITIONS),
    "mostsim_scale": ("exact", "reference"),
    "refit": ("none", "synthetic", "calibration"),
    "probes": ("auto", *PROBES),
}
_SCOPE = "internal: groups with one producer and one consumer, as in the paper; all: residual and shared groups too"
_HEADS = "attention's heads, groups of convolutions and of norms: each loses width, whole ones leave, or both"


def _one_of(field_name: str, what: str) -> Any:
    """Help for a field with fixed choices, which are told by `CHOICES` alone."""
    from tyro.conf import arg  # asked for by the command line only, when it reads these annotations

    return arg(help=f"{what}; one of {', '.join(CHOICES[field_name])}")


class _Unsaid(float):
    """A default that nobody asked for, so that asking for another thing does not contradict it."""


@dataclass(frozen=True)
class Options:
    """How to merge. Raises FxMergeError for a value that makes no sense, naming the field."""

    ratio: float = _Unsaid(0.5)
    """share of its channels that each group gives up, 0 <= ratio < 1"""
    budget: Mapping[str, float] = field(default_factory=dict)
    """in place of ratio, the share of the whole model that may remain: flops 0.5, params 0.36 or latency 0.7"""
    allocation: Annotated[str, _one_of("allocation", "how a budget is shared out between the groups")] = "greedy"
    max_ratio: float = 0.9
    """under a budget: share of its channels that a group gives up at most"""
    keep: Mapping[str, int | float] = field(default_factory=dict)
    """{group name pattern: channels (int) or share (float) kept}, over ratio"""
    ignore: tuple[str, ...] = ()
    """patterns of module or group names that stay as they are"""
    scope: Annotated[str, _one_of("scope", _SCOPE)] = "all"
    heads: Annotated[str, _one_of("heads", _HEADS)] = "width"
    selection: Annotated[str, _one_of("selection", "which channels stay; repair is l2 without refit")] = "repair"
    decomposition: Annotated[str, _one_of("decomposition", "how the channels that stay carry the others")] = "mostsim"
    threshold: float = 0.1
    """mostsim: below this cosine a channel is dropped, not merged"""
    lam: float = 0.85
    """mostsim: weight of the cosine against the constant left over, 0 to 1, behind a BatchNorm"""
    mostsim_scale: Annotated[str, _one_of("mostsim_scale", "mostsim's scale; reference is the published code's")] = (
        "exact"
    )
    refit: Annotated[str, _one_of("refit", "what layers are re-solved on: nothing, probes, your batches")] = "synthetic"
    probes: Annotated[str, _one_of("probes", "family of refit's probes; auto fits the BatchNorms' statistics")] = "auto"
    samples: int = 0
    """refit: probes made; 0: 128 to 4096, by the size of the activations and of a forward pass"""
    batch: int = 64
    """refit: probes run at a time"""
    rows: int = 65536
    """refit: output positions that a layer is solved on, at most; fewer where it is wide"""
    round_to: int = 1
    """kept channels are a multiple of this"""
    seed: int = 0
    """everything random comes from it"""

    def __post_init__(self) -> None:
        self._number("ratio", 0, 1, "it is the share of channels to give up, 0 <= ratio < 1", below=True)
        self._number("max_ratio", 1e-9, 1, "it is a share of channels, 0 < max_ratio < 1", below=True)
        self._number("threshold", -1, 1, "it is a cosine")
        self._number("lam", 0, 1, "it is a weight between 0 and 1")
        for name in ("round_to", "samples", "batch", "rows", "seed"):
            value, least = getattr(self, name), 0 if name in ("seed", "samples") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise FxMergeError(f"{name} is {value!r}; give a whole number from {least} up")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise FxMergeError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if isinstance(self.ignore, str):
            raise FxMergeError(f"ignore is the string {self.ignore!r}; give a sequence of patterns: ({self.ignore!r},)")
        if not isinstance(self.ignore, (tuple, list, set, frozenset)) or not all(
            isinstance(pattern, str) for pattern in self.ignore
        ):
            raise FxMergeError(f"ignore is {self.ignore!r}; give a sequence of patterns, each a string")
        if not isinstance(self.keep, Mapping):
            raise FxMergeError(f"keep is a {type(self.keep).__name__}; give {{group name pattern: channels or share}}")
        for pattern, value in self.keep.items():
            self._keep(pattern, value)
        self._budget()
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "keep", dict(self.keep))
        object.__setattr__(self, "budget", dict(self.budget))

    def _number(self, name: str, low: float, high: float, what: str, below: bool = False) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= value <= high or (below and value == high):
            raise FxMergeError(f"{name} is {value!r}; {what}")

    def _keep(self, pattern: str, value: Any) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(pattern, str):
            raise FxMergeError(f"keep has the key {pattern!r}; give patterns of group names, each a string")
        if not number or value <= 0 or (isinstance(value, float) and value > 1):
            raise FxMergeError(
                f"keep[{pattern!r}] is {value!r}; give a whole number of channels from 1 up, or a share in (0, 1]"
            )

    def _budget(self) -> None:
        form = (
            'give one of {"flops": 0.5}, {"params": 0.5}, {"latency": 0.5}: the share of the original that may remain'
        )
        if not isinstance(self.budget, Mapping) or len(self.budget) > 1:
            raise FxMergeError(f"budget is {self.budget!r}; {form}")
        for kind, share in self.budget.items():
            if kind not in BUDGETS:
                raise FxMergeError(f"budget has the key {kind!r}; {form}")
            number = isinstance(share, (int, float)) and not isinstance(share, bool) and math.isfinite(share)
            if not number or not 0 < share <= 1:
                raise FxMergeError(f"budget[{kind!r}] is {share!r}; it is a share of the original, 0 < share <= 1")
            if self.heads == "both":
                told = "heads='both' takes a ratio: how much of a budget blocks and their widths give is not decided"
                raise FxMergeError(f"{told}; give ratio in place of budget, or heads='width' or 'whole'")
            if not isinstance(self.ratio, _Unsaid):
                told = f"ratio {self.ratio:g} and budget {{{kind!r}: {share:g}}}"
                raise FxMergeError(f"{told} contradict each other; give one of them")

    def replace(self, **changes: Any) -> Options:
        """The same options with some fields changed; an unknown field is an FxMergeError."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise FxMergeError(f"unknown option {name!r}; the options are {', '.join(known)}")
        return dataclasses.replace(self, **changes)


TOLERANCE = {"flops": 0.01, "params": 0.01, "latency": 0.03}  # of what was asked for
NAMES = {"flops": "FLOPs", "params": "parameters", "latency": "latency"}
