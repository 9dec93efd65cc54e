"""The neurons of a folded network: integer thresholds from exact rationals, and neurons of real currents."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from qsnn.folded.kept import Kept
from qsnn.folded.layers import EXACT_FLOAT32
from qsnn.folded.thresholds import integer_thresholds, refuse_many_steps
from qsnn.graph.call import Call, current
from qsnn.snn.equations import Dynamics, deferred, integrated, per_channel, simulate

Shape = tuple[int, ...]


def shaped(x: Tensor, shape: Shape) -> Tensor:
    """(1,) -> (), and (n,) -> ``shape``: values in the shape in which they broadcast against an image."""
    return x.view(shape) if x.numel() > 1 else x.view(())


def _call() -> Call:
    return current() or Call()


def least(need: Fraction, gain: Fraction) -> float:
    """The least integer A with gain·A >= need, for a gain >= 0; infinite where there is none, or where all are."""
    if gain == 0:
        return -float("inf") if need <= 0 else float("inf")
    limit = -((-need.numerator * gain.denominator) // (need.denominator * gain.numerator))
    return float(limit) if abs(limit) < 2**52 else float("inf") * (1 if limit > 0 else -1)


class Current(nn.Module):
    r"""The real current of a step, :math:`\sum_j g_j A_j + b`, in float64, added in graph order.

    Args:
        factors: for each input, the numbers whose product over ``divisor`` is g_j, (F, n) or (F, 1).
        divisors: for each input the number of window elements of the pooling it went through.
        bias: b of each step, (n,) or (1,).
        shapes: in which the n values of each input's gain, and last those of the bias, broadcast against an image.
    """

    divisors: Tensor
    bias: Tensor

    def __init__(self, factors: list[Tensor], divisors: list[int], bias: Tensor, shapes: list[Shape]) -> None:
        super().__init__()
        for index, factor in enumerate(factors):
            self.register_buffer(f"factors_{index}", factor)
        self.register_buffer("divisors", torch.tensor(divisors, dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.shapes = shapes

    def gain(self, index: int) -> Tensor:
        """g_j in float64, shaped to multiply an input."""
        factors: Tensor = getattr(self, f"factors_{index}")
        return shaped(factors.prod(0) / self.divisors[index], self.shapes[index])

    @property
    def step_bias(self) -> Tensor:
        """b, shaped to be added to a step."""
        return shaped(self.bias, self.shapes[-1])

    def forward(self, *inputs: Tensor) -> Tensor:
        """(T·B, *) for each input -> (T·B, *)."""
        total = self.gain(0) * inputs[0].double()
        for index, x in enumerate(inputs[1:], 1):
            total = total + self.gain(index) * x.double()
        return total + self.step_bias


class CurrentIF(Current):
    """An IF neuron where currents meet, or that sees a real current: it fires when S >= (k + ½)·θ, in float64."""

    is_spiking = True
    threshold: Tensor
    initial: Tensor

    def __init__(
        self,
        factors: list[Tensor],
        divisors: list[int],
        bias: Tensor,
        shapes: list[Shape],
        threshold: Tensor,
        initial: Tensor | float,
    ) -> None:
        super().__init__(factors, divisors, bias, shapes)
        self.register_buffer("threshold", threshold.double())
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.float64))

    def theta(self, dims: int) -> Tensor:
        """θ as () or (C, 1, ...), shaped to multiply a tensor of ``dims`` dimensions."""
        return per_channel(self.threshold, dims)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Spikes {0, 1} in float32, (T·B, *)."""
        call = _call()
        steps = call.timesteps
        sums = [x.double().unflatten(0, (steps, -1)).cumsum(0) for x in inputs]
        total = self.gain(0) * sums[0]
        for index, x in enumerate(sums[1:], 1):
            total = total + self.gain(index) * x
        dims = total.dim() - 1
        time = torch.arange(1, steps + 1, device=total.device).view(-1, *[1] * dims)
        total = total + time * self.step_bias
        theta, offset = self.theta(dims), per_channel(1.0 - self.initial, dims)
        if call.firing == "deferred":
            count = ((total[-1] / theta) + (1.0 - offset)).floor().clamp_(0, steps)
            # the division may round across an integer: compare with the products, which is the definition
            count = count - (count > 0).double() * (total[-1] < (count - 1 + offset) * theta)
            count = count + (count < steps).double() * (total[-1] >= (count + offset) * theta)
            spikes = (time - 1) < count
        else:
            fired = torch.zeros_like(total[0])
            spikes = torch.empty(total.shape, dtype=torch.bool, device=total.device)
            for t in range(steps):
                spikes[t] = total[t] >= (fired + offset) * theta
                fired += spikes[t]
        return spikes.float().flatten(0, 1)


