"""Recurrent layers lose hidden units: all gates, the unit's own column, and whatever reads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn as packing
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge import Options, Plan, verify
from fxmerge.graph.cost import cost, flops_by_node
from fxmerge.graph.nested import leaves
from fxmerge.plan import GroupPlan
from fxmerge.planning.counted import parameters_within
from fxmerge.planning.price import flops_price, parameters_price
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.recurrent_nets import ALSO, NETS, UNITS, lstm_by_hand, silenced

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:LSTM with projections")]
every_net = pytest.mark.parametrize("name", NETS)


def units_only(name: str, model: Any, inputs: Any, **options: Any) -> fxmerge.Result:
    """Half of the hidden units leave, and nothing else."""
    others = {g.name: g.channels for g in fxmerge.analyze(model, inputs).groups if g.name != UNITS.get(name, "rnn")}
    return plain_merge(model, inputs, ratio=0.5, decomposition="prune", keep=others, **options)


@every_net
def test_dropped_units_are_silent_units(name: str) -> None:
    """The merged net is the original in which the dropped units are always 0, on other batch sizes and lengths too."""
    model, example, other = NETS[name]()
    result = units_only(name, model, example)
    assert [p.name for p in result.plan.groups] == [UNITS.get(name, "rnn")]
    reference = silenced(model, result, ALSO.get(name))
    with torch.no_grad():
        for inputs in (example, other):
            torch.testing.assert_close(result.module(*inputs), reference(*inputs), rtol=0, atol=1e-10)
        assert (reference(*other) - model(*other)).abs().max() > 1e-4


@every_net
@pytest.mark.parametrize("route", ["symbolic", "export"])
def test_permutation(name: str, route: str) -> None:
    model, example, _ = NETS[name]()
    given = model if route == "symbolic" else torch.export.export(model, example, strict=False)
    found = fxmerge.analyze(given, example)
    assert found.captured.route == route
    moved = verify.permutation(found.captured, found.facts, found.grouping)
    assert UNITS.get(name, "rnn") in moved or route == "export"
    assert max(moved.values()) < 1e-10


@every_net
def test_no_member_is_superfluous(name: str) -> None:
    model, example, _ = NETS[name]()
    for value in (b for b in model.buffers() if b.is_floating_point()):
        value.copy_(torch.rand(value.shape) + 0.5)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    found = fxmerge.analyze(model, example)
    changed = verify.overcoupling(found.captured, found.facts, found.grouping)
    assert min(changed.values()) > 1e-8, changed


@every_net
def test_copies_of_units_merge_exactly(name: str) -> None:
    """A unit that always equals another is carried by it, in the layer's own columns too."""
    model, example, _ = NETS[name]()
    found = fxmerge.analyze(model, example)
    copied, args, kept = verify.duplicate(found.captured, found.facts, found.grouping)
    assert UNITS.get(name, "rnn") in kept
    sizes = {g.name: g.channels for g in found.groups}
    given = tuple(GroupPlan(group, sizes[group], tuple(index.tolist())) for group, index in kept.items())
    result = fxmerge.apply(Plan(Options(threshold=0.0, refit="none"), given), copied, args)
    assert {p.name: p.kept for p in result.plan.groups} == {p.name: p.kept for p in given}
    assert result.report.verdict.error < 1e-8


@every_net
def test_prices_are_what_the_merged_net_costs(name: str) -> None:
    model, example, _ = NETS[name]()
    result = plain_merge(model, example, ratio=0.4, decomposition="prune")
    found = result.analysis
    named = {g.name: g for g in found.groups}
    counts = {p.name: tuple(torch.bincount(named[p.name].cells[list(p.kept)]).tolist()) for p in result.plan.groups}
    parts = (found.facts, found.groups, found.grouping)
    flops = flops_price(*parts, flops_by_node(found.captured.module, found.captured.inputs))
    size = parameters_price(*parts, parameters_within(found.captured.module, ()))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        result.module(*example)
    assert flops(counts) == pytest.approx(counter.get_total_flops(), rel=1e-12)
    assert size(counts) == pytest.approx(sum(p.numel() for p in result.module.parameters()), rel=1e-12)


@every_net
def test_saved_nets_load_and_their_code_runs(name: str, tmp_path: Path) -> None:
    model, example, other = NETS[name]()
    result = plain_merge(model, example, ratio=0.5)
    result.save(tmp_path)
    scope: dict[str, Any] = {"__file__": str(tmp_path / "model.py")}
    exec(compile((tmp_path / "model.py").read_text(), "model.py", "exec"), scope)
    with torch.no_grad():
        for inputs in (example, other):
            expected = result.module(*inputs)
            torch.testing.assert_close(fxmerge.load(tmp_path)(*inputs), expected)
            torch.testing.assert_close(scope["load"]()(*inputs), expected)


