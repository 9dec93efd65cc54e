"""How often a network answers rightly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qsnn.data.images import batches, summed
from qsnn.data.memory import batch_within, keep_freed_memory
from qsnn.graph.arrived import arrived, evaluating
from qsnn.graph.trace import device_of
from qsnn.options import expect
from qsnn.snn.network import time_loop


@torch.no_grad()
def accuracy(model: nn.Module, source: Any, batch_size: int | None = None, **options: Any) -> float:
    """Return the percent of right answers; an SNN answers after its last step.

    Args:
        model: ANN or SNN.
        source: a Dataset or an iterable of (images, labels).
        batch_size: images a call; by default up to 500, as many as fit into 1 GiB.
        options: passed to the model, e.g. ``timesteps=4``.

    >>> accuracy(nn.Flatten(), [(torch.eye(4).view(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))])
    75.0
    """
    expect("accuracy(model, data.test)", "model", model, nn.Module)
    keep_freed_memory()
    model = arrived(model)
    with evaluating(model):
        if batch_size is None:
            batch_size = batch_within(lambda x: answer(model, x, **options), source, 500, device=device_of(model))
        right, seen = count_right(model, source, batch_size, (0, 1), **options)
    return 100.0 * right / max(1, seen)


def answer(model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    """The logits (B, K) of any network; a spiking one answers after its last step, and alone sees frames in time."""
    logits: Tensor = model(summed(images, model) if time_loop(model) is None else images, **options)
    return logits[-1] if logits.dim() == 3 else logits


@torch.no_grad()
def count_right(
    model: nn.Module, source: Any, batch_size: int, share: tuple[int, int], **options: Any
) -> tuple[int, int]:
    """Right answers, and all, of this process's share of the data."""
    right = seen = 0
    for images, labels in batches(source, batch_size, device=device_of(model), share=share):
        right += int((answer(model, images, **options).argmax(1) == labels).sum())
        seen += len(labels)
    return right, seen


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

