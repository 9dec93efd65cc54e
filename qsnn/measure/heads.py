"""Networks of one answer or of several: the task of each head, found or said, and scores added up over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qsnn.measure.task import BINARY, IGNORED, SEGMENTATION, TASKS, Task
from qsnn.options import seen

_EQUAL = 1e-5
"""Two numbers that differ by less of the largest one are the same answer of a regression [1]."""


def heads(value: Any, name: str = "") -> dict[str, Any]:
    """Answers or labels by the name of their head: "" for one alone, "0" and "1" of a pair, keys of a dict.

    >>> heads({"box": [1, 2], "class": 3})
    {'box.0': 1, 'box.1': 2, 'class': 3}
    """
    if isinstance(value, Mapping):
        pairs = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, tuple | list):
        pairs = [(str(i), part) for i, part in enumerate(value)]
    else:
        return {name: value}
    return {at: leaf for key, part in pairs for at, leaf in heads(part, f"{name}.{key}" if name else key).items()}


def taught_by(target: Mapping[str, Tensor], head: str, shape: torch.Size) -> Tensor:
    """What a teacher answers in a head.

    Raises:
        ValueError: another shape, which a loss would broadcast without a word.
    """
    found = target.get(head)
    if found is None or found.shape != shape:
        where, got = f" in head {head!r}" if head else "", None if found is None else tuple(found.shape)
        raise ValueError(f"expected a teacher that answers {tuple(shape)}{where}, as its student does, got {got}")
    return found


@dataclass(frozen=True)
class Tasks:
    """The task of every head; losses are added over the heads, scores stand apart.

    Answers and labels come as :func:`heads` gives them.
    """

    by_head: Mapping[str, Task]
    classes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By head: how many classes labels may name, and how many dimensions a batch of labels has."""

    def check(self, labels: Mapping[str, Tensor]) -> None:
        """Refuse the labels of a batch that are not like those that the tasks were found from.

        Raises:
            ValueError: another head, number of dimensions, or a class that the network cannot give.
        """
        labels = self.own(labels)
        for name, (classes, dims) in self.classes.items():
            found, where = labels.get(name), f" of head {name!r}" if name else ""
            if found is None or found.dim() != dims:
                got = "none" if found is None else f"{tuple(found.shape)}"
                raise ValueError(f"expected labels{where} of {dims} dimensions, as in the first batch, got {got}")
            if not self.by_head[name].floats:
                _refuse_labels(self.by_head[name], classes, found, where)

    def own(self, labels: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Labels by the names of the heads; a network of one head, whatever holds it, takes them as one tensor."""
        (name, *others) = self.by_head
        return {name: labels[""]} if list(labels) == [""] and not others else labels

    @property
    def first(self) -> Task:
        """The task of the first head: what a bar or a curve shows of several."""
        return next(iter(self.by_head.values()))

    def loss(self, answers: Mapping[str, Tensor], labels: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
        """The loss of the labels, which are checked."""
        if not torch.compiler.is_compiling():
            self.check(labels)
        wanted = self.own(labels)
        return self.summed(lambda task, name: task.loss(answers[name], wanted[name], smoothing))

    def taught(self, answers: Mapping[str, Tensor], target: Mapping[str, Tensor], temperature: float) -> Tensor:
        """The distance from a teacher."""
        return self.summed(
            lambda task, name: task.taught(answers[name], taught_by(target, name, answers[name].shape), temperature)
        )

    def summed(self, term: Callable[[Task, str], Tensor]) -> Tensor:
        """A term, added over the heads."""
        first, *others = (term(task, name) for name, task in self.by_head.items())
        return sum(others, first)

    def count(self, answers: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of a batch, by head."""
        self.check(labels)
        wanted = self.own(labels)
        return {name: task.count(answers[name], wanted[name]).cpu() for name, task in self.by_head.items()}

    def read(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The scores, by head."""
        return {name: task.read(sums[name]) for name, task in self.by_head.items()}

    def agreeing(self, answers: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
        """Decisions that are the same in two networks, and all, (2,)."""
        same = total = 0
        for name, task in self.by_head.items():
            mine, other = task.decide(answers[name]), task.decide(others[name])
            other = other.reshape(mine.shape)
            near = _EQUAL * float(other.abs().max()) if task.floats else 0.0
            same += int(((mine - other).abs() <= near).sum())
            total += mine.numel()
        return torch.tensor([same, total])


class Curve:
    """Scores after each of several steps, added up over batches.

    Args:
        steps: how many answers an image has.
    """

    def __init__(self, steps: int) -> None:
        self.sums: list[dict[str, Tensor]] = [{} for _ in range(steps)]

    def add(self, tasks: Tasks, answers: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> None:
        """Add a batch; answers: (steps, B, \\*) of each head."""
        for t, sums in enumerate(self.sums):
            for name, part in tasks.count({name: each[t] for name, each in answers.items()}, labels).items():
                sums[name] = sums[name] + part if name in sums else part

    def read(self, tasks: Tasks) -> dict[str, list[float]]:
        """The scores of each head, one for each step."""
        scores = [tasks.read(sums) for sums in self.sums]
        return {name: [score[name] for score in scores] for name in tasks.by_head}


Asked = str | Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tasks | None
"""A task by name; one for each head, in the structure of the answers; or None: found from answers and labels."""


def find_tasks(answers: Any, labels: Any, asked: Asked = None) -> Tasks:
    """Return the task of every head of a network, and refuse labels that do not belong to its answers.

    Args:
        answers: of a batch, without time: a tensor, or a tuple, list or dict of them.
        labels: of the same images, in the same structure; there may be more of them than answers. For a single answer
            in a tuple, list or dict a tensor will do.
        asked: what the user says.
    Raises:
        ValueError: the structures differ, an unknown task, shapes or labels that fit none, or two alike.

    >>> find_tasks(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0])).first.name
    'binary'
    """
    if isinstance(asked, Tasks):
        return asked
    found, wanted = heads(answers), heads(labels)
    if len(found) == 1 and list(wanted) == [""]:  # one answer in a dict, as libraries give it
        wanted = dict.fromkeys(found, labels)
    if list(found) != list(wanted):
        if set(found) != set(wanted):
            have, got = (", ".join(map(repr, names)) if [*names] != [""] else "one tensor" for names in (found, wanted))
            raise ValueError(
                f"expected labels in the structure of the network's answers ({have}), got {got}; let the data give "
                f"(images, labels) with a label for each answer, or pass a loss of your own: fit(..., loss=...)"
            )
        wanted = {name: wanted[name] for name in found}
    names = heads(asked)
    names = dict.fromkeys(found, asked) if [*names] == [""] else names
    if set(names) != set(found) or not all(name is None or name in TASKS for name in names.values()):
        raise ValueError(f"expected task to be one of {', '.join(TASKS)}, or one for each head, got {seen(asked)}")
    tasks = {name: _find(found[name], wanted[name], names[name], name) for name in found}
    known = {name: (_classes(task, found[name]), wanted[name].dim()) for name, task in tasks.items()}
    return Tasks(tasks, known)


def _classes(task: Task, answers: Tensor) -> int:
    return 2 if task is BINARY or answers.dim() < 2 else max(2, answers.shape[1])


def _find(answers: Any, labels: Any, asked: str | None, head: str) -> Task:
    where = f" of head {head!r}" if head else ""
    if not isinstance(answers, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(f"expected tensors as answers and labels{where}, got {type(answers).__name__}")
    shapes = f"answers{where} {_shown(answers)} and {str(labels.dtype).removeprefix('torch.')} labels {_shown(labels)}"
    floating = labels.is_floating_point()
    if asked is not None:
        task = TASKS[asked]
        if not task.fits(answers, labels):
            raise ValueError(f"expected {task.takes} for task={asked!r}, got {shapes}; pass the task that fits")
    else:
        fitting = [task for task in TASKS.values() if task.floats == floating and task.fits(answers, labels)]
        if not fitting:
            whole = floating and labels.dim() == 1 and bool((labels == labels.round()).all())
            classes = "labels.long(), if they are classes; " if whole and answers.dim() == 2 else ""
            kinds = "; ".join(f"{task.name!r}: {task.takes}" for task in TASKS.values())
            hint = f"pass {classes}labels that fit, and task= where it is said ({kinds})"
            raise ValueError(f"{shapes} belong to no task; {hint}")
        task = fitting[0]
        zeros_and_ones = bool(((labels == 0) | (labels == 1)).all())
        wide = labels.dim() == 2 and labels.shape[1] > (1 if floating else 2) and zeros_and_ones
        if (task is BINARY or floating) and wide and bool((labels.sum(1) == 1).all()):
            raise ValueError(
                f"{shapes} look like one class an image, as one-hot; pass labels.argmax(1), or task='binary' for "
                f"{labels.shape[1]} decisions an image"
            )
        if floating and zeros_and_ones:
            raise ValueError(
                f"{shapes}, all 0 or 1, may be numbers or decisions; pass task='regression', or task='binary' "
                f"('segmentation' of a map)"
            )
    if not task.floats:
        _refuse_labels(task, _classes(task, answers), labels, where)
    return task


def _refuse_labels(task: Task, classes: int, labels: Tensor, where: str) -> None:
    counted = labels[(labels >= 0) & (labels != IGNORED)] if task is SEGMENTATION else labels
    if not counted.numel():
        return
    low, high = float(counted.min()), float(counted.max())
    if low < 0 or high >= classes or bool((counted != counted.long()).any()):
        got = f"{low:g} to {high:g}" if low != high else f"{low:g}"
        raise ValueError(
            f"expected labels from 0 to {classes - 1}{where} (task={task.name!r}), got {got}; give the "
            f"network an output a class, or pass task='regression' for numbers"
        )


def _shown(tensor: Tensor) -> str:
    return f"({', '.join(['B', *map(str, tensor.shape[1:])])}{',' if tensor.dim() == 1 else ''})"
