"""Spiking networks from scratch, for small images: residual nets, Q-K attention, grouped 3x3 convolutions.

Blocks are SpikingJelly's wherever it has them; stems and widths are small, for 28x28 to 34x34 pixels. Each is a
:class:`~qsnn.snn.network.TimeLoop`, to be trained with :func:`qsnn.fit` or as the student of :func:`qsnn.distill`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model.qkformer import QKAttention
from spikingjelly.activation_based.model.sew_resnet import BasicBlock as SewBlock
from spikingjelly.activation_based.model.spiking_resnet import BasicBlock as SpikingBlock
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qsnn.options import seen
from qsnn.quant.activations import HalfQuant
from qsnn.quant.weights import IntegerQuant
from qsnn.snn.network import TimeLoop

CONNECTIONS = ("ADD", "AND", "IAND")
NEURONS = ("if", "lif", "plif")
WIDTHS = (16, 32, 64)


class XnorWeight(nn.Module):
    r"""1 bit: :math:`\mathrm{sign}(w)\,\mathrm{mean}|w_c|`, gradient straight through; see XNOR-Net, ECCV 2016."""

    def forward(self, w: Tensor) -> Tensor:
        """Weights (C, *) -> the same shape."""
        scale = w.detach().abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1))
        # in this order, for w - w is 0 exactly: the weights have two values to the last bit
        return torch.where(w >= 0, scale, -scale) + (w - w.detach())


class QuantizedWeight(nn.Module):
    """A Brevitas quantizer of weights as a parametrization of torch.

    Args:
        bits: 2 to 8, or 16 (fp16) [bit].
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.quant = HalfQuant() if bits == 16 else IntegerQuant(bits)

    def forward(self, w: Tensor) -> Tensor:
        """Weights (C, *) -> the same shape."""
        value: Tensor = self.quant(w)[0]
        return value


def quantize_weights_(model: nn.Module, bits: int) -> nn.Module:
    """Give every convolution and linear layer of a network weights of ``bits``, in place; return it.

    The first and the last layer take 8 bit, as everywhere here.

    Args:
        model: a network of SpikingJelly modules.
        bits: 1 (XNOR), 2 to 8, 16 (fp16) or 32 (float, nothing happens) [bit].
    Raises:
        ValueError: any other number.
    """
    if bits == 32:
        return model
    if bits not in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        raise ValueError(f"weight bits must be 1 to 8, 16 (fp16) or 32 (float), got {bits}")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    for place, module in enumerate(layers):
        own = max(bits, 8) if place in (0, len(layers) - 1) and bits < 16 else bits
        parametrize.register_parametrization(module, "weight", XnorWeight() if own == 1 else QuantizedWeight(own))
        module.weight_bits = own
    return model


def node(kind: str = "if") -> neuron.BaseNode:
    """Return a SpikingJelly node with soft reset, θ = 1: "if", "lif" (τ = 2) or "plif" (τ learned).

    Raises:
        ValueError: another kind.
    """
    options: dict[str, Any] = {"v_reset": None, "surrogate_function": surrogate.ATan(), "detach_reset": True}
    if kind == "if":
        return neuron.IFNode(**options)
    if kind == "lif":
        return neuron.LIFNode(tau=2.0, decay_input=False, **options)
    if kind == "plif":
        return neuron.ParametricLIFNode(init_tau=2.0, decay_input=False, **options)
    raise ValueError(f"expected a neuron of {', '.join(NEURONS)}, got {seen(kind)}")


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = layer.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, layer.BatchNorm2d(outputs))


class MembraneBlock(nn.Module):
    """Residual block whose shortcut carries the current, not spikes: x + conv(node(conv(node(x)))).

    Source: Hu et al., "Advancing Spiking Neural Networks Toward Deep Residual Learning" (MS-ResNet), TNNLS 2024.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, kind: str) -> None:
        super().__init__()
        self.body = nn.Sequential(node(kind), _conv(inputs, outputs, 3, stride), node(kind), _conv(outputs, outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(node(kind), _conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """Currents (T, B, C, H, W) -> currents."""
        current: Tensor = self.body(x) + self.shortcut(x)
        return current


class GroupedBlock(nn.Module):
    """ConvNeXt-like residual block, all 3x3 and grouped: one convolution, then a wide and a narrow one.

    Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022 (depthwise, then wide); Xie et al., "Aggregated Residual
    Transformations ...", CVPR 2017 (32 groups).
    """

    def __init__(self, channels: int, groups: int, kind: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            node(kind), _conv(channels, channels, groups=groups),
            node(kind), _conv(channels, 2 * channels, groups=groups),
            node(kind), _conv(2 * channels, channels, groups=groups),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Currents (T, B, C, H, W) -> currents."""
        current: Tensor = x + self.body(x)
        return current


