"""How often a network answers rightly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qsnn.data.batches import batches, summed
from qsnn.data.memory import batch_within, keep_freed_memory, within
from qsnn.graph.arrived import arrived, evaluating
from qsnn.measure.heads import Asked, Tasks, find_tasks, heads
from qsnn.measure.task import told
from qsnn.options import expect
from qsnn.snn.network import time_loop


@torch.no_grad()
def accuracy(
    model: nn.Module,
    source: Any,
    batch_size: int | None = None,
    *,
    task: Asked = None,
    memory: int | str | None = None,
    **options: Any,
) -> Any:
    """Return the percent of right answers; an SNN answers after its last step.

    Of a segmentation it is the mean IoU [%], of a regression the mean squared error; of several heads a dict of these,
    by the name of the head ("0" and "1" of a pair).

    Args:
        model: ANN or SNN.
        source: a Dataset or an iterable of (images, labels).
        batch_size: images a call; by default up to 500, as many as fit into ``memory``.
        task: "classification", "binary", "segmentation" or "regression", or one for each head; by default found from
            the labels and the shape of the answers.
        memory: what a batch may take, bytes or "512M"; default 1 GiB.
        options: passed to the model, e.g. ``timesteps=4``.
    Raises:
        ValueError: labels that do not belong to the answers.

    >>> accuracy(nn.Flatten(), [(torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))])
    75.0
    """
    expect("accuracy(model, data.test)", "model", model, nn.Module)
    keep_freed_memory()
    model = arrived(model)
    with evaluating(model):
        if batch_size is None:
            with within(memory):
                batch_size = batch_within(lambda x: answer(model, x, **options), source, 500, model=model)
        tasks, sums = added_up(model, source, batch_size, (0, 1), task, **options)
    scores = tasks.read(sums)
    return scores[""] if [*scores] == [""] else scores


def score(model: nn.Module, source: Any, task: Asked = None) -> str:
    """The score in words, of each head: "accuracy 91.20 %"."""
    tasks = find_task(model, source, task)
    found = heads(accuracy(model, source, task=tasks))
    return ", ".join(told(task.metric, found[name]) for name, task in tasks.by_head.items())


def answer(model: nn.Module, images: Tensor, **options: Any) -> Any:
    """The answer of any network, (B, K), or one for each of its heads.

    A spiking network answers after its last step, and alone sees frames in time.
    """
    if time_loop(model) is None:
        return model(summed(images, model), **options)
    return tree_map(lambda answers: answers[-1], model(images, **options))


@torch.no_grad()
def find_task(model: nn.Module, source: Any, task: Asked = None) -> Tasks:
    """Return the task of every head, found from the first labels of the data and an answer; the model stays as it is.

    Raises:
        ValueError: labels that do not belong to the answers.
    """
    if isinstance(task, Tasks):
        return task
    images, labels = next(batches(source, 64, model=model))
    with evaluating(model):
        return find_tasks(answer(model, images[:2]), labels, task)


@torch.no_grad()
def added_up(
    model: nn.Module, source: Any, batch_size: int, share: tuple[int, int], task: Asked = None, **options: Any
) -> tuple[Tasks, dict[str, Tensor]]:
    """The tasks, and the sums that scores are read from, of this process's share of the data."""
    sums: dict[str, Tensor] = {}
    for images, labels in batches(source, batch_size, model=model, share=share):
        answers = answer(model, images, **options)
        task = tasks = find_tasks(answers, labels, task)
        for name, part in tasks.count(heads(answers), heads(labels)).items():
            sums[name] = sums[name] + part if name in sums else part
    return tasks, sums


Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution [1]."""


def interval(correct_fraction: float, n: int) -> tuple[float, float]:
    r"""Bound an accuracy: the 95 % Wilson score interval of a proportion p of n,

    .. math:: \frac{p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}, \quad z = 1.96.

    >>> low, high = interval(0.5, 100)
    >>> round(low, 4), round(high, 4)
    (0.4038, 0.5962)

    Args:
        correct_fraction: p, share of right answers [0 to 1].
        n: answers counted, >= 1.
    Raises:
        ValueError: p outside [0, 1] or n < 1.
    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    if not 0 <= correct_fraction <= 1:
        raise ValueError(f"expected a fraction from 0 to 1, came {correct_fraction}; divide a percentage by 100")
    if n < 1:
        raise ValueError(f"expected n >= 1 answers, came {n}; measure on at least one image")
    p, z2n = correct_fraction, Z95**2 / n
    centre = (p + z2n / 2) / (1 + z2n)
    half = math.sqrt(z2n * (p * (1 - p) + z2n / 4)) / (1 + z2n)
    # at p = 0 and p = 1 one bound is p itself, which rounding may miss by 1e-17
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))
