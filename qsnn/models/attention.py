"""ANNs that convert exactly although they attend, or group their convolutions: attention forms, ConvNeXt blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from qsnn.graph.modules import Gate

HEAD = 16
"""Channels of an attention head."""
FORMS = {"self": ("key",), "token": ("query", "key"), "channel": ("query", "key"), "relu": ("query", "key", "value")}
"""The forms of attention, each with its matrices."""
GROUPS = 32
"""Groups of a residual block's 3x3 convolutions."""
EMBEDDED = 8
"""Groups of the second 3x3 convolution of a patch embedding."""


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias, its image padded to keep its size at stride 1, and a batch norm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Attention(nn.Module):
    r"""Attention without a softmax, with a shortcut: :math:`y = \mathrm{ReLU}(x + \mathrm{BN}(W_p\,z))`.

    Of :math:`q, k, v = \mathrm{ReLU}(\mathrm{BN}(W_{q,k,v}\,x))`, with 1x1 convolutions W, by the number of matrices:

    * "self", one: :math:`z = [\sum_{c \in h} k_{c,n} \ge \lambda]\, k`, each head decides by its own keys which
      tokens pass;
    * "token", two: :math:`z = [\sum_{c \in h} q_{c,n} \ge \lambda]\, k`, each head decides for every token;
    * "channel", two: :math:`z = [\frac1N \sum_n q_{c,n} \ge \lambda]\, k`, each channel for all N tokens;
    * "relu", three: :math:`z_{c,n} = \frac1N \sum_{d \in h} q_{d,n} \sum_m k_{d,m} v_{c,m}`, linear attention.

    λ is one learned level (:class:`qsnn.Gate`). The cost grows with the number of tokens, not with its square. The
    gates have an exact spiking form at every step; "relu" multiplies counts, and fires deferred alone.

    Args:
        channels: C, a multiple of 16, the channels of a head.
        form: "self", "token", "channel" or "relu".
    Shape:
        x and y: (B, C, H, W); the gates: (B, C / 16, 1, H, W), or (B, C, 1, 1) of "channel".
    Raises:
        ValueError: an unknown form, or channels that heads do not divide.
    Source:
        Zhou et al., "QKFormer: Hierarchical Spiking Transformer using Q-K Attention", NeurIPS 2024 ("token" and
        "channel", there of spikes); Katharopoulos et al., ICML 2020 ("relu").
    """

    def __init__(self, channels: int, form: str = "token") -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"expected attention to be one of {', '.join(FORMS)}, got {form!r}")
        if channels % HEAD:
            raise ValueError(f"expected channels that heads of {HEAD} divide, got {channels}")
        self.form = form
        for name in FORMS[form]:
            self.add_module(name, nn.Sequential(*conv_norm(channels, channels, 1), nn.ReLU()))
        if form != "relu":
            # a rectified standard normal has the mean 0.4: at first about half of the tokens pass
            several = 1 if form == "channel" else HEAD
            self.gate = Gate(level=0.4 * several, width=0.5 * several)
        self.projection = nn.Sequential(*conv_norm(channels, channels, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        values = [self.get_submodule(name)(x) for name in FORMS[self.form]]
        y: Tensor = self.relu(x + self.projection(self._attended(*values)))
        return y

    def _attended(self, *values: Tensor) -> Tensor:
        if self.form == "channel":
            query, key = values
            return self.gate(query.mean((2, 3), keepdim=True)) * key
        if self.form == "relu":
            query, key, value = (each.flatten(2).unflatten(1, (-1, HEAD)) for each in values)
            found: Tensor = value @ key.mT @ query / query.shape[-1]
            return found.flatten(1, 2).unflatten(2, values[0].shape[2:])
        decides, key = (each.unflatten(1, (-1, HEAD)) for each in (values[0], values[-1]))
        passed: Tensor = self.gate(decides.sum(2, keepdim=True)) * key
        return passed.flatten(1, 2)


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
    """Patch embedding by 3x3 convolutions, one that halves the sides and one in groups, attention, a two-layer MLP.

    Args:
        in_channels: C of the images.
        num_classes: K.
        widths: channels of each stage; the first is the stem alone, each later one halves the sides and holds a block.
        hidden: channels inside the MLPs.
        attention: its form.
    Shape:
        images: (B, C, H, W); logits: (B, K).
    Source:
        Zhou et al., "QKFormer ...", NeurIPS 2024.
    """

    def __init__(
        self, in_channels: int, num_classes: int, widths: list[int], hidden: int, attention: str = "token"
    ) -> None:
        layers: list[nn.Module] = [*conv_norm(in_channels, widths[0]), nn.ReLU()]
        for index, (before, width) in enumerate(pairwise(widths)):
            # the attention behind a grouped embedding mixes all channels; ungrouped it would hold half of all weights
            layers += [*conv_norm(before, width, stride=2, groups=4 if index else 1), nn.ReLU()]
            layers += [*conv_norm(width, width, groups=EMBEDDED), nn.ReLU()]
            layers.append(Attention(width, attention))
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


def qkformer(
    shape: tuple[int, ...],
    num_classes: int,
    attention: str = "token",
    widths: Sequence[int] | None = None,
    hidden: int = 64,
) -> nn.Module:
    """Return the network for images (C, H, W): 32-64-128 channels, or 16-32 for images of at most 12 pixels."""
    chosen = list(widths or ([16, 32] if shape[-1] <= 12 else [32, 64, 128]))
    return QKFormer(shape[0], num_classes, chosen, hidden, attention)


def convnext(
    shape: tuple[int, ...], num_classes: int, groups: int = GROUPS, expand: bool = True, blocks: int = 1
) -> nn.Module:
    """Return the network for images (C, H, W): 32-64-128 channels, or 32-64 for images of at most 12 pixels."""
    return ConvNext(shape[0], num_classes, [32, 64] if shape[-1] <= 12 else [32, 64, 128], blocks, groups, expand)
