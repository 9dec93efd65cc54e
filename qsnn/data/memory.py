"""How tensors lie in memory while a network trains: channels-last, and in pages that are kept."""

from __future__ import annotations

import ctypes
import os
import sys

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def lay_out_(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Put all 4-d parameters of a model into a memory format, in place."""
    for parameter in model.parameters():
        parameter.data = laid_out(parameter, memory_format)
