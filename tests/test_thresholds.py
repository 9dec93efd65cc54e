"""folded/thresholds.py: every integer threshold is the exact one, whatever the numbers; tables are made quickly."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import qsnn
from qsnn.folded.integer import IntegerIF
from qsnn.folded.neurons import least
from qsnn.folded.thresholds import integer_thresholds

NUMBERS = st.one_of(
    st.floats(-8, 8, width=32), st.floats(-8, 8), st.integers(-64, 64).map(lambda n: n / 16),
    st.sampled_from([0.0, 1e-20, -1e-20, 1e-300, -1e300, 5e-324, 2.0**60, 1 / 3]),
)  # fmt: skip
POSITIVE = st.one_of(
    st.floats(2.0**-20, 8, width=32), st.floats(1e-12, 8), st.integers(1, 64).map(lambda n: n / 16),
    st.sampled_from([1e-300, 1e300, 5e-324, 1 / 3]),
)  # fmt: skip


@given(
    theta=POSITIVE, start=NUMBERS, bias=NUMBERS, gains=st.lists(POSITIVE, min_size=1, max_size=3),
    divisor=st.integers(1, 9), steps=st.integers(1, 6),
)  # fmt: skip
@example(theta=1.0, start=0.5, bias=-1e-20, gains=[0.25], divisor=1, steps=4)
@example(theta=1.0, start=0.5, bias=0.5, gains=[0.0], divisor=1, steps=4)
@example(theta=0.1, start=0.05, bias=0.1, gains=[0.1], divisor=3, steps=6)
def test_every_threshold_is_the_exact_one(
    theta: float, start: float, bias: float, gains: list[float], divisor: int, steps: int
) -> None:
    gain = Fraction(1, divisor) * math.prod(map(Fraction, gains))
    rows, numbers = [*range(1, steps + 1)], (Fraction(theta), Fraction(start), Fraction(bias))
    found = integer_thresholds(*numbers, gain, rows, steps)
    for t in rows:
        for k in range(steps):
            need = (k + 1) * numbers[0] - numbers[1] - t * numbers[2]
            assert found[t - 1, k] == (least(need, gain) if k < t else math.inf), (t, k)
    last = integer_thresholds(*numbers, gain, rows[-1:], steps)
    assert (last == found[-1:]).all()


@pytest.mark.parametrize("kind", ["random", "binary fractions", "float16"])
def test_a_table_of_128_steps_takes_no_time(kind: str) -> None:
    """64 channels, online; 11 s when it was made number by number."""
    draw = torch.Generator().manual_seed(0)
    gains, bias = torch.rand(2, 64, generator=draw).double() + 0.01, torch.randn(64, generator=draw).double()
    if kind != "random":
        bits = 2.0**6 if kind == "binary fractions" else 2.0**24
        gains, bias = (gains * bits).ceil() / bits, (bias * bits).round() / bits
    neuron = IntegerIF(gains, 4, bias, torch.tensor(0.7 if kind == "random" else 0.75), 0.5, 100.0, (64, 1, 1))
    times = []
    for _ in range(3):
        neuron._prepared.clear()
        begun = time.process_time()
        table = neuron.table(128, "online")
        times.append(time.process_time() - begun)
    assert table.shape == (128, 128, 64) and min(times) < 0.2, times


def test_many_steps_are_refused_by_what_they_take(snn: qsnn.SNN, images: torch.Tensor) -> None:
    folded = qsnn.fold(snn)
    with pytest.raises(ValueError, match=r"^expected at most T = \d+ steps, got 4096: the thresholds of"):
        folded(images[:1], timesteps=4096)
    with pytest.raises(ValueError, match=r"timesteps must be a whole number from 1 to 4,096, got 4097"):
        folded(images[:1], timesteps=4097)
    assert folded(images[:1], timesteps=256, firing="deferred").shape == (1, 1, 10)
