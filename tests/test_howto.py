"""The pages of docs/ that show a user's day: their snippets run, in order."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    found = snippets("hugging_face.md")
    assert len(found) == 10
    for code in found:
        exec(compile(code, "hugging_face.md", "exec"), space)
    plain, even, experts, fewer = (map(int, line.split()) for line in capsys.readouterr().out.splitlines()[-4:])
    assert tuple(experts) == (32,)
    assert tuple(fewer) == (2,)
    assert tuple(plain) == (2, 1, 64)
    assert all(now <= before for now, before in zip(even, (4, 2, 128), strict=True))
    assert not [*tmp_path.glob("plain/*.py"), *tmp_path.glob("budget/*.py")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "needs", "count"),
    [
        ("exporters.md", ("torchvision", "onnxscript", "onnxruntime"), 5),
        ("timm.md", ("timm",), 3),
        ("training.md", (), 5),
        ("detection.md", ("torchvision",), 5),
    ],
)
def test_page(page: str, needs: tuple[str, ...], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in needs:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "the_page", types.ModuleType("the_page"))
    space: dict[str, object] = {"__name__": "the_page"}
    found = snippets(page)
    assert len(found) == count
    torch.manual_seed(0)
    for code in found:
        exec(compile(code, page, "exec"), space)


@pytest.mark.slow
def test_get_started_and_the_pages_that_go_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "the_page", types.ModuleType("the_page"))
    space: dict[str, object] = {"__name__": "the_page"}
    torch.manual_seed(0)
    for page, count in (("index.md", 7), ("options.md", 2), ("saving.md", 1), ("large_models.md", 3)):
        found = [code for code in snippets(page) if "..." not in code]
        assert len(found) == count
        for code in found:
            exec(compile(code, page, "exec"), space)
    assert "parameters" in capsys.readouterr().out
    assert {"net.html", "small", "curve.svg", "narrow"} <= {p.name for p in tmp_path.iterdir()}


def test_yolo_is_the_example() -> None:
    """The trainer of the page is that of `examples/yolo.py`, which the tests of the examples run."""
    example = (DOCS.parent / "examples" / "yolo.py").read_text(encoding="utf-8")
    kept = 'yolo.ckpt = yolo.ckpt or {"model": yolo.model}'
    for line in ("class KeepWidths(DetectionTrainer):", "return weights", "yolo.model = result.model", kept):
        assert line in example
        assert any(line in code for code in snippets("yolo.md"))
