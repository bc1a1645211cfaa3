"""Train a network: `python -m benchmarks.networks.train MODEL --data DIR --out FILE.safetensors`.

After each epoch the state is written next to the output as FILE.resume.safetensors; `--resume` continues from it. On
the CPU, with a fixed number of threads, the same seed gives the same weights, whether training was interrupted or not.
The accuracy in the metadata of the output is that of the last epoch: test images are used once, after training, and
nothing is selected on them.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.networks.data import DATASETS, accuracy, normalise
from benchmarks.networks.models import MODELS, example_input, read_safetensors


@dataclass(frozen=True)
class Recipe:
    """SGD with a step schedule: the learning rate is multiplied by 0.1 at each milestone."""

    dataset: str  # a key of DATASETS
    mean: tuple[float, ...]  # one entry for each channel; images are in [0, 1]
    std: tuple[float, ...]
    epochs: int
    milestones: tuple[int, ...]  # epochs; scaled if training takes another number of epochs
    weight_decay: float
    augment: bool  # random crop of the image padded by 4, random horizontal flip
    lr: float = 0.1
    momentum: float = 0.9
    batch: int = 128

    def lr_at(self, epoch: int, epochs: int) -> float:
        """Learning rate of epoch `epoch` (from 0) of `epochs`."""
        passed = sum(epoch * self.epochs >= milestone * epochs for milestone in self.milestones)
        return self.lr * 0.1**passed


FASHION_MNIST = Recipe("Fashion-MNIST", (0.5,), (0.5,), 60, (15, 30, 45), weight_decay=1e-4, augment=False)
CIFAR10 = Recipe(
    "CIFAR-10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 200, (100, 150), weight_decay=5e-4, augment=True
)
RECIPES = {name: FASHION_MNIST if name == "lenet_300_100" else CIFAR10 for name in MODELS}


def train(
    name: str,
    data: str | Path,
    out: str | Path,
    *,
    epochs: int | None = None,
    device: str = "cpu",
    bf16: bool = False,
    resume: bool = False,
    seed: int = 0,
) -> float:
    """Train `MODELS[name]` with its recipe, write it to `out` and return its test accuracy in %.

    With `resume` but without a state next to `out`, training starts from the beginning. Raises FileNotFoundError if
    the data set is not in `data`, and ValueError if the state next to `out` belongs to another run.
    """
    recipe, out = RECIPES[name], Path(out)
    epochs = recipe.epochs if epochs is None else epochs
    flatten = example_input(name).dim() == 2
    images, labels = (tensor.to(device) for tensor in DATASETS[recipe.dataset](data, "train"))

    torch.manual_seed(seed)
    model = MODELS[name]().to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    metadata = {
        "model": name,
        "dataset": recipe.dataset,
        "mean": ",".join(map(str, recipe.mean)),
        "std": ",".join(map(str, recipe.std)),
        "recipe": json.dumps(asdict(recipe)),
        "epochs": str(epochs),
        "seed": str(seed),
        "precision": "bfloat16" if bf16 else "float32",
        "train_images": str(len(images)),
    }
    state = out.with_suffix(".resume.safetensors")
    done = _load_state(state, model, optimizer, metadata) if resume and state.exists() else 0

    with _progress(epochs, done) as report:
        for epoch in range(done, epochs):
            lr = optimizer.param_groups[0]["lr"] = recipe.lr_at(epoch, epochs)
            loss = _train_epoch(model, optimizer, images, labels, recipe, flatten=flatten, bf16=bf16)
            _save_state(state, model, optimizer, {**metadata, "done": str(epoch + 1)})
            report(epoch + 1, f"lr {lr:.4g}, training loss {loss:.4f}")

    test_images, test_labels = DATASETS[recipe.dataset](data, "test")
    inputs = normalise(test_images.to(device), recipe.mean, recipe.std, flatten=flatten)
    test_accuracy = accuracy(model, inputs, test_labels.to(device))
    _write(out, model.state_dict(), {**metadata, "test_accuracy": f"{test_accuracy:.2f}"})
    state.unlink(missing_ok=True)
    return test_accuracy


def augment(images: Tensor) -> Tensor:
    """Random crops of the images padded by 4 black pixels; half of them are mirrored. uint8 (N, H, W, C) in and out."""
    count, height, width, _ = images.shape
    rows = torch.randint(9, (count, 1)) + torch.arange(height)
    columns = torch.randint(9, (count, 1)) + torch.arange(width)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    picked = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    padded = F.pad(images, (0, 0, 4, 4, 4, 4))
    return padded[tuple(index.to(images.device) for index in picked)]


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    flatten: bool,
    bf16: bool,
) -> float:
    """Train for one epoch, with the images in random order; returns the mean cross-entropy."""
    model.train()
    total = torch.zeros((), device=images.device)
    for index in torch.randperm(len(images)).to(images.device).split(recipe.batch):
        batch = augment(images[index]) if recipe.augment else images[index]
        inputs = normalise(batch, recipe.mean, recipe.std, flatten=flatten)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(inputs), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(index)
    return total.item() / len(images)


def _save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, str]) -> None:
    """Write weights, momentum and the state of torch's CPU generator, the only source of random numbers here."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for key, parameter in model.named_parameters():
        tensors[f"momentum.{key}"] = optimizer.state[parameter]["momentum_buffer"]
    _write(path, {**tensors, "rng": torch.get_rng_state()}, metadata)


def _load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, str]) -> int:
    """Load what `_save_state` wrote; returns the number of finished epochs. ValueError if another run wrote it."""
    tensors, found = read_safetensors(path)
    differing = [key for key, value in metadata.items() if found.get(key) != value]
    if differing:
        changes = ", ".join(f"{key} {found.get(key)} instead of {metadata[key]}" for key in differing)
        raise ValueError(f"{path} belongs to another run: {changes}. Delete it, or leave out --resume.")
    model.load_state_dict({key: tensors[f"model.{key}"] for key in model.state_dict()})
    for key, parameter in model.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{key}"].to(parameter.device)
    torch.set_rng_state(tensors["rng"])
    return int(found["done"])


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file(tensors, part, metadata)
    os.replace(part, path)


@contextmanager
def _progress(epochs: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A function that shows `epoch, text`: in a progress bar on a terminal, else as one line for each epoch."""
    if not Console().is_terminal:
        yield lambda epoch, text: print(f"epoch {epoch}/{epochs}: {text}", flush=True)
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=epochs, completed=done)
        yield lambda epoch, text: progress.update(task, completed=epoch, description=text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks.train", description="Train a network.")
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder that contains the data set")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors")
    parser.add_argument("--epochs", type=int, help="default: that of the recipe; milestones are scaled")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument("--resume", action="store_true", help="continue from FILE.resume.safetensors if it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        test_accuracy = train(
            args.model,
            args.data,
            args.out,
            epochs=args.epochs,
            device=args.device,
            bf16=args.bf16,
            resume=args.resume,
            seed=args.seed,
        )
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{args.out}: test accuracy {test_accuracy:.2f} %")


if __name__ == "__main__":
    main()
