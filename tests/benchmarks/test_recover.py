"""benchmarks.recover on a small network and random images: what each method is handed, resumption, the page."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.networks import data, published
from benchmarks.networks.published import Network, equal_share
from benchmarks.recover import methods, one_row, page, run, training
from benchmarks.recover.methods import METHODS, ORIGINAL
from benchmarks.recover.one_row import Task


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 2), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """A row of a small network, on 160 images to train on and 40 to test on."""
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 160), ("test", 40)):
        arrays[f"{split}_x"] = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"{split}_y"] = generator.integers(0, 10, count, np.uint8)
    np.savez(tmp_path / "cifar10.npz", **arrays)
    torch.manual_seed(0)
    metadata = {"model": "small", "dataset": "CIFAR-10", "mean": "0.5,0.5,0.5", "std": "0.25,0.25,0.25"}
    save_file(Small().state_dict(), tmp_path / "small.safetensors", metadata)
    monkeypatch.setitem(published.NETWORKS, "small", Network("Small", "CIFAR-10", Small, equal_share, (0.5,)))
    monkeypatch.setattr(methods, "NETWORKS", {"small": 0.5})
    for module in (one_row, page, run):
        monkeypatch.setattr(module, "NETWORKS", methods.NETWORKS)
    state = tmp_path / "state.safetensors"
    return Task("small", "l1", 2, 0, tmp_path, tmp_path, state, torch.get_num_threads(), bf16=False)


def row(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for finding in one_row.findings(task):
        found |= finding
    return found


@pytest.mark.parametrize(
    ("method", "epochs"), [*((m, 2) for m in METHODS if m != ORIGINAL), ("distilled", training.SHORT)]
)
def test_a_row_of_each_method(task: Task, method: str, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed out is narrower, was trained, and has the accuracy of its row on the test images."""
    handed: list[nn.Module] = []
    trained = one_row.trained
    monkeypatch.setattr(one_row, "trained", lambda *a: handed.append(trained(*a)) or handed[-1])
    found = row(replace(task, method=method, epochs=epochs))
    assert "error" not in found
    assert 0.35 < found["flops"] < 0.56
    state = handed[0].state_dict()
    if METHODS[method].distilled and epochs < training.SHORT:  # BatchNorms keep their statistics
        row(replace(task, method="refit", epochs=0))
        pairs = zip(handed[0].parameters(), handed[1].parameters(), strict=True)
        assert all(not torch.equal(one, other) for one, other in pairs if one.dim() > 1)
    else:
        assert float(next(t for name, t in state.items() if "num_batches" in name)) >= 2 * 2  # batches of two epochs
    x, y = data.cifar10(task.data, "test")
    with torch.no_grad():
        right = (handed[0].eval()(data.normalise(x, [0.5] * 3, [0.25] * 3)).argmax(1) == y).float().mean()
    assert found["accuracy"] == pytest.approx(100 * float(right))
    assert found["train_images"] == 160
    assert not task.state.exists()


def test_without_epochs_nothing_is_trained(task: Task) -> None:
    same = row(replace(task, method=ORIGINAL, epochs=0))
    assert (same["flops"], same["parameters"]) == (1.0, 1.0)
    assert 0.35 < row(replace(task, epochs=0))["flops"] < 0.56
    keys = [*run.requested(["small"], [*METHODS], [0, 3], 0)]
    assert (0, "small", "reprune-2024", 0) not in keys
    assert {(0, "small", "reprune-2024", 3), (0, "small", "distilled", 3), (0, "small", ORIGINAL, 0)} <= {*keys}


@pytest.mark.parametrize("method", ["l1", "distilled"])
def test_a_row_that_was_stopped_goes_on(task: Task, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[nn.Module] = []
    trained = one_row.trained
    monkeypatch.setattr(one_row, "trained", lambda *a: handed.append(trained(*a)) or handed[-1])
    whole = replace(task, method=method, epochs=2)
    row(whole)
    saving, count = training.checkpoint.save, 0

    def stopped(*args: Any) -> None:
        nonlocal count
        saving(*args)
        count += 1
        if count == 1:
            raise RuntimeError("stopped")

    monkeypatch.setattr(training.checkpoint, "save", stopped)
    assert "stopped" in row(whole)["error"]
    assert task.state.exists()
    assert "error" not in row(whole)
    assert count == 2  # the second epoch only
    one, other = (m.state_dict() for m in handed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_learning_rate_falls_to_zero_over_the_epochs(task: Task) -> None:
    images, labels = data.cifar10(task.data, "train")
    whole = training.Training(images, labels, [0.5] * 3, [0.25] * 3, 2, task.state)
    model = Small()
    optimizer = training.sgd(model.parameters())
    steps = (step for epoch in (0, 1) for step in training.steps(model, optimizer, whole, epoch))
    rates = [optimizer.param_groups[0]["lr"] for _ in steps]
    assert rates == pytest.approx([training.LR * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)])


def test_the_page(task: Task) -> None:
    rows: dict[Any, Any] = {
        ("small", ORIGINAL, 0): {"accuracy": 93.88, "flops": 1.0, "parameters": 1.0, "train_images": 160,
                                 "test_images": 40, "machine": "this one", "torch": "2.6", "bf16": True},
        ("small", "l1", 0): {"accuracy": 11.2, "flops": 0.5, "parameters": 0.4},
        ("small", "l1", 10): {"accuracy": 90.04, "flops": 0.5, "parameters": 0.4},
        ("small", "distilled", 10): {"error": "killed | out of memory"},
    }  # fmt: skip
    text = page.page(rows, 0)
    assert "this one, torch 2.6, bfloat16, seed 0." in text
    assert "## Small, CIFAR-10, 50% of the FLOPs" in text
    assert "original 93.88 %; 160 train images, 40 test images" in text
    assert "| method | FLOPs | parameters | 0 | 10 |" in text
    assert "| l1 | 50.0% | 40.0% | 11.20 | 90.04 |" in text
    assert "| distilled |  |  | - | failed |" in text
    assert "- distilled 10: killed \\| out of memory" in text


def test_the_plot_is_the_same_for_the_same_numbers(task: Task, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows: dict[Any, Any] = {("small", m, n): {"accuracy": 80.0 + n} for m in ("l1", "distilled") for n in (0, 1, 10)}
    for name in ("a.svg", "b.svg"):
        page.plot(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
