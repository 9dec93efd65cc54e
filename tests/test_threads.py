"""T, firing and potentials belong to the call: many threads share one network, copies and workers keep what it is."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import qsnn

SECONDS = float(os.environ.get("QSNN_THREADS_SECONDS", "1"))
"""How long threads run [s]; the law is about ten seconds and more, tests have less time."""


def _calls(images: Tensor) -> list[tuple[Tensor, int, str]]:
    return [
        (images[:size], timesteps, firing)
        for size in (1, 5, 16) for timesteps in (1, 2, 5, 8) for firing in ("online", "deferred")
    ]  # fmt: skip


@pytest.mark.parametrize("folded", [True, False])
def test_eight_threads_with_calls_of_their_own_get_their_own_answers(snn: qsnn.SNN, images: Tensor, folded: bool):
    network = qsnn.fold(snn) if folded else snn
    calls = _calls(images)
    with torch.no_grad():
        wanted = [network(x, timesteps=t, firing=firing) for x, t, firing in calls]
    wrong, seen, end = [], [], time.monotonic() + SECONDS

    def work(rank: int) -> None:
        place = rank
        with torch.no_grad():
            while time.monotonic() < end:
                x, t, firing = calls[place % len(calls)]
                same = torch.equal(network(x, timesteps=t, firing=firing), wanted[place % len(calls)])
                (seen if same else wrong).append(place % len(calls))
                place += 7

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) >= 8 and not wrong


def test_networks_are_followed_one_at_a_time(teacher: nn.Module, digits: qsnn.Data, images: Tensor):
    """torch.fx is for one thread: it puts its own functions into torch's classes while it traces."""
    plain, found, wrong = vars(torch.autograd.Function)["apply"], [], []
    own = [copy.deepcopy(teacher) for _ in range(4)]

    def work(model: nn.Module) -> None:
        try:
            for _ in range(3):
                qann = qsnn.quantize(model, [(images, torch.zeros(len(images), dtype=torch.int64))])
                with torch.no_grad():
                    found.append(qsnn.fold(qsnn.convert(qann))(images))
        except ValueError as error:
            wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(model,)) for model in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(found) == 12 and all(torch.equal(found[0], other) for other in found)
    assert vars(torch.autograd.Function)["apply"] is plain


def _answered(network: nn.Module, images: Tensor, queue: mp.SimpleQueue) -> None:
    with torch.no_grad():
        queue.put(network(images).numpy().tolist())


def test_a_copy_a_pickle_and_a_process_answer_the_same_and_know_how_they_were_made(snn: qsnn.SNN, images: Tensor):
    folded = qsnn.fold(snn)
    with torch.no_grad():
        wanted = folded(images[:4])
        for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert torch.equal(other(images[:4]), wanted)
            assert other.qsnn_recipe == folded.qsnn_recipe
    queue = mp.get_context("spawn").SimpleQueue()
    process = mp.get_context("spawn").Process(target=_answered, args=(folded, images[:4], queue))
    process.start()
    found = torch.tensor(queue.get(), dtype=wanted.dtype)
    process.join()
    assert torch.equal(found, wanted)


def test_a_copy_of_a_quantized_network_keeps_its_recipe(qann: nn.Module):
    assert copy.deepcopy(qann).qsnn_recipe == qann.qsnn_recipe
