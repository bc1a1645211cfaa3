"""fxmerge makes a trained PyTorch model structurally smaller, without training and without data.

    result = fxmerge.merge(model, example_inputs, ratio=0.5)
    result.module                 # the smaller torch.fx.GraphModule
    print(result.report.text())   # what was merged, what was not, and why

`import fxmerge` imports little besides torch: scipy, networkx and rich are imported by the functions that use them.
"""

from __future__ import annotations

from fxmerge import verify
from fxmerge.api import analyze, apply, merge
from fxmerge.errors import FxMergeError
from fxmerge.export.save import load
from fxmerge.methods.allocation import ALLOCATORS
from fxmerge.methods.decomposition import DECOMPOSITIONS
from fxmerge.methods.probes import PROBES
from fxmerge.methods.selection import SELECTORS
from fxmerge.options import Options
from fxmerge.passes import MergePass, compile
from fxmerge.plan import Plan
from fxmerge.report.points import Sweep
from fxmerge.result import Analysis, Result
from fxmerge.rules.elementwise import per_channel
from fxmerge.rules.rule import Module, Rule
from fxmerge.rules.table import RULES
from fxmerge.sweep import sweep
from fxmerge.weights.on_disk import in_memory, on_disk

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
