"""How near few online steps come to the QANN without distillation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from setting import Load, Row, Setting, mean_of, teacher_of

import qsnn
from qsnn.report.records import Record

QUESTION = "How should the IF neuron follow the activation that it replaces, without distillation?"
SIZE = "as `precision`"
TITLES = {
    "qann": "QANN [%]", "T=1": "T = 1 [%]", "T=2": "T = 2", "T=4": "T = 4", "T=8": "T = 8",
    "corrected T=1": "corrected, T = 1", "corrected T=2": "T = 2", "corrected T=4": "T = 4", "corrected T=8": "T = 8",
}  # fmt: skip
NOTE = (
    "W4/L2, online, not distilled. Spikes are uneven where most active neurons have one spike in two steps; with "
    "smaller thresholds (`QuantizeConfig(threshold_scale=...)`) more of them saturate. Corrected: `convert(qann, "
    "data)` fits the layers to the spikes that arrive. Signed spikes (`ConvertConfig(signed=True)`) take back what "
    "came too early."
)


THRESHOLD_SCALES = (1.0, 0.5, 0.35, 0.25)


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """W4/L2: accuracy of the QANN and of its online SNN, as it is and corrected on arriving spikes for T = 2."""
    data = load(setting.data)
    training = setting.training(0.04, batch_size=64, kd_weight=0.0)  # a gentler one keeps the spikes even
    for scale in THRESHOLD_SCALES:
        measure = partial(_online_row, setting, data, scale, training, False)
        yield f"threshold x {scale:g}", {"threshold_scale": scale, "train": asdict(training)}, measure
    for scale in THRESHOLD_SCALES[:2]:
        measure = partial(_online_row, setting, data, scale, training, True)
        known = {"threshold_scale": scale, "signed": True, "train": asdict(training)}
        yield f"threshold x {scale:g}, signed spikes", known, measure


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    reached = {
        label: max(mean_of(records, label, f"{kind}T=2") for kind in ("", "corrected ")) for label in labels
    }  # fmt: skip
    best = max(labels, key=reached.__getitem__)
    shown = ", ".join(f"{label} {mean_of(records, label, 'qann') - reached[label]:.2f}" for label in labels)
    return (
        f'Without distillation "{best}" answers best in two online steps, {reached[best]:.2f} %; points below its own '
        f"quantized network, with the better of the two conversions: {shown}."
    )


def _online_row(
    setting: Setting, data: qsnn.Data, scale: float, training: qsnn.TrainConfig, signed: bool
) -> dict[str, Any]:
    teacher = teacher_of(setting, data)
    qann = qsnn.quantize(teacher, data, qsnn.QuantizeConfig(weight_bits=4, levels=2, threshold_scale=scale))
    qsnn.fit(qann, data, training, label=f"x {scale:g}")
    found = {"qann": qsnn.accuracy(qann, data.test)}
    neurons = qsnn.ConvertConfig(timesteps=2, signed=signed)
    snns = {"": qsnn.convert(qann, neurons), "corrected ": qsnn.convert(qann, data, neurons)}
    for kind, snn in snns.items():
        curve = qsnn.benchmark(snn, data.test, timesteps=8, firing="online").accuracy
        found |= {f"{kind}T={t}": curve[t - 1] for t in (1, 2, 4, 8)}
    return found
