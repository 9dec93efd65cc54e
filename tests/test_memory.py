"""data/memory.py: a batch takes no more than it may, and what is answered does not depend on its size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qsnn
from qsnn.data.memory import LiveMemory, batch_within
from qsnn.measure import accuracy as measure_accuracy
from qsnn.measure import benchmark as measure_benchmark

IMAGE = 64 * 4
"""Bytes of a digit as float32."""


def widened(images: torch.Tensor) -> torch.Tensor:
    """Takes 100 times the images, and 4,000 bytes besides."""
    held = torch.zeros(1000)
    return images.flatten(1).repeat(1, 100) + held[0]


def peak(call: object, images: torch.Tensor) -> int:
    with LiveMemory() as memory:
        call(images)  # type: ignore[operator]
    return memory.peak


@pytest.mark.parametrize("limit", [0, 4_000, 100_000, 1_000_000, 2**30])
def test_the_batch_fits_and_twice_the_batch_does_not(limit: int, digits: qsnn.Data) -> None:
    size = batch_within(widened, digits.test, 200, limit=limit)
    images = next(qsnn.batches(digits.test, 400))[0]
    assert size == 1 or peak(widened, images[:size]) <= limit
    assert size == 200 or peak(widened, images[: 2 * size]) > limit


def test_the_batch_by_hand(digits: qsnn.Data) -> None:
    # a sum holds both its terms: 200 times an image; one image of 51,200 bytes beside 4,000 that do not grow
    assert batch_within(widened, digits.test, 500, limit=10 * 200 * IMAGE) == 9
    assert batch_within(widened, digits.test, 3, limit=10 * 200 * IMAGE) == 3
    assert batch_within(widened, digits.test, 500, limit=0) == 1


def test_an_iterable_keeps_its_batches() -> None:
    once = iter([(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))])
    assert batch_within(widened, once, 77) == 77 and len(list(once)) == 1


def test_answers_do_not_depend_on_the_memory_there_is(
    snn: qsnn.SNN, qann: nn.Module, digits: qsnn.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def little(*args: object, **options: object) -> int:
        sizes.append(batch_within(*args, **options, limit=1_500_000))  # type: ignore[arg-type]
        return sizes[-1]

    whole = qsnn.accuracy(snn, digits.test), qsnn.benchmark(snn, digits.test, timesteps=4, reference=qann)
    monkeypatch.setattr(measure_accuracy, "batch_within", little)
    monkeypatch.setattr(measure_benchmark, "batch_within", little)
    parts = qsnn.accuracy(snn, digits.test), qsnn.benchmark(snn, digits.test, timesteps=4, reference=qann)
    assert all(1 <= size < 250 for size in sizes) and len(sizes) == 2
    assert parts[0] == whole[0]
    for name in ("accuracy", "agreement", "confusion", "synops_by_t", "spike_rate_by_t", "spike_rates", "layers", "n"):
        assert getattr(parts[1], name) == getattr(whole[1], name), name
