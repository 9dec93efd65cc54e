"""The neuron of a folded network in integers: thresholds from exact rationals."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qsnn.folded import firing
from qsnn.folded.layers import EXACT_FLOAT32, EXACT_FLOAT64
from qsnn.folded.neurons import Shape, shaped
from qsnn.folded.prepared import Prepared
from qsnn.folded.thresholds import integer_thresholds, refuse_many_steps
from qsnn.graph.call import this_call


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
        call = this_call()
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
