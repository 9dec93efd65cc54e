"""A time budget: measure an epoch of each stage, share the time, and say so."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsnn.data.images import Data, first_of
from qsnn.files import write_atomic

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """Return the seconds that "90s", "110m", "2h" or "1h30m" stand for [s].

    >>> seconds_of("110m"), seconds_of("1h30m"), seconds_of("1.5h")
    (6600.0, 5400.0, 5400.0)

    Raises:
        ValueError: another form, or no time at all.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not total > 0 or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"expected a time like 90s, 110m, 2h or 1h30m, got {text!r}")
    return total


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training, as a budget sees it."""

    seconds: float
    """What one epoch takes, validation included [s]."""
    share: float
    """Epochs in proportion to those of the other stages [1]."""
    most: int | None = None
    """No more epochs than this; the others then get the time."""


def shared_epochs(budget: float, stages: Mapping[str, Stage]) -> dict[str, int]:
    r"""Return the epochs of each stage that fit into a budget B [s].

    With an epoch's time :math:`t_i` and share :math:`w_i`: :math:`e_i = \lfloor \lambda w_i \rfloor` for the largest
    λ with :math:`\sum_i e_i t_i \le B`; what is left goes, an epoch at a time, where :math:`e_i / w_i` is least and
    it still fits. Every stage gets at least one.

    Args:
        budget: B [s].
        stages: by name.
    Raises:
        ValueError: one epoch of each does not fit.

    >>> shared_epochs(100.0, {"qann": Stage(seconds=5.0, share=2.0), "student": Stage(seconds=10.0, share=1.0)})
    {'qann': 10, 'student': 5}
    """
    epochs = dict.fromkeys(stages, 1)
    spent = sum(stage.seconds for stage in stages.values())
    if spent > budget:
        raise ValueError(
            f"one epoch of each stage takes {spent:.0f} s, the budget is {budget:.0f} s; give more time, fewer "
            f"training images or a smaller model"
        )
    while True:
        open_ = [
            name for name, stage in stages.items()
            if spent + stage.seconds <= budget and (stage.most is None or epochs[name] < stage.most)
        ]  # fmt: skip
        if not open_:
            return epochs
        least = min(open_, key=lambda name: (epochs[name] + 1) / stages[name].share)
        epochs[least] += 1
        spent += stages[least].seconds


def epoch_seconds(
    train: Callable[[Data], Any],
    data: Data,
    *,
    batch_size: int,
    images: int | None = None,
    batches: int = 8,
) -> float:
    """Measure what an epoch takes, from a few batches [s].

    Two runs of n and 2n batches are timed, so that what comes once (copying the model, the first step) falls out.

    Args:
        train: trains a copy for one epoch on the data that it is given, and validates on it.
        data: the real data; ``train`` sees a few of its images.
        batch_size: images a step.
        images: training images of an epoch; default all.
        batches: n.
    """
    return seconds_in_turns({"": train}, data, batch_size=batch_size, images=images, batches=batches, rounds=1)[""]


def seconds_in_turns(
    trains: Mapping[str, Callable[[Data], Any]],
    data: Data,
    *,
    batch_size: int,
    images: int | None = None,
    batches: int = 8,
    rounds: int = 3,
) -> dict[str, float]:
    """What an epoch of each takes, as :func:`epoch_seconds` measures it, on a machine that does other things too [s].

    All take turns, and of each of their runs the shortest counts. (The shortest of several differences would not do: a
    difference of two runs is least where the shorter one was held up.)

    Args:
        trains: by name; each as ``train`` there.
        data, batch_size, images, batches: see there.
        rounds: turns.
    """
    count = images or len(data.train)  # type: ignore[arg-type]
    held = len(data.val)  # type: ignore[arg-type]
    n = max(1, min(batch_size * batches, count // 2))
    some = min(held, 500)

    def timed(train: Callable[[Data], Any], images: int, checked: int) -> float:
        few = replace(data, train=first_of(data.train, images), val=first_of(data.val, checked))
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # the progress of a measurement tells nobody anything
            train(few)
        return time.perf_counter() - begun

    runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in trains}
    for train in trains.values():
        timed(train, n, 1)
    for _ in range(rounds):
        for name, train in trains.items():
            runs[name].append((timed(train, n, 1), timed(train, 2 * n, 1), timed(train, n, some)))
    found = {}
    for name, each in runs.items():
        short, long, checked = map(min, zip(*each, strict=True))
        step = max(long - short, 0.2 * long) / n
        found[name] = step * count + max(checked - short, 0.0) / max(1, some - 1) * held
    return found


def told(budget: float, stages: Mapping[str, Stage], epochs: Mapping[str, int]) -> str:
    """One line: the measured epochs, what each stage gets, and what it takes together."""
    parts = [f"{name} {epochs[name]} epochs of {stage.seconds:.0f} s" for name, stage in stages.items()]
    total = sum(stage.seconds * epochs[name] for name, stage in stages.items())
    return f"budget {budget / 60:.0f} min: {', '.join(parts)}; together {total / 60:.0f} min"


def write_plan(path: Path, about: Mapping[str, Any], epochs: Mapping[str, int]) -> None:
    """Keep the chosen epochs beside what they were chosen for, so that a run that goes on does not choose again."""
    write_atomic(path, json.dumps({"about": about, "epochs": epochs}))


def read_plan(path: Path) -> dict[str, Any]:
    """Return what :func:`write_plan` wrote; {} where there is no file.

    Raises:
        ValueError: the file is no plan.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        whole = all(isinstance(count, int) and count >= 0 for count in found["epochs"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole or not isinstance(found.get("about"), dict):
        raise ValueError(f"{path} is no plan of epochs; delete it to measure again")
    return found  # type: ignore[no-any-return]
