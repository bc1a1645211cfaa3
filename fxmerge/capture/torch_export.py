"""Exports models with torch.export, for those that symbolic tracing cannot follow or leaves with opaque calls.

Graphs consist of aten ops. Parameters keep the user's names. Sizes of inputs are free where the model allows it
(`free_sizes`); assertions in the graph say which (`guards`). The literals that depend on widths are recomputed by
`analysis/literal_sizes.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import logging
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fxmerge.capture.declared_sizes import Shapes
from fxmerge.capture.free_sizes import with_declared_sizes, with_free_sizes
from fxmerge.capture.guards import insert, sizes_of
from fxmerge.errors import FxMergeError, first_line
from fxmerge.graph.ops import updates


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Shapes | None = None
) -> fx.GraphModule:
    """The model as a graph module of aten ops with the model's call signature. Raises whatever torch.export raises.

    shapes: the sizes that the user declares, or None, to find out which can vary
    """
    with silence(), torch.no_grad():
        if shapes is not None:
            return with_declared_sizes(model, args, kwargs, _graph_module_of, shapes)
        found = with_free_sizes(model, args, kwargs, _graph_module_of)
        return found or graph_module_of(torch.export.export(model, args, kwargs, strict=False))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppresses the logs, warnings and prints of torch.export; its exceptions say what failed."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
        with quiet[0], quiet[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def graph_module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a graph module with its call signature, and with assertions on the sizes of its inputs."""
    module = _graph_module_of(program)
    insert(module, sizes_of(program))
    return module


def _graph_module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """An exported program as a graph module with its call signature, without guards and assertions."""
    # newer versions of torch add guards to the graph by default, which can take as long as the export
    plain: Any = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    try:
        module = program.module(**plain)
    except SyntaxError as error:  # torch writes self.lambda
        names = {part for name in program.state_dict for part in name.split(".") if keyword.iskeyword(part)}
        raise FxMergeError(
            f"torch.export cannot make a module of this program ({first_line(error)}), since names of its modules or "
            f"parameters are keywords of Python: {', '.join(sorted(names))}; give the model itself, or rename them"
        ) from error
    assert isinstance(module, fx.GraphModule)
    module._forward_pre_hooks.clear()  # these hooks check the shapes of inputs as well
    module._forward_pre_hooks_with_kwargs.clear()
    remove_guards(module)
    _let_views_copy(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    # torch.load makes an instance of this class without arguments, which torch.export's own class does not allow
    vars(module).pop("_tracer_cls", None)
    module.graph._tracer_cls = None
    for owner in nn.Module.modules(module):  # their .train() and .eval() raise; `EvaluationModule` replaces them
        owner.__dict__.pop("train", None)
        owner.__dict__.pop("eval", None)
    return module


def _let_views_copy(module: fx.GraphModule) -> None:
    """Makes `reshape` of `view`, in place, except of tensors that the graph updates.

    torch.export leaves out a `contiguous` before it where the example's tensor is contiguous already. Elsewhere it may
    not be: kernels of attention lay out their outputs differently, by the dtype, the device and the widths, which a
    merge changes.
    """
    nodes, shared = module.graph.nodes, dict[fx.Node, fx.Node]()  # node -> the first whose memory it may share
    for node in nodes:
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        shares = node.target is operator.getitem or any(r.alias_info is not None for r in returns)
        source = node.args[0] if node.args and shares else None
        shared[node] = shared[source] if isinstance(source, fx.Node) else node
    updated = {shared[node] for node in nodes if updates(module, node)}
    for node in nodes:
        if node.target == torch.ops.aten.view.default and shared[node] not in updated:
            node.target = torch.ops.aten.reshape.default


_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg)


def remove_guards(module: fx.GraphModule) -> None:
    """Removes guards and assertions on inputs, in place; the merged model is compared with the original instead."""
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and "_guards" in str(node.target)) or node.target in _ASSERTIONS:
            module.graph.erase_node(node)
    for name, _ in list(module.named_children()):
        if "_guards" in name:
            delattr(module, name)
