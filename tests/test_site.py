"""The documentation site: it builds, its menu names every page, and every error and refusal is explained."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxmerge

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted(Path(fxmerge.__file__).parent.rglob("*.py"))
TROUBLE = ROOT / "docs" / "troubleshooting.md"
REASONS = {"Unknown", "pin"}  # what gives the reason of a refusal


def template(node: ast.expr) -> str | None:
    """The text of a string, with an ellipsis for what is computed; None if it is something else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (template(node.left) or "…") + (template(node.right) or "…")
    return None


ERRORS = {"FxMergeError", "UnfaithfulError"}


def messages(source: str, makers: set[str]) -> Iterator[str]:
    """The first lines of the texts that are passed to calls of these names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            for text in map(template, node.args if name in makers else []):
                line = " ".join(text.split("\n")[0].split()) if text else ""
                if " " in line.replace("…", "").strip():
                    yield line


def listed(page: str) -> set[str]:
    """The messages on a page: the lines of its blocks."""
    blocks = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return {line for block in blocks for line in block.splitlines()}


@pytest.mark.parametrize("makers", [ERRORS, REASONS], ids=["errors", "refusals"])
def test_every_message_is_on_the_page_of_troubles(makers: set[str]) -> None:
    known = {m for path in PACKAGE for m in messages(path.read_text(encoding="utf-8"), makers)}
    assert len(known) > 50
    assert sorted(known - listed(TROUBLE.read_text(encoding="utf-8"))) == []


def test_no_error_on_the_page_is_gone() -> None:
    """Messages that the code no longer has are taken off the page. Some refusals are put together from parts."""
    errors = TROUBLE.read_text(encoding="utf-8").partition("## Channels that are left")[0]
    lines = listed(errors)
    code = {m for path in PACKAGE for m in messages(path.read_text(encoding="utf-8"), ERRORS)}
    assert sorted(lines - code) == []


def test_messages_are_found() -> None:
    source = 'raise FxMergeError(f"{name} is {x!r}; give " + "a number\\nor none")\nraise ValueError("not this one")'
    assert list(messages(source, {"FxMergeError"})) == ["… is …; give a number"]


def test_the_menu_names_every_page() -> None:
    menu = re.findall(r"[\w.]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])
    assert sorted(menu) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    """Every link and anchor leads somewhere, and what the reference names exists."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("fxmerge.merge", "fxmerge.Options", "fxmerge.Result"):
        assert f'id="{name}"' in reference
