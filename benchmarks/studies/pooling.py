"""Max or average pooling: converted, distilled, on event data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from figures import lines
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

QUESTION = "Max or average pooling?"
SIZE = "as `distill`, students of half the epochs; N-MNIST"
TITLES = {"ann": "without spikes [%]", **by_steps(1, 2, 4, 8)}
NOTE = "Without spikes: the float network; of distilled rows the QANN."
FIGURE = lines()


POOLINGS = ("avg", "max")


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """T = 1 to 8: the float net calibrated for each T, and the W4/L2 student of T = 2; images, and N-MNIST."""
    data = load(setting.data)
    for kind in POOLINGS:
        yield f"converted, {kind}", {"pooling": kind, "for": "each T"}, partial(_converted_row, setting, data, kind)
        config = short_student(setting)
        yield (
            f"distilled, {kind}", {"pooling": kind, "quantize": W4, "distill": asdict(config)},
            partial(_pooled_row, setting, data, kind),
        )  # fmt: skip
        yield (
            f"N-MNIST, distilled, {kind}",
            {"pooling": kind, "quantize": W4, "events": "nmnist", "T": 2, "most_epochs": MOST_EPOCHS},
            partial(_event_row, setting, partial(load, "nmnist"), kind),
        )  # fmt: skip


def _converted_row(setting: Setting, data: qsnn.Data, kind: str) -> dict[str, Any]:
    teacher = teacher_of(setting, data, pooling=kind)
    found = {"ann": qsnn.accuracy(teacher, data.test)}
    for t in (1, 2, 4, 8):
        snn = qsnn.convert(teacher, data, qsnn.ConvertConfig(timesteps=t, calibration_images=1024))
        found[f"T={t}"] = qsnn.accuracy(snn, data.test)
    return found


def _pooled_row(setting: Setting, data: qsnn.Data, kind: str) -> dict[str, Any]:
    found = {"ann": qsnn.accuracy(qann_of(setting, data, W4, pooling=kind), data.test)}
    return {**found, **curve_of(student_of(setting, data, W4, short_student(setting), pooling=kind), data.test)}


def _event_row(setting: Setting, events: Callable[[], qsnn.Data], kind: str) -> dict[str, Any]:
    data = events()
    own = setting.on(data)
    found = {"ann": qsnn.accuracy(qann_of(own, data, W4, pooling=kind), data.test)}
    student = student_of(own, data, W4, short_student(own), pooling=kind)
    return {**found, **curve_of(student, data.test, data.frames or 2), "n": len(data.test)}  # type: ignore[arg-type]


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts = []
    for row in ("converted", "distilled", "N-MNIST, distilled"):
        avg, best = (mean_of(records, f"{row}, {kind}", "T=2") for kind in POOLINGS)
        parts.append(f"{row}: average {avg:.1f}, max {best:.1f}")
    wins = sum(mean_of(records, f"{row}, max", "T=2") > mean_of(records, f"{row}, avg", "T=2")
               for row in ("converted", "distilled", "N-MNIST, distilled"))  # fmt: skip
    verdict = {0: "Average pooling is better everywhere", 3: "Max pooling is better everywhere"}
    return f"{verdict.get(wins, 'It depends')} at T = 2 ({'; '.join(parts)} %)."
