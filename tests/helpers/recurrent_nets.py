"""Recurrent networks as people write them, and oracles for them that know torch's layout of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "LSTMCell": 4, "GRUCell": 3, "RNNCell": 1}


def silenced(model: nn.Module, result: fxmerge.Result, also: dict[str, tuple[str, ...]] | None = None) -> nn.Module:
    """A copy of the original whose dropped units are 0 at every step: all rows of their gates and biases are zeros.

    also: {group: other modules that have the same units}. Channels of a group are counted layer by layer, and within a
    layer direction by direction.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for planned in result.plan.groups:
            dropped = sorted(set(range(planned.channels)) - set(planned.kept))
            for path in (planned.name, *(also or {}).get(planned.name, ())):
                _silence(copied.get_submodule(path), dropped, planned.channels)
    return copied


def _silence(module: nn.Module, dropped: list[int], channels: int) -> None:
    gates = GATES.get(type(module).__name__, 1)
    sides = ("", "_reverse") if getattr(module, "bidirectional", False) else ("",)
    layers = [f"_l{k}{s}" for k in range(getattr(module, "num_layers", 0)) for s in sides] or [""]
    size = getattr(module, "hidden_size", channels)
    tied = channels < size * len(layers)  # one unit of all layers and directions
    for index in dropped:
        layer, unit = divmod(index, size)
        for suffix in layers if tied else [layers[layer]]:
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight", "bias"):
                value = getattr(module, name + suffix, None)
                for gate in range(gates if isinstance(value, Tensor) else 0):
                    value[gate * size + unit] = 0


def lstm_by_hand(x: Tensor, weights: dict[str, Tensor], units: Tensor) -> Tensor:
    """The hidden states of one LSTM layer, (steps, batch, k), with only these of its units; x: (steps, batch, in)."""
    n = len(weights["weight_hh_l0"]) // 4
    rows = (torch.arange(4)[:, None] * n + units).flatten()
    w_ih, w_hh = weights["weight_ih_l0"][rows], weights["weight_hh_l0"][rows][:, units]
    bias = weights["bias_ih_l0"][rows] + weights["bias_hh_l0"][rows]
    h = c = x.new_zeros(x.size(1), len(units))
    found = []
    for step in x:
        i, f, g, o = (step @ w_ih.T + h @ w_hh.T + bias).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        found.append(h)
    return torch.stack(found)


