"""The command line on terminals of any encoding, and after Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fxmerge
from fxmerge.cli.main import main
from tests.helpers.slow import slow_but

ROOT = Path(__file__).resolve().parents[2]
FACTORY = """
import os, signal, torch
from torch import nn

def small():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("größe", nn.Linear(6, 8))
    model.add_module("relu", nn.ReLU())
    model.add_module("層", nn.Linear(8, 4))
    return model.eval()

def example_inputs():
    return torch.randn(2, 6)

def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    return small()
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("net") / "net.py"
    path.write_text(FACTORY, encoding="utf-8")
    return str(path)


def command(*arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "fxmerge", *arguments], capture_output=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables(encoding: str, spec: str) -> None:
    """The tables are those of `text(ascii=True)`; names that ASCII does not have are written as escapes."""
    right = command("analyze", f"{spec}:small")
    found = command("analyze", f"{spec}:small", encoding=encoding)
    assert (right.returncode, found.returncode, found.stderr) == (0, 0, b"")
    text, plain = right.stdout.decode(), found.stdout.decode(encoding)
    assert "─" in text and "größe" in text
    assert plain.isascii() and "-----" in plain and "gr\\xf6\\xdfe" in plain


def test_help_and_errors_in_ascii(spec: str) -> None:
    helped = command("merge", "--help", encoding="ascii")
    assert (helped.returncode, helped.stderr) == (0, b"")
    assert "--out" in helped.stdout.decode("ascii")
    wrong = command("analyze", f"{spec}:größe", encoding="ascii")
    assert wrong.returncode == 2
    assert b"has no callable 'groe'" in wrong.stderr.replace(b"?", b"")


def test_the_streams_are_restored(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout.errors, sys.stderr.errors
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fxmerge {fxmerge.__version__}\n"
    assert (sys.stdout.errors, sys.stderr.errors) == before


def test_version() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"fxmerge {fxmerge.__version__}\n", b"")


COMMANDS = [["merge", "--out", "{out}"], ["analyze"], ["draw", "--out", "{out}/a.svg"]]


@pytest.mark.parametrize("arguments", slow_but(COMMANDS[:1], COMMANDS))
def test_interrupted(arguments: list[str], spec: str, tmp_path: Path) -> None:
    arguments = [a.format(out=tmp_path) for a in arguments]
    done = command(arguments[0], f"{spec}:interrupted", *arguments[1:])
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"fxmerge: interrupted\n")
    assert not list(tmp_path.iterdir())
