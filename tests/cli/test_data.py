"""Inputs of the command line: arrays, images, token ids, calibration data, published weights; help and banners."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fxmerge
from fxmerge.cli import published
from fxmerge.cli.data import EXAMPLES, calibration, example_inputs
from fxmerge.cli.main import main
from fxmerge.cli.specs import Source, load
from fxmerge.errors import FxMergeError
from tests.helpers.netmaking import one_thread  # noqa: F401
from tests.helpers.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()

def tokens():
    return nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()

def transform(image):
    from torchvision.transforms.functional import to_tensor
    return to_tensor(image.resize((6, 6)))
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:net"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """70 images in two folders, of which each pixel has the number of the image."""
    from PIL import Image

    for n in range(70):
        folder = tmp_path / "images" / f"class{n // 35}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 8, 3), n, np.uint8)).save(folder / f"{n:03}.png")
    return tmp_path / "images"


class Named(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return ids if mask is None else ids * mask


def inputs(
    source: Source, path: Path | None = None, shape: tuple[int, ...] = (), ids: bool = False, dtype: Any = None
) -> Any:
    return example_inputs(source, path, shape, ids, dtype)


def test_arrays_as_arguments(tmp_path: Path) -> None:
    """One array; arrays by their places; by the names of forward's arguments."""
    named, plain = Source("here", Named()), Source("here", nn.Linear(3, 2))
    one, two = np.arange(6.0).reshape(2, 3), np.ones((2, 3), np.int64)
    np.save(tmp_path / "a.npy", one)
    np.savez(tmp_path / "a.npz", one)
    np.savez(tmp_path / "b.npz", two, one)
    np.savez(tmp_path / "c.npz", ids=two, mask=two)
    save_file({"x": torch.from_numpy(one).float()}, tmp_path / "d.safetensors")
    for name in ("a.npy", "a.npz", "d.safetensors"):
        found = inputs(plain, tmp_path / name)
        assert found.tolist() == one.tolist() and found.dtype == torch.float32  # as the weights
    first, second = inputs(named, tmp_path / "b.npz")
    assert (first.tolist(), second.tolist()) == (two.tolist(), one.tolist())
    by_name = inputs(named, tmp_path / "c.npz")
    assert list(by_name) == ["ids", "mask"] and by_name["mask"].dtype == torch.int64


def test_dtypes_and_shapes(spec: str) -> None:
    assert inputs(Source("", nn.Linear(3, 2).double()), shape=(4, 3)).dtype == torch.float64
    assert inputs(Source("", nn.Linear(3, 2)), shape=(4, 3), dtype="bfloat16").dtype == torch.bfloat16
    assert inputs(load(spec)).shape == (1, 3, 224, 224)
    model = load(spec, dtype="float64").model
    assert isinstance(model, nn.Module) and {p.dtype for p in model.parameters()} == {torch.float64}


def test_token_ids_are_below_the_vocabulary(spec: str) -> None:
    source = load(spec.replace(":net", ":tokens"))
    found = inputs(source, ids=True, shape=(64, 64))
    assert found.dtype == torch.int64 and (int(found.min()), int(found.max())) == (0, 49)
    assert inputs(source, ids=True).shape == (1, 128)


def test_images_go_through_the_models_own_preprocessing(spec: str, images: Path) -> None:
    source = load(spec)
    one = inputs(source, images / "class0" / "007.png")
    assert one.shape == (1, 3, 6, 6) and torch.equal(one, torch.full_like(one, 7 / 255))
    some = inputs(source, images)
    numbers = [round(255 * float(i.mean())) for i in some]
    assert len(set(numbers)) == EXAMPLES and numbers != sorted(numbers)  # of both classes, without repetition
    given = calibration(images, source)
    assert given is not None
    batches = list(given)
    assert [len(b) for b in batches] == [EXAMPLES, 70 - EXAMPLES]
    assert {round(255 * float(i.mean())) for b in batches for i in b} == set(range(70))


def test_calibration_arrays_are_batches_along_the_first_axis(tmp_path: Path) -> None:
    source = Source("here", Named())
    np.savez(tmp_path / "a.npz", ids=np.arange(150), mask=np.arange(150))
    given = calibration(tmp_path / "a.npz", source)
    assert given is not None
    batches = list(given)
    assert [len(b["ids"]) for b in batches] == [64, 64, 22]
    assert torch.equal(torch.cat([b["mask"] for b in batches]), torch.arange(150))
    np.save(tmp_path / "b.npy", np.zeros((3, 2), np.float32))
    assert [type(b) for b in calibration(tmp_path, source) or ()] == [dict, dict, dict, Tensor]


