"""The check at the end of every merge."""

from __future__ import annotations

from torch import fx, nn

from fxmerge.errors import FxMergeError
from fxmerge.graph.compare import Verdict, difference, outputs
from fxmerge.ir.capture import Capture

_REMEDY = "please report this model; until then, exclude the layer with ignore="


def compare(captured: Capture, merged: nn.Module) -> Verdict:
    """Runs the merged model on the example inputs and compares its outputs with the original's.

    Raises FxMergeError where the merged model's code is not that of its graph, where it does not run, or where its
    outputs have other shapes.
    """
    _is_its_own_graph(captured, merged)
    before = list(captured.outputs)
    try:
        after = outputs(merged, captured.args, captured.kwargs)
    except Exception as error:
        raise FxMergeError(f"the merged model does not run ({error}); {_REMEDY}") from error
    if captured.recorded is not None and [t.shape[1:] for t in before] == [t.shape[1:] for t in after]:
        # the number of boxes that a detector returns depends on values: only outputs of equal length are compared
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.shape == a.shape]
        before, after = [b for b, _ in pairs], [a for _, a in pairs]
    if [t.shape for t in before] != [t.shape for t in after]:
        raise FxMergeError(f"the merged model's outputs have other shapes than the original's; {_REMEDY}")
    return Verdict(difference(before, after))


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
