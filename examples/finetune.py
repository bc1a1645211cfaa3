"""Fine-tune a merged model: it is an ordinary module with gradients, a train() mode and a state_dict."""

import torch
from torch import Tensor, nn

import fxmerge


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of noise with one bright corner, and the index of the corner (0 to 3) as label."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (count,), generator=generator)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    for corner, (row, column) in enumerate([(0, 0), (0, 5), (5, 0), (5, 5)]):
        x[label == corner, :, row : row + 3, column : column + 3] += 0.8
    return x, label


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


def train(model: nn.Module, steps: int) -> None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(steps):
        x, label = data(64, seed=step)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimiser.step()


def accuracy(model: nn.Module) -> float:
    x, label = data(2000, seed=10**6)
    with torch.no_grad():
        return 100 * float((model.eval()(x).argmax(1) == label).float().mean())


model = net()
train(model, 60)
print(f"trained: {accuracy(model):.1f} %")

merged = fxmerge.merge(model, data(2, 0)[0], ratio=0.95).module
print(f"merged to a sixteenth of the channels: {accuracy(merged):.1f} %")
train(merged, 60)
print(f"fine-tuned: {accuracy(merged):.1f} %")
