"""T steps of the IF neuron with a backward of their own, of few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsnn.dynamics import empty_steps, integrated


def _value(threshold: Tensor) -> Any:
    """θ as a number, which is fastest, or one a channel, shaped to multiply a step."""
    return threshold if threshold.dim() else float(threshold)


def _minus(x: Tensor, y: Tensor, theta: Any) -> Tensor:
    """x - θ·y in one pass."""
    return torch.addcmul(x, y, theta, value=-1) if torch.is_tensor(theta) else torch.sub(x, y, alpha=theta)


class IFFunction(torch.autograd.Function):
    r"""T steps of the soft-reset IF neuron with their own backward.

    Forward, :math:`h_t = v_{t-1} + x_t`, :math:`s_t = [h_t \ge \theta]`, :math:`v_t = h_t - \theta s_t`. Backward, with
    :math:`\sigma_t = [\,|h_t - \theta| < \theta/2\,]/\theta` in the place of the derivative of the step: a box of
    area 1 and width θ (Bengio et al. 2013). θ is one number, or (C, 1, ...): one a channel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, v: Tensor, repeats: int) -> tuple[Tensor, Tensor]:
        """Spikes (T, B, *) and the last potential; ``repeats`` > 0: x is one step, (B, *), that stands for so many."""
        ctx.set_materialize_grads(False)
        ctx.constant = repeats > 0  # x is one step, (B, *), that stands for so many
        theta = _value(threshold)
        current = x.expand(repeats, *x.shape) if ctx.constant else x
        spikes = empty_steps(current)
        # where the derivative is not 0: a byte, while the potentials would keep four until the backward
        near, low, high = empty_steps(current, torch.bool), 0.5 * theta, 1.5 * theta
        for t in range(len(current)):
            h = v + current[t]
            torch.gt(h, low, out=near[t])
            near[t] &= h < high
            v = _minus(h, torch.ge(h, theta, out=spikes[t]), theta)
        # the spikes are for the gradient of θ alone; without it they need not live until the backward
        ctx.save_for_backward(near, spikes if ctx.needs_input_grad[1] else None, threshold)
        return spikes, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients to x, θ and the first potential."""
        grad_spikes, grad_v = grads
        near, spikes, threshold = ctx.saved_tensors
        theta = _value(threshold)
        if grad_spikes is None:
            if grad_v is None:
                return None, None, None, None
            grad_spikes = grad_v.new_zeros(()).expand(near.shape)
        grad_x = None if ctx.constant else empty_steps(near, grad_spikes.dtype)
        grad_theta, total = grad_spikes.new_zeros(threshold.shape), None
        for t in reversed(range(len(near))):
            grad_s = grad_spikes[t] if grad_v is None else _minus(grad_spikes[t], grad_v, theta)
            direct = (grad_s * near[t]).div_(theta)
            if ctx.needs_input_grad[1]:
                through_reset = direct if grad_v is None else torch.addcmul(direct, grad_v, spikes[t])
                grad_theta -= through_reset.sum_to_size(threshold.shape)
            grad_v = direct if grad_v is None else grad_v + direct
            if grad_x is not None:
                grad_x[t] = grad_v
                continue
            total = grad_v.clone() if total is None else total.add_(grad_v)
        wants_theta, wants_v = ctx.needs_input_grad[1:3]
        grad_x = total if grad_x is None else grad_x
        return grad_x, (grad_theta if wants_theta else None), (grad_v if wants_v else None), None


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
        """Gradients to x, θ and the first potential."""
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
