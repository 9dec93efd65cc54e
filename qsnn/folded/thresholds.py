"""Integer thresholds from exact rationals, as arrays: float64 where it decides for certain, whole numbers elsewhere."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_TABLE_BYTES = 2**30
"""What the integer thresholds of one layer may take [byte]."""
_LARGEST = 2**52
"""A threshold of this size or more is never met, or always: no sum of integers comes so far."""


def refuse_many_steps(rows: int, steps: int, channels: int) -> None:
    """Refuse a table that would not fit: online there are T² thresholds a channel.

    Raises:
        ValueError: T, what it would take, and the largest T.
    """
    needed = rows * steps * channels * 8
    if needed > MOST_TABLE_BYTES:
        most = math.isqrt(MOST_TABLE_BYTES // (8 * channels)) if rows > 1 else MOST_TABLE_BYTES // (8 * channels)
        raise ValueError(
            f"expected at most T = {most} steps, got {steps}: the thresholds of a layer of {channels} channels would "
            f"take {needed / 2**30:.1f} GiB" + ("; deferred firing takes T times less" if rows > 1 else "")
        )


def integer_thresholds(
    theta: Fraction, start: Fraction, bias: Fraction, gain: Fraction, rows: list[int], steps: int
) -> NDArray[np.float64]:
    r"""Return :math:`M_{t,k} = \lceil ((k + 1)\,\theta - v_0 - t\,b) / g \rceil` for one channel.

    Args:
        theta, start, bias, gain: θ > 0, v₀, b and g >= 0, exactly.
        rows: the t's.
        steps: k goes from 0 to steps - 1.
    Shape:
        returned: (len(rows), steps); infinite where k >= t, and where no input or every input reaches the threshold.
    """
    t, k = np.array(rows, dtype=np.int64)[:, None], np.arange(1, steps + 1, dtype=np.int64)[None]
    scale = math.lcm(theta.denominator, start.denominator, bias.denominator)
    a, s, b = (int(value * scale) * gain.denominator for value in (theta, start, bias))
    q = scale * gain.numerator
    common = math.gcd(a, s, b, q)
    a, s, b, q = a // common, s // common, b // common, q // common
    if q == 0:
        need = k.astype(object) * a - s - t.astype(object) * b
        table = np.where((need <= 0).astype(bool), -np.inf, np.inf)
    elif max(rows[-1] * (abs(a) + abs(b)) + abs(s), q) < 2**62:
        table = _as_float(-((s + t * b - k * a) // q))
    else:
        table = _mostly_float(a, s, b, q, t, k)
    table[k > t] = np.inf
    return table


def _as_float(limits: NDArray[Any]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = limits.astype(np.float64)
    found[limits >= _LARGEST] = np.inf
    found[limits <= -_LARGEST] = -np.inf
    return found


def _mostly_float(a: int, s: int, b: int, q: int, t: NDArray[np.int64], k: NDArray[np.int64]) -> NDArray[np.float64]:
    """⌈(k·a - s - t·b) / q⌉: in float64, and once more in whole numbers where its error could matter."""
    try:
        x, y, z = (float(Fraction(value, q)) for value in (a, s, b))  # each rounded once
    except OverflowError:
        x = y = z = math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        about = k * x - y - t * z
        error = 2.0**-50 * (k * abs(x) + abs(y) + t * abs(z))
        table: NDArray[np.float64] = np.ceil(about)
        table[about - error > 2.0 * _LARGEST] = np.inf
        table[about + error < -2.0 * _LARGEST] = -np.inf
        sure = np.isinf(table) | ((np.abs(about - np.rint(about)) > error) & (np.abs(about) < _LARGEST / 2))
    at = np.nonzero(~sure & (k <= t))
    for row, column in zip(*(axis.tolist() for axis in at), strict=True):
        limit = -((s + int(t[row, 0]) * b - int(k[0, column]) * a) // q)
        table[row, column] = float(limit) if abs(limit) < _LARGEST else math.inf if limit > 0 else -math.inf
    return table
