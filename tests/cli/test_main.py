"""The command line: demo, analyze and merge from end to end, in this process and in a pipe."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxmerge
from fxmerge.cli.main import main
from fxmerge.report.drawable import DRAWN
from tests.helpers.netmaking import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORY = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(),
                         nn.Linear(24, 4))

def branching():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branching()

def example_inputs():
    return torch.randn(2, 3, 6, 6)

def broken():
    raise RuntimeError("no weights here")

def text():
    return "no module"

seven = 7
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "small_net.py"
    path.write_text(FACTORY)
    return f"{path}:small"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "demo", "--json")
    assert (status, err) == (0, "")
    rows: list[dict[str, Any]] = json.loads(out)
    original, *others = rows
    readme = (Path(fxmerge.__file__).parent / "assets" / "README.md").read_text(encoding="utf-8")
    told = re.search(r"the 2,000 here \| ([\d.]+) %", readme)
    assert told is not None
    assert original["method"] == "original"
    assert original["parameters"] == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    assert abs(original["accuracy"] - float(told[1])) <= 0.1
    assert {(r["method"], r["ratio"]) for r in others} >= {
        (method, ratio) for method in ("prune", "mostsim") for ratio in (0.5, 0.6, 0.7, 0.8)
    }
    for method in ("prune", "mostsim"):
        by_ratio = sorted((r for r in others if r["method"] == method), key=lambda r: r["ratio"])
        sizes = [original["parameters"], *(r["parameters"] for r in by_ratio)]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) == len(sizes)
        assert all(10 < r["accuracy"] <= original["accuracy"] + 1 for r in by_ratio)
    found = {(r["method"], r["ratio"]): r["accuracy"] for r in others}
    assert found["mostsim", 0.8] > found["prune", 0.8]


@pytest.mark.slow
def test_demo_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "demo")
    assert (status, err) == (0, "")
    assert "266,610" in out
    assert all(f"{ratio} %" in out for ratio in (50, 60, 70, 80))


def test_analyze_a_file(capsys: pytest.CaptureFixture[str], spec: str) -> None:
    status, out, err = run(capsys, "analyze", spec)
    assert (status, err) == (0, "")
    assert "2 groups" in out
    status, out, err = run(capsys, "analyze", spec, "--json")
    data = json.loads(out)
    assert (status, err) == (0, "")
    assert [(g["name"], g["channels"]) for g in data["groups"]] == [("0", 8), ("3", 6)]
    assert [r["name"] for r in data["refusals"]] == ["5"]


def test_analyze_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    status, out, err = run(capsys, "analyze", "torchvision:resnet18", "--shape", "1", "3", "64", "64", "--json")
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert data["parameters"] == 11_689_512
    assert {g["name"]: g["channels"] for g in data["groups"]}["layer1.0.conv1"] == 64
    assert len(data["groups"]) == 12  # 8 blocks' inner channels, 4 residual streams
    assert [r["name"] for r in data["refusals"]] == ["fc"]


def sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in load_file(folder / "weights.safetensors").items()}


def test_merge_writes_what_it_says(capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    out_folder = tmp_path / "new" / "folder"
    options = ["--ratio", "0.5", "--decomposition", "prune", "--refit", "none"]
    status, out, err = run(capsys, "merge", spec, "--out", str(out_folder), *options)
    assert (status, err) == (0, "")
    assert "8 -> 4" in out
    assert "training mode" not in out  # the factory's model is: who names it on the command line has not chosen that
    assert not fxmerge.load(out_folder).training
    assert "written:" in out
    assert {p.name for p in out_folder.iterdir()} >= {"weights.safetensors", "plan.json", "report.json"}
    expected = {"0.weight": (4, 3, 3, 3), "1.running_var": (4,), "3.weight": (3, 4, 3, 3), "5.weight": (4, 12)}
    assert expected.items() <= sizes(out_folder).items()
    report = json.loads((out_folder / "report.json").read_text())
    assert report["parameters_after"] < report["parameters_before"]
    plan = fxmerge.Plan.from_json((out_folder / "plan.json").read_text())
    assert (plan.options.ratio, plan.options.decomposition) == (0.5, "prune")
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    replayed = fxmerge.apply(plan, namespace["small"](), namespace["example_inputs"]())
    replayed.module.load_state_dict(load_file(out_folder / "weights.safetensors"))


def test_merge_json_and_options(capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    options = ["--json", "--ratio", "0.25", "--ignore", "3", "--seed", "5"]
    status, out, err = run(capsys, "merge", spec, "--out", str(tmp_path / "o"), *options)
    assert (status, err) == (0, "")
    data = json.loads(out)
    kept = {g["name"]: len(g["kept"]) for g in data["groups"]}
    assert kept["3"] == 6
    plan = fxmerge.Plan.from_json((tmp_path / "o" / "plan.json").read_text())
    assert plan.options == fxmerge.Options(ratio=0.25, ignore=("3",), seed=5)


def test_merge_with_weights(capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    model: nn.Module = namespace["small"]()
    state = {k: torch.zeros_like(v) if k == "5.weight" else v for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    arguments = ["merge", spec, "--out", str(tmp_path / "o"), "--weights", str(tmp_path / "w.safetensors")]
    arguments += ["--refit", "none"]
    assert run(capsys, *arguments)[0] == 0
    assert float(load_file(tmp_path / "o" / "weights.safetensors")["5.weight"].abs().max()) == 0


@pytest.mark.parametrize("ending", sorted(DRAWN))
def test_draw_by_ending(ending: str, capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    if DRAWN[ending] == "svg" and shutil.which("dot") is None:
        pytest.skip("no program `dot`: install graphviz")
    begins = {"html": "<!DOCTYPE html>", "svg": "<?xml", "dot": "digraph", "mermaid": "flowchart", "graphml": "<?xml",
              "json": "{"}  # fmt: skip
    path = tmp_path / f"net{ending}"
    status, out, err = run(capsys, "draw", spec, "--out", str(path))
    assert (status, out, err) == (0, f"written: {path}\n", "")
    text = path.read_text(encoding="utf-8")
    assert text.startswith(begins[DRAWN[ending]])
    assert "output" in text or ending in (".graphml", ".json")


@pytest.mark.slow
def test_merge_draws_its_report(capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    path = tmp_path / "merge.html"
    status, out, err = run(capsys, "merge", spec, "--out", str(tmp_path / "o"), "--report", str(path))
    assert (status, err) == (0, "")
    assert str(path) in out
    assert '"kept":4' in path.read_text(encoding="utf-8")


ERRORS: dict[str, tuple[list[str], str]] = {
    "no such file": (["analyze", "{dir}/none.py:small"], r"there is no file .*none.py"),
    "no such factory": (["analyze", "{dir}/small_net.py:big"], r"has no callable 'big'"),
    "no factory": (["analyze", "{dir}/small_net.py:seven"], r"has no callable 'seven'"),
    "no colon": (["analyze", "resnet18"], r"'resnet18' does not name a model; give torchvision:resnet18"),
    "no such module": (["analyze", "no_such_package_here:net"], r"cannot be imported"),
    "no such model": (["analyze", "torchvision:resnet19"], r"resnet19"),
    "a factory that raises": (["analyze", "{dir}/small_net.py:broken"], r"created: RuntimeError: no weights here"),
    "a factory of text": (["analyze", "{dir}/small_net.py:text"], r"returns a str, not a torch.nn.Module"),
    "no weights": (["analyze", "{dir}/small_net.py:small", "--weights", "{dir}/w.safetensors"], r"cannot read weights"),
    "bad weights": (["analyze", "{dir}/small_net.py:small", "--weights", "{dir}/small_net.py"], r"cannot read weights"),
    "bad ratio": (["merge", "{dir}/small_net.py:small", "--out", "{dir}/o", "--ratio", "1.5"], r"ratio is 1.5"),
    "bad choice": (["merge", "{dir}/small_net.py:small", "--out", "{dir}/o", "--selection", "l3"], r"choose one of l1"),
    "no such drawing": (
        ["draw", "{dir}/small_net.py:small", "--out", "{dir}/x.png"],
        r"the format of .*x.png' is unknown; use one of the extensions \.html",
    ),
    "no such report": (
        ["merge", "{dir}/small_net.py:small", "--out", "{dir}/o", "--report", "{dir}/x"],
        r"the format of .* is unknown; use one of the extensions \.html",
    ),
    "no folder to draw to": (
        ["draw", "{dir}/small_net.py:small", "--out", "{dir}/none/x.html"],
        r"the folder .*none for x.html does not exist; create it first",
    ),
    "out is a file": (["merge", "{dir}/small_net.py:small", "--out", "{dir}/small_net.py"], r"small_net.py"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line(what: str, capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    arguments, message = ERRORS[what]
    status, out, err = run(capsys, *[a.format(dir=tmp_path) for a in arguments])
    assert status == 2
    assert out == ""
    assert re.search(message, err), err
    assert err.startswith("fxmerge: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["shrink"], ["merge", "a:b"], ["demo", "--fast"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = capsys.readouterr().out
    for name in (*fxmerge.SELECTORS, *fxmerge.DECOMPOSITIONS):
        assert name in text
    for option in dataclasses.fields(fxmerge.Options):
        assert f"--{option.name.replace('_', '-')}" in text, option.name


@pytest.mark.slow
def test_in_a_pipe_stderr_is_silent_and_errors_have_status_2(spec: str, tmp_path: Path) -> None:
    """As users run it: another process, no terminal."""
    command = [sys.executable, "-m", "fxmerge"]
    good = subprocess.run([*command, "merge", spec, "--out", str(tmp_path / "o")], capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert "parameters" in good.stdout
    assert "\x1b" not in good.stdout
    bad = subprocess.run([*command, "analyze", "nothing:here"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert len(bad.stderr.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["merge", "--out", "{dir}/m.onx"], ".onx files cannot be written; give a folder, .* end it with .pt2 or .onnx$"),
    (["merge", "--out", "{dir}/small.pth"], "small.pth looks like a file"),
    (["merge", "--out", "{dir}/a.tar"], "a.tar looks like a file"),
    (["sweep", "--budgets", "0.5", "--out", "{dir}/a.csv"], "a.csv looks like a file, .* whose name has no extension$"),
    (["sweep", "--budgets", "0.5", "--out", "{dir}/a.onnx"], "a.onnx looks like a file"),
])  # fmt: skip
def test_out_that_looks_like_another_file(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The error comes before the model is made."""
    command, *rest = (a.format(dir=tmp_path) for a in arguments)
    status, out, err = run(capsys, command, "no_such_module:f", *rest)
    assert (status, out) == (2, "")
    assert re.search(message, err.strip()) is not None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["merged_0.5", "run.v2", "plain", "there.pth"])
