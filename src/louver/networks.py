"""Louver's own networks: the CIFAR ResNets and the small network of the demo.

Both take images that are already normalised; `louver.models.load_model` puts the normalisation in front of them.
Every activation is a module of its own, so that a cut can be named after it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CifarResNet", "StreetNet"]


class Shortcut(nn.Module):
    """The parameter-free skip of option A: every second pixel, new channels filled with zeros on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        self.stride = stride
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """The input of the block in the size of its output."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a skip around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        is_same_size = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if is_same_size else Shortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """Features of the next depth."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(inner + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """ResNet for 32×32 images, 6k + 2 layers deep; its cuts read conv1, bn1, relu, layer1, layer2, layer3.

    Source: He et al. 2016, "Deep Residual Learning", section 4.2, option A. Module names are those of the published
    weights, so that they load without a table.
    """

    def __init__(self, depth: int, n_classes: int = 10, in_channels: int = 3) -> None:
        assert (depth - 2) % 6 == 0, depth
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _layer(16, 16, blocks, stride=1)
        self.layer2 = _layer(16, 32, blocks, stride=2)
        self.layer3 = _layer(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, n_classes)
        _initialize(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Scores of the classes, before the softmax."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(self.flatten(self.pool(x)))
        return scores


class StreetNet(nn.Module):
    """The demo's classifier for 64×64 images: 13.4 million multiply-accumulates in four stages, each halving the side.

    Plain on purpose: every stage is a legal cut, so the report can show how leakage falls with depth.
    """

    def __init__(self, n_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.stage1 = _stage(in_channels, 16)
        self.stage2 = _stage(16, 32)
        self.stage3 = _stage(32, 64)
        self.stage4 = _stage(64, 128)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(128, n_classes)
        _initialize(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Scores of the classes, before the softmax."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        scores: Tensor = self.head(self.flatten(self.pool(x)))
        return scores


def _layer(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
