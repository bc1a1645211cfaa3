"""Random nets: hypothesis draws the source text of a small net, from the ops that the rule table knows.

`sources()` gives the text of a module, so that a failing example prints as code that can be pasted into a test; `made`
runs it, and gives its weights and BatchNorm statistics random values. The steps that a net is drawn from are in
random_steps.py.
"""

from __future__ import annotations

import linecache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import tests.helpers.random_images  # noqa: F401  (registers its steps)
from tests.helpers.netmaking import randomised
from tests.helpers.random_steps import STEPS, Act, Draft

HEAD = """import torch
import torch.nn.functional as F
from torch import nn


class Drawn(nn.Module):
    def __init__(self):
        super().__init__()
"""

SHAPES = {"image": (2, 3, 8, 8), "tokens": (2, 6, 5), "flat": (4, 7)}  # of the input, by its kind


@st.composite
def sources(draw: Any, steps: int = 9) -> str:
    """The source of a net: `Drawn`, whose input's shape the first line of forward says."""
    kind = draw(st.sampled_from(sorted(SHAPES)), "input")
    draft = Draft(draw, Act("x", kind, SHAPES[kind]))
    draft.first_layer()
    for _ in range(draw(st.integers(1, steps), "steps")):
        able = [step for step in STEPS if step.fits(draft)]
        draw(st.sampled_from(able), "step").write(draft)
    draft.finish()
    body = [f"        {line}\n" for line in draft.parts]
    lines = [f"        {line}\n" for line in (f"# x: {SHAPES[kind]}", *draft.lines)]
    return HEAD + "".join(body) + "\n    def forward(self, x):\n" + "".join(lines)


def made(source: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The net of a source, in float64 and evaluation mode, with random weights, and an input for it."""
    name = f"<drawn {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {}
    exec(compile(source, name, "exec"), space)
    shape = tuple(map(int, source.split("# x: (")[1].split(")")[0].split(",")))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return randomised(space["Drawn"](), seed).double().eval(), x
