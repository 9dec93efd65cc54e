"""A time budget: its form, how it is shared, and that what was measured is told."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qsnn
from qsnn.budget import Stage, epoch_seconds, seconds_of, shared_epochs, told

times = st.floats(0.1, 100.0)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=4), st.floats(1.0, 50.0))
def test_the_budget_is_kept_and_used(stages: list[tuple[float, float]], factor: float) -> None:
    named = {str(i): Stage(seconds=seconds, share=share) for i, (seconds, share) in enumerate(stages)}
    budget = factor * sum(seconds for seconds, _ in stages)
    epochs = shared_epochs(budget, named)
    left = budget - sum(stage.seconds * epochs[name] for name, stage in named.items())
    assert min(epochs.values()) >= 1
    assert -1e-6 <= left < min(stage.seconds for stage in named.values()) + 1e-6


def test_shares() -> None:
    stages = {"teacher": Stage(seconds=1.0, share=2.0, most=5), "qann": Stage(seconds=2.0, share=3.0),
              "student": Stage(seconds=4.0, share=1.0)}  # fmt: skip
    assert shared_epochs(120.0, stages) == {"teacher": 5, "qann": 35, "student": 11}
    line = told(120.0, stages, {"teacher": 5, "qann": 35, "student": 11})
    assert line.startswith("budget 2 min: teacher 5 epochs of 1 s, qann 35 epochs of 2 s")


def test_too_little_time() -> None:
    with pytest.raises(ValueError, match="takes 30 s, the budget is 20 s; give more time"):
        shared_epochs(20.0, {"a": Stage(seconds=10.0, share=1.0), "b": Stage(seconds=20.0, share=1.0)})


@pytest.mark.parametrize("text", ["", "2", "h", "0m", "2 h", "1d", "5m3"])
def test_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="expected a time like 90s, 110m, 2h or 1h30m"):
        seconds_of(text)


def test_an_epoch_is_measured_without_what_comes_once(digits: qsnn.Data) -> None:
    def train(data: qsnn.Data) -> None:  # 20 ms once, 0.2 ms a training image, 0.1 ms an image to validate
        time.sleep(0.02 + 2e-4 * len(data.train) + 1e-4 * len(data.val))  # type: ignore[arg-type]

    expected = 2e-4 * len(digits.train) + 1e-4 * len(digits.val)  # type: ignore[arg-type]
    assert epoch_seconds(train, digits, batch_size=32) == pytest.approx(expected, rel=0.2)
