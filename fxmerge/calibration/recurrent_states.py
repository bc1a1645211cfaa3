"""The states of recurrent layers: what each of their matrices reads, step by step.

A module with several layers gives the hidden states of the last one only. Its layers are run again, one after the other
and each direction alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxmerge.calibration.stream import Stream
from fxmerge.graph.eval_mode import of_the_model
from fxmerge.graph.ops import plain_name
from fxmerge.weights.by_path import at

_FUNCTIONS: Mapping[str, Any] = {
    "LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu,
}  # fmt: skip


@dataclass(frozen=True)
class States:
    """Of one layer in one direction, (t, n, channels), in the order of its own steps.

    inputs: what `weight_ih` reads; before: what `weight_hh` reads, the hidden states of the step before; hidden: those
    of each step
    """

    inputs: Tensor
    before: Tensor
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class Network:
    """An LSTM, a GRU or an RNN as a node calls it.

    paths: of its parameters, by their names in torch.nn ("weight_ih_l0")
    """

    mode: str
    layers: int
    bias: bool
    bidirectional: bool
    batch_first: bool
    paths: Mapping[str, str]

    @property
    def places(self) -> list[str]:
        """The ends of the names of the parameters of each layer and direction, in the order in which they are run."""
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{way}" for layer in range(self.layers) for way in ways]


def network_of(module: fx.GraphModule, node: fx.Node) -> Network | None:
    """The network that a node calls, as a module or as a function of an exported graph; None for any other node."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        if not isinstance(called, nn.RNNBase):
            return None
        paths = {name: f"{node.target}.{name}" for name, _ in called.named_parameters(recurse=False)}
        own = Network(
            mode=called.mode,
            layers=called.num_layers,
            bias=called.bias,
            bidirectional=called.bidirectional,
            batch_first=called.batch_first,
            paths=paths,
        )
        return own if all(f"weight_hh{place}" in paths for place in own.places) else None  # else it is computed
    mode = plain_name(node).upper()
    if node.op != "call_function" or mode not in _FUNCTIONS or len(node.args) != 9:
        return None
    given: Any = node.args[2:]
    parameters, bias, layers, _, _, bidirectional, batch_first = given
    found = Network(mode=mode, layers=layers, bias=bias, bidirectional=bidirectional, batch_first=batch_first, paths={})
    each = len(parameters) // len(found.places)
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if bias else [])]
    names += ["weight_hr"] if each > len(names) else []
    every = [f"{name}{place}" for place in found.places for name in names]
    return replace(found, paths=dict(zip(every, (str(p.target) for p in parameters), strict=True)))


def states_at(stream: Stream, node: fx.Node, number: int) -> dict[str, States]:
    """The states of the layers that a node calls, for one batch, by place; none where they are not known.

    That of a cell, which does one step, is "".
    """
    node = stream.named[node.name]

    def value(source: fx.Node) -> Any:
        known = stream.values.get(source.name)
        return at(stream.module, str(source.target)) if known is None else known[number]

    args: Any = fx.map_arg(node.args[:2], value)
    kwargs: Any = fx.map_arg(node.kwargs, value)
    given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
    read, begun = given.get("input"), given.get("hx")
    if not isinstance(read, Tensor):
        return {}
    states = list(begun) if isinstance(begun, (tuple, list)) else [] if begun is None else [begun]
    called = stream.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(called, nn.RNNCellBase):
        before = states[0] if states else read.new_zeros(*read.shape[:-1], called.hidden_size)
        return {"": States(*(t.reshape(1, -1, t.size(-1)) for t in (read, before, before)))}
    network = network_of(stream.module, node)
    if network is None:
        return {}
    return by_layer(network, {name: at(stream.module, path) for name, path in network.paths.items()}, read, states)


def by_layer(
    network: Network, parameters: Mapping[str, Tensor], read: Tensor, states: Sequence[Tensor]
) -> dict[str, States]:
    """The states of a network of any number of layers and directions, by place.

    read: (n, t, p), (t, n, p) or (t, p); states: the initial ones, or none for zeros
    """
    batched = read.dim() == 3
    steps = read[:, None] if not batched else read.transpose(0, 1) if network.batch_first else read  # (t, n, p)
    begun = [state if batched else state[:, None] for state in states]
    found: dict[str, States] = {}
    for number, place in enumerate(network.places):
        back = place.endswith("_reverse")
        own = steps.flip(0) if back else steps
        start = [state[number : number + 1] for state in begun] or _zeros(network, parameters, place, own)
        hidden = _hidden(network, parameters, place, own, start)
        found[place] = States(own, torch.cat([start[0].to(hidden), hidden[:-1]]), hidden)
        if back:
            steps = torch.cat([found[place.removesuffix("_reverse")].hidden, hidden.flip(0)], -1)
        elif not network.bidirectional:
            steps = hidden
    return found


def _zeros(network: Network, parameters: Mapping[str, Tensor], place: str, steps: Tensor) -> list[Tensor]:
    """The initial states of one layer, (1, n, channels), where none are given: of h and, in an LSTM, of c."""
    hidden = parameters[f"weight_hh{place}"]
    sizes = [hidden.size(1), hidden.size(0) // 4] if network.mode == "LSTM" else [hidden.size(1)]
    return [steps.new_zeros(1, steps.size(1), size) for size in sizes]


def _hidden(
    network: Network, parameters: Mapping[str, Tensor], place: str, steps: Tensor, start: Sequence[Tensor]
) -> Tensor:
    """The hidden states (t, n, units) of one layer in one direction."""
    names = [f"{kind}{place}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]
    weights = [parameters[name] for name in names if name in parameters]
    state: Any = tuple(start) if network.mode == "LSTM" else start[0]
    with of_the_model():
        hidden: Tensor = _FUNCTIONS[network.mode](steps, state, weights, network.bias, 1, 0.0, False, False, False)[0]
    return hidden
