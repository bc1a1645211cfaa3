"""Pictures and nets whose names do harm, and wide ones."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from fxmerge.ir.groups import Refusal
from fxmerge.report.picture.frames import nested
from fxmerge.report.picture.records import Arrow, Box, Frame, Picture, Shade

NASTY = ['"quoted"', "<script>alert(1)</script>", "Schicht_ä漢😀", "back\\slash", "{|}<p>", "a&amp;b", "end"]

NASTY += ["new\nline", "\x00\x1b", "</title></text>"]


class Named(nn.Module):
    """Layers with names that mean something to other languages, as far as torch.fx takes them."""

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
    """A picture in which every text is a name of that kind."""
    boxes = tuple(
        Box(name, name, name, name, "producer", (name,), (name,), 4, 2, ((0, "write"),), (0,)) for name in NASTY
    )
    frames = tuple(Frame(name, name, "") for name in NASTY)
    arrows = tuple(Arrow(one, other, (0,), (one,)) for one, other in itertools.pairwise(NASTY))
    shades = (Shade(NASTY[0], 4, 2, "#336699", True, NASTY[1]),)
    return Picture(NASTY[1], shades, (Refusal(NASTY[1], 4, NASTY[1], NASTY[0]),), boxes, arrows, frames)


def wide(count: int) -> Picture:
    """A flat network of so many layers, every tenth with a way around it."""
    places, frames = nested([""] * count)
    boxes = [
        Box(f"n{i}", f"layer {i}", f, "conv", "producer", (f"n{i}",), (f"n{i}",), 4, 2, ((0, "write"),))
        for i, (f, _) in enumerate(places)
    ]
    arrows = [Arrow(f"n{i}", f"n{i + 1}", (0,)) for i in range(count - 1)]
    arrows += [Arrow(f"n{i}", f"n{i + 2}", (0,)) for i in range(0, count - 2, 10)]
    return Picture("Wide", (Shade("g", 4, 2, "#336699", True),), (), tuple(boxes), tuple(arrows), tuple(frames))
