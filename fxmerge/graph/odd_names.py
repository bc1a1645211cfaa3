"""Lets torch.fx write code for graphs whose modules or parameters are named like keywords of Python, such as `lambda`.

torch.fx writes `self.lambda`, which is not valid code. Names such as `a-b` are written by it with `getattr`.
"""

from __future__ import annotations

import keyword
import re

from torch import fx

_BASE = r'(?<== )(?P<base>(?:getattr\()*self(?:\.\w+|, "[^"]*"\))*?)'  # self.a, or getattr(self.a, "b-c").d
_KEYWORD = re.compile(rf"{_BASE}\.(?P<name>{'|'.join(keyword.kwlist)})\b")


def writable(graph: fx.Graph) -> fx.Graph:
    """The graph itself, which from now on, as do its copies, writes attributes that are keywords with `getattr`."""
    names = {part for n in graph.nodes if n.op in ("get_attr", "call_module") for part in str(n.target).split(".")}
    if any(map(keyword.iskeyword, names)):
        graph.on_generate_code(lambda old: _without_keywords)
    return graph


def _without_keywords(lines: list[str]) -> list[str]:
    """Lines of code with `getattr(self, "lambda")` in place of `self.lambda`."""
    code = "".join(lines)
    while True:
        code, count = _KEYWORD.subn(r'getattr(\g<base>, "\g<name>")', code)
        if not count:
            return [code]
