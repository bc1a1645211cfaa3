"""The options of a merge, in one frozen dataclass; the flags of the command line are its fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, get_args

from fxmerge.errors import FxMergeError
from fxmerge.graph import latency
from fxmerge.keywords import Heads, Keywords, MostsimScale, Refit, Scope
from fxmerge.methods.allocation import ALLOCATORS
from fxmerge.methods.decomposition import DECOMPOSITIONS
from fxmerge.methods.probes import PROBES
from fxmerge.methods.selection import SELECTORS

if TYPE_CHECKING:
    from typing_extensions import Unpack

# kind of budget -> its name in texts
NAMES = {"flops": "FLOPs", "params": "parameters", "cache": "key-value cache", "latency": "latency"}
BUDGETS = tuple(NAMES)
# relative error with which a budget is met
TOLERANCE = {"flops": 0.01, "params": 0.01, "cache": 0.01, "latency": latency.TOLERANCE}


def choices() -> dict[str, tuple[str, ...]]:
    """The values of each option that has a fixed set of them.

    The registries are read on every call, so that an entry added by a user is a choice.
    """
    return {
        "scope": get_args(Scope),
        "heads": get_args(Heads),
        "allocation": tuple(ALLOCATORS),
        "selection": tuple(SELECTORS),
        "decomposition": tuple(DECOMPOSITIONS),
        "mostsim_scale": get_args(MostsimScale),
        "refit": get_args(Refit),
        "probes": ("auto", *PROBES),
    }


def _open(name: str) -> Any:
    """Lists the `choices` of an option in its help. It is evaluated when the command line reads the annotations."""
    from tyro.conf import arg

    return arg(help_behavior_hint=lambda default: f"(one of {', '.join(choices()[name])}; default: {default})")


class _DefaultRatio(float):
    """The default ratio. A budget contradicts a ratio that the user gave, but not this one."""


@dataclass(frozen=True)
class Options:
    """The options of a merge. Raises FxMergeError for an invalid value, naming the field."""

    ratio: float = _DefaultRatio(0.5)
    """share of its channels that each group drops, 0 <= ratio < 1"""
    budget: Mapping[str, float] = field(default_factory=dict)
    """instead of ratio: share of the original's cost that may remain: flops 0.5, params 0.36, cache 0.5, latency 0.7"""
    of: tuple[str, ...] = ()
    """with a budget: patterns of the modules whose cost it is a share of, with all that is inside them; default: all"""
    allocation: Annotated[str, _open("allocation")] = "greedy"
    """how a budget is divided among the groups"""
    max_ratio: float = 0.9
    """with a budget: largest share of its channels that a group may drop"""
    depth: bool = False
    """with a budget: drop whole residual branches too, such as the MLP of a layer, where that loses less"""
    experts: float = 1.0
    """share of the experts that each mixture keeps; the others leave whole, with their row of the router"""
    keep: Mapping[str, int | float] = field(default_factory=dict)
    """{group name pattern: channels (int) or share (float) to keep}; overrides ratio"""
    ignore: tuple[str, ...] = ()
    """patterns of module or group names to leave unchanged"""
    scope: Scope = "all"
    """internal: groups with one producer and one consumer, as in the paper; all: also residual and shared groups"""
    heads: Heads = "width"
    """attention heads, and groups of convolutions and norms: reduce their width, remove whole ones, or both"""
    selection: Annotated[str, _open("selection")] = "repair"
    """how the kept channels are selected; repair is l2 without refit"""
    decomposition: Annotated[str, _open("decomposition")] = "auto"
    """how kept channels replace the dropped ones"""
    threshold: float = 0.1
    """mostsim: a channel is dropped without a partner if its largest cosine is below this"""
    lam: float = 0.85
    """mostsim, with a BatchNorm: weight of the cosine against the remaining constant, 0 to 1"""
    mostsim_scale: MostsimScale = "exact"
    """mostsim: how the scale is computed; reference reproduces the published code"""
    refit: Refit = "synthetic"
    """data for re-solving the layers: none, synthetic probes, or calibration data"""
    probes: Annotated[str, _open("probes")] = "auto"
    """refit: family of probes; auto: alike if the example has rows enough, else by the BatchNorms, or example"""
    samples: int = 0
    """refit: number of probes, or of calibration samples with variants of them; 0 chooses 128 to 4096, by their cost"""
    batch: int = 64
    """refit: probes in a batch, at most; fewer where activations are large"""
    rows: int = 65536
    """refit: largest number of output positions to solve a layer on; wide layers use fewer"""
    memory: float = 0.0
    """refit: GiB that its samples may take beside the models, by using fewer; 0: 0.5 for the largest activation"""
    round_to: int = 1
    """the number of kept channels is a multiple of this"""
    same_widths: bool = False
    """groups of the same role in repeated blocks, such as the MLPs of all layers, keep equally many channels"""
    own_class: bool = False
    """leave groups whole as far as the model's own class needs it to take the merge, so that there is a result.model"""
    new_biases: bool = True
    """layers without a bias may be given one, which carries constants of dropped channels, and what refit finds"""
    seed: int = 0
    """seed of everything that is random"""

    def __post_init__(self) -> None:
        self._number("ratio", 0, 1, "it is the share of channels to drop, 0 <= ratio < 1", below=True)
        if not _is_number(self.experts) or not 0 < self.experts <= 1:
            raise FxMergeError(f"experts is {self.experts!r}; it is the share of experts to keep, 0 < experts <= 1")
        self._number("max_ratio", 1e-9, 1, "it is a share of channels, 0 < max_ratio < 1", below=True)
        self._number("threshold", -1, 1, "it is a cosine")
        self._number("lam", 0, 1, "it is a weight between 0 and 1")
        self._number("memory", 0, math.inf, "it is a number of GiB, or 0", below=True)
        for name in ("round_to", "samples", "batch", "rows", "seed"):
            value, least = getattr(self, name), 0 if name in ("seed", "samples") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise FxMergeError(f"{name} is {value!r}; give an integer of at least {least}")
        for name in ("depth", "same_widths", "own_class", "new_biases"):
            if not isinstance(getattr(self, name), bool):
                raise FxMergeError(f"{name} is {getattr(self, name)!r}; give True or False")
        for name, allowed in choices().items():
            if getattr(self, name) not in allowed:
                raise FxMergeError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        self._check_ignore()
        self._check_keep()
        self._check_budget()
        self._check_of()
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "of", (self.of,) if isinstance(self.of, str) else tuple(self.of))
        object.__setattr__(self, "keep", dict(self.keep))
        object.__setattr__(self, "budget", dict(self.budget))

    def _number(self, name: str, low: float, high: float, rule: str, below: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not low <= value <= high or (below and value == high):
            raise FxMergeError(f"{name} is {value!r}; {rule}")

    def _check_ignore(self) -> None:
        if isinstance(self.ignore, str):
            raise FxMergeError(f"ignore is the string {self.ignore!r}; give a sequence of patterns: ({self.ignore!r},)")
        is_sequence = isinstance(self.ignore, (tuple, list, set, frozenset))
        if not is_sequence or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise FxMergeError(f"ignore is {self.ignore!r}; give a sequence of patterns, each a string")

    def _check_keep(self) -> None:
        if not isinstance(self.keep, Mapping):
            raise FxMergeError(f"keep is a {type(self.keep).__name__}; give {{group name pattern: channels or share}}")
        for pattern, value in self.keep.items():
            if not isinstance(pattern, str):
                raise FxMergeError(f"keep has the key {pattern!r}; give patterns of group names, each a string")
            if not _is_number(value) or value <= 0 or (isinstance(value, float) and value > 1):
                raise FxMergeError(
                    f"keep[{pattern!r}] is {value!r}; give an integer number of channels, at least 1, "
                    "or a share in (0, 1]"
                )

    def _check_budget(self) -> None:
        kinds = ", ".join(f'{{"{kind}": 0.5}}' for kind in BUDGETS)
        form = f"give one of {kinds}: the share of the original that may remain"
        if not isinstance(self.budget, Mapping) or len(self.budget) > 1:
            raise FxMergeError(f"budget is {self.budget!r}; {form}")
        for kind, share in self.budget.items():
            if kind not in BUDGETS:
                raise FxMergeError(f"budget has the key {kind!r}; {form}")
            if not _is_number(share) or not 0 < share <= 1:
                raise FxMergeError(f"budget[{kind!r}] is {share!r}; it is a share of the original, 0 < share <= 1")
            if self.has_ratio:
                raise FxMergeError(
                    f"ratio {self.ratio:g} and budget {{{kind!r}: {share:g}}} contradict each other; give one of them"
                )

    def _check_of(self) -> None:
        patterns = [self.of] if isinstance(self.of, str) else self.of
        if not isinstance(patterns, (tuple, list)) or not all(isinstance(p, str) and p for p in patterns):
            raise FxMergeError(f"of is {self.of!r}; give a pattern of module names, or a tuple of them")
        if patterns and "latency" in self.budget:
            raise FxMergeError(f"of is {self.of!r}, but a latency is that of the whole model; give another budget")
        if patterns and self.depth:
            raise FxMergeError("depth drops branches of the whole model; give it without of")
        if self.depth and self.experts < 1:
            raise FxMergeError("depth and experts cannot be combined; merge with one of them")
        if self.depth and self.own_class:
            raise FxMergeError("depth drops branches that the code of own_class runs; leave one of the two options out")
        if self.depth and "cache" in self.budget:
            raise FxMergeError("depth cannot be priced by the key-value cache; give another budget, or depth=False")

    @property
    def has_ratio(self) -> bool:
        """Whether a ratio was given. A budget contradicts it, but not the default."""
        return not isinstance(self.ratio, _DefaultRatio)

    @property
    def by_channels(self) -> Options:
        """The options as they are for groups that cannot be rotated, whose channels are kept as they are."""
        return self.replace(decomposition="auto") if self.decomposition == "pca" else self

    def replace(self, **changes: Unpack[Keywords]) -> Options:
        """A copy with some fields changed. Raises FxMergeError for an unknown field."""
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise FxMergeError(f"unknown option {name!r}; the options are {', '.join(known)}")
        found: Options = dataclasses.replace(self, **changes)  # type: ignore[arg-type]  # ignore may be a list
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
