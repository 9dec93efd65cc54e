"""Students of two steps beside their quantized teacher, trained on for as long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from figures import lines
from setting import STUDENTS, Load, Row, Setting, mean_of, qann_of, short_student, student_config, teacher_of
from tables import by_steps

import qsnn
from qsnn.report.records import Record

QUESTION = "Can a low-precision ANN teach a spiking net so well that two steps are enough?"
SIZE = "as `precision`"
TITLES = {"qann": "QANN [%]", "qann on": "trained on [%]", **by_steps(1, 2, 4)}
NOTE = "Online students; trained on: the QANN, for as long as the student. From scratch: a threshold a channel."
FIGURE = lines({
    "W4": "student, 4-bit weights", "W1": "student, 1-bit weights", "fp16": "student, fp16 weights",
    "W4, from scratch": "4-bit weights, from scratch",
    "SpikingJelly, best recipe at T = 2": "SpikingJelly's best recipe",
})  # fmt: skip


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Online students of T = 2 from the quantized network of each precision, and what they have to beat."""
    data = load(setting.data)
    config, scratch = student_config(setting), short_student(setting, epochs=3 * setting.epochs)
    for label, options in STUDENTS.items():
        known = {"quantize": options, "train": asdict(setting.low_bits()), "distill": asdict(config)}
        yield label, known, partial(_student_row, setting, data, options, config)
    yield (
        "W4, from scratch", {"quantize": STUDENTS["W4"], "distill": asdict(scratch)},
        partial(_scratch_row, setting, data, STUDENTS["W4"], scratch),
    )  # fmt: skip
    yield "SpikingJelly, best recipe at T = 2", {"recipes": "peers.py"}, partial(_peer_row, setting, data)


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts, enough = [], True
    for label in STUDENTS:
        two, qann, longer = (mean_of(records, label, key) for key in ("T=2", "qann", "qann on"))
        parts.append(f"{label} {two - qann:+.2f} ({two - longer:+.2f})")
        enough = enough and two >= qann - 0.1
    peer = mean_of(records, "SpikingJelly, best recipe at T = 2", "T=2")
    two, scratch = mean_of(records, "W4", "T=2"), mean_of(records, "W4, from scratch", "T=2")
    one = mean_of(records, "W4", "T=4") - mean_of(records, "W4", "T=1")
    return (
        f"Two steps are {'' if enough else 'not '}enough: students against the network that taught them "
        f"(in brackets: trained on for as long): "
        f"{', '.join(parts)} points; from scratch {scratch - two:+.2f}, SpikingJelly's best recipe {peer - two:+.1f}; "
        f"at T = 1 the W4 student is {one:.2f} below its T = 4."
    )


def _curve(snn: qsnn.SNN, data: qsnn.Data) -> dict[str, float]:
    curve = qsnn.benchmark(snn, data.test, timesteps=4, firing="online").accuracy
    return {f"T={t}": curve[t - 1] for t in (1, 2, 4)}


def _student_row(
    setting: Setting, data: qsnn.Data, options: dict[str, Any], config: qsnn.DistillConfig
) -> dict[str, Any]:
    qann = qann_of(setting, data, options)
    found = {"qann": qsnn.accuracy(qann, data.test)}
    student = qsnn.distill(qsnn.convert(qann), qann, data, config)
    longer = qann_of(setting, data, options)
    qsnn.fit(longer, data, setting.low_bits(), label="QANN on")
    return {**found, "qann on": qsnn.accuracy(longer, data.test), **_curve(student, data)}


def _scratch_row(
    setting: Setting, data: qsnn.Data, options: dict[str, Any], config: qsnn.DistillConfig
) -> dict[str, Any]:
    fresh = qsnn.create_model(setting.model, data, seed=setting.seed)
    start = qsnn.convert(qsnn.quantize(fresh, data, qsnn.QuantizeConfig(**options)))
    return _curve(qsnn.distill(start, fresh, data, config), data)  # no term of the loss asks the teacher


def _peer_row(setting: Setting, data: qsnn.Data) -> dict[str, Any]:
    import peers

    return peers.best_of_spikingjelly(teacher_of(setting, data), data, 2)
