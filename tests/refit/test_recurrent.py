"""Recurrent layers in refit: their states against cells that are run step by step, and what solves are worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.calibration import recurrent_states
from fxmerge.refit import recurrent
from tests.helpers.netmaking import one_thread  # noqa: F401

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:LSTM with projections")]
F64 = torch.float64
KINDS: dict[str, Any] = {
    "lstm": lambda **more: nn.LSTM(5, 12, **more),
    "gru": lambda **more: nn.GRU(5, 12, **more),
    "tanh": lambda **more: nn.RNN(5, 12, **more),
    "relu": lambda **more: nn.RNN(5, 12, nonlinearity="relu", **more),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def cell_of(module: nn.RNNBase, place: str) -> nn.RNNCellBase:
    """A cell with the weights of one layer in one direction."""
    kinds = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN_TANH": nn.RNNCell, "RNN_RELU": nn.RNNCell}
    more: dict[str, Any] = {"nonlinearity": "relu"} if module.mode == "RNN_RELU" else {}
    width = getattr(module, f"weight_ih{place}").size(1)
    cell: nn.RNNCellBase = kinds[module.mode](width, module.hidden_size, bias=module.bias, dtype=F64, **more)
    for name, value in cell.named_parameters():
        value.data = getattr(module, name + place).data
    return cell


def stepped(module: nn.RNNBase, x: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(inputs, hidden states before, hidden states) of each place, by cells, for x (t, n, p) and states of zeros."""
    found = {}
    for layer in range(module.num_layers):
        outs = []
        for way in ("", "_reverse") if module.bidirectional else ("",):
            place, state = f"_l{layer}{way}", None
            own = x.flip(0) if way else x
            hidden = []
            for step in own:
                state = cell_of(module, place)(step, state)
                hidden.append(state[0] if isinstance(state, tuple) else state)
            made = torch.stack(hidden)
            found[place] = own, torch.cat([torch.zeros_like(made[:1]), made[:-1]]), made
            outs.append(made.flip(0) if way else made)
        x = torch.cat(outs, -1)
    return found


