"""The layers of a folded network: integer sums of integers, and what stays real."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsnn.folded.firing import total
from qsnn.folded.prepared import Prepared
from qsnn.graph.call import this_call
from qsnn.quant.activations import round_half_up

EXACT_FLOAT32 = 2**23
"""Sums of integers below this are exact in float32, whatever the order of the additions, and can be rounded."""
EXACT_FLOAT64 = 2**52
"""Likewise in float64; integers of more bits are refused."""


class IntegerInput(Prepared):
    """The input quantizer: real pixels (B, *) -> integers in float32, divided and rounded in float64."""

    step: Tensor

    def __init__(self, step: Tensor, levels: int) -> None:
        super().__init__()
        self.register_buffer("step", step.detach().clone())
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        """Return clip(round_half_up(x / s), -L, L)."""
        step, short = self.kept("step", self._ready)
        q = x.double() / step
        # a quotient of two float32 is a half or at least 2**-26 away from one: adding 1/2 cannot round to a tie
        n = q.add_(0.5).floor_() if short and x.dtype == torch.float32 else round_half_up(q)
        return n.clamp_(-self.levels, self.levels).float()

    def _ready(self) -> tuple[Tensor, bool]:
        step = self.step.double()
        return step, self.levels < 2**15 and bool((step == step.float()).all())


def layer_options(layer: nn.Module) -> dict[str, Any]:
    """What :func:`weighted_sum` needs to do as ``layer`` does: nothing for a linear layer."""
    if isinstance(layer, nn.Linear):
        return {}
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
    names = ("stride", "padding", "dilation", "groups", *(("output_padding",) if transposed else ()))
    return {name: getattr(layer, name) for name in names}


def weighted_sum(x: Tensor, weight: Tensor, options: dict[str, Any], bias: Tensor | None = None) -> Tensor:
    """The sums of a linear layer, of a convolution, or (with output_padding) of a transposed one: (B, *) -> (B, *)."""
    if not options:
        return F.linear(x, weight, bias)
    if "output_padding" in options:
        return (F.conv_transpose1d if weight.dim() == 3 else F.conv_transpose2d)(x, weight, bias, **options)
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, weight, bias, **options)


def exact_dtype(most: float) -> torch.dtype:
    """The float type that holds all integers up to ``most``.

    Raises:
        ValueError: none does.
    """
    if most >= EXACT_FLOAT64:
        raise ValueError(
            f"integers up to {most:.3g} behind a product of counts do not fit into the 53 bits of float64; take fewer "
            f"time steps, or quantize what is multiplied again before it goes on"
        )
    return torch.float32 if most < EXACT_FLOAT32 else torch.float64


class IntegerLayer(Prepared):
    """A convolution or linear layer with integer weights W: integers in, their exact weighted sums out.

    It runs in float32, rounded to the nearest integer, while bound · T^(steps + 1) < 2**23, else in float64.

    Args:
        weight: int8, or float16 for IEEE-half weights, which count in units of 2**-24.
        layer: where kernel size, stride, padding, dilation and groups are read.
        input_bound: largest absolute input; times T^``steps``.
        weight_bits: precision of W [bit].
        steps: how many sums over time the input is a product of; 0 for spikes.
    Shape:
        input and output: (T·B, *), integers in float32 or float64.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, layer: nn.Module, input_bound: float, weight_bits: int, steps: int = 0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight_bits = weight_bits
        self.input_bound, self.steps = input_bound, steps
        self.options = layer_options(layer)
        self.whole = False
        """Whether deferred it sums its input over T first: see :func:`~qsnn.folded.whole.in_one_`."""

    @property
    def integers(self) -> Tensor:
        """W as integers in float64."""
        return self.weight.double() * (2.0**24 if self.weight.dtype == torch.float16 else 1.0)

    @property
    def bound(self) -> float:
        """max_c Σ|W_c| · (largest input); times T^``steps``."""
        sizes = self.integers.abs()
        if "output_padding" in self.options:  # (C_in, C_out / groups, *)
            sizes = sizes.unflatten(0, (self.options["groups"], -1)).transpose(1, 2).flatten(0, 1)
        return float(sizes.flatten(1).sum(1).max()) * self.input_bound

    def ready(self, timesteps: int) -> Tensor:
        """W in the dtype in which the sums of T steps are exact; kept until W changes.

        Raises:
            ValueError: behind a product of counts, sums that no dtype holds exactly.
        """
        return self.kept(timesteps, lambda: self._in_dtype(timesteps))  # type: ignore[no-any-return]

    def _in_dtype(self, timesteps: int) -> Tensor:
        most = self.bound * timesteps ** (self.steps + 1)
        if self.steps:
            exact_dtype(most)
        if self.weight.dtype == torch.float16 or most >= EXACT_FLOAT32:
            return self.kept(torch.float64, lambda: self.integers)  # type: ignore[no-any-return]
        return self.kept(torch.float32, lambda: fast_layout(self.integers.float()))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Integer sums in float32 or float64; of a ``whole`` layer deferred (T·B, *) -> (B, *), as W Σx is ΣW x."""
        call = this_call()
        weight = self.ready(call.timesteps)
        x = x.to(weight.dtype)
        if self.whole and call.firing == "deferred":
            x = total(x, call.timesteps)
        return weighted_sum(x, weight, self.options).round_()


def fast_layout(weight: Tensor) -> Tensor:
    """The weights in the layout in which convolutions of images are faster, and hand it on to all behind them.

    Shape:
        weight and returned: any; of four dimensions channels-last, others as they are.
    """
    if weight.dim() != 4:
        return weight
    _, inputs, height, width = weight.shape
    # of a single input channel both layouts are "contiguous": by its strides alone it names the one that is meant
    strides = (inputs * height * width, 1, width * inputs, inputs)
    return torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device).copy_(weight)


class FloatLayer(nn.Module):
    """A layer in float64: its input is a current (a linear bottleneck, a float input), or its weights are float.

    Args:
        weight: what a unit of the input adds.
        layer: where stride, padding, dilation and groups are read.
        weight_bits: precision of the weights [bit].
        spikes: whether the input are spikes, or sums of them, so that it accumulates instead of multiplying.
        by_channel: whether dimension 0 of the weight and dimension 1 of the output are the same channels.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, layer: nn.Module, weight_bits: int, *, spikes: bool = False, by_channel: bool = True
    ) -> None:
        super().__init__()
        self.spikes, self.by_channel = spikes, by_channel
        self.register_buffer("weight", weight.double())
        self.weight_bits = weight_bits
        self.options = layer_options(layer)
        self.register_buffer("bias", None)

    def absorb_(self, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        """Let the layer give scale·(what it gave) + shift by output channel, each (C,), in ``dtype``, in place.

        Shape:
            scale and shift: (C,), or (1,) for all channels.
        """
        bias = 0.0 if self.bias is None else self.bias.double()
        weight = self.weight.double() * scale.view(-1, *[1] * (self.weight.dim() - 1))
        self.weight, self.bias = weight.to(dtype), (bias * scale + shift).expand(len(weight)).to(dtype)
        if dtype == torch.float32:
            self.weight = fast_layout(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(T·B, *) -> weighted sums (T·B, *), in the dtype of the weights."""
        return weighted_sum(x.to(self.weight.dtype), self.weight, self.options, self.bias)


class SumPool(nn.Module):
    """Average pooling without the division: sums of integers stay integers."""

    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """(T·B, C, *) -> window sums (T·B, C, *)."""
        if len(self.kernel) == 2:
            return F.avg_pool2d(x, self.kernel, self.stride, self.padding, divisor_override=1)
        if len(self.kernel) == 3:
            return F.avg_pool3d(x, self.kernel, self.stride, self.padding, divisor_override=1)
        return F.avg_pool1d(x, self.kernel, self.stride, self.padding).mul_(self.kernel[0]).round_()


class CountPool(nn.Module):
    """Average pooling with windows of several sizes, times their least common multiple: integers stay integers.

    Args:
        pool: the average pool.
        multiple: of the windows' sizes.
    """

    def __init__(self, pool: nn.Module, multiple: int) -> None:
        super().__init__()
        self.pool, self.multiple = pool, multiple

    def forward(self, x: Tensor) -> Tensor:
        """(T·B, C, *) -> (T·B, C, *), integers in float64."""
        means: Tensor = self.pool(x.double())
        return means.mul_(self.multiple).round_()
