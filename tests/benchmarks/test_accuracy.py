"""benchmarks.accuracy: its page has the measured and the published accuracies."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")  # for the plots

import fxmerge
from benchmarks.accuracy import budgets
from benchmarks.accuracy import ratios as accuracy
from benchmarks.accuracy.ratios import CASES, METHODS, Case, Cell
from fxmerge.report.points import Point

CASE = Case("resnet56", "internal", (0.3, 0.5), 500, 2000)
ROWS = [
    Cell(ratio, method, 90 - 10 * ratio - at, 1000 * (10 - at), 1.0)
    for ratio in CASE.ratios
    for at, method in enumerate(METHODS)
]


def test_the_table_has_a_row_for_each_ratio_and_a_column_for_each_method() -> None:
    page = accuracy.markdown(CASE, 94.65, ROWS, {0.5: 57.82})
    lines = page.splitlines()
    assert lines[0] == "## ResNet-56, CIFAR-10, inner channels"
    assert "first 2,000 test images, original 94.65 %; 500 unlabelled training images" in lines[2]
    assert lines[4] == "| dropped | " + " | ".join(METHODS) + " | published code |"
    assert lines[6] == "| 30% | 87.00 | 86.00 | 85.00 | 84.00 | 83.00 | 82.00 | - |"
    assert lines[7] == "| 50% | 85.00 | 84.00 | 83.00 | 82.00 | 81.00 | 80.00 | 57.82 |"


def test_published_is_the_best_of_all_criteria_and_of_inner_channels_only(tmp_path: Path) -> None:
    rows = [{"ratio": 0.5, "merge": 57.1}, {"ratio": 0.5, "merge": 57.8}, {"ratio": 0.3, "merge": 84.0}]
    (tmp_path / "resnet56.json").write_text(json.dumps({"rows": rows}))
    assert accuracy.published(CASE, tmp_path) == {0.5: 57.8, 0.3: 84.0}
    assert accuracy.published(CASES["resnet56-all"], tmp_path) == {}


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        accuracy.plot({"resnet56": (94.65, ROWS)}, tmp_path / name)
    first, second = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second and "ResNet-56, internal" in first


def curve(values: list[float]) -> fxmerge.Sweep:
    def point(share: float, error: float, value: float) -> Point:
        size = {"parameters": round(1000 * share), "flops": round(1e6 * share)}
        return Point(kind="flops", asked=share, left=share, error=error, value=value, **size)

    points = [point(share, 0.1, value) for share, value in zip((0.5, 0.35), values, strict=True)]
    return fxmerge.Sweep(point(1.0, 0.0, 94.65), tuple(points), "top1")


def test_budgets_come_after_the_other_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "accuracy.md"
    page.write_text("# Accuracy\n\nkept\n")
    for better in (0.0, 1.0):
        found = {"uniform": curve([89.0, 80.0]), "greedy": curve([91.0 + better, 85.0])}
        monkeypatch.setattr(budgets, "curves", lambda *args, _found=found: _found)
        budgets.main(["--data", ".", "--weights", ".", "--out", str(tmp_path)])
    lines, before = page.read_text().splitlines(), page.read_text().partition(accuracy.BUDGETS)[2]
    assert lines[:3] == ["# Accuracy", "", "kept"] and lines.count("all channels:") == 1
    assert "| FLOPs left | uniform | parameters left | greedy | parameters left |" in lines
    assert lines.count("| 50% | 89.00 | 50.0% | 92.00 | 50.0% |") == 2  # one for each scope
    assert any("--shares 0.5 0.35" in line and "original 94.65 %" in line for line in lines)
    assert "ResNet-56, all channels" in (tmp_path / "budgets.svg").read_text()
    monkeypatch.setattr(accuracy, "cells", lambda *args: (94.65, ROWS))
    accuracy.main(["--data", ".", "--weights", ".", "--only", "resnet56", "--out", str(tmp_path)])
    again = page.read_text()
    assert "kept" not in again and "## ResNet-56, CIFAR-10, inner channels" in again
    assert again.partition(accuracy.BUDGETS)[2].splitlines() == before.splitlines()
