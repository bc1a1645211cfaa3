"""Rules of recurrent layers: LSTM, GRU, RNN and their cells.

A layer with n hidden units has one row of `weight_ih` and of `weight_hh` for each unit and gate. The rows of all gates
of a unit are tied to each other, and to the unit's column of `weight_hh`, by which the layer reads its own output. A
module with several layers or directions has one hidden size, so all of them lose equally many units (a block with one
row for each), but not the same ones.

With a projection, h = W_hr (o tanh(c)): W_hr reads the hidden units and writes the channels of h.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from fxmerge.graph.nested import leaves
from fxmerge.graph.ops import Aten
from fxmerge.ir.labels import simplify, spread, varying
from fxmerge.ir.provenance import Lab, Layer, Param, View
from fxmerge.rules.context import RuleContext
from fxmerge.rules.rule import Answer, Module, Operand, Rule, Unknown

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer in one direction."""

    ih: Param
    hh: Param
    bias_ih: Param | None = None
    bias_hh: Param | None = None
    hr: Param | None = None


@dataclass(frozen=True)
class _Units:
    """The labels of one layer in one direction: of its cell state (n,), and of its output, (n,) or (proj_size,)."""

    cell: Tensor
    hidden: Tensor


def lstm(ctx: RuleContext, input: Operand, hx: Operand = None, **settings: Operand) -> Answer:
    """output, (h, c) of nn.LSTM; output, h, c of aten.lstm."""
    found = _network(ctx, "lstm", input, hx, settings)
    if isinstance(found, Unknown):
        return found
    output, hidden, cell = found
    return (output, (hidden, cell)) if isinstance(settings["params"], Mapping) else (output, hidden, cell)


def gru(ctx: RuleContext, input: Operand, hx: Operand = None, **settings: Operand) -> Answer:
    """output, h of nn.GRU."""
    found = _network(ctx, "gru", input, hx, settings)
    return found if isinstance(found, Unknown) else found[:2]


def rnn(ctx: RuleContext, input: Operand, hx: Operand = None, **settings: Operand) -> Answer:
    """output, h of nn.RNN."""
    found = _network(ctx, "rnn", input, hx, settings)
    return found if isinstance(found, Unknown) else found[:2]


def lstm_cell(ctx: RuleContext, input: Operand, hx: Operand = None, *given: Operand, **weights: Operand) -> Answer:
    """h, c of one step."""
    found = _step(ctx, "lstm", input, hx, given, weights)
    return found if isinstance(found, Unknown) else (found[0], found[1])


def gru_cell(ctx: RuleContext, input: Operand, hx: Operand = None, *given: Operand, **weights: Operand) -> Answer:
    """h of one step."""
    found = _step(ctx, "gru", input, hx, given, weights)
    return found if isinstance(found, Unknown) else found[0]


def rnn_cell(ctx: RuleContext, input: Operand, hx: Operand = None, *given: Operand, **weights: Operand) -> Answer:
    """h of one step."""
    found = _step(ctx, "rnn", input, hx, given, weights)
    return found if isinstance(found, Unknown) else found[0]


def packed(ctx: RuleContext, *args: Operand, **kwargs: Operand) -> Unknown:
    """Packed sequences have no label tensor."""
    return Unknown("packs sequences of different lengths, which cannot be followed; give padded ones")


def _network(
    ctx: RuleContext, op: str, input: Operand, hx: Operand, settings: Mapping[str, Operand]
) -> tuple[Lab, Lab, Lab] | Unknown:
    """(output, last h, last c) of all layers and directions."""
    directions = 2 if settings.get("bidirectional") else 1
    layers = settings.get("num_layers")
    weights = _weights(settings.get("params"), bool(settings.get("bias", settings.get("has_biases", True))))
    if isinstance(weights, Unknown):
        return weights
    x = _sequence(input)
    if isinstance(x, Unknown):
        return x
    if not isinstance(layers, int) or len(weights) != layers * directions or x.t.dim() not in (2, 3):
        return Unknown("is called with parameters that do not fit")
    reads, units = ctx.along(x, x.t.dim() - 1), list[_Units]()
    for number in range(layers):
        found = [
            _layer(ctx, op, one, reads, inner=number > 0)
            for one in weights[number * directions : (number + 1) * directions]
        ]
        units += found
        reads = torch.cat([one.hidden for one in found])
    hidden, cell = torch.stack([one.hidden for one in units]), torch.stack([one.cell for one in units])
    if len(units) > 1:
        ctx.block(cell, leaves_whole=False)
        if weights[0].hr is not None:
            ctx.block(hidden, leaves_whole=False)
    batch = [] if x.t.dim() == 2 else [x.t.size(0 if settings.get("batch_first") else 1)]
    states = [Lab(_rows(labels, batch)) for labels in (hidden, cell)]
    refused = _begin(ctx, hx, states)
    if refused is not None:
        return refused
    output = spread(reads, (*x.t.shape[:-1], len(reads)), x.t.dim() - 1)
    return Lab(output), states[0], states[1]


