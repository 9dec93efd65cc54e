"""The gates of a folded network: integer levels from exact rationals, and gates of real currents."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from qsnn.folded.firing import in_time, summed_up
from qsnn.folded.neurons import Current, Shape, least, shaped
from qsnn.folded.prepared import Prepared
from qsnn.graph.call import this_call


def _held(open_now: list[Tensor], firing: str) -> Tensor:
    """Decisions of every step, T tensors (B, *), as spikes (T·B, *); deferred the last one holds for all steps."""
    return torch.cat(open_now if firing == "online" else open_now[-1:] * len(open_now)).float()


class IntegerGate(Prepared):
    r"""A gate in integers: it is 1 at step t when :math:`A_t \ge M_t`.

    .. math:: M_t = \lceil t\,(\lambda - b_c) / g_c \rceil

    A_t is the integer input summed up to step t, g_c > 0 the current of one unit, b_c the bias of a step, λ the level.
    M is an integer, computed once per T from the exact rationals of the stored numbers. Deferred :math:`A_T \ge M_T`
    decides for all steps. It is the table of :class:`~qsnn.folded.integer.IntegerIF` with one level and no reset.

    Args:
        factors: numbers whose product over ``divisor``·T^``steps`` is g, (F, n) or (F, 1) float64.
        divisor: window elements of the pooling that the input went through.
        bias: b, (n,) or (1,) float64.
        level: λ, ().
        shape: in which the n values broadcast against an image; () for n = 1.
        spikes: whether the input are spikes, or sums of them: each is then counted as one accumulate.
        steps: how many sums over time the input is a product of.
    Shape:
        input and output: (T·B, \*).
    """

    is_spiking = True
    factors: Tensor
    divisor: Tensor
    bias: Tensor
    level: Tensor

    def __init__(
        self,
        factors: Tensor,
        divisor: int,
        bias: Tensor,
        level: Tensor,
        shape: Shape,
        *,
        spikes: bool = False,
        steps: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.spikes, self.steps = shape, spikes, steps
        channels = max(factors.shape[1], bias.shape[0])
        self.register_buffer("factors", factors.expand(-1, channels).clone())
        self.register_buffer("divisor", torch.tensor(divisor, dtype=torch.int64))
        self.register_buffer("bias", bias.expand(channels).clone())
        self.register_buffer("level", level.detach().double())

    @property
    def sign(self) -> Tensor:
        """Sign of g by channel, (n,)."""
        return torch.where(self.factors.prod(0) < 0, -1.0, 1.0).double()

    def table(self, timesteps: int) -> Tensor:
        """Return M by t, (T, n); made anew when a buffer changes."""
        make = lambda: self._exact_table(timesteps).to(self.factors.device)  # noqa: E731
        return self.kept(timesteps, make)  # type: ignore[no-any-return]

    def _exact_table(self, timesteps: int) -> Tensor:
        level, divisor = Fraction(float(self.level)), int(self.divisor) * timesteps**self.steps
        columns = [(*column, bias) for column, bias in zip(self.factors.T.tolist(), self.bias.tolist(), strict=True)]
        rows: dict[Any, list[float]] = {}
        for column in columns:
            if column not in rows:  # a map of biases holds few different ones
                gain = Fraction(1, divisor)
                for factor in column[:-1]:
                    gain *= abs(Fraction(factor))
                need = level - Fraction(column[-1])
                rows[column] = [least(t * need, gain) for t in range(1, timesteps + 1)]
        return torch.tensor([rows[column] for column in columns], dtype=torch.float64).T

    def forward(self, x: Tensor) -> Tensor:
        """Integers (T·B, *) -> gates {0, 1} in float32 of the same shape."""
        call = this_call()
        steps = call.timesteps
        sign = self.kept("sign", lambda: shaped(self.sign, self.shape))
        limits = self.kept(("limits", steps), lambda: [shaped(row, self.shape) for row in self.table(steps)])
        totals = summed_up(in_time(x.double() * sign, steps))
        return _held([total >= limit for total, limit in zip(totals, limits, strict=True)], call.firing)


class CurrentGate(Current):
    r"""A gate where currents meet, or that sees a real one: :math:`\sum_{i\le t} x_i \ge t\,\lambda`, in float64.

    Args:
        current: what :class:`~qsnn.folded.neurons.Current` takes; so do ``options``.
        level: λ, ().
    Shape:
        inputs and output: (T·B, \*).
    """

    is_spiking = True
    level: Tensor

    def __init__(self, *current: Any, level: Tensor, **options: Any) -> None:
        super().__init__(*current, **options)
        self.register_buffer("level", level.detach().double())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Gates {0, 1} in float32, (T·B, *)."""
        call = this_call()
        steps = call.timesteps
        levels = self.kept(("levels", steps), lambda: [t * self.level for t in range(1, steps + 1)])
        totals = self.totals(inputs, steps)
        return _held([total >= level for total, level in zip(totals, levels, strict=True)], call.firing)
