"""How the last layer is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from figures import lines
from setting import W4, Load, Row, Setting, first_of, mean_of, of_qann, qann_of
from tables import by_steps
from torch import Tensor

import qsnn
from qsnn.report.records import Record
from qsnn.snn.equations import integrated

QUESTION = "How is the output read: mean or potential, last step, spike count, first spike?"
SIZE = "as `reset`"
TITLES = by_steps(1, 2, 4, 8)
NOTE = "W4/L2, corrected on the spikes that arrive, not distilled."
FIGURE = lines()

TIMESTEPS = (1, 2, 4, 8)


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Mean over time (or potential: their order is the same), last step, spike count, first spike; corrected W4/L2."""
    data = load(setting.data)
    for kind in ("mean", "last step", "spike count", "first spike"):
        yield kind, of_qann(setting, readout=kind), partial(_readout_row, setting, data, kind)


def _readout_row(setting: Setting, data: qsnn.Data, kind: str) -> dict[str, Any]:
    snn = qsnn.convert(qann_of(setting, data, W4), data, qsnn.ConvertConfig(timesteps=4))
    return _read_by(snn, data, kind)


@torch.no_grad()
def _read_by(snn: qsnn.SNN, data: qsnn.Data, kind: str) -> dict[str, Any]:
    images, _ = next(qsnn.batches(data.val, 500))
    theta = float(snn.step_logits(images, timesteps=8).mean(0).max(1).values.median()) / 2
    right, seen = dict.fromkeys(TIMESTEPS, 0), 0
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


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    two = {label: mean_of(records, label, "T=2") for label in labels}
    best = max(two, key=two.__getitem__)
    return f"At T = 2 the {best} reads best ({', '.join(f'{label} {value:.1f}' for label, value in two.items())} %)."
