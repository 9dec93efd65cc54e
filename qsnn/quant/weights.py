"""Weight quantizers: 1 bit in its two known forms, integers, IEEE half; and how their integers are read out."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from brevitas.core.function_wrapper import TensorClamp
from brevitas.core.quant import ClampedBinaryQuant
from brevitas.core.utils import StatelessBuffer
from brevitas.inject import ExtendedInjector
from brevitas.inject.enum import QuantType, ScalingImplType, ScalingPerOutputType
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjector
from brevitas.quant.solver import WeightQuantSolver
from torch import Tensor, nn

from qsnn.options import expect
from qsnn.quant.activations import HalfQuant

# Step of least mean-squared error for normally distributed numbers [standard deviations], 2**b - 1 levels around 0.
# Max (1960), table II, gives the same for odd numbers of levels; from 5 bit on max|w| loses nothing in training.
_NORMAL_STEP = {2: 1.22, 3: 0.65, 4: 0.354}


class _RoundedFunction(torch.autograd.Function):
    """Integers times a step, in a handful of operations; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, step: Tensor, top: int) -> Tensor:
        return torch.div(w, step).round_().clamp_(-top, top).mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class IntegerQuant(nn.Module):
    r"""Integers: :math:`s_c\,\mathrm{clip}(\mathrm{round}(w/s_c), -Q, Q)`, :math:`Q = 2^{b-1} - 1`, a step a channel.

    :math:`s_c = \max|w_c| / Q`; for 2, 3 and 4 bits the lesser of that and :math:`k_b\,\mathrm{rms}(w_c)`, which has
    the least mean-squared error for normally distributed weights (k = 1.22, 0.65, 0.354). The step follows the weights
    and is a constant to the gradient, which passes straight through, also where a weight is clipped.

    Args:
        bit_width: b, 2 to 8 [bit].
        channel_dim: where the output channels stand in w: 0, or 1 in a transposed convolution.
    Shape:
        w: (C_out, *); s: (C_out, 1, ...); with channel_dim = 1 w: (C_in, C_out, *) and s: (1, C_out, 1, ...).
    Source:
        Max, "Quantizing for Minimum Distortion", IRE Trans. 1960; Choi et al., "Accurate and Efficient 2-bit Quantized
        Neural Networks" (SAWB: steps from the weights' moments), MLSys 2019.
    """

    def __init__(self, bit_width: int, channel_dim: int = 0) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.top = 2 ** (bit_width - 1) - 1
        self.normal_step = _NORMAL_STEP.get(bit_width)
        self.zero = StatelessBuffer(torch.tensor(0.0))
        self.bits = StatelessBuffer(torch.tensor(float(bit_width)))

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the quantized weights, s, the zero point 0 and the bit width, as Brevitas expects."""
        with torch.no_grad():
            channels = w.detach().movedim(self.channel_dim, 0).flatten(1)
            step = torch.linalg.vector_norm(channels, math.inf, dim=1).div_(self.top)
            if self.normal_step is not None:
                rms = torch.linalg.vector_norm(channels, 2, dim=1).mul_(self.normal_step / math.sqrt(channels.shape[1]))
                step = torch.minimum(step, rms)
            step = step.clamp_(min=1e-10).view(*[1] * self.channel_dim, -1, *[1] * (w.dim() - 1 - self.channel_dim))
        return _RoundedFunction.apply(w, step, self.top), step, self.zero(), self.bits()


class IntegerWeightQuant(ExtendedInjector):
    r"""Brevitas injector of :class:`IntegerQuant`, :math:`s_c\,\mathrm{clip}(\mathrm{round}(w/s_c), -Q, Q)`.

    Give ``bit_width``.

    Source: Max 1960; Choi et al., MLSys 2019.
    """

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = IntegerQuant
    channel_dim = 0
    signed = True
    narrow_range = True


class HalfWeightQuant(ExtendedInjector):
    r"""Brevitas injector of :class:`HalfQuant` for weights, :math:`\mathrm{half}(w)`.

    Source: IEEE 754-2019 (binary16).
    """

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = HalfQuant
    signed = True
    narrow_range = False


class XnorWeightQuant(WeightQuantSolver):
    r"""1 bit: :math:`\mathrm{sign}(w)\cdot\alpha_c`, :math:`\alpha_c = \mathrm{mean}|w_c|` per output channel.

    Source: Rastegari et al., "XNOR-Net", ECCV 2016.
    """

    quant_type = QuantType.BINARY
    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = "ave"
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = "fp"
    scaling_min_val = 1e-10
    bit_width = 1
    narrow_range = True
    signed = True


class SignWeightQuant(WeightQuantSolver):
    r"""1 bit: :math:`0.1\,\mathrm{sign}(w)`, one constant scale; the gradient passes where |w| < 0.1.

    A batch norm behind the layer makes up for the constant. Source: Courbariaux et al., "BinaryConnect", NeurIPS 2015.
    """

    tensor_quant = ClampedBinaryQuant
    tensor_clamp_impl = TensorClamp
    scaling_impl_type = ScalingImplType.CONST
    scaling_const = 0.1
    restrict_scaling_type = "fp"
    scaling_per_output_type = ScalingPerOutputType.TENSOR
    float_to_int_impl_type = "round"
    bit_width = 1
    narrow_range = True
    signed = True


def weight_quantizer(bits: int, form: str = "xnor") -> dict[str, Any]:
    """Return the keyword arguments that give a Brevitas layer weights of ``bits`` [bit].

    1: :class:`XnorWeightQuant`, or :class:`SignWeightQuant` where ``form`` is "sign"; 2 to 8: integers, one scale per
    output channel, -(2**(b-1) - 1) to 2**(b-1) - 1;
    16: :class:`HalfQuant`; 32: float, no quantizer.

    Raises:
        ValueError: any other number.
    """
    if bits == 1:
        return {"weight_quant": SignWeightQuant if form == "sign" else XnorWeightQuant}
    if 2 <= bits <= 8:
        return {"weight_quant": IntegerWeightQuant, "weight_bit_width": bits}
    if bits == 16:
        return {"weight_quant": HalfWeightQuant}
    if bits == 32:
        return {"weight_quant": None}
    raise ValueError(f"weight bits must be 1 to 8, 16 (fp16) or 32 (float), got {bits}")


def weight_bits(layer: nn.Module) -> int:
    """Return the bits of a layer's weights: 1 to 8, 16 (fp16) or 32 (float)."""
    if hasattr(layer, "weight_bits"):
        return int(cast(int, layer.weight_bits))
    quant = getattr(layer, "weight_quant", None)
    if quant is None or not quant.is_quant_enabled:
        return 32
    return int(quant.tensor_quant(layer.weight)[3])


