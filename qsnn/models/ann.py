"""create_model(): the float networks that the main job trains, and models of the user's own by name."""

from __future__ import annotations

import torch
from torch import nn

_AVERAGE, _MAX = "avg", "max"


class VggSmall(nn.Sequential):
    """Convolutions 3x3 with batch norm and ReLU, a pooling step after each stage, one linear layer.

    Args:
        in_channels: C of the images.
        num_classes: K.
        stages: for each stage the output channels of its convolutions; a 2x2 pooling follows each stage but the last,
            which is averaged over its whole map.
        pooling: "avg" or "max".
    Shape:
        images: (B, C, H, W); logits: (B, K).
    """

    def __init__(self, in_channels: int, num_classes: int, stages: list[list[int]], pooling: str = _AVERAGE) -> None:
        if pooling not in (_AVERAGE, _MAX):
            raise ValueError(f"pooling must be 'avg' or 'max', got {pooling!r}")
        layers: list[nn.Module] = []
        channels = in_channels
        for index, stage in enumerate(stages):
            if index:
                layers.append(nn.AvgPool2d(2) if pooling == _AVERAGE else nn.MaxPool2d(2))
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNetSmall(nn.Sequential):
    """A stem and one or more residual blocks a stage, for images of 8 to 64 pixels.

    Shape:
        images: (B, C, H, W); logits: (B, K).
    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: list[int], blocks: int = 1) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        ]  # fmt: skip
        channels = widths[0]
        for index, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_ResidualBlock(channels, width, 2 if index and not block else 1))
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def _vgg_small(shape: tuple[int, ...], num_classes: int, pooling: str = _AVERAGE) -> nn.Module:
    side = shape[-1]
    stages = [[24, 24], [48, 48]] if side <= 12 else [[32], [48, 48], [96, 96]]
    return VggSmall(shape[0], num_classes, stages, pooling)


def _study(shape: tuple[int, ...], num_classes: int, pooling: str = _AVERAGE) -> nn.Module:
    return VggSmall(shape[0], num_classes, [[16, 16], [32, 32], [64]], pooling)


def _resnet_small(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return ResNetSmall(shape[0], num_classes, [16, 32, 64] if shape[-1] > 12 else [16, 32])


def _resnet18(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return ResNetSmall(shape[0], num_classes, [64, 128, 256, 512], blocks=2)


def _vgg16(shape: tuple[int, ...], num_classes: int, pooling: str = _AVERAGE) -> nn.Module:
    stages = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]
    return VggSmall(shape[0], num_classes, stages, pooling)








