"""create_model(): the float networks that the main job trains, and models of the user's own by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from qsnn.options import seen

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
            raise ValueError(f"pooling must be 'avg' or 'max', got {seen(pooling)}")
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


class _CifarBlock(nn.Module):
    """Two 3x3 convolutions; where the map shrinks, the shortcut drops every second pixel and pads channels of zeros."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.stride, self.missing = stride, channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.missing:
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half))
        return self.relu2(y + x)


class CifarResNet(nn.Module):
    """The residual network for CIFAR, 6n + 2 layers of 16, 32 and 64 channels, shortcuts without parameters.

    Parameters are named as in the public checkpoints: conv1, bn1, layer1.0.conv1, ..., layer3.2.bn2, linear.

    Args:
        in_channels: C of the images.
        num_classes: K.
        depth: 20, 32, 44, 56, ...: 6n + 2.
    Shape:
        images: (B, C, H, W); logits: (B, K).
    Raises:
        ValueError: another depth.
    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 (shortcut A).
    """

    def __init__(self, in_channels: int, num_classes: int, depth: int = 20) -> None:
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (20, 32, 44, 56), got {depth}")
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = _CifarBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(_CifarBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        logits: torch.Tensor = self.linear(self.flatten(self.pool(x)))
        return logits


class UNet(nn.Module):
    """Two levels down by max pooling, two up by nearest upsampling, skips by concatenation: K answers a pixel.

    Args:
        in_channels: C of the images.
        num_classes: K.
        width: channels of the first level; each level down has twice as many.
    Shape:
        images: (B, C, H, W), H and W multiples of 4; answers: (B, K, H, W).
    Source:
        Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = self._level(in_channels, width), self._level(width, 2 * width)
        self.bottom = self._level(2 * width, 4 * width)
        self.up2, self.up1 = self._level(6 * width, 2 * width), self._level(3 * width, width)
        self.head = nn.Conv2d(width, num_classes, 1)

    @staticmethod
    def _level(in_channels: int, channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs in (in_channels, channels):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to answers."""
        high = self.down1(x)
        low = self.down2(F.max_pool2d(high, 2))
        x = self.bottom(F.max_pool2d(low, 2))
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), low], 1))
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), high], 1))
        answers: torch.Tensor = self.head(x)
        return answers


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


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
    def build(shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return CifarResNet(shape[0], num_classes, depth)

    return build


def _vgg16(shape: tuple[int, ...], num_classes: int, pooling: str = _AVERAGE) -> nn.Module:
    stages = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]
    return VggSmall(shape[0], num_classes, stages, pooling)


def _unet(shape: tuple[int, ...], num_classes: int, width: int = 16) -> nn.Module:
    if len(shape) != 3 or shape[1] % 4 or shape[2] % 4:
        raise ValueError(f"unet takes images whose sides are multiples of 4, got {shape}; scale them")
    return UNet(shape[0], num_classes, width)


def _mlp(shape: tuple[int, ...], num_classes: int, width: int = 128) -> nn.Module:
    features = math.prod(shape)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, num_classes),
    )  # fmt: skip
