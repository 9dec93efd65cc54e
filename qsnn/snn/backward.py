"""T steps of the IF neuron with a backward of their own, of few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsnn.snn.equations import empty_steps, integrated, subtract_


def _value(threshold: Tensor) -> Any:
    """θ as a number, which is fastest, or one a channel, shaped to multiply a step."""
    return threshold if threshold.dim() else float(threshold)


def in_box(h: Tensor, theta: Any, low: float, high: float, scratch: Tensor) -> Tensor:
    """1.0 where low·θ < h < high·θ, else 0.0, in ``scratch``.

    Comparisons that give bools take twice as long on a CPU as the backward of hardtanh, which is that box in one pass.

    Shape:
        h, scratch and returned: (*); theta: a number, or broadcast against h.
    """
    if torch.is_tensor(theta):
        h = h / theta
    else:
        low, high = low * theta, high * theta
    return torch.ops.aten.hardtanh_backward.grad_input(h.new_ones(()), h, low, high, grad_input=scratch)


class IFFunction(torch.autograd.Function):
    r"""T steps of the soft-reset IF neuron, with or without leak, with their own backward.

    Forward, :math:`h_t = d\,v_{t-1} + x_t` (d = 1 without leak), :math:`s_t = [h_t \ge \theta]`,
    :math:`v_t = h_t - \theta s_t`, and :math:`y_t = \theta s_t`, what the layers behind see. Backward, with
    :math:`\sigma_t = [\,|h_t - \theta| < \theta/2\,]/\theta` in the place of the derivative of the step: a box of
    area 1 and width θ (Bengio et al. 2013). θ and d are one number, or (C, 1, ...): one a channel.

    A gradient that comes to y alone needs neither a division nor a multiplication by θ: with
    :math:`g_t = \partial\ell/\partial y_t - \partial\ell/\partial v_t` and the box without its height,
    :math:`b_t = \theta\sigma_t`,

    .. math::
        \frac{\partial\ell}{\partial h_t} = b_t\,g_t + \frac{\partial\ell}{\partial v_t}, \qquad
        \frac{\partial\ell}{\partial\theta} = \sum_t (s_t - b_t)\,g_t .

    Signed, :math:`s_t = [h_t \ge \theta] - [h_t < 0]\,[n_{t-1} > 0]` with the spikes so far n, b is also 1 where
    :math:`|h_t| < \theta/2` and n > 0; that part does not move with θ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        v: Tensor,
        repeats: int,
        keep: Tensor | None,
        short: torch.dtype | None,
        signed: bool,
        pushes: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Spikes (T, B, *), the last potential (B, *), the amplified spikes y (T, B, *), and the spikes in bytes.

        ``repeats`` > 0: x is one step, (B, *), that stands for so many; ``keep``: d, None without leak; ``short``: the
        dtype of y, by default that of x; ``signed``: spikes of -1 take back spikes that came too early; ``pushes``:
        what is added to the potential before steps 2 to S, (S - 1, C, 1, ...).
        """
        ctx.set_materialize_grads(False)
        ctx.constant = repeats > 0
        theta = _value(threshold)
        current = x.expand(repeats, *x.shape) if ctx.constant else x
        spikes = empty_steps(current)
        amplified = empty_steps(current, short)
        # what is kept: a byte for the spike, and one for where its derivative is not 0; -1 where that is of a spike
        # that is taken back (signed, for a float becomes an unsigned byte ten times slower on a CPU)
        near, codes = empty_steps(current, torch.int8), empty_steps(current, torch.int8)
        # the potentials are for the gradient of d alone; without it they need not live on
        potentials, fired = [], None
        for t in range(len(current)):
            if ctx.needs_input_grad[4]:
                potentials.append(v)
            if t == 0 or ctx.needs_input_grad[4]:
                h = v + current[t] if keep is None else torch.mul(v, keep).add_(current[t])
            else:  # v is ours, and nobody asks for it again
                h = (v if keep is None else v.mul_(keep)).add_(current[t])
            if pushes is not None and 0 < t <= len(pushes):
                h.add_(pushes[t - 1])
            near[t] = in_box(h, theta, 0.5, 1.5, scratch=spikes[t])
            if fired is None:
                torch.ge(h, theta, out=spikes[t])
                fired = spikes[t].clone() if signed else None
            else:
                some = (fired > 0).to(h.dtype)
                near[t] -= in_box(h, theta, -0.5, 0.5, scratch=spikes[t]).mul_(some).to(torch.int8)
                torch.ge(h, theta, out=spikes[t])
                fired += spikes[t].sub_(some.mul_(h < 0))
            codes[t].copy_(spikes[t])
            v = subtract_(h, spikes[t], theta)
            if short is None:
                torch.mul(spikes[t], theta, out=amplified[t])
            else:
                amplified[t].copy_(spikes[t]).mul_(theta)
        ctx.mark_non_differentiable(codes)
        ctx.save_for_backward(near, codes if ctx.needs_input_grad[1] else None, threshold, keep, *potentials)
        ctx.dtype, ctx.signed, ctx.pushed = x.dtype, signed, None if pushes is None else pushes.shape
        return spikes, v, amplified, codes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to x, θ, the first potential, d and what is added later."""
        grad_spikes, grad_v, grad_y, _ = grads
        near, codes, threshold, keep, *potentials = ctx.saved_tensors
        theta = _value(threshold)
        if grad_spikes is None and grad_v is None and grad_y is None:
            return (None,) * 8
        wants_theta, wants_v, _, wants_keep, *_, wants_pushes = ctx.needs_input_grad[1:]
        grad_x = None if ctx.constant else empty_steps(near, ctx.dtype)
        grad_theta, grad_keep, total = threshold.new_zeros(threshold.shape), None, None
        grad_pushes = near.new_zeros(ctx.pushed, dtype=ctx.dtype) if wants_pushes else None
        for t in reversed(range(len(near))):
            scratch = torch.empty_like(near[t], dtype=ctx.dtype) if grad_x is None else grad_x[t]
            # one dtype in each operation: mixed ones are slower on a CPU than a copy before
            ours = grad_y is not None and grad_y.dtype != ctx.dtype  # a copy, that nobody else sees
            outer = _difference(None if grad_y is None else grad_y[t].to(ctx.dtype), grad_v, ours)
            if wants_theta and outer is not None:
                # where y alone has a gradient, both factors of g at once
                factor = codes[t] if grad_spikes is not None else codes[t] - near[t].clamp(min=0)
                grad_theta += _summed_product(scratch.copy_(factor), outer, threshold.shape)
            if grad_spikes is not None:
                inner = grad_spikes[t] / theta
                outer = inner if outer is None else outer + inner
                if wants_theta:
                    grad_theta -= _summed_product(scratch.copy_(near[t].clamp(min=0)), outer, threshold.shape)
            if outer is None:  # nothing comes to this step
                outer = near.new_zeros((), dtype=ctx.dtype).expand(near.shape[1:])
            grad_h = scratch.copy_(near[t].abs() if ctx.signed else near[t]).mul_(outer)
            if grad_v is not None:
                grad_h.add_(grad_v)
            if grad_pushes is not None and 0 < t <= len(grad_pushes):
                grad_pushes[t - 1] = grad_h.sum_to_size(ctx.pushed[1:])
            if wants_keep:
                part = (grad_h * potentials[t]).sum_to_size(keep.shape)
                grad_keep = part if grad_keep is None else grad_keep + part
            if ctx.constant:
                total = grad_h.clone() if total is None else total.add_(grad_h)
            grad_v = grad_h if keep is None else grad_h * keep
        grad_x = total if grad_x is None else grad_x
        grad_theta, grad_v = grad_theta if wants_theta else None, grad_v if wants_v else None
        return grad_x, grad_theta, grad_v, None, grad_keep, None, None, grad_pushes


