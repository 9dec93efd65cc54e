"""Event frames in order, shuffled, summed or repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from figures import lines
from setting import Load, Row, Setting, mean_of
from tables import by_steps

import qsnn
from qsnn.data.events import FrameSet
from qsnn.report.records import Record

QUESTION = "Is the time dimension needed?"
SIZE = "N-MNIST in four steps, 12 epochs"
DATA = "nmnist"
TITLES = {**by_steps(1, 2, 4), "tested shuffled": "T = 4, tested shuffled [%]"}
NOTE = "Float weights, trained from scratch on each order of the frames."
FIGURE = lines()


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


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """N-MNIST in four steps: a spiking network trained and tested on each order of the frames."""
    for order in ORDERS:
        yield order, {"order": order, "timesteps": 4}, partial(_time_row, setting, partial(load, "nmnist:4"), order)


def _time_row(setting: Setting, events: Callable[[], qsnn.Data], order: str) -> dict[str, Any]:
    data = frames_in_time(events(), order)
    network = qsnn.create_model("ms-resnet", data, seed=setting.seed, timesteps=4)
    training = qsnn.TrainConfig(epochs=12, batch_size=32, optimizer="adamw", lr=0.005, seed=setting.seed)
    qsnn.fit(network, data, training, label=order)
    curve = qsnn.benchmark(network, data.test, timesteps=4).accuracy
    shuffled = qsnn.accuracy(network, frames_in_time(data, "shuffled").test)
    return {**{f"T={t}": curve[t - 1] for t in (1, 2, 4)}, "tested shuffled": shuffled}


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {order: mean_of(records, order, "T=4") for order in ORDERS}
    shown = ", ".join(f"{order} {value:.1f}" for order, value in at.items())
    gain = at["in order"] - max(at[order] for order in ORDERS[1:])
    verdict = "is needed" if gain > 1 else "is not needed for these recordings"
    return f"The order of the frames {verdict}: {shown} % after four steps."
