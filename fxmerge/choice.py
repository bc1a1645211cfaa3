"""The decisions of a merge that are made before anything is rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxmerge.analysis.grouping import Chosen
from fxmerge.calibration.batches import Batches
from fxmerge.ir.groups import Refusal
from fxmerge.options import Options
from fxmerge.rules.resize import Call


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The decisions of a merge that are made before anything is rewritten.

    chosen:    the groups that narrow, with the channels that they keep
    edits:     {node: its call with new literal sizes}, for sizes that follow the widths of groups
    refusals:  the channels that are not merged, with reasons
    batches:   the data that refit runs on; empty if there is no refit
    notes:     requests that were not, or not fully, carried out
    """

    options: Options
    chosen: Chosen
    edits: Mapping[str, Call]
    refusals: tuple[Refusal, ...]
    batches: Batches
    notes: tuple[str, ...]
