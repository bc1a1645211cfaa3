"""The structure of the package: the import contract, where networkx is imported, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fxmerge

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fxmerge.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


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
    importing = [named(p) for p in FILES if any(name.split(".")[0] == "networkx" for name in imported(p))]
    assert importing == ["analysis/group_graph.py", "analysis/groups.py"]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "methods"], ids=named)
def test_maths_takes_tensors(path: Path) -> None:
    assert not [n for n in imported(path) if n.startswith(("torch.fx", "torch.nn"))]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_is_no_longer_than_300_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_pickle_and_no_printing() -> None:
    """Files are read and written without pickle; only the command line prints."""
    assert not [named(p) for p in FILES if imported(p) & {"pickle", "torch.load", "torch.save"}]
    printing = [
        named(p)
        for p in FILES
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert set(printing) <= {"cli/main.py"}


def test_modules_are_listed_by_the_class() -> None:
    """`nn.Module.modules(model)`, since a model may hold an attribute named `modules`, as ESPNet does."""
    calling = [
        named(p)
        for p in FILES
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr == "modules" and not node.args
    ]  # fmt: skip
    assert not calling


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


def test_the_tests_mirror_the_package() -> None:
    """A folder of tests has the name of a folder of the package, apart from these three."""
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("test_*.py"))}
    assert folders - {"benchmarks", "helpers", "golden"} <= {p.parent.name for p in FILES}
