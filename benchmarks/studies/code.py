"""±1, 0/1 and spikes over time, at equal weights and at equal synops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from figures import scatter
from setting import STUDENTS, Load, Row, Setting, mean_of, qann_of, short_student, student_of
from torch import nn

import qsnn
from qsnn.models.ann import VggSmall
from qsnn.report.records import Record

QUESTION = "Do spikes over time carry more than bits?"
SIZE = "1-bit weights, nets of several widths"
TITLES = {"accuracy": "accuracy [%]", "synops": "synops", "weight_bytes": "weights [KiB]"}
NOTE = "1-bit weights; T = 2 online, the others at T = 1."
FIGURE = scatter("synops", "operations on 1-bit weights per image [million]")


CODES: dict[str, dict[str, Any]] = {
    "±1": {"weight_bits": 1, "act_form": "sign"},
    "0/1": {"weight_bits": 1, "act_bits": 1},
    "T = 2 spikes": STUDENTS["W1"],
}
WIDTHS: dict[str, tuple[float, ...]] = {"±1": (0.5, 1.0), "0/1": (1.0, 1.5), "T = 2 spikes": (1.0,)}
"""By the channels of the study net; the others are there to compare at equal synops."""


def widened(num_classes: int, width: float = 1.0) -> nn.Module:
    """The study net for images of one channel, with so many times its channels."""
    a, b, c = (round(width * channels) for channels in (16, 32, 64))
    return VggSmall(1, num_classes, [[a, a], [b, b], [c]])


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """1-bit weights; the BNNs train for as long as the QANN and its student together."""
    data = load(setting.data)
    for label, options in CODES.items():
        for width in WIDTHS[label]:
            yield (
                f"{label}, width {width:g}", {"quantize": options, "width": width},
                partial(_code_row, setting, data, label, width),
            )  # fmt: skip


def _code_row(setting: Setting, data: qsnn.Data, label: str, width: float) -> dict[str, Any]:
    own = replace(setting, model="studies.code:widened")
    config = short_student(setting)
    if label == "T = 2 spikes":
        snn = student_of(own, data, CODES[label], config, width=width)
        dense = 0
    else:
        longer = replace(own, epochs=own.epochs + config.epochs)
        qann = qann_of(longer, data, CODES[label], width=width)
        snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=1))
        layers = qsnn.summary(qann).layers
        dense = sum(layer.macs for layer in layers[1:])
    steps = 2 if label == "T = 2 spikes" else 1
    measured = qsnn.benchmark(snn, data.test, timesteps=steps, firing="online")
    return {
        "accuracy": measured.accuracy[-1],
        # of ±1 every input counts: it adds or subtracts, it is never silent
        "synops": float(dense) if label == "±1" else float(measured.synops or 0.0),
        "weight_bytes": qsnn.summary(snn).weight_bytes,
    }


def answer(records: Sequence[Record]) -> str:
    """One sentence."""

    def at(label: str, key: str) -> float:
        return mean_of(records, label, key)

    spikes, cost = at("T = 2 spikes, width 1", "accuracy"), at("T = 2 spikes, width 1", "synops")
    parts = []
    for label in ("±1", "0/1"):
        points = sorted((at(f"{label}, width {w:g}", "synops"), at(f"{label}, width {w:g}", "accuracy"))
                        for w in WIDTHS[label])  # fmt: skip
        (x0, y0), (x1, y1) = points
        equal = y0 + (y1 - y0) * (cost - x0) / (x1 - x0)
        parts.append((label, at(f"{label}, width 1", "accuracy"), equal))
    more = spikes > max(equal for _, _, equal in parts)
    shown = "; ".join(f"{label}: {same:.2f} and {equal:.2f}" for label, same, equal in parts)
    return (
        f"Spikes over two steps {'carry' if more else 'do not carry'} more than bits: {spikes:.2f} %, against (equal "
        f"weights, and between the two widths at equal synops) {shown} %."
    )
