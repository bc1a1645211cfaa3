"""The silence oracle agrees on every net of the tables, and detects wrong indices, frozen constants and lost scales."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxmerge
import tests.helpers.attention_by_others
import tests.helpers.pictures_by_others  # noqa: F401
from fxmerge import FxMergeError, Plan, verify
from fxmerge.analysis.grouping import grouped
from fxmerge.analysis.propagate import provenance
from fxmerge.graph.compare import difference, outputs
from fxmerge.ir.capture import Capture
from fxmerge.ir.provenance import ParamLabels
from fxmerge.rules.resize import Call
from fxmerge.verify import Silence, silencing
from tests.helpers.netmaking import Net, one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.written_by_others import OTHERS
from tests.helpers.written_by_others import made as made_by_others

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-10
pruned = partial(plain_merge, ratio=0.5, decomposition="prune")


def silence(result: fxmerge.Result, **changes: Any) -> Silence:
    """The oracle on a result; `changes` replace what it is given."""
    found = result.analysis
    given = {"captured": found.captured, "facts": found.facts, "grouping": found.grouping, "plan": result.plan}
    return verify.silence(**(given | changes))


def agrees(result: fxmerge.Result, **changes: Any) -> Silence:
    """Asserts that nothing is red, that every group is checked or left out with a reason, and that values differ."""
    found = silence(result, **changes)
    groups = {p.name for p in result.plan.groups}
    assert set(found.errors) - {"all"} | set(found.left_out) == groups
    assert not set(found.errors) & set(found.left_out)
    assert all(found.left_out.values())
    assert found.inputs[0] == "values"
    assert max(found.errors.values()) < EXACT, found.errors
    return found


@pytest.mark.parametrize("selection", ["l2", "random"])
@pytest.mark.parametrize("name", NETS)
def test_nets(name: str, selection: str) -> None:
    result = pruned(*NETS[name](), selection=selection)
    found = agrees(result)
    mixed = {g.name for g in result.analysis.groups if g.mixers}
    assert set(found.left_out) == mixed
    assert not found.on_graph
    assert any(name.startswith("batch") for name in found.inputs)


@pytest.mark.parametrize("name", OTHERS)
def test_written_by_others(name: str) -> None:
    model, example, _, _ = made_by_others(name)
    result = pruned(model, example)
    found = agrees(result)
    mixed = {g.name for g in result.analysis.groups if g.mixers}
    assert set(found.left_out) == mixed & {p.name for p in result.plan.groups}


def test_silenced_by_hand_and_merged_by_its_plan() -> None:
    """The copy is what one silences by hand; merging the copy by the plan gives the copy's function."""
    model, x = NETS["residual"]()
    result = pruned(model, x)
    kept = {p.name: list(p.kept) for p in result.plan.groups}
    gone = {name: [i for i in range(p) if i not in kept[name]] for name, p in (("stem", 12), ("a", 16))}
    by_hand, x = NETS["residual"]()[0].double(), x.double()
    with torch.no_grad():
        for name, producers in (("stem", ("stem", "n", "b", "bn")), ("a", ("a", "an"))):
            for part in map(by_hand.get_submodule, producers):
                for value in part.parameters(recurse=False):
                    value[gone[name]] = 0
        by_hand.a.weight[:, gone["stem"]] = 0  # type: ignore[union-attr, index, operator]
        by_hand.fc.weight[:, gone["stem"]] = 0  # type: ignore[union-attr, index, operator]
        by_hand.b.weight[:, gone["a"]] = 0  # type: ignore[union-attr, index, operator]
    copied = verify.silenced(result.analysis.captured, result.analysis.grouping, result.plan)
    assert {n: p.tolist() for n, p in copied.named_parameters()} == {
        n: p.tolist() for n, p in by_hand.named_parameters()
    }
    merged = fxmerge.apply(result.plan, copied, x).module
    other = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    assert difference(outputs(by_hand, (other,)), outputs(merged, (other,))) < EXACT


# What must be seen: wrong indices, constants that tracing froze, constants that follow a width


def rolled(facts: Any, path: str, axis: int) -> Any:
    """The facts with the labels along one axis of a parameter at other places."""
    labels = facts.params[path]
    axes = {**labels.axes, axis: labels.axes[axis].roll(1)}
    return dataclasses.replace(facts, params={**facts.params, path: ParamLabels(path, axes)})


