"""Real gains as integers, and the proof, over all inputs, that every comparison comes out as fold() makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qsnn.folded.integer import IntegerIF
from qsnn.folded.neurons import Current, CurrentIF

GRID = 1_000_000
"""Most combinations of the other inputs that are gone through for one channel and threshold."""
PRECISIONS = range(3, 49)
"""Bits of a gain that are tried, the least first."""
Ranges = list[tuple[np.ndarray, np.ndarray]]
"""For each input its least and largest integer, by channel, (C,) or (1,): of a step, or deferred of all T together."""


@dataclass(frozen=True)
class Limits:
    r"""A neuron in integers: it fires at step t, after k spikes, when :math:`\sum_j G_{jc} A_j \ge L_{tkc}`.

    Shape:
        gains: (J, n); limits: (T·(T+1)/2, n) by t·(t-1)/2 + k, or where it fires deferred (T, n) by k; int64.
        n is 1, one a channel, or one a neuron.
    """

    gains: np.ndarray
    limits: np.ndarray


def limits_of(
    neuron: IntegerIF | CurrentIF, ranges: Ranges, timesteps: int, firing: str, shape: tuple[int, ...]
) -> Limits:
    """Return a folded neuron as integers that decide as it does, for all inputs within ``ranges``.

    An :class:`~qsnn.folded.integer.IntegerIF` is its own table. For a :class:`~qsnn.folded.neurons.CurrentIF`, which
    adds :math:`g_j A_j` in float64, the least A₀ that fires is found with fold()'s own float64 for every value of the
    other inputs; then the gains get as few bits as still divide what fires from what does not.

    Args:
        neuron: as fold() made it; all its inputs are integers.
        ranges: what the inputs can be.
        timesteps: T.
        firing: "online" or "deferred".
        shape: of one image of the neuron's spikes, (C, *).
    Raises:
        ValueError: the inputs have too many combinations, or no gains of 48 bits divide them.
    """
    pairs = [(t, k) for t in range(1, timesteps + 1) for k in range(t) if firing == "online" or t == timesteps]
    if isinstance(neuron, IntegerIF):
        table, sign = neuron.table(timesteps, firing).cpu().numpy(), neuron.sign.cpu().numpy()
        rows = [_columns(table[0 if firing == "deferred" else t - 1, k], neuron.shape, shape) for t, k in pairs]
        sign = _columns(sign, neuron.shape, shape)
        count = max(x.size for x in (sign, rows[0], *ranges[0]))
        sign, low, high = (alike(x, count) for x in (sign, *ranges[0]))
        low, high = np.where(sign < 0, -high, low), np.where(sign < 0, -low, high)
        limits = []
        for row, (t, _) in zip(rows, pairs, strict=True):  # beyond what the sums reach, any limit says the same
            reach = 1 if firing == "deferred" else t
            limits.append(np.clip(alike(row, count), low * reach, high * reach + 1).astype(np.int64))
        return Limits(sign.astype(np.int64)[None], np.stack(limits))
    given = [neuron.gain(j, timesteps) for j in range(len(ranges))]
    dims = len(shape) + 1
    given += [neuron.step_bias, neuron.theta(dims), *(neuron.offset(t, dims) for t in range(1, timesteps + 1))]
    columns = [_columns(x.double().cpu().numpy().reshape(-1), tuple(x.shape), shape) for x in given]
    count = max(x.size for x in (*columns, *(a for pair in ranges for a in pair)))
    columns = [alike(x, count) for x in columns]
    gains, (bias, theta, *offsets) = columns[: len(ranges)], columns[len(ranges) :]
    spans = [(alike(low, count), alike(high, count)) for low, high in ranges]
    reaches = [(t, k, 1 if firing == "deferred" else t) for t, k in pairs]
    known: dict[Any, tuple[list[int], list[int]]] = {}
    found = []
    for c in range(count):
        weights = [float(g[c]) for g in gains]
        fixed = (float(bias[c]), float(theta[c]), tuple(float(x[c]) for x in offsets))
        span = [(int(low[c]), int(high[c])) for low, high in spans]
        key = (*weights, fixed, *span)
        if key not in known:  # a map of biases holds few different ones
            known[key] = _channel(weights, fixed, span, reaches)
        found.append(known[key])
    return Limits(np.array([g for g, _ in found]).T.copy(), np.array([limits for _, limits in found]).T.copy())


def _columns(x: np.ndarray, held: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Values that broadcast in the shape ``held`` against an image (C, *): (1,), (C,), or one a neuron."""
    if x.size == 1:
        return x.reshape(1)
    if held[0] == x.size == shape[0]:
        return x
    return np.broadcast_to(x.reshape(held), shape).reshape(-1)


