"""Show the merge groups of a model, the channels that cannot be merged and why, and the graph of the analysis."""

import torch
from torch import Tensor, nn

import fxmerge


class Block(nn.Module):
    """A residual block: the two inputs of the addition share their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


analysis = fxmerge.analyze(Block().eval(), torch.randn(1, 3, 16, 16))

for group in analysis.groups:
    print(f"{group.name}: {group.channels} channels")
for refusal in analysis.refusals:
    print(f"{refusal.name}: not merged, {refusal.reason} ({refusal.where})")

graph = analysis.graph  # a networkx.DiGraph: layer -> group (write), group -> layer (read, carry)
for start, end, role in sorted(graph.edges(data="role")):
    print(f"{start} -> {end}: {role}")
