"""Activation quantizers: how a real number becomes an integer times a step, and what its gradient is.

They are written as Brevitas injectors, so that Brevitas' own layers (``QuantConv2d``, ``QuantReLU``, ...) carry them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import RescalingIntQuant
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import ParameterScaling
from brevitas.core.utils import StatelessBuffer
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.inject import ExtendedInjector
from brevitas.proxy import ActQuantProxyFromInjector
from torch import Tensor, nn

from qsnn.graph.call import SHORT
from qsnn.quant.levels import LevelIntQuant, LevelScaling


def round_half_up(x: Tensor) -> Tensor:
    r"""Nearest integer, ties upwards: :math:`\lfloor x \rfloor + [x - \lfloor x \rfloor \ge \tfrac12]`.

    Unlike ``floor(x + 0.5)`` it is right for every float (0.49999997 + 0.5 is 1 in float32).

    Shape:
        x and returned: any, (*).

    >>> round_half_up(torch.tensor([-0.5, 0.5, 1.5, 0.49999997]))
    tensor([0., 1., 2., 0.])
    """
    below = x.floor()
    return below.add_((x - below >= 0.5).to(x.dtype))


class RoundHalfUp(nn.Module):
    """:func:`round_half_up` as a Brevitas quantizer's ``float_to_int_impl``; the gradient passes straight through."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """(*) -> (*), rounded."""
        return _StraightThrough.apply(x, round_half_up(x.detach()))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _LevelFunction(torch.autograd.Function):
    """Equation (Q) and its gradient in few passes over memory; autograd through Brevitas' chain of ops takes many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
        # under autocast: a sum over bfloat16 is slow on a CPU, and a level should not depend on a short quotient
        q = x.float() / step if x.dtype in SHORT else x / step
        y = _levels(q, low, high).mul_(step)
        ctx.save_for_backward(q, y, step)  # y costs nothing: the next layer keeps it anyway
        ctx.low, ctx.high = low, high
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        q, y, step = ctx.saved_tensors
        low, high, dtype = ctx.low, ctx.high, grad.dtype
        # a mean over the image hands back gradients in another layout than the activations have, and a residual sum
        # hands them on through the whole stage: every pass of every layer would mix the two, at half the speed
        grad = grad if grad.stride() == q.stride() and dtype == q.dtype else torch.empty_like(q).copy_(grad)
        # hardtanh's backward is one pass that keeps the gradient strictly inside an interval: as Esser et al. between
        # the outermost levels, 0 < x < θ, which lies symmetric around the points where an activation jumps
        edge = 0.5 * (low < 0)
        grad_x = torch.ops.aten.hardtanh_backward(grad, q, low - edge, high + edge)
        grad_step = None
        if ctx.needs_input_grad[1]:
            gain = 1.0 / math.sqrt(q.numel() / q.shape[0] * high)  # Esser et al. 2020, per sample
            total = dense_dot(grad, y) / step - dense_dot(grad_x, q)
            grad_step = total.mul_(gain).reshape(step.shape)
        return grad_x.to(dtype), grad_step, None, None


def _levels(q: Tensor, low: int, high: int) -> Tensor:
    """clip(round_half_up(q), low, high), faster where the sign is known."""
    if low < 0:
        return round_half_up(q).clamp_(low, high)
    # the float below 1/2 instead of 1/2: q + 1/2 would round up to 1 for the q just below 1/2. Right for all q > 0,
    # and what is below 0 is clipped.
    return q.add(math.nextafter(0.5, 0) if q.dtype == torch.float64 else 0.49999997).floor_().clamp_(0, high)


def dense_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a·b, both (*), as (); in one pass where both lie in memory alike (channels-last included)."""
    if a.stride() == b.stride() and (a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)):
        flat = (a.numel(),), (1,)
        return torch.dot(a.as_strided(*flat, a.storage_offset()), b.as_strided(*flat, b.storage_offset()))
    return (a * b).sum()


