"""What users read: the reports' text in any environment and at any width, the names of models, and one-line reprs."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.ir.groups import Refusal
from fxmerge.refit.records import Refitted
from fxmerge.report.tables import REFITTED, REFUSED
from tests.helpers.drawings import data_of
from tests.helpers.netmaking import one_thread, plain_merge  # noqa: F401
from tests.helpers.nets import NETS

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTHS = (20, 40, 60, 80, 100, 120, 200)


class ModelWithARatherLongName(nn.Module):
    """Names as long as those of language models."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.ModuleDict({"intermediate_projection": nn.Linear(8, 12), "output_projection": nn.Linear(12, 8)})  # noqa: E501, E731
        self.the_language_model_backbone = nn.ModuleDict({"encoder_layers": nn.ModuleList(block() for _ in range(12))})
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.the_language_model_backbone["encoder_layers"]:  # type: ignore[union-attr]
            x = x + layer["output_projection"](torch.nn.functional.gelu(layer["intermediate_projection"](x)))
        return self.head(x)  # type: ignore[no-any-return]


def rows(text: str, title: str) -> list[str]:
    """The lines of the table with this title, from the line below its header up to the next empty line."""
    lines = text.splitlines()
    lines = lines[next(at for at, line in enumerate(lines) if line.startswith(title)) :]
    start = next(at for at, line in enumerate(lines) if line and set(line) <= set("-─")) + 1
    return lines[start : lines.index("", start)]


def shows(row: str, name: str) -> bool:
    """Whether a row begins with a name, whole or with a part of its middle left out."""
    shown = row.split()[0]
    if shown == name:
        return True
    parts = re.split(r"…|\.\.\.", shown)
    return len(parts) > 1 and name.startswith(parts[0]) and name.endswith(parts[-1]) and len(shown) >= 10


@pytest.mark.parametrize("exported", [False, True])
def test_every_row_has_its_name_on_one_line_at_every_width(exported: bool) -> None:
    torch.manual_seed(0)  # refit is better than merging alone, so that there is a table of it
    model, x = ModelWithARatherLongName().eval(), torch.randn(2, 8)
    given: Any = torch.export.export(model, (x,)) if exported else model
    result = fxmerge.merge(given, x, ratio=0.5, samples=32)
    for width in WIDTHS:
        for ascii in (False, True):
            before, after = (r.text(width, ascii=ascii) for r in (result.analysis.report, result.report))
            assert all(len(line) <= width for text in (before, after) for line in text.splitlines())
            assert not ascii or (before + after).isascii()
            names = [g.name for g in result.analysis.groups]
            for title, text in (("Merge groups", before), ("Merged groups", after)):
                for name, row in zip(names, rows(text, title), strict=False):
                    assert shows(row, name), (width, name, row)
            for layer, row in zip(result.report.refitted, rows(after, "Refit"), strict=False):
                assert shows(row, layer.name)
            assert "ModelWithARatherLongName" in "".join(before.split()) and "GraphModule" not in before + after


def test_the_groups_and_their_figures_are_told() -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5, decomposition="mostsim")
    found = {row.split()[0]: row.split() for row in rows(result.report.text(), "Merged groups of Net")}
    assert found["a"][1:4] == ["16", "->", "8"] and found["stem"][1:4] == ["12", "->", "6"]
    for g in result.analysis.report.groups:
        row = next(r for r in rows(result.analysis.report.text(), "Merge groups of Net") if r.split()[0] == g.name)
        producers = [m.layer.module for m in g.producers]
        assert str(g.channels) in row and all(name in row for name in producers)
        assert all(m.layer.module in row for m in (*g.consumers, *g.per_channel_params))
    alone = {p.name: sum(q.into < 0 for q in p.partners) for p in result.plan.groups}
    assert {name: int(found[name][-1]) for name in alone} == alone


def test_rescaling_is_noted_by_the_operations_names() -> None:
    model, x = ModelWithARatherLongName().eval(), torch.randn(2, 8)
    text = plain_merge(model, x, ratio=0.5, decomposition="mostsim").report.text(200)
    assert text.count("merged without rescaling, because scaling does not pass through gelu\n") == 1
    assert "gelu_" not in text


