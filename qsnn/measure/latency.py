"""Times of networks side by side: each has its turn, and no call sees the input of the call before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

TURN, DISCARDED = 12, 3
"""Calls of a side before the next one has its turn, and how many of them are not counted."""
Side = Callable[[int], Any]
"""A call of one network on its inputs' i-th."""


def rotating(run: Callable[[Any], Any], inputs: Sequence[Any]) -> Side:
    """A side that takes its inputs one after the other: of one repeated image a branch predictor learns the way."""
    return lambda place: run(inputs[place % len(inputs)])


def in_turns(sides: Mapping[str, Side], *, seconds: float) -> dict[str, float]:
    """Median time of a call of each side [ms].

    A few calls each turn, so that a machine that slows down slows all sides.

    Args:
        sides: by name.
        seconds: what each side may take; each has one turn at least.

    >>> list(in_turns({"a": rotating(abs, [1, 2]), "b": rotating(abs, [3])}, seconds=0.001))
    ['a', 'b']
    """
    took: dict[str, list[float]] = {name: [] for name in sides}
    place, end = 0, time.perf_counter() + seconds * len(sides)
    while time.perf_counter() < end or not all(took.values()):
        for name, side in sides.items():
            for call in range(TURN):
                place += 1
                started = time.perf_counter()
                side(place)
                if call >= DISCARDED:
                    took[name].append(1000 * (time.perf_counter() - started))
    return {name: median(values) for name, values in took.items()}
