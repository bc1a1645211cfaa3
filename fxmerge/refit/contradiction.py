"""Whether the errors that refit reports contradict the error that was measured on the model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from fxmerge.refit.records import Refitted

LARGE = 0.5  # an error of the outputs that is worth a note
FARTHER = 8.0  # how many times the last layers' error it is, at least


def contradiction(refitted: Sequence[Refitted], error: float, outputs: int) -> tuple[str, ...]:
    """A note if the last layers fit refit's data far better than the model's outputs fit the original's, or none.

    error:    the relative error of the model's outputs on the example inputs
    outputs:  how many outputs the model has, and so how many layers may be last
    """
    last = [r for r in refitted if r.solved][-max(outputs, 1) :]
    reached = max((r.after**0.5 for r in last), default=inf)
    if not (error > LARGE and error > FARTHER * reached):
        return ()
    names = ", ".join(dict.fromkeys(r.name for r in last))
    return (
        f"the errors contradict each other: on refit's data, the outputs of {names} are within {reached:.2g} of the "
        f"original's, but on the example inputs the model's outputs are off by {error:.2g}; the example inputs are "
        "unlike refit's data, or what follows magnifies the error: give merge(..., calibration=batches) of such inputs",
    )
