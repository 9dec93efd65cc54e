"""What a benchmark adds up while it goes through the data: answers, early exits, mistakes by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qsnn.measure.accuracy import answer
from qsnn.measure.heads import Asked, Curve, Tasks, find_tasks, heads

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
    """What is added up over the batches: scores and equal answers for each T, early exits, the confusion matrix.

    Args:
        margins: leads at which early exit is measured [0, 1].
        steps: how many T's are measured; 0 for an ANN, which gives one answer.
        at: the place among them of the T whose confusion matrix is taken.
        task: what the user says of the task of each head; None: found from the first batch.
    """

    def __init__(self, margins: tuple[float, ...], steps: int, at: int, task: Asked = None) -> None:
        self.margins, self.at, self.asked = margins, at, task
        self.tasks: Tasks | None = None
        self.curve = Curve(max(1, steps))
        self.agreeing = torch.zeros(max(1, steps), 2, dtype=torch.int64)
        self.left = torch.zeros(len(margins), 2, dtype=torch.float64)
        self.confusion: Tensor | None = None
        self.first_batch: Tensor | None = None
        self.seen = 0

    def add(self, answers: Any, images: Tensor, labels: Any, reference: nn.Module | None) -> None:
        """Count a batch.

        Args:
            answers: the answer after each T, of one head or of several.
            images, labels: the batch.
            reference: a model whose answers are compared, or None.
        Shape:
            answers: (number of T's, B, K), or (number of T's, B, \\*); images: (B, C, H, W); labels: (B,) or (B, \\*).
        Raises:
            ValueError: labels that do not belong to the answers, or early exit of answers that have no lead.
        """
        if self.tasks is None:
            self.tasks = find_tasks(tree_map(lambda each: each[0], answers), labels, self.asked)
        tasks, found, wanted = self.tasks, heads(answers), heads(labels)
        self.curve.add(tasks, found, wanted)
        if reference is not None:
            others = heads(answer(reference, images))
            for t, sums in enumerate(self.agreeing):
                sums += tasks.agreeing({name: each[t] for name, each in found.items()}, others)
        self._classes(next(iter(found.values())), next(iter(wanted.values())))
        self.first_batch = images if self.first_batch is None else self.first_batch
        self.seen += len(images)

    def _classes(self, answers: Tensor, labels: Tensor) -> None:
        """Early exits and the confusion matrix, which exist where an image has one class."""
        assert self.tasks is not None
        task = self.tasks.first
        classes = torch.stack([task.decide(each) for each in answers])
        if len(self.tasks.by_head) > 1 or task.lead is None or classes.numel() != len(answers) * len(labels):
            if self.margins:
                raise ValueError(f"early exit needs one class an image, got {task.takes}; leave exit_margin out")
            return
        classes, labels = classes.reshape(answers.shape[:2]), labels.reshape(-1).long()
        if self.margins:
            self.left += _left(task.lead(answers), classes, labels, self.margins)
        self.confusion = _confused(self.confusion, labels.cpu(), classes[self.at].cpu())

    def scores(self) -> dict[str, tuple[float, ...]]:
        """The scores of each head, one for each T; percents to four digits."""
        assert self.tasks is not None
        found = self.curve.read(self.tasks)
        return {
            name: tuple(round(value, 4) if task.unit else value for value in found[name])
            for name, task in self.tasks.by_head.items()
        }

    def agreement(self) -> tuple[float, ...]:
        """Decisions equal to the reference's, for each T [%]."""
        return tuple(round(100.0 * same / total, 4) for same, total in self.agreeing.tolist())

    def exits(self) -> tuple[Exit, ...]:
        """Mean T and accuracy at each margin."""
        return tuple(
            Exit(margin=margin, timesteps=float(steps) / self.seen, accuracy=100.0 * float(right) / self.seen)
            for margin, (steps, right) in zip(self.margins, self.left.tolist(), strict=True)
        )


def _left(lead: Tensor, classes: Tensor, labels: Tensor, margins: tuple[float, ...]) -> Tensor:
    """Early exit, for each margin: the steps taken, and the right answers, over all images of a batch, (margins, 2)."""
    last = len(classes) - 1
    rows = []
    for margin in margins:
        enough = lead >= margin
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
