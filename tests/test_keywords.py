"""What editors and type checkers know: the keyword options, and a user's script as `mypy --strict` sees it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import fxmerge
from fxmerge import Options, keywords
from fxmerge.keywords import CompileKeywords, Keywords, SweepKeywords
from fxmerge.options import BUDGETS, choices

ROOT = Path(__file__).resolve().parents[1]
REGISTRIES = {"selection", "decomposition", "allocation", "probes"}


def literals(hint: Any) -> set[str]:
    """The strings of a Literal; empty for other types."""
    return {value for value in get_args(hint) if isinstance(value, str)}


def test_the_keywords_are_the_fields_of_options() -> None:
    """Each has the type of its field; of an open registry, the names that come with the package."""
    fields, hints = get_type_hints(Options), get_type_hints(Keywords)
    assert set(hints) == {f.name for f in dataclasses.fields(Options)}
    for name, allowed in choices().items():
        assert literals(hints[name]) == set(allowed), name
        assert literals(fields[name]) == (set() if name in REGISTRIES else set(allowed)), name
    plain = set(hints) - set(choices()) - {"ignore", "of"}
    assert {name: hints[name] for name in plain} == {name: fields[name] for name in plain}
    assert all(fields[name] in get_args(hints[name]) for name in ("ignore", "of"))
    assert {*get_args(keywords.Budget)} == set(BUDGETS)


def test_the_keywords_of_the_other_functions() -> None:
    own = set(get_type_hints(CompileKeywords)) - set(get_type_hints(Keywords))
    assert own and own < set(inspect.signature(torch.compile).parameters)
    assert set(get_type_hints(Keywords)) - set(get_type_hints(SweepKeywords)) == {"ratio", "budget"}


def test_every_function_with_options_names_its_keywords() -> None:
    found = {}
    for name in fxmerge.__all__:
        function = getattr(fxmerge, name)
        if inspect.isfunction(function):
            *_, last = inspect.signature(function).parameters.values()
            found |= {name: last.annotation} if last.kind == last.VAR_KEYWORD else {}
    assert found == {"merge": "Unpack[Keywords]", "analyze": "Unpack[Keywords]", "sweep": "Unpack[SweepKeywords]",
                     "compile": "Unpack[CompileKeywords]"}  # fmt: skip


def test_every_option_has_a_sentence() -> None:
    """An editor shows the string below a field."""
    tree = ast.parse(Path(inspect.getfile(Options)).read_text(encoding="utf-8"))
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Options").body
    told = {
        one.target.id
        for one, other in itertools.pairwise(body)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        and isinstance(other, ast.Expr) and isinstance(other.value, ast.Constant)
    }  # fmt: skip
    assert told == {f.name for f in dataclasses.fields(Options)}


SCRIPT = """
import torch
import fxmerge

model, x = torch.nn.Linear(2, 3), torch.randn(1, 2)
result = fxmerge.merge(model, x, ratio=0.5, selection="l1", ignore=["a"], keep={"b": 2, "c": 0.5})
print(result.module, result.report.text())
fxmerge.merge(model, x, fxmerge.Options(selection="mine"))
fxmerge.compile(model, x, budget={"flops": 0.5}, mode="max-autotune")
fxmerge.sweep(model, x, [0.5], kind="params", refit="none")
fxmerge.merge(model, x, ratoi=0.5)  # ratoi
fxmerge.merge(model, x, refit="nope")  # refit
fxmerge.merge(model, x, selection="mine")  # selection
fxmerge.merge(model, x, ratio="half")  # ratio
fxmerge.merge(model, x, ignore="conv1")  # ignore
fxmerge.analyze(model, x, head="width")  # head
fxmerge.compile(model, x, fullgraf=True)  # fullgraf
fxmerge.sweep(model, x, [0.5], ratio=0.5)  # ratio
fxmerge.sweep(model, x, [0.5], kind="flop")  # kind
fxmerge.Options(heads="wide")  # heads
fxmerge.Options(sed=1)  # sed
fxmerge.Options().replace(scope="some")  # scope
result.modul  # modul
"""


def installed(folder: Path) -> Path:
    """The python of an environment with fxmerge installed as by `pip install -e .`, and all that this one has."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fxmerge", source / "fxmerge", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools import build_meta as b; b.build_editable({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    venv.create(folder / "venv", symlinks=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the environment's folders have other names there")
def test_mypy_finds_a_misspelt_option(tmp_path: Path) -> None:
    """In an editable install, which mypy only follows if it is a path. torch's types take minutes and are skipped."""
    pytest.importorskip("mypy")
    pytest.importorskip("setuptools", minversion="77")
    python = installed(tmp_path)
    (tmp_path / "user.py").write_text(SCRIPT)
    skipped = ",".join(f"{name}.*" for name in ("torch", "numpy", "scipy", "networkx", "rich"))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n[mypy-{skipped}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--python-executable", str(python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error: " in line}
    expected = {at: line.split("# ")[1] for at, line in enumerate(SCRIPT.splitlines(), 1) if "  # " in line}
    assert set(lines) == set(expected), done.stdout + done.stderr
    for at, word in expected.items():
        assert f'"{word}"' in lines[at], lines[at]