def _difference(x: Tensor | None, y: Tensor | None, ours: bool) -> Tensor | None:
    """x - y (*), where None is 0; in the place of x where that is ``ours``."""
    if x is None:
        return None if y is None else -y
    return x if y is None else x.sub_(y) if ours else x - y


def _summed_product(x: Tensor, y: Tensor, shape: torch.Size) -> Tensor:
    """The sum of x·y down to ``shape``, (*) -> () or (C, 1, ...); to a number in one pass, which writes nothing."""
    last = torch.channels_last
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=last))
    if shape.numel() > 1 or not dense or x.stride() != y.stride():
        return (x * y).sum_to_size(shape)
    return torch.dot(*(each.as_strided((each.numel(),), (1,)) for each in (x, y))).view(shape)


class RateFunction(torch.autograd.Function):
    r"""The same forward; the backward goes through the rate, as if :math:`r = \mathrm{clip}(\bar x/\theta, 0, 1)`.

    With the mean current :math:`\bar x` every step gets
    :math:`\partial r/\partial x_t = [0 < \bar x < \theta]/(T\theta)`, the gradient of the activation that the neuron
    stands for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, v: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
        """Spikes (T, B, *) and the last potential; ``repeats`` > 0: x is one step, (B, *), that stands for so many."""
        ctx.set_materialize_grads(False)
        ctx.constant = repeats > 0
        current = x.expand(repeats, *x.shape) if ctx.constant else x
        ctx.save_for_backward(x if ctx.constant else current.mean(0), threshold)
        return integrated(current, threshold.to(x.dtype), v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """(T, B, *) -> gradients to x (T, B, *), θ and the first potential (B, *)."""
        (grad_spikes, _), (mean, threshold) = grads, ctx.saved_tensors
        theta = _value(threshold)
        if grad_spikes is None:
            return None, None, None, None
        steps = len(grad_spikes)
        grad = (grad_spikes.sum(0) * ((mean > 0) & (mean < theta))).div_(theta)
        grad_theta = None
        if ctx.needs_input_grad[1]:
            grad_theta = -(grad * mean).sum_to_size(threshold.shape) / theta
        if ctx.constant:
            return grad, grad_theta, grad / steps, None
        grad.div_(steps)
        grad_x = empty_steps(grad_spikes)
        grad_x[:] = grad
        return grad_x, grad_theta, grad, None


class _AveragePool(torch.autograd.Function):
    """Average pooling that keeps the shape of its input until the backward, and not the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.shape, ctx.options = x.shape, options
        last = x.is_contiguous(memory_format=torch.channels_last)
        ctx.memory_format = torch.channels_last if last else torch.contiguous_format
        return torch.ops.aten.avg_pool2d(x, *options)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        # the operator asks the input for its shape and layout alone
        like = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        return torch.ops.aten.avg_pool2d_backward(grad, like, *ctx.options), None


class AveragePool2d(nn.AvgPool2d):
    """``nn.AvgPool2d`` without the memory: its own backward keeps nothing. In time, spikes are its largest tensors."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        if not (torch.is_grad_enabled() and x.requires_grad and x.dim() == 4):
            return super().forward(x)
        pair = (self.kernel_size, self.stride, self.padding)
        options = (*pair, self.ceil_mode, self.count_include_pad, self.divisor_override)
        return _AveragePool.apply(x, options)  # type: ignore[no-any-return]
