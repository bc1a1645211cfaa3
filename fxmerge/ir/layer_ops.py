"""LayerOp: what a layer of the graph computes with its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEPTHWISE = ("depthwise", "depthwise_transpose")  # convolutions with a filter for each channel
NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")
RECURRENT = ("lstm", "gru", "rnn")
_ELEMENTWISE = ("scale", "offset", "table", "joined")
_SIGNS = {"offset": {"parameter": "-", "activation": "-r"}, "scale": {"parameter": "/", "activation": "/r"}}


@dataclass(frozen=True)
class LayerOp:
    """An op that owns parameters: its name, and how a raw parameter `p` is combined with an activation `x`.

    name:      "linear", "conv", "batch_norm", ...; for a raw parameter "offset" (a sum), "scale" (a product), "joined"
               (concatenated to an activation), "table" (the source of computed values), or the name of the binary op
    raw:       is it another op of an activation and a raw parameter, as `x ** p`?
    inverted:  the operand that enters negated (offset) or as its reciprocal (scale)

    | call    | name   | inverted   | text     |
    |---------|--------|------------|----------|
    | `x + p` | offset | None       | offset   |
    | `x - p` | offset | parameter  | offset-  |
    | `p - x` | offset | activation | offset-r |
    | `x * p` | scale  | None       | scale    |
    | `x / p` | scale  | parameter  | scale/   |
    | `p / x` | scale  | activation | scale/r  |
    """

    name: str
    inverted: Literal["parameter", "activation"] | None = None
    raw: bool = False

    @classmethod
    def of_binary(cls, rule_name: str, *, parameter_first: bool) -> LayerOp:
        """The op of a raw parameter that is an operand of a binary rule ("add", "div", "maximum", ...)."""
        inverted: Literal["parameter", "activation"] = "activation" if parameter_first else "parameter"
        match rule_name:
            case "add":
                return cls("offset")
            case "sub":
                return cls("offset", inverted)
            case "mul":
                return cls("scale")
            case "div":
                return cls("scale", inverted)
        return cls(rule_name, raw=True)

    def __str__(self) -> str:
        return self.name + (_SIGNS[self.name][self.inverted] if self.inverted else "")

    @property
    def is_depthwise(self) -> bool:
        return self.name in DEPTHWISE

    @property
    def is_norm(self) -> bool:
        return self.name in NORMS

    @property
    def is_channel_norm(self) -> bool:
        """Does it normalise each channel alone, whatever the other channels are?"""
        return self.name in ("batch_norm", "instance_norm")

    @property
    def is_offset(self) -> bool:
        return self.name == "offset"

    @property
    def is_scale(self) -> bool:
        """Does it multiply each channel by a number of its own? `x * p` and `x / p` do; `p / x` is not linear in x."""
        return self.name == "scale" and self.inverted != "activation"

    @property
    def is_elementwise(self) -> bool:
        """Does its weight hold one label for each element, rather than labels along an axis?"""
        return self.raw or self.name in _ELEMENTWISE

    @property
    def is_recurrent(self) -> bool:
        """Is it a layer of a recurrent network, whose output is an input of its next step?"""
        return self.name in RECURRENT

    @property
    def rescales(self) -> bool:
        """Can its weight give a channel any scale, whatever the scale of the channel that comes in?"""
        return self.is_scale or self.is_depthwise or self.is_channel_norm