class RealIF(nn.Module):
    """The IF neuron of a float layer, on its current as it is; see :class:`qsnn.IFNode`.

    Args:
        threshold: θ, () or (C,).
        initial: v₀ / θ.
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
        call = _call()
        theta = x.new_ones(()) if self.unit else self.threshold.to(x.dtype)
        theta = per_channel(theta, x.dim())
        once = self.constant and not call.frames
        x = x.expand(call.timesteps, *x.shape) if once else x.unflatten(0, (call.timesteps, -1))
        start = per_channel(self.initial.to(x.dtype), x.dim() - 1) * theta
        return (deferred if call.firing == "deferred" else integrated)(x, theta, start)[0].flatten(0, 1)


class DynamicIF(CurrentIF):
    """A neuron with another reset, leak, signed spikes or a membrane of few bits: its equation in float64."""

    tau: Tensor | None

    def __init__(
        self,
        factors: list[Tensor],
        divisors: list[int],
        bias: Tensor,
        shapes: list[Shape],
        threshold: Tensor,
        initial: Tensor | float,
        dynamics: Dynamics,
        tau: Tensor | None,
    ) -> None:
        super().__init__(factors, divisors, bias, shapes, threshold, initial)
        self.dynamics = dynamics
        self.register_buffer("tau", tau)
        self.overflows = 0
        """How many potentials did not fit into ``dynamics.state_bits`` since the network was folded."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Spikes {0, 1}, or {-1, 0, 1} where signed, in float32, (T·B, C, *)."""
        currents = Current.forward(self, *inputs).unflatten(0, (_call().timesteps, -1))
        dims = currents.dim() - 1
        theta, tau = self.theta(dims), None if self.tau is None else per_channel(self.tau, dims)
        start = (per_channel(self.initial, dims) * theta).expand_as(currents[0])
        spikes, _, overflows = simulate(currents, theta, start, self.dynamics, tau)
        self.overflows += overflows
        return spikes.float().flatten(0, 1)