def _step(
    ctx: RuleContext, op: str, input: Operand, hx: Operand, given: Sequence[Operand], named: Mapping[str, Operand]
) -> tuple[Lab, Lab] | Unknown:
    """(h, c) of one step of a cell."""
    known: Operand = named.get("params")
    if known is None:  # torch.lstm_cell and the like: the weights are arguments
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        known = [*given, *(named[name] for name in names[len(given) :] if name in named)]
    weights = _weights(known, None)
    if isinstance(weights, Unknown):
        return weights
    x = _sequence(input)
    if isinstance(x, Unknown):
        return x
    if len(weights) != 1 or x.t.dim() not in (1, 2):
        return Unknown("is called with parameters that do not fit")
    # a state that is an activation is read where it comes from
    begun = any(isinstance(leaf, Lab) and not isinstance(leaf, View) for leaf in leaves([hx]))
    units = _layer(ctx, op, weights[0], ctx.along(x, x.t.dim() - 1), inner=False, recurs=not begun)
    last = x.t.dim() - 1
    hidden, cell = (Lab(spread(labels, (*x.t.shape[:-1], len(labels)), last)) for labels in (units.hidden, units.cell))
    refused = _begin(ctx, hx, [hidden, cell])
    return (hidden, cell) if refused is None else refused


def _sequence(input: Operand) -> Lab | Unknown:
    """A layer's input, whose channels are on the last axis."""
    if not isinstance(input, Lab):
        return Unknown("has an input that does not depend on the model's input")
    if set(varying(input.t)) - {input.t.dim() - 1}:
        return Unknown("steps along an axis of channels")
    return input


def _weights(given: Operand, biases: bool | None) -> list[_Weights] | Unknown:
    """The parameters of each layer and direction, in torch's order.

    given:   by name, as in torch.nn, or in one list, as in aten
    biases:  whether a list has them; None for the list of a cell
    """
    found: list[list[Operand]] = []
    if isinstance(given, Mapping):
        for name, first in given.items():
            if name.startswith("weight_ih"):
                suffix = name.removeprefix("weight_ih")
                others = (f"{kind}{suffix}" for kind in ("weight_hh", "bias_ih", "bias_hh", "weight_hr"))
                found.append([first, *(given.get(other) for other in others)])
    elif isinstance(given, (list, tuple)):
        own = len(given) if biases is None else 4 if biases else 2
        projected = biases is not None and _projects(given, own)
        size = own + projected
        for at in range(0, len(given), max(size, 1)):
            some = list(given[at : at + size])
            hr = some.pop() if projected else None
            found.append([*some, *[None] * (4 - len(some)), hr])
    for parts in found:
        if any(part is not None and not isinstance(part, Param) for part in parts) or parts[0] is None:
            return Unknown("has weights that are computed, not parameters")
    return [_Weights(*parts) for parts in found]  # type: ignore[arg-type]


def _projects(given: Sequence[Operand], own: int) -> bool:
    """Does each layer of a list of parameters have a projection after its own ones?"""
    hr = given[own] if len(given) > own else None
    first = given[0]
    return isinstance(hr, Param) and isinstance(first, Param) and hr.value.size(0) != first.value.size(0)