class TokenBlock(nn.Module):
    """Q-K token attention and an MLP on spikes, each with a shortcut; there is no V.

    Source: Zhou et al., "QKFormer: Hierarchical Spiking Transformer using Q-K Attention", NeurIPS 2024.
    """

    def __init__(self, channels: int, heads: int, kind: str) -> None:
        super().__init__()
        self.attention = QKAttention(channels, heads, qka_type="token")
        wide = 2 * channels
        self.mlp = nn.Sequential(
            layer.Conv1d(channels, wide, 1), layer.BatchNorm1d(wide), node(kind),
            layer.Conv1d(wide, channels, 1), layer.BatchNorm1d(channels), node(kind),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Spikes (T, B, C, H, W) -> sums of spikes, same shape."""
        tokens = x.flatten(3)
        tokens = tokens + self.attention(tokens)
        tokens = tokens + self.mlp(tokens)
        return tokens.reshape(x.shape)


def _head(channels: int, classes: int) -> list[nn.Module]:
    return [layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(channels, classes)]


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    return None if stride == 1 and inputs == outputs else _conv(inputs, outputs, 1, stride)


def _spiking_resnet(inputs: int, classes: int, kind: str) -> nn.Sequential:
    parts, channels = [*_conv(inputs, WIDTHS[0]), node(kind)], WIDTHS[0]
    for index, width in enumerate(WIDTHS):
        stride = 2 if index else 1
        down = _downsample(channels, width, stride)
        parts.append(SpikingBlock(channels, width, stride, down, spiking_neuron=lambda **_: node(kind)))
        channels = width
    return nn.Sequential(*parts, *_head(channels, classes))


def _sew_resnet(inputs: int, classes: int, kind: str, connect: str = "ADD") -> nn.Sequential:
    if connect not in CONNECTIONS:
        raise ValueError(f"expected connect of {', '.join(CONNECTIONS)}, got {seen(connect)}")
    parts, channels = [*_conv(inputs, WIDTHS[0]), node(kind)], WIDTHS[0]
    for index, width in enumerate(WIDTHS):
        stride = 2 if index else 1
        down = _downsample(channels, width, stride)
        parts.append(SewBlock(channels, width, stride, down, cnf=connect, spiking_neuron=lambda **_: node(kind)))
        channels = width
    return nn.Sequential(*parts, *_head(channels, classes))


def _ms_resnet(inputs: int, classes: int, kind: str) -> nn.Sequential:
    parts, channels = [*_conv(inputs, WIDTHS[0])], WIDTHS[0]
    for index, width in enumerate(WIDTHS):
        parts.append(MembraneBlock(channels, width, 2 if index else 1, kind))
        channels = width
    return nn.Sequential(*parts, node(kind), *_head(channels, classes))


def _qkformer(inputs: int, classes: int, kind: str) -> nn.Sequential:
    first, last = WIDTHS[1:]
    return nn.Sequential(
        *_conv(inputs, first, stride=2), node(kind), TokenBlock(first, 4, kind),
        *_conv(first, last, stride=2), node(kind), TokenBlock(last, 4, kind), *_head(last, classes),
    )  # fmt: skip


def _convnext(inputs: int, classes: int, kind: str, groups: int = 32) -> nn.Sequential:
    first, last = WIDTHS[1:]
    return nn.Sequential(
        *_conv(inputs, first), GroupedBlock(first, groups, kind), node(kind),
        *_conv(first, last, stride=2, groups=groups), GroupedBlock(last, groups, kind), node(kind),
        *_conv(last, last, stride=2, groups=groups), GroupedBlock(last, groups, kind), node(kind),
        *_head(last, classes),
    )  # fmt: skip


SPIKING: dict[str, Callable[..., nn.Sequential]] = {
    "spiking-resnet": _spiking_resnet,
    "sew-resnet": _sew_resnet,
    "ms-resnet": _ms_resnet,
    "spiking-qkformer": _qkformer,
    "spiking-convnext": _convnext,
}


def build_spiking(
    name: str,
    shape: tuple[int, ...],
    num_classes: int,
    *,
    timesteps: int = 2,
    weight_bits: int = 32,
    neuron: str = "if",
    **options: Any,
) -> TimeLoop:
    """Return a spiking network with fresh weights; :func:`qsnn.create_model` calls it.

    Args:
        name: "spiking-resnet", "sew-resnet" (``connect``: "ADD", "AND" or "IAND"), "ms-resnet",
            "spiking-qkformer" or "spiking-convnext" (``groups``).
        shape: (C, H, W) of an image.
        num_classes: K.
        timesteps: T of a call that names none.
        weight_bits: of the weights [bit]; see :func:`quantize_weights_`.
        neuron: "if", "lif" or "plif".
        options: of the network.
    Raises:
        ValueError: an option that is not known.
    """
    try:
        network = SPIKING[name](shape[0], num_classes, neuron, **options)
    except TypeError:
        raise ValueError(f"{name} does not know one of the options {', '.join(options)}") from None
    functional.set_step_mode(network, "m")
    return TimeLoop(quantize_weights_(network, weight_bits), timesteps)