def test_the_kept_units_of_an_lstm_run_as_by_hand() -> None:
    """A loop over the steps with the rows and columns of the kept units gives the merged layer's states."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(5, 8), Hidden(), nn.Linear(8, 3)).double().eval()
    x, other = torch.randn(6, 2, 5, dtype=torch.float64), torch.randn(9, 4, 5, dtype=torch.float64)
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    kept = torch.tensor(result.plan.groups[0].kept)
    assert len(kept) == 4
    layer = result.module.get_submodule("0")
    assert isinstance(layer, nn.LSTM)
    assert (layer.hidden_size, layer.input_size) == (4, 5)
    by_hand = lstm_by_hand(other, dict(model[0].named_parameters()), kept)
    with torch.no_grad():
        torch.testing.assert_close(layer(other)[0], by_hand)
        head = model[2]
        torch.testing.assert_close(result.module(other), by_hand @ head.weight[:, kept].T + head.bias)


class Hidden(nn.Module):
    """The first of several outputs."""

    def forward(self, found: Any) -> Any:
        return found[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_half_the_units_are_a_quarter_of_the_recurrent_weights(kind: Any) -> None:
    model = nn.Sequential(kind(6, 20, 2, bidirectional=True), Hidden(), nn.Linear(40, 3)).eval()
    result = plain_merge(model, torch.randn(4, 2, 6), ratio=0.5)
    merged = dict(result.module.named_parameters())
    for name, value in model.named_parameters():
        if "weight_hh" in name or "weight_ih_l1" in name:
            assert merged[name].numel() * 4 == value.numel()
    assert result.module.get_submodule("0").extra_repr() == kind(6, 10, 2, bidirectional=True).extra_repr()


def test_directions_and_layers_lose_different_units() -> None:
    """The units with small weights leave, whichever they are in each layer and direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.GRU(5, 6, 2, bidirectional=True), Hidden(), nn.Linear(12, 3)).eval()
    small = {"l0": [0, 2, 4], "l0_reverse": [1, 2, 3], "l1": [3, 4, 5], "l1_reverse": [0, 1, 5]}
    with torch.no_grad():
        for suffix, units in small.items():
            for kind in ("weight_ih_", "weight_hh_", "bias_ih_", "bias_hh_"):
                model[0].get_parameter(kind + suffix).view(3, 6, -1)[:, units] *= 1e-3
    result = plain_merge(model, torch.randn(4, 2, 5), ratio=0.5, selection="l2")
    dropped = set(range(24)) - set(result.plan.groups[0].kept)
    assert dropped == {6 * row + unit for row, units in enumerate(small.values()) for unit in units}


class Whole(nn.Module):
    """Attention over a recurrent layer of two directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)
        self.attention, self.out = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        out: Tensor = self.out(self.attention(y, y, y)[0])
        return out


@pytest.mark.parametrize("heads", ["width", "whole", "both"])
def test_layers_and_directions_never_leave_whole(heads: Any) -> None:
    result = plain_merge(Whole().eval(), torch.randn(2, 4, 5), ratio=0.5, heads=heads)
    layer = result.module.get_submodule("rnn")
    assert isinstance(layer, nn.LSTM)
    assert (layer.num_layers, layer.bidirectional, layer.hidden_size) == (2, True, 3)
    assert len(list(layer.parameters())) == 16


class Learned(nn.Module):
    """Initial states that are parameters, as they are or computed."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.c = nn.Parameter(torch.randn(2, 1, 8)), nn.Parameter(torch.randn(2, 1, 8))
        self.rnn, self.out = nn.LSTM(5, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        b = x.size(0)
        y, _ = self.rnn(x, (self.h.expand(-1, b, -1).contiguous(), torch.tanh(self.c.repeat(1, b, 1))))
        out: Tensor = self.out(y)
        return out


def test_learned_states_follow_and_their_units_are_not_merged() -> None:
    """Units with equal weights differ if they start at different numbers."""
    torch.manual_seed(0)
    model = Learned().double().eval()
    with torch.no_grad():
        for name, value in model.rnn.named_parameters():
            if value.dim() == 1 or "ih" in name or "hh" in name:
                value.view(4, 8, -1)[:, 4:] = value.view(4, 8, -1)[:, :4]
    x, other = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)
    result = plain_merge(model, x, ratio=0.5)
    group = result.analysis.groups[0]
    assert not group.partners
    assert all(p.into == -1 for p in result.plan.groups[0].partners)
    kept = torch.tensor(result.plan.groups[0].kept).view(2, 4) % 8
    merged = dict(result.module.named_parameters())
    for name, value in (("h", model.h), ("c", model.c)):
        torch.testing.assert_close(merged[name], value.gather(2, kept[:, None]))
    reference = silenced(model, result)
    with torch.no_grad():  # a silent unit must start at 0 too
        for row in range(2):
            for state in (reference.h, reference.c):
                mask = torch.zeros(8, dtype=torch.float64).index_fill_(0, kept[row], 1.0)
                state[row] *= mask
        torch.testing.assert_close(result.module(other), reference(other), rtol=0, atol=1e-10)


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.rnn(x, h)
        return self.out(y), y.mean()


