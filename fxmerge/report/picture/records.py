"""The record of a picture: boxes, arrows, frames and groups. Every format draws this record and reads nothing else.

A box is a layer, or a node where several streams of data meet. Operations that only pass channels on (activations,
pooling, views) are listed on the arrow. A BatchNorm shares a box with the convolution before it. A frame is a module
that contains boxes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fxmerge.ir.groups import Group, Member, Refusal

# the part that a box plays in a group; "pass": it is no member, but its output has channels of the group
Role = Literal["producer", "per_channel_param", "consumer", "mixer", "tie", "pass"]


@dataclass(frozen=True, kw_only=True)
class Shade:
    """A merge group: its name, its number of channels before and after, and its colour."""

    name: str
    channels: int
    kept: int
    colour: str  # "#rrggbb"
    shared: bool  # it has several producers, consumers on several paths, or a mixer
    refused: str = ""  # why it was not merged, or ""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A node of the picture.

    frame:    id of the frame that contains it, "" at the top level
    op:       what it computes, for display
    kind:     the kind of its first node; or "concat", "code" (the model's own code), "module" (a collapsed frame)
    nodes:    the names of its nodes in the graph, in execution order
    modules:  their names for the user: the path of a module or parameter, or else the node's own name
    before, after:  the number of channels of its output; 0 if it is not known
    roles:    (index of a group, role in the group)
    refused:  indices of refusals
    """

    id: str
    label: str
    frame: str
    op: str
    kind: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]
    before: int
    after: int
    roles: tuple[tuple[int, Role], ...] = ()
    refused: tuple[int, ...] = ()

    @property
    def width(self) -> str:
        """`64`, or `64 → 32 (-50 %)` if channels were dropped, which cannot be read as in_channels and out_channels."""
        if self.after == self.before:
            return str(self.before or "")
        return f"{self.before} → {self.after} (-{100 - 100 * self.after / self.before:.0f} %)"


@dataclass(frozen=True)
class Arrow:
    """Data that flows from one box to another.

    groups:   indices of the groups whose channels the data has
    through:  the operations that it passes on the way
    """

    source: str
    target: str
    groups: tuple[int, ...]
    through: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """A module with several boxes, or a run of consecutive ones.

    label:   its name within the parent
    parent:  id of the frame around it, "" at the top level
    opened:  whether the page shows its contents at first
    """

    id: str
    label: str
    parent: str
    opened: bool = True


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A network with its groups: boxes in execution order, the arrows between them, and frames, outer ones first."""

    title: str
    shades: tuple[Shade, ...]
    refusals: tuple[Refusal, ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    frames: tuple[Frame, ...]


def members(group: Group) -> dict[Role, tuple[str, ...]]:
    """The nodes of a group by role."""
    layers: dict[Role, Sequence[Member]] = {
        "producer": group.producers,
        "per_channel_param": group.per_channel_params,
        "consumer": group.consumers,
    }
    found = {role: tuple(dict.fromkeys(m.layer.node for m in inside)) for role, inside in layers.items()}
    return {**found, "mixer": group.mixers, "tie": group.ties}


def colours(shared: Sequence[bool]) -> list[str]:
    """A colour for each group. Neighbours have distant hues, and shared groups have vivid colours."""
    found, count = [], [0, 0]
    for strong in shared:
        light, saturation, start = (0.50, 0.78, 0.58) if strong else (0.62, 0.42, 0.16)
        hue = (start + count[strong] * 0.61803398875) % 1
        light -= 0.1 if 0.1 < hue < 0.5 else 0  # yellow and green look brighter than other hues
        parts = colorsys.hls_to_rgb(hue, light, saturation)
        found.append("#" + "".join(f"{round(255 * part):02x}" for part in parts))
        count[strong] += 1
    return found
