"""benchmarks.real on small networks in a folder: rows, resumed runs, failures, the page and the command line."""

import json
import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from benchmarks.coverage.zoo import Specimen
from benchmarks.harness import process
from benchmarks.peers import torch_pruning as peer
from benchmarks.real import methods, nets, one_row, page
from benchmarks.real import run as real

COMMON = """
import torch
from torch import nn
from pathlib import Path

def network(width=10):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).eval()
"""
SMALL = '''"""A perceptron
for tests."""
from small_common import *

def load():
    return network(), torch.randn(2, 6)

def evaluate(model, split="test", n=50):
    """Share of random inputs on which the model agrees with the original, in %."""
    with open(Path(__file__).with_suffix(".log"), "a") as file:
        file.write("evaluated\\n")
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == network()(x).argmax(1)).float().mean()

def calibration(n=40):
    return list(torch.randn(min(n, 40), 6, generator=torch.Generator().manual_seed(3)).split(16))
'''


@pytest.fixture(scope="module")
def imported() -> None:
    """What fxmerge imports on first use, so that not every process imports it."""
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    fxmerge.merge(net, torch.randn(2, 6), ratio=0.1)


@pytest.fixture
def folder(imported: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one network and a module that it imports."""
    monkeypatch.setattr(process, "PROCESSES", multiprocessing.get_context("fork"))
    found = tmp_path / "nets"
    found.mkdir()
    (found / "small_common.py").write_text(COMMON)
    (found / "small.py").write_text(SMALL)
    return found


def run(folder: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """Run the command; returns the rows of the file by network, budget and method."""
    out = folder.parent / "out"
    real.main(["--nets", str(folder), "--out", str(out), *flags])
    lines = (out / "real.jsonl").read_text().splitlines() if (out / "real.jsonl").exists() else []
    rows = [json.loads(line) for line in lines]
    found = {" ".join((row["network"], row["budget"], row["method"])).replace("  ", " "): row for row in rows}
    assert len(found) == len(rows), "a row was measured twice"
    return found


def test_a_run_is_measured_written_and_resumed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = run(folder, "--methods", "original", "prune", "--budgets", "ratio-0.1")
    assert list(first) == ["small original", "small ratio-0.1 prune"]
    assert first["small original"]["metric"] == 100
    flags = ("--methods", "original", "prune", "samples", "--budgets", "ratio-0.1", "flops-0.7-uniform")
    rows = run(folder, *flags)
    assert len(rows) == 5 and rows["small ratio-0.1 prune"] == first["small ratio-0.1 prune"]
    assert len((folder / "small.log").read_text().splitlines()) == 5  # one evaluation a row
    pruned, samples = rows["small ratio-0.1 prune"], rows["small flops-0.7-uniform samples"]
    assert pruned["parameters"] == (6 * 9 + 9 + 9 * 3 + 3) / (6 * 10 + 10 + 10 * 3 + 3) and pruned["flops"] == 0.9
    assert samples["flops"] == 0.7 and samples["samples"] == 40 and "samples" not in pruned
    assert 50 < samples["metric"] <= 100

    text = (folder.parent / "out" / "real.md").read_text()
    assert "## small\n\nA perceptron for tests.\n\nEvaluation: split=test, n=50. Calibration: 40 samples.\n" in text
    cells = f"| {pruned['metric']:.1f} | 90.3% | 90.0% | {pruned['seconds']:.2f} |"
    assert f"| ratio 0.1 | prune {cells}" in text and "|  | original | 100.0 | 100.0% | 100.0% |  |" in text
    assert f"| small | 100.0 | ratio 0.1 | {pruned['metric']:.1f} |" in text
    assert f"torch {torch.__version__}, seed 0." in text
    assert capfd.readouterr() == ("", "")  # not a terminal


@pytest.mark.slow
def test_another_seed_has_rows_and_a_page_of_its_own(folder: Path) -> None:
    flags = ("--methods", "default", "--budgets", "ratio-0.3")
    before = run(folder, *flags)["small ratio-0.3 default"]
    real.main(["--nets", str(folder), "--out", str(folder.parent / "out"), *flags, "--seed", "7"])
    after = json.loads((folder.parent / "out" / "real.jsonl").read_text().splitlines()[-1])
    assert (before["seed"], after["seed"]) == (0, 7)
    assert ", seed 7." in (folder.parent / "out" / "real.md").read_text()
    real.main(["--nets", str(folder), "--out", str(folder.parent / "out"), *flags, "--seed", "7", "--again"])
    assert len((folder / "small.log").read_text().splitlines()) == 3


def test_a_network_that_fails_is_a_row_with_its_error(folder: Path) -> None:
    broken = SMALL.replace("return network(), ", "raise FileNotFoundError('no weights: run get.py'); ")
    (folder / "broken.py").write_text(broken)
    rows = run(folder, "--methods", "original", "prune", "--budgets", "ratio-0.5")
    assert rows["broken original"]["error"] == "FileNotFoundError: no weights: run get.py"
    assert rows["small ratio-0.5 prune"]["flops"] == 0.5
    text = (folder.parent / "out" / "real.md").read_text()
    assert "| ratio 0.5 | prune | failed |  |  |  |" in text
    assert "- FileNotFoundError: no weights: run get.py: original, ratio 0.5 prune\n" in text


def test_a_row_out_of_time_keeps_what_is_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(findings: Any, arguments: Any, seconds: float) -> tuple[dict[str, Any], float]:
        known = {"stage": "evaluate", "seconds": 1.0, "parameters": 0.903, "flops": 0.9}
        return {**known, "ended": f"stopped after {seconds:.0f} s"}, seconds

    monkeypatch.setattr(process, "measured", stopped)
    found = run(folder, "--methods", "prune", "--budgets", "ratio-0.1", "--limit", "4")["small ratio-0.1 prune"]
    assert found["error"] == "stopped after 4 s, in evaluate" and found["wall"] == 4
    text = (folder.parent / "out" / "real.md").read_text()
    assert "| ratio 0.1 | prune | out of time | 90.3% | 90.0% | 1.00 |" in text
    assert "- stopped after 4 s, in evaluate: ratio 0.1 prune\n" in text


def test_other_output_shapes_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(methods.METHODS, "prune", lambda task: (nn.Linear(6, 2), 0.0))  # type: ignore[arg-type]
    found = process.combined(map(json.dumps, one_row.findings(folder, "small", "ratio-0.1", "prune", 0)))
    assert found["error"] == "ValueError: the outputs have shapes [[2, 2]] instead of [[2, 3]]"


def test_the_network_s_own_file_is_imported(folder: Path) -> None:
    (folder / "json.py").write_text(SMALL)
    with pytest.raises(ImportError, match=r"import json gives .*lib.*; rename .*nets/json\.py"):
        nets.load(folder, "json")


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        (None, (), r"--nets: .*nets is not a folder"),
        ({}, (), r"--nets: .*nets contains no networks; a network is a file NAME\.py that defines load\(\), evaluate"),
        ({"a.py": "def load(): ...\ndef evaluate(m): ..."}, (), "contains no networks"),
        ({"a.py": "def load(:"}, (), r"--nets: .*a\.py cannot be read: invalid syntax"),
        ({"a.py": SMALL}, ("--only", "b"), r"--only: .*nets has no b; it has a"),
    ],
)
def test_a_bad_folder_is_an_error_of_the_command_line(
    files: dict[str, str] | None,
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nets_folder, out = tmp_path / "nets", tmp_path / "out"
    for name, text in (files or {}).items():
        nets_folder.mkdir(exist_ok=True)
        (nets_folder / name).write_text(text)
    if files == {}:
        nets_folder.mkdir()
    with pytest.raises(SystemExit) as stop:
        real.main(["--nets", str(nets_folder), "--out", str(out), *flags])
    assert stop.value.code == 2 and not out.exists()
    assert re.search(message, capsys.readouterr().err)


def test_the_rows_that_say_most_come_first() -> None:
    keys = list(real.requested(["a", "b"], list(methods.BUDGETS), list(methods.METHODS), 3))
    assert len(keys) == len(set(keys)) == 2 * (1 + 7 * 5) and {key[0] for key in keys} == {3}
    assert keys[:3] == [(3, "a", "", "original"), (3, "b", "", "original"), (3, "a", "ratio-0.1", "prune")]
    assert [key[2] for key in keys[2::10]][:3] == ["ratio-0.1", "ratio-0.3", "flops-0.7-greedy"]
    assert {key[1] for key in keys[2:12]} == {"a", "b"}


def row(network: str, budget: str, method: str, seed: int = 0, **found: Any) -> tuple[page.Key, dict[str, Any]]:
    return (seed, network, budget, method), {"machine": "a CPU", "torch": "2.6", **found}


def test_page_and_plot(tmp_path: Path) -> None:
    rows = dict([
        row("lm", "", "original", metric=29.3, flops=1.0),
        row("lm", "flops-0.7-greedy", "prune", metric=123456.7, flops=0.7, parameters=0.8, seconds=3.0),
        row("lm", "ratio-0.1", "prune", metric=40.0, flops=0.9, parameters=0.95, seconds=2.0),
        row("lm", "flops-0.7-uniform", "prune", metric=float("nan"), flops=0.71, parameters=0.7, seconds=2.0),
        row("lm", "ratio-0.3", "prune", error="stopped after 5 s, in merge"),
        row("lm", "ratio-0.3", "prune", seed=1, metric=1.0, flops=0.5),
    ])  # fmt: skip
    text = page.page(rows, 0)
    assert "One thread of a CPU; torch 2.6, seed 0." in text and "real.svg" in text
    assert "| lm | 29.3 | 70% of the FLOPs, greedy | 1.2e+05 |  |  |  |  |" in text
    assert "| lm | 29.3 | ratio 0.3 | out of time |  |  |  |  |" in text
    assert text.index("| ratio 0.3 | prune") < text.index("| 70% of the FLOPs, greedy | prune |")
    curves = page.points(page.by_network(rows, 0)["lm"])
    assert curves["prune", "greedy"] == [(70.0, 123456.7)]
    assert [left for left, _ in curves["prune", "uniform"]] == [90.0, 71.0]
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        page.plot(rows, 0, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    page.plot(rows, 5, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists() and "real.svg" not in page.page(rows, 5)


class Two(nn.Module):
    """Two hidden layers; the first has 12 channels with small weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 20), nn.Linear(20, 20), nn.Linear(20, 5)
        self.first.weight.data[:12] *= 0.01
        self.second.weight.data[:, :12] *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


