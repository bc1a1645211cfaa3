"""Whole experts that leave, against the user's own model whose router cannot choose them."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxmerge
from fxmerge import FxMergeError, Options, Plan
from fxmerge.analysis.mixtures import mixtures
from fxmerge.calibration.expert_losses import losses
from fxmerge.calibration.paired_run import Settings
from fxmerge.graph.cost import flops_by_node
from tests.helpers.mixtures import KINDS, logits, model_of, tokens
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")

NUMBER = {"Mixtral": "num_local_experts", "Qwen3Moe": "num_experts", "GptOss": "num_local_experts",
          "DeepseekV3": "n_routed_experts"}  # fmt: skip
MIXTURE = "model.layers.{}.mlp.experts"
GIVEN = {"input_ids": tokens(2, 7)}


def made(name: str, experts: int = 8, layers: int = 1, **more: Any) -> Any:
    return model_of(name, **{NUMBER[name]: experts, "num_hidden_layers": layers, **more})


class Masked(nn.Module):
    """A router of which no token can choose some experts: their scores are -inf before anything else is done."""

    def __init__(self, gate: nn.Module, gone: Sequence[int]) -> None:
        super().__init__()
        self.gate, self.gone = gate, list(gone)

    def forward(self, *given: Any, **named: Any) -> Any:
        linear = F.linear

        def masked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            scores = linear(x, weight, bias)
            if weight is self.gate.weight:
                scores[..., self.gone] = -torch.inf
            return scores

        F.linear = masked
        try:
            return self.gate(*given, **named)
        finally:
            F.linear = linear


def unchosen(name: str, model: Any, gone: Sequence[Sequence[int]]) -> Any:
    """A copy of the model whose routers do not choose these experts, by layer."""
    model = copy.deepcopy(model)
    for layer, some in zip(model.model.layers, gone, strict=True):
        if name == "DeepseekV3":  # it chooses by the sigmoids of the scores and this bias
            layer.mlp.gate.e_score_correction_bias[list(some)] = -torch.inf
        elif name == "GptOss":
            with torch.no_grad():
                layer.mlp.router.bias[list(some)] = -torch.inf
        else:
            layer.mlp.gate = Masked(layer.mlp.gate, some)
    return model


def gone_of(result: fxmerge.Result) -> list[tuple[int, ...]]:
    return [one.dropped for one in result.plan.experts]


def same(one: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> bool:
    """Whether both give the same logits, on several numbers of tokens."""
    some = [tokens(*shape, seed=sum(shape)) for shape in ((2, 7), (1, 3), (5, 11))]
    return all(torch.allclose(logits(one, ids), logits(other, ids), rtol=0, atol=tolerance) for ids in some)


@pytest.mark.parametrize("name", slow_but(["Mixtral"], KINDS))
def test_the_others_are_chosen_as_if_no_token_could_choose_these(name: str, tmp_path: Path) -> None:
    """In two layers, in the graph, in the user's own class, and in a plain folder whose configuration follows."""
    model = made(name, layers=2)
    result = plain_merge(model, GIVEN, ratio=0.0, experts=0.5)
    assert [one.name for one in result.plan.experts] == [MIXTURE.format(n) for n in (0, 1)]
    assert [len(one.kept) for one in result.plan.experts] == [4, 4]
    reference = unchosen(name, model, gone_of(result))
    assert not same(model, reference, 1e-2)  # else nothing is tested
    assert same(result.module, reference)
    assert type(result.model) is type(model), result.report.text()
    assert same(result.model, reference)
    result.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small").eval()
    assert getattr(again.config, "num_local_experts", None) == 4 or getattr(again.config, NUMBER[name]) == 4
    assert same(again, reference)
    experts = result.model.model.layers[1].mlp.experts
    assert len(experts.down_proj) == len(experts.gate_up_proj) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_others_narrow_too(name: str) -> None:
    """As the same channels do in the model whose router does not choose the dropped experts."""
    model = made(name)
    keep = {"*embed_tokens*": 1.0, "*self_attn*": 1.0} | ({"*shared_experts*": 1.0} if name == "DeepseekV3" else {})
    result = plain_merge(model, GIVEN, ratio=0.5, experts=0.75, decomposition="prune", keep=keep)
    (plan,) = result.plan.groups
    assert (plan.channels, len(plan.kept)) == (6 * 16, 6 * 8)
    reference = unchosen(name, model, gone_of(result))
    experts, down = reference.model.layers[0].mlp.experts, result.plan.experts[0]
    with torch.no_grad():
        for channel in set(range(plan.channels)) - set(plan.kept):
            expert, own = down.kept[channel // 16], channel % 16
            matrix = experts.down_proj[expert]
            (matrix[own] if name == "GptOss" else matrix[:, own]).zero_()
    assert same(result.module, reference)
    assert same(result.model, reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_refit_goes_on_towards_the_whole_model(name: str) -> None:
    """The experts that are left are solved too, each on its own tokens, and the outputs come closer."""
    model = made(name, layers=2)
    data = [{"input_ids": tokens(32, 12, seed=s)} for s in range(4)]
    options: dict[str, Any] = {"ratio": 0.25, "experts": 0.75, "keep": {"*embed_tokens*": 1.0}, "new_biases": False}
    drafted = plain_merge(model, GIVEN, **options)
    fitted = fxmerge.merge(model, GIVEN, calibration=data, **options)
    ids = tokens(16, 9, seed=99)
    right = logits(model, ids)
    lost = [float((logits(r.module, ids) - right).norm() / right.norm()) for r in (drafted, fitted)]
    assert lost[1] < 0.9 * lost[0], lost
    solved = {r.name: r for r in fitted.report.refitted}
    for layer in (0, 1):
        own = solved[MIXTURE.format(layer) + ".gate_up_proj"]
        assert own.after < own.before
    assert fitted.model is not None
    assert same(fitted.model, fitted.module)


@pytest.mark.slow
def test_the_experts_that_lose_least_leave() -> None:
    """Those that no token chooses leave before all others; the loss is what a hook on the model measures."""
    model = made("GptOss", 6)
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[[1, 4]] = -100.0
    result = plain_merge(model, GIVEN, ratio=0.0, experts=0.7)
    assert result.plan.experts[0].kept == (0, 2, 3, 5)
    assert result.plan.experts[0].loss == 0
    assert same(result.module, model)
    headline = "No group of GptOssForCausalLM was merged; it lost whole experts, named below"
    assert result.report.text().startswith(headline)
    more = plain_merge(model, GIVEN, ratio=0.0, experts=0.5)
    assert {1, 4} < set(more.plan.experts[0].dropped)
    seen = []
    for one in (model, unchosen("GptOss", model, gone_of(more))):
        hook = one.model.layers[0].register_forward_hook(lambda module, given, out: seen.append(out))
        logits(one, GIVEN["input_ids"])
        hook.remove()
    y, z = (value[0] if isinstance(value, tuple) else value for value in seen)
    loss = ((z - y).square().sum() / (y - y.mean()).square().sum()).item()
    assert more.plan.experts[0].loss == pytest.approx(loss, 1e-4)
    assert loss > 0


@pytest.mark.slow
def test_each_expert_that_leaves_is_the_best_choice_of_its_round() -> None:
    model = made("Qwen3Moe")
    result = plain_merge(model, GIVEN, ratio=0.0, experts=0.75)
    found = fxmerge.analyze(model, GIVEN)
    (mixture,), closed = mixtures(found.captured, found.facts)
    assert not closed
    settings = Settings(rows=100, seed=0, held=False, reduce=lambda t: t)
    flops = flops_by_node(found.captured.module, found.captured.inputs)

    def loss(gone: set[int]) -> float:
        kept = {mixture.name: sorted(set(range(8)) - gone)}
        (one,) = losses(found.captured, found.facts, [mixture], kept, [found.captured.inputs], settings, flops)
        return one.loss

    first = min(range(8), key=lambda e: loss({e}))
    second = min(set(range(8)) - {first}, key=lambda e: loss({first, e}))
    assert set(result.plan.experts[0].dropped) == {first, second}


@pytest.mark.slow
def test_groups_of_experts_stay_equal() -> None:
    """DeepSeek chooses two groups first, by the two best of each, which needs at least two."""
    model = made("DeepseekV3", 12, n_group=3, topk_group=2)
    result = plain_merge(model, GIVEN, ratio=0.0, experts=0.6)
    (one,) = result.plan.experts
    assert [sum(k // 4 == g for k in one.kept) for g in range(3)] == [2, 2, 2]
    assert same(result.module, unchosen("DeepseekV3", model, gone_of(result)))
    least = plain_merge(model, GIVEN, ratio=0.0, experts=0.01)
    assert len(least.plan.experts[0].kept) == 6


@pytest.mark.slow
def test_as_many_stay_as_a_token_chooses() -> None:
    result = plain_merge(made("Mixtral", num_experts_per_tok=3), GIVEN, ratio=0.0, experts=0.1)
    assert len(result.plan.experts[0].kept) == 3
    none = plain_merge(made("Mixtral", 3, num_experts_per_tok=3), GIVEN, ratio=0.0, experts=0.1)
    assert none.plan.is_empty
    assert any("keeps all: the router chooses among no fewer than 3" in note for note in none.report.notes)


@pytest.fixture(scope="module")
def merged() -> tuple[Any, fxmerge.Result]:
    model = made("Mixtral", layers=2)
    return model, plain_merge(model, GIVEN, ratio=0.25, experts=0.5, ignore=("model.layers.0.mlp",))


@pytest.mark.slow
def test_a_plan_is_replayed(merged: tuple[Any, fxmerge.Result]) -> None:
    model, result = merged
    plan = Plan.from_json(result.plan.json())
    assert plan == result.plan
    again = fxmerge.apply(plan, model, GIVEN)
    assert same(again.module, result.module, 0.0)
    (one,) = plan.experts
    assert (one.name, one.experts, len(one.kept)) == (MIXTURE.format(1), 8, 4)  # the other layer is ignored
    with pytest.raises(FxMergeError, match="the plan drops experts of other: the model's mixtures are"):
        fxmerge.apply(copy_of(plan, name="other"), model, GIVEN)
    with pytest.raises(FxMergeError, match=r"keeps 1 of 8 experts of .* its router needs 2"):
        fxmerge.apply(copy_of(plan, kept=(3,)), model, GIVEN)
    damaged = json.loads(plan.json())
    damaged["experts"][0]["kept"] = [9]
    with pytest.raises(FxMergeError, match=r"the experts kept of .* are not a subset"):
        Plan.from_json(json.dumps(damaged))


def copy_of(plan: Plan, **changes: Any) -> Plan:
    return replace(plan, experts=(replace(plan.experts[0], **changes),))


def test_the_report_tells_which_left(merged: tuple[Any, fxmerge.Result]) -> None:
    _, result = merged
    (one,) = result.plan.experts
    text = " ".join(result.report.text(width=200).split())
    assert f"experts {one.name}: 8 -> 4, without {', '.join(map(str, one.dropped))}; " in text
    data = json.loads(result.report.json())
    assert data["experts"] == [{"name": one.name, "experts": 8, "kept": list(one.kept), "loss": one.loss}]
    schema = Path(fxmerge.__file__).parent / "assets" / "report.schema.json"
    pytest.importorskip("jsonschema").Draft202012Validator(json.loads(schema.read_text())).validate(data)
    assert "4 experts left" in result.report.html()


@pytest.mark.slow
def test_layers_with_other_numbers_of_experts_are_saved_with_code(
    merged: tuple[Any, fxmerge.Result], tmp_path: Path
) -> None:
    model, result = merged
    assert type(result.model) is type(model)
    assert same(result.model, result.module)
    result.save(tmp_path / "plain")
    assert same(fxmerge.load(tmp_path / "plain"), result.module)
    assert same(fxmerge.load(tmp_path / "plain", model=model), result.module)
    result.save_pretrained(tmp_path / "coded")
    assert (tmp_path / "coded" / "modeling_fxmerge.py").exists()


@pytest.mark.slow
def test_a_budget_counts_the_experts_that_left() -> None:
    model = made("Mixtral", layers=2)
    keep = {"*embed_tokens*": 1.0, "*self_attn*": 1.0}
    result = plain_merge(model, GIVEN, budget={"params": 0.533}, experts=0.75, same_widths=True, keep=keep)
    assert result.report.spent is not None
    assert result.report.spent.met
    assert same(result.model, result.module)
    inner = plain_merge(model, GIVEN, budget={"params": 0.375}, of="*.experts", experts=0.5)
    assert inner.report.spent is not None
    assert inner.report.spent.met


@pytest.mark.slow
def test_the_loss_that_balances_experts_counts_those_that_are_left() -> None:
    result = plain_merge(made("Mixtral"), GIVEN, ratio=0.0, experts=0.5)
    assert result.model.num_experts == 4
    ids = tokens(2, 7)
    out = result.model.train()(input_ids=ids, labels=ids, output_router_logits=True)
    out.loss.backward()
    assert out.aux_loss.isfinite()


@pytest.mark.slow
def test_the_whole_model_is_what_teaches() -> None:
    model = made("Mixtral")
    result = plain_merge(model, GIVEN, ratio=0.25, experts=0.5)
    teaching = fxmerge.Distillation(result)
    ids = tokens(3, 5, seed=1)
    found = teaching(input_ids=ids)
    wanted, outputs = logits(model, ids), logits(result.module, ids)
    loss = (outputs - wanted).square().mean() / (wanted - wanted.mean()).square().mean()
    assert found["output_loss"].item() == pytest.approx(loss.item(), 1e-3)
    assert found["hidden_loss"].isfinite()


# What is not understood stays


class Mixture(nn.Module):
    """Experts of one's own, whose code does one more thing with the scores or the numbers of the experts."""

    def __init__(self, more: str) -> None:
        super().__init__()
        self.more = more
        self.embed, self.gate, self.head = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.up, self.down = (nn.Parameter(torch.randn(4, 8, 8)) for _ in range(2))
        self.register_buffer("level", torch.tensor([0.0, 0.1, 0.2, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        scores = self.gate(x)
        if self.more == "read elsewhere":
            x = x + scores.mean(-1, keepdim=True)
        if self.more == "exponentials":
            scores = scores.exp() / scores.exp().sum(-1, keepdim=True)
        elif self.more != "the smallest":
            scores = torch.softmax(scores, -1)
        if self.more == "a constant for each":
            scores = scores + self.level
        elif self.more == "computed for each":
            scores = scores * self.level.cos()
        weights, numbers = torch.topk(scores, 2, -1, self.more != "the smallest")
        if self.more == "compared":
            weights = weights * (numbers < 2)
        numbers = numbers.flatten()
        order = torch.argsort(numbers)
        ends = torch.histc(torch.sort(numbers)[0].float(), 4, 0, 3).cumsum(0).int()
        hidden = torch.relu(F.grouped_mm(x[order // 2], self.up, offs=ends))
        found = F.grouped_mm(hidden, self.down, offs=ends) * weights.flatten()[order][:, None]
        return self.head(x.index_add(0, order // 2, found))


@pytest.mark.parametrize(("more", "why"), [
    ("", ""),
    ("a constant for each", ""),
    ("read elsewhere", "runs over the scores of all experts"),
    ("exponentials", "runs over the scores of all experts"),
    ("computed for each", ""),
    ("the smallest", "reads what follows the number of experts"),
    ("compared", "reads what follows the number of experts"),
])  # fmt: skip
def test_what_is_done_with_scores_and_numbers(more: str, why: str) -> None:
    """Experts leave where all that reads them is understood; the others are those of weights cut by hand."""
    torch.manual_seed(0)
    model, x = Mixture(more).eval(), torch.randn(12, 5)
    result = plain_merge(model, x, ratio=0.0, experts=0.5)
    if why:
        assert result.plan.is_empty
        assert any("keeps all" in note and why in note for note in result.report.notes), result.report.notes
        assert torch.equal(result.module(x), model(x))
        return
    (one,) = result.plan.experts
    assert len(one.kept) == 2
    gone = list(one.dropped)
    cut = copy.deepcopy(model)
    cut.gate = Scored(cut.gate, gone)
    assert torch.allclose(result.module(x), cut(x), rtol=0, atol=1e-5)
    assert not torch.allclose(result.module(x), model(x), rtol=0, atol=1e-3)


class Scored(nn.Module):
    """A linear layer some of whose outputs are -inf."""

    def __init__(self, linear: nn.Linear, gone: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.gone = linear, gone

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x)
        scores[:, self.gone] = -torch.inf
        return scores


def test_not_together_with_depth() -> None:
    with pytest.raises(FxMergeError, match="depth and experts cannot be combined"):
        Options(experts=0.5, depth=True, budget={"params": 0.5})


@pytest.mark.slow
def test_routing_that_is_not_understood_keeps_its_experts() -> None:
    """The loop over the experts in use cannot be traced at all."""
    eager = made("Mixtral")
    eager.set_experts_implementation("eager")
    result = plain_merge(eager, GIVEN, ratio=0.0, experts=0.5)
    assert result.plan.is_empty
    assert any(note.startswith("experts: ") for note in result.report.notes), result.report.notes
    assert same(result.module, eager)


def test_a_model_without_experts() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    result = plain_merge(model, torch.randn(3, 4), ratio=0.5, experts=0.5)
    assert len(result.plan.groups) == 1
    assert "experts: no expert was dropped: its graph has no products with stacked experts" in (
        result.report.notes
    )