def alike(x: np.ndarray, count: int) -> np.ndarray:
    """(1,), (C,) or one a neuron, as ``count`` columns."""
    if x.size == count:
        return x
    return np.broadcast_to(x, (count,)) if x.size == 1 else np.repeat(x, count // x.size)


def weighted_range(weight: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and largest sums of a layer of weights (O, fan-in) over inputs within low to high, or zeros: (O,)."""
    least, most = min(0, int(low.min())), max(0, int(high.max()))
    up, down = np.maximum(weight, 0).sum(1), np.minimum(weight, 0).sum(1)
    return (up * least + down * most).astype(np.int64), (up * most + down * least).astype(np.int64)


def _channel(
    gains: list[float],
    fixed: tuple[float, float, tuple[float, ...]],
    ranges: list[tuple[int, int]],
    pairs: list[tuple[int, int, int]],
) -> tuple[list[int], list[int]]:
    """One channel's integer gains and limits, from its bias, θ, and 1 - v₀/θ at each step."""
    pivot = max(range(len(gains)), key=lambda j: ranges[j][1] - ranges[j][0])
    cuts = [_cut(gains, fixed, ranges, pivot, *pair) for pair in pairs]
    if len(gains) == 1:
        return [-1 if gains[0] < 0 else 1], [int(least[0]) for _, least, _, _ in cuts]
    largest = max(map(abs, gains)) or 1.0
    for bits in PRECISIONS:
        scale = 2.0 ** (bits - np.frexp(largest)[1])
        whole = [round(g * scale) for g in gains]
        limits = [_divide(whole, pivot, cut) for cut in cuts]
        if None not in limits:
            return whole, [int(limit) for limit in limits if limit is not None]
    raise ValueError("its currents cannot be told apart with gains of 48 bits")


Cut = tuple[list[np.ndarray], np.ndarray, int, int]
"""The other inputs' values, the least firing value of σ·pivot for each, and the range of σ·pivot."""


def _cut(
    gains: list[float],
    fixed: tuple[float, float, tuple[float, ...]],
    ranges: list[tuple[int, int]],
    pivot: int,
    t: int,
    k: int,
    reach: int,
) -> Cut:
    """Where the neuron's own float64 begins to fire, in the input ``pivot``, for every value of the others."""
    bias, theta, offsets = fixed
    others = [j for j in range(len(gains)) if j != pivot]
    if np.prod([(ranges[j][1] - ranges[j][0]) * reach + 1 for j in others], dtype=float) > GRID:
        raise ValueError(f"its inputs have more than {GRID:,} combinations")
    axes = [np.arange(ranges[j][0] * reach, ranges[j][1] * reach + 1) for j in others]
    grid = dict(zip(others, (g.reshape(-1) for g in np.meshgrid(*axes, indexing="ij")), strict=True))
    size = next(iter(grid.values())).size if grid else 1
    sign = -1 if gains[pivot] < 0 else 1
    low, high = sorted((sign * ranges[pivot][0] * reach, sign * ranges[pivot][1] * reach))

    def total(x: np.ndarray) -> np.ndarray:
        """S as CurrentIF.forward adds it, in the same order."""
        values = [(sign * x if j == pivot else grid[j]).astype(np.float64) for j in range(len(gains))]
        s = gains[0] * values[0]
        for g, value in zip(gains[1:], values[1:], strict=True):
            s = s + g * value
        return s + t * bias

    need = (k + offsets[t - 1]) * theta
    at_zero = total(np.zeros(size))
    with np.errstate(divide="ignore", invalid="ignore"):
        guess = np.ceil((need - at_zero) / abs(gains[pivot]))
    start = np.clip(np.nan_to_num(guess, nan=low, posinf=high, neginf=low), low, high).astype(np.int64) - 2
    least = np.maximum(start, low)
    for _ in range(5):  # rounding moves the guess by a unit at most; the check below says if ever by more
        least = least + ((total(least) < need) & (least <= high))
    wrong = ((least <= high) & (total(least) < need)) | ((least > low) & (total(least - 1) >= need))
    if wrong.any():
        raise ValueError("its threshold could not be found")
    return [grid[j] for j in others], least, low, high


def _divide(gains: list[int], pivot: int, cut: Cut) -> int | None:
    """A limit between what fires and what does not, or None where these gains mix them."""
    values, least, low, high = cut
    rest = [g for j, g in enumerate(gains) if j != pivot]
    other = sum(g * value for g, value in zip(rest, values, strict=True))
    step = abs(gains[pivot])
    fires, silent = least <= high, least > low
    above = (step * least + other)[fires]
    below = (step * (least - 1) + other)[silent]
    if not above.size:
        return int(below.max()) + 1
    limit = int(above.min())
    return limit if not below.size or limit > int(below.max()) else None


@dataclass(frozen=True)
class Scores:
    r"""Logits in integers, :math:`2^s T m_k = \sum_j G_{jk} A_j + B_k`, A summed over T steps."""

    gains: list[list[int]]
    bias: list[int]
    exact: bool
    """Whether G and B are the float64 gains and biases without rounding; else they differ by less than 2**-70."""


def scores_of(readout: Current, ranges: Ranges, timesteps: int, firing: str, classes: int) -> Scores:
    """Return the last layer's float64 gains and biases as integers with one scale, so that argmax needs no float.

    Raises:
        ValueError: a sum of a last layer that is too large for two words of 32 and 64 bit.
    """
    gains = [readout.gain(j, timesteps).double().cpu().numpy().reshape(-1) for j in range(len(ranges))]
    gains = [np.broadcast_to(g, (classes,)) for g in gains]
    bias = np.broadcast_to(readout.bias.double().cpu().numpy().reshape(-1), (classes,))
    reach = 1 if firing == "deferred" else timesteps
    most = [max(int(np.abs(a).max()), int(np.abs(b).max())) * reach for a, b in ranges]
    if sum(most) >= 2**29:
        raise ValueError(f"its sums reach {sum(most):,}, which does not fit")
    numbers = [float(x) for x in np.concatenate([*gains, bias]) if x]
    finest = max((_fraction_bits(x) for x in numbers), default=0)
    largest = sum(float(np.abs(g).max()) * m for g, m in zip(gains, most, strict=True))
    largest = max(largest, timesteps * float(np.abs(bias).max()))
    room = 92 - int(np.frexp(largest or 1.0)[1])
    shift = min(finest, room)
    return Scores(
        [[_scaled(float(x), shift) for x in g] for g in gains],
        [timesteps * _scaled(float(x), shift) for x in bias],
        finest <= room,
    )


def _fraction_bits(x: float) -> int:
    """s of the coarsest 2**-s that x is a multiple of."""
    top, bottom = x.as_integer_ratio()
    return bottom.bit_length() - 1 if bottom > 1 else 1 - (top & -top).bit_length()


def _scaled(x: float, shift: int) -> int:
    """The integer nearest to x·2**shift, a half upwards."""
    top, bottom = x.as_integer_ratio()
    top, bottom = (top << shift, bottom) if shift >= 0 else (top, bottom << -shift)
    return (2 * top + bottom) // (2 * bottom)