def test_equal_refusals_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NETS["residual"]()
    report = fxmerge.analyze(model, x).report
    gates, why = [f"blocks.{i}.gate" for i in range(9)], "weight maps positions"
    alike = [Refusal(gate, 4, f"{gate}.{why}", f"net.py:{7 + (gate in gates[:-1])}, in f") for gate in gates]
    others = [Refusal(f"layer{i}", 2, "reason " + "x" * i, "") for i in range(REFUSED + 5)]
    several = [Refusal("head", 3, "topk has no rule", f"net.py:{i}, in f") for i in range(3)]
    text = dataclasses.replace(report, refusals=(*alike, *several)).text(100)
    found = rows(text, "Cannot be merged")
    assert [row.split() for row in found[::2]] == [["blocks.0.gate", "+8", "36", "0"], ["head", "9", "0"]]
    assert found[1] == "    blocks.0.gate.weight maps positions [net.py:8, in f, and 1 more line]"
    assert found[3] == "    topk has no rule [net.py:0, in f, and 2 more lines]"
    text = dataclasses.replace(report, refusals=tuple(others)).text(100)
    assert text.count("    reason") == REFUSED and "and 5 more for other reasons, with 0 parameters" in text
    assert len(json.loads(dataclasses.replace(report, refusals=tuple(others)).json())["refusals"]) == len(others)


def test_the_layers_with_the_largest_errors_of_many() -> None:
    model, x = NETS["residual"]()
    report = plain_merge(model, x, ratio=0.5).report
    refitted = tuple(Refitted(f"l{i}", 1.0, 0.5 if i % 2 else 0.001) for i in range(2 * REFITTED))
    found = rows(dataclasses.replace(report, refitted=refitted).text(), "Refit")
    assert [row.split()[0] for row in found[:-1]] == [f"l{i}" for i in range(1, 2 * REFITTED, 2)]
    assert found[-1] == f"and {REFITTED} more with smaller errors; the JSON report has them all"


# The environment


def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    model, x = NETS["residual"]()
    result = fxmerge.merge(model, x, ratio=0.5, samples=32)
    sweep = fxmerge.sweep(model, x, [0.6], refit="none")
    return [result.report.text(), result.analysis.report.text(), re.sub(r"\d+\n", "", sweep.text())]


@pytest.mark.slow
def test_a_notebook_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = seen(monkeypatch)

    class ZMQInteractiveShell:  # the name by which rich recognises a notebook
        kernel = object()
        config = types.MappingProxyType[str, Any]({})

    shown: list[Any] = []
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    module = type(sys)("IPython")
    display = type(sys)("IPython.display")
    display.display = lambda *args, **kwargs: shown.append(args)  # type: ignore[attr-defined]
    module.get_ipython, module.display = ZMQInteractiveShell, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    from rich.console import Console

    assert Console().is_jupyter  # so the test can fail
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert seen(monkeypatch) == expected and not shown
    model, x = NETS["residual"]()
    plain_merge(model, x, ratio=0.5).save(tmp_path / "merged")
    assert (tmp_path / "merged" / "report.txt").read_text(encoding="utf-8").count("\n") > 10