class LevelQuant(RescalingIntQuant):
    r"""Equation (Q): :math:`y = s\,\mathrm{clip}(\lfloor x/s + \tfrac12\rfloor, n_0, L)`, :math:`s = |\theta|/L`.

    θ is learned; n₀ is 0, or -L when signed. Gradients, with :math:`q = x/s` and N elements a sample:

    .. math::
        \frac{\partial y}{\partial x} = [\,n_0 < q < L\,], \qquad
        \frac{\partial y}{\partial s} = \frac{1}{\sqrt{N L}}\Big(\frac{y}{s} - q\,[\,n_0 < q < L\,]\Big)

    (signed: both bounds half a step further out). θ is NaN until :meth:`calibrate_` has set it.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020; Bu et al., "Optimal ANN-SNN Conversion ...",
    ICLR 2022 (the same function, seen from the IF neuron).
    """

    scaling_impl: Any

    def __init__(
        self,
        int_quant: nn.Module,
        scaling_impl: nn.Module,
        int_scaling_impl: nn.Module,
        zero_point_impl: nn.Module,
        bit_width_impl: nn.Module,
        levels: int,
    ) -> None:
        super().__init__(int_quant, scaling_impl, int_scaling_impl, zero_point_impl, bit_width_impl)
        self.levels = levels
        self.fused = True
        """False: run Brevitas' own chain of operations, which the certificate's reference does."""
        self.collecting = False
        """True: the next forward sets θ from its input; ``quantize`` uses it."""
        self.cap = math.inf
        """Largest value of the activation that this one replaces, 6 for ReLU6."""
        self.threshold_scale = 1.0
        """Factor on the calibrated θ [1]."""
        self.samples: list[Tensor] = []
        """What calibration saw; layers that share their step share this list."""
        self.ready = False

    @property
    def signed(self) -> bool:
        """Whether the integers run from -L (inputs) or from 0 (activations)."""
        return bool(self.int_quant.signed)

    @property
    def step(self) -> Tensor:
        """The step s = θ / L [units of x], a scalar in the dtype the model runs in."""
        return self.scaling_impl(self.scaling_impl.value, self.int_scaling_impl(self.msb_clamp_bit_width_impl()))

    @torch.no_grad()
    def set_threshold_(self, theta: float | Tensor) -> None:
        """Set θ, a number or (), in place: the parameter stays the one that an optimizer holds."""
        self.scaling_impl.value.fill_(float(theta))

    def share_step_(self, other: LevelQuant) -> None:
        """Take θ and what calibration sees from ``other``, from now on: values that meet have one step."""
        self.scaling_impl, self.samples = other.scaling_impl, other.samples

    def fix_step_(self, step: nn.Module) -> None:
        """Run Brevitas' own chain of operations, not our fused one, with a step that ``step`` gives when called."""
        self.fused, self.scaling_impl, self.ready = False, step, True

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Set θ so that (Q) has the least mean-squared error on x; signed quantizers take max|x|.

        Shape:
            x: any; at most 2**20 of its elements are looked at, evenly spaced.
        """
        x = x.detach().flatten()
        if self.signed:
            top = x.abs().max()
        else:
            self.samples.append(x[:: max(1, x.numel() // 2**20)].clamp(0, self.cap))
            top = _least_squares_threshold(torch.cat(self.samples), self.levels) * self.threshold_scale
        self.set_threshold_(top if bool(top > 0) else 1.0)  # 1: a dead layer, any step does

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, *) -> y (B, *), s, the zero point 0 and the bit width, as Brevitas expects.

        Raises:
            RuntimeError: θ has not been set yet.
        """
        if self.collecting:
            self.calibrate_(x)
        if not self.ready:
            if not bool(self.scaling_impl.value.isfinite().all()):
                raise RuntimeError(
                    "this quantizer has no step yet: calibrate it with quantize(model, data), or load a trained "
                    "state_dict"
                )
            self.ready = True
        if not self.fused:
            return super().forward(x)
        step = self.step
        low = -self.levels if self.signed else 0
        y = _LevelFunction.apply(x, step, low, self.levels)
        if y.stride() != x.stride() and 0 not in x.stride():  # an expanded tensor has no layout to keep
            # images of one channel: elementwise operations forget that they are channels-last, and what comes behind
            # would run in the slower layout
            y = torch.empty_strided(x.shape, x.stride(), dtype=y.dtype, device=y.device).copy_(y)
        bit_width = self.msb_clamp_bit_width_impl()
        return y, step, self.zero_point_impl(x, step, bit_width), bit_width


def _least_squares_threshold(x: Tensor, levels: int) -> Tensor:
    """The θ among 49 fractions of max(x) whose (Q) has the least mean-squared error on x >= 0."""
    top = x.max()
    candidates = top * torch.linspace(0.04, 1.0, 49, device=x.device)
    errors = []
    for theta in candidates:
        quantized = x.mul(levels / theta).add_(0.5).floor_().clamp_(0, levels).mul_(theta / levels)
        errors.append(quantized.sub_(x).square_().mean())
    return candidates[torch.stack(errors).argmin()]


