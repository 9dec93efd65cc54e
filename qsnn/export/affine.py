"""A neuron's integer thresholds as one multiplication, one addition and one rounding, proved for every input."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MARGIN = 2.0**-22
"""Relative distance that every product keeps from a half [1]; float32 arithmetic errs by 2**-24."""
_GRID = np.linspace(0.0, 1.0, 67)[1:-1]


def affine(
    limits: NDArray[np.int64], bound: NDArray[np.int64], factor: int = 1, *, whole: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.float64]] | None:
    r"""Find m > 0 and β of each channel so that rounding counts the limits that A has reached.

    .. math:: \mathrm{clip}(\mathrm{round}(m\,(d A + \beta)), 0, K) = |\{k : A \ge M_k\}|
        \quad\text{for every integer } |A| \le B

    With p = 1/m the k-th boundary of the rounding lies at (k + ½)·p − β; it has to lie between d·(M_k − 1) and d·M_k,
    where the sum d·A has no value. Two boundaries i < j are (j − i)·p apart, which bounds p from both sides; for a p
    the windows bound β. Whatever is found is proved at both ends of every window: the left side never falls with A, so
    these 2·K points hold for all A, and each keeps :data:`MARGIN` from a tie, more than a runtime's float32 can err.

    Args:
        limits: M, integers that rise along k.
        bound: B >= 0, largest absolute A.
        factor: d >= 1, what the weights are multiplied by; a larger one leaves more room for a whole β.
        whole: β must be an integer (a bias in int32).
    Shape:
        limits: (K, C); bound, m and β: (C,).
    Returns:
        m in float32 and β, or None where some channel has no such numbers.
    """
    count = len(limits)
    steps: NDArray[np.float64] = np.arange(count, dtype=np.float64) + 0.5
    d = float(factor)
    top = np.maximum(bound, 0).astype(np.float64)
    m = np.clip(limits.astype(np.float64), -top, top + 1)
    always, never = m <= -top, m > top
    low = np.where(always, -np.inf, np.where(never, d * top, d * (m - 1)))
    high = np.where(never, np.inf, np.where(always, -d * top, d * m))
    if (d * top).max(initial=0) >= 2**30:  # a sum in int32
        return None
    if count == 1:  # one boundary: a p so large that the rounding never passes 1, and no clip is needed; one for all
        p = np.full_like(top, 2 * d * top.max(initial=0) + 4 + (d % 2))
        middle = np.where(always, -d * top - d / 2, np.where(never, d * top + d / 2, d * m - d / 2))[0]
        return _proved(p, p / 2 - middle, low, high, steps)
    first, second = np.triu_indices(count, 1)
    apart = (second - first)[:, None]
    least = np.maximum(((low[second] - high[first]) / apart).max(0), 2.0**-6)
    most = np.minimum(((high[second] - low[first]) / apart).min(0), 2 * least + 8 * d * top + 8)
    if (least >= most).any():
        return None
    p = least + _GRID[:, None] * (most - least)  # (grid, C)
    edges = steps[:, None, None] * p  # (K, grid, C)
    least_b, most_b = (edges - high[:, None]).max(0), (edges - low[:, None]).min(0)
    least_b = np.where(np.isinf(least_b), most_b - 2 * p, least_b)
    most_b = np.where(np.isinf(most_b), least_b + 2 * p, most_b)
    beta = (least_b + most_b) / 2
    beta = np.round(beta) if whole else np.round(beta * 64) / 64
    room = np.minimum(beta - least_b, most_b - beta) / p
    best = room.argmax(0)[None]
    p, beta = (np.take_along_axis(x, best, 0)[0] for x in (p, beta))
    return _proved(p, beta, low, high, steps)


def _proved(
    p: NDArray[np.float64],
    beta: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    steps: NDArray[np.float64],
) -> tuple[NDArray[np.float32], NDArray[np.float64]] | None:
    """m and β if every end of every window rounds to the right side of its half, with :data:`MARGIN`; else None."""
    m = (1.0 / p).astype(np.float32)
    edge, product = steps[:, None], m.astype(np.float64)
    with np.errstate(invalid="ignore"):
        below = np.isinf(low) | ((low + beta) * product < edge * (1 - MARGIN))
        above = np.isinf(high) | ((high + beta) * product > edge * (1 + MARGIN))
    fits = bool(below.all() and above.all() and (m > 0).all() and (np.abs(beta) < 2**30).all())
    return (m, beta) if fits else None
