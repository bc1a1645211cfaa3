"""Nets as other people write them. OTHERS maps a name to a class, whose `n` scales every width that is its own.

So `Net(1)` is the size that `Net(2)` must have when it is merged to half: a calculation that fxmerge has no part in.
Every net takes the arguments that its `example` gives, a dict for keyword arguments.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.netmaking import randomised

OTHERS: dict[str, type[nn.Module]] = {}
IMAGE, FEATURES, TOKENS = (2, 3, 8, 8), (4, 6), (2, 6, 5)


def other(*shape: int, words: int = 0, **facts: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a class with the shape of its input, or with a function `example` that makes its inputs.

    stays: the layers whose channels cannot be merged -> the reason that the report must give
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        def example() -> Any:
            torch.manual_seed(0)
            return torch.randint(words, shape) if words else torch.randn(shape)

        cls.example = staticmethod(facts.get("example", example))  # type: ignore[attr-defined]
        cls.stays = facts.get("stays", {})  # type: ignore[attr-defined]
        OTHERS[cls.__name__] = cls
        return cls

    return register


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


@other(*IMAGE)
class SharedHead(nn.Module):
    """One convolution that is called three times, on inputs of two sizes."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem, self.shared, self.out = conv(3, 8 * n), conv(8 * n, 8 * n), conv(8 * n, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.stem(x))
        x = F.relu(self.shared(F.relu(self.shared(x))))
        return [self.out(x), self.out(F.relu(self.shared(F.max_pool2d(x, 2))))]


@other(*IMAGE)
class LearnedUpsampling(nn.Module):
    """DLA and CenterNet: a depthwise transposed convolution, as a module and as a function."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.out = conv(3, 8 * n), conv(8 * n, 4)
        self.up = nn.ConvTranspose2d(8 * n, 8 * n, 4, 2, 1, groups=8 * n, bias=False)
        self.filters = nn.Parameter(torch.rand(8 * n, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.a(x)))
        return self.out(F.relu(F.conv_transpose2d(x, self.filters, stride=2, groups=x.size(1))))


@other(2, 6)
class Generator(nn.Module):
    """DCGAN's generator: a vector becomes an image, which is upsampled; a second branch only upsamples and pools."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.z, self.norm, self.up = (
            nn.Linear(6, 8 * n * 16),
            nn.BatchNorm2d(8 * n),
            nn.ConvTranspose2d(8 * n, 6 * n, 4, 2, 1),
        )
        self.w, self.out = nn.Linear(6, 6 * n * 16), nn.Conv2d(6 * n, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.relu(self.norm(self.z(x).view(-1, self.norm.num_features, 4, 4))))
        w = F.max_pool2d(self.w(x).view(x.size(0), -1, 4, 4), 3, 1, 1)
        return torch.tanh(self.out(F.relu(y) + F.interpolate(w, scale_factor=2)))


@other(4, 12)
class TiedAutoencoder(nn.Module):
    """The decoder uses the transposed weights of the encoder, so that each parameter is used twice."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8 * n), nn.Linear(8 * n, 6 * n)
        self.back, self.out = nn.Parameter(torch.zeros(8 * n)), nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(self.b(F.relu(self.a(x))))
        return F.linear(F.relu(F.linear(code, self.b.weight.t(), self.back)), self.a.weight.T, bias=self.out)


@other(2, 3, 9)
class PointNet(nn.Module):
    """The maximum of each feature over the points; torch.maximum keeps the features above a lower bound."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv1d(3, 8 * n, 1), nn.Conv1d(8 * n, 12 * n, 1), nn.Linear(12 * n, 4)
        self.floor = nn.Conv1d(3, 12 * n, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.max(self.b(F.relu(self.a(x))), self.floor(x))
        values, _ = torch.max(y, 2, keepdim=True)
        return self.out(values.squeeze(2) + y.min(2).values)


@other(*IMAGE, stays={"spatial": "is spread over the channels of another tensor"})
class Cbam(nn.Module):
    """Gates computed from the mean and the maximum, per channel and over the channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.out, self.spatial = conv(3, 8 * n), conv(8 * n, 4), conv(2, 1, 7)
        self.gate = nn.Sequential(nn.Linear(8 * n, 4 * n), nn.ReLU(), nn.Linear(4 * n, 8 * n))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3))) + self.gate(x.amax((2, 3))))[:, :, None, None]
        both = torch.cat([x.mean(1, keepdim=True), torch.max(x, 1, keepdim=True)[0]], 1)
        return self.out(x * torch.sigmoid(self.spatial(both)))


@other(*IMAGE, stays={"a": "max gives the numbers of channels"})
class NumbersOfChannels(nn.Module):
    """The index of the largest channel is part of the output."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 8), conv(8, 6 * n), conv(6 * n, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.a(x))
        return self.out(F.relu(self.b(x))), x.max(1)[1]


@other(*IMAGE)
class GluFunction(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 8 * n), conv(4 * n, 12 * n), nn.Linear(6 * n, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.a(x), 1)
        return self.out(F.glu(self.b(x), dim=1).mean((2, 3)))


@other(*TOKENS)
class GluModule(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 16 * n), nn.GLU(), nn.Linear(8 * n, 12 * n), nn.GLU(-1))
        self.out = nn.Linear(6 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))