@pytest.mark.parametrize(("path", "axis"), [("b.weight", 1), ("a.weight", 0), ("a.bias", 0)])
def test_a_parameter_sliced_at_the_wrong_places_is_seen(path: str, axis: int) -> None:
    result = pruned(*NETS["mlp"]())
    found = silence(result, facts=rolled(result.analysis.facts, path, axis))
    assert found.errors["a"] > 1e-3
    assert found.errors["all"] > 1e-3
    assert found.errors["b"] < EXACT


@pytest.mark.parametrize("role", ["producers", "consumers", "per_channel_params"])
def test_a_member_at_the_wrong_places_is_seen(role: str) -> None:
    result = pruned(*NETS["chain_2d"]())
    grouping = result.analysis.grouping
    first = grouping.groups[0]
    (member,) = getattr(first, role)
    wrong = dataclasses.replace(first, **{role: (dataclasses.replace(member, where=member.where.roll(1, 0)),)})
    changed = dataclasses.replace(grouping, groups=(wrong, *grouping.groups[1:]))
    found = silence(result, grouping=changed)
    assert found.errors["a"] > 1e-3
    assert found.errors["b"] < EXACT


def edited(captured: Capture, change: Callable[[fx.GraphModule], None]) -> Capture:
    """The capture with a change made to its graph, whose nodes keep their names."""
    change(captured.module)
    captured.module.recompile()
    return captured


def test_a_wrong_literal_is_seen_without_any_group() -> None:
    """The captured graph itself differs from the model."""
    model, x = NETS["scores"]()
    result = pruned(model, x)

    def change(module: fx.GraphModule) -> None:
        (node,) = [n for n in module.graph.nodes if n.op == "call_function" and 6**-0.5 in n.args]
        node.args = (node.args[0], 3**-0.5)

    captured = edited(result.analysis.captured, change)
    found = silence(result, captured=captured, plan=dataclasses.replace(result.plan, groups=()))
    assert set(found.errors) == {"all"}
    assert found.errors["all"] > 1e-3
    assert min(silence(result, captured=captured).errors.values()) > 1e-3


def test_an_activation_frozen_by_tracing_is_seen_on_other_values_only() -> None:
    """The graph returns what the model returns on the example, but it adds the example's features to all others."""
    model, x = NETS["in_place"]()
    result = pruned(model, x)
    captured = result.analysis.captured
    features: list[Tensor] = []
    inner = captured.module.get_submodule("stem")
    handle = inner.register_forward_hook(lambda m, given, out: features.append(out.detach()))
    with torch.no_grad():
        captured.module(x)
    handle.remove()

    def freeze(module: fx.GraphModule) -> None:
        module.register_buffer("frozen", features[0])
        node = next(n for n in module.graph.nodes if n.target == "stem")
        node.op, node.target, node.args = "get_attr", "frozen", ()

    facts, grouping = grouped(captured, provenance(edited(captured, freeze)), "width")
    frozen = {"facts": facts, "grouping": grouping, "plan": Plan(result.plan.options, ())}
    example = verify.Unseen("example", (x.double(),), {})
    assert silence(result, inputs=[example], **frozen).errors["all"] < 1e-6
    assert silence(result, **frozen).errors["all"] > 1e-2


class Branch(nn.Module):
    """Skips a layer for a single sample, as layers with batch statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.o = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = self.n(x) if x.size(0) > 1 else x
        out: Tensor = self.o(x)
        return out


class Always(Branch):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.n(torch.relu(self.a(x))))
        return out


def test_a_branch_on_the_batch_size_is_seen_on_another_batch_only() -> None:
    """The graph of one path through a model, compared with the model."""
    torch.manual_seed(0)
    branch, always = Branch().eval(), Always().eval()
    always.load_state_dict(branch.state_dict())
    result = pruned(always, torch.randn(4, 6))
    agrees(result)
    captured = dataclasses.replace(result.analysis.captured, model=branch)
    inputs = [i for i in verify.unseen(captured.args, captured.kwargs) if "axis" not in i.name]
    by_size = {i.name: silence(result, captured=captured, inputs=[i], each=False).errors["all"] for i in inputs}
    assert set(by_size) == {"values", "batch 5", "batch 1"}
    assert {name for name, error in by_size.items() if error > EXACT} == {"batch 1"}
    assert by_size["batch 1"] > 1e-2


class TwoSamples(Branch):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(torch.relu(self.a(x)).view(2, 12))
        return out


class AnySamples(Branch):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(torch.relu(self.a(x)).view(-1, 12))
        return out


def test_a_graph_for_one_batch_size_says_so() -> None:
    """That is not wrong, but the graph does not take what the model takes."""
    torch.manual_seed(0)
    free, literal = AnySamples().eval(), TwoSamples().eval()
    literal.load_state_dict(free.state_dict())
    result = pruned(literal, torch.randn(2, 6))
    found = agrees(result, captured=dataclasses.replace(result.analysis.captured, model=free))
    assert found.inputs == ("values",)
    assert set(found.refused) == {"batch 3", "batch 1"}
    assert "shape '[2, 12]' is invalid" in found.refused["batch 3"]


class Spread(Branch):
    """Three samples are reshaped to two, with channels of different samples in a row."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)).view(2, 12, -1)
        out: Tensor = self.o(x.mean(2))
        return out


