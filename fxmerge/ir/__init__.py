"""The frozen records that stages pass to each other, and nothing else.

labels      arithmetic of label tensors: which channel is at each place of an activation
branches    residual branches, and what a model loses without them
capture     a traced model and what its example run showed
layer_ops   what a layer computes with its parameters
provenance  which channel of which parameter went where: layers, ties, pins, blocks
scores      which contractions give scores, of which nodes
groups      merge groups, their members, what was refused, what a rewrite does
"""

from fxmerge.ir.branches import Branch, Measured
from fxmerge.ir.capture import FOLDED, Capture, Cut, Part, Recorded
from fxmerge.ir.groups import Decomposition, Group, Grouping, Member, Merge, Refusal, group_of_label, survivors
from fxmerge.ir.layer_ops import DEPTHWISE, NORMS, LayerOp
from fxmerge.ir.provenance import (
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
    "NORMS",
    "Block",
    "Bond",
    "Branch",
    "Capture",
    "Contraction",
    "Cut",
    "Decomposition",
    "Group",
    "Grouping",
    "Kind",
    "Lab",
    "Layer",
    "LayerOp",
    "Measured",
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