class IntegerIF(nn.Module):
    r"""An IF neuron in integers: it fires at step t, after k spikes, when :math:`A_t \ge M_{t,k}`.

    .. math:: M_{t,k} = \lceil ((k + 1)\,\theta - v_0 - t\,b_c) / g_c \rceil

    A_t is the integer input summed up to step t, g_c > 0 the current of one unit, b_c the bias of a step. M is an
    integer, computed once per T from the exact rationals of the stored numbers. A channel with g_c = 0 fires by its
    bias alone: M is -∞ or ∞.

    Args:
        factors: numbers whose product over ``divisor`` is g, (F, n) or (F, 1) float64.
        divisor: window elements of the pooling that the input went through.
        bias: b, (n,) or (1,) float64.
        threshold: θ, scalar.
        initial: v₀ / θ, scalar or (n,).
        input_bound: largest absolute input of a step.
        shape: in which the n values broadcast against an image; () for n = 1.
    Shape:
        input and output: (T·B, *).
    """

    is_spiking = True
    factors: Tensor
    divisor: Tensor
    bias: Tensor
    threshold: Tensor
    initial: Tensor
    input_bound: Tensor

    def __init__(
        self,
        factors: Tensor,
        divisor: int,
        bias: Tensor,
        threshold: Tensor,
        initial: Tensor | float,
        input_bound: float,
        shape: Shape,
    ) -> None:
        super().__init__()
        self.shape = shape
        channels = max(factors.shape[1], bias.shape[0], torch.as_tensor(initial).numel())
        self.register_buffer("factors", factors.expand(-1, channels).clone())
        self.register_buffer("divisor", torch.tensor(divisor, dtype=torch.int64))
        self.register_buffer("bias", bias.expand(channels).clone())
        self.register_buffer("threshold", threshold.double())
        self.register_buffer("input_bound", torch.tensor(input_bound, dtype=torch.float64))
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.float64))
        self._prepared = Kept()

    @property
    def sign(self) -> Tensor:
        """Sign of g by channel, (n,)."""
        return torch.where(self.factors.prod(0) < 0, -1.0, 1.0)

    def table(self, timesteps: int, firing: str) -> Tensor:
        """Return M, (T, T, n) by t and k, of which only k < t count; deferred only its last row, (1, T, n)."""
        return self._ready(timesteps, firing, torch.float64)[0]

    def _ready(self, timesteps: int, firing: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, bool]:
        """The table, the sign where a gain is negative, and whether float32 is too short; made anew when a buffer
        changes."""
        buffers = (self.factors, self.divisor, self.bias, self.threshold, self.initial, self.input_bound)
        prepared = self._prepared.of(buffers)
        if "bound" not in prepared:
            sign = self.sign
            prepared["sign"] = shaped(sign, self.shape) if bool((sign < 0).any()) else None
            prepared["bound"] = float(self.input_bound)
        last_only = firing == "deferred"
        found = prepared.get((timesteps, last_only, dtype))
        if found is None:
            table = self._exact_table(timesteps, last_only).to(self.factors.device, dtype)
            found = prepared[timesteps, last_only, dtype] = table
        return found, prepared["sign"], prepared["bound"] * timesteps >= EXACT_FLOAT32

    def _exact_table(self, timesteps: int, last_only: bool) -> Tensor:
        theta = Fraction(float(self.threshold))
        starts = [theta * Fraction(value) for value in self.initial.expand(self.factors.shape[1]).tolist()]
        rows = [timesteps] if last_only else [*range(1, timesteps + 1)]
        refuse_many_steps(len(rows), timesteps, self.factors.shape[1])
        table = torch.empty(len(rows), timesteps, self.factors.shape[1], dtype=torch.float64)
        divisor, biases = int(self.divisor), self.bias.tolist()
        known: dict[Any, int] = {}
        for c, column in enumerate(self.factors.T.tolist()):
            same = known.setdefault((*column, biases[c], starts[c]), c)
            if same != c:  # a map of biases holds few different ones
                table[:, :, c] = table[:, :, same]
                continue
            gain = Fraction(1, divisor)
            for factor in column:
                gain *= abs(Fraction(factor))
            limits = integer_thresholds(theta, starts[c], Fraction(biases[c]), gain, rows, timesteps)
            table[:, :, c] = torch.from_numpy(limits)
        return table

    def forward(self, x: Tensor) -> Tensor:
        """Integers (T·B, *) -> spikes {0, 1} in float32 of the same shape."""
        call = _call()
        steps = call.timesteps
        table, sign, wide = self._ready(steps, call.firing, x.dtype)
        if wide and x.dtype == torch.float32:
            x = x.double()
            table, sign, _ = self._ready(steps, call.firing, x.dtype)
        if sign is not None:
            x = x * sign.to(x.dtype)
        x = x.unflatten(0, (steps, -1))
        if call.firing == "deferred":
            total = x.sum(0)
            count = torch.zeros_like(total)
            for k in range(steps):
                count += total >= shaped(table[0, k], self.shape)
            time = torch.arange(steps, device=x.device).view(-1, *[1] * total.dim())
            return (time < count).float().flatten(0, 1)
        spikes = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        total = x[0].clone()
        channels = table.shape[2]
        # where each neuron's threshold stands in a row of the table, k·n + c; a spike moves it on by n
        place = shaped(torch.arange(channels, device=x.device), self.shape).expand(x.shape[1:]).contiguous()
        for t in range(steps):
            if t == 0:
                limit = shaped(table[0, 0], self.shape)
            else:
                total += x[t]
                limit = table[t].flatten().index_select(0, place.view(-1)).view(place.shape)
            torch.ge(total, limit, out=spikes[t])
            if t + 1 < steps:
                place.add_(spikes[t].to(torch.int64), alpha=channels)
        return spikes.flatten(0, 1)
