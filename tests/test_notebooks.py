"""The notebooks of examples/: they run, and the outputs that they hold are those that they give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.ipynb"))


def printed(cell: dict[str, Any]) -> list[str]:
    """What a cell prints, without numbers, which differ a little between machines, and without addresses."""
    text = "".join("".join(out.get("text", [])) for out in cell.get("outputs", []) if out["output_type"] == "stream")
    return [re.sub(r"[\d.,%]+|─+", "", line).split() for line in text.splitlines()]  # type: ignore[misc]


def test_there_are_notebooks() -> None:
    assert {p.stem for p in NOTEBOOKS} == {"tour", "vit"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_as_it_ran(path: Path) -> None:
    """In one go from the top, without an error, and small enough to be read in a browser."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    assert not [out for c in cells for out in c["outputs"] if out["output_type"] == "error"]
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_gives_the_outputs_that_it_holds(path: Path, tmp_path: Path) -> None:
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    held = [printed(c) for c in book.cells if c.cell_type == "code"]
    client.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert [printed(c) for c in book.cells if c.cell_type == "code"] == held
    assert any(held)
