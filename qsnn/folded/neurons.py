"""The neurons of a folded network: integer thresholds from exact rationals, and neurons of real currents."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from qsnn.folded import firing
from qsnn.folded.prepared import Prepared
from qsnn.graph.call import this_call
from qsnn.snn.equations import Dynamics, deferred, integrated, later, offset_at, per_channel, pushed, simulate

Shape = tuple[int, ...]


def shaped(x: Tensor, shape: Shape) -> Tensor:
    """(1,) -> (), and (n,) -> ``shape``: values in the shape in which they broadcast against an image."""
    return x.view(shape) if x.numel() > 1 else x.view(())


def least(need: Fraction, gain: Fraction) -> float:
    """The least integer A with gain·A >= need, for a gain >= 0; infinite where there is none, or where all are."""
    if gain == 0:
        return -float("inf") if need <= 0 else float("inf")
    limit = -((-need.numerator * gain.denominator) // (need.denominator * gain.numerator))
    return float(limit) if abs(limit) < 2**52 else float("inf") * (1 if limit > 0 else -1)


class Current(Prepared):
    r"""The real current of a step, :math:`\sum_j g_j A_j + b`, in float64, added in graph order.

    Args:
        factors: for each input, the numbers whose product over ``divisor``·T^``steps`` is g_j, (F, n) or (F, 1).
        divisors: for each input the number of window elements of the pooling it went through.
        bias: b of each step, (n,) or (1,).
        shapes: in which the n values of each input's gain, and last those of the bias, broadcast against an image.
        steps: for each input how many sums over time it is a product of; () for none.
    """

    divisors: Tensor
    bias: Tensor

    def __init__(
        self,
        factors: list[Tensor],
        divisors: list[int],
        bias: Tensor,
        shapes: list[Shape],
        *,
        steps: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        for index, factor in enumerate(factors):
            self.register_buffer(f"factors_{index}", factor)
        self.register_buffer("divisors", torch.tensor(divisors, dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.shapes, self.steps = shapes, steps or (0,) * len(factors)

    def gain(self, index: int, timesteps: int) -> Tensor:
        """g_j at T in float64, shaped to multiply an input."""
        factors: Tensor = getattr(self, f"factors_{index}")
        return shaped(factors.prod(0) / (self.divisors[index] * timesteps ** self.steps[index]), self.shapes[index])

    @property
    def step_bias(self) -> Tensor:
        """b, shaped to be added to a step."""
        return shaped(self.bias, self.shapes[-1])

    def added(self, inputs: Sequence[Tensor], timesteps: int) -> Tensor:
        """Σ_j g_j·A_j at T in float64, in graph order.

        Shape:
            inputs and returned: (*).
        """
        make = lambda: [self.gain(index, timesteps) for index in range(len(self.divisors))]  # noqa: E731
        gains = self.kept(("gains", timesteps), make)
        return functools.reduce(torch.add, (gain * x.double() for gain, x in zip(gains, inputs, strict=True)))

    def totals(self, inputs: Sequence[Tensor], timesteps: int) -> list[Tensor]:
        """S of the currents up to each step.

        Shape:
            inputs: (T·B, *); returned: T tensors (B, *).
        """
        biases = self.kept(("bias", timesteps), lambda: [t * self.step_bias for t in range(1, timesteps + 1)])
        sums = [firing.summed_up(firing.in_time(x.double(), timesteps)) for x in inputs]
        return [self.added(parts, timesteps) + bias for *parts, bias in zip(*sums, biases, strict=True)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """(T·B, *) for each input -> (T·B, *)."""
        return self.added(inputs, this_call().timesteps) + self.step_bias


class CurrentIF(Current):
    """An IF neuron where currents meet, or that sees a real current: it fires when S >= (k + ½)·θ, in float64.

    A signed one takes a spike back where S < (k - ½)·θ. In the place of ½ stands 1 less all that v₀ and later steps put
    into the potential.

    Args:
        current: what :class:`Current` takes; so do ``options``.
        threshold: θ, () or (C,).
        initial: v0 [θ], likewise, or (S, C): a row for each of the first S steps.
        signed: whether it takes spikes back.
    """

    is_spiking = True
    threshold: Tensor
    initial: Tensor

    def __init__(
        self, *current: Any, threshold: Tensor, initial: Tensor | float, signed: bool = False, **options: Any
    ) -> None:
        super().__init__(*current, **options)
        self.signed = signed
        self.register_buffer("threshold", threshold.double())
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.float64))

    def theta(self, dims: int) -> Tensor:
        """θ as () or (C, 1, ...), shaped to multiply a tensor of ``dims`` dimensions."""
        return per_channel(self.threshold, dims)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Spikes {0, 1}, or {-1, 0, 1} where signed, in float32, (T·B, *)."""
        call = this_call()
        steps = call.timesteps
        totals = self.totals(inputs, steps)
        dims = totals[0].dim()
        if call.firing == "deferred":
            last = self.kept(("limits", steps, dims), lambda: self._limits(steps, steps, dims))
            return firing.deferred(totals[-1], last)
        if steps <= firing.COMPARED:
            make = lambda: [self._limits(t, t, dims) for t in range(1, steps + 1)]  # noqa: E731
            return firing.online(totals, self.kept(("each", steps, dims), make), signed=self.signed)
        theta = self.kept(("θ", dims), lambda: self.theta(dims))
        offsets = self.kept(("offsets", steps, dims), lambda: [self.offset(t + 1, dims) for t in range(steps)])
        return firing.one_by_one(totals, lambda t, fired: (fired + offsets[t]) * theta, signed=self.signed)

    def offset(self, step: int, dims: int) -> Tensor:
        """What the first spike needs at a step [θ]: 1 less all that was put into the potential."""
        return per_channel(1.0 - offset_at(self.initial, step), dims)

    def _limits(self, step: int, count: int, dims: int) -> list[Tensor]:
        """(k + ½)·θ at a step for each k < ``count``, shaped to meet a sum."""
        theta, offset = self.theta(dims), self.offset(step, dims)
        return [(k + offset) * theta for k in range(count)]