def test_a_merge_on_images(
    spec: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as in Python, with the same batches."""
    data = ["--inputs", str(images / "class0" / "000.png"), "--calibration", str(images)]
    assert main(["merge", spec, "--out", str(tmp_path / "o"), *data, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["refit_data"] == "70 calibration samples"
    source = load(spec)
    assert isinstance(source.model, nn.Module)
    given = calibration(images, source)
    by_hand = fxmerge.merge(source.model, inputs(source, images / "class0" / "000.png"), calibration=given)
    assert told["error"] == json.loads(by_hand.report.json())["error"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--inputs", "{dir}/none.npz"], "there is no file or folder .*none.npz"),
    (["--inputs", "{dir}/bad.npz"], "bad.npz is not a file of arrays of numbers"),
    (["--inputs", "{dir}/torn.npz"], "torn.npz is not a file of arrays of numbers"),
    (["--inputs", "{dir}/objects.npy"], "objects.npy is not a file of arrays of numbers"),
    (["--inputs", "{dir}/bad.safetensors"], "cannot read"),
    (["--inputs", "{dir}/net.py"], "net.py is neither an image nor a file of arrays"),
    (["--inputs", "{dir}/empty"], "empty holds no images and no files of arrays"),
    (["--inputs", "{dir}/labels.npz"], "labels.npz holds input, labels, but the model's forward takes input;"),
    (["--inputs", "{dir}/labels.npz", "--shape", "1", "3"], "--inputs and --shape contradict each other"),
    (["--ids"], "--ids: .* has no nn.Embedding"),
    (["--pretrained"], "--pretrained is for torchvision:NAME and timm:NAME"),
    (["--refit", "calibration"], "--refit calibration needs inputs; give --calibration"),
    (["--calibration", "{dir}/empty"], "empty holds no images"),
    (["--on-disk", "--weights", "w", "--dtype", "float16"], "--dtype: the weights of .* cannot be converted"),
])  # fmt: skip
def test_errors(
    arguments: list[str], message: str, spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.npz").write_text("no arrays")
    (tmp_path / "bad.safetensors").write_text("no arrays")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "labels.npz", input=np.zeros((1, 3, 6, 6)), labels=np.zeros(1))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "labels.npz").read_bytes()[:-40])
    (tmp_path / "empty").mkdir()
    assert main(["merge", spec, "--out", str(tmp_path / "o"), *(a.format(dir=tmp_path) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fxmerge: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert "pickle" not in err


def test_images_without_preprocessing_are_declined(tmp_path: Path, images: Path) -> None:
    with pytest.raises(FxMergeError, match=r"transform\(image\)"):
        inputs(Source("here", nn.Linear(3, 2)), images)
    with pytest.raises(FxMergeError, match=r"transform\(image\)"):
        calibration(images, Source("here", nn.Linear(3, 2)))


def test_preprocessing_of_torchvision(images: Path) -> None:
    """Resized, cropped and normalised as for the published weights, without a network."""
    found = inputs(load("torchvision:squeezenet1_1"), images / "class0" / "000.png")
    assert found.shape == (1, 3, 224, 224)
    assert torch.allclose(found[0, :, 0, 0], -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225]))


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from urllib.error import URLError

    import torchvision.models

    asked = []

    def offline(name: str, weights: str | None) -> nn.Module:
        asked.append(weights)
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    assert main(["analyze", "torchvision:resnet18", "--pretrained"]) == 2
    err = capsys.readouterr().err
    assert "the weights of torchvision:resnet18 cannot be downloaded: <urlopen error no route to host>" in err
    assert "--weights FILE" in err and err.count("\n") == 1 and asked == ["DEFAULT"]


def test_what_is_no_fault_of_the_network_is_not_called_one() -> None:
    wrapped = RuntimeError()
    wrapped.__cause__ = ConnectionError()
    assert published._of_network(wrapped) and not published._of_network(KeyError("a"))


@pytest.mark.slow
def test_random_weights_are_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["torchvision:squeezenet1_1", "--shape", "1", "3", "64", "64"]
    assert main(["merge", *command, "--out", str(tmp_path / "o"), "--refit", "none"]) == 0
    assert "torchvision:squeezenet1_1 has random weights" in capsys.readouterr().err
    assert main(["analyze", *command]) == 0  # whose answer does not depend on weights
    assert capsys.readouterr().err == ""


def test_a_sweep_does_not_offer_what_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    text = capsys.readouterr().out
    assert "--max-ratio" in text and "--budgets" in text
    assert "--ratio" not in text.replace("--max-ratio", "") and "--budget " not in text
    with pytest.raises(SystemExit) as caught:
        main(["sweep", "a:b", "--out", "o", "--budgets", "0.5", "--ratio", "0.3"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "--ratio" in err and "contradict" not in err and out == ""


@pytest.mark.parametrize("variable", slow_but(["LC_ALL"], ["LC_ALL", "LANG"]))
def test_help_in_the_c_locale_fits_80_columns_of_ascii(variable: str) -> None:
    """Where Python itself would write UTF-8."""
    kept = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONIOENCODING")}
    environment = {**kept, variable: "C", "COLUMNS": "80", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    script = "from fxmerge.cli.main import main\nfor c in ['demo', 'analyze', 'merge', 'sweep', 'draw', None]:\n"
    script += "    try:\n        main([c, '--help'] if c else ['--help'])\n    except SystemExit:\n        pass"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment)
    text = done.stdout.decode("ascii")
    assert done.stderr == b"" and text.count("usage:") == 6
    assert max(map(len, text.splitlines())) <= 80
