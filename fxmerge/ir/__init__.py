"""The frozen records that stages hand to each other, and nothing else.

labels      arithmetic of label tensors: the channel that stands at each place of an activation
capture     a traced model and what its example run showed
provenance  which channel of which parameter went where: layers, ties, pins, blocks
groups      merge groups, their members, what was refused, what a rewrite is told
"""

from fxmerge.ir.capture import FOLDED, Capture, Part, Recorded
from fxmerge.ir.groups import Decomposition, Group, Grouping, Member, Merge, Refusal, group_of_label, survivors
from fxmerge.ir.provenance import (
    DEPTHWISE,
    Block,
    Bond,
    Contraction,
    Kind,
    Lab,
    Layer,
    Param,
    ParamLabels,
    Pin,
    Provenance,
    Tie,
    Untouched,
    View,
    blocks_left,
    can_shift,
)

__all__ = [
    "DEPTHWISE",
    "FOLDED",
    "Block",
    "Bond",
    "Capture",
    "Contraction",
    "Decomposition",
    "Group",
    "Grouping",
    "Kind",
    "Lab",
    "Layer",
    "Member",
    "Merge",
    "Param",
    "ParamLabels",
    "Part",
    "Pin",
    "Provenance",
    "Recorded",
    "Refusal",
    "Tie",
    "Untouched",
    "View",
    "blocks_left",
    "can_shift",
    "group_of_label",
    "survivors",
]