class RealIF(Prepared):
    """The IF neuron of a float layer, on its current as it is; see :class:`qsnn.IFNode`.

    Args:
        threshold: θ, () or (C,).
        initial: v₀ / θ, or (S, C): a row for each of the first S steps.
        unit: the current comes in units of θ.
        constant: the current is one step, (B, C, *), that stands for all T.
    """

    is_spiking = True
    threshold: Tensor
    initial: Tensor

    def __init__(
        self, threshold: Tensor, initial: Tensor | float, *, unit: bool = False, constant: bool = False
    ) -> None:
        super().__init__()
        self.unit, self.constant = unit, constant
        self.register_buffer("threshold", threshold.double())
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Currents (T·B, C, *) -> spikes {0, 1} of the same dtype and shape."""
        call = this_call()
        theta, start, pushes = self.kept((x.dtype, x.dim()), lambda: self.equation(x.dtype, x.dim()))
        once = self.constant and not call.frames
        x = x.expand(call.timesteps, *x.shape) if once else x.unflatten(0, (call.timesteps, -1))
        x = pushed(x, pushes)
        return (deferred if call.firing == "deferred" else integrated)(x, theta, start)[0].flatten(0, 1)

    def equation(self, dtype: torch.dtype, dims: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """θ, v₀ and what comes later, shaped to meet a step; a number as (1,), never read back from a device."""
        theta = torch.ones_like(self.threshold) if self.unit else self.threshold
        theta = per_channel(theta.to(dtype).reshape(-1), dims) if theta.dim() else theta.to(dtype).reshape(1)
        return theta, per_channel(offset_at(self.initial, 1).to(dtype), dims) * theta, later(self.initial, theta, dims)


class DynamicIF(CurrentIF):
    """A neuron with another reset, a leak or a membrane of few bits: its equation in float64.

    Args:
        current: what :class:`Current` takes; ``options`` are those of :class:`CurrentIF`.
        dynamics: the equation.
        tau: time constant [steps], () or (C,); None without leak.
    """

    tau: Tensor | None

    def __init__(self, *current: Any, dynamics: Dynamics, tau: Tensor | None, **options: Any) -> None:
        super().__init__(*current, **options)
        self.dynamics = dynamics
        self.register_buffer("tau", tau)
        self.overflows = 0
        """How many potentials did not fit into ``dynamics.state_bits`` since the network was folded."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Spikes {0, 1}, or {-1, 0, 1} where signed, in float32, (T·B, C, *)."""
        currents = Current.forward(self, *inputs).unflatten(0, (this_call().timesteps, -1))
        dims = currents.dim() - 1
        theta, tau = self.theta(dims), None if self.tau is None else per_channel(self.tau, dims)
        start = (per_channel(offset_at(self.initial, 1), dims) * theta).expand_as(currents[0])
        currents = pushed(currents, later(self.initial, theta, dims))
        spikes, _, overflows = simulate(currents, theta, start, self.dynamics, tau)
        self.overflows += overflows
        return spikes.float().flatten(0, 1)
