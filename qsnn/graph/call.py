"""What belongs to one call of a spiking network, and never to its layers: T, the way of firing, frames or one image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch

SHORT = (torch.bfloat16, torch.float16)
"""The dtypes of a layer's answer under autocast."""


@dataclass(frozen=True)
class Call:
    """One call of a spiking network."""

    timesteps: int = 1
    """Simulation steps T; layers see time folded into the batch, (T·B, \\*)."""
    firing: str = "online"
    """"online" or "deferred"."""
    frames: bool = False
    """Whether every step has an image of its own; else one image stands for all T."""


_CURRENT: ContextVar[Call | None] = ContextVar("qsnn_call", default=None)


def current() -> Call | None:
    """Return the call that runs in this thread, or None where a layer is called by itself."""
    return _CURRENT.get()


def this_call() -> Call:
    """Return the call that runs in this thread, or one of a single step where a layer is called by itself."""
    return _CURRENT.get() or Call()


def steps() -> int:
    """Return T of the call that runs in this thread, 1 where a layer is called by itself."""
    return this_call().timesteps


@contextmanager
def calling(call: Call) -> Iterator[Call]:
    """Let every layer that runs inside the block in this thread belong to ``call``."""
    token = _CURRENT.set(call)
    try:
        yield call
    finally:
        _CURRENT.reset(token)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes of the tensors while the block runs: autocast would shorten sums that must be exact."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