def test_a_batch_that_the_outputs_do_not_follow_is_passed_over() -> None:
    torch.manual_seed(0)
    model = Spread().eval()
    x = torch.randn(4, 6)
    assert model(x).shape == (2, 3)
    found = agrees(pruned(model, x[:2]))
    assert not [name for name in found.inputs if name.startswith("batch")]


def test_a_scale_that_follows_the_width_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the explicit scale, scaled_dot_product_attention divides by the root of the narrower width."""
    result = pruned(*NETS["encoder"]())
    honest = silencing.provable

    def without_scale(*args: Any) -> Any:
        chosen, edits, refused = honest(*args)

        def stripped(call: Call) -> Call:
            return dataclasses.replace(call, kwargs={k: v for k, v in call.kwargs.items() if k != "scale"})

        return chosen, {name: stripped(call) for name, call in edits.items()}, refused

    assert agrees(result).errors["qkv"] < EXACT
    monkeypatch.setattr(silencing, "provable", without_scale)
    found = silence(result)
    assert found.errors["qkv"] > 1e-3
    assert found.errors["up"] < EXACT


def test_a_merged_graph_that_does_not_run_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Literal sizes that keep the old width make the merged graph fail where the captured one runs."""
    result = pruned(*NETS["reshape"]())
    honest = silencing.provable
    monkeypatch.setattr(silencing, "provable", lambda *args: (honest(*args)[0], {}, []))
    found = silence(result)
    assert found.errors["a"] == float("inf")
    assert found.errors["fc"] < EXACT


# What cannot be checked is left out by name


