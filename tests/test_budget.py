"""A time budget: its form, how it is shared, and that what was measured is told."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qsnn
from qsnn.training.budget import Stage, epoch_seconds, seconds_in_turns, seconds_of, shared_epochs, told

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


@given(st.lists(st.floats(0.0, 5.0), min_size=14, max_size=14), st.integers(0, 2))
def test_what_else_the_machine_does_makes_no_side_faster(delays: list[float], quiet: int) -> None:
    """Of three rounds one is quiet; in the others, and in the first runs, a step waits for as long as it may."""
    data, clock, late = qsnn.load_data("digits"), [0.0], iter(delays)
    turns = itertools.count(-2)  # the first run of both comes before the rounds, of six runs each

    def train(seconds: float) -> Callable[[qsnn.Data], None]:
        def run(data: qsnn.Data) -> None:
            clock[0] += 0.5 + seconds * (len(data.train) + len(data.val))  # type: ignore[arg-type]
            turn = next(turns)
            clock[0] += 0.0 if 0 <= turn and turn // 6 == quiet else next(late)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsnn.training.budget.time.perf_counter", lambda: clock[0])
        found = seconds_in_turns({"a": train(0.01), "b": train(0.02)}, data, batch_size=32)
    all_of = len(data.train) + len(data.val)  # type: ignore[arg-type]
    assert found == pytest.approx({"a": 0.01 * all_of, "b": 0.02 * all_of})
