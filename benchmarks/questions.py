"""The notes' questions that `study.py` answers: resets, levels, readouts, the order of event frames.

Each yields rows like the studies of ``study.py``, and ends with one sentence that says what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import qsnn
from qsnn.dynamics import integrated
from qsnn.events import FrameSet
from qsnn.graph import recorded
from qsnn.records import Record

Row = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]
TIMESTEPS = (1, 2, 4, 8, 16)


def mean_of(records: Sequence[Record], label: str, key: str) -> float:
    """Mean over the seeds of one number of one row."""
    return fmean(float(r.metrics[key]) for r in records if r.name.partition("/")[2] == label)


# --- reset: soft, hard, decaying -------------------------------------------------------------------------------------

RESETS = ("soft", "hard", "decay")


def reset(setting: Any, data: qsnn.Data, teacher: nn.Module, qann: nn.Module) -> Iterator[Row]:
    """Accuracy against T of three resets: a float network calibrated for T = 8, and the W4/L2 network."""
    for kind in RESETS:
        yield f"float, {kind}", {"reset": kind}, partial(_reset_row, data, teacher, kind, True)
        yield f"W4/L2, {kind}", {"reset": kind}, partial(_reset_row, data, qann, kind, False)


def _reset_row(data: qsnn.Data, model: nn.Module, kind: str, calibrate: bool) -> dict[str, Any]:
    config = qsnn.ConvertConfig(timesteps=8, reset=kind)
    snn = qsnn.convert(model, data, config) if calibrate else qsnn.convert(model, config)
    curve = qsnn.benchmark(snn, data.test, timesteps=16, firing="online").accuracy
    return {f"T={t}": curve[t - 1] for t in TIMESTEPS}


def reset_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts = []
    for model in ("float", "W4/L2"):
        best = max(RESETS, key=lambda kind: mean_of(records, f"{model}, {kind}", "T=8"))
        shown = ", ".join(f"{kind} {mean_of(records, f'{model}, {kind}', 'T=8'):.1f}" for kind in RESETS)
        parts.append(f"{best} for the {model} network ({shown} % at T = 8)")
    return f"The best reset is {' and '.join(parts)}."


# --- levels: does accuracy fall as T grows past the levels it was trained for? ---------------------------------------


def levels(setting: Any, data: qsnn.Data, teacher: nn.Module, qann: nn.Module) -> Iterator[Row]:
    """The W4/L2 network at T = 1 to 32, online and deferred: accuracy, and the error of the rates by layer."""
    for firing in ("online", "deferred"):
        yield firing, {"firing": firing}, partial(_levels_row, data, qann, firing)


@torch.no_grad()
def _levels_row(data: qsnn.Data, qann: nn.Module, firing: str) -> dict[str, Any]:
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2, firing=firing))
    found = {}
    thetas = {name: float(node.threshold) for name, node in snn.neurons()}
    part = data.test.head(1000)  # type: ignore[attr-defined]
    for t in (*TIMESTEPS, 32):
        found[f"T={t}"] = qsnn.accuracy(snn, data.test, timesteps=t, firing=firing)
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
    return found


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


def readout(setting: Any, data: qsnn.Data, teacher: nn.Module, qann: nn.Module) -> Iterator[Row]:
    """Mean over time, potential of the last step, spike count and first spike of output neurons; corrected W4/L2."""
    for kind in ("mean", "last potential", "spike count", "first spike"):
        yield kind, {"readout": kind}, partial(_readout_row, data, qann, kind)


@torch.no_grad()
def _readout_row(data: qsnn.Data, qann: nn.Module, kind: str) -> dict[str, Any]:
    snn = qsnn.convert(qann, data, qsnn.ConvertConfig(timesteps=4))
    images, _ = next(qsnn.batches(data.val, 500))
    theta = float(snn.step_logits(images, timesteps=8).mean(0).max(1).values.median()) / 2
    right, seen = dict.fromkeys(TIMESTEPS[:4], 0), 0
    for images, labels in qsnn.batches(data.test, 500):
        z = snn.step_logits(images, timesteps=8)
        for t in right:
            right[t] += int((read_out(z[:t], kind, theta).argmax(1) == labels).sum())
        seen += len(labels)
    return {f"T={t}": 100.0 * count / seen for t, count in right.items()}


def read_out(z: Tensor, kind: str, theta: float) -> Tensor:
    """Scores (B, K) from the currents of the output layer (T, B, K), by one of the readouts; ties by the potential."""
    potential = z.sum(0)
    if kind == "mean":
        return potential / len(z)
    if kind == "last potential":  # without memory: the current of the last step alone
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


# --- time: is the order of event frames needed? -----------------------------------------------------------------------

ORDERS = ("in order", "shuffled", "summed", "repeated")


def frames_in_time(data: qsnn.Data, order: str) -> qsnn.Data:
    """The recordings with frames as they are, shuffled in each recording, all events in one of T frames, or the mean
    at every step (to the nearest event)."""

    def changed(part: Any) -> FrameSet:
        counts, steps = part.images, part.images.shape[1]
        if order == "shuffled":
            generator = torch.Generator().manual_seed(0)
            picks = torch.stack([torch.randperm(steps, generator=generator) for _ in range(len(counts))])
            counts = counts[torch.arange(len(counts))[:, None], picks]
        elif order == "summed":
            counts = torch.cat([counts.sum(1, keepdim=True).clamp(max=255).to(torch.uint8)] +
                               [torch.zeros_like(counts[:, :1])] * (steps - 1), 1)  # fmt: skip
        elif order == "repeated":
            counts = (counts.float().mean(1, keepdim=True).round()).to(torch.uint8).expand_as(counts).contiguous()
        return FrameSet(counts, part.labels, part.unit)

    return replace(data, train=changed(data.train), val=changed(data.val), test=changed(data.test))


def time(setting: Any, root: Any) -> Iterator[Row]:
    """N-MNIST in four steps: a spiking network trained and tested on each order of the frames."""
    for order in ORDERS:
        yield order, {"order": order, "timesteps": 4}, partial(_time_row, setting, root, order)


def _time_row(setting: Any, root: Any, order: str) -> dict[str, Any]:
    data = frames_in_time(qsnn.load_data("nmnist", root=root, timesteps=4), order)
    network = qsnn.create_model("ms-resnet", data, seed=setting.seed, timesteps=4)
    training = qsnn.TrainConfig(epochs=12, batch_size=32, optimizer="adamw", lr=0.005, seed=setting.seed)
    qsnn.fit(network, data, training, label=order)
    curve = qsnn.benchmark(network, data.test, timesteps=4).accuracy
    shuffled = qsnn.accuracy(network, frames_in_time(data, "shuffled").test)
    return {**{f"T={t}": curve[t - 1] for t in (1, 2, 4)}, "tested shuffled": shuffled}


def time_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {order: mean_of(records, order, "T=4") for order in ORDERS}
    shown = ", ".join(f"{order} {value:.1f}" for order, value in at.items())
    gain = at["in order"] - max(at[order] for order in ORDERS[1:])
    verdict = "is needed" if gain > 1 else "is not needed for these recordings"
    return f"The order of the frames {verdict}: {shown} % after four steps."
