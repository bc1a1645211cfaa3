"""Every rule in every spelling: grouped or pinned as it must be, permuted freely, pruned exactly."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxmerge
from fxmerge import verify
from fxmerge.analysis import literal_sizes
from fxmerge.graph import compare
from fxmerge.rules import lookup
from tests.helpers.masking import masked_by_hand
from tests.helpers.netmaking import one_thread, plain_merge, raw  # noqa: F401
from tests.helpers.rotation import rotation_errors
from tests.helpers.rule_samples import SAMPLES
from tests.helpers.sandwich import Sample, spelled
from tests.helpers.silencing import error_of_silence

pytestmark = pytest.mark.usefixtures("one_thread")

SPELLINGS = list(lookup.spellings())


def spellings_of(chosen: Callable[[fxmerge.Rule], bool]) -> pytest.MarkDecorator:
    rows = [(key, rule, f"{rule.name}-{lookup.describe(one)}") for key, rule, one in SPELLINGS if chosen(rule)]
    return pytest.mark.parametrize(("key", "rule"), [row[:2] for row in rows], ids=[row[2] for row in rows])


def speaks_of_factors(rule: fxmerge.Rule) -> bool:
    return rule.kind in ("per_channel", "movement") and isinstance(rule.commutes, bool)


every_spelling = spellings_of(lambda _: True)


def sample_of(key: Any, rule: fxmerge.Rule) -> Sample:
    if key == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    assert rule.name in SAMPLES, f"the rule {rule.name} has no sample: add a row to tests/helpers/rule_samples.py"
    return SAMPLES[rule.name](key)


def test_no_sample_without_a_rule() -> None:
    assert set(SAMPLES) == set(fxmerge.RULES)


@every_spelling
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
def test_spelling(key: Any, rule: fxmerge.Rule) -> None:
    """The op stands in the graph as spelled, its group permutes freely, and pruning is masking by hand. Whatever
    path is taken for linear, any rotation of its channels leaves the outputs as they are.
    """
    sample = sample_of(key, rule)
    model, x = sample.make()
    result = plain_merge(model, x, decomposition="prune", ratio=0.5)
    found = result.analysis
    targets = [
        type(found.captured.module.get_submodule(str(n.target))) if n.op == "call_module" else n.target
        for n in found.captured.module.graph.nodes
    ]
    assert key in targets or any(lookup.rule_of_target(t) is rule for t in targets if callable(t))
    rotated = rotation_errors(found)
    bound = 1e-10 if sample.double and rule.name != "identity" else 0.03  # identity may be a cast to half precision
    assert all(error < bound for error in rotated.values()), rotated
    if rule.linear is not True and rule.kind in ("per_channel", "tie") and not callable(rule.linear):
        assert "producer" not in rotated
    merged = [p.name for p in result.plan.groups]
    reasons = {r.name: r.reason for r in result.report.refusals}
    if not sample.merged:
        assert "producer" not in merged
        assert sample.reason in reasons["producer"]
        return
    assert "producer" in merged, reasons
    if sample.double:
        assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10
    if sample.exact:
        error = compare.difference([masked_by_hand(result, x)], compare.outputs(result.module, (x,)))
        assert error < (1e-10 if sample.double else 1e-5)
    else:
        assert all(g.mixers for g in found.groups if g.name == "producer")


@spellings_of(speaks_of_factors)
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
def test_commutes(key: Any, rule: fxmerge.Rule) -> None:
    """`commutes` is True for just those per-channel ops that a positive factor passes."""
    sample = sample_of(key, rule)
    model, x = sample.make()
    with torch.no_grad():
        model.input = x
        before = sample.before(model.producer(x))
        errors = []
        for scale in (0.25, 2.0, 8.0):  # powers of two, so that a cast to half precision does not round otherwise
            one, other = sample.op(model, scale * before), scale * sample.op(model, before.clone())
            errors.append(compare.difference([one], [other]))
    assert (max(errors) < 1e-10) == rule.commutes


@pytest.mark.parametrize("name", [r.name for r in fxmerge.RULES.values() if r.linear is True and r.kind != "tie"])
def test_linear_ops_are_found_to_be(name: str) -> None:
    keys = [key for key, rule, _ in SPELLINGS if rule.name == name and key != "cuda"]
    assert any("producer" in rotation_errors(fxmerge.analyze(*SAMPLES[name](key).make())) for key in keys)


def test_softmax_over_the_channels_is_a_mixer() -> None:
    model, x = spelled("softmax", 1).make()
    result = plain_merge(model, x, ratio=0.5)
    group = result.analysis.groups[0]
    assert group.mixers == ("softmax",)
    assert not group.internal
    assert group.scale_blocks
    with pytest.raises(fxmerge.FxMergeError, match="matches no group"):
        plain_merge(model, x, keep={"nothing": 1})
    assert plain_merge(model, x, scope="internal").plan.groups == ()


@pytest.mark.parametrize("op", ["mean", "sum", "amax", "std", "logsumexp"])
def test_a_reduction_over_the_channels_is_a_mixer(op: str) -> None:
    """Any order of the channels is as good, but one that goes is missed by the result."""
    sample = Sample(lambda m, x: x * getattr(x, op)(1, keepdim=True))
    result = plain_merge(*sample.make(), ratio=0.5)
    found = result.analysis
    assert [(g.name, len(g.mixers), g.internal) for g in found.groups] == [("producer", 1, False)]
    assert len(result.plan.groups[0].kept) == 4
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


class Stacked(nn.Module):
    """Three layers, stacked along some axis, and reduced over it."""

    def __init__(self, step: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.layers, self.step = nn.ModuleList(nn.Conv1d(4, 8, k, padding=k // 2) for k in (1, 3, 5)), step
        self.head = nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.step([torch.relu(layer(x)) for layer in self.layers]))
        return y


STACKS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "first": lambda t: torch.stack(t).amax(0),
    "before the channels": lambda t: torch.max(torch.stack(t, 1), 1)[0],
    "last": lambda t: torch.max(torch.stack(t, 3), 3)[0],
    "last, of tokens": lambda t: torch.stack([h.mT for h in t], -1).mean(-1).mT,
    "kept": lambda t: torch.stack(t, -1).sum(-1, keepdim=True).squeeze(-1),
}


@pytest.mark.parametrize("axis", STACKS)
def test_a_reduction_over_stacked_layers_leaves_one_channel_of_each(axis: str) -> None:
    torch.manual_seed(0)
    model, x, unseen = Stacked(STACKS[axis]), torch.randn(2, 4, 6), torch.randn(3, 4, 9)
    error, result = error_of_silence(model, x, unseen, ratio=0.5)
    assert error < 1e-6
    assert [(g.name, len(g.kept)) for g in result.plan.groups] == [("layers.0", 4)]
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-5


MUST_STAY: dict[str, tuple[Sample, str]] = {
    "one channel": (spelled("select", 1, 3, reads=4, flat=True), "sizes at select cannot follow"),
    "an index list": (Sample(lambda m, x: x[:, [0, 2, 5]], reads=3), "sizes at getitem cannot follow"),
    "a size in a module": (spelled(nn.Unflatten, 1, (2, 4), then=lambda x: x.flatten(1, 2)), "sizes at part cannot"),
    "a computed weight": (
        Sample(lambda m, x: F.conv2d(x, m.w * x.mean()), parts={"w": raw(8, 8, 1, 1)}),
        "conv2d has a weight that is computed",
    ),
}


@pytest.mark.parametrize("what", MUST_STAY)
def test_what_cannot_follow_stays(what: str) -> None:
    """Channels that an op cannot do without stay, with the reason and the source line."""
    sample, reason = MUST_STAY[what]
    model, x = sample.make()
    result = plain_merge(model, x, ratio=0.5, decomposition="prune")
    assert result.plan.groups == ()
    assert result.report.verdict.error == 0
    refused = [r for r in result.report.refusals if r.name.startswith("producer")]
    assert any(reason in r.reason for r in refused), refused
    assert all(".py:" in r.where for r in refused)


def test_channels_taken_one_by_one_stay() -> None:
    model, x = spelled("unbind", 1, then=lambda p: p[0] + p[5], reads=4, flat=True).make()
    result = plain_merge(model, x, ratio=0.5)
    assert result.plan.groups == ()
    assert result.report.verdict.error == 0


@pytest.mark.parametrize("where", ["buffer", "forward"])
def test_a_constant_per_channel_follows(where: str) -> None:
    """Whether it is a buffer, or a tensor made in forward, which the trace makes a buffer."""
    ones = torch.ones(8, 1, 1, dtype=torch.float64)
    model, x = Sample(lambda m, x: x + (m.c if where == "buffer" else ones), parts={"c": ones}).make()
    result = plain_merge(model, x, ratio=0.5)
    assert [p.name for p in result.plan.groups] == ["producer"]
    sizes = {n.target: result.module.get_buffer(n.target).shape for n in result.module.graph.find_nodes(op="get_attr")}
    assert list(sizes.values()) == [(4, 1, 1)]


def test_a_rule_for_one_activation_takes_no_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fxmerge.RULES, "zeta", fxmerge.per_channel("zeta", torch.special.zeta))
    model, x = Sample(lambda m, x: torch.special.zeta(x.exp() + 1, x.exp())).make()
    refused = {r.name: r.reason for r in fxmerge.analyze(model, x).refusals}
    assert "zeta takes more than one activation" in refused["producer"]


class Gate(nn.Module):
    """A leaf that fxmerge has never heard of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def _bessel(m: Any, x: Any) -> Any:
    return torch.special.bessel_j1(x)


