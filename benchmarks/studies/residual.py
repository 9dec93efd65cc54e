"""Spiking residual nets from scratch: do they differ, and how much does the learning rate matter?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from figures import lines
from setting import Load, Row, Setting, curve_of, mean_of
from tables import by_steps, count_of

import qsnn
from qsnn.report.records import Record

QUESTION = "Spiking-ResNet, or SEW-ResNet with ADD, AND, IAND?"
SIZE = "MNIST, all images, two epochs in batches of 8, T = 2"
DATA = "mnist"
NET = "residual nets of three blocks"
TITLES = by_steps(1, 2)
NOTE = "Float weights, trained from scratch with AdamW."
FIGURE = lines()


RESIDUAL: dict[str, tuple[str, dict[str, str]]] = {
    "Spiking-ResNet": ("spiking-resnet", {}),
    "SEW-ADD": ("sew-resnet", {"connect": "ADD"}),
    "SEW-AND": ("sew-resnet", {"connect": "AND"}),
    "SEW-IAND": ("sew-resnet", {"connect": "IAND"}),
}
RATES = (1e-2, 1e-4)


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """MNIST, T = 2, trained from scratch with AdamW, all images, in many small batches: 1e-4 needs so many updates."""
    data, own = load(setting.data), replace(setting, epochs=max(1, setting.epochs // 2), train_images=None)
    for rate in RATES:
        training = own.training(rate, optimizer="adamw", weight_decay=0.0, batch_size=8)
        for label, (name, options) in RESIDUAL.items():
            known = {"setting": asdict(own), "model": name, "options": options, "train": asdict(training)}
            yield f"{label}, lr {rate:g}", known, partial(_residual_row, own, data, name, options, training)


def _residual_row(
    setting: Setting, data: qsnn.Data, name: str, options: dict[str, str], training: qsnn.TrainConfig
) -> dict[str, Any]:
    network = qsnn.create_model(name, data, seed=setting.seed, timesteps=2, **options)
    qsnn.fit(network, data, training, label=name)
    return curve_of(network, data.test, 2)


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {rate: {label: mean_of(records, f"{label}, lr {rate:g}", "T=2") for label in RESIDUAL} for rate in RATES}
    high, low = at[1e-2], at[1e-4]
    drops = {label: high[label] - low[label] for label in RESIDUAL}
    shown = "; ".join(
        f"lr {rate:g}: {', '.join(f'{label} {value:.2f}' for label, value in found.items())} %"
        for rate, found in at.items()
    )
    spread, training = max(high.values()) - min(high.values()), records[0].config["train"]
    rows = [r for r in records if r.name.endswith(", lr 0.01")]
    wrong, n = 1 - sum(high.values()) / len(high) / 100, sum(r.n for r in rows) / len(high)
    error = 100 * math.sqrt(2 * wrong * (1 - wrong) / n)
    nets = "holds" if spread < 0.1 else "cannot be refuted" if spread < 0.1 + 2 * error else "does not hold"
    costs = {about: ", ".join(f"{label} {drop:.2f}" for label, drop in drops.items() if (2 < drop < 8) is about)
             for about in (True, False)}  # fmt: skip
    rates = "cannot be told yet, 1e-4 has hardly learned" if max(low.values()) < 50 else " and ".join(
        f"{'holds' if about else 'does not hold'} for {found}" for about, found in costs.items() if found
    )  # fmt: skip
    size = f"{count_of(training['epochs'], 'epoch')} of {training['train_images'] or 'all'} images"
    return (
        f"After {size}: that the nets differ by less than 0.1 point at 1e-2, as the notes found, {nets} (they differ "
        f"by {spread:.2f}, and the standard error of a difference is {error:.2f}); that 1e-4 costs about 4 points "
        f"{rates}: {shown}."
    )
