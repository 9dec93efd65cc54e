r"""One backward for all steps of a spiking network in training: the gradient goes through means over time.

With the gradient of the rate (surrogate "rate", see :class:`qsnn.IFNode`) a neuron hands one gradient to all steps. So
nothing between two neurons needs T of them: forward runs T steps and keeps none, backward runs once, on the mean
:math:`\bar x = \tfrac1T\sum_t x_t`. Answers and running statistics are those of the loop. So is the gradient, but for
weights in front of a batch norm in training, which lose the covariance over time between what they see and what the
norm's statistics ask of each step; and for max pools, where a maximum of means stands for the mean of maxima.

Source:
    Yu et al., "Advancing Training Efficiency of Deep SNNs through Rate-based Backpropagation", NeurIPS 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.graph.call import SHORT
from qsnn.graph.kinds import does
from qsnn.graph.trace import module_of
from qsnn.snn.backward import in_box
from qsnn.snn.equations import empty_steps, per_channel, subtract_
from qsnn.snn.neurons import IFNode, Repeat, amplified

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PLAIN = ("averages", "adds", "joins", "moves", "scales", "shifts", "takes maxima")
"""What these kinds compute on means is the mean of what they compute on steps; of maxima the mean is put in."""


@dataclass(frozen=True)
class Steps:
    """What T steps hold, (T·B, *), without a gradient, and their mean over time, (B, *), which has one."""

    values: Tensor
    mean: Tensor
    scaled: bool = False
    """Spikes that are θ·spikes already."""


def sum_of(values: Tensor, timesteps: int) -> Tensor:
    """The sum over time, (T·B, *) -> (B, *), a tensor of its own in the layout of a step."""
    images = len(values) // timesteps
    if timesteps == 1:
        return values.clone()
    total = values.narrow(0, 0, images) + values.narrow(0, images, images)
    for t in range(2, timesteps):
        total.add_(values.narrow(0, t * images, images))
    return total


def mean_of(values: Tensor, timesteps: int) -> Tensor:
    """The mean over time, (T·B, *) -> (B, *), in the layout of a step."""
    total = sum_of(values, timesteps)
    return total.mul_(1 / timesteps) if timesteps > 1 else total


class _Fires(torch.autograd.Function):
    r"""T steps of the IF neuron, and the mean of :math:`y_t = \theta s_t`; or of the spikes themselves.

    Backward as if it were :math:`\bar y = \mathrm{clip}(\bar x, 0, \theta)`, of v₀ a T-th of that, and with the
    spikes that there are: :math:`\partial\bar y/\partial\theta = (\bar y - b\,\bar x)/\theta`,
    :math:`b = [0 < \bar x < \theta]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        threshold: Tensor,
        start: Tensor,
        steps: Tensor,
        short: torch.dtype | None,
        scaled: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        theta = threshold if threshold.dim() else float(threshold)
        answers = empty_steps(steps, short)
        spikes = torch.empty_like(mean)
        v = start + steps[0]
        for t in range(len(steps)):
            if t:
                v.add_(steps[t])
            torch.ge(v, theta, out=spikes)
            subtract_(v, spikes, theta)
            if scaled and short is None:
                torch.mul(spikes, theta, out=answers[t])
            else:
                answers[t] = spikes * theta if scaled else spikes
        answers = answers.flatten(0, 1)
        y = mean_of(answers, len(steps))
        inside = in_box(mean, theta, 0.0, 1.0, scratch=spikes)
        away = None
        if ctx.needs_input_grad[1]:  # θ·∂y/∂θ
            away = torch.addcmul(y.to(mean.dtype), inside, mean, value=-1) if scaled else inside * mean
        ctx.save_for_backward(inside.to(torch.int8), threshold, away)
        ctx.timesteps, ctx.started, ctx.scaled, ctx.dtype = len(steps), start.shape, scaled, mean.dtype
        ctx.mark_non_differentiable(answers)
        return answers, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (_, grad), (inside, theta, away) = grads, ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        grad = grad.to(ctx.dtype) if ctx.scaled else grad.to(ctx.dtype) / theta
        direct = inside.to(ctx.dtype).mul_(grad)
        grad_theta = grad_start = None
        if ctx.needs_input_grad[1]:
            grad_theta = (grad * away).sum_to_size(theta.shape) / (theta if ctx.scaled else -theta)
        if ctx.needs_input_grad[2]:
            grad_start = direct.sum_to_size(ctx.started) / ctx.timesteps
        return direct, grad_theta, grad_start, None, None, None


class _Weighs(torch.autograd.Function):
    """A convolution or linear layer: T steps forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, options: Any, timesteps: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.sizes = options, None if bias is None else bias.shape
        ctx.save_for_backward(mean, weight)
        if options is None:
            answer = torch.nn.functional.linear(values, weight, bias)
        else:
            answer = torch.ops.aten.convolution(values, weight, bias, *options)
        ctx.mark_non_differentiable(answer)
        return answer, mean_of(answer, timesteps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (_, grad), (mean, weight) = grads, ctx.saved_tensors
        if grad is None:
            return (None,) * 6
        wanted = ctx.needs_input_grad[:3]
        if ctx.options is not None:
            found = torch.ops.aten.convolution_backward(grad, mean, weight, ctx.sizes, *ctx.options, wanted)
            return (*found, None, None, None)
        rows = grad.flatten(0, -2)
        return (
            grad @ weight if wanted[0] else None, rows.mT @ mean.flatten(0, -2) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None, None, None, None,
        )  # fmt: skip


class _Normalises(torch.autograd.Function):
    """A batch norm in training: the statistics of all T·B, and the backward of the mean."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, weight: Tensor, bias: Tensor, values: Tensor, norm: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        moving = norm.running_mean, norm.running_var
        answer, *statistics = torch.native_batch_norm(values, weight, bias, *moving, True, norm.momentum, norm.eps)
        norm.num_batches_tracked.add_(1)
        ctx.save_for_backward(mean, weight, *moving, *statistics)
        ctx.eps = norm.eps
        ctx.mark_non_differentiable(answer)
        scale = statistics[1] * weight
        line = (per_channel(x.to(mean.dtype), mean.dim()) for x in (bias - statistics[0] * scale, scale))
        return answer, torch.addcmul(next(line), mean, next(line))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (_, grad), (mean, weight, *rest) = grads, ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.native_batch_norm_backward(grad, mean, weight, *rest, True, ctx.eps, wanted)
        return (*found, None, None)


class _InTime(torch.autograd.Function):
    """The values of all steps, with the gradient of each handed to the mean."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, values: Tensor, timesteps: int) -> Tensor:
        ctx.timesteps = timesteps
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return sum_of(grads[0], ctx.timesteps), None, None


def unsupported(network: fx.GraphModule) -> str | None:
    """Why a network's gradient cannot go through means, or None where it can; by what stands between its neurons."""
    inside = _in_front_of_neurons(network)
    timed: set[fx.Node] = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, IFNode):
            if not module.dynamics.plain or module.surrogate != "rate" or module.initial.dim() == 2:
                return f"{node.target} has another equation or another surrogate than 'rate'"
        elif isinstance(module, Repeat) or node.target is amplified:
            pass
        elif node not in inside or not timed.intersection(node.all_input_nodes):
            if node not in inside and isinstance(module, nn.Module) and getattr(module, "is_spiking", False):
                return f"{node.target} is another neuron"
            continue
        elif module is None or not _taken(module):
            return f"{node.target} has no backward of its own through means"
        timed.add(node)
    return None if timed else "it has no neuron"


def _taken(module: nn.Module) -> bool:
    kind = does(module)
    if kind == "normalises":
        return isinstance(module, _NORMS) and module.momentum is not None
    if kind == "weighs":
        return isinstance(module, nn.Linear) or not isinstance(module.padding, str)
    return kind in _PLAIN or type(module) is nn.Identity


def _in_front_of_neurons(network: fx.GraphModule) -> set[fx.Node]:
    """The nodes that a neuron, or something in front of one, uses; neurons that nothing follows are among them."""
    found: set[fx.Node] = set()
    for node in reversed(network.graph.nodes):
        neuron = isinstance(module_of(network, node), IFNode)
        if neuron or found.intersection(node.users):
            found.add(node)
    return found


class MeanWalk(fx.Interpreter):
    """Runs a spiking network in training for T steps, online; its answers have their gradient through means."""

    def __init__(self, network: fx.GraphModule, timesteps: int) -> None:
        super().__init__(network)
        self.timesteps = timesteps
        self.inside = _in_front_of_neurons(network)

    def run_node(self, n: fx.Node) -> Any:
        """One node; what no neuron follows runs on the steps themselves, with a gradient of each."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n not in self.inside:
            args = fx.node.map_aggregate(args, self._stepped)  # type: ignore[assignment]
        module = module_of(self.module, n)  # type: ignore[arg-type]
        if isinstance(module, IFNode):
            scaled = all(user.target is amplified and user in self.inside for user in n.users)
            return self._fired(module, args[0], scaled=scaled)
        return getattr(self, n.op)(n.target, args, kwargs)

    def _stepped(self, value: Any) -> Any:
        return _InTime.apply(value.mean, value.values, self.timesteps) if isinstance(value, Steps) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """θ·spikes."""
        if not isinstance(args[0], Steps):
            return super().call_function(target, args, kwargs)
        spikes, theta = args
        if spikes.scaled:
            return spikes
        scale = per_channel(theta.to(spikes.mean.dtype), spikes.mean.dim())
        with torch.no_grad():
            values = spikes.values * scale
        return Steps(values, spikes.mean * scale)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A layer, on T steps and on their mean."""
        module = self.fetch_attr(target)
        if isinstance(module, Repeat) and not isinstance(args[0], Steps):
            return Steps(torch.cat([args[0].detach()] * self.timesteps), args[0])
        if not args or not isinstance(args[0], Steps):
            return super().call_module(target, args, kwargs)
        kind = does(module)
        if kind == "weighs":
            return self._weighed(module, args[0])
        if kind == "normalises" and module.training:
            x = args[0]
            found = _Normalises.apply(x.mean, module.weight, module.bias, x.values, module)
            return Steps(found[0], found[1])
        with torch.no_grad():
            values = module(*(each.values for each in args))
        mean = module(*(each.mean for each in args))
        if kind == "takes maxima":
            mean = mean + (mean_of(values, self.timesteps) - mean).detach()
        return Steps(values, mean)

    def _fired(self, neuron: IFNode, x: Tensor | Steps, *, scaled: bool) -> Steps:
        mean = x.mean if isinstance(x, Steps) else x
        short = mean.dtype if mean.dtype in SHORT else None
        mean = mean.float() if short else mean
        theta = per_channel(neuron.threshold.to(mean.dtype), mean.dim())
        start = per_channel(neuron.initial.to(mean.dtype), mean.dim()) * theta
        if isinstance(x, Steps):
            steps = x.values.to(mean.dtype).unflatten(0, (self.timesteps, -1))
        else:
            steps = mean.detach().expand(self.timesteps, *x.shape)
        values, y = _Fires.apply(mean, theta, start, steps, short, scaled)
        return Steps(values, y, scaled)

    def _weighed(self, layer: Any, x: Steps) -> Steps:
        quantized = getattr(layer, "weight_quant", None)
        weight = layer.weight if quantized is None else layer.quant_weight()
        weight = getattr(weight, "value", weight)
        device = x.mean.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        mean, values, weight = x.mean.to(dtype), x.values.to(dtype), weight.to(dtype)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        options = None
        if not isinstance(layer, nn.Linear):
            turned = bool(layer.transposed)
            options = (layer.stride, layer.padding, layer.dilation, turned, layer.output_padding, layer.groups)
        found = _Weighs.apply(mean, weight, bias, values, options, self.timesteps)
        return Steps(found[0], found[1])
