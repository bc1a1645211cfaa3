"""The exception that users see, and how messages name the user's source line."""

from __future__ import annotations

import re

from torch import fx

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class FxMergeError(ValueError):
    """Raised for a request that cannot be fulfilled; the message says what failed, where, and what to do instead."""


def of_user(path: str) -> bool:
    """Returns whether a source file belongs to the user: neither to torch nor to fxmerge."""
    return "/torch/" not in path and "/fxmerge/" not in path


def source_line(node: fx.Node) -> str:
    """The user's source line that created a node, as `net.py:12, in forward: y = x[:, ::2]`, or "" if unknown.

    It is read from the node's stack trace, or from that of the first of its inputs that has one.
    """
    trace = node.stack_trace or next((n.stack_trace for n in node.all_input_nodes if n.stack_trace), None)
    lines = (trace or "").strip().splitlines()
    for at in range(len(lines) - 1, -1, -1):
        head = lines[at].strip()
        if head.startswith('File "') and of_user(head):
            code = f": {lines[at + 1].strip()}" if at + 1 < len(lines) else ""
            return head.removeprefix('File "').replace('", line ', ":", 1) + code
    return ""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where the message is empty; without colours."""
    return (_COLOUR.sub("", str(error)).strip().splitlines() or [type(error).__name__])[0]