def _layer(ctx: RuleContext, op: str, weights: _Weights, reads: Tensor, *, inner: bool, recurs: bool = True) -> _Units:
    """One layer in one direction, which reads these labels.

    inner:   are these the units of another layer of the same module?
    recurs:  does it read its own units within the call?
    """
    rows = ctx.axis(weights.ih, 0).view(GATES[op], -1)
    cell = rows[0]
    ctx.tie(rows[:1].expand_as(rows[1:]), rows[1:])
    others = [ctx.axis(p, 0) for p in (weights.hh, weights.bias_ih, weights.bias_hh) if p is not None]
    ctx.tie(rows.flatten().expand(len(others), -1), torch.stack(others))
    hidden = cell if weights.hr is None else ctx.axis(weights.hr, 0)
    ctx.tie(reads, ctx.axis(weights.ih, 1))
    ctx.tie(hidden, ctx.axis(weights.hh, 1))
    slots = {"weight": weights.ih, "bias": weights.bias_ih}
    ctx.layer(op, slots, reads=reads[None], writes=rows.flatten(), inner=inner)
    slots = {"weight": weights.hh, "bias": weights.bias_hh}
    ctx.layer(op, slots, reads=hidden[None], writes=ctx.axis(weights.hh, 0), inner=recurs)
    if weights.hr is not None:
        ctx.tie(cell, ctx.axis(weights.hr, 1))
        ctx.layer("projection", {"weight": weights.hr}, reads=cell[None], writes=hidden, inner=True)
    return _Units(cell, hidden)


def _rows(labels: Tensor, batch: Sequence[int]) -> Tensor:
    """The labels of a state, (layers * directions, *batch, n), from those of each layer and direction."""
    return simplify(labels.view(len(labels), *[1] * len(batch), -1).expand(len(labels), *batch, -1))


def too_narrow(layer: Layer, alive: Tensor) -> Tensor:
    """The dropped units of a layer that would have no more of them than its projection has channels: none if it has.

    torch.nn.LSTM requires that a projection makes its input smaller.
    """
    if layer.op != "projection" or layer.reads is None or layer.writes is None:
        return torch.zeros(0, dtype=torch.int64)
    units = layer.reads.flatten()
    return units[~alive[units]] if int(alive[layer.writes].sum()) >= int(alive[units].sum()) else units[:0]


def _begin(ctx: RuleContext, hx: Operand, states: Sequence[Lab]) -> Unknown | None:
    """Tie the initial states to the units. Without an initial state the units start at zero."""
    if hx is None:
        return None
    for given, state in zip(hx if isinstance(hx, (tuple, list)) else (hx,), states, strict=False):
        if isinstance(given, (Lab, Param)):
            labels = given.t if isinstance(given, Lab) else ctx.elements(given)
            for param in ctx.raw(labels):  # a learned state: each unit starts at a number of its own
                ctx.layer("table", {"weight": param}, carries=ctx.elements(param))
        elif isinstance(given, Tensor):
            ctx.want(given, state.t)
            labels = torch.zeros(state.t.shape, dtype=torch.int64)
        else:
            return Unknown("has an initial state that is not a tensor")
        if labels.dim() != state.t.dim():
            return Unknown("has an initial state of another number of axes")
        ctx.tie(state.t, labels)
    return None


PACKING = (pack_padded_sequence, pad_packed_sequence, pack_sequence)
_NETWORK = ("num_layers", "bias", "batch_first", "bidirectional")
ROWS: tuple[Rule, ...] = (
    Rule("lstm", "producer", lstm, (Module(nn.LSTM, _NETWORK, params=True), Aten("lstm"))),
    Rule("gru", "producer", gru, (Module(nn.GRU, _NETWORK, params=True), Aten("gru"))),
    Rule("rnn", "producer", rnn, (Module(nn.RNN, _NETWORK, params=True), Aten("rnn_tanh"), Aten("rnn_relu"))),
    Rule("lstm_cell", "producer", lstm_cell, (Module(nn.LSTMCell, params=True), torch.lstm_cell)),
    Rule("gru_cell", "producer", gru_cell, (Module(nn.GRUCell, params=True), torch.gru_cell)),
    Rule("rnn_cell", "producer", rnn_cell, (Module(nn.RNNCell, params=True), torch.rnn_tanh_cell, torch.rnn_relu_cell)),
    Rule("packed", "movement", packed, PACKING, True),
)
