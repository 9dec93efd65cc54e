"""Accuracy against T of three resets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from figures import lines
from setting import W4, Load, Row, Setting, curve_of, first_of, mean_of, of_qann, qann_of, teacher_of
from tables import by_steps

import qsnn
from qsnn.report.records import Record

QUESTION = "Which reset: soft, hard, decaying?"
SIZE = "networks of `distill`, nothing more is trained"
TITLES = by_steps(1, 2, 4, 8, 16)
NOTE = "Online, not distilled."
FIGURE = lines()


RESETS = ("soft", "hard", "decay")


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Accuracy against T of three resets: a float network calibrated for T = 8, and the W4/L2 network."""
    data = load(setting.data)
    for kind in RESETS:
        yield f"float, {kind}", of_qann(setting, reset=kind), partial(_reset_row, setting, data, kind, True)
        yield f"W4/L2, {kind}", of_qann(setting, reset=kind), partial(_reset_row, setting, data, kind, False)


def _reset_row(setting: Setting, data: qsnn.Data, kind: str, floating: bool) -> dict[str, Any]:
    config = qsnn.ConvertConfig(timesteps=8, reset=kind)
    snn = qsnn.convert(teacher_of(setting, data), data, config) if floating else qsnn.convert(
        qann_of(setting, data, W4), config
    )  # fmt: skip
    test = first_of(data)
    return {**curve_of(snn, test, 16), "n": len(test)}


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts = []
    for model in ("float", "W4/L2"):
        best = max(RESETS, key=lambda kind: mean_of(records, f"{model}, {kind}", "T=8"))
        shown = ", ".join(f"{kind} {mean_of(records, f'{model}, {kind}', 'T=8'):.1f}" for kind in RESETS)
        parts.append(f"{best} for the {model} network ({shown} % at T = 8)")
    return f"The best reset is {' and '.join(parts)}."