class LevelActProxy(ActQuantProxyFromInjector):
    """Brevitas' proxy without the ReLU inside: (Q) clips at 0 itself, so that would be one more pass for nothing.

    Brevitas builds the quantizer again whenever it loads a state; here it is kept, with its parameter, so that an
    optimizer and layers that share a step still hold the one that is used.
    """

    def init_tensor_quant(self) -> None:
        """Build the quantizer from the injector, once."""
        built = getattr(self, "fused_activation_quant_proxy", None)
        if built is None:
            super().init_tensor_quant()
            self.fused_activation_quant_proxy.activation_impl = nn.Identity()
        else:
            built.tensor_quant.ready = False


class LevelActQuant(ExtendedInjector):
    r"""Brevitas injector of :class:`LevelQuant`, :math:`s\,\mathrm{clip}(\lfloor x/s + \tfrac12\rfloor, n_0, L)`.

    Give ``levels`` (L), ``signed`` (n₀ = -L, else 0) and ``bit_width``; s is learned.

    Source: Esser et al., ICLR 2020; Bu et al., ICLR 2022.
    """

    proxy_class = LevelActProxy
    tensor_quant = LevelQuant
    int_quant = LevelIntQuant
    int_scaling_impl = LevelScaling
    scaling_impl = ParameterScaling
    restrict_scaling_impl = FloatRestrictValue
    scaling_init = math.nan
    scaling_shape = ()
    scaling_min_val = 1e-10
    zero_point_impl = ZeroZeroPoint
    bit_width_impl = BitWidthConst
    float_to_int_impl = RoundHalfUp
    input_view_impl = Identity
    narrow_range = True
    signed = False
    dtype = None
    device = None


class HalfQuant(nn.Module):
    r"""IEEE half: :math:`y = \mathrm{half}(x)`, rounded to nearest even, :math:`\partial y/\partial x = 1`; scale 1.

    Source: IEEE 754-2019 (binary16).
    """

    def __init__(self) -> None:
        super().__init__()
        self.one = StatelessBuffer(torch.tensor(1.0))
        self.zero = StatelessBuffer(torch.tensor(0.0))
        self.bits = StatelessBuffer(torch.tensor(16.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(*) -> the half values (*), scale 1, zero point 0 and 16 bits, as Brevitas expects."""
        y = _StraightThrough.apply(x, x.detach().half().to(x.dtype))
        return y, self.one(), self.zero(), self.bits()


class SignQuant(nn.Module):
    r"""±1: :math:`y = +1` where :math:`x \ge 0`, else -1; :math:`\partial y/\partial x = [\,|x| < 1\,]`.

    Source: Hubara et al., "Binarized Neural Networks", NeurIPS 2016.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one = StatelessBuffer(torch.tensor(1.0))
        self.zero = StatelessBuffer(torch.tensor(0.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(*) -> y (*), scale 1, zero point 0 and 1 bit, as Brevitas expects."""
        return _SignFunction.apply(x), self.one(), self.zero(), self.one()


class _SignFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.hardtanh_backward(grad, ctx.saved_tensors[0], -1.0, 1.0)


class SignActQuant(ExtendedInjector):
    r"""Brevitas injector of :class:`SignQuant` for activations, :math:`y = \mathrm{sign}(x)`, sign(0) = 1.

    Source: Hubara et al., "Binarized Neural Networks", NeurIPS 2016.
    """

    proxy_class = ActQuantProxyFromInjector
    tensor_quant = SignQuant
    signed = True
    narrow_range = True


class HalfActQuant(ExtendedInjector):
    r"""Brevitas injector of :class:`HalfQuant` for activations, :math:`y = \mathrm{half}(\max(x, 0))`.

    Source: IEEE 754-2019 (binary16).
    """

    proxy_class = ActQuantProxyFromInjector
    tensor_quant = HalfQuant
    signed = False
    narrow_range = False


def act_quant_of(module: nn.Module) -> nn.Module | None:
    """Return the quantizer that a Brevitas activation layer holds, of any kind, or None."""
    proxy = getattr(getattr(module, "act_quant", None), "fused_activation_quant_proxy", None)
    return getattr(proxy, "tensor_quant", None)


def level_quant(module: nn.Module) -> LevelQuant | None:
    """Return the :class:`LevelQuant` that a Brevitas activation layer holds, or None."""
    quant = act_quant_of(module)
    return quant if isinstance(quant, LevelQuant) else None


def is_sign(module: nn.Module) -> bool:
    """Return whether a Brevitas activation layer gives ±1."""
    return isinstance(act_quant_of(module), SignQuant)
