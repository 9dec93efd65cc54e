"""What brings a student of two steps up to its quantized teacher, each by itself; chosen on validation images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

from figures import dots
from setting import W4, Load, Row, Setting, mean_of, of_qann, qann_of, student_config, teacher_of
from tables import by_steps

import qsnn
from qsnn.report.records import Record

QUESTION = "What brings a student of two steps up to its teacher?"
SIZE = "as `precision`, students 3 epochs, on validation images"
PART = "validation"
TITLES = {"qann": "QANN [%]", "qann on": "trained on [%]", **by_steps(1, 2, 4)}
NOTE = "W4/L2. Students learn for 3 epochs; trained on: the QANN, for as long. Each row changes one thing."
FIGURE = dots("T=1", "T=2")

RECIPE = "label, each step"
WAYS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "KL of the answer": {"ce_weight": 0.0, "kd_weight": 0.5},
    "KL of the answer, both teachers": {"ce_weight": 0.0, "kd_weight": 0.5, "teachers": 2},
    "KL of each step": {"step_ce_weight": 0.0, "step_weight": 0.5},
    "KL and entropy of each step": {"step_ce_weight": 0.0, "step_weight": 0.5, "entropy_weight": 0.05},
    "right steps teach": {"correct_weight": 0.5},
    "strongest step teaches": {"strong_weight": 0.5},
    "currents of the QANN": {"current_weight": 0.1},
    "threshold of each channel": {"train_threshold": "channel"},
    "initial potential of each step": {"train_initial": "step"},
    "gradient of the rate": {"surrogate": "rate"},
    "rates first, loop last": {"rates": 0.75},
    "spikes of -1 take back": {"signed": True},
    "mean of weights": {"ema": 0.998},
    "mixup": {"mixup": 0.2},
    "cutout": {"augment": "flip+shift+cutout"},
    "threshold x 0.7 in QAT": {"threshold_scale": 0.7},
    "potential of each step, threshold x 0.7": {"train_initial": "step", "threshold_scale": 0.7},
    "lr 0.003": {"lr": 0.003},
}
"""What differs from the recipe: options of DistillConfig; ``teachers`` that teach; ``rates``, the part of the epochs
with the gradient of the rate; ``threshold_scale`` of the quantized network; ``signed`` spikes, which are not binary."""


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """The recipe, and each change of it."""
    data = load(setting.data)
    for label, way in WAYS.items():
        yield label, of_qann(setting, way=way, distill=asdict(_config(setting, way))), partial(_row, setting, data, way)


def _config(setting: Setting, way: dict[str, Any]) -> qsnn.DistillConfig:
    ours = ("teachers", "rates", "threshold_scale", "signed")
    return student_config(_short(setting), **{name: value for name, value in way.items() if name not in ours})


def _short(setting: Setting) -> Setting:
    """Three quarters of the epochs: there are many students."""
    return replace(setting, epochs=max(1, 3 * setting.epochs // 4))


def _row(setting: Setting, data: qsnn.Data, way: dict[str, Any]) -> dict[str, Any]:
    scale = {"threshold_scale": way["threshold_scale"]} if "threshold_scale" in way else {}
    qann = qann_of(setting, data, {**W4, **scale})
    config = _config(setting, way)
    teachers = [qann] if way.get("teachers", 1) == 1 else [qann, teacher_of(setting, data)]
    student = qsnn.convert(qann, qsnn.ConvertConfig(signed=way.get("signed", False)))
    if "rates" in way:
        first = round(way["rates"] * config.epochs)
        student = qsnn.distill(student, teachers, data, replace(config, epochs=first, surrogate="rate"))
        config = replace(config, epochs=config.epochs - first, lr=config.lr / 3)
    student = qsnn.distill(student, teachers, data, config)
    found = {"qann": qsnn.accuracy(qann, data.val)}
    if not way:
        qsnn.fit(qann, data, _short(setting).low_bits(), label="QANN on")
        found["qann on"] = qsnn.accuracy(qann, data.val)
    curve = qsnn.benchmark(student, data.val, timesteps=4, firing="online").accuracy
    return {**found, **{f"T={t}": curve[t - 1] for t in (1, 2, 4)}, "n": len(data.val)}  # type: ignore[arg-type]


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    found = {label: gains for label in WAYS if label != RECIPE and (gains := _gained(records, label))}
    parts = [
        f"{label} {mean(gains):+.2f}{f' ± {stdev(gains) / len(gains) ** 0.5:.2f}' if len(gains) > 1 else ''}"
        for label, gains in sorted(found.items(), key=lambda one: -mean(one[1]))
    ]
    short = mean_of(records, RECIPE, "qann on") - mean_of(records, RECIPE, "T=2")
    side = f"{abs(short):.2f} points {'below' if short > 0 else 'above'}" if abs(short) >= 0.005 else "as good as"
    return (
        f"The recipe's student is {side} the QANN trained on; what each change brings at T = 2, with the standard "
        f"error over the seeds: {', '.join(parts)}."
    )


def _gained(records: Sequence[Record], label: str) -> list[float]:
    """What a change brings at T = 2, seed by seed."""
    at = {(r.name.partition("/")[2], r.seed): float(r.metrics["T=2"]) for r in records}
    return [at[label, seed] - two for (name, seed), two in at.items() if name == RECIPE and (label, seed) in at]
