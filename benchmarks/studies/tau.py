"""A leak that follows depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from figures import lines
from setting import W4, Load, Row, Setting, curve_of, mean_of, qann_of, short_student
from tables import by_steps

import qsnn
from qsnn.report.records import Record

QUESTION = "Time constants that change with depth?"
SIZE = "students of T = 4, one epoch"
TITLES = by_steps(1, 2, 4)
NOTE = "W4/L2, online students of T = 4."
FIGURE = lines()


LEAKS: dict[str, dict[str, Any]] = {
    "none": {},
    "constant": {"tau": (4.0,)},
    "rising": {"tau": (2.0,), "tau_growth": 1.5},
    "falling": {"tau": (10.0,), "tau_growth": 1 / 1.5},
    "learned": {"tau": (4.0,)},
}


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """W4/L2 students of T = 4: no leak, the same in every layer, growing, shrinking, learned by layer; one epoch."""
    data = load(setting.data)
    for label, options in LEAKS.items():
        learned = {"train_tau": "layer"} if label == "learned" else {}
        config = short_student(setting, timesteps=4, epochs=max(1, setting.epochs // 4), **learned)
        yield (
            label, {"convert": options, "quantize": W4, "distill": asdict(config)},
            partial(_tau_row, setting, data, options, config),
        )  # fmt: skip


def _tau_row(setting: Setting, data: qsnn.Data, options: dict[str, Any], config: qsnn.DistillConfig) -> dict[str, Any]:
    qann = qann_of(setting, data, W4)
    student = qsnn.distill(qsnn.convert(qann, qsnn.ConvertConfig(timesteps=4, **options)), qann, data, config)
    taus = [float(node.tau) for _, node in student.neurons() if node.tau is not None]
    return {
        **curve_of(student, data.test, 4),
        **{f"tau of layer {place}": value for place, value in enumerate(taus, 1)},
    }


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {label: mean_of(records, label, "T=4") for label in LEAKS}
    best = max(at, key=at.__getitem__)
    shown = ", ".join(f"{label} {value:.2f}" for label, value in at.items())
    layers = sum(key.startswith("tau of layer") for r in records for key in r.metrics) // max(
        1, sum("tau of layer 1" in r.metrics for r in records)
    )
    ends = [mean_of(records, "learned", f"tau of layer {place}") for place in (1, layers)]
    return (
        f'Leak "{best}" is best at T = 4 ({shown} %); learned from 4 steps everywhere, the time constants end at '
        f"{ends[0]:.1f} steps in the first layer and {ends[1]:.1f} in the last."
    )
