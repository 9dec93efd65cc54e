"""The notes' questions that the cached networks answer, nothing is trained: resets, levels, readouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from questions_training import W4, curve_of, mean_of
from setting import Row, Setting, qann_of, teacher_of
from torch import Tensor, nn

import qsnn
from qsnn.graph.hooks import recorded
from qsnn.report.records import Record
from qsnn.snn.equations import integrated

TIMESTEPS = (1, 2, 4, 8, 16)
IMAGES = 2_000
"""Test images, the first of the data set: many steps take long."""


def first_of(data: qsnn.Data) -> Any:
    """The test images that these questions are asked on."""
    return data.test.head(IMAGES)  # type: ignore[attr-defined]


def _of_qann(setting: Setting, **options: Any) -> dict[str, Any]:
    """The config of a row that works on the W4/L2 network of the setting."""
    return {**options, "quantize": W4, "train": asdict(setting.low_bits())}


# --- reset: soft, hard, decaying -------------------------------------------------------------------------------------

RESETS = ("soft", "hard", "decay")


def reset(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """Accuracy against T of three resets: a float network calibrated for T = 8, and the W4/L2 network."""
    for kind in RESETS:
        yield f"float, {kind}", _of_qann(setting, reset=kind), partial(_reset_row, setting, data, kind, True)
        yield f"W4/L2, {kind}", _of_qann(setting, reset=kind), partial(_reset_row, setting, data, kind, False)


def _reset_row(setting: Setting, data: qsnn.Data, kind: str, floating: bool) -> dict[str, Any]:
    config = qsnn.ConvertConfig(timesteps=8, reset=kind)
    snn = qsnn.convert(teacher_of(setting, data), data, config) if floating else qsnn.convert(
        qann_of(setting, data, W4), config
    )  # fmt: skip
    test = first_of(data)
    return {**curve_of(snn, test, 16), "n": len(test)}


def reset_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts = []
    for model in ("float", "W4/L2"):
        best = max(RESETS, key=lambda kind: mean_of(records, f"{model}, {kind}", "T=8"))
        shown = ", ".join(f"{kind} {mean_of(records, f'{model}, {kind}', 'T=8'):.1f}" for kind in RESETS)
        parts.append(f"{best} for the {model} network ({shown} % at T = 8)")
    return f"The best reset is {' and '.join(parts)}."


# --- levels: does accuracy fall as T grows past the levels it was trained for? ---------------------------------------


def levels(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """The W4/L2 network at T = 1 to 32, online and deferred: accuracy, and the error of the rates by layer."""
    for firing in ("online", "deferred"):
        yield firing, _of_qann(setting, firing=firing), partial(_levels_row, setting, data, firing)


def _levels_row(setting: Setting, data: qsnn.Data, firing: str) -> dict[str, Any]:
    return _levels_of(qann_of(setting, data, W4), data, firing)


@torch.no_grad()
def _levels_of(qann: nn.Module, data: qsnn.Data, firing: str) -> dict[str, Any]:
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2, firing=firing))
    found, test = {}, first_of(data)
    thetas = {name: float(node.threshold) for name, node in snn.neurons()}
    part = test.head(1000)
    for t in (*TIMESTEPS, 32):
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


def levels_answer(records: Sequence[Record]) -> str:
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


# --- readout: how the last layer is read ------------------------------------------------------------------------------


def readout(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """Mean over time (or potential: their order is the same), last step, spike count, first spike; corrected W4/L2."""
    for kind in ("mean", "last step", "spike count", "first spike"):
        yield kind, _of_qann(setting, readout=kind), partial(_readout_row, setting, data, kind)


def _readout_row(setting: Setting, data: qsnn.Data, kind: str) -> dict[str, Any]:
    snn = qsnn.convert(qann_of(setting, data, W4), data, qsnn.ConvertConfig(timesteps=4))
    return _read_by(snn, data, kind)


@torch.no_grad()
def _read_by(snn: qsnn.SNN, data: qsnn.Data, kind: str) -> dict[str, Any]:
    images, _ = next(qsnn.batches(data.val, 500))
    theta = float(snn.step_logits(images, timesteps=8).mean(0).max(1).values.median()) / 2
    right, seen = dict.fromkeys(TIMESTEPS[:4], 0), 0
    for images, labels in qsnn.batches(first_of(data), 500):
        z = snn.step_logits(images, timesteps=8)
        for t in right:
            right[t] += int((read_out(z[:t], kind, theta).argmax(1) == labels).sum())
        seen += len(labels)
    return {**{f"T={t}": 100.0 * count / seen for t, count in right.items()}, "n": seen}


def read_out(z: Tensor, kind: str, theta: float) -> Tensor:
    """Scores (B, K) from the currents of the output layer (T, B, K), by one of the readouts; ties by the potential."""
    potential = z.sum(0)
    if kind == "mean":
        return potential / len(z)
    if kind == "last step":  # its current alone: a potential without memory
        return z[-1]
    threshold = torch.tensor(theta)
    spikes, _ = integrated(z, threshold, torch.full_like(z[0], theta / 2))
    tie = 1e-3 * torch.sigmoid(potential / theta)
    if kind == "spike count":
        return spikes.sum(0) + tie
    steps = torch.arange(len(z), 0, -1).view(-1, 1, 1)  # the sooner the higher
    return (spikes * steps).amax(0) + tie


def readout_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    two = {label: mean_of(records, label, "T=2") for label in labels}
    best = max(two, key=two.__getitem__)
    return f"At T = 2 the {best} reads best ({', '.join(f'{label} {value:.1f}' for label, value in two.items())} %)."
