"""Teach fxmerge an op that it does not know: until then the channels around it stay as they are."""

import torch
from torch import Tensor, nn

import fxmerge


def snake(x: Tensor) -> Tensor:
    """An activation of your own, made of an op that has no rule."""
    return x + torch.sinc(x).square()


def model() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 16, 5), nn.Conv1d(16, 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(snake(self.a(x)))
            return out

    torch.manual_seed(0)
    return Net().eval()


x = torch.randn(1, 2, 32)

before = fxmerge.analyze(model(), x)
print("without a rule:", [g.name for g in before.groups], "|", before.refusals[0].reason, "|", before.refusals[0].where)

# sinc maps every channel by itself, and sinc(s x) is not s sinc(x): one row says so, with all its spellings.
fxmerge.RULES["sinc"] = fxmerge.per_channel("sinc", torch.sinc, "sinc", commutes=False)

result = fxmerge.merge(model(), x, ratio=0.5)
print("with it:", [f"{g.name}: {g.channels} -> {len(g.kept)} channels" for g in result.plan.groups])

# Is the rule right? Permuting the group's channels everywhere they live must not change the output.
found = result.analysis
print("permutation oracle:", fxmerge.verify.permutation(found.captured, found.facts, found.grouping))
