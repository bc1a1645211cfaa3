"""What a budget counts: parameters, FLOPs or the key-value cache, of all modules or of those that `of` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from fxmerge.analysis.attentions import Attention, attentions
from fxmerge.errors import FxMergeError
from fxmerge.ir.capture import CALLER, Capture
from fxmerge.ir.provenance import Provenance
from fxmerge.options import NAMES, Options


def within(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the module at `path` or a module around it."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for pattern in patterns for n in range(1, len(parts) + 1))


def named(kind: str, of: Sequence[str]) -> str:
    """What a budget is a share of, such as `parameters of model.layers.*`. kind: a key of NAMES."""
    return f"{NAMES[kind]} of {', '.join(of)}" if of else NAMES[kind]


def parameters_within(module: nn.Module, of: Sequence[str]) -> dict[str, int]:
    """{path: elements} of the parameters of these modules; a shared one has its first path, and counts if any does."""
    first: dict[int, str] = {}
    found: dict[str, int] = {}
    for path, value in module.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(value), path)
        if not of or within(path.rpartition(".")[0], of):
            found[known] = value.numel()
    return found


def flops_within(captured: Capture, flops: Mapping[str, int], of: Sequence[str]) -> dict[str, int]:
    """The FLOPs by node, of the nodes that these modules run."""
    if not of:
        return dict(flops)
    inside = _modules_of_nodes(captured)
    return {name: count for name, count in flops.items() if name in inside and within(inside[name], of)}


def attentions_within(captured: Capture, facts: Provenance, of: Sequence[str]) -> list[Attention]:
    """The attentions that these modules run, and store keys and values for."""
    found, inside = attentions(captured, facts), _modules_of_nodes(captured) if of else {}
    return [one for one in found if not of or (one.node in inside and within(inside[one.node], of))]


def check_of(options: Options) -> None:
    """Raises FxMergeError where the option `of` has no budget that it could refer to."""
    if options.of and not options.budget:
        raise FxMergeError(
            f'of is {options.of!r}, but there is no budget; add one, such as budget={{"params": 0.8}}, or leave out of'
        )


def check_modules(captured: Capture, of: Sequence[str]) -> None:
    """Raises FxMergeError for a pattern of `of` that matches no module, most likely a typing error."""
    known = {"", *_modules_of_nodes(captured).values()}
    known |= {path for m in (captured.module, captured.model) if m is not None for path, _ in m.named_modules()}
    for pattern in of:
        if not any(within(path, (pattern,)) for path in known):
            outer = sorted({path.split(".")[0] for path in known} - {""})
            more = f" and {len(outer) - 8} more" if len(outer) > 8 else ""
            listed = ", ".join(outer[:8]) + more if outer else "none"
            raise FxMergeError(f"of: {pattern!r} matches no module; the outermost modules are {listed}")


def _modules_of_nodes(captured: Capture) -> dict[str, str]:
    """The path of the module that a node calls, or whose code makes the node's call."""
    recorded = captured.recorded
    parts = {name: p.path for p in recorded.parts for run in (p.nodes, *p.again) for name in run} if recorded else {}
    found: dict[str, str] = {}
    for node in captured.module.graph.nodes:
        if node.op == "call_module":
            found[node.name] = str(node.target)
        elif node.op in ("call_function", "call_method"):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            inner = str(stack[-1][0]) if stack else node.meta.get(CALLER, "")
            found[node.name] = ".".join(p for p in (parts.get(node.name, ""), inner) if p)
    return found
