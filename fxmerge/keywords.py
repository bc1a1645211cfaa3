"""The options of a merge as keyword arguments, so that editors and type checkers know them; `Options` explains each.

The registries are open: an entry of your own is no documented name, so give it as `Options(selection="mine")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

Budget = Literal["flops", "params", "cache", "latency"]
Scope = Literal["internal", "all"]
Heads = Literal["width", "whole", "both"]
MostsimScale = Literal["exact", "reference"]
Refit = Literal["none", "synthetic", "calibration"]

# the entries that come with the package; tests/test_keywords.py compares them with the registries
Allocation = Literal["greedy", "uniform"]
Selection = Literal["l1", "l2", "gm", "random", "repair", "reprune", "reprune-kernel"]
Decomposition = Literal["auto", "prune", "mostsim", "fold", "lstsq", "pca"]
Probes = Literal["auto", "example", "alike", "pink", "white", "leaves"]


class SweepKeywords(TypedDict, total=False):
    """The options that `fxmerge.sweep` takes; its budgets take the place of ratio and budget."""

    allocation: Allocation
    of: str | tuple[str, ...] | list[str]
    max_ratio: float
    depth: bool
    experts: float
    keep: Mapping[str, int | float]
    ignore: tuple[str, ...] | list[str] | set[str]  # a string alone is a mistake
    scope: Scope
    heads: Heads
    selection: Selection
    decomposition: Decomposition
    threshold: float
    lam: float
    mostsim_scale: MostsimScale
    refit: Refit
    probes: Probes
    samples: int
    batch: int
    rows: int
    memory: float
    round_to: int
    same_widths: bool
    own_class: bool
    new_biases: bool
    seed: int


class Keywords(SweepKeywords, total=False):
    """The options that `fxmerge.merge` and `fxmerge.analyze` take."""

    ratio: float
    budget: Mapping[str, float]


class CompileKeywords(Keywords, total=False):
    """The options that `fxmerge.compile` takes: those of a merge, and arguments of `torch.compile`."""

    fullgraph: bool
    dynamic: bool | None
    backend: Any  # a name or a function
    mode: str | None
    disable: bool
