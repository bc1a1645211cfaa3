"""benchmarks.paper: the published settings, and agreement with the published cells to 0.01 %."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import fxmerge
from benchmarks.networks.data import DATASETS
from benchmarks.networks.models import MODELS, example_input, lenet_300_100, load_checkpoint
from benchmarks.networks.published import NETWORKS, find_weights, images
from benchmarks.paper import tables as paper
from benchmarks.paper.tables import CRITERIA, METHODS

RESNET56 = {f"layer{s}.{b}.conv1": k for s, k in ((1, 11), (2, 22), (3, 44)) for b in range(9)}
WRN_40_4 = {f"block{s}.{b}.conv1": k for s, k in ((1, 44), (2, 88), (3, 176)) for b in range(6)}
DEEP_VGG = {f"features.{n}": 256 for n in (30, 34, 37, 40)}  # the same for both data sets
# network -> (a ratio, {group: kept channels} at that ratio, from the paper and its code)
KEPT: dict[str, tuple[float | None, dict[str, int]]] = {
    "lenet": (0.7, {"ip1": 90, "ip2": 30}),
    "vgg16": (None, {"features.0": 32, "features.24": 256, "features.27": 256, **DEEP_VGG}),
    "vgg16-cifar100": (None, {"features.0": 32, **DEEP_VGG}),
    "resnet56": (0.3, RESNET56),
    "wrn-40-4": (0.3, WRN_40_4),
}


def merged(key: str, criterion: str, method: str) -> fxmerge.Result:
    """A network of the tables with random weights, merged with its published settings at the ratio in KEPT."""
    torch.manual_seed(0)
    network = NETWORKS[key]
    model = network.build().eval()
    example = example_input("lenet_300_100" if key == "lenet" else "vgg16")
    return fxmerge.merge(model, example, paper.options(network, model, criterion, KEPT[key][0], method))


@pytest.mark.parametrize("key", NETWORKS)
def test_merging_leaves_the_published_widths(key: str) -> None:
    plan = merged(key, "l1-norm", "reference").plan
    assert {group.name: len(group.kept) for group in plan.groups} == KEPT[key][1]
    assert plan.options.scope == "internal"


def test_vgg16_loses_64_percent_of_its_parameters() -> None:
    report = merged("vgg16", "l2-norm", "prune").report
    assert 1 - report.after.parameters / report.before.parameters == pytest.approx(0.64, abs=0.005)


def test_settings_are_the_published_ones() -> None:
    assert {key: (network.threshold, network.lam) for key, network in NETWORKS.items()} == {
        "lenet": (0.45, 0.85),  # lam has no effect without BatchNorm
        "vgg16": (0.1, 0.85),
        "vgg16-cifar100": (0.1, 0.70),
        "resnet56": (0.1, 0.85),
        "wrn-40-4": (0.1, 0.80),
    }


@pytest.mark.parametrize("criterion", CRITERIA)
def test_methods_differ_in_their_options(criterion: str) -> None:
    chosen = {method: merged("lenet", criterion, method).plan.options for method in METHODS}
    assert {o.selection for o in chosen.values()} == {CRITERIA[criterion]}
    assert chosen["prune"].decomposition == "prune"
    assert [chosen[m].mostsim_scale for m in ("reference", "exact")] == ["reference", "exact"]


def save_lenet(path: Path, **metadata: str) -> None:
    torch.manual_seed(0)
    fixed = {"model": "lenet_300_100", "dataset": "Fashion-MNIST", "mean": "0.5", "std": "0.5"}
    save_file(lenet_300_100().state_dict(), path, {**fixed, **metadata})


def test_weights_are_found_by_their_metadata(tmp_path: Path) -> None:
    lenet = NETWORKS["lenet"]
    with pytest.raises(FileNotFoundError, match="no weights in"):
        find_weights(lenet, tmp_path)
    save_lenet(tmp_path / "a.resume.safetensors")
    save_lenet(tmp_path / "b.safetensors", dataset="MNIST")
    save_lenet(tmp_path / "c.safetensors", model="LeNet-300-100: ip1 784->300")
    save_lenet(tmp_path / "d.safetensors")
    assert find_weights(lenet, tmp_path).name == "c.safetensors"
    assert find_weights(lenet, tmp_path, "d.safetensors").name == "d.safetensors"
    assert find_weights(lenet, tmp_path, "elsewhere.safetensors").name == "c.safetensors"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for random LeNet weights, 40 random images and a reference with one row; one of its cells is wrong."""
    pixels = torch.randint(256, (40, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setitem(DATASETS, "Fashion-MNIST", lambda root, split: (pixels, torch.arange(40) % 10))
    (tmp_path / "weights").mkdir()
    (tmp_path / "reference").mkdir()
    save_lenet(tmp_path / "weights" / "net.safetensors")
    model = lenet_300_100()
    load_checkpoint(tmp_path / "weights" / "net.safetensors", model)
    network = NETWORKS["lenet"]
    inputs, labels = images(network, {"mean": "0.5", "std": "0.5"}, tmp_path, "test")
    asked = {"rows": [{"criterion": "l2-GM", "ratio": 0.8}]}
    (row,) = paper.cells(network, model, inputs, labels, asked, Console(quiet=True))
    published = {**asked["rows"][0], "prune": row.measured["prune"], "merge": row.measured["reference"] + 0.01}
    reference = {"weights": "net.safetensors", "original": 1.23, "rows": [published]}
    (tmp_path / "reference" / "lenet.json").write_text(json.dumps(reference))
    return ["--data", str(tmp_path), "--weights", str(tmp_path / "weights"), "--only", "lenet", "vgg16"]


def test_table_compares_with_the_reference_and_lists_missing_weights(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper.main([*small, "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "1 of 2 cells agree with the published code to 0.01 %"
    assert "VGG-16 on CIFAR-10 left out: no weights in" in printed.out
    assert "published original 1.23" in printed.out
    assert "+0.00" in printed.out
    assert "-0.01" in printed.out
    assert len(printed.err.splitlines()) == len(METHODS)
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert (result["network"], result["weights"], result["images"]) == ("lenet", "net.safetensors", 40)
    (row,) = result["rows"]
    assert row["measured"].keys() == METHODS.keys()
    assert row["published"]["reference"] == pytest.approx(row["measured"]["reference"] + 0.01)


@pytest.mark.parametrize("unlike", ["images", "weights", "reference"])
def test_nothing_is_compared_on_different_images_or_weights(
    small: list[str], unlike: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "lenet", replace(NETWORKS["lenet"], ratios=(0.5, 0.9)))
    if unlike == "weights":
        (tmp_path / "weights" / "net.safetensors").rename(tmp_path / "weights" / "other.safetensors")
    more = {"images": ["--images", "20"], "weights": [], "reference": ["--reference", str(tmp_path / "none")]}[unlike]
    paper.main([*small, *more])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "0 of 0 cells agree with the published code to 0.01 %"
    rows = 6 if unlike == "reference" else 1  # without a reference: three criteria at two ratios
    assert len(printed.err.splitlines()) == rows * len(METHODS)


@pytest.mark.slow
def test_all_cells_of_lenet_agree_with_the_published_code(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    folders = ["--data", str(shared / "data"), "--weights", str(shared / "weights")]
    paper.main([*folders, "--only", "lenet", "--json", str(out)])
    assert capsys.readouterr().out.splitlines()[-1].startswith("30 of 30 cells agree")
    (result,) = json.loads(out.read_text())
    assert result["original"] == pytest.approx(89.80)
    assert len(result["rows"]) == 15


@pytest.mark.slow
def test_two_rows_of_resnet56_agree_on_2000_images(shared: Path) -> None:
    network = NETWORKS["resnet56"]
    model = MODELS["resnet56"]().eval()
    metadata = load_checkpoint(shared / "weights" / "resnet56_cifar10.safetensors", model)
    inputs, labels = images(network, metadata, shared / "data", "test", 2000)
    # results of the published code on these images
    published: list[dict[str, Any]] = [{"ratio": 0.3, "prune": 75.4, "merge": 85.17}]
    published += [{"ratio": 0.5, "prune": 27.3, "merge": 59.3}]
    rows = [{"criterion": "l1-norm", **row} for row in published]
    for row in paper.cells(network, model, inputs, labels, {"rows": rows}, Console(quiet=True)):
        assert {m: row.measured[m] for m in row.published} == pytest.approx(row.published, abs=0.06)
