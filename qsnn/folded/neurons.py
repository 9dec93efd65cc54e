"""The neurons of a folded network: integer thresholds from exact rationals, and neurons of real currents."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qsnn.folded import firing
from qsnn.folded.layers import EXACT_FLOAT32, EXACT_FLOAT64
from qsnn.folded.prepared import Prepared
from qsnn.folded.thresholds import integer_thresholds, refuse_many_steps
from qsnn.graph.call import Call, current
from qsnn.snn.equations import Dynamics, deferred, integrated, later, offset_at, per_channel, pushed, simulate

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
        return self.added(inputs, _call().timesteps) + self.step_bias


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
        call = _call()
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
        call = _call()
        theta, start, pushes = self.kept((x.dtype, x.dim()), lambda: self._shaped(x.dtype, x.dim()))
        once = self.constant and not call.frames
        x = x.expand(call.timesteps, *x.shape) if once else x.unflatten(0, (call.timesteps, -1))
        x = pushed(x, pushes)
        return (deferred if call.firing == "deferred" else integrated)(x, theta, start)[0].flatten(0, 1)

    def _shaped(self, dtype: torch.dtype, dims: int) -> tuple[Tensor, Tensor, Tensor | None]:
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
        currents = Current.forward(self, *inputs).unflatten(0, (_call().timesteps, -1))
        dims = currents.dim() - 1
        theta, tau = self.theta(dims), None if self.tau is None else per_channel(self.tau, dims)
        start = (per_channel(offset_at(self.initial, 1), dims) * theta).expand_as(currents[0])
        currents = pushed(currents, later(self.initial, theta, dims))
        spikes, _, overflows = simulate(currents, theta, start, self.dynamics, tau)
        self.overflows += overflows
        return spikes.float().flatten(0, 1)


def _steps_of(starts: tuple[Fraction, ...], rows: list[int]) -> list[tuple[Fraction, slice]]:
    """Which rows of a table have which v_t: each of the first S steps its own, all later ones the last."""
    if rows[0] >= len(starts):
        return [(starts[-1], slice(None))]
    few = len(starts) - 1
    return [*((starts[t], slice(t, t + 1)) for t in range(few)), (starts[-1], slice(few, None))]


class IntegerIF(Prepared):
    r"""An IF neuron in integers: it fires at step t, after k spikes, when :math:`A_t \ge M_{t,k}`.

    A signed one takes a spike back, -1, when :math:`A_t < M_{t,k-1}`.

    .. math:: M_{t,k} = \lceil ((k + 1)\,\theta - v_t - t\,b_c) / g_c \rceil

    A_t is the integer input summed up to step t, g_c > 0 the current of one unit, b_c the bias of a step, v_t all that
    was put into the potential up to step t, mostly v₀ alone. M is an integer, computed once per T from the exact
    rationals of the stored numbers. A channel with g_c = 0 fires by its bias alone: M is -∞ or ∞.

    Args:
        factors: numbers whose product over ``divisor``·T^``steps`` is g, (F, n) or (F, 1) float64.
        divisor: window elements of the pooling that the input went through.
        bias: b, (n,) or (1,) float64.
        threshold: θ, scalar.
        initial: v₀ / θ, scalar or (n,), or (S, n): a row for each of the first S steps.
        input_bound: largest absolute input of a step; times T^``steps``.
        shape: in which the n values broadcast against an image; () for n = 1.
        steps: how many sums over time the input is a product of.
        signed: whether spikes are -1 too.
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
        *,
        steps: int = 0,
        signed: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.steps, self.signed = shape, steps, signed
        channels = max(factors.shape[1], bias.shape[0], *torch.as_tensor(initial).shape[-1:])
        self.register_buffer("factors", factors.expand(-1, channels).clone())
        self.register_buffer("divisor", torch.tensor(divisor, dtype=torch.int64))
        self.register_buffer("bias", bias.expand(channels).clone())
        self.register_buffer("threshold", threshold.double())
        self.whole = False
        """Whether deferred it gets the sums over T, (B, *): see :func:`~qsnn.folded.whole.in_one_`."""
        self.register_buffer("input_bound", torch.tensor(input_bound, dtype=torch.float64))
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.float64))

    @property
    def sign(self) -> Tensor:
        """Sign of g by channel, (n,)."""
        return torch.where(self.factors.prod(0) < 0, -1.0, 1.0)

    def table(self, timesteps: int, firing: str) -> Tensor:
        """Return M, (T, T, n) by t and k, of which only k < t count; deferred only its last row, (1, T, n)."""
        last_only = firing == "deferred"
        make = lambda: self._exact_table(timesteps, last_only).to(self.factors.device)  # noqa: E731
        return self.kept((timesteps, last_only), make)  # type: ignore[no-any-return]

    def _ready(self, timesteps: int, firing_: str, dtype: torch.dtype, dims: int) -> Any:
        """The dtype in which T steps are exact, the sign where a gain is negative, and M in the form that is asked."""
        most = float(self.input_bound) * timesteps ** (self.steps + 1)
        if dtype == torch.float32 and most >= EXACT_FLOAT32:
            dtype = torch.float64
        sign = self.sign
        negative = shaped(sign, self.shape).to(dtype) if bool((sign < 0).any()) else None
        edge = EXACT_FLOAT32 if dtype == torch.float32 else EXACT_FLOAT64
        table = self.table(timesteps, firing_)
        if most < edge:  # a limit that no sum reaches says the same at the edge, where differences are exact
            table = table.clamp(-edge, edge)
        table = table.to(dtype)
        if firing_ == "online" and timesteps > firing.COMPARED:
            return dtype, negative, table
        # each limit has a dimension for the batch, so that it is as many as a sum has
        shape = (1,) * (dims - len(self.shape)) + self.shape
        rows = [[limit.expand(math.prod(shape)).view(shape) for limit in row] for row in table]
        if firing_ == "deferred":
            return dtype, negative, rows[0]
        if timesteps == 2 and most < edge:
            (first, _), (later, again) = rows
            return dtype, negative, (first, later, again - later)
        return dtype, negative, [row[: t + 1] for t, row in enumerate(rows)]

    def _exact_table(self, timesteps: int, last_only: bool) -> Tensor:
        theta = Fraction(float(self.threshold))
        given = torch.atleast_2d(self.initial)
        given = given.expand(len(given), self.factors.shape[1])[:timesteps].T.tolist()
        # v_t by channel: of the first S steps, and from then on
        starts = [tuple(accumulate(theta * Fraction(value) for value in column)) for column in given]
        rows = [timesteps] if last_only else [*range(1, timesteps + 1)]
        refuse_many_steps(len(rows), timesteps, self.factors.shape[1])
        table = torch.empty(len(rows), timesteps, self.factors.shape[1], dtype=torch.float64)
        divisor, biases = int(self.divisor) * timesteps**self.steps, self.bias.tolist()
        known: dict[Any, int] = {}
        for c, column in enumerate(self.factors.T.tolist()):
            same = known.setdefault((*column, biases[c], starts[c]), c)
            if same != c:  # a map of biases holds few different ones
                table[:, :, c] = table[:, :, same]
                continue
            gain = Fraction(1, divisor)
            for factor in column:
                gain *= abs(Fraction(factor))
            for start, some in _steps_of(starts[c], rows):
                limits = integer_thresholds(theta, start, Fraction(biases[c]), gain, rows[some], timesteps)
                table[some, :, c] = torch.from_numpy(limits)
        return table

    def forward(self, x: Tensor) -> Tensor:
        """Integers (T·B, *) -> spikes in float32, (T·B, *); deferred from sums over T, (B, *), if ``whole``."""
        call = _call()
        steps, key = call.timesteps, (call.timesteps, call.firing, x.dtype, x.dim())
        dtype, sign, limits = self.kept(key, lambda: self._ready(*key))
        x = x.to(dtype)
        if sign is not None:
            x = x * sign
        if call.firing == "deferred":
            return firing.deferred(x if self.whole else firing.total(x, steps), limits)
        totals = firing.summed_up(firing.in_time(x, steps))
        if isinstance(limits, tuple):
            return firing.twice(totals, *limits, signed=self.signed)
        if steps <= firing.COMPARED:
            return firing.online(totals, limits, signed=self.signed)
        channels = limits.shape[2]
        # where each neuron's threshold stands in a row of the table, k·n + c; a spike moves it on by n
        first = shaped(torch.arange(channels, device=x.device), self.shape).expand(x.shape[1:])
        return firing.one_by_one(
            totals,
            lambda t, fired: limits[t].flatten()[first + channels * fired.to(torch.int64)],
            signed=self.signed,
        )
