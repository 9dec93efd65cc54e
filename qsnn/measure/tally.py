"""What a benchmark adds up while it goes through the data: answers, early exits, mistakes by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsnn.data.images import summed

MARGINS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Leads of the class in front at which early exit is measured, besides the one asked for [1]."""


@dataclass(frozen=True, kw_only=True)
class Exit:
    """Early exit: an image stops once the class in front leads by ``margin``."""

    margin: float
    """Difference of the two largest probabilities of the running answer [0, 1]."""
    timesteps: float
    """Mean over the images."""
    accuracy: float
    """[%]"""


class Tally:
    """What is added up over the batches: right and equal answers for each T, early exits, the confusion matrix.

    Args:
        margins: leads at which early exit is measured [0, 1].
        steps: how many T's are measured; 0 for an ANN, which gives one answer.
        at: the place among them of the T whose confusion matrix is taken.
    """

    def __init__(self, margins: tuple[float, ...], steps: int, at: int) -> None:
        self.margins, self.at = margins, at
        self.right = torch.zeros(max(1, steps), dtype=torch.int64)
        self.agreeing = torch.zeros_like(self.right)
        self.left = torch.zeros(len(margins), 2, dtype=torch.float64)
        self.confusion: Tensor | None = None
        self.first_batch: Tensor | None = None
        self.seen = 0

    def add(self, answers: Tensor, images: Tensor, labels: Tensor, reference: nn.Module | None) -> None:
        """Count a batch.

        Args:
            answers: the answer after each T.
            images, labels: the batch.
            reference: a model whose answers are compared, or None.
        Shape:
            answers: (number of T's, B, K); images: (B, C, H, W); labels: (B,).
        """
        classes = answers.argmax(-1)
        self.right += (classes == labels).sum(1).cpu()
        if reference is not None:
            self.agreeing += (classes == reference.eval()(summed(images, reference)).argmax(1)).sum(1).cpu()
        self.left += _left(answers, classes, labels, self.margins)
        self.confusion = _confused(self.confusion, labels.cpu(), classes[self.at].cpu())
        self.first_batch = images if self.first_batch is None else self.first_batch
        self.seen += len(labels)

    def percent(self, counts: Tensor) -> tuple[float, ...]:
        """Counts of images as percents of all [%]."""
        return tuple(round(100.0 * int(count) / self.seen, 4) for count in counts)

    def exits(self) -> tuple[Exit, ...]:
        """Mean T and accuracy at each margin."""
        return tuple(
            Exit(margin=margin, timesteps=float(steps) / self.seen, accuracy=100.0 * float(right) / self.seen)
            for margin, (steps, right) in zip(self.margins, self.left.tolist(), strict=True)
        )


def _left(answers: Tensor, classes: Tensor, labels: Tensor, margins: tuple[float, ...]) -> Tensor:
    """Early exit, for each margin: the steps taken, and the right answers, over all images of a batch, (margins, 2)."""
    if not margins:
        return torch.zeros(0, 2, dtype=torch.float64)
    first, second = answers.softmax(-1).topk(2, -1).values.unbind(-1)
    last = len(answers) - 1
    rows = []
    for margin in margins:
        enough = (first - second) >= margin
        enough[last] = True
        stop = enough.int().argmax(0)
        picked = classes.gather(0, stop.unsqueeze(0))[0]
        rows.append([float((stop + 1).sum()), float((picked == labels).sum())])
    return torch.tensor(rows, dtype=torch.float64)


def _confused(total: Tensor | None, labels: Tensor, answers: Tensor) -> Tensor:
    """The confusion matrix after one batch more; it grows where a larger class is seen."""
    size = max(int(labels.max()), int(answers.max())) + 1
    size = size if total is None else max(size, len(total))
    counts = torch.bincount(labels * size + answers, minlength=size * size).reshape(size, size)
    if total is not None:
        counts[: len(total), : len(total)] += total
    return counts
