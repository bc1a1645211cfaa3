"""Sweeps: one curve, made once, taken up where it was left; the table, the JSON and the plot tell the same numbers."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxmerge
from fxmerge import FxMergeError, Options, Plan, pipeline
from fxmerge.calibration import fit_probes
from fxmerge.cli.main import main
from fxmerge.pipeline import Prepared
from fxmerge.report.picture.curve import HEIGHT, WIDTH, curve, ticks
from tests.helpers.netmaking import one_thread, randomised  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Module:
    layers = [nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 5)]
    return randomised(nn.Sequential(*layers), seed).eval()


def size(module: nn.Module) -> Tensor:
    """A stand-in for accuracy: anything that gives one number."""
    return torch.tensor(sum(p.numel() for p in module.parameters()) / 100)


def flops(module: nn.Module) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(X)
    return int(counter.get_total_flops())


def test_each_point_is_the_merge_at_its_budget() -> None:
    model = net()

    def evaluated(module: nn.Module) -> Tensor:
        assert not module.training and not torch.is_grad_enabled()
        return size(module)

    found = fxmerge.sweep(model.train(), X, [0.3, 0.7, 0.5], evaluated, refit="none")
    assert model.eval() is model
    assert [p.asked for p in found.points] == [0.7, 0.5, 0.3]
    assert found.original.value == float(size(model)) and found.original.flops == flops(model)
    for point in found.points:
        alone = fxmerge.merge(model, X, budget={"flops": point.asked}, refit="none")
        assert point.left == flops(alone.module) / flops(model) == pytest.approx(point.asked, rel=0.01)
        assert point.parameters == sum(p.numel() for p in alone.module.parameters())
        assert point.error == pytest.approx(alone.report.verdict.error)
        assert point.value == float(size(alone.module))
        assert point.widths == {g.name: len(g.kept) for g in alone.plan.groups}
    text = found.text()
    assert found.measure == "evaluated" and "evaluated" in text and ">evaluated</text>" in found.svg()
    assert all(f"{p.parameters:,}" in text and f"{p.flops:,}" in text for p in (found.original, *found.points))
    told = json.loads(found.json())
    assert [p["value"] for p in told["points"]] == [p.value for p in found.points]


def test_what_is_common_to_all_budgets_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes, the survey and the capture; merges by themselves would do them three times."""
    shared = {"capture": pipeline, "provenance": pipeline, "readings": pipeline, "fed": fit_probes}
    calls: list[str] = []
    for name, module in shared.items():
        whole = getattr(module, name)

        def counted(*args: Any, _name: str = name, _whole: Any = whole, **named: Any) -> Any:
            calls.append(_name)
            return _whole(*args, **named)

        monkeypatch.setattr(module, name, counted)
    fxmerge.sweep(net(), X, [0.7, 0.5, 0.3], samples=64)
    assert sorted(calls) == sorted(shared)  # the survey serves the drafts that are compared


