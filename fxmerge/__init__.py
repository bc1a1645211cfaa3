"""fxmerge makes a trained PyTorch model structurally smaller, with no training and no data.

result = fxmerge.merge(model, example_inputs, ratio=0.5)
result.module          # a smaller torch.fx.GraphModule
print(result.report.text())
"""

from __future__ import annotations

from . import verify
from .allocators import ALLOCATORS
from .decomposition import DECOMPOSITIONS
from .errors import FxMergeError
from .merge import analyze, apply, merge
from .options import Options
from .passes import MergePass, compile
from .perchannel import Module, Rule, per_channel
from .plan import Plan
from .probes import PROBES
from .residence import in_memory, on_disk
from .results import Analysis, Result
from .rules import RULES
from .saving import load
from .selection import SELECTORS
from .sweep import Sweep, sweep

__version__ = "0.1.0"

__all__ = [
    "ALLOCATORS",
    "DECOMPOSITIONS",
    "PROBES",
    "RULES",
    "SELECTORS",
    "Analysis",
    "FxMergeError",
    "MergePass",
    "Module",
    "Options",
    "Plan",
    "Result",
    "Rule",
    "Sweep",
    "analyze",
    "apply",
    "compile",
    "in_memory",
    "load",
    "merge",
    "on_disk",
    "per_channel",
    "sweep",
    "verify",
]
