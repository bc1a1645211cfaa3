"""What users get back: a working, trainable, smaller graph module with their own names, and a report that is true."""

from __future__ import annotations

import copy
import gc
import json
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge import FxMergeError, Options, Plan
from fxmerge.pipeline import prepared
from fxmerge.rewrite import slicing
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS
from tests.helpers.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")


def counted(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, x: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NETS)
def test_the_merged_module_is_sound(name: str) -> None:
    """Names kept, sizes of every module right, clean by lint, and it runs on another batch size."""
    model, x = NETS[name]()
    result = plain_merge(model, x, ratio=0.5)
    merged = result.module
    assert isinstance(merged, fx.GraphModule)
    assert {n for n, _ in merged.named_modules()} <= {n for n, _ in model.named_modules()}
    assert {n for n, _ in merged.named_parameters()} >= {n for n, _ in model.named_parameters()}
    merged.graph.lint()
    for module in merged.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        if isinstance(module, nn.modules.conv._ConvNd):
            first, second = module.out_channels, module.in_channels
            first, second = (second, first) if module.transposed else (first, second)
            assert module.weight.shape[:2] == (first, second // module.groups)
            assert module.out_channels % module.groups == 0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            held = module.running_mean if module.track_running_stats else module.weight
            assert held is not None
            assert held.shape == (module.num_features,)
        if isinstance(module, nn.PReLU):
            assert module.weight.shape == (module.num_parameters,)
        if isinstance(module, nn.Embedding):
            assert module.weight.shape == (module.num_embeddings, module.embedding_dim)
        if isinstance(module, nn.GroupNorm):
            assert module.weight.shape == (module.num_channels,)
        if isinstance(module, nn.LayerNorm):
            assert module.weight.shape == module.normalized_shape
        for value in module.parameters(recurse=False):
            assert value.is_contiguous()
    assert counted(merged) < counted(model)
    merged(torch.cat([x, x, x]))
    sizes = {p.name: (len(p.kept), p.channels) for p in result.plan.groups}
    assert sizes
    assert all(0 < kept < channels for kept, channels in sizes.values())


def test_sizes_by_hand() -> None:
    model, x = NETS["multiplier"]()
    merged = plain_merge(model, x, keep={"a": 4, "b": 3}).module
    assert (merged.a.out_channels, merged.d.in_channels, merged.d.out_channels, merged.d.groups) == (4, 4, 8, 4)
    assert (merged.dn.num_features, merged.b.in_channels, merged.b.out_channels, merged.fc.in_features) == (8, 8, 3, 3)
    assert merged.d.weight.shape == (8, 1, 3, 3)


def test_metadata_is_kept_and_graph_modules_merge() -> None:
    model, x = NETS["residual"]()
    traced = fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        node.meta["marker"] = node.name
    traced.meta["whole"] = "kept"
    result = plain_merge(traced, x)
    found = {n.name: n.meta.get("marker") for n in result.module.graph.nodes}
    assert found == {n.name: n.name for n in traced.graph.nodes}
    assert result.module.meta["whole"] == "kept"
    assert [p.name for p in result.plan.groups] == [p.name for p in plain_merge(model, x).plan.groups]
    assert counted(traced) == counted(model)


def test_stack_traces_are_the_users_lines() -> None:
    model, x = NETS["residual"]()
    module = plain_merge(model, x).module
    assert all("nets.py" in (n.stack_trace or "") for n in module.graph.nodes if n.op.startswith("call"))


def test_layers_that_no_line_calls_name_no_line() -> None:
    """Not the line that called merge, nor that of a console script."""
    analysis = fxmerge.analyze(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
    assert [r.where for r in analysis.refusals] == [""]


def test_the_merged_module_trains() -> None:
    model, x = NETS["dense"]()
    model.a.weight.requires_grad_(False)
    merged = plain_merge(model, x).module.train()
    assert not merged.a.weight.requires_grad
    parameters = [p for p in merged.parameters() if p.requires_grad]
    assert len(parameters) == sum(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    merged(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(p.is_leaf for p in merged.parameters())


def test_training_flags_are_kept() -> None:
    model, x = NETS["pooling"]()
    model.train()
    model.mp.eval()
    merged = plain_merge(model, x).module
    assert merged.training
    assert merged.d.training
    assert not merged.mp.training
    assert model.training
    assert not plain_merge(model.eval(), x).module.training


def test_a_model_in_training_mode_is_merged_as_in_evaluation() -> None:
    model, x = NETS["residual"]()
    calm = plain_merge(model, x).module
    busy = plain_merge(model.train(), x).module
    assert all(torch.equal(a, b) for a, b in zip(calm.state_dict().values(), busy.state_dict().values(), strict=True))
    model.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("decomposition", fxmerge.DECOMPOSITIONS)
def test_dtypes_are_kept(dtype: torch.dtype, decomposition: str) -> None:
    model, x = NETS["residual"]()
    merged = plain_merge(model.to(dtype), x.to(dtype), decomposition=decomposition).module
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert merged(x.to(dtype)).dtype == dtype
    assert merged.n.num_batches_tracked.dtype == torch.int64


def test_keep() -> None:
    model, x = NETS["residual"]()

    def kept(**options: Any) -> dict[str, int]:
        return {p.name: len(p.kept) for p in plain_merge(model, x, **options).plan.groups}

    assert kept(keep={"stem": 5}, ratio=0.0) == {"stem": 5}
    assert kept(keep={"s*": 0.5}) == {"stem": 6, "a": 8}
    assert kept(keep={"*": 1}) == {"stem": 1, "a": 1}
    assert kept(keep={"a": 1.0}) == {"stem": 6}
    assert kept(ratio=0.25) == {"stem": 9, "a": 12}
    assert kept(ratio=0.99) == {"stem": 1, "a": 1}
    assert kept(round_to=4) == {"stem": 8, "a": 8}
    assert kept(round_to=8) == {"stem": 8, "a": 8}
    assert kept(round_to=16) == {}


def test_ignore_by_module_and_by_group() -> None:
    model, x = NETS["residual"]()
    """A module that stays as it is keeps its inputs too: `a` reads the stem's channels."""
    for pattern, left in {"stem": {"a"}, "n": {"a"}, "s*": {"a"}, "an": {"stem"}, "a": set(), "b*": set()}.items():
        result = plain_merge(model, x, ignore=(pattern,))
        assert {p.name for p in result.plan.groups} == left, pattern
        ignored = {r.name: r.reason for r in result.report.refusals}
        assert all("matches a pattern of the option ignore" in ignored[name] for name in {"stem", "a"} - left)


def test_ignore_a_whole_submodule() -> None:
    inner, x = NETS["chain_2d"]()
    model = nn.Sequential(inner, nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    assert {p.name for p in plain_merge(model, x).plan.groups} == {"0.a", "0.b", "0.c", "1"}
    assert {p.name for p in plain_merge(model, x, ignore=("0",)).plan.groups} == {"1"}


def test_scope_internal_leaves_shared_streams() -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, scope="internal")
    assert [p.name for p in result.plan.groups] == ["a"]
    assert any(r.name == "stem" and "internal" in r.reason for r in result.report.refusals)
    assert result.module.stem.out_channels == 12


def test_report_counts_are_true() -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5)
    data = json.loads(result.report.json())
    assert data["parameters_before"] == counted(model)
    assert data["parameters_after"] == counted(result.module)
    assert data["flops_before"] == flops(model, x)
    assert data["flops_after"] == flops(result.module, x)
    assert 0.2 < data["flops_after"] / data["flops_before"] < 0.5
    assert data["error"] == result.report.verdict.error > 0
    with torch.no_grad():
        before, after = model(x), result.module(x)
    assert data["error"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    groups = {g["name"]: g for g in data["groups"]}
    assert set(groups) == {"stem", "a"}
    assert set(groups["stem"]["producers"]) == {"stem", "b"}
    assert set(groups["stem"]["consumers"]) == {"a", "fc"}
    assert len(groups["stem"]["kept"]) == 6
    assert {p["channel"] for p in groups["stem"]["partners"]} == set(range(12)) - set(groups["stem"]["kept"])
    assert [r["name"] for r in data["refusals"]] == ["fc"]
    assert data["refusals"][0]["parameters"] == counted(model.fc)
    assert "tests/helpers/nets.py:" in data["refusals"][0]["where"]
    assert "in residual" in data["refusals"][0]["where"]


@pytest.mark.parametrize("width", [80, 120, 200])
def test_report_text(width: int) -> None:
    model, x = NETS["activations"]()
    result = plain_merge(model, x, ratio=0.5)
    text = result.report.text(width)
    assert all(len(line) <= width for line in text.splitlines())
    cells = [line.split() for line in text.splitlines()]
    table = {row[0]: " ".join(row[1:4]) for row in cells if row}
    assert {"a": "12 -> 6", "b": "10 -> 5", "c": "8 -> 4", "d": "8 -> 4"}.items() <= table.items(), text
    assert f"{counted(model):,} -> {counted(result.module):,}" in text
    assert "output" in text


def test_analysis_graph() -> None:
    model, x = NETS["dense"]()
    found = fxmerge.analyze(model, x)
    graph = found.graph
    assert isinstance(graph, nx.DiGraph)
    groups = {n: d for n, d in graph.nodes(data=True) if d["kind"] == "group"}
    assert {n: d["channels"] for n, d in groups.items()} == {"a": 8, "b": 6, "c": 10}
    modules = {n: d["module"] for n, d in graph.nodes(data=True) if d["kind"] != "group"}
    roles = {(modules.get(u, u), modules.get(v, v)): d["role"] for u, v, d in graph.edges(data=True)}
    assert roles["a", "a"] == "write"
    assert roles["a", "bn"] == roles["a", "cn"] == roles["c", "cn"] == "carry"
    assert roles["a", "b"] == roles["a", "c"] == roles["b", "c"] == roles["c", "fc"] == "read"
    assert ("c", "bn") not in roles
    assert json.loads(found.report.json())["parameters"] == counted(model)
    assert "a" in found.report.text()


def test_apply_replays_a_plan_on_other_weights() -> None:
    model, x = NETS["residual"]()
    plan = Plan.from_json(plain_merge(model, x, ratio=0.4).plan.json())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(torch.rand_like(p) + 0.5)
    result = fxmerge.apply(plan, other, x)
    assert {p.name: p.kept for p in result.plan.groups} == {p.name: p.kept for p in plan.groups}
    same = fxmerge.apply(plan, model, x).module.state_dict()
    assert all(torch.equal(v, same[k]) for k, v in plain_merge(model, x, ratio=0.4).module.state_dict().items())


def test_apply_of_a_plan_without_groups_changes_nothing() -> None:
    model, x = NETS["residual"]()
    result = fxmerge.apply(Plan(Options(ratio=0.5), ()), model, x)
    assert result.plan.groups == ()
    assert counted(result.module) == counted(model)


@pytest.mark.parametrize("selection", fxmerge.SELECTORS)
@pytest.mark.parametrize("decomposition", fxmerge.DECOMPOSITIONS)
def test_every_method_runs(selection: str, decomposition: str) -> None:
    model, x = NETS["grouped"]()
    result = plain_merge(model, x, selection=selection, decomposition=decomposition, ratio=0.5)
    assert 0 < result.report.verdict.error < 2


def test_shared_weights_stay_shared() -> None:
    """Two modules that hold one Parameter hold one after the merge."""
    torch.manual_seed(0)
    linears = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
    linears[2].weight = linears[1].weight
    model = nn.Sequential(*[m for linear in linears for m in (linear, nn.ReLU())])
    x = torch.randn(4, 6)
    assert plain_merge(model, x, ratio=0.0).report.verdict.error == 0
    result = plain_merge(model, x, ratio=0.5)
    assert [(p.name, len(p.kept)) for p in result.plan.groups] == [("0", 4)]
    one, other = (result.module.get_submodule(name).weight for name in ("2", "4"))
    assert one is other


@pytest.mark.parametrize("frozen", slow_but([True], [False, True]))
def test_a_merge_leaves_the_collector_as_it_was(frozen: bool) -> None:
    model, x = next(iter(NETS.values()))()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(gc.get_freeze_count()))
    if frozen:
        gc.freeze()
    try:
        plain_merge(model, x, ratio=0.5)
        with pytest.raises(fxmerge.FxMergeError):
            plain_merge(model, torch.zeros(1), ratio=0.5)
        assert gc.isenabled() and bool(gc.get_freeze_count()) == frozen
        assert seen[0] > 0  # while it works, what was there before is no collection's business
    finally:
        gc.unfreeze()


def test_large_weights_lose_rows_and_columns_at_once() -> None:
    """Beyond a size they are sliced some rows at a time: the output is that of rows and columns taken one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1500), nn.ReLU(), nn.Linear(1500, 1100), nn.ReLU(), nn.Linear(1100, 4)).double()
    result = plain_merge(model, torch.randn(2, 8).double(), ratio=0.5, decomposition="prune")
    first, second = (result.plan.groups[i].kept for i in (0, 1))
    assert model[2].weight.numel() > slicing._SMALL
    assert torch.equal(result.module.get_parameter("2.weight"), model[2].weight[list(second)][:, list(first)])


@pytest.mark.parametrize("before", [False, True])
def test_denormal_numbers_count_as_zero_during_a_merge_alone(before: bool) -> None:
    """Convolutions with them take up to a hundred times as long."""

    def zero() -> bool:
        return float(torch.full((1,), torch.finfo(torch.float32).tiny) / 2) == 0

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    seen: list[bool] = []
    if not torch.set_flush_denormal(before):
        pytest.skip("this processor computes no denormal number as zero")
    try:
        ready = prepared(model, torch.randn(3, 4), Options(samples=32), None, lambda *_: seen.append(zero()))
        assert zero() == before
        ready.merged(Options(samples=32))
        assert seen and all(seen) and zero() == before
    finally:
        torch.set_flush_denormal(False)


class _Precisions(TorchDispatchMode):
    """The precision of matrix products while each op runs, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.setdefault(func.__name__.split(".")[0], set()).add(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("asked", ["highest", "medium"])
def test_only_the_models_own_products_have_the_precision_that_torch_is_told(asked: str) -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 2, 1)).eval()
    ready = prepared(model, torch.randn(3, 3, 5), Options(samples=32), None, lambda *_: None)
    torch.set_float32_matmul_precision(asked)
    try:
        with _Precisions() as precisions:
            ready.merged(Options(samples=32))
            assert torch.get_float32_matmul_precision() == asked
            with pytest.raises(FxMergeError, match="refit"):
                fxmerge.merge(model, torch.randn(3, 3, 5), refit="calibration")
            assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions.seen["convolution"] == {asked, "highest"}  # the check of the merged model is precise
    sums = [name for name in precisions.seen if name in ("bmm", "mm", "addmm", "baddbmm", "linalg_cholesky_ex")]
    assert "bmm" in sums and "linalg_cholesky_ex" in sums
    assert all(precisions.seen[name] == {"highest"} for name in sums)
