"""The option `of`: a budget is the share of the cost of some modules, counted on the merged model by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge import FxMergeError, Options, Plan
from tests.helpers.language_models import llama
from tests.helpers.netmaking import one_thread, plain_merge, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A residual MLP, and a product of activations that no parameter takes part in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.q, self.k = nn.Linear(16, 40, bias=False), nn.Linear(40, 16), *(
            nn.Linear(16, 12) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        return x + (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1).mean(-1, keepdim=True)


class Net(nn.Module):
    def __init__(self, untraceable: bool = False) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(6, 64), nn.Linear(64, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 3))
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(torch.relu(self.first(x)))
        for block in self.blocks:
            x = block(x)
        if self.untraceable and x.sum() > 1e9:
            x = x * 2
        return self.head(x)


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def net(untraceable: bool = False) -> Net:
    torch.manual_seed(0)
    made: Net = randomised(Net(untraceable)).eval()
    return made


def cost(model: nn.Module, x: Any, kind: str, paths: list[str]) -> int:
    """The parameters of modules, or their FLOPs as PyTorch counts them by module."""
    if kind == "params":
        return len({(id(p), i) for at in paths for p in model.get_submodule(at).parameters() for i in range(p.numel())})
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**x) if isinstance(x, dict) else model(x)
    counts = {name.partition(".")[2]: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    return sum(counts.get(at, 0) for at in paths)


# patterns, the modules that they mean
PATTERNS: list[tuple[Any, list[str]]] = [
    ("blocks.*", ["blocks.0", "blocks.1"]),
    (("blocks.1", "head.?"), ["blocks.1", "head.0", "head.2"]),
]


@pytest.mark.parametrize("allocation", ["greedy", "uniform"])
@pytest.mark.parametrize("kind", ["params", "flops"])
@pytest.mark.parametrize(("of", "paths"), PATTERNS)
def test_the_share_is_that_of_the_modules(of: Any, paths: list[str], kind: str, allocation: str) -> None:
    model = net()
    result = plain_merge(model, X, budget={kind: 0.6}, of=of, allocation=allocation)
    merged = result.model
    assert merged is not None
    left = cost(merged, X, kind, paths) / cost(model, X, kind, paths)
    assert left == pytest.approx(0.6, rel=0.01)
    spent = result.report.spent
    assert spent is not None and spent.left == pytest.approx(left, rel=1e-9)
    patterns = (of,) if isinstance(of, str) else of
    assert f"60.0% of the {'FLOPs' if kind == 'flops' else 'parameters'} of {', '.join(patterns)} requested" in (
        result.report.text(200)
    )
    assert json.loads(result.report.json())["budget"]["of"] == list(patterns)
    narrowed = {g.name for g in result.plan.groups}
    assert "first" not in narrowed  # between `first` and `hidden`: nothing of what is counted
    again = fxmerge.apply(Plan.from_json(result.plan.json()), model, X)
    assert again.report.spent == spent


@pytest.mark.parametrize("kind", ["params", "flops"])
def test_models_that_are_captured_in_parts(kind: str) -> None:
    model = net(untraceable=True)
    result = plain_merge(model, X, budget={kind: 0.7}, of="blocks")
    assert result.analysis.captured.route == "recorded"
    left = cost(result.module, X, kind, ["blocks.0", "blocks.1"]) / cost(model, X, kind, ["blocks.0", "blocks.1"])
    spent = result.report.spent
    assert spent is not None and spent.left == pytest.approx(0.7, rel=0.01)
    if kind == "params":  # FLOPs of parts are counted by their own names
        assert left == pytest.approx(spent.left, rel=1e-9)


@pytest.mark.slow
def test_layers_of_a_language_model() -> None:
    """The embedding and the head, which narrow with the stream, are not counted; biases that refit adds are."""
    model, x = llama(), {"input_ids": torch.randint(1, 60, (4, 12), generator=torch.Generator().manual_seed(0))}
    paths = ["model.layers.0", "model.layers.1"]
    result = fxmerge.merge(model, x, budget={"params": 0.7}, of="model.layers.*", samples=16)
    assert result.analysis.captured.route == "export"
    left = cost(result.module, x, "params", paths) / cost(model, x, "params", paths)
    assert result.report.spent is not None and result.report.spent.left == pytest.approx(left, rel=1e-9)
    assert left == pytest.approx(0.7, rel=0.03)  # not every layer gains the bias that was reckoned with
    merged = plain_merge(model, x, budget={"flops": 0.7}, of="model.layers.*", heads="whole").model
    assert merged is not None
    assert cost(merged, x, "flops", paths) / cost(model, x, "flops", paths) == pytest.approx(0.7, rel=0.01)


def test_shared_parameters_count_by_any_of_their_paths() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4))).eval()
    model[3].weight = model[1].weight
    for at in (1, 3):
        report = plain_merge(model, torch.randn(4, 24), budget={"params": 0.7}, of=str(at)).report
        assert report.spent is not None and 0.65 < report.spent.left <= 0.7  # a channel is 4 %
        own = [p for n, p in report.module.named_parameters(remove_duplicate=False) if n.startswith(f"{at}.")]
        assert sum(p.numel() for p in own) / (24 * 25) == pytest.approx(report.spent.left)


@pytest.mark.slow
def test_everything_is_the_whole_model() -> None:
    model = net()
    kept = [
        [(g.name, g.kept) for g in plain_merge(model, X, budget={"params": 0.6}, **of).plan.groups]
        for of in ({}, {"of": "*"}, {"of": ("first", "hidden", "blocks", "head")})
    ]
    assert kept[0] == kept[1] == kept[2]


def test_nonsense_is_explained() -> None:
    model = net()
    with pytest.raises(FxMergeError, match=r"of: 'layers.\*' matches no module; .* are blocks, first, head"):
        plain_merge(model, X, budget={"params": 0.5}, of="layers.*")
    with pytest.raises(FxMergeError, match=r"of is \('blocks',\), but there is no budget; add one"):
        plain_merge(model, X, ratio=0.5, of="blocks")
    with pytest.raises(FxMergeError, match="a latency is that of the whole model"):
        Options(budget={"latency": 0.5}, of="blocks")
    with pytest.raises(FxMergeError, match=r"a share of the parameters, but the modules that match head.1 have none"):
        plain_merge(model, X, budget={"params": 0.5}, of="head.1")
    with pytest.raises(FxMergeError, match=r"10.0% of the parameters of blocks, but \S+% are left when"):
        plain_merge(model, X, budget={"params": 0.1}, of="blocks", max_ratio=0.5)
    with pytest.raises(FxMergeError, match=r"parameters of first, but 100.0% are left since no group may narrow"):
        plain_merge(model, X, budget={"params": 0.5}, of="first", ignore=("first",))


def test_sweeps_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fxmerge.cli.main import main

    model = net()
    options: dict[str, Any] = {"kind": "params", "of": "blocks.*", "refit": "none"}
    for _ in range(2):  # the second reads the first one's files
        found = fxmerge.sweep(model, X, [0.8, 0.5], **options, out=tmp_path / "curve")
        assert [p.left for p in found.points] == pytest.approx([0.8, 0.5], rel=0.01)
        assert "a share of the original's parameters of blocks.*" in found.text()
    other = fxmerge.sweep(model, X, [0.5], **(options | {"of": "head"}), out=tmp_path / "curve")
    assert other.original.of == ("head",) and other.points[0].widths != found.points[1].widths
    (tmp_path / "net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(),\n"
        "        torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))\n"
        "example_inputs = torch.zeros(2, 8)\n"
    )
    flags = ["merge", f"{tmp_path / 'net.py'}:make", "--out", str(tmp_path / "out"), "--refit", "none"]
    flags += ["--of", "2", "4"]
    assert main([*flags, "--budget", "params", "0.5"]) == 0
    assert "50.0% of the parameters of 2, 4 requested" in capsys.readouterr().out
    assert main(flags) == 2
    assert "there is no budget" in capsys.readouterr().err
