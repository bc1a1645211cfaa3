"""fxmerge as a pass of torch.fx's own pass infrastructure."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .errors import FxMergeError
from .merge import merge
from .options import Options

_DONE = "fxmerge_merged"  # in GraphModule.meta: this pass has been here


class MergePass(PassBase):
    """A PassBase: `MergePass(options, example_inputs)(graph_module)` gives a PassResult, `modified=False` if repeated.

    Without example inputs, zeros of the shapes in the placeholders' `meta["val"]` or `meta["tensor_meta"]` serve.
    """

    def __init__(self, options: Options | None = None, example_inputs: Any = None) -> None:
        super().__init__()
        self.options, self.example_inputs = options or Options(), example_inputs

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Merge. Raises FxMergeError as `fxmerge.merge` does."""
        if graph_module.meta.get(_DONE):
            return PassResult(graph_module, False)
        inputs = self.example_inputs if self.example_inputs is not None else _inputs(graph_module)
        result = merge(graph_module, inputs, self.options)
        module = result.module
        assert isinstance(module, fx.GraphModule)  # as a graph module came in
        module.meta[_DONE] = True
        return PassResult(module, bool(result.plan.groups))


def _inputs(module: fx.GraphModule) -> tuple[torch.Tensor, ...]:
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known = node.meta.get("val", node.meta.get("tensor_meta"))
            if known is None:
                raise FxMergeError(
                    f"input {node.name} has no shape in its metadata; give MergePass(..., example_inputs=...)"
                )
            found.append(torch.zeros(tuple(known.shape), dtype=known.dtype))
    return tuple(found)
