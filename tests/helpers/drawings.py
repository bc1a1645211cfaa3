"""Pictures and networks with names that need escaping, and pictures of many layers."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.ir.groups import Refusal
from fxmerge.report.picture.frames import nested
from fxmerge.report.picture.records import Arrow, Box, Frame, Picture, Shade
from tests.helpers.netmaking import plain_merge

NASTY = ['"quoted"', "<script>alert(1)</script>", "Schicht_ä漢😀", "back\\slash", "{|}<p>", "a&amp;b", "end"]

NASTY += ["new\nline", "\x00\x1b", "</title></text>"]


class Named(nn.Module):
    """Layers with names that have a meaning in other languages, as far as torch.fx accepts them."""

    names = tuple(name for name in NASTY if not set(name) & set('"\n\x00'))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for at, name in enumerate(self.names):
            self.add_module(name, nn.Conv2d(3 if at == 0 else 4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return x


def nasty() -> Picture:
    """A picture in which every text is such a name."""
    boxes = tuple(producer(name, name, frame=name, op=name, refused=(0,)) for name in NASTY)
    frames = tuple(Frame(name, name, "") for name in NASTY)
    arrows = tuple(Arrow(one, other, (0,), (one,)) for one, other in itertools.pairwise(NASTY))
    return Picture(
        title=NASTY[1],
        shades=(Shade(name=NASTY[0], channels=4, kept=2, colour="#336699", shared=True, refused=NASTY[1]),),
        refusals=(Refusal(NASTY[1], 4, NASTY[1], NASTY[0]),),
        boxes=boxes,
        arrows=arrows,
        frames=frames,
    )


def producer(name: str, label: str, frame: str, op: str, refused: tuple[int, ...] = ()) -> Box:
    """A layer with 4 channels, 2 of them kept."""
    return Box(
        id=name,
        label=label,
        frame=frame,
        op=op,
        kind="producer",
        nodes=(name,),
        modules=(name,),
        before=4,
        after=2,
        roles=((0, "producer"),),
        refused=refused,
    )


def wide(count: int) -> Picture:
    """A flat network of `count` layers with a skip connection around every tenth."""
    places, frames = nested([""] * count)
    boxes = [producer(f"n{i}", f"layer {i}", frame=f, op="conv") for i, (f, _) in enumerate(places)]
    arrows = [Arrow(f"n{i}", f"n{i + 1}", (0,)) for i in range(count - 1)]
    arrows += [Arrow(f"n{i}", f"n{i + 2}", (0,)) for i in range(0, count - 2, 10)]
    return Picture(
        title="Wide",
        shades=(Shade(name="g", channels=4, kept=2, colour="#336699", shared=True),),
        refusals=(),
        boxes=tuple(boxes),
        arrows=tuple(arrows),
        frames=tuple(frames),
    )


def data_of(text: str) -> dict[str, Any]:
    """The data in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """Nine residual blocks, each a module of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1)) for _ in range(9)
        )
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def blocks(**options: Any) -> fxmerge.Result:
    """A merge of `Blocks`."""
    return plain_merge(Blocks().eval(), torch.randn(1, 3, 6, 6), **{"ratio": 0.5} | options)