def linear_attention(f: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    """Queries and keys are summed over after a function."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        return m.o((f(m.q(x)) @ f(m.k(x)).transpose(1, 2)) @ m.v(x))

    parts = {"q": nn.Linear(6, 8), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "o": nn.Linear(8, 3)}
    return randomised(Net(wiring, **parts)).eval(), torch.randn(2, 5, 6)


@pytest.mark.parametrize("f", [F.relu, F.elu, torch.tanh, F.gelu, lambda x: x * 0.3, lambda x: x**3])
def test_sums_over_channels_that_are_zero(f: Callable[[Tensor], Tensor]) -> None:
    assert set(agrees(pruned(*linear_attention(f))).errors) == {"all", "q", "v"}


@pytest.mark.parametrize("f", [torch.exp, torch.sigmoid, torch.cos, lambda x: F.elu(x) + 1, lambda x: 1 - x])
def test_sums_over_channels_that_are_not_zero_are_left_out(f: Callable[[Tensor], Tensor]) -> None:
    found = agrees(pruned(*linear_attention(f)))
    assert set(found.errors) == {"all", "v"}
    assert "its channels are not zero at matmul" in found.left_out["q"]


@pytest.mark.parametrize("f", [torch.exp, torch.sigmoid, F.softplus, torch.cos, lambda x: 1 - x, lambda x: x + 0.3])
def test_functions_that_are_not_zero_at_zero(f: Callable[[Tensor], Tensor]) -> None:
    """A silenced channel is not zero where it is read; its columns are."""
    net = Net(lambda m, x: m.c(torch.relu(m.b(f(m.a(x))))), a=nn.Linear(6, 12), b=nn.Linear(12, 8), c=nn.Linear(8, 3))
    assert set(agrees(pruned(randomised(net).eval(), torch.randn(4, 6))).errors) == {"all", "a", "b"}


@pytest.mark.parametrize("f", [torch.log, torch.rsqrt, torch.reciprocal, lambda x: 1 / x, lambda x: x / x.detach()])
def test_functions_that_are_not_finite_at_zero_are_left_out(f: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda m, x: m.b(f(m.a(x).abs() + 0)), a=nn.Linear(6, 12), b=nn.Linear(12, 3))
    found = silence(pruned(randomised(net).eval(), torch.randn(4, 6)))
    assert set(found.errors) == {"all"}
    assert "is not finite where a channel is zero" in found.left_out["a"]


def test_a_group_with_a_mixer_is_left_out_and_the_others_are_checked() -> None:
    found = agrees(pruned(*NETS["encoder"]()))
    assert set(found.errors) == {"all", "qkv", "up"}
    assert found.left_out["a"].startswith("n couples its channels")


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_that_are_computed_at_each_use(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = NETS["mlp"]()
    wrap(model.a)  # type: ignore[arg-type]
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = agrees(pruned(model, x))
    assert not found.on_graph
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_that_capture_has_folded_are_silenced_in_the_graph() -> None:
    """A standardised weight is not a parameter of the model, and was computed in float32."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        weight = m.w - m.w.mean(1, keepdim=True)
        return m.c(torch.relu(m.b(torch.relu(F.linear(x, weight)))))

    net = Net(wiring, w=nn.Parameter(torch.zeros(12, 6)), b=nn.Linear(12, 8), c=nn.Linear(8, 3))
    result = pruned(randomised(net).eval(), torch.randn(4, 6))
    found = agrees(result)
    assert set(found.errors) == {"all", *found.on_graph}
    assert len(found.on_graph) == 2
    other = copy.deepcopy(net)
    nn.init.constant_(other.b.bias, 0.5)  # type: ignore[arg-type, union-attr]
    wrong = silence(result, captured=dataclasses.replace(result.analysis.captured, model=other))
    assert wrong.errors["all"] > 1e-3  # the graph is still compared with the model


def test_outputs_that_show_nothing_are_left_out() -> None:
    net = Net(lambda m, x: torch.relu(m.b(torch.relu(m.a(x)))), a=nn.Linear(6, 12), b=nn.Linear(12, 3))
    randomised(net)
    nn.init.constant_(net.b.bias, -100.0)  # type: ignore[arg-type, union-attr]
    found = silence(pruned(net.eval(), torch.randn(4, 6)))
    assert not found.errors
    assert found.left_out == {"a": "the model's outputs are all zero without its dropped channels"}


def test_blocks_that_leave_whole_are_checked() -> None:
    result = pruned(*NETS["encoder"](), heads="both")
    found = agrees(result)
    assert any("#whole" in name for name in found.errors)


# Runs in float64, and leaves the user's model as it was


class Casting(nn.Module):
    """Casts to float32 and makes tensors of the default type, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)).float() + torch.zeros(12)
        y = F.softmax(y.to(torch.float32), 0, dtype=torch.float32)
        out: Tensor = self.b(y.type_as(x))
        return out


def test_casts_do_not_lose_precision() -> None:
    torch.manual_seed(0)
    model = Casting().eval()
    agrees(pruned(model, torch.randn(4, 6)))
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Spectrum(nn.Module):
    """Complex weights and a complex constant; a cast to complex64 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16, dtype=torch.cfloat), nn.Linear(16, 12, dtype=torch.cfloat)
        self.c = nn.Linear(12, 3)
        self.register_buffer("turn", torch.polar(torch.ones(1), torch.ones(1)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x.to(torch.complex64)) * self.turn).to(torch.cfloat)
        out: Tensor = self.c(y.abs())
        return out


def test_complex_weights_are_checked_in_double_precision() -> None:
    torch.manual_seed(0)
    result = pruned(Spectrum().eval(), torch.randn(4, 6))
    agrees(result)
    found = result.analysis
    assert all(e < EXACT for e in verify.permutation(found.captured, found.facts, found.grouping).values())


