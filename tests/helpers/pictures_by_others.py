"""Nets as other people write them: pyramids, segmentation heads, patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.written_by_others import IMAGE, conv, other


@other(1, 3, 16, 16)
class Pyramid(nn.Module):
    """An FPN: a list of levels as input, a dict of levels as output, and one shared output convolution."""

    def __init__(self, n: int) -> None:
        super().__init__()
        widths = (4 * n, 6 * n, 8 * n)
        self.stages = nn.ModuleList(conv(i, o, stride=2) for i, o in zip((3, 4 * n, 6 * n), widths, strict=True))
        self.laterals = nn.ModuleList(conv(w, 6 * n, 1) for w in widths)
        self.smooth, self.head = conv(6 * n, 6 * n), conv(6 * n, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = []
        for stage in self.stages:
            x = F.relu(stage(x))
            levels.append(x)
        inner = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        for at in (1, 0):
            inner[at] = inner[at] + F.interpolate(inner[at + 1], size=inner[at].shape[-2:], mode="nearest")
        return {f"p{at}": self.head(F.relu(self.smooth(level))) for at, level in enumerate(inner)}


@other(1, 3, 16, 16)
class Segmentation(nn.Module):
    """DeepLab's head: dilated branches, an upsampled image-level branch, and a mask of the input's size."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8 * n, stride=2), nn.BatchNorm2d(8 * n), nn.ReLU())
        self.branches = nn.ModuleList(nn.Conv2d(8 * n, 4 * n, 3, padding=d, dilation=d) for d in (1, 2))
        self.pooled, self.project, self.out = conv(8 * n, 4 * n, 1), conv(12 * n, 6 * n, 1), conv(6 * n, 3, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.stem(image)
        size = x.shape[-2:]
        found = [F.relu(branch(x)) for branch in self.branches]
        whole = F.relu(self.pooled(F.adaptive_avg_pool2d(x, 1)))
        found.append(F.interpolate(whole, size=size, mode="bilinear", align_corners=False))
        x = self.out(F.relu(self.project(torch.cat(found, dim=1))))
        return {"out": F.interpolate(x, size=image.shape[-2:], mode="bilinear", align_corners=False)}


@other(*IMAGE)
class Patches(nn.Module):
    """Patches as in MobileViT: unfold, a layer on the patches, fold."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.mix, self.out = conv(3, 8 * n), nn.Conv1d(8 * n * 4, 4 * n * 4, 1), conv(4 * n, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.unfold(F.relu(self.a(x)), 2, stride=2)
        return self.out(F.fold(F.relu(self.mix(x)), (8, 8), 2, stride=2))
