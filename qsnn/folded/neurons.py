"""The neurons of a folded network: integer thresholds from exact rationals, and neurons of real currents."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from qsnn.folded.layers import EXACT_FLOAT32, Timed
from qsnn.snn.equations import Dynamics, deferred, integrated, per_channel, simulate


class Current(Timed):
    r"""The real current of a step, :math:`\sum_j g_j A_j + b`, in float64, added in graph order.

    Args:
        factors: for each input, the numbers whose product over ``divisor`` is g_j, (F, C) or (F, 1).
        divisors: for each input the number of window elements of the pooling it went through.
        bias: b of each step, (C,) or (1,).
    """

    divisors: Tensor
    bias: Tensor

    def __init__(self, factors: list[Tensor], divisors: list[int], bias: Tensor) -> None:
        super().__init__()
        for index, factor in enumerate(factors):
            self.register_buffer(f"factors_{index}", factor)
        self.register_buffer("divisors", torch.tensor(divisors, dtype=torch.int64))
        self.register_buffer("bias", bias)

    def gain(self, index: int, dims: int) -> Tensor:
        """g_j in float64, shaped to multiply a tensor of ``dims`` dimensions."""
        factors: Tensor = getattr(self, f"factors_{index}")
        return per_channel(factors.prod(0) / self.divisors[index], dims)

    def forward(self, *inputs: Tensor) -> Tensor:
        """(T·B, C, *) for each input -> (T·B, C, *)."""
        total = self.gain(0, inputs[0].dim()) * inputs[0].double()
        for index, x in enumerate(inputs[1:], 1):
            total = total + self.gain(index, x.dim()) * x.double()
        return total + per_channel(self.bias, total.dim())


class CurrentIF(Current):
    """An IF neuron where currents meet, or that sees a real current: it fires when S >= (k + ½)·θ, in float64."""

    is_spiking = True
    threshold: Tensor
    initial: Tensor

    def __init__(
        self, factors: list[Tensor], divisors: list[int], bias: Tensor, threshold: Tensor, initial: Tensor | float
    ) -> None:
        super().__init__(factors, divisors, bias)
        self.register_buffer("threshold", threshold.double())
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.float64))

    def theta(self, dims: int) -> Tensor:
        """θ, shaped to multiply a tensor of ``dims`` dimensions."""
        return per_channel(self.threshold, dims)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Spikes {0, 1} in float32, (T·B, C, *)."""
        steps = self.steps
        dims = inputs[0].dim()
        sums = [x.double().unflatten(0, (steps, -1)).cumsum(0) for x in inputs]
        total = self.gain(0, dims) * sums[0]
        for index, x in enumerate(sums[1:], 1):
            total = total + self.gain(index, dims) * x
        time = torch.arange(1, steps + 1, device=total.device).view(-1, *[1] * dims)
        total = total + time * per_channel(self.bias, dims)
        theta, offset = self.theta(dims), per_channel(1.0 - self.initial, dims)
        if self.firing == "deferred":
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


class RealIF(Timed):
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
        theta = x.new_ones(()) if self.unit else self.threshold.to(x.dtype)
        theta = per_channel(theta, x.dim())
        x = x.expand(self.steps, *x.shape) if self.constant and not self.in_time else x.unflatten(0, (self.steps, -1))
        start = per_channel(self.initial.to(x.dtype), x.dim() - 1) * theta
        return (deferred if self.firing == "deferred" else integrated)(x, theta, start)[0].flatten(0, 1)


class DynamicIF(CurrentIF):
    """A neuron with another reset, leak, signed spikes or a membrane of few bits: its equation in float64."""

    tau: Tensor | None

    def __init__(
        self,
        factors: list[Tensor],
        divisors: list[int],
        bias: Tensor,
        threshold: Tensor,
        initial: Tensor | float,
        dynamics: Dynamics,
        tau: Tensor | None,
    ) -> None:
        super().__init__(factors, divisors, bias, threshold, initial)
        self.dynamics = dynamics
        self.register_buffer("tau", tau)
        self.overflows = 0
        """How many potentials did not fit into ``dynamics.state_bits`` since the network was folded."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Spikes {0, 1}, or {-1, 0, 1} where signed, in float32, (T·B, C, *)."""
        current = Current.forward(self, *inputs).unflatten(0, (self.steps, -1))
        dims = current.dim() - 1
        theta, tau = self.theta(dims), None if self.tau is None else per_channel(self.tau, dims)
        start = (per_channel(self.initial, dims) * theta).expand_as(current[0])
        spikes, _, overflows = simulate(current, theta, start, self.dynamics, tau)
        self.overflows += overflows
        return spikes.float().flatten(0, 1)