class Streaming(nn.Module):
    """The state is returned, so that the next call can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x)
        return self.out(y), h


@pytest.mark.parametrize(("model", "inputs", "reason"), [
    (Conditioned(), (torch.randn(4, 2, 5), torch.randn(1, 2, 8)), "meets values that are not channels"),
    (Streaming(), (torch.randn(4, 2, 5),), "is the model's output"),
])  # fmt: skip
def test_states_that_come_in_or_go_out_stay(model: nn.Module, inputs: Any, reason: str) -> None:
    result = plain_merge(model.eval(), inputs, ratio=0.5)
    assert result.plan.groups == ()
    assert result.report.verdict.error == 0
    refused = {r.name: r for r in result.report.refusals}
    assert reason in refused["rnn"].reason
    assert "test_recurrent.py" in refused["rnn"].where


class OverChannels(nn.Module):
    """The channels of a convolution are the steps of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rnn, self.out = nn.Conv1d(6, 8, 1), nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.rnn(self.conv(x))[0][:, -1])
        return out


def test_channels_that_are_steps_stay() -> None:
    result = plain_merge(OverChannels().eval(), torch.randn(2, 6, 5), ratio=0.5)
    assert result.plan.groups == ()
    assert {r.name: r.reason for r in result.report.refusals}["conv"] == "rnn steps along an axis of channels"


class Packed(nn.Module):
    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.words, self.rnn, self.out = nn.Embedding(20, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.words(x)
        if self.own:
            y = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
            y = pad_packed_sequence(self.rnn(y)[0], batch_first=True)[0]
        else:
            y = packing.pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
            y = packing.pad_packed_sequence(self.rnn(y)[0], batch_first=True)[0]
        out: Tensor = self.head(torch.relu(self.out(y)))
        return out


@pytest.mark.parametrize("own", [True, False])
def test_packed_sequences_are_declined_and_the_rest_merges(own: bool) -> None:
    inputs = torch.randint(20, (3, 5)), torch.tensor([5, 2, 3])
    model = Packed(own).eval()
    result = plain_merge(model, inputs, ratio=0.5)
    assert [p.name for p in result.plan.groups] == ["out"]
    refused = {r.name: r.reason for r in result.report.refusals}
    assert "packs sequences of different lengths" in refused["words"]
    assert "cannot be followed" in refused["rnn"]
    other = torch.randint(20, (2, 4)), torch.tensor([2, 4])
    assert result.module(*other).shape == model(*other).shape


def test_the_leaves_of_a_packed_sequence() -> None:
    held = pack_padded_sequence(torch.randn(3, 2, 4), [3, 1])
    assert [type(leaf) for leaf in leaves([held])] == [Tensor, Tensor, type(None), type(None)]


@pytest.mark.parametrize("exported", [False, True])
def test_a_projection_stays_narrower_than_the_hidden_units(exported: bool) -> None:
    """torch refuses a projection to as many channels as there are hidden units, or more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(5, 8, proj_size=6), Hidden(), nn.Linear(6, 3)).eval()
    x = torch.randn(4, 2, 5)
    given = torch.export.export(model, (x,), strict=False) if exported else model
    projection = fxmerge.analyze(given, x).groups[1]
    assert projection.channels == 6
    result = plain_merge(given, x, ratio=0.5, keep={projection.name: 6})
    assert result.plan.groups == ()
    assert "torch does not construct a layer of this size" in {r.reason for r in result.report.refusals}
    both = plain_merge(given, x, ratio=0.5)
    assert [(p.channels, len(p.kept)) for p in both.plan.groups] == [(8, 4), (6, 3)]


def test_scales_pass_a_projection_but_not_a_gate() -> None:
    found = fxmerge.analyze(*NETS["projected"]()[:2])
    units, projected = found.groups
    assert units.scale_blocks == ("rnn",)
    assert projected.scale_blocks == ()


def test_fused_kernels_cost_what_their_matrix_products_cost() -> None:
    """On CPUs an LSTM in float32 runs as one oneDNN kernel, which torch's counter does not know."""
    model = nn.Sequential(nn.LSTM(6, 5, 2, bidirectional=True), Hidden(), nn.Linear(10, 3)).eval()
    x = torch.randn(4, 2, 6)
    found = fxmerge.analyze(model, x).captured
    plain = FlopCounterMode(display=False)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), plain:
        model(x)
    assert plain.get_total_flops() == 2 * 4 * 2 * (2 * 20 * (6 + 5) + 2 * 20 * (10 + 5) + 30)
    assert cost(found.module, found.inputs).flops == plain.get_total_flops()


