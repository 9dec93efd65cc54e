"""One recipe on every data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from figures import dots
from setting import (
    MOST_EPOCHS,
    W4,
    Load,
    Row,
    Setting,
    curve_of,
    mean_of,
    qann_of,
    short_student,
    student_of,
    teacher_of,
)
from tables import by_steps

import qsnn
from qsnn.report.records import Record

QUESTION = "Does one recipe serve all tasks?"
SIZE = "digits, MNIST, Fashion-MNIST, N-MNIST; the small sets five times as often"
DATA = "all"
TITLES = {"teacher": "teacher [%]", "qann": "QANN [%]", **by_steps(1, 2)}
NOTE = "W4/L2; T: the online student."
FIGURE = dots("teacher", "qann", "T=1", "T=2")


TASKS = ("digits", "mnist", "fashion-mnist", "nmnist")


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Teacher, W4/L2 QANN and student of T = 2 with the same options; a small set is seen five times as often."""
    for name in TASKS:
        config = short_student(setting)
        options = {"quantize": W4, "distill": asdict(config), "most_epochs": MOST_EPOCHS}
        yield name, options, partial(_task_row, setting, load, name)


def _task_row(setting: Setting, load: Load, name: str) -> dict[str, Any]:
    data = load(name)
    own = setting.on(data)
    found = {
        "teacher": qsnn.accuracy(teacher_of(own, data), data.test),
        "qann": qsnn.accuracy(qann_of(own, data, W4), data.test),
    }
    return {**found, **curve_of(student_of(own, data, W4, short_student(own)), data.test, 2), "n": len(data.test)}  # type: ignore[arg-type]


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    lost = {label: mean_of(records, label, "teacher") - mean_of(records, label, "T=2") for label in labels}
    shown = ", ".join(f"{label} {value:+.2f}" for label, value in lost.items())
    worst = max(lost, key=lost.__getitem__)
    verdict = "serves" if lost[worst] <= 1 else "does not serve"
    return (
        f"One recipe {verdict} all {len(labels)} tasks with at most {max(0.0, lost[worst]):.2f} points lost from the "
        f"teacher to the T = 2 student ({worst}); teacher minus student: {shown} points."
    )
