"""The shape of the package: who may import whom, where networkx lives, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fxmerge

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(Path(fxmerge.__file__).parent.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every name that a file imports, dotted: `torch.nn` for `from torch import nn`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def test_import_order() -> None:
    pytest.importorskip("importlinter")
    command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(config_filename='setup.cfg'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_networkx_stays_in_groups() -> None:
    assert [p.name for p in FILES if any(name.split(".")[0] == "networkx" for name in imported(p))] == ["groups.py"]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "methods"], ids=lambda p: p.name)
def test_maths_takes_tensors(path: Path) -> None:
    assert not [n for n in imported(path) if n.startswith(("torch.fx", "torch.nn"))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_is_no_longer_than_300_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_pickle_and_no_printing() -> None:
    """Files are read and written without pickle; only the command line prints."""
    assert not [p.name for p in FILES if imported(p) & {"pickle", "torch.load", "torch.save"}]
    printing = [
        p.name
        for p in FILES
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert set(printing) <= {"main.py"}


def test_public_names() -> None:
    """Other people's scripts use these."""
    names = {"merge", "analyze", "apply", "Options", "Plan", "MergePass", "FxMergeError", "RULES", "per_channel",
             "SELECTORS", "DECOMPOSITIONS", "ALLOCATORS", "verify", "load", "compile"}  # fmt: skip
    assert names <= set(fxmerge.__all__)
    assert all(getattr(fxmerge, name) is not None for name in fxmerge.__all__)


def test_no_test_file_imports_another() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    guilty = {p.name: [n for n in imported(p) if ".test_" in n or n.startswith("test_")] for p in tests}
    assert not {name: found for name, found in guilty.items() if found}
