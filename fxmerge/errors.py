"""The one exception that users see, and how it names their source line."""

from __future__ import annotations

from torch import fx


class FxMergeError(ValueError):
    """What was asked cannot be done; the message says what, where, and what to do instead."""


def source_line(node: fx.Node) -> str:
    """The user's own line that made this node: `net.py:12, in forward: y = x[:, ::2]`, or ""."""
    trace = node.stack_trace or next((n.stack_trace for n in node.all_input_nodes if n.stack_trace), None)
    lines = (trace or "").strip().splitlines()
    for at in range(len(lines) - 1, -1, -1):
        head = lines[at].strip()
        if head.startswith('File "') and "/torch/" not in head and "/fxmerge/" not in head:
            code = f": {lines[at + 1].strip()}" if at + 1 < len(lines) else ""
            return head.removeprefix('File "').replace('", line ', ":", 1) + code
    return ""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
