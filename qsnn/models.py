"""create_model(): the float networks that the main job trains, and models of the user's own by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qsnn.data import Data
from qsnn.graph import data_recipe, recipe_of, set_recipe
from qsnn.loop import TimeLoop
from qsnn.spiking import SPIKING, build_spiking

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


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg-small": _vgg_small,
    "study": _study,
    "resnet-small": _resnet_small,
    "resnet18": _resnet18,
    "resnet20": _cifar_resnet(20),
    "resnet32": _cifar_resnet(32),
    "resnet44": _cifar_resnet(44),
    "resnet56": _cifar_resnet(56),
    "vgg16": _vgg16,
}


def create_model(name: str, data: Data | None = None, *, seed: int = 0, **options: Any) -> nn.Module:
    """Return a float network with fresh weights, plain ``nn.ReLU`` activations and one output a class.

    Args:
        name: "vgg-small" (0.03 to 0.2 M parameters by image size), "study" (16-16-32-32-64 channels), "resnet-small",
            "resnet18" and "vgg16" (with a stem of 3x3 and one linear layer, for small images), "resnet20", "resnet32",
            "resnet44" and "resnet56" (16-32-64 channels, 0.27 to 0.85 M parameters); a spiking network from scratch
            (:func:`qsnn.spiking.build_spiking`): "spiking-resnet", "sew-resnet", "ms-resnet", "qkformer",
            "spiking-convnext"; or a function of your own as ``package.module:function``; it is called with
            ``num_classes=K`` where it takes that, and may return any model that torch.fx can follow.
        data: where the image shape and the number of classes come from. Our own models need it.
        seed: of the weights; the global random state is left as it was.
        options: passed on to the function, e.g. ``pooling="max"``.
    Raises:
        ValueError: an unknown name (the message lists the known ones), or a function that cannot be found.
    """
    shape = None if data is None else tuple(data.shape)
    model = build_model(name, shape, None if data is None else data.num_classes, seed=seed, **options)
    set_recipe(model, {**recipe_of(model), "data": data_recipe(data)})
    return model


def build_model(
    name: str, shape: tuple[int, ...] | None, num_classes: int | None, *, seed: int = 0, **options: Any
) -> nn.Module:
    """Like :func:`create_model`, from an image shape (C, H, W) and a number of classes; ``load`` calls it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if ":" in name:
            model = _call_named(name, num_classes, options)
        elif name in MODELS:
            if shape is None or num_classes is None:
                raise ValueError(f"create_model({name!r}) needs data: create_model({name!r}, load_data('digits'))")
            model = MODELS[name](shape, num_classes, **options)
        elif name in SPIKING:
            if shape is None or num_classes is None:
                raise ValueError(f"create_model({name!r}) needs data: create_model({name!r}, load_data('digits'))")
            model = build_spiking(name, shape, num_classes, **options)
        else:
            raise ValueError(
                f"unknown model {name!r}; known: {', '.join((*MODELS, *SPIKING))}, or your own as "
                f"package.module:function"
            )
    recipe = {
        "kind": "teacher",
        "model": {"name": name, "options": options},
        "input_shape": None if shape is None else list(shape),
        "num_classes": num_classes,
    }
    if isinstance(model, TimeLoop):
        recipe["spiking"] = True
    set_recipe(model, recipe)
    return model


def _call_named(name: str, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"cannot find {name!r} ({error}); expected package.module:function on Python's path"
        ) from error
    try:
        model = function(**options) if num_classes is None else function(num_classes=num_classes, **options)
    except TypeError:
        model = function(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model
