"""Samples of recurrent layers: a producer's channels are read by one whose own units start at values of the input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from tests.helpers.netmaking import raw
from tests.helpers.sandwich import WIDTH, Sample, call

UNITS = 3  # as many as the input has channels
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
OVERLOADS = {"lstm": "input", "gru": "input", "rnn_tanh": "input", "rnn_relu": "input"}


def _weights(gates: int) -> dict[str, Any]:
    n = gates * UNITS
    return {"w_ih": raw(n, WIDTH), "w_hh": raw(n, UNITS), "b_ih": raw(n), "b_hh": raw(n)}


def network(kind: str) -> Callable[[Any], Sample]:
    """A layer over the places of the activation, (batch, channels, places)."""

    def make(key: Any) -> Sample:
        def run(m: Any, x: Any) -> Any:
            steps, state = x.permute(2, 0, 1), m.input.mean(2)[None]
            state = (state, state) if kind == "lstm" else state
            if inspect.isclass(key):
                return m.part(steps, state)[0].permute(1, 2, 0)
            op = getattr(getattr(torch.ops.aten, key.name), OVERLOADS[key.name])
            flat = [m.w_ih, m.w_hh, m.b_ih, m.b_hh]
            return call(op)(steps, state, flat, True, 1, 0.0, False, False, False)[0].permute(1, 2, 0)

        parts = {"part": key(WIDTH, UNITS)} if inspect.isclass(key) else _weights(GATES[kind])
        return Sample(run, dims=1, reads=UNITS, parts=parts)

    return make


def cell(kind: str) -> Callable[[Any], Sample]:
    def make(key: Any) -> Sample:
        def run(m: Any, x: Any) -> Any:
            state = (m.input, m.input) if kind == "lstm" else m.input
            weights = () if inspect.isclass(key) else (m.w_ih, m.w_hh, m.b_ih, m.b_hh)
            out = (m.part if inspect.isclass(key) else call(key))(x, state, *weights)
            return out[0] if kind == "lstm" else out

        parts = {"part": key(WIDTH, UNITS)} if inspect.isclass(key) else _weights(GATES[kind])
        return Sample(run, dims=0, reads=UNITS, parts=parts)

    return make


def packed(key: Any) -> Sample:
    def run(m: Any, x: Any) -> Any:
        steps = x.permute(2, 0, 1)
        if key is pack_sequence:
            held = call(key)([steps[:, 0], steps[:, 1]])
        else:
            held = call(pack_padded_sequence)(steps, [4, 4])
        return call(pad_packed_sequence)(held)[0].permute(1, 2, 0)

    return Sample(run, dims=1, merged=False, reason="packs sequences of different lengths")


RECURRENT: dict[str, Callable[[Any], Sample]] = {
    "lstm": network("lstm"),
    "gru": network("gru"),
    "rnn": network("rnn"),
    "lstm_cell": cell("lstm"),
    "gru_cell": cell("gru"),
    "rnn_cell": cell("rnn"),
    "packed": packed,
}
