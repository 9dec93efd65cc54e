"""Accuracy and rates as T grows past the levels that were trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from figures import lines
from setting import W4, Load, Row, Setting, first_of, mean_of, of_qann, qann_of
from tables import by_steps
from torch import nn

import qsnn
from qsnn.graph.hooks import recorded
from qsnn.report.records import Record

QUESTION = "What have IF and ReLU in common: does accuracy fall as T grows past the levels?"
SIZE = "as `reset`"
TITLES = by_steps(1, 2, 4, 8, 16, 32)
NOTE = "W4/L2, converted only."
FIGURE = lines()

TIMESTEPS = (1, 2, 4, 8, 16, 32)


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """The W4/L2 network at T = 1 to 32, online and deferred: accuracy, and the error of the rates by layer."""
    data = load(setting.data)
    for firing in ("online", "deferred"):
        yield firing, of_qann(setting, firing=firing), partial(_levels_row, setting, data, firing)


def _levels_row(setting: Setting, data: qsnn.Data, firing: str) -> dict[str, Any]:
    return _levels_of(qann_of(setting, data, W4), data, firing)


@torch.no_grad()
def _levels_of(qann: nn.Module, data: qsnn.Data, firing: str) -> dict[str, Any]:
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2, firing=firing))
    found, test = {}, first_of(data)
    thetas = {name: float(node.threshold) for name, node in snn.neurons()}
    part = test.head(1000)
    for t in TIMESTEPS:
        found[f"T={t}"] = qsnn.accuracy(snn, test, timesteps=t, firing=firing)
        errors: dict[str, float] = dict.fromkeys(thetas, 0.0)
        for images, _ in qsnn.batches(part, 250):
            with recorded({name: qann.get_submodule(name) for name in thetas}) as activations:
                qann(images)
            with recorded(dict(snn.neurons())) as spikes:
                snn(images, timesteps=t, firing=firing)
            for name, theta in thetas.items():
                rate = spikes[name].unflatten(0, (t, -1)).mean(0)
                errors[name] += float((rate - activations[name] / theta).abs().mean()) * len(images) / len(part)
        for place, name in enumerate(thetas, 1):
            found[f"error of layer {place}, T={t}"] = errors[name]
    return {**found, "n": len(test)}


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    curve = {t: mean_of(records, "deferred", f"T={t}") for t in (2, 4, 32)}
    online = {t: mean_of(records, "online", f"T={t}") for t in (2, 32)}
    layers = sum(key.endswith("T=2") and key.startswith("error") for key in records[0].metrics)
    first, last = (mean_of(records, "deferred", f"error of layer {place}, T=32") for place in (1, layers))
    return (
        f"Deferred firing {'loses' if curve[32] < curve[2] else 'gains'} {abs(curve[2] - curve[32]):.2f} points from "
        f"T = 2, for which the levels were trained, to T = 32: rates then follow the clipped ReLU, no longer its two "
        f"levels (mean error {first:.3f} of θ in the first layer, {last:.3f} in the last); online firing "
        f"{'gains' if online[32] > online[2] else 'loses'} {abs(online[32] - online[2]):.2f} points."
    )
