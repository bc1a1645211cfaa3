"""fxmerge as a pass for torch.fx pass managers, and combined with torch.compile."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils import _pytree as pytree

from fxmerge.api import merge
from fxmerge.errors import FxMergeError
from fxmerge.graph.eval_mode import evaluating
from fxmerge.graph.inputs import pytree_codegen
from fxmerge.ir.capture import Capture
from fxmerge.keywords import CompileKeywords
from fxmerge.options import Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DONE = "fxmerge_merged"  # key in GraphModule.meta of a module that this pass has merged


class MergePass(PassBase):
    """A pass that merges a graph module: `MergePass(options, example_inputs)(graph_module)` returns a PassResult.

    Without example inputs, zeros with the shapes in the placeholders' `meta["val"]` or `meta["tensor_meta"]` are used.
    Nodes keep their metadata; `val` and `tensor_meta` are computed again if the graph has them. A module that the pass
    has already merged is returned with `modified=False`.
    """

    def __init__(self, options: Options | None = None, example_inputs: Any = None) -> None:
        super().__init__()
        if options is not None and not isinstance(options, Options):
            raise FxMergeError(f"options is a {type(options).__name__}; give fxmerge.Options(...)")
        self.options, self.example_inputs = options or Options(), example_inputs

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Merges the module. Raises FxMergeError as `fxmerge.merge` does."""
        if not isinstance(graph_module, fx.GraphModule):
            raise FxMergeError(
                f"the pass was given a {type(graph_module).__name__}; give a torch.fx.GraphModule, or use fxmerge.merge"
            )
        if graph_module.meta.get(_DONE):
            return PassResult(graph_module, False)
        inputs = self.example_inputs if self.example_inputs is not None else _inputs(graph_module)
        result = merge(graph_module, inputs, self.options)
        if result.plan.is_empty:
            return PassResult(graph_module, False)
        module = result.module
        assert isinstance(module, fx.GraphModule)  # since the input is one
        module.meta[_DONE] = True
        _renew(module, result.analysis.captured)
        return PassResult(module, True)


def compile(
    model: nn.Module, example_inputs: Any, options: Options | None = None, calibration: Any = None,
    **arguments: Unpack[CompileKeywords],
) -> Any:  # fmt: skip
    """Merges a model, then compiles it with torch.compile.

    arguments: fields of `Options`, as `fxmerge.merge` takes them, and arguments of torch.compile. `fullgraph` is True
        by default if the whole model could be traced.
    Raises FxMergeError as `fxmerge.merge` does, and for an argument of neither of the two.
    """
    fields = [f.name for f in dataclasses.fields(Options)]
    own = [name for name in inspect.signature(torch.compile).parameters if name not in ("model", "options")]
    for name in arguments:
        if name not in fields and name not in own:
            raise FxMergeError(
                f"unknown argument {name!r}; the options of a merge are {', '.join(fields)}, and the arguments of "
                f"torch.compile are {', '.join(own)}"
            )
    changes: dict[str, Any] = {name: value for name, value in arguments.items() if name in fields}
    module = merge(model, example_inputs, options, calibration, **changes).module
    given: dict[str, Any] = {name: value for name, value in arguments.items() if name not in fields}
    if isinstance(module, fx.GraphModule):
        given.setdefault("fullgraph", True)
    return torch.compile(module, **given)


def _inputs(module: fx.GraphModule) -> Any:
    """Zeros with the shapes of the placeholders, structured as the module takes its inputs."""
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known = node.meta.get("val", node.meta.get("tensor_meta"))
            if not hasattr(known, "shape"):
                raise FxMergeError(
                    f"input {node.name} has no shape in its metadata; give MergePass(..., example_inputs=...)"
                )
            shape: Any = [s.node.hint if isinstance(s, torch.SymInt) else s for s in known.shape]
            device = getattr(known, "device", None)  # tensor_meta has none
            found.append(torch.zeros(shape, dtype=known.dtype, device=device))
    codegen = pytree_codegen(module)
    if codegen is None:
        return tuple(found)
    args, kwargs = pytree.tree_unflatten(found, codegen.pytree_info.in_spec)
    return dict(zip(codegen.pytree_info.orig_args, args, strict=False)) | kwargs if kwargs else tuple(args)


def _renew(module: fx.GraphModule, captured: Capture) -> None:
    """Computes the metadata with shapes again, where the graph has it; symbolic sizes stay symbolic."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.fx.passes.shape_prop import ShapeProp

    nodes = list(module.graph.nodes)
    with evaluating(module), torch.no_grad():
        if any("tensor_meta" in n.meta for n in nodes):
            ShapeProp(module).run(*captured.inputs, enable_io_processing=False)
        held = [n.meta.get("val") for n in nodes if n.op == "placeholder"]
        modes = [v.fake_mode for v in held if isinstance(v, FakeTensor)]
        if modes:
            mode, strict = modes[0], modes[0].allow_non_fake_inputs
            mode.allow_non_fake_inputs = True  # the parameters are real
            try:
                with mode:
                    FakeTensorProp(module, mode).run(*held, enable_io_processing=False)
            finally:
                mode.allow_non_fake_inputs = strict
        elif any(isinstance(n.meta.get("val"), Tensor) for n in nodes):
            FakeTensorProp(module).run(*captured.inputs, enable_io_processing=False)
