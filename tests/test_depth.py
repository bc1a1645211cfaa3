"""Depth: residual branches that are dropped as a whole, against nets in which it is known what they contribute."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError, Options, Plan, pipeline
from fxmerge.analysis.branches import branches
from fxmerge.analysis.grouping import grouped
from fxmerge.analysis.propagate import provenance
from fxmerge.calibration.branch_losses import measured
from fxmerge.calibration.paired_run import Settings
from fxmerge.capture.capture_model import capture
from fxmerge.graph.cost import cost, flops_by_node
from fxmerge.graph.latency import Timing
from fxmerge.ir.branches import Branch, Measured
from fxmerge.planning import budget
from fxmerge.planning.depth import in_order, searched
from fxmerge.rewrite.branches import without_branches
from tests.helpers.netmaking import Net, conv, one_thread, plain_merge, randomised  # noqa: F401
from tests.helpers.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """A layer of a transformer: with its norms before the branches, or after the adds."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.attn, self.mlp, self.first = Attention(width, 2), Mlp(width, 16), first
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Transformer(nn.Module):
    def __init__(self, first: bool = True, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layers = nn.ModuleList(Layer(8, first) for _ in range(count))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """A block of a ResNet, with everything in place that can be."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(into, out, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = conv(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.layer1, self.layer2 = nn.Sequential(Block(6, 6), Block(6, 6)), nn.Sequential(Block(6, 8), Block(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(F.relu(self.stem(x)))).mean((2, 3)))


def made(model: nn.Module, seed: int = 0) -> nn.Module:
    return randomised(model, seed).eval()


def scaled(layer: nn.Module, factor: float) -> None:
    """Scales what a layer adds to its stream."""
    with torch.no_grad():
        for value in layer.parameters(recurse=False):
            value.mul_(factor)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TOKENS, IMAGES = drawn(4, 6, 5), drawn(4, 3, 8, 8)


def elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def apart(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        expected = one(x)
        return float((other(x) - expected).norm() / expected.norm())


def found_in(model: nn.Module, x: Tensor) -> tuple[dict[str, Branch], str]:
    captured = capture(model, x)
    found, why = branches(captured, provenance(captured))
    return {branch.name: branch for branch in found}, why


# What is a branch


def hidden_is_read(m: Any, x: Tensor) -> Any:
    hidden = F.relu(m.a(x))
    return m.head(x + m.b(hidden)), hidden


def read_twice(m: Any, x: Tensor) -> Tensor:
    y = m.b(F.relu(m.a(x)))
    return m.head(x + y) + y.mean(-1, keepdim=True)


def parallel(m: Any, x: Tensor) -> Tensor:
    """As in GPT-J: both branches read one norm."""
    y = m.norm(x)
    return m.head(x + m.a(y) + m.b(y))


def scaled_and_dropped_out(m: Any, x: Tensor) -> Tensor:
    return m.head(x + m.drop(m.gamma * m.b(F.relu(m.a(x)))))


def subtracted(m: Any, x: Tensor) -> Tensor:
    return m.head(x - m.b(F.relu(m.a(x))))


def doubled(m: Any, x: Tensor) -> Tensor:
    return m.head(torch.add(x, m.b(F.relu(m.a(x))), alpha=2))


def embedded(m: Any, x: Tensor) -> Tensor:
    """A sum of two embeddings is not residual, though both are of the same positions."""
    positions = x.argsort(-1)
    return m.head(m.a(positions) + m.b(positions))


def broadcast(m: Any, x: Tensor) -> Tensor:
    return m.head(x + m.b(F.relu(m.a(x.mean(1, keepdim=True)))))


def reused(m: Any, x: Tensor) -> Tensor:
    """The keys of the first branch are read again by the second one, which alone can be dropped."""
    key = m.a(x)
    x = x + m.b(F.relu(key))
    return m.head(x + m.c(F.relu(key)))


def nested(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y + m.b(F.relu(y))
    return m.head(x + m.c(y))


def twice(m: Any, x: Tensor) -> Tensor:
    """One weight in two branches, as in ALBERT."""
    x = x + m.a(F.relu(x))
    return m.head(x + m.a(F.relu(x)))


def written_to(m: Any, x: Tensor) -> Tensor:
    x = m.c(x)
    y = x + m.b(F.relu(m.a(x)))
    x.mul_(2)
    return m.head(y + x)


def parts(wide: int = 8, **more: Any) -> dict[str, nn.Module]:
    return {"a": nn.Linear(wide, wide), "b": nn.Linear(wide, wide), "head": nn.Linear(8, 3), **more}


@pytest.mark.parametrize(("wiring", "held", "names"), [
    (hidden_is_read, parts(), []),
    (read_twice, parts(), []),
    (parallel, parts(norm=nn.LayerNorm(8)), ["a", "b"]),
    (scaled_and_dropped_out, parts(drop=nn.Dropout(), gamma=nn.Parameter(torch.ones(8))), ["a to b"]),
    (subtracted, parts(), []),
    (doubled, parts(), []),
    (embedded, {"a": nn.Embedding(8, 8), "b": nn.Embedding(8, 8), "head": nn.Linear(8, 3)}, []),
    (broadcast, parts(), []),
    (reused, parts(c=nn.Linear(8, 8)), ["c"]),
    (nested, parts(c=nn.Linear(8, 8)), ["b", "a to c"]),
    (twice, parts(), ["a at add", "a at add_1"]),
    (written_to, parts(c=nn.Linear(8, 8)), []),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_what_is_a_branch(wiring: Callable[[Any, Tensor], Any], held: dict[str, Any], names: list[str]) -> None:
    found, why = found_in(Net(wiring, **held).eval(), drawn(4, 6, 8))
    assert list(found) == names
    assert bool(why) == (not names)


def test_branches_of_a_transformer_and_a_resnet() -> None:
    for first in (True, False):
        found, _ = found_in(Transformer(first), TOKENS)
        assert list(found) == [f"layers.{n}.{part}" for n in range(3) for part in ("attn", "mlp")]
        assert ("layers.0.norm1" in found["layers.0.attn"].layers) == first  # a norm after the add stays
    found, _ = found_in(ResNet().eval(), IMAGES)
    assert list(found) == ["layer1.0", "layer1.1", "layer2.0.conv1 to layer2.0.conv2", "layer2.0.down", "layer2.1"]
    one, other = (found[name] for name in ("layer2.0.down", "layer2.0.conv1 to layer2.0.conv2"))
    assert one.overlaps(other)
    assert not one.overlaps(found["layer2.1"])


# What they cost and lose


class Without(nn.Module):
    """A module in whose place its mean output over these inputs stands."""

    def __init__(self, inner: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.inner, self.mean = inner, mean

    def forward(self, x: Tensor) -> Tensor:
        return self.mean.expand_as(self.inner(x)).clone()


def dropped_by_hand(model: nn.Module, path: str, x: Tensor, axes: tuple[int, ...]) -> nn.Module:
    """The model with a module that ends a branch replaced by its mean, found by a hook."""
    seen: list[Tensor] = []
    model = copy.deepcopy(model)
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda *call: seen.append(call[2].detach().clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    model.set_submodule(path, Without(module, seen[0].mean(axes, keepdim=True)))
    return model


@pytest.mark.parametrize(("model", "x", "ends", "axes"), [
    (Transformer(), TOKENS, {"layers.0.attn": "layers.0.attn.o", "layers.1.mlp": "layers.1.mlp"}, (0, 1)),
    (Transformer(first=False), TOKENS, {"layers.2.attn": "layers.2.attn.o", "layers.0.mlp": "layers.0.mlp"}, (0, 1)),
    (ResNet(), IMAGES, {
        "layer1.0": "layer1.0.bn2", "layer2.0.conv1 to layer2.0.conv2": "layer2.0.bn2", "layer2.1": "layer2.1.bn2",
    }, (0, 2, 3)),
], ids=["pre-norm", "post-norm", "resnet"])  # fmt: skip
def test_losses_and_costs(model: nn.Module, x: Tensor, ends: dict[str, str], axes: tuple[int, ...]) -> None:
    """Against the user's own model with the branch's mean in its place."""
    model = made(model)
    captured = capture(model, x)
    facts, flops = provenance(captured), flops_by_node(captured.module, captured.inputs)
    known = branches(captured, facts)[0]
    settings = Settings(rows=100, seed=0, held=False, reduce=lambda t: t)
    found = {m.name: m for m in measured(captured, facts, known, [[x]], settings, flops=flops)}
    assert list(found) == [branch.name for branch in known]
    with torch.no_grad():
        y = model(x)
        for name, end in ends.items():
            z = dropped_by_hand(model, end, x, axes)(x)
            loss = float((z - y).square().sum() / (y - y.mean()).square().sum())
            assert found[name].loss == pytest.approx(loss, 1e-4)
            without = without_branches(captured, facts, [found[name]], flops).module
            assert torch.allclose(without(x), z, atol=1e-5 * float(y.abs().max()))
            if isinstance(model, Transformer):
                assert found[name].parameters == elements(model.get_submodule(name)) + 16 * model.layers[0].first


def one(name: str, loss: float, parameters: int, **more: Any) -> Measured:
    branch = Branch(**{"name": name, "add": f"add {name}", "end": "", "nodes": (name,), "layers": ()} | more)
    return Measured(branch=branch, level=None, loss=loss, parameters=parameters, flops=10 * parameters)


def test_order() -> None:
    """By loss per cost; what overlaps a branch before it, or what does not fit, is left out."""
    some = [one("a", 3.0, 10), one("b", 1.0, 10), one("c", 1.0, 20), one("d", 0.1, 60), one("e", 0.0, 0),
            one("f", 5.0, 5, nodes=("c", "f"))]  # fmt: skip
    assert [m.name for m in in_order(some, "params", 100, 0.5)] == ["c", "b", "a"]
    assert [m.name for m in in_order(some, "params", 100, 0.7)] == ["c", "b"]
    assert [m.name for m in in_order(some, "flops", 1000, 0.3)] == ["d", "b"]
    assert in_order(some, "params", 100, 1) == []


@pytest.mark.parametrize(("errors", "most", "least"), [
    ([5, 4, 3, 2, 1, 2, 3, 4, 5], 8, 4),
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], 8, 0),
    ([math.inf] * 7 + [1, 2], 8, 7),
    ([3, 2, 1, 0, 4, 5, 6], 6, 3),
    ([2, 1], 1, 1),
])  # fmt: skip
def test_search(errors: list[float], most: int, least: int) -> None:
    tried: list[int] = []

    def error(number: int) -> float:
        tried.append(number)
        return errors[number]

    found = searched(error, most)
    assert min(found, key=lambda n: found[n]) == least
    assert len(tried) == len(set(tried)) == len(found)
    assert tried[0] == 0
    if least == 0:
        assert max(tried) <= 2  # it stops where more branches bring nothing


# Merges


def share_without(model: nn.Module, gone: int) -> float:
    return 1 - gone / elements(model)


@pytest.mark.parametrize("first", slow_but([True], [True, False]), ids=["pre-norm", "post-norm"])
def test_branches_of_a_transformer_that_add_nothing(first: bool) -> None:
    """They are dropped, no channel is, and the outputs stay."""
    model = made(Transformer(first))
    scaled(model.layers[1].mlp.fc2, 0)
    scaled(model.layers[2].attn.o, 0)
    gone = elements(model.layers[1].mlp) + elements(model.layers[2].attn) + 32 * first
    result = fxmerge.merge(model, TOKENS, budget={"params": share_without(model, gone)}, depth=True, samples=32)
    assert set(result.plan.branches) == {"layers.1.mlp", "layers.2.attn"}
    assert not result.plan.groups
    assert elements(result.module) == elements(model) - gone
    assert not [n for n in result.module.state_dict() if n.startswith(("layers.1.mlp.", "layers.2.attn."))]
    assert apart(model, result.module, drawn(7, 4, 5, seed=1)) < 1e-6
    assert result.report.spent is not None
    assert result.report.spent.met


@pytest.mark.slow
def test_a_block_of_a_resnet_that_adds_nothing() -> None:
    """relu(x + f(x)), added and rectified in place; flops this time, and channels of the rest are merged as well."""
    model = made(ResNet())
    scaled(model.layer1[1].bn2, 0)
    result = fxmerge.merge(model, IMAGES, budget={"flops": 0.7}, depth=True, calibration=drawn(32, 3, 8, 8, seed=2))
    assert result.plan.branches[0] == "layer1.1"
    assert result.report.spent is not None
    assert result.report.spent.met
    alone = fxmerge.merge(model, IMAGES, budget={"flops": 0.7}, calibration=drawn(32, 3, 8, 8, seed=2))
    new = drawn(64, 3, 8, 8, seed=3)
    assert apart(model, result.module, new) < apart(model, alone.module, new)


@pytest.mark.slow
def test_a_constant_branch_leaves_its_mean() -> None:
    """Dropped without a trace: its mean takes its place, unless no layer may have a new bias."""
    model = made(Transformer())
    with torch.no_grad():
        model.layers[1].mlp.fc2.weight.zero_()
    budget = {"params": share_without(model, elements(model.layers[1].mlp) + 16 - 8)}
    result = plain_merge(model, TOKENS, budget=budget, depth=True)
    assert result.plan.branches == ("layers.1.mlp",)
    assert apart(model, result.module, drawn(7, 4, 5, seed=1)) < 1e-6
    level = result.module.get_parameter("layers.1.mean_of_mlp")
    assert torch.allclose(level, model.layers[1].mlp.fc2.bias, atol=1e-6)
    bare = plain_merge(model, TOKENS, budget=budget, depth=True, new_biases=False)
    assert bare.plan.branches != ("layers.1.mlp",)
    assert not [name for name in bare.module.state_dict() if "mean_of" in name]


@pytest.mark.parametrize(("model", "x", "names"), [
    (Transformer(), TOKENS, ("layers.1.mlp", "layers.0.attn")),
    (ResNet(), IMAGES, ("layer1.0", "layer2.0.conv1 to layer2.0.conv2")),
], ids=["transformer", "resnet"])  # fmt: skip
def test_the_oracles_hold_without_branches(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> None:
    """The means that take the branches' places have the channels of the stream that they are added to."""
    captured = capture(made(model), x)
    facts, flops = provenance(captured), flops_by_node(captured.module, captured.inputs)
    known = {branch.name: branch for branch in branches(captured, facts)[0]}
    settings = Settings(rows=100, seed=0, held=False, reduce=lambda t: t)
    found = measured(captured, facts, [known[name] for name in names], [[x]], settings, flops=flops)
    cut = without_branches(captured, facts, found, flops)
    assert sum(layer.op == "offset" for layer in provenance(cut).layers) == len(names)
    assert len(captured.module.graph.nodes) > len(cut.module.graph.nodes)
    narrower, grouping = grouped(cut, provenance(cut), "width")
    errors = fxmerge.verify.permutation(cut, narrower, grouping)
    assert errors
    assert max(errors.values()) < 1e-12


def test_layer_scale_and_dropout() -> None:
    gamma = nn.Parameter(torch.full((8,), 1e-9))
    model = Net(scaled_and_dropped_out, **parts(drop=nn.Dropout(), gamma=gamma)).eval()
    x = drawn(4, 6, 8)
    result = plain_merge(model, x, budget={"params": share_without(model, 2 * 72 + 8)}, depth=True)
    assert result.plan.branches == ("a to b",)
    assert apart(model, result.module, x) < 1e-6


@pytest.mark.slow
def test_nothing_is_dropped_that_is_needed() -> None:
    """Half of the channels are copies, which are merged without any loss, and all branches matter."""
    model = made(Transformer())
    for layer in model.layers:
        with torch.no_grad():
            layer.mlp.fc1.weight[8:], layer.mlp.fc1.bias[8:] = layer.mlp.fc1.weight[:8], layer.mlp.fc1.bias[:8]
    gone = 3 * (8 * 9 + 64)
    given: dict[str, Any] = {"budget": {"params": share_without(model, gone)}, "samples": 64, "ignore": ("*.attn",)}
    result = fxmerge.merge(model, TOKENS, depth=True, **given)
    assert result.plan.branches == ()
    same(result.module, fxmerge.merge(model, TOKENS, **given).module)
    assert any(note.startswith("depth: 0 of the ") for note in result.report.notes)


def same(one: nn.Module, other: nn.Module) -> None:
    """The same tensors, bit by bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_the_whole_budget_changes_nothing() -> None:
    model = made(Transformer())
    scaled(model.layers[1].mlp.fc2, 0)
    result = fxmerge.merge(model, TOKENS, budget={"params": 1.0}, depth=True)
    assert result.plan.branches == ()
    same(result.module, fxmerge.merge(model, TOKENS, budget={"params": 1.0}).module)
    with torch.no_grad():
        assert torch.equal(result.module(TOKENS), model(TOKENS))


@pytest.fixture(scope="module")
def dropped() -> tuple[nn.Module, fxmerge.Result]:
    """A transformer that lost a branch and some channels, refitted."""
    model = made(Transformer())
    scaled(model.layers[1].mlp.fc2, 0.02)
    scaled(model.layers[0].attn.o, 0.02)
    given: dict[str, Any] = {"budget": {"params": 0.5}, "depth": True, "calibration": drawn(64, 6, 5, seed=4)}
    return model, fxmerge.merge(model, TOKENS, **given)


@pytest.mark.slow
def test_refit_aims_at_the_whole_model(dropped: tuple[nn.Module, fxmerge.Result]) -> None:
    """Later layers make good what the branches gave, so that refit is closer than the same plan without refit."""
    model, result = dropped
    assert "layers.1.mlp" in result.plan.branches
    bare = fxmerge.apply(Plan(result.plan.options.replace(refit="none"), result.plan.groups, result.plan.branches),
                         model, TOKENS)  # fmt: skip
    new = drawn(64, 6, 5, seed=5)
    assert apart(model, result.module, new) < 0.7 * apart(model, bare.module, new)
    assert result.report.verdict.error == pytest.approx(apart(model, result.module, TOKENS), rel=1e-3)


def test_refit_begins_at_a_dropped_branch() -> None:
    """Though no channel is dropped, and so no weight has changed before it."""
    model = made(Transformer())
    scaled(model.layers[0].mlp.fc2, 0.3)
    share = share_without(model, elements(model.layers[0].mlp) + 16 - 8)
    plan = Plan(Options(budget={"params": share}, depth=True, refit="calibration"), (), ("layers.0.mlp",))
    result = fxmerge.apply(plan, model, TOKENS, calibration=drawn(256, 6, 5, seed=4))
    assert not result.plan.groups
    bare = fxmerge.apply(Plan(plan.options.replace(refit="none"), (), plan.branches), model, TOKENS)
    new = drawn(64, 6, 5, seed=5)
    assert apart(model, result.module, new) < 0.9 * apart(model, bare.module, new)


def test_the_plan_is_replayed(dropped: tuple[nn.Module, fxmerge.Result]) -> None:
    model, result = dropped
    plan = Plan.from_json(result.plan.json())
    assert plan == result.plan
    same(fxmerge.apply(plan, model, TOKENS, calibration=drawn(64, 6, 5, seed=4)).module, result.module)
    other = fxmerge.apply(Plan(plan.options.replace(refit="none"), plan.groups, plan.branches),
                          made(Transformer(), seed=1), TOKENS)  # fmt: skip
    assert other.plan.branches == plan.branches
    shapes = {name: value.shape for name, value in result.module.state_dict().items()}
    assert {name: value.shape for name, value in other.module.state_dict().items()}.items() <= shapes.items()
    with pytest.raises(FxMergeError, match=r"the branch layers\.9\.mlp, which does not exist .* layers\.0\.attn"):
        fxmerge.apply(Plan(plan.options, (), ("layers.9.mlp",)), model, TOKENS)
    with pytest.raises(FxMergeError, match="this plan is damaged"):
        Plan.from_json(json.dumps({**json.loads(plan.json()), "branches": "layers.1.mlp"}))
    both = ("layer2.0.conv1 to layer2.0.conv2", "layer2.0.down")
    with pytest.raises(FxMergeError, match="only one of them can be dropped"):
        fxmerge.apply(Plan(plan.options, (), both), made(ResNet()), IMAGES)


def test_written_and_read_back(dropped: tuple[nn.Module, fxmerge.Result], tmp_path: Path) -> None:
    model, result = dropped
    result.save(tmp_path / "folder")
    assert apart(result.module, fxmerge.load(tmp_path / "folder"), TOKENS) < 1e-6
    result.save_program(tmp_path / "net.pt2")
    assert apart(result.module, torch.export.load(tmp_path / "net.pt2").module(), TOKENS) < 1e-6
    assert result.model is None
    text = result.report.text()
    assert "result.model is None: the code of Transformer runs the branches that were dropped: layers." in " ".join(
        text.split()
    )
    with pytest.raises(FxMergeError, match="runs the branches that were dropped"):
        fxmerge.load(tmp_path / "folder", model=model)
    assert "net" in result.report.html() or result.report.mermaid()


def test_the_report_says_what_was_dropped(dropped: tuple[nn.Module, fxmerge.Result]) -> None:
    model, result = dropped
    text, data = " ".join(result.report.text(width=200).split()), json.loads(result.report.json())
    for entry in data["branches"]:
        assert f"dropped {entry['name']}: {entry['parameters']:,} parameters and {entry['flops']:,} FLOPs" in text
        own = model.get_submodule(entry["name"])
        assert entry["parameters"] == elements(own) + 16
        assert set(entry["layers"]) > {f"{entry['name']}.{name}" for name, part in own.named_children()}
    assert [entry["name"] for entry in data["branches"]] == list(result.plan.branches)
    assert data["parameters_before"] == elements(model)
    assert data["parameters_after"] == elements(result.module)
    assert not [r for r in data["refusals"] if r["name"].startswith(result.plan.branches)]
    schema = Path(fxmerge.__file__).parent / "assets" / "report.schema.json"
    pytest.importorskip("jsonschema").Draft202012Validator(json.loads(schema.read_text())).validate(data)


@pytest.mark.parametrize("protected", [{"ignore": ("layers.1.mlp",)}, {"ignore": ("*.fc2",)}, {"keep": {"*fc1": 16}}])
def test_protected_branches_stay(protected: dict[str, Any]) -> None:
    model = made(Transformer())
    scaled(model.layers[1].mlp.fc2, 0)
    result = plain_merge(model, TOKENS, budget={"params": 0.8}, depth=True, **protected)
    assert "layers.1.mlp" not in result.plan.branches
    assert {"layers.1.mlp.fc1.weight", "layers.1.mlp.fc2.weight"} <= set(result.module.state_dict())


def test_nothing_to_drop_is_said() -> None:
    model = Net(subtracted, **parts()).eval()
    result = plain_merge(model, drawn(4, 6, 8), budget={"params": 0.8}, depth=True)
    assert "depth: no branch was dropped: the model has no residual branch that could be dropped" in result.report.notes
    model = made(Transformer())
    result = plain_merge(model, TOKENS, budget={"params": 0.8}, depth=True, keep={"layers.*": 1.0})
    assert any("match a pattern of ignore or keep" in note for note in result.report.notes)
    result = plain_merge(model, TOKENS, budget={"params": 0.95}, depth=True)
    assert any("each costs more than a budget of 95.0% removes" in note for note in result.report.notes)


class Choosing(nn.Module):
    """Its forward depends on values, so that only its parts are traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Transformer(count=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y) if float(y.detach().sum()) > -1e9 else y


def test_a_model_traced_in_parts_keeps_its_branches() -> None:
    result = plain_merge(made(Choosing()), TOKENS, budget={"params": 0.8}, depth=True)
    assert result.plan.branches == ()
    assert any("depth: no branch was dropped: only parts of the model" in note for note in result.report.notes)


def test_messages() -> None:
    with pytest.raises(FxMergeError, match="depth=True needs a budget"):
        fxmerge.merge(Transformer(), TOKENS, depth=True)
    with pytest.raises(FxMergeError, match=r"depth is 'yes'; give True or False"):
        Options(depth="yes")  # type: ignore[arg-type]
    with pytest.raises(FxMergeError, match=r"the budget asks for 1\.0% of the parameters"):
        plain_merge(made(Transformer()), TOKENS, budget={"params": 0.01}, depth=True)
    with pytest.raises(FxMergeError, match="ignore: 'layer' matches no module"):
        plain_merge(made(Transformer()), TOKENS, budget={"params": 0.8}, depth=True, ignore=("layer",))


@pytest.mark.slow
def test_in_a_sweep_and_a_pass() -> None:
    model = made(Transformer())
    scaled(model.layers[1].mlp.fc2, 0)
    share = share_without(model, elements(model.layers[1].mlp) + 16)
    sweep = fxmerge.sweep(model, TOKENS, [1.0, share], kind="params", depth=True, refit="none")
    assert [p.error < 1e-6 for p in sweep.points] == [True, True]
    traced = torch.fx.symbolic_trace(model)
    done = fxmerge.MergePass(Options(budget={"params": share}, depth=True, refit="none"), TOKENS)(traced)
    assert done.modified
    assert elements(done.graph_module) == elements(model) - elements(model.layers[1].mlp) - 16


@pytest.mark.slow
def test_a_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes by FLOPs: the whole model is what all graphs are timed against."""
    model = made(Transformer())
    scaled(model.layers[1].mlp.fc2, 0)
    whole = cost(torch.fx.symbolic_trace(model), [TOKENS]).flops

    def compared(original: nn.Module, other: Any, args: Any, kwargs: Any, seconds: float = 1.0) -> Timing:
        assert cost(original, [TOKENS]).flops == whole  # type: ignore[arg-type]
        return Timing(cost(other, [TOKENS]).flops / whole, 0.001, 1e-3)

    for module in (budget, pipeline):
        monkeypatch.setattr(module, "compared", compared)
    gone = 2 * 8 * 16 * 2 * TOKENS[..., 0].numel() / whole
    result = plain_merge(model, TOKENS, budget={"latency": 1 - gone}, depth=True)
    assert result.plan.branches == ("layers.1.mlp",)
    assert apart(model, result.module, TOKENS) < 1e-6
    assert result.report.spent is not None
    assert result.report.spent.met


def test_weights_on_disk(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = made(Transformer(count=2))
    scaled(model.layers[1].mlp.fc2, 0)
    safetensors.save_file(model.state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"):
        empty = Transformer(count=2).eval()
    stored = fxmerge.on_disk(empty, tmp_path / "w.safetensors")
    share = share_without(model, elements(model.layers[1].mlp) + 16)
    result = plain_merge(stored, TOKENS, budget={"params": share}, depth=True)
    assert result.plan.branches == ("layers.1.mlp",)
    assert apart(model, result.module, TOKENS) < 1e-6


def test_a_graph_of_torch_export() -> None:
    model = made(Transformer(count=2))
    scaled(model.layers[1].mlp.fc2, 0)
    program = torch.export.export(model, (TOKENS,))
    share = share_without(model, elements(model.layers[1].mlp) + 16)
    result = plain_merge(program, None, budget={"params": share}, depth=True)
    assert result.plan.branches == ("layers.1.mlp",)
    assert apart(model, result.module, TOKENS) < 1e-6
    assert apart(model, result.exported().module(), TOKENS) < 1e-6
