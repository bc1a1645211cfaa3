"""Every example runs and prints the expected lines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.slow import slow_but

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXPECTED = {
    "merge_your_own.py": ["features.3.squeeze", "16 -> 8", "parameters 1,235,496 ->", "merged model: (1, 1000)"],
    "custom_rule.py": ["without rules: []", "bessel_j0", "with them: ['a: 16 -> 8 channels']", "{'a':"],
    "look_at_groups.py": ["stem: 16 channels", "conv1: 32 channels", "stem -> layer:conv1: read", "bn2: carry"],
    "aot_package.py": ["a batch of 5 gives (5, 10)", "has the output of the merged model: True"],
    "distill.py": ["merged: error ", "distilled: error ", "own loop: error "],
    "finetune.py": ["trained: ", "merged to a sixteenth of the channels: ", "fine-tuned: "],
    "yolo.py": ["predict: Results", "val: mAP50", "train: widths are kept True", "export: .onnx"],
    "hugging_face.py": [" parameters", "pipeline: w1 w2 w3", "Trainer lowers the loss: True", "LoRA"],
    "quantise_training.py": ["original: ", "2 bits, rounded: ", "2 bits, after one epoch: "],
    "quantise.py": ["(512, 512) torch.float32 -> (256, 256) Int8Tensor", "output by quantising: 0.0"],
}
NEEDS = {"merge_your_own.py": "torchvision", "yolo.py": "ultralytics"}
NEEDS |= dict.fromkeys(("quantise.py", "quantise_training.py"), "torchao")
NEEDS["hugging_face.py"] = "accelerate"  # and with it transformers, as Trainer needs it
CHATTY = ("distill.py", "aot_package.py", "quantise.py", "quantise_training.py", "yolo.py", "hugging_face.py")
SLOW = ("custom_rule.py", "finetune.py", "merge_your_own.py", *CHATTY)  # CHATTY: libraries log


def closer(text: str) -> None:
    merged, *trained = map(float, re.findall(r"error ([\d.]+)", text))
    assert len(trained) >= 2
    assert all(error < 0.7 * merged for error in trained), text


def restored(text: str) -> None:
    trained, merged, tuned = map(float, re.findall(r"([\d.]+) %", text))
    assert trained - 5 < merged < trained  # at a sixteenth of the channels
    assert tuned > merged


def mostly_kept(text: str) -> None:
    original, merged, rounded, trained = map(float, re.findall(r"([\d.]+) %", text))
    assert original - merged < 1.5 and rounded < original - 8  # two bits are few
    assert original - trained < 0.5 * (original - rounded)


# what is to be said of the numbers that they print
CHECKS = {"distill.py": closer, "finetune.py": restored, "quantise_training.py": mostly_kept}


def test_every_example_is_tested() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", slow_but(EXPECTED.keys() - {*SLOW}, EXPECTED))
def test_example(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == "aot_package.py" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or name in CHATTY
    for line in EXPECTED[name]:
        assert line in done.stdout, done.stdout
    if name in CHECKS:
        CHECKS[name](done.stdout)
    assert not list(tmp_path.iterdir())
