"""The benchmark networks, their published checkpoints, the data loaders and the training script."""

import gzip
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.demo import images as make_demo_data
from benchmarks.networks import train
from benchmarks.networks.data import DATASETS, accuracy, cifar10, fashion_mnist, mean_and_std, normalise
from benchmarks.networks.models import MODELS, example_input, load_checkpoint, read_safetensors, resnet
from tests.helpers.slow import slow_but

SHARED = Path(os.environ.get("FXMERGE_SHARED", Path(__file__).resolve().parents[3] / "shared"))
ASSETS = Path(__file__).resolve().parents[2] / "fxmerge" / "assets"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="no folder with published checkpoints and data: set FXMERGE_SHARED"
)

# Parameters in millions as rounded in the papers, and the number of decimals.
PARAMETERS = {
    "lenet_300_100": (0.267, 3),
    "vgg16": (14.7, 1),
    "resnet20": (0.27, 2),
    "resnet32": (0.47, 2),
    "resnet56": (0.86, 2),
    "resnet110": (1.7, 1),
    "wrn_40_4": (8.9, 1),
}


def published_accuracy(model: nn.Module, metadata: dict[str, str], data: Path, count: int | None = None) -> float:
    """Top-1 accuracy in % on the first `count` test images of the data set that `metadata` names."""
    images, labels = DATASETS[metadata["dataset"]](data, "test")
    flatten = metadata["dataset"] == "Fashion-MNIST"
    return accuracy(model, normalise(images[:count], *mean_and_std(metadata), flatten=flatten), labels[:count])