SCRIPT = """
import sys, torch, fxmerge
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
result = fxmerge.merge(model, torch.ones(2, 6), ratio=0.5, samples=32)
result.save(sys.argv[1])
sweep = fxmerge.sweep(model, torch.ones(2, 6), [0.6], refit="none", out=sys.argv[2])
sys.stdout.write(result.report.text() + result.analysis.report.text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("environment", [
    {"FORCE_COLOR": "1"}, {"NO_COLOR": "1", "COLUMNS": "30"}, {"TERM": "dumb", "LINES": "3"},
    {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"},
], ids=lambda e: "+".join(e))  # fmt: skip
def test_no_environment_changes_the_text(environment: dict[str, str], tmp_path: Path) -> None:
    held = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR")}
    outputs = []
    for number, changed in enumerate(({}, environment)):
        folders = [str(tmp_path / f"{name}{number}") for name in ("merged", "sweep")]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *folders], capture_output=True, env={**held, **changed}, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        assert "\x1b" not in done.stderr.decode()
        written = [Path(folders[0], "report.txt"), Path(folders[1], "sweep.txt")]
        texts = [done.stdout.decode(), *(path.read_text(encoding="utf-8") for path in written)]
        outputs.append([re.sub(r"\d+\n", "\n", text) for text in texts])
    assert outputs[0] == outputs[1]
    assert all(text.count("\n") > 3 and "\x1b" not in text for text in outputs[0])


# Names and numbers


@pytest.mark.parametrize("as_program", [False, True])
def test_an_exported_model_has_its_own_name(as_program: bool) -> None:
    class Ranking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 10:
                x = x.relu()
            return self.b(nn.functional.silu(self.a(x)))  # type: ignore[no-any-return]

    model, x = Ranking().eval(), torch.randn(2, 4)
    given: Any = torch.export.export(model, (x,)) if as_program else model
    result = plain_merge(given, x, ratio=0.5)
    assert (result.analysis.captured.route, result.analysis.captured.name) == ("export", "Ranking")
    for report in (result.report, result.analysis.report):
        assert data_of(report.html())["title"] == "Ranking" and "<title>Ranking - fxmerge" in report.html()
        assert "of Ranking" in report.text() and json.loads(report.json())["model"] == "Ranking"
        assert report.dot().startswith('digraph "Ranking"')
        assert "Ranking" in repr(report) and "GraphModule" not in report.mermaid()


def test_reprs_are_one_line() -> None:
    for name in ("residual", "mlp"):
        model, x = NETS[name]()
        result = plain_merge(model, x, ratio=0.5)
        sweep = fxmerge.sweep(model, x, [0.6], refit="none")
        for found in (result, result.analysis, result.report, result.analysis.report, sweep):
            assert "\n" not in repr(found) and len(repr(found)) < 120
        groups = f"{len(result.plan.groups)} of {len(result.analysis.groups)} groups merged"
        assert groups in repr(result) and groups in repr(result.report)
        assert f"{len(result.analysis.groups)} groups" in repr(result.analysis)


def test_numbers_that_are_not_finite_are_null_everywhere(tmp_path: Path) -> None:
    model, x = NETS["residual"]()
    result = plain_merge(model, x, ratio=0.5)
    group = result.plan.groups[0]
    partners = tuple(dataclasses.replace(p, cosine=float("nan"), scale=float("inf")) for p in group.partners)
    plan = dataclasses.replace(result.plan, groups=(dataclasses.replace(group, partners=partners),))
    refitted = (Refitted("a", float("nan"), float("inf"), "unchanged"), Refitted("fc", 0.5, float("nan")))
    report = dataclasses.replace(result.report, plan=plan, refitted=refitted)

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    data = json.loads(report.json(), parse_constant=refuse)
    assert data["refit"][0] == {"name": "a", "before": None, "after": None, "note": "unchanged"}
    held = next(g for g in data["groups"] if g["name"] == group.name)
    assert held["similarity"] is None and {p["cosine"] for p in held["partners"]} == {None}
    schema = Path(fxmerge.__file__).parent / "assets" / "report.schema.json"
    pytest.importorskip("jsonschema").Draft202012Validator(json.loads(schema.read_text())).validate(data)
    json.loads(json.dumps(data_of(report.html())), parse_constant=refuse)
    assert not re.search(r"\b(nan|inf)\b", report.text())
    assert [row.split() for row in rows(report.text(), "Refit")] == [
        ["a", "-", "-", "1"], ["fc", "0.5000", "-"], ["1:", "unchanged"]
    ]  # fmt: skip
    result.save(tmp_path)  # what is saved is what is printed
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(result.report.json())
    assert (tmp_path / "report.txt").read_text(encoding="utf-8") == result.report.text()