def _renorm(m: Any, x: Any) -> Any:
    return torch.renorm(x, 2, 1, 1.0)


UNKNOWN: dict[str, tuple[Callable[[Any, Any], Any], str]]
UNKNOWN = {"bessel": (_bessel, "bessel"), "renorm": (_renorm, "renorm")}


@pytest.mark.parametrize("op", UNKNOWN)
def test_an_unknown_op_pins_and_says_where(op: str) -> None:
    function, named = UNKNOWN[op]
    model, x = Sample(function).make()
    found = fxmerge.analyze(model, x)
    assert found.groups == ()
    refusal = next(r for r in found.refusals if r.name == "producer")
    assert named in refusal.reason
    assert "has no rule" in refusal.reason
    assert refusal.channels == 8
    line = function.__code__.co_firstlineno + 1
    assert f"test_rules.py:{line}" in refusal.where, refusal.where
    assert "torch." in refusal.where


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, Gate) or super().is_leaf_module(m, qualified_name)


def gated() -> tuple[fx.GraphModule, Tensor]:
    model, x = Sample(lambda m, x: m.gate(x), parts={"gate": Gate()}).make()
    return fx.GraphModule(model, LeafTracer().trace(model)), x


def test_an_unknown_leaf_pins_until_a_rule_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = gated()
    refusal = next(r for r in fxmerge.analyze(model, x).refusals if r.name == "producer")
    assert "Gate" in refusal.reason
    assert "has no rule" in refusal.reason
    monkeypatch.setitem(fxmerge.RULES, "gate", fxmerge.per_channel("gate", Gate))
    result = plain_merge(model, x, ratio=0.5)
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("producer", 4)]
    found = result.analysis
    assert max(verify.permutation(found.captured, found.facts, found.grouping).values()) < 1e-10