def test_out_that_is_a_folder(name: str, capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    if name == "there.pth":  # a folder that exists is meant
        (tmp_path / name).mkdir()
    status, _, err = run(capsys, "merge", spec, "--out", str(tmp_path / name), "--refit", "none")
    assert (status, err) == (0, "")
    assert (tmp_path / name / "weights.safetensors").is_file()


def test_the_case_of_an_extension_does_not_matter(
    capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path
) -> None:
    status, _, err = run(capsys, "merge", spec, "--out", str(tmp_path / "M.PT2"), "--refit", "none")
    assert (status, err) == (0, "")
    assert torch.export.load(tmp_path / "M.PT2").module()(torch.randn(2, 3, 6, 6)).shape == (2, 4)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("more", [[], ["--on-disk"]])
def test_weights_that_are_a_pickle(
    legacy: bool, more: list[str], capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path
) -> None:
    """The message holds two lines of code, which convert the file."""
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    path = tmp_path / "net.pth"
    torch.save(namespace["small"]().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    status, out, err = run(capsys, "analyze", spec, "--weights", str(path), *more)
    assert (status, out) == (2, "")
    first, *code = err.rstrip().split("\n")
    assert first.startswith(f"fxmerge: {path} is a pickle written by torch.save, not a safetensors file;")
    assert len(code) == 2
    exec("\n".join(line.strip() for line in code), {})
    status, out, err = run(capsys, "analyze", spec, "--weights", str(tmp_path / "net.safetensors"), *more)
    assert (status, err) == (0, "")


def test_weights_that_are_nothing_known(capsys: pytest.CaptureFixture[str], spec: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"neither of them")
    status, _, err = run(capsys, "analyze", spec, "--weights", str(tmp_path / "w.safetensors"))
    assert (status, err.count("\n")) == (2, 1)
    assert f"cannot read weights from {tmp_path}/w.safetensors: " in err


SENTENCE = """
import torch
from torch import nn

class Sentence(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(40, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, tokens, mask):
        x = self.embed(tokens) * mask[..., None] if tokens.size(1) < 99 else self.embed(tokens)
        return self.down(torch.relu(self.up(x)))

def example_inputs():
    return torch.randint(40, (2, 6)), torch.ones(2, 6)
"""


@pytest.mark.slow
def test_dynamic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sentence.py").write_text(SENTENCE)
    spec, flags = f"{tmp_path / 'sentence.py'}:Sentence", ["--refit", "none", "--ratio", "0.25"]
    out = tmp_path / "m.pt2"
    given = torch.randint(40, (5, 6)), torch.ones(5, 6)
    assert main(["merge", spec, "--out", str(out), *flags, "--dynamic", "tokens:0", "mask:0"]) == 0
    program = torch.export.load(str(out)).module()
    assert program(*given).shape == (5, 6, 8)
    with pytest.raises((RuntimeError, AssertionError)):
        program(*(x[:, :4] for x in given))
    assert main(["merge", spec, "--out", str(out), *flags, "--dynamic", "tokens:0,1", "mask:0,1"]) == 0
    assert torch.export.load(str(out)).module()(*(x[:, :4] for x in given)).shape == (5, 4, 8)
    assert main(["analyze", spec, "--dynamic", "token:0"]) == 2
    assert "names the input 'token', which is not given; the inputs are tokens, mask" in capsys.readouterr().err
    assert main(["analyze", spec, "--dynamic", "tokens"]) == 2
    assert "such as x:0,2,3" in capsys.readouterr().err
