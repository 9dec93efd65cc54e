"""Does label smoothing help, on the student, on the teacher?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from figures import dots
from setting import STUDENTS, Load, Row, Setting, mean_of, qann_of, short_student, teacher_of
from torch import Tensor

import qsnn
from qsnn.report.records import Record

QUESTION = "Does label smoothing help sparse spike codes?"
SIZE = "as `precision`"
TITLES = {
    "qann": "QANN [%]", "T=2": "student, T = 2 [%]", "ece": "its calibration error [%]", "spike rate": "its spike rate",
}  # fmt: skip
NOTE = "W4/L2; label smoothing of one of the two."
FIGURE = dots("qann", "T=2")


SMOOTHINGS = (0.0, 0.05, 0.1, 0.2)


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Label smoothing of the student alone, and of its quantized teacher alone; W4/L2, T = 2, with KL."""
    data = load(setting.data)
    for where in ("student", "teacher"):
        for amount in SMOOTHINGS:
            if where == "teacher" and amount == 0:
                continue  # that is the student's first row
            on_student, on_teacher = (amount, 0.0) if where == "student" else (0.0, amount)
            config = short_student(setting, kd_weight=0.5, label_smoothing=on_student)
            yield (
                f"{where} {amount:g}", {"distill": asdict(config), "teacher_smoothing": on_teacher},
                partial(_smoothing_row, setting, data, config, on_teacher),
            )  # fmt: skip


def _smoothing_row(setting: Setting, data: qsnn.Data, config: qsnn.DistillConfig, on_teacher: float) -> dict[str, Any]:
    if on_teacher:
        training = replace(setting.low_bits(), label_smoothing=on_teacher)
        qann = qsnn.quantize(teacher_of(setting, data), data, qsnn.QuantizeConfig(**STUDENTS["W4"]))
        qsnn.fit(qann, data, training, label="QANN")
    else:
        qann = qann_of(setting, data, STUDENTS["W4"])
    student = qsnn.distill(qsnn.convert(qann), qann, data, config)
    measured = qsnn.benchmark(student, data.test, timesteps=2, firing="online")
    logits = [(student(images)[-1], labels) for images, labels in qsnn.batches(data.test, 250)]
    error = calibration_error(torch.cat([z for z, _ in logits]), torch.cat([labels for _, labels in logits]))
    return {
        "qann": qsnn.accuracy(qann, data.test), "T=2": measured.accuracy[1], "ece": error,
        "spike rate": measured.spike_rate, "synops": measured.synops,
    }  # fmt: skip


def answer(records: Sequence[Record]) -> str:
    """One sentence."""

    def at(label: str, key: str) -> float:
        return mean_of(records, label, key)

    parts = []
    for where in ("student", "teacher"):
        labels = [f"{where} {amount:g}" for amount in SMOOTHINGS[1:]]
        best = max(labels, key=lambda label: at(label, "T=2"))
        change = at(best, "T=2") - at("student 0", "T=2")
        verdict = "helps" if change > 0.1 else "hurts" if change < -0.1 else "changes little"
        parts.append(
            f"on the {where} it {verdict} (at best {change:+.2f} points of accuracy, {best.split()[1]}; calibration "
            f"error {at(best, 'ece'):.1f} against {at('student 0', 'ece'):.1f} %, spike rate "
            f"{at(best, 'spike rate'):.3f} against {at('student 0', 'spike rate'):.3f})"
        )
    return f"Label smoothing: {'; '.join(parts)}."


@torch.no_grad()
def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error [%]: :math:`\sum_b \tfrac{n_b}{n} |acc_b - conf_b|`, bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    confidence, answer = logits.softmax(-1).max(-1)
    right = (answer == labels).float()
    place = (confidence * bins).ceil().clamp(1, bins)
    gaps = [(right[place == b].sum() - confidence[place == b].sum()).abs() for b in range(1, bins + 1)]
    return 100.0 * float(sum(gaps)) / len(labels)