def test_a_subclass_is_known_by_the_forward_it_inherits() -> None:
    class Mine(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).flip(1)

    for cls, known in ((Mine, True), (Other, False)):
        model, x = Sample(lambda m, x: m.part(x), parts={"part": cls(8, 8, 3, padding=1)}).make()

        class Leaf(fx.Tracer):
            def is_leaf_module(self, m: nn.Module, name: str) -> bool:
                return isinstance(m, nn.Conv2d)

        found = fxmerge.analyze(fx.GraphModule(model, Leaf().trace(model)), x)
        assert ("producer" in {g.name for g in found.groups}) == known


def test_a_module_with_hooks_is_pinned() -> None:
    """In a graph that the user has traced; where fxmerge traces, hooks are followed (see tests/capture)."""
    model, x = Sample(lambda m, x: m.part(x), parts={"part": nn.Conv2d(8, 8, 1)}).make()
    traced = fx.symbolic_trace(model)
    traced.get_submodule("part").register_forward_hook(lambda module, args, out: out.flip(1))
    refused = {r.name: r.reason for r in fxmerge.analyze(traced, x).refusals}
    assert "has forward hooks" in refused["producer"]


class Unfollowable(nn.Module):
    """Several pairs of layers between which sizes cannot follow, one apart from the other."""

    def __init__(self, pairs: int) -> None:
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(5, 8) for _ in range(pairs))
        self.out = nn.ModuleList(nn.Linear(3, 5) for _ in range(pairs))

    def forward(self, x: Tensor) -> Tensor:
        for into, out in zip(self.into, self.out, strict=True):
            x = out(F.relu(into(x))[:, [0, 2, 5]])
        return x


def test_sizes_that_cannot_follow_are_found_in_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, each with its own node and reason."""
    runs, narrowing = 0, importlib.import_module("fxmerge.analysis.grouping")

    def counted(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        return literal_sizes.recompute(*args)

    monkeypatch.setattr(narrowing, "recompute", counted)
    result = plain_merge(Unfollowable(6).eval(), torch.randn(2, 5), ratio=0.5, decomposition="prune")
    refused = {r.name: r.reason for r in result.report.refusals}
    assert [refused[f"into.{i}"].split()[3] for i in range(6)] == ["getitem", *(f"getitem_{i}" for i in range(1, 6))]
    assert [p.name for p in result.plan.groups] == [f"out.{i}" for i in range(5)]
    assert runs == 2


@pytest.mark.parametrize("guilty", [{"2.0"}, {"0.0", "3.0"}])
def test_sizes_of_unknown_origin_refuse_the_groups_that_make_them_wrong(
    guilty: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that names no labels is traced by trial, and the other groups are merged."""
    grouping = importlib.import_module("fxmerge.analysis.grouping")
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(5))).eval()
    found = fxmerge.analyze(model, torch.randn(2, 5))
    atoms = {g.name: g.atoms for g in found.groups}

    def fails(captured: Any, facts: Any, alive: Tensor) -> Any:
        atom = found.grouping.atom
        dead = {name for name, inside in atoms.items() if not bool(alive[torch.isin(atom, inside)].all())}
        wrong = dead & guilty
        return {}, [
            literal_sizes.Failure("output", torch.zeros(0, dtype=torch.int64), "cannot follow")
        ] if wrong else []

    monkeypatch.setattr(grouping, "recompute", fails)
    chosen = [(g, torch.arange(1)) for g in found.groups]
    left, _, reasons = grouping.provable(found.captured, found.facts, found.grouping, chosen)
    assert {r.name for r in reasons} == guilty
    assert {g.name for g, _ in left} == set(atoms) - guilty
