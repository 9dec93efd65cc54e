"""Memory of a network while it runs: how its tensors lie, that pages are kept, and how many images fit into a batch."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from qsnn.data.batches import batches
from qsnn.graph.arrived import QsnnWarning
from qsnn.options import as_bytes

MOST_BYTES = 2**30
"""What the tensors of one batch may take by default [byte]."""
_LIMIT: ContextVar[int] = ContextVar("qsnn_memory", default=MOST_BYTES)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's names for the options of mallopt, from malloc.h."""


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return a copy of a 4-d tensor with the strides of ``memory_format``; anything else as it is.

    ``Tensor.to`` leaves the strides of a tensor with one channel as they come. A convolution chooses its algorithm by
    them: it may be several times slower, and it may round differently, so that a continued run would not end with the
    weights of one that was not stopped.
    """
    return torch.empty_like(x, memory_format=memory_format).copy_(x) if x.dim() == 4 else x


def keep_freed_memory() -> None:
    """Let the C library of Linux (glibc) keep what is freed, instead of giving it back to the system, from now on.

    A training step frees tensors of megabytes and asks for the same again; by default each is mapped anew, and its
    pages are cleared at first touch, which takes up to a third of a step on a CPU. A limit that you set yourself
    (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``) stays, and elsewhere this does nothing.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def limit_memory(memory: int | str | None) -> None:
    """Let batches of this thread take at most so much from now on: a number of bytes, "512M", "2G"; None: as before.

    Raises:
        ValueError: no size.
    """
    if memory is not None:
        _LIMIT.set(as_bytes(memory))


@contextmanager
def within(memory: int | str | None) -> Iterator[None]:
    """Let batches take at most so much while the block runs, as :func:`limit_memory` says."""
    token = _LIMIT.set(_LIMIT.get() if memory is None else as_bytes(memory))
    try:
        yield
    finally:
        _LIMIT.reset(token)


def room(each: int) -> int:
    """How many images fit into memory, at least one, where each takes so many bytes."""
    return max(1, _LIMIT.get() // max(1, each))


def fewer(images: Tensor, each: int, verb: str) -> Tensor:
    """Return as many of the calibration images as fit into memory, and say so where they are fewer.

    Args:
        images: the calibration images.
        each: what the verb holds at one time for one of them [byte].
        verb: its name.
    Shape:
        images and returned: (N, \\*), N >= 1.
    """
    most = room(each)
    if most < len(images):
        warnings.warn(
            f"{verb} calibrates on {most} of {len(images)} images: each takes {each / 2**20:.1f} MiB and memory is "
            f"bounded by {_LIMIT.get() / 2**30:.2g} GiB; pass memory= (--memory 4G), or fewer images",
            QsnnWarning, stacklevel=3,
        )  # fmt: skip
    return images[:most]


@torch.no_grad()
def lay_out_(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Put all 4-d parameters of a model into a memory format, in place."""
    for parameter in model.parameters():
        parameter.data = laid_out(parameter, memory_format)


@torch.no_grad()
def batch_within(
    call: Callable[[Tensor], Any],
    data: Any,
    most: int,
    *,
    device: torch.device | str | None = None,
    model: nn.Module | None = None,
    limit: int | None = None,
) -> int:
    r"""Return how many images a call may take at once, so that its tensors fit into ``limit``.

    What a call takes at any moment is :math:`a + bB` for a batch of B images, with :math:`a, b \ge 0` (quantized
    weights do not grow with the batch). So k times the images take at most k times the peak p, and
    :math:`B \lfloor \mathrm{limit} / p(B) \rfloor` images fit. It starts with B = 1, and measures again while the
    result at least doubles: near the limit what does not grow weighs less.

    Args:
        call: runs the network on a batch.
        data: a Dataset, or a tensor of images. An iterable of batches keeps its own size: ``most`` is returned.
        most: the largest batch size, images.
        device, model: of the network, as for :func:`~qsnn.data.batches.batches`.
        limit: what the tensors may take at one time, without the parameters [byte]; default 1 GiB, or what
            :func:`within` says.
    Raises:
        TypeError: a tensor that is no batch.
    """
    limit = _LIMIT.get() if limit is None else limit
    if isinstance(data, Tensor) and data.dim() < 2:
        raise TypeError(f"expected a Dataset or images (B, *), got a tensor {tuple(data.shape)}; pass a loader")
    if not isinstance(data, Dataset | Tensor):
        return most
    size = 1
    while True:
        images = data[:size] if isinstance(data, Tensor) else next(batches(data, size, device=device, model=model))[0]
        more = min(most, len(images) * limit // max(1, peak_of(call, images)))
        if more == most or more < 2 * size or len(images) < size:
            return max(1, more)
        size = more


def peak_of(call: Callable[[Tensor], Any], images: Tensor) -> int:
    """The most that tensors take at one time while the network answers these images, without the parameters [byte].

    Shape:
        images: whatever the network takes.
    """
    with LiveMemory() as memory:
        call(images)
    return memory.peak


class LiveMemory(TorchDispatchMode):
    """Follows the memory of the tensors that are made while it is on; ``peak`` is the most at one time [byte].

    It counts storages, not what the allocator rounds them up to, so that the number is the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf) for leaf in tree_leaves((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id(leaf) not in given:
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._holders.get(key)
        if known is None and tensor._is_view():
            return  # a view of memory that was there before
        self._holders[key] = (known or 0) + 1
        if known is None:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size