@every_kind
@pytest.mark.parametrize(
    "more",
    [{}, {"num_layers": 3, "batch_first": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=["plain", "layers", "directions", "no bias"],
)
@torch.no_grad()
def test_states_are_those_of_cells(kind: str, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x = KINDS[kind](**more).double().eval(), torch.randn(7, 3, 5, dtype=F64)
    given = x.transpose(0, 1) if module.batch_first else x
    captured = fxmerge.analyze(nn.Sequential(module), given).captured
    (node,) = (n for n in captured.module.graph.nodes if n.op == "call_module")
    network = recurrent_states.network_of(captured.module, node)
    assert network is not None
    found = recurrent_states.by_layer(network, dict(module.named_parameters()), given, [])
    wanted = stepped(module, x)
    assert list(found) == network.places == list(wanted)
    for place, (inputs, before, hidden) in wanted.items():
        torch.testing.assert_close(found[place].inputs, inputs)
        torch.testing.assert_close(found[place].before, before)
        torch.testing.assert_close(found[place].hidden, hidden)


class Last(nn.Module):
    """A recurrent net that reads sequences (n, t, 5); one linear layer at the end."""

    def __init__(self, kind: str, **more: Any) -> None:
        super().__init__()
        self.rnn = KINDS[kind](batch_first=True, **more)
        self.out = nn.Linear(self.rnn.hidden_size * (1 + self.rnn.bidirectional), 4)
        for value in self.rnn.parameters():
            value.data.mul_(1.6)  # units with more to say about each other than those of a new net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(x)[0])
        return out


def smooth(n: int, seed: int) -> Tensor:
    noise = torch.randn(n, 24, 5, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(1) / 3


def off(result: fxmerge.Result, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((result.module(x) - wanted).square().sum() / (wanted - wanted.mean((0, 1))).square().sum())


def states_off(result: fxmerge.Result, model: Any, x: Tensor) -> float:
    """The relative square error of the last layer's states of the units that stay."""
    (group,) = result.plan.groups
    width = model.out.in_features
    stay = torch.tensor([i - (group.channels - width) for i in group.kept if i >= group.channels - width])
    with torch.no_grad():
        wanted = model.rnn(x)[0][..., stay]
        return float((result.module.rnn(x)[0] - wanted).square().sum() / wanted.square().sum())


@every_kind
@pytest.mark.parametrize("more", [{"num_layers": 2}, {"bidirectional": True, "bias": False}], ids=["layers", "ways"])
def test_solved_layers_are_closer_on_other_samples(
    kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model, data, fresh = Last(kind, **more).eval(), smooth(128, 1), smooth(64, 2)
    given: dict[str, Any] = {"ratio": 0.34, "decomposition": "prune", "selection": "l2", "samples": 256}
    given["calibration"] = list(data.split(32))
    after = fxmerge.merge(model, data[:2], **given)
    monkeypatch.setattr(recurrent, "ROUNDS", 0)
    before = fxmerge.merge(model, data[:2], **given)
    assert states_off(after, model, fresh) < 0.8 * states_off(before, model, fresh)
    (record,) = (r for r in after.report.refitted if r.name == "rnn")
    assert record.after < record.before and not record.note


@every_kind
@pytest.mark.parametrize("more", [{"num_layers": 2}, {"bidirectional": True, "bias": False}], ids=["layers", "ways"])
def test_exported_layers_are_solved_as_modules(kind: str, more: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model, data, fresh = Last(kind, **more).eval(), smooth(64, 1), smooth(8, 2)
    given: dict[str, Any] = {"ratio": 0.34, "samples": 64, "calibration": list(data.split(16))}
    dynamic = ({0: torch.export.Dim("n", max=512)},)
    exported = fxmerge.merge(torch.export.export(model, (data[:4],), dynamic_shapes=dynamic), (data[:4],), **given)
    (record,) = (r for r in exported.report.refitted if r.name == "rnn")
    assert record.solved and record.before > 0
    with torch.no_grad():
        wanted = fxmerge.merge(model, data[:4], **given).module(fresh)
        torch.testing.assert_close(exported.module(fresh), wanted, rtol=1e-3, atol=1e-4)


@every_kind
def test_copies_of_units_stay_exact(kind: str) -> None:
    torch.manual_seed(0)
    model = Last(kind).double().eval()
    gates = model.rnn.weight_ih_l0.size(0) // 12
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            rows = getattr(model.rnn, name).view(gates, 12, -1)
            rows[:, 6:] = rows[:, :6]
    x = smooth(64, 3).double()
    result = fxmerge.merge(model, x[:2], ratio=0.5, calibration=list(x.split(16)))
    assert result.module.rnn.hidden_size == 6
    assert off(result, model, smooth(8, 4).double()) < 1e-20


class Halved(Last):
    """Each sample is two sequences; or, with `folded`, sequences are of several samples."""

    def __init__(self, folded: bool) -> None:
        super().__init__("gru")
        self.folded = folded

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(1, -1, 5) if self.folded else x.reshape(-1, 12, 5)
        return super().forward(parts).reshape(len(x), 24, 4)


@pytest.mark.parametrize("folded", [False, True])
def test_sequences_are_not_always_samples(folded: bool) -> None:
    torch.manual_seed(0)
    model, data = Halved(folded).eval(), smooth(64, 1)
    given: dict[str, Any] = {"decomposition": "prune", "selection": "l2", "samples": 64}
    result = fxmerge.merge(model, data[:4], ratio=0.34, calibration=list(data.split(4)), **given)
    (record,) = (r for r in result.report.refitted if r.name == "rnn")
    if folded:
        assert record.note == "unchanged: too few output positions"
    else:
        assert record.after < record.before


def test_few_samples_leave_recurrent_layers_alone() -> None:
    torch.manual_seed(0)
    model, x = Last("lstm").eval(), smooth(6, 1)
    result = fxmerge.merge(model, x[:2], ratio=0.5, calibration=[x], samples=6)
    (record,) = (r for r in result.report.refitted if r.name == "rnn")
    assert record.note == "unchanged: too few output positions"


@pytest.mark.parametrize("bare", [True, False], ids=["first", "behind a layer"])
def test_probes_are_made_of_what_a_recurrent_layer_reads(bare: bool) -> None:
    """An LSTM gives a tuple, which has no shape to count rows by."""
    torch.manual_seed(0)
    model = nn.Sequential(*([] if bare else [nn.Identity()]), Last("lstm")).eval()
    result = fxmerge.merge(model, smooth(2, 1).repeat(1, 2, 1), ratio=0.5, samples=32)
    assert "made from the 2 example inputs" in result.report.source


class Twice(Last):
    """One layer that is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(1))


class Stepped(nn.Module):
    """A cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(5, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 12)
        for step in range(6):
            h = self.cell(x[:, step], h)
        out: Tensor = self.out(h)
        return out


@pytest.mark.parametrize("make", [lambda: Twice("lstm"), Stepped], ids=["twice", "cell"])
def test_what_is_called_more_than_once_is_not_solved(make: Any) -> None:
    """And has no line in the report for each call."""
    torch.manual_seed(0)
    model, data = make().eval(), smooth(64, 1)
    given: dict[str, Any] = {"decomposition": "prune", "selection": "l2", "samples": 64}
    result = fxmerge.merge(model, data[:2], ratio=0.34, calibration=list(data.split(16)), **given)
    assert [record.name for record in result.report.refitted] == ["out"]
    assert len(result.plan.groups[0].kept) == 8