def test_a_sweep_is_taken_up_where_it_was_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[float] = []
    whole = Prepared.merged

    def counting(self: Prepared, options: Options, *args: Any, **named: Any) -> Any:
        merged.append(options.budget["flops"])
        return whole(self, options, *args, **named)

    monkeypatch.setattr(Prepared, "merged", counting)

    def run(budgets: list[float], model: nn.Module | None = None, evaluate: Any = size, **changes: Any) -> Any:
        merged.clear()
        return fxmerge.sweep(model or net(), X, budgets, evaluate, out=tmp_path, **{"refit": "none", **changes})

    def breaks(module: nn.Module) -> float:
        if len(merged) == 2:
            raise KeyboardInterrupt
        return float(size(module))

    breaks.__qualname__, breaks.__module__ = size.__qualname__, size.__module__
    with pytest.raises(KeyboardInterrupt):
        run([0.7, 0.5], evaluate=breaks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flops-0.7.json"]
    first = run([0.7, 0.5])
    assert merged == [0.5]
    again = run([0.7, 0.5, 0.3])
    assert merged == [0.3] and again.points[:2] == first.points and again.original == first.original
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(again.json())
    assert (tmp_path / "sweep.txt").read_text() == again.text()
    plan = Plan.from_json(json.dumps(json.loads((tmp_path / "flops-0.5.json").read_text())["plan"]))
    widths = {g.name: len(g.kept) for g in fxmerge.apply(plan, net(), X).plan.groups}
    assert widths == again.points[1].widths
    for changes in ({"model": net(1)}, {"evaluate": None}, {"selection": "l1"}, {"allocation": "uniform"}):
        run([0.5], **changes)
        assert merged == [0.5], changes
    (tmp_path / "flops-0.5.json").write_text("{")
    run([0.5])
    assert merged == [0.5]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_budget_that_cannot_be_met_is_a_row_that_says_why(tmp_path: Path) -> None:
    found = fxmerge.sweep(net(), X, [0.5, 0.01], refit="none", out=tmp_path)
    assert not found.points[0].failed and "raise max_ratio" in found.points[1].failed
    assert "not met" in found.text() and "asks for 1.0%" in found.text()
    assert not (tmp_path / "flops-0.01.json").exists()
    assert json.loads(found.json())["points"][1]["left"] is None and math.isnan(found.points[1].left)
    assert found.svg().count("<circle") == 1
    with pytest.raises(FxMergeError, match="asks for"):
        fxmerge.sweep(net(), X, [0.01], refit="none")


@pytest.mark.parametrize(("given", "match"), [
    ({"budgets": []}, "budgets"), ({"budgets": 0.5}, "budgets"), ({"budgets": "0.5"}, "budgets"),
    ({"budgets": [0.5, 2]}, "flops"), ({"budgets": ["a"]}, "flops"), ({"kind": "flop"}, "flop"),
    ({"ratio": 0.5}, "leave out the options budget and ratio"), ({"budget": {"flops": 0.5}}, "leave out the option"),
    ({"evaluate": lambda module: "good"}, "evaluate returned a str"),
    ({"evaluate": lambda module: math.nan}, "evaluate returned nan"),
    ({"evaluate": lambda module: torch.zeros(3)}, "evaluate returned a Tensor"),
])  # fmt: skip
def test_nonsense_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(FxMergeError, match=match):
        fxmerge.sweep(net(), X, **{"budgets": [0.5], "refit": "none", **given})


def test_the_plot_shows_every_point(tmp_path: Path) -> None:
    found = fxmerge.sweep(net(), X, [0.7, 0.5, 0.3], size, refit="none")
    drawn = ET.fromstring(found.svg(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").read_text() == found.svg()
    dots = [e for e in drawn.iter() if e.tag.endswith("circle")]
    xs, ys = ([float(e.attrib[a]) for e in dots] for a in ("cx", "cy"))
    assert len(dots) == 3 and xs == sorted(xs) and ys == sorted(ys, reverse=True)  # more is right and above
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in zip(xs, ys, strict=True))
    with pytest.raises(FxMergeError, match=r"a\.png"):
        found.svg(tmp_path / "a.png")


SPANS = [(0, 1), (93.2, 94.6), (25, 75), (5, 5), (0, 0), (-3, 8), (1e-9, 3e-9), (88.7, 1e6)]


@pytest.mark.parametrize(("low", "high"), SPANS)
def test_ticks_are_round_and_hold_everything(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 2 <= len(found) <= 9
    step = found[1] - found[0]
    assert re.match(r"[125](\.0+)?e", f"{step:.6e}")


def test_a_plot_puts_a_point_where_the_ticks_say() -> None:
    """A point on a tick lies on that tick's grid line."""
    drawn = curve([(20.0, 90.0), (60.0, 94.0)], "t", "x", "y <&>", (95.0, "original"))
    lines = {float(y) for y in re.findall(r'class="grid" d="M\S+ (\S+)H', drawn)}
    dots = [float(y) for y in re.findall(r'cy="(\S+?)"', drawn)]
    assert set(dots) <= lines and "y &lt;&amp;&gt;" in drawn and ET.fromstring(drawn) is not None


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "swept.py").write_text(
        "import torch\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Linear(12, 40),\n"
        "        torch.nn.ReLU(), torch.nn.Linear(40, 60), torch.nn.ReLU(), torch.nn.Linear(60, 5))\n"
        "example_inputs = torch.ones(2, 12)\ndef count(m):\n    return sum(p.numel() for p in m.parameters())\n"
    )
    file, out = tmp_path / "swept.py", tmp_path / "out"
    flags = ["sweep", f"{file}:make", "--out", str(out), "--refit", "none", "--budgets", "0.7", "0.4"]
    assert main([*flags, "--kind", "params", "--evaluate", f"{file}:count"]) == 0
    told = capsys.readouterr().out
    assert "70.0%" in told and "40.0%" in told and "count" in told
    assert {"params-0.7.json", "params-0.4.json", "sweep.svg"} <= {p.name for p in out.iterdir()}
    assert main([*flags, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 2
    for wrong, match in (
        (["--evaluate", f"{file}:nothing"], "no callable"),
        (["--evaluate", "count"], "does not name a function"),
        (["--kind", "time"], "time"),
        (["--ratio", "0.5"], "--ratio"),  # a sweep has budgets
    ):
        try:
            status: Any = main([*flags, *wrong])
        except SystemExit as stopped:  # while the flags are read
            status = stopped.code
        assert status == 2
        assert match in capsys.readouterr().err
