"""The layers of a folded network: integer sums of integers, and what stays real."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsnn.quant.activations import round_half_up

EXACT_FLOAT32 = 2**23
"""Sums of integers below this are exact in float32, whatever the order of the additions, and can be rounded."""


class Timed(nn.Module):
    """A layer that the time loop tells T and the way of firing."""

    timesteps: int | None = None
    firing: str = "online"
    in_time = False

    @property
    def steps(self) -> int:
        """T of the running forward, 1 outside of one."""
        return self.timesteps or 1


class IntegerInput(nn.Module):
    """The input quantizer: real pixels (B, *) -> integers in float32, divided and rounded in float64."""

    step: Tensor

    def __init__(self, step: Tensor, levels: int) -> None:
        super().__init__()
        self.register_buffer("step", step.detach().clone())
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        """Return clip(round_half_up(x / s), -L, L)."""
        return round_half_up(x.double() / self.step.double()).clamp_(-self.levels, self.levels).float()


class IntegerLayer(Timed):
    """A convolution or linear layer with integer weights W: integers in, their exact weighted sums out.

    It runs in float32, rounded to the nearest integer, while bound · T < 2**23, else in float64.

    Args:
        weight: int8, or float16 for IEEE-half weights, which count in units of 2**-24.
        layer: where kernel size, stride, padding, dilation and groups are read.
        input_bound: largest absolute input.
        weight_bits: precision of W [bit].
    """

    weight: Tensor

    def __init__(self, weight: Tensor, layer: nn.Module, input_bound: float, weight_bits: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight_bits = weight_bits
        self.input_bound = input_bound
        self.options: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            self.options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def integers(self) -> Tensor:
        """W as integers in float64."""
        return self.weight.double() * (2.0**24 if self.weight.dtype == torch.float16 else 1.0)

    @property
    def bound(self) -> float:
        """max_c Σ|W_c| · (largest input)."""
        return float(self.integers.flatten(1).abs().sum(1).max()) * self.input_bound

    def forward(self, x: Tensor) -> Tensor:
        """Integer sums in float32 or float64."""
        exact32 = self.weight.dtype == torch.int8 and self.bound * self.steps < EXACT_FLOAT32
        dtype = torch.float32 if exact32 else torch.float64
        weight = self.integers.to(dtype)
        return _apply(x.to(dtype), weight, self.options).round_()


class FloatLayer(nn.Module):
    """A layer in float64: its input is a current (a linear bottleneck, a float input), or its weights are float.

    Args:
        weight: what a unit of the input adds.
        layer: where stride, padding, dilation and groups are read.
        weight_bits: precision of the weights [bit].
        spikes: whether the input are spikes, or sums of them, so that it accumulates instead of multiplying.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, layer: nn.Module, weight_bits: int, *, spikes: bool = False) -> None:
        super().__init__()
        self.spikes = spikes
        self.register_buffer("weight", weight.double())
        self.weight_bits = weight_bits
        self.options: dict[str, Any] = {}
        if not isinstance(layer, nn.Linear):
            self.options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}

        self.register_buffer("bias", None)

    def absorb_(self, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        """Let the layer give scale·(what it gave) + shift by output channel, in ``dtype``, in place."""
        bias = 0.0 if self.bias is None else self.bias.double()
        weight = self.weight.double() * scale.view(-1, *[1] * (self.weight.dim() - 1))
        self.weight, self.bias = weight.to(dtype), (bias * scale + shift).expand(len(weight)).to(dtype)
        if dtype == torch.float32 and weight.dim() == 4:
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)  # the faster layout of convolutions

    def forward(self, x: Tensor) -> Tensor:
        """Weighted sums, in the dtype of the weights."""
        return _apply(x.to(self.weight.dtype), self.weight, self.options, self.bias)


def _apply(x: Tensor, weight: Tensor, options: dict[str, Any], bias: Tensor | None = None) -> Tensor:
    if not options:
        return F.linear(x, weight, bias)
    return (F.conv1d if weight.dim() == 3 else F.conv2d)(x, weight, bias, **options)


class SumPool(nn.Module):
    """Average pooling without the division: sums of integers stay integers."""

    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """Window sums."""
        if len(self.kernel) == 2:
            return F.avg_pool2d(x, self.kernel, self.stride, self.padding, divisor_override=1)
        return F.avg_pool1d(x, self.kernel, self.stride, self.padding).mul_(self.kernel[0]).round_()
