"""Random nets: hypothesis draws the source text of a small net, from the ops in the rule table.

`sources()` draws the text of a module, so that a failing example is printed as code that can be pasted into a test.
`made` executes the text and randomises weights and BatchNorm statistics. The steps that a net consists of are in
random_steps.py, random_images.py and random_attention.py.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import tests.helpers.random_attention
import tests.helpers.random_images  # noqa: F401  (both register their steps)
from tests.helpers.netmaking import randomised
from tests.helpers.random_steps import STEPS, Act, Draft

HEAD = """import math

import torch
import torch.nn.functional as F
from torch import nn


class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
"""

SHAPES = {"image": (2, 3, 8, 8), "tokens": (2, 6, 5), "flat": (4, 7)}  # kind of input -> its shape


@st.composite
def sources(draw: Any, steps: int = 9) -> str:
    """The source of a random net, drawn by hypothesis."""
    return written(lambda choices: draw(st.sampled_from(choices)), steps)


def written(choose: Callable[[Sequence[Any]], Any], steps: int = 9, off: Collection[str] = (), first: str = "") -> str:
    """The source of a net called `Drawn`. Its forward begins with a comment for each argument, with its shape.

    choose:  takes one of several choices at random
    off:     names of steps that are not taken
    first:   the name of the step that is taken first, after a layer
    """
    (begin,) = [s for s in STEPS if s.name == first] or [None]
    kind = choose([k for k in sorted(SHAPES) if begin is None or k in begin.kinds])
    draft = Draft(choose, Act("x", kind, SHAPES[kind]))
    draft.first_layer()
    if begin is not None and begin.fits(draft):
        begin.write(draft)
    for _ in range(choose(range(1, steps + 1))):
        choose([step for step in STEPS if step.name not in off and step.fits(draft)]).write(draft)
    draft.finish()
    inputs = [("x", SHAPES[kind]), *draft.inputs]
    body = [f"        {line}\n" for line in draft.parts]
    lines = [f"        {line}\n" for line in (*(f"# {name}: {shape}" for name, shape in inputs), *draft.lines)]
    signature = ", ".join(name for name, _ in inputs)
    return HEAD + "".join(body) + f"\n    def forward(self, {signature}):\n" + "".join(lines)


def made(source: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The net of a source, in float64 and evaluation mode with random weights, and inputs for it."""
    name = f"<drawn {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)
    shapes = [tuple(map(int, found.split(","))) for found in re.findall(r"# \w+: \(([\d, ]+)\)", source)]
    generator = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return randomised(space["Drawn"](), seed).double().eval(), inputs
