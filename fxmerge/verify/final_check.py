"""The check at the end of every merge."""

from __future__ import annotations

from torch import fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.graph.compare import Verdict, has_generators, judged
from fxmerge.ir.capture import Capture

_REMEDY = "please report this model; until then, exclude the layer with ignore="


def compare(captured: Capture, merged: nn.Module) -> Verdict:
    """Runs the merged model on the example inputs and compares its outputs with the original's.

    The original is run once more where outputs are integers, or may be random. Raises FxMergeError where the merged
    model's code is not that of its graph, where it does not run, or where its outputs have other shapes.
    """
    _is_its_own_graph(captured, merged)
    captured, recorded = captured.whole, captured.recorded
    return judged(
        captured.module if recorded is None else recorded.host,
        merged,
        (captured.args, captured.kwargs),
        expected=captured.outputs,
        unsure=recorded is not None or has_generators(captured.module),
        lengths_vary=recorded is not None,
    )


def _is_its_own_graph(captured: Capture, merged: nn.Module) -> None:
    """Raises FxMergeError where a graph was edited after its module was compiled: the edit would be lost.

    The code that runs is compared with the code that the graph gives now. Nothing is run.
    """
    paths = [""] if captured.recorded is None else [part.path for part in captured.recorded.parts]
    for path in paths:
        module = merged.get_submodule(path)
        if isinstance(module, fx.GraphModule) and module.code != module.graph.python_code("self").src:
            what = f"the module {path!r} of the merged model" if path else "the merged model"
            raise FxMergeError(f"the code of {what} is not that of its graph, which was edited later; {_REMEDY}")