@other(*TOKENS)
class GluChunk(nn.Module):
    """Halves by chunk, in the order of GEGLU, where the gate is the second half."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 16 * n), nn.Linear(8 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.a(x).chunk(2, dim=-1)
        return self.b(x * F.gelu(gate))


@other(*TOKENS)
class SwiGlu(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8 * n), nn.RMSNorm(8 * n)
        self.w1, self.w3, self.w2 = nn.Linear(8 * n, 12 * n), nn.Linear(8 * n, 12 * n), nn.Linear(12 * n, 8 * n)
        self.out = nn.Linear(8 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        y = self.norm(h)
        return self.out(h + self.w2(F.silu(self.w1(y)) * self.w3(y)))


@other(*IMAGE)
class SuperResolution(nn.Module):
    """A pixel shuffle, whose output channels are blocks of its input channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.up, self.shuffle = conv(3, 8 * n), conv(8 * n, 16 * n), nn.PixelShuffle(2)
        self.out = conv(4 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.shuffle(self.up(F.relu(self.a(x))))))


@other(*IMAGE)
class ShuffleThenGroups(nn.Module):
    """A ShuffleNet unit: a grouped, a depthwise and another grouped convolution, with a channel shuffle."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.g = conv(3, 8 * n), nn.Conv2d(8 * n, 8 * n, 1, groups=2)
        self.d, self.h = conv(8 * n, 8 * n, groups=8 * n), nn.Conv2d(8 * n, 8 * n, 1, groups=2)
        self.out = nn.Linear(8 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.g(F.relu(self.a(x))))
        b, c, h, w = y.size()
        y = torch.transpose(y.view(b, 2, c // 2, h, w), 1, 2).contiguous().view(b, -1, h, w)
        return self.out(F.relu(self.h(self.d(y))).mean([2, 3]))


@other(*IMAGE)
class PermutedFlatten(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.fc, self.out = conv(3, 4 * n), nn.Linear(4 * n * 16, 6 * n), nn.Linear(6 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.a(x)), 2).permute(0, 2, 3, 1)
        return self.out(F.relu(self.fc(x.reshape(x.shape[0], -1))))


@other(*IMAGE)
class RawParameters(nn.Module):
    """Weights, norms and scales that are plain parameters."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(8 * n, 3, 3, 3))
        self.gamma, self.beta = nn.Parameter(torch.empty(8 * n)), nn.Parameter(torch.empty(1, 8 * n, 1, 1))
        self.m, self.p = nn.Parameter(torch.empty(8 * n, 6 * n)), nn.Parameter(torch.empty(6 * n, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w) * self.gamma[:, None, None] + self.beta
        return F.relu(F.relu(x).mean((2, 3)) @ self.m) @ self.p


@other(2, 6, words=11)
class TiedEmbedding(nn.Module):
    """A language model whose output layer shares its weight with the embedding."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.e, self.up, self.down = nn.Embedding(11, 8 * n), nn.Linear(8 * n, 12 * n), nn.Linear(12 * n, 8 * n)
        self.norm, self.head = nn.LayerNorm(8 * n), nn.Linear(8 * n, 11, bias=False)
        self.head.weight = self.e.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


@other(*IMAGE)
class InPlace(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 8 * n), conv(8 * n, 8 * n), nn.Linear(8 * n, 3)
        self.act, self.bn = nn.ReLU(inplace=True), nn.BatchNorm2d(8 * n)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.a(x)))
        y = self.b(x)
        y += x
        y.mul_(0.5).clamp_(min=-1.0)
        self.act(y)
        return self.out(y.mean((2, 3)))


@other(*IMAGE)
class OneChannel(nn.Module):
    """Layers of one channel, which keep it; the other layers merge."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.mask, self.one, self.b = conv(3, 8 * n), conv(8 * n, 1), conv(1, 1), conv(8 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.b(x * torch.sigmoid(self.one(self.mask(x))))


def inputs_in_a_dict() -> tuple[dict[str, Tensor]]:
    return ({"image": torch.randn(IMAGE), "more": torch.randn(2, 5)},)


@other(example=inputs_in_a_dict)
class DictInput(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b, self.out = conv(3, 8 * n), nn.Linear(5, 8 * n), nn.Linear(8 * n, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.out(F.relu(self.a(batch["image"])).mean((2, 3)) + F.relu(self.b(batch["more"])))


def keywords() -> dict[str, Any]:
    return {"x": torch.randn(FEATURES), "scale": 2.0, "extra": torch.randn(FEATURES)}


@other(example=keywords)
class Keywords(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8 * n), nn.Linear(8 * n, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0, extra: Tensor | None = None) -> Tensor:
        return self.b(F.relu(self.a(x if extra is None else x + extra)) * scale)


class ManyOutputs(nn.Module):
    """A trunk with two heads; subclasses differ in the type that they return."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8 * n), nn.Linear(8 * n, 3), nn.Linear(8 * n, 2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.a(x))
        return self.b(x), self.c(x)


@dataclass
class Found:
    scores: Tensor
    boxes: Tensor


Pair = namedtuple("Pair", ("scores", "boxes"))


@other(*FEATURES)
class TupleOutput(ManyOutputs):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heads(x)


@other(*FEATURES)
class DictOutput(ManyOutputs):
    def forward(self, x: Tensor) -> dict[str, Any]:
        scores, boxes = self.heads(x)
        return {"scores": scores, "rest": [boxes, {"sum": boxes.sum()}]}


@other(*FEATURES)
class NamedOutput(ManyOutputs):
    def forward(self, x: Tensor) -> Pair:
        return Pair(*self.heads(x))


@other(*FEATURES)
class DataclassOutput(ManyOutputs):
    def forward(self, x: Tensor) -> Found:
        return Found(*self.heads(x))



def made(name: str) -> tuple[nn.Module, Any, tuple[Any, ...], dict[str, Any]]:
    """(the net, its example inputs, the same as positional arguments, the same as keyword arguments)."""
    example = OTHERS[name].example()  # type: ignore[attr-defined]
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    if isinstance(example, tuple):
        args = example
    return randomised(OTHERS[name](2)).eval(), example, args, kwargs
