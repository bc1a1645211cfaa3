"""The error of a draft on samples that it was not fitted to, before refit or after a short one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxmerge.calibration.output_error import output_error
from fxmerge.calibration.paired_run import Pair, Settings
from fxmerge.progress import Stage
from fxmerge.refit.refit_layers import refit


def trial_error(
    streams: Pair, fit: Sequence[Sequence[Any]], judging: Sequence[Sequence[Any]], settings: Settings,
    stage: Stage,
) -> float:  # fmt: skip
    """The relative square error of the merged graph's outputs.

    fit:      the batches that layers are refitted on, each alone; if there are none, the graph is judged as it is.
              Otherwise in place, and the error is that before refit if refit does not lower it
    judging:  the batches that the outputs are compared on
    """
    error = output_error(streams, judging, settings)
    if fit:
        refit(streams, fit, replace(settings, made=0), stage, jointly=False)
        error = min(error, output_error(streams, judging, settings))
    return error
