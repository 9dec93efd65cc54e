"""ANNs that convert exactly although they attend, or group their convolutions: Q-K token attention, ConvNeXt blocks."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from qsnn.graph.modules import Gate

HEAD = 16
"""Channels of an attention head."""
GROUPS = 32
"""Groups of a residual block's 3x3 convolutions."""


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias, its image padded to keep its size at stride 1, and a batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class TokenAttention(nn.Module):
    r"""Q-K token attention with a shortcut: each head decides for every token whether its keys pass. There is no V.

    .. math::
        q = \mathrm{ReLU}(\mathrm{BN}(W_q x)), \quad k = \mathrm{ReLU}(\mathrm{BN}(W_k x)), \quad
        a_{h,n} = \Big[\sum_{c \in h} q_{c,n} \ge \lambda\Big], \quad
        y = \mathrm{ReLU}(x + \mathrm{BN}(W_p\,(a \odot k)))

    with 1x1 convolutions W, and one learned level λ (:class:`qsnn.Gate`). Its cost grows with the number of tokens,
    not with its square; without a softmax and without a product of two real values its spiking form is exact.

    Args:
        channels: C, a multiple of the channels of a head.
    Shape:
        x and y: (B, C, H, W); a: (B, C / 16, 1, H, W).
    Source:
        Zhou et al., "QKFormer: Hierarchical Spiking Transformer using Q-K Attention", NeurIPS 2024 (there of spikes).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Sequential(*conv_norm(channels, channels, 1), nn.ReLU())
        self.key = nn.Sequential(*conv_norm(channels, channels, 1), nn.ReLU())
        # a rectified standard normal has the mean 0.4: at first about half of the tokens pass
        self.gate = Gate(level=0.4 * HEAD, width=0.5 * HEAD)
        self.projection = nn.Sequential(*conv_norm(channels, channels, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        opened = self.gate(self.query(x).unflatten(1, (-1, HEAD)).sum(2, keepdim=True))
        passed = opened * self.key(x).unflatten(1, (-1, HEAD))
        y: Tensor = self.relu(x + self.projection(passed.flatten(1, 2)))
        return y


class Residual(nn.Module):
    """ReLU(x + body(x)).

    Args:
        body: ends in a current, without an activation.
    Shape:
        x and returned: (B, C, H, W).
    """

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y: Tensor = self.relu(x + self.body(x))
        return y


class QKFormer(nn.Sequential):
    """Patch embedding by 3x3 convolutions, then blocks of Q-K token attention and a two-layer MLP.

    Args:
        in_channels: C of the images.
        num_classes: K.
        widths: channels of each stage; the first is the stem alone, each later one halves the sides and holds a block.
        hidden: channels inside the MLPs.
    Shape:
        images: (B, C, H, W); logits: (B, K).
    Source:
        Zhou et al., "QKFormer ...", NeurIPS 2024.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: list[int], hidden: int) -> None:
        layers: list[nn.Module] = [*conv_norm(in_channels, widths[0]), nn.ReLU()]
        for index, (before, width) in enumerate(pairwise(widths)):
            # the attention behind a grouped embedding mixes all channels; ungrouped it would hold half of all weights
            layers += [*conv_norm(before, width, stride=2, groups=4 if index else 1), nn.ReLU(), TokenAttention(width)]
            layers.append(Residual(*conv_norm(width, hidden, 1), nn.ReLU(), *conv_norm(hidden, width, 1)))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


class ConvNext(nn.Sequential):
    """Residual blocks of 3x3 convolutions in groups, with batch norm and ReLU.

    Args:
        in_channels: C of the images.
        num_classes: K.
        widths: channels of each stage, multiples of ``groups``; every stage but the first halves the sides.
        blocks: residual blocks a stage.
        groups: of the blocks' 3x3 convolutions; stem and downsampling have one.
        expand: True: 3x3 in groups, then 1x1 to twice the channels and back. False: 3x3 in groups to twice the channels
            and back, which mixes channels of one group alone.
    Shape:
        images: (B, C, H, W); logits: (B, K).
    Raises:
        ValueError: the groups do not divide the channels.
    Source:
        Liu et al., "A ConvNet for the 2020s", CVPR 2022 (spatial, then wide); Xie et al., "Aggregated Residual
        Transformations ...", CVPR 2017 (32 groups).
    """

    def __init__(
        self, in_channels: int, num_classes: int, widths: list[int], blocks: int, groups: int, expand: bool
    ) -> None:
        if groups < 1 or any(width % groups for width in widths):
            raise ValueError(f"expected groups that divide the channels {widths}, got {groups}")
        layers: list[nn.Module] = []
        before = in_channels
        for index, width in enumerate(widths):
            layers += [*conv_norm(before, width, stride=2 if index else 1), nn.ReLU()]
            for _ in range(blocks):
                inside = (1, 1) if expand else (3, groups)
                body = [*conv_norm(width, width, groups=groups), nn.ReLU()] if expand else []
                body += [*conv_norm(width, 2 * width, inside[0], groups=inside[1]), nn.ReLU()]
                body += conv_norm(2 * width, width, inside[0], groups=inside[1])
                layers.append(Residual(*body))
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))


def qkformer(shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the network for images (C, H, W): 32-64-128 channels, or 16-32 for images of at most 12 pixels."""
    widths, hidden = ([16, 32], 64) if shape[-1] <= 12 else ([32, 64, 128], 128)
    return QKFormer(shape[0], num_classes, widths, hidden)


def convnext(
    shape: tuple[int, ...], num_classes: int, groups: int = GROUPS, expand: bool = True, blocks: int = 1
) -> nn.Module:
    """Return the network for images (C, H, W): 32-64-128 channels, or 32-64 for images of at most 12 pixels."""
    return ConvNext(shape[0], num_classes, [32, 64] if shape[-1] <= 12 else [32, 64, 128], blocks, groups, expand)