class Net(nn.Module):
    """Parts by name, and the wiring of the inputs."""

    def __init__(self, wiring: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.wiring(self, x) if y is None else self.wiring(self, x, y)


Inputs = tuple[Tensor, ...]
Made = tuple[nn.Module, Inputs, Inputs]  # the net, its example inputs, and inputs of another batch size and length
NETS: dict[str, Callable[[], Made]] = {}
ALSO: dict[str, dict[str, tuple[str, ...]]] = {
    "translator": {"encoder": ("decoder",)},
    "captioner": {"h": ("c", "rnn")},
}
UNITS: dict[str, str] = {"captioner": "h", "translator": "encoder"}  # the group of the units, if not "rnn"


def recurrent_net(
    example: list[tuple[int, ...]], other: list[tuple[int, ...]], words: int = 0, **parts: Callable[[], nn.Module]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a wiring under its function's name; its inputs are integers below `words`, if given.

    A head shares its weight with the embedding.
    """

    def register(wiring: Callable[..., Any]) -> Callable[..., Any]:
        def make() -> Made:
            torch.manual_seed(3)
            net = Net(wiring, **{name: part() for name, part in parts.items()}).double().eval()
            if "head" in parts:
                net.head.weight = net.embedding.weight
            drawn = [
                tuple(torch.randint(words, s) if words else torch.randn(s, dtype=torch.float64) for s in shapes)
                for shapes in (example, other)
            ]
            return net, drawn[0], drawn[1]

        NETS[wiring.__name__] = make
        return wiring

    return register


SEQUENCE: Any = {"example": [(2, 6, 5)], "other": [(3, 9, 5)]}


@recurrent_net(
    [(2, 1, 10, 6)], [(5, 1, 14, 6)], conv=lambda: nn.Conv2d(1, 4, 3, padding=1), norm=lambda: nn.BatchNorm2d(4),
    rnn=lambda: nn.LSTM(24, 8, 2, batch_first=True, dropout=0.1), out=lambda: nn.Linear(8, 3),
)  # fmt: skip
def keyword(m: Any, x: Tensor) -> Any:
    x = F.relu(m.norm(m.conv(x))).permute(0, 2, 1, 3).flatten(2)
    return m.out(m.rnn(x)[0][:, -1])


@recurrent_net(**SEQUENCE, rnn=lambda: nn.LSTM(5, 8, 2, batch_first=True), out=lambda: nn.Linear(8, 3))
def last_state(m: Any, x: Tensor) -> Any:
    _, (h, _) = m.rnn(x)
    return m.out(h[-1])


@recurrent_net(
    [(6, 2, 5)], [(4, 3, 5)], rnn=lambda: nn.GRU(5, 8, 2, bidirectional=True), out=lambda: nn.Linear(16, 3)
)
def both_last_states(m: Any, x: Tensor) -> Any:
    _, h = m.rnn(x)
    return m.out(torch.cat([h[-2], h[-1]], 1))


@recurrent_net(
    **SEQUENCE, rnn=lambda: nn.LSTM(5, 8, 2, batch_first=True, bidirectional=True), out=lambda: nn.Linear(16, 3)
)
def tagger(m: Any, x: Tensor) -> Any:
    return m.out(torch.tanh(m.rnn(x)[0]))


@recurrent_net(**SEQUENCE, rnn=lambda: nn.LSTM(5, 8, batch_first=True, bidirectional=True), out=lambda: nn.Linear(8, 3))
def summed_directions(m: Any, x: Tensor) -> Any:
    y, _ = m.rnn(x)
    return m.out(y[:, :, :8] + y[:, :, 8:])


@recurrent_net(**SEQUENCE, rnn=lambda: nn.LSTM(5, 8, batch_first=True), out=lambda: nn.Linear(8, 3))
def cell_state(m: Any, x: Tensor) -> Any:
    _, (h, c) = m.rnn(x)
    return m.out(h.squeeze(0)) - m.out(c[0])


@recurrent_net(**SEQUENCE, rnn=lambda: nn.LSTM(5, 8, 2, batch_first=True), out=lambda: nn.Linear(8, 3))
def zero_state(m: Any, x: Tensor) -> Any:
    h = torch.zeros(2, x.size(0), 8, dtype=x.dtype, device=x.device)
    return m.out(m.rnn(x, (h, x.new_zeros(2, x.shape[0], 8)))[0].mean(1))


@recurrent_net(
    [(2, 6, 5)], [(2, 9, 5)], rnn=lambda: nn.GRU(5, 8, batch_first=True, bias=False), out=lambda: nn.Linear(8, 3)
)
def literal_zero_state(m: Any, x: Tensor) -> Any:
    """A state that tracing would make a constant."""
    return m.out(m.rnn(x, torch.zeros(1, 2, 8, dtype=torch.float64))[0])


@recurrent_net(
    [(2, 6, 5), (2, 4, 3)], [(3, 2, 5), (3, 7, 3)], encoder=lambda: nn.GRU(5, 8, 2, batch_first=True),
    decoder=lambda: nn.GRU(3, 8, 2, batch_first=True), out=lambda: nn.Linear(8, 3),
)  # fmt: skip
def translator(m: Any, x: Tensor, y: Tensor) -> Any:
    _, h = m.encoder(x)
    return m.out(m.decoder(y, h)[0])


@recurrent_net(
    [(2, 6, 5), (2, 4)], [(3, 9, 5), (3, 4)], h=lambda: nn.Linear(4, 8), c=lambda: nn.Linear(4, 8),
    rnn=lambda: nn.LSTM(5, 8, batch_first=True), out=lambda: nn.Linear(8, 3),
)  # fmt: skip
def captioner(m: Any, x: Tensor, y: Tensor) -> Any:
    return m.out(m.rnn(x, (torch.tanh(m.h(y))[None], m.c(y).unsqueeze(0)))[0])


@recurrent_net([(2, 4, 5)], [(3, 4, 5)], rnn=lambda: nn.LSTMCell(5, 8), out=lambda: nn.Linear(8, 3))
def lstm_loop(m: Any, x: Tensor) -> Any:
    h = c = x.new_zeros(x.size(0), 8)
    found = []
    for t in range(4):
        h, c = m.rnn(x[:, t], (h, c))
        found.append(h)
    return m.out(torch.stack(found, 1))


@recurrent_net([(2, 4, 5)], [(3, 4, 5)], rnn=lambda: nn.GRUCell(5, 8), out=lambda: nn.Linear(8, 3))
def gru_loop(m: Any, x: Tensor) -> Any:
    h = None
    for t in range(4):
        h = m.rnn(x[:, t], h)
    return m.out(h)


@recurrent_net([(2, 4, 5)], [(3, 4, 5)], rnn=lambda: nn.RNNCell(5, 8, nonlinearity="relu"), out=lambda: nn.Linear(8, 3))
def rnn_loop(m: Any, x: Tensor) -> Any:
    return m.out(m.rnn(x[:, 1], m.rnn(x[:, 0])))


@recurrent_net(
    **SEQUENCE, rnn=lambda: nn.RNN(5, 8, 2, nonlinearity="relu", batch_first=True), out=lambda: nn.Linear(8, 3)
)
def relu_network(m: Any, x: Tensor) -> Any:
    return m.out(m.rnn(x)[0].max(1)[0])


@recurrent_net([(6, 5)], [(4, 5)], rnn=lambda: nn.LSTM(5, 8, 2, bidirectional=True), out=lambda: nn.Linear(16, 3))
def without_batch(m: Any, x: Tensor) -> Any:
    return m.out(m.rnn(x)[0])


@recurrent_net(**SEQUENCE, rnn=lambda: nn.LSTM(5, 16, 2, proj_size=6, batch_first=True), out=lambda: nn.Linear(6, 3))
def projected(m: Any, x: Tensor) -> Any:
    return m.out(F.relu(m.rnn(x)[0]))


@recurrent_net(
    [(2, 6)], [(3, 9)], words=30, embedding=lambda: nn.Embedding(30, 10), rnn=lambda: nn.LSTM(10, 8, batch_first=True),
    back=lambda: nn.Linear(8, 10), head=lambda: nn.Linear(10, 30, bias=False),
)  # fmt: skip
def language_model(m: Any, x: Tensor) -> Any:
    return m.head(m.back(m.rnn(m.embedding(x))[0]))
