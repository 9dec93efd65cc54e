"""What low bits cost: accuracy after calibration alone, after quantization-aware training, and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean, stdev
from typing import Any

from lookup import by_label
from setting import Load, Row, Setting, teacher_of
from tables import grid, plus_minus

import qsnn
from qsnn.report.records import Record
from qsnn.report.terminal import number

QUESTION = "{fp16, int8, lower} and spikes in the place of fp32 and spikes?"
SIZE = "study net (or `--model vgg-small`), 20,000 images, 4 epochs a stage"
NOTE = (
    "± of the points lost: standard error (paired by seed, against the better of the teacher and the teacher trained "
    "on for as many epochs)."
)


# label: (weight bits, activations); act_form fp16 and float have no spiking form
PRECISIONS: dict[str, dict[str, Any]] = {
    "32/32": {"weight_bits": 32, "act_form": "float", "input_bits": None, "first_last_bits": None},
    "16/16": {"weight_bits": 16, "act_form": "fp16", "input_bits": None, "first_last_bits": None},
    "8/8": {"weight_bits": 8, "act_bits": 8},
    "4/4": {"weight_bits": 4, "act_bits": 4},
    "4/2": {"weight_bits": 4, "act_bits": 2},
    "4/L2": {"weight_bits": 4, "levels": 2},
    "2/2": {"weight_bits": 2, "act_bits": 2},
    "1/2": {"weight_bits": 1, "act_bits": 2},
    "1/L2": {"weight_bits": 1, "levels": 2},
    "1/1": {"weight_bits": 1, "act_bits": 1},
    "1/±1": {"weight_bits": 1, "act_form": "sign"},
}


SMALL_STEPS: dict[str, dict[str, Any]] = {
    "32/32": {"batch_size": 32}, "4/L2": {"batch_size": 32}, "1/1": {"batch_size": 32, "lr": 0.005}
}  # fmt: skip
"""Where training differs from ``low_bits``, chosen on training images that were held out."""


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Accuracy after calibration and after quantization-aware training (cross entropy alone), and memory.

    32/32 is the float teacher trained on for the same epochs: the fair comparison.
    """
    data = load(setting.data)
    for label, options in PRECISIONS.items():
        training = replace(setting.low_bits(), **SMALL_STEPS.get(label, {}))
        measure = partial(_precision_row, setting, data, label, options, training)
        yield label, {"quantize": options, "train": asdict(training)}, measure


def points_lost(records: Sequence[Record]) -> dict[str, float]:
    """Mean over the seeds, against the better of the teacher and the teacher trained on; {} without that row."""
    by = {label: {r.seed: r.metrics for r in found} for label, found in by_label(records).items()}
    best = {seed: max(m["teacher"], m["qat"]) for seed, m in by.get("32/32", {}).items()}
    return {label: fmean(best[s] - m["qat"] for s, m in found.items()) for label, found in by.items()} if best else {}


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    lost = {label: value for label, value in points_lost(records).items() if label != "32/32"}
    if not lost:
        return "Points lost are counted against row 32/32, which has no record yet."
    shown = ", ".join(f"{label} {value:.2f}" for label, value in lost.items())
    free = [label for label, value in lost.items() if value <= 0.1]
    return f"{', '.join(free) or 'No low precision'} cost{'' if len(free) > 1 else 's'} nothing; points lost: {shown}."


def _precision_row(
    setting: Setting, data: qsnn.Data, label: str, options: dict[str, Any], training: qsnn.TrainConfig
) -> dict[str, Any]:
    teacher = teacher_of(setting, data)
    before = qsnn.accuracy(teacher, data.test)
    if options.get("act_form") == "float":
        model, after_ptq = teacher_of(setting, data), before
    else:
        model = qsnn.quantize(teacher, data, qsnn.QuantizeConfig(**options))
        after_ptq = qsnn.accuracy(model, data.test)
    qsnn.fit(model, data, training, label=label)
    return {
        "teacher": before,
        "ptq": after_ptq,
        "qat": qsnn.accuracy(model, data.test),
        "weight_bytes": qsnn.summary(model).weight_bytes,
    }


def table(records: Sequence[Record]) -> str:
    """Points lost against the better of the float teacher and the teacher trained on, by seed; and how it trained."""
    by = {label: {r.seed: r for r in found} for label, found in by_label(records).items()}
    seeds = sorted(set.intersection(*(set(found) for found in by.values())))
    if "32/32" not in by or len(seeds) < 2:
        return ""
    best = {s: max(by["32/32"][s].metrics["teacher"], by["32/32"][s].metrics["qat"]) for s in seeds}
    cells, ways = [], {}
    for label, found in by.items():
        metrics = [found[s].metrics for s in seeds]
        lost = [best[s] - found[s].metrics["qat"] for s in seeds]
        kib = fmean(m["weight_bytes"] for m in metrics) / 1024
        error = number(stdev(lost) / len(lost) ** 0.5)
        cells.append([
            label, number(kib, 1), *(plus_minus([m[key] for m in metrics]) for key in ("ptq", "qat")),
            f"{number(fmean(lost))} ± {error}",
        ])  # fmt: skip
        train = found[seeds[0]].config["train"]
        way = f"{train['optimizer']} at {train['lr']:g} in batches of {train['batch_size']}"
        ways.setdefault(way, []).append(label)
    usual = max(ways, key=lambda way: len(ways[way]))
    others = [f"; {', '.join(rows)} with {way}" for way, rows in ways.items() if way != usual]
    head = ["weights / activations [bit]", "memory [KiB]", "calibrated [%]", "trained [%]", "points lost"]
    return f"{grid(head, cells)}\n\nTrained with {usual}{''.join(others)}."
