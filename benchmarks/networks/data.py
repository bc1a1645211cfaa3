"""Fashion-MNIST and CIFAR-10 from local folders, as tensors. Nothing is downloaded."""

import gzip
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Split = Literal["train", "test"]


def fashion_mnist(root: str | Path, split: Split) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: images uint8 (N, 28, 28) and labels int64 (N,) (Xiao et al., 2017).

    Reads the idx files, plain or .gz, from where torchvision puts them: FashionMNIST/raw in `root` or in
    `root`/fashion-mnist. Raises FileNotFoundError if they are in neither.
    """
    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]
    folders = [Path(root, below, "FashionMNIST", "raw") for below in ("", "fashion-mnist")]
    for folder in folders:
        images, labels = (_plain_or_gz(folder / name) for name in names)
        if images and labels:
            return _read_idx(images), _read_idx(labels).long()
    raise _not_found("Fashion-MNIST", [folder / name for folder in folders for name in names])


def cifar10(root: str | Path, split: Split) -> tuple[Tensor, Tensor]:
    """CIFAR-10: images uint8 (N, 32, 32, 3) and labels int64 (N,) (Krizhevsky, 2009).

    Reads torchvision's `root`/cifar-10-batches-py, or else `root`/cifar10.npz with the arrays {train,test}_{x,y}, which
    may have fewer images. Raises FileNotFoundError if there is neither.
    """
    batches, npz = Path(root, "cifar-10-batches-py"), Path(root, "cifar10.npz")
    if batches.is_dir():
        from torchvision.datasets import CIFAR10

        dataset = CIFAR10(str(root), train=split == "train", download=False)
        return torch.from_numpy(dataset.data), torch.tensor(dataset.targets)
    if npz.is_file():
        with np.load(npz) as arrays:
            return torch.from_numpy(arrays[f"{split}_x"]), torch.from_numpy(arrays[f"{split}_y"]).long()
    raise _not_found("CIFAR-10", [batches, npz])


# Keys are the `dataset` entries of the checkpoints' metadata.
DATASETS: dict[str, Callable[[str | Path, Split], tuple[Tensor, Tensor]]] = {
    "Fashion-MNIST": fashion_mnist,
    "CIFAR-10": cifar10,
}


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], *, flatten: bool = False) -> Tensor:
    """(images / 255 - mean) / std, as float32 (N, C, H, W), or (N, C * H * W) with `flatten=True`.

    `images` is uint8 (N, H, W) or (N, H, W, C); `mean` and `std` have one entry for each channel.
    """
    if images.dim() == 3:
        images = images.unsqueeze(-1)
    scaled = (images / 255 - images.new_tensor(mean, dtype=torch.float32)) / images.new_tensor(std, dtype=torch.float32)
    scaled = scaled.permute(0, 3, 1, 2).contiguous()
    return scaled.flatten(1) if flatten else scaled


def mean_and_std(metadata: Mapping[str, str]) -> tuple[list[float], list[float]]:
    """The `mean` and `std` of a checkpoint's metadata, one entry for each channel."""
    mean, std = ([float(value) for value in metadata[key].split(",")] for key in ("mean", "std"))
    return mean, std


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Top-1 accuracy in %, in eval mode. Model, inputs and labels must be on the same device."""
    training = model.training
    model.eval()
    correct = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(batch), labels.split(batch), strict=True)
    )
    model.train(training)
    return 100 * correct / len(labels)


def _plain_or_gz(path: Path) -> Path | None:
    """`path` if it is a file, else `path` with .gz if that is one, else None."""
    return next((file for file in (path, path.with_name(path.name + ".gz")) if file.is_file()), None)


def _read_idx(path: Path) -> Tensor:
    """A uint8 tensor from an idx file: bytes 0, 0, 8 and the rank, big-endian int32 sizes, then the values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    header = 4 + 4 * raw[3]
    shape = np.frombuffer(raw[4:header], dtype=">i4").tolist()
    return torch.from_numpy(np.frombuffer(raw[header:], dtype=np.uint8).reshape(shape).copy())


def _not_found(dataset: str, looked_for: list[Path]) -> FileNotFoundError:
    paths = "\n  ".join(map(str, looked_for))
    return FileNotFoundError(
        f"{dataset} not found. Pass the folder that contains it as --data DIR. Looked for\n  {paths}"
    )