def idx(array: np.ndarray) -> bytes:
    """A uint8 array in the idx format."""
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_fashion_mnist(root: Path, *, train_count: int = 300, test_count: int = 50, gz: bool = False) -> Path:
    """Write random images and labels in the layout of Fashion-MNIST; returns `root`."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train_count), ("t10k", test_count)):
        arrays = {
            f"{prefix}-images-idx3-ubyte": rng.integers(256, size=(count, 28, 28), dtype=np.uint8),
            f"{prefix}-labels-idx1-ubyte": rng.integers(10, size=count, dtype=np.uint8),
        }
        for name, array in arrays.items():
            if gz:
                (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (raw / name).write_bytes(idx(array))
    return root


def assert_same_run(path: Path, other: Path) -> None:
    tensors, metadata = read_safetensors(path)
    other_tensors, other_metadata = read_safetensors(other)
    assert metadata == other_metadata
    assert tensors.keys() == other_tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[key]), key


def test_every_model_has_a_parameter_count_here() -> None:
    assert PARAMETERS.keys() == MODELS.keys() == train.RECIPES.keys()


@pytest.mark.parametrize("name", slow_but([m for m in MODELS if m != "resnet110"], MODELS))
def test_model_traces_and_has_the_papers_size(name: str) -> None:
    model = MODELS[name]().eval()
    millions, decimals = PARAMETERS[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, decimals) == millions
    x = example_input(name)
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (2, 10)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)


def test_resnet_refuses_a_depth_that_is_not_6n_plus_2() -> None:
    with pytest.raises(ValueError, match=r"6 n \+ 2 .*got 21"):
        resnet(21)


@needs_shared
def test_published_lenet_reaches_its_accuracy() -> None:
    model = MODELS["lenet_300_100"]()
    metadata = load_checkpoint(SHARED / "weights" / "lenet_300_100_fashion.safetensors", model)
    measured = published_accuracy(model, metadata, SHARED / "data")
    assert measured == pytest.approx(89.80, abs=0.005)
    assert measured == pytest.approx(float(metadata["test_accuracy"]), abs=0.005)


@pytest.mark.slow
@needs_shared
def test_published_resnet56_is_above_90() -> None:
    model = MODELS["resnet56"]()
    metadata = load_checkpoint(SHARED / "weights" / "resnet56_cifar10.safetensors", model)
    assert metadata["test_accuracy"] == "93.88"
    assert published_accuracy(model, metadata, SHARED / "data", count=500) > 90


@needs_shared
def test_recipe_normalises_like_the_published_checkpoint() -> None:
    for file, name in (("lenet_300_100_fashion", "lenet_300_100"), ("resnet56_cifar10", "resnet56")):
        recipe = train.RECIPES[name]
        _, metadata = read_safetensors(SHARED / "weights" / f"{file}.safetensors")
        assert mean_and_std(metadata) == (list(recipe.mean), list(recipe.std))
        assert metadata["dataset"] == recipe.dataset


def test_demo_assets_have_the_accuracy_in_their_readme() -> None:
    model = MODELS["lenet_300_100"]()
    metadata = load_checkpoint(ASSETS / "lenet_300_100.safetensors", model)
    with np.load(ASSETS / "fashion_mnist_2000.npz") as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
    assert images.shape == (2000, 28, 28) and labels.bincount().min() > 100
    on_all, on_demo = re.findall(r"(\d\d\.\d\d) %", (ASSETS / "README.md").read_text(encoding="utf-8"))
    assert on_all == metadata["test_accuracy"]
    measured = accuracy(model, normalise(images, *mean_and_std(metadata), flatten=True), labels)
    # within one image: a different BLAS may change the order of nearly equal outputs
    assert measured == pytest.approx(float(on_demo), abs=0.051)
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 3e6


def test_load_checkpoint_names_the_keys_that_do_not_fit(tmp_path: Path) -> None:
    model = MODELS["lenet_300_100"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {**before, "ip2.bias": torch.zeros(7), "ip4.weight": torch.zeros(1)}
    del state["ip1.bias"]
    save_file(state, tmp_path / "bad.safetensors")
    faults = "missing: ip1.bias; unexpected: ip4.weight; with a different shape: ip2.bias"
    with pytest.raises(ValueError, match=rf"bad\.safetensors does not fit LeNet300100: {faults}$"):
        load_checkpoint(tmp_path / "bad.safetensors", model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("below", ["", "fashion-mnist"])
def test_fashion_mnist_reads_idx_files(tmp_path: Path, below: str, gz: bool) -> None:
    write_fashion_mnist(tmp_path / below, gz=gz)
    images, labels = fashion_mnist(tmp_path, "train")
    assert images.shape == (300, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (300,) and labels.dtype == torch.int64
    rng = np.random.default_rng(0)
    assert np.array_equal(images.numpy(), rng.integers(256, size=(300, 28, 28), dtype=np.uint8))
    assert fashion_mnist(tmp_path, "test")[0].shape == (50, 28, 28)


def test_cifar10_reads_the_npz_file(tmp_path: Path) -> None:
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    np.savez(tmp_path / "cifar10.npz", test_x=images, test_y=np.array([3, 9], np.uint8))
    read, labels = cifar10(tmp_path, "test")
    assert np.array_equal(read.numpy(), images)
    assert labels.tolist() == [3, 9] and labels.dtype == torch.int64


def test_cifar10_prefers_the_layout_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # the real files have fixed MD5s
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    image = np.arange(3 * 32 * 32, dtype=np.uint16).astype(np.uint8).reshape(1, 3, 32, 32)
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps({"data": image.reshape(1, -1), "labels": [7]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    images, labels = cifar10(tmp_path, "train")
    assert images.dtype == torch.uint8 and labels.tolist() == [7] * 5
    assert np.array_equal(images[:1].numpy(), image.transpose(0, 2, 3, 1))
    assert len(cifar10(tmp_path, "test")[0]) == 1


@pytest.mark.parametrize("dataset", DATASETS)
def test_missing_data_names_the_folders_and_the_flag(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(FileNotFoundError, match="--data DIR") as error:
        DATASETS[dataset](tmp_path, "test")
    assert dataset in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_normalise_moves_channels_first() -> None:
    images = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    images[..., 1] = 255
    out = normalise(images, (0.5, 0.2, 0.0), (0.5, 0.4, 1.0))
    assert out.shape == (2, 3, 4, 5)
    assert torch.allclose(out.mean((0, 2, 3)), torch.tensor([-1.0, 2.0, 0.0]))
    assert torch.equal(normalise(images, (0.5,), (0.5,), flatten=True), normalise(images, (0.5,), (0.5,)).flatten(1))


def test_accuracy_counts_over_ragged_batches_and_restores_the_mode() -> None:
    model = nn.Identity().train()
    labels = torch.arange(7) % 3
    inputs = nn.functional.one_hot(labels, 3).float()
    assert accuracy(model, inputs, labels, batch=3) == 100
    labels[:2] = 2
    assert accuracy(model, inputs, labels, batch=3) == pytest.approx(100 * 5 / 7)
    assert model.training


def test_augment_is_a_crop_of_the_padded_image_or_its_mirror() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 8, 6, 3), dtype=torch.uint8)
    seen = set()
    for image, result in zip(images, train.augment(images), strict=True):
        seen |= set(positions(image, result))
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))


def positions(image: Tensor, result: Tensor) -> list[tuple[int, int, bool]]:
    """All (y, x, mirrored) at which `result` is a crop of `image` padded by 4. Asserts that there is one."""
    height, width, _ = image.shape
    padded = nn.functional.pad(image, (0, 0, 4, 4, 4, 4))
    crops = {(y, x): padded[y : y + height, x : x + width] for y in range(9) for x in range(9)}
    found = [
        (y, x, mirrored)
        for (y, x), crop in crops.items()
        for mirrored in (False, True)
        if torch.equal(crop.flip(1) if mirrored else crop, result)
    ]
    assert found
    return found


def test_learning_rate_milestones_move_with_the_number_of_epochs() -> None:
    recipe = train.RECIPES["lenet_300_100"]
    assert [recipe.lr_at(epoch, 60) for epoch in (0, 14, 15, 59)] == pytest.approx([0.1, 0.1, 0.01, 1e-4])
    assert [recipe.lr_at(epoch, 4) for epoch in range(4)] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])


def test_interrupted_training_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_fashion_mnist(tmp_path)
    whole, parts = tmp_path / "whole" / "net.safetensors", tmp_path / "parts" / "net.safetensors"
    arguments = ["lenet_300_100", "--data", str(data), "--epochs", "2", "--out"]
    train.main([*arguments, str(whole)])

    save_state = train._save_state

    def save_and_stop(*args: Any) -> None:
        save_state(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "_save_state", save_and_stop)
        train.main([*arguments, str(parts)])
    assert [file.name for file in parts.parent.iterdir()] == ["net.resume.safetensors"]
    with pytest.raises(ValueError, match="another run: seed 0 instead of 1"):
        train.train("lenet_300_100", data, parts, epochs=2, resume=True, seed=1)

    torch.manual_seed(123)
    train.main([*arguments, str(parts), "--resume"])
    assert [file.name for file in parts.parent.iterdir()] == ["net.safetensors"]
    assert_same_run(whole, parts)
    metadata = load_checkpoint(parts, MODELS["lenet_300_100"]())
    assert metadata["epochs"] == "2" and metadata["model"] == "lenet_300_100" and "test_accuracy" in metadata


def test_cifar_recipe_trains_in_bfloat16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"{split}_x": rng.integers(256, size=(16, 32, 32, 3), dtype=np.uint8) for split in ("train", "test")
    }
    arrays |= {f"{split}_y": rng.integers(10, size=16, dtype=np.uint8) for split in ("train", "test")}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    out = tmp_path / "net.safetensors"
    train.main(["resnet20", "--data", str(tmp_path), "--out", str(out), "--epochs", "1", "--bf16"])
    assert load_checkpoint(out, MODELS["resnet20"]())["precision"] == "bfloat16"


def test_training_without_data_exits_with_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["lenet_300_100", "--data", str(tmp_path), "--out", str(tmp_path / "net.safetensors")])
    assert stop.value.code == 1
    assert "--data DIR" in capsys.readouterr().err


def test_demo_data_are_the_first_test_images(tmp_path: Path) -> None:
    data = write_fashion_mnist(tmp_path, test_count=2003)
    out = tmp_path / "demo.npz"
    make_demo_data.main(["--data", str(data), "--out", str(out)])
    images, labels = fashion_mnist(data, "test")
    with np.load(out) as arrays:
        assert arrays["labels"].dtype == np.uint8
        assert np.array_equal(arrays["images"], images[:2000].numpy())
        assert np.array_equal(arrays["labels"], labels[:2000].numpy())