def test_refit_repairs_recurrent_weights_and_what_reads_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(6, 16, 2, batch_first=True), Hidden(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x, batches = torch.randn(4, 7, 6), [torch.randn(32, 7, 6) for _ in range(4)]
    model.eval()
    options = {"ratio": 0.4, "decomposition": "prune", "selection": "l2", "keep": {"2": 8}}
    plain, fitted = plain_merge(model, x, **options), fxmerge.merge(model, x, calibration=batches, **options)
    for name, value in plain.module.get_submodule("0").named_parameters():
        alike = torch.equal(fitted.module.get_submodule("0").get_parameter(name), value)
        assert alike is name.startswith("bias_hh")  # a layer's two biases are added
    with torch.no_grad():
        before, after = (torch.dist(r.module(batches[0]), model(batches[0])) for r in (plain, fitted))
    assert after < before / 2
    assert [r.name for r in fitted.report.refitted] == ["0", "2", "4"]


@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
def test_a_budget_is_shared_with_recurrent_layers(allocation: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.LSTM(24, 16, batch_first=True), Hidden(), nn.Linear(16, 3))
    batches = [torch.randn(16, 7, 6) for _ in range(2)]
    given = {"calibration": batches, "budget": {"flops": 0.5}, "allocation": allocation}
    result = fxmerge.merge(model.eval(), torch.randn(4, 7, 6), **given)
    assert "2" in {p.name for p in result.plan.groups}
    found = result.analysis.captured
    share = cost(result.module, found.inputs).flops / cost(found.module, found.inputs).flops
    assert 0.45 < share < 0.51


class Sized(nn.Module):
    """A class that keeps the hidden size, and makes the initial states of it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 12
        self.rnn, self.step = nn.GRU(5, 12, 2, batch_first=True), nn.GRUCell(12, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, h = self.rnn(x, torch.zeros(2, x.size(0), self.hidden))
        out: Tensor = self.out(self.step(y[:, -1], h[-1]))
        return out


def test_the_users_class_takes_narrower_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, other = Sized().eval(), torch.randn(2, 4, 5), torch.randn(3, 6, 5)
    result = fxmerge.merge(model, x, ratio=0.5)
    result.save(tmp_path)
    loaded = fxmerge.load(tmp_path, model=model)
    assert isinstance(loaded, Sized)
    assert (loaded.hidden, loaded.rnn.hidden_size, loaded.step.hidden_size, loaded.step.input_size) == (6, 6, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(other), result.module(other))


def test_merged_layers_train_and_copy() -> None:
    """The layer's own list of weights holds its new parameters."""
    model = nn.Sequential(nn.LSTM(5, 8, 2), Hidden(), nn.Linear(8, 3)).eval()
    result = plain_merge(model, torch.randn(4, 2, 5), ratio=0.5)
    layer = result.module.get_submodule("0")
    assert isinstance(layer, nn.LSTM)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True))
    again = copy.deepcopy(result.module).double().train()
    again(torch.randn(4, 2, 5, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in again.parameters())


@pytest.mark.parametrize("computed", ["parametrized", "normed"])
def test_weights_that_are_computed_at_each_call_become_plain(computed: str) -> None:
    torch.manual_seed(0)
    layer = nn.GRU(5, 8, batch_first=True)
    if computed == "parametrized":
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    else:
        nn.utils.weight_norm(layer, "weight_hh_l0")
    model = nn.Sequential(layer, Hidden(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4, 5)
    result = plain_merge(model, x, ratio=0.5)
    assert [(p.channels, len(p.kept)) for p in result.plan.groups] == [(8, 4)]
    assert plain_merge(model, x, ratio=0.0).report.verdict.error < 1e-6
