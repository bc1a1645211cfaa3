"""Teach fxmerge ops that it does not know: until then the channels around them stay as they are."""

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.ir import Lab
from fxmerge.rules import Operand, RuleContext, Unknown


def snake(x: Tensor) -> Tensor:
    """An activation of your own, made of an op that has no rule."""
    return x + torch.special.bessel_j0(x).square()


def model() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(2, 16, 5), nn.Conv1d(2, 16, 5), nn.Conv1d(16, 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(torch.special.xlog1py(snake(self.a(x)), self.b(x).square()))
            return out

    torch.manual_seed(0)
    return Net().eval()


x = torch.randn(1, 2, 32)

before = fxmerge.analyze(model(), x)
print("without rules:", [g.name for g in before.groups], "|", before.refusals[0].reason, "|", before.refusals[0].where)

# J0 maps every channel by itself, and J0(s x) is not s J0(x): one row says so, with all its spellings.
fxmerge.RULES["bessel_j0"] = fxmerge.per_channel("bessel_j0", torch.special.bessel_j0, commutes=False)


def xlog1py(ctx: RuleContext, input: Operand, other: Operand) -> Lab | Unknown:
    """input log(1 + other): channel i of one operand meets channel i of the other, so they are dropped together."""
    if not isinstance(input, Lab) or not isinstance(other, Lab) or input.t.shape != other.t.shape:
        return Unknown("takes something other than two activations of one shape")
    ctx.tie(input.t, other.t)
    return input


# s x log(1 + s y) is not s times x log(1 + y)
fxmerge.RULES["xlog1py"] = fxmerge.Rule("xlog1py", "tie", xlog1py, (torch.special.xlog1py,), commutes=False)

result = fxmerge.merge(model(), x, ratio=0.5)
print("with them:", [f"{g.name}: {g.channels} -> {len(g.kept)} channels" for g in result.plan.groups])

# Are the rules right? Permuting the group's channels everywhere they live must not change the output.
found = result.analysis
print("permutation oracle:", fxmerge.verify.permutation(found.captured, found.facts, found.grouping))