class Shared(nn.Module):
    """A module and a weight under several names each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.again, self.b, self.c = self.a, nn.Linear(12, 6), nn.Linear(12, 6)
        self.c.weight = self.b.weight
        self.more = nn.ModuleList([self.a, self.b])

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        out: Tensor = self.c(self.again(y)) + self.more[1](self.more[0](x))
        return out


def test_the_users_model_is_left_as_it_was() -> None:
    """The same tensors with the same values at every name, also where a module has several."""
    model = randomised(Shared()).eval()
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    before = [(name, value, value.clone()) for name, value in named]
    training = {name: m.training for name, m in model.named_modules()}
    result = pruned(model, torch.randn(4, 6))
    assert result.plan.groups
    for _ in range(2):
        agrees(result)
    after = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert [name for name, _ in after] == [name for name, _, _ in before]
    for (_, now), (_, then, value) in zip(after, before, strict=True):
        assert now is then
        assert torch.equal(now, value)
    assert {name: m.training for name, m in model.named_modules()} == training


class Shrinking(nn.Module):
    """Pools over a window that it makes smaller for good as soon as an input is smaller, as some Swins do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.window = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), 4

    def forward(self, x: Tensor) -> Tensor:
        self.window = min(self.window, x.size(-1) // 2)
        out: Tensor = self.b(F.max_pool2d(torch.relu(self.a(x)), self.window, 1))
        return out


def test_a_model_that_changes_itself_is_restored() -> None:
    """Other sizes make the window of the user's model smaller; each comparison starts from the model as it was."""
    model = randomised(Shrinking()).eval()
    result = pruned(model, torch.randn(2, 3, 8, 8))
    smaller, same = (
        verify.Unseen("small", (torch.randn(2, 3, 4, 4),), {}),
        verify.Unseen("values", (torch.randn(2, 3, 8, 8),), {}),
    )
    found = silence(result, inputs=[smaller, same], each=False)
    assert "values" in found.inputs and model.window == 4
    assert max(silence(result, inputs=[same]).errors.values()) < EXACT


class Hooked(nn.Module):
    """Features are taken by a hook that holds the module itself, so that a copy would not share them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.seen: list[Tensor] = []
        self.a.register_forward_hook(lambda module, given, out: self.seen.append(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b(torch.relu(self.a(x))))
        out: Tensor = self.c(y + self.seen.pop())
        return out


class Plain(Hooked):
    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        self.seen.clear()
        out: Tensor = self.c(torch.relu(self.b(torch.relu(first))) + first)
        return out


def test_hooks_see_the_model_that_is_run() -> None:
    """The graph of a model without hooks, compared with the same function written with a hook."""
    torch.manual_seed(0)
    hooked, plain = Hooked().eval(), Plain().eval()
    plain.load_state_dict(hooked.state_dict())
    plain.a._forward_hooks.clear()
    result = pruned(plain, torch.randn(4, 6))
    agrees(result, captured=dataclasses.replace(result.analysis.captured, model=hooked))


def test_a_model_without_values_cannot_be_verified() -> None:
    model, x = NETS["mlp"]()
    plan = Plan(fxmerge.Options(), ())
    found = fxmerge.analyze(model.to("meta"), x)
    with pytest.raises(FxMergeError, match="no values to verify"):
        verify.silence(found.captured, found.facts, found.grouping, plan)


class Rounded(nn.Module):
    """Activations on a grid, as quantization will have them."""

    def __init__(self, by_channel: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.by_channel = by_channel
        self.register_buffer("scale", torch.full((8,), 1e-3))
        self.register_buffer("zero", torch.zeros(8, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fake_quantize_per_tensor_affine(torch.relu(self.a(x)), 1e-3, 0, -32768, 32767)
        y = self.b(y)
        if self.by_channel:
            y = torch.fake_quantize_per_channel_affine(y, self.scale, self.zero, 1, -32768, 32767)
        return self.c(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("route", ["symbolic", "exported"])
def test_fake_quantization(route: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Oracles run in float64; where an op does not, they say so, and torch.fx prints nothing."""
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    for by_channel in (False, True):
        model: Any = Rounded(by_channel).eval()
        model = torch.export.export(model, (x,)).module() if route == "exported" else model
        result = plain_merge(model, x, ratio=0.5, decomposition="prune")
        found = result.analysis
        given = (found.captured, found.facts, found.grouping)
        capfd.readouterr()
        verify.duplicate(*given)
        silence = verify.silence(*given, result.plan)
        if not by_channel:
            assert max(verify.permutation(*given).values()) < 1e-9 and max(silence.errors.values()) < 1e-9
            continue
        assert set(silence.left_out) == {"a"}
        for oracle in (verify.permutation, verify.overcoupling):
            with pytest.raises(FxMergeError, match=r"does not run in float64.*Scale must be Float"):
                oracle(*given)
        assert not capfd.readouterr().err
