"""What is published: the size of the wheel, the source distribution with its tests, and one version everywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest

import fxmerge

ROOT = Path(__file__).resolve().parents[1]
READ_BY_TESTS = ("tests", "docs", "benchmarks", "examples")


def test_a_wheel_is_smaller_than_3_mb() -> None:
    """A wheel is a zip of the package: each file deflated, two headers of it (76 bytes) and its hash (60)."""
    top = Path(fxmerge.__file__).parent.parent
    files = [p for p in Path(fxmerge.__file__).parent.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    sizes = [len(zlib.compress(p.read_bytes())) + 136 + 3 * len(p.relative_to(top).as_posix()) for p in files]
    assert sum(sizes) < 3_000_000


def test_one_version() -> None:
    version = fxmerge.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert version in sections[:2]


def test_the_source_distribution_holds_what_its_tests_read(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".venv*", "*.egg-info", ".git", "build", "dist")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = f"from setuptools import build_meta as b; b.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    read = [p for top in READ_BY_TESTS for p in (ROOT / top).rglob("*") if p.is_file()]
    wanted = {p for p in read if "__pycache__" not in p.parts}
    wanted |= {p for p in ROOT.iterdir() if p.suffix in {".md", ".cff", ".yml", ".cfg", ".toml"}} | {ROOT / ".ci/run"}
    assert {p.relative_to(ROOT).as_posix() for p in wanted} <= held
    assert not [name for name in held if name.endswith(".pyc")]
