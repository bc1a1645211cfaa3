"""Picture: what there is to see of an analysis or a merge. Every format draws this record and looks at nothing else.

A box is a layer, or a node where streams meet; what only passes channels on (activations, pooling, views) is told on
the arrow. A BatchNorm that follows its convolution stands in the same box. Frames are the modules that boxes lie in.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

from fxmerge.ir.groups import Group, Refusal


@dataclass(frozen=True)
class Shade:
    """A merge group: its name, its width before and after, its colour."""

    name: str
    channels: int
    kept: int
    colour: str  # "#rrggbb"
    shared: bool  # several producers or consumers, or a mixer
    refused: str = ""  # why it was left alone, or ""


@dataclass(frozen=True)
class Box:
    """A node of the picture.

    nodes:    the graph's nodes that it stands for, in order
    modules:  what users call them: paths of modules or parameters, or the node's own name
    before, after:  channels that it puts out; 0 where it puts out none that anything is known of
    roles:    (index of a group, "write", "carry", "read", "mix", "tie", or "pass" where it only lets the group through)
    refused:  indices of refusals
    """

    id: str
    label: str
    frame: str  # id of the frame that it lies in, "" at the top
    op: str
    kind: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]
    before: int
    after: int
    roles: tuple[tuple[int, str], ...] = ()
    refused: tuple[int, ...] = ()

    @property
    def width(self) -> str:
        """`64`, or `64 → 32` where it lost channels."""
        return f"{self.before} → {self.after}" if self.after != self.before else str(self.before or "")


@dataclass(frozen=True)
class Arrow:
    """Data that flows from one box to another: the groups whose channels it carries, what they pass on the way."""

    source: str
    target: str
    groups: tuple[int, ...]
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Boxes in execution order, the arrows between them, the frames around them, outer ones first."""

    title: str
    shades: tuple[Shade, ...]
    refusals: tuple[Refusal, ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    frames: tuple[Frame, ...]


def members(group: Group) -> dict[str, tuple[str, ...]]:
    """The nodes of a group by role."""
    layers = {"write": group.producers, "carry": group.per_channel_params, "read": group.consumers}
    found = {role: tuple(dict.fromkeys(m.layer.node for m in inside)) for role, inside in layers.items()}
    return {**found, "mix": group.mixers, "tie": group.ties}


def colours(shared: Sequence[bool]) -> list[str]:
    """A colour for each group: hues of neighbours lie far apart, and the shared ones are the vivid ones."""
    found, count = [], [0, 0]
    for strong in shared:
        light, saturation, start = (0.50, 0.78, 0.58) if strong else (0.62, 0.42, 0.16)
        hue = (start + count[strong] * 0.61803398875) % 1
        light -= 0.1 if 0.1 < hue < 0.5 else 0  # yellow and green are bright
        parts = colorsys.hls_to_rgb(hue, light, saturation)
        found.append("#" + "".join(f"{round(255 * part):02x}" for part in parts))
        count[strong] += 1
    return found


@dataclass(frozen=True)
class Frame:
    """A module with several boxes, or a run of them: id, name within its parent, the parent's id or ""."""

    id: str
    label: str
    parent: str
    opened: bool = True