class IntegerIF(Timed):
    r"""An IF neuron in integers: it fires at step t, after k spikes, when :math:`A_t \ge M_{t,k}`.

    .. math:: M_{t,k} = \lceil ((k + 1)\,\theta - v_0 - t\,b_c) / g_c \rceil

    A_t is the integer input summed up to step t, g_c > 0 the current of one unit, b_c the bias of a step. M is an
    integer, computed once per T from the exact rationals of the stored numbers. A channel with g_c = 0 fires by its
    bias alone: M is -∞ or ∞.

    Args:
        factors: numbers whose product over ``divisor`` is g, (F, C) or (F, 1) float64.
        divisor: window elements of the pooling that the input went through.
        bias: b, (C,) or (1,) float64.
        threshold: θ, scalar.
        initial: v₀ / θ, scalar or (C,).
        input_bound: largest absolute input of a step.
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
    ) -> None:
        super().__init__()
        channels = max(factors.shape[1], bias.shape[0], torch.as_tensor(initial).numel())
        self.register_buffer("factors", factors.expand(-1, channels).clone())
        self.register_buffer("divisor", torch.tensor(divisor, dtype=torch.int64))
        self.register_buffer("bias", bias.expand(channels).clone())
        self.register_buffer("threshold", threshold.double())
        self.register_buffer("input_bound", torch.tensor(input_bound, dtype=torch.float64))
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.float64))
        self._tables: dict[tuple[int, bool], Tensor] = {}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._tables = {}
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def sign(self) -> Tensor:
        """Sign of g by channel, (C,)."""
        return torch.where(self.factors.prod(0) < 0, -1.0, 1.0)

    def table(self, timesteps: int, firing: str) -> Tensor:
        """Return M, (T, T, C) by t and k, of which only k < t count; deferred only its last row, (1, T, C)."""
        key = (timesteps, firing == "deferred")
        if key not in self._tables:
            self._tables[key] = self._exact_table(*key).to(self.factors.device)
        return self._tables[key]

    def _exact_table(self, timesteps: int, last_only: bool) -> Tensor:
        theta = Fraction(float(self.threshold))
        starts = [theta * Fraction(value) for value in self.initial.expand(self.factors.shape[1]).tolist()]
        rows = [timesteps] if last_only else range(1, timesteps + 1)
        table = torch.full((len(rows), timesteps, self.factors.shape[1]), float("inf"), dtype=torch.float64)
        for c, column in enumerate(self.factors.T.tolist()):
            gain = Fraction(1, int(self.divisor))
            for factor in column:
                gain *= abs(Fraction(factor))
            bias = Fraction(float(self.bias[c]))
            for row, t in enumerate(rows):
                for k in range(t):
                    need = (k + 1) * theta - starts[c] - t * bias
                    if gain == 0:
                        table[row, k, c] = -float("inf") if need <= 0 else float("inf")
                    else:
                        limit = -((-need.numerator * gain.denominator) // (need.denominator * gain.numerator))
                        table[row, k, c] = (
                            float(limit) if abs(limit) < 2**52 else float("inf") * (1 if limit > 0 else -1)
                        )
        return table

    def forward(self, x: Tensor) -> Tensor:
        """Integers (T·B, C, *) -> spikes {0, 1} in float32 of the same shape."""
        steps = self.steps
        sign = self.sign
        if bool((sign < 0).any()):
            x = x * per_channel(sign, x.dim()).to(x.dtype)
        if x.dtype == torch.float32 and float(self.input_bound) * steps >= EXACT_FLOAT32:
            x = x.double()
        dims = x.dim()
        x = x.unflatten(0, (steps, -1))
        table = self.table(steps, self.firing).to(x.dtype)
        if self.firing == "deferred":
            total = x.sum(0)
            count = torch.zeros_like(total)
            for k in range(steps):
                count += total >= per_channel(table[0, k], dims)
            time = torch.arange(steps, device=x.device).view(-1, *[1] * dims)
            return (time < count).float().flatten(0, 1)
        spikes = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        total = x[0].clone()
        channels = table.shape[2]
        # where each neuron's threshold stands in a row of the table, k·C + c; a spike moves it on by C
        place = per_channel(torch.arange(channels, device=x.device), dims).expand(x.shape[1:]).contiguous()
        for t in range(steps):
            if t == 0:
                limit = per_channel(table[0, 0], dims)
            else:
                total += x[t]
                limit = table[t].flatten().index_select(0, place.view(-1)).view(place.shape)
            torch.ge(total, limit, out=spikes[t])
            if t + 1 < steps:
                place.add_(spikes[t].to(torch.int64), alpha=channels)
        return spikes.flatten(0, 1)