def integer_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Read the integers W and the scale s of a layer's weights; W·s is what the layer's forward uses, bit for bit.

    Args:
        layer: a Brevitas ``QuantConv`` or ``QuantLinear``, or a plain one (its float weights then come with scale 1).
    Shape:
        W: that of the weight; int8 for 1 to 8 bit, float64 multiples of 1 for fp16 (the values times 2**24), float
        weights unchanged. s: ``(C, 1, ...)`` or ``()``, in the weight's dtype.
    Raises:
        TypeError: no layer, or one without weights.
    """
    expect("integer_weights(layer)", "layer", layer, nn.Module)
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise TypeError(f"expected a layer with weights, got {type(layer).__name__}; call integer_weights(layer)")
    weight = cast(Tensor, layer.weight)
    quant = getattr(layer, "weight_quant", None)
    with torch.no_grad():
        if quant is None or not quant.is_quant_enabled:
            return weight.detach().clone(), torch.ones((), dtype=weight.dtype, device=weight.device)
        value, scale, _, bit_width = quant.tensor_quant(weight)[:4]
        if int(bit_width) == 16:
            return value.double() * 2.0**24, torch.full((), 2.0**-24, dtype=weight.dtype, device=weight.device)
        integers = torch.round(value / scale)
        return integers.to(torch.int8), scale.detach()
