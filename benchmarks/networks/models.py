"""The networks of the published tables, and their checkpoints.

`MODELS` maps each name to a function that builds the network with random weights; `example_input(name)` is an input
for it. LeNet-300-100 and the ResNets have the parameter names of neuron-merging's published checkpoints.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn


class LeNet300100(nn.Module):
    """Fully connected 784-300-100-10 with ReLU; input (N, 784) (LeCun et al., 1998)."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.ip1 = nn.Linear(28 * 28, 300)
        self.relu_ip1 = nn.ReLU(inplace=True)
        self.ip2 = nn.Linear(300, 100)
        self.relu_ip2 = nn.ReLU(inplace=True)
        self.ip3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu_ip1(self.ip1(x))
        x = self.relu_ip2(self.ip2(x))
        return self.ip3(x)


class VGG(nn.Module):
    """VGG-16 with BatchNorm for 32 x 32 images, one linear layer at the end (Simonyan & Zisserman, 2015)."""

    STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in self.STAGES:
            for width in stage:
                conv = nn.Conv2d(channels, width, kernel_size=3, padding=1)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.features(x), 1)
        return self.classifier(x)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; the ReLU is applied to the input, not after the sum."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_planes != planes:
            self.downsample = nn.Sequential(_conv1x1(in_planes, planes, stride), nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            x = self.downsample(x)
        return out + x


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6 n + 2, widths 16, 32, 64, projection shortcuts (He et al., 2016, section 4.2)."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth, fixed=2)
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(BasicBlock, 16, 16, blocks, stride=1)
        self.layer2 = _stage(BasicBlock, 16, 32, blocks, stride=2)
        self.layer3 = _stage(BasicBlock, 32, 64, blocks, stride=2)
        self.avgpool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.avgpool(F.relu(x))
        x = x.view(x.size(0), -1)
        return self.fc(x)


class PreActBlock(nn.Module):
    """BatchNorm, ReLU, 3 x 3 convolution, twice, and a shortcut (He et al., 2016, "Identity mappings")."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = _conv3x3(in_planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = _conv3x3(planes, planes)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = _conv1x1(in_planes, planes, stride) if stride != 1 or in_planes != planes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.relu(self.bn2(self.conv1(out)))
        return shortcut + self.conv2(out)


class WideResNet(nn.Module):
    """Wide ResNet of depth 6 n + 4, pre-activation, no dropout (Zagoruyko & Komodakis, 2016)."""

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth, fixed=4)
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = _conv3x3(3, 16)
        self.block1 = _stage(PreActBlock, 16, widths[0], blocks, stride=1)
        self.block2 = _stage(PreActBlock, widths[0], widths[1], blocks, stride=2)
        self.block3 = _stage(PreActBlock, widths[1], widths[2], blocks, stride=2)
        self.bn = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.block1(x)
        x = self.block2(x)
        x = self.block3(x)
        x = self.bn(x).relu()
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x)


def _conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)


def _conv1x1(in_planes: int, planes: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False)


def _stage(
    block: Callable[[int, int, int], nn.Module], in_planes: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    """`blocks` blocks; the first one changes width and resolution."""
    rest = [block(planes, planes, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_planes, planes, stride), *rest)


def _blocks_per_stage(depth: int, fixed: int) -> int:
    """n of depth = 6 n + fixed: three stages of n blocks of two convolutions."""
    if depth <= fixed or (depth - fixed) % 6:
        raise ValueError(f"depth must be 6 n + {fixed} with n >= 1, got {depth}")
    return (depth - fixed) // 6


def _he_init(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out), biases 0 (He et al., 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def lenet_300_100() -> LeNet300100:
    """LeNet-300-100 for 28 x 28 images, which the caller must flatten."""
    return LeNet300100()


def vgg16(num_classes: int = 10) -> VGG:
    """VGG-16 for 32 x 32 images, 14.7 million parameters."""
    return VGG(num_classes)


def resnet(depth: int, num_classes: int = 10) -> ResNet:
    """CIFAR ResNet of the given depth. Raises ValueError unless the depth is 6 n + 2."""
    return ResNet(depth, num_classes)


def resnet20(num_classes: int = 10) -> ResNet:
    """CIFAR ResNet-20, 0.27 million parameters."""
    return resnet(20, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    """CIFAR ResNet-32, 0.47 million parameters."""
    return resnet(32, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    """CIFAR ResNet-56, 0.86 million parameters."""
    return resnet(56, num_classes)


def resnet110(num_classes: int = 10) -> ResNet:
    """CIFAR ResNet-110, 1.7 million parameters."""
    return resnet(110, num_classes)


def wrn_40_4(num_classes: int = 10) -> WideResNet:
    """Wide ResNet of depth 40 and widen factor 4, 8.9 million parameters."""
    return WideResNet(40, 4, num_classes)


MODELS: dict[str, Callable[[], nn.Module]] = {
    builder.__name__: builder for builder in (lenet_300_100, vgg16, resnet20, resnet32, resnet56, resnet110, wrn_40_4)
}


def example_input(name: str) -> Tensor:
    """A batch of two random inputs for `MODELS[name]`: (2, 784) or (2, 3, 32, 32), the same at every call."""
    shape = (784,) if name == "lenet_300_100" else (3, 32, 32)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata() or {}


def load_checkpoint(path: str | Path, model: nn.Module) -> dict[str, str]:
    """Load a safetensors file into `model`, strictly, and return the metadata of the file.

    Raises ValueError, with the keys that are missing, unexpected or have a different shape; `model` is then unchanged.
    """
    state, metadata = read_safetensors(path)
    own = model.state_dict()
    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "with a different shape": {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape},
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {', '.join(sorted(keys))}" for fault, keys in faults.items() if keys)
        raise ValueError(f"{path} does not fit {type(model).__name__}: {listed}")
    model.load_state_dict(state)
    return metadata