def peer_row(budget: str) -> Two:
    torch.manual_seed(0)
    specimen = Specimen(Two().eval(), (torch.randn(2, 8),))
    small = methods.METHODS[methods.PEER](methods.Task(specimen, methods.BUDGETS[budget], 0, None))[0]
    assert small.head.out_features == 5 and small(torch.randn(3, 8)).shape == (3, 5)  # type: ignore[union-attr]
    return small  # type: ignore[return-value]


def test_torch_pruning_at_a_ratio_and_at_budgets() -> None:
    pytest.importorskip("torch_pruning")
    half = peer_row("ratio-0.5")
    assert (half.first.out_features, half.second.out_features) == (10, 10)
    whole = 8 * 20 + 20 * 20 + 20 * 5
    for share in (0.7, 0.5):
        uniform, greedy = (peer_row(f"flops-{share}-{allocation}") for allocation in ("uniform", "greedy"))
        for net in (uniform, greedy):
            a, b = net.first.out_features, net.second.out_features
            assert share - 0.12 < (8 * a + a * b + b * 5) / whole <= share
        assert uniform.first.out_features == uniform.second.out_features
        assert greedy.first.out_features < uniform.first.out_features < greedy.second.out_features


def test_torch_pruning_cannot_reach_a_budget() -> None:
    pytest.importorskip("torch_pruning")
    specimen = Specimen(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), (torch.randn(2, 4),))
    with pytest.raises(ValueError, match=r"100% of the FLOPs are left after all steps, more than 50%"):
        peer.prune_to_flops(specimen, "tests", 0.5, ignore=list(specimen.model))
