"""TensorBoard scalars of a training run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from qsnn.data.batches import batches
from qsnn.data.memory import batch_within
from qsnn.graph.hooks import watching
from qsnn.graph.trace import device_of
from qsnn.measure.heads import Curve, Tasks, heads
from qsnn.snn.network import SNN, TimeLoop, time_loop
from qsnn.training.resume import Epoch

_EVERY = 20
"""Steps between two points of a loss curve."""


class Board:
    """Writes scalars into a folder that TensorBoard reads; without a folder it does nothing.

    Args:
        folder: made where missing; None: write nothing.
    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("expected TensorBoard to be installed: pip install 'qsnn[tensorboard]'") from error
        self.writer = SummaryWriter(str(folder))

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, terms: dict[str, Tensor], lr: float) -> None:
        """Write the loss terms of a step, and its learning rate."""
        if self.writer is None or step % _EVERY:
            return
        for name, value in terms.items():
            self.writer.add_scalar(f"loss/{name}", float(value), step)
        self.writer.add_scalar("lr", lr, step)

    def epoch(self, step: int, epoch: Epoch, model: nn.Module, val: Any, tasks: Tasks | None) -> None:
        """Write loss and validation score of an epoch; of an SNN also the score by T and firing rate by layer."""
        if self.writer is None:
            return
        self.writer.add_scalar("epoch/loss", epoch.loss, step)
        loop = time_loop(model)
        if epoch.val_accuracy is not None:
            self.writer.add_scalar(f"epoch/validation {epoch.metric}", epoch.val_accuracy, step)
        if loop is not None and tasks is not None:
            curve, rates = _measured(loop, val, tasks)
            for t, value in enumerate(curve, 1):
                self.writer.add_scalar(f"{epoch.metric} by T/{t}", value, step)
            for name, rate in rates.items():
                self.writer.add_scalar(f"firing rate/{name}", rate, step)
        self.writer.flush()


@torch.no_grad()
def _measured(snn: SNN | TimeLoop, source: Any, tasks: Tasks) -> tuple[list[float], dict[str, float]]:
    """The score of the first head after each step, and spikes per neuron and step by layer [1]."""
    neurons = dict(snn.neurons())
    spikes, chances = dict.fromkeys(neurons, 0.0), dict.fromkeys(neurons, 0)

    def count(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        spikes[name] += float(output.abs().sum())
        chances[name] += output.numel()

    curve = Curve(snn.timesteps)
    size = batch_within(snn, source, 250, device=device_of(snn))
    with watching(neurons, count):
        for images, labels in batches(source, size, device=device_of(snn)):
            curve.add(tasks, heads(snn(images)), heads(labels))
    scores = next(iter(curve.read(tasks).values()))
    return scores, {name: spikes[name] / max(1, chances[name]) for name in neurons}
