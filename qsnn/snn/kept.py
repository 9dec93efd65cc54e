"""What a training step keeps of spikes: a byte each, in the place of the floats θ·s that the layers behind see.

A convolution keeps its input until the backward. Of a spiking network that input is a number of -1, 0 or 1 times θ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class _Spikes:
    """Spikes as bytes, and what makes θ·s of them again."""

    storage: StorageWeakRef
    version: int
    codes: Tensor
    theta: Tensor
    dtype: torch.dtype

    def amplified(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        """θ·s, bit for bit as the neuron made it, seen as a view of it was."""
        return self.codes.to(self.dtype).mul_(self.theta).as_strided(size, stride, offset)


_KNOWN: ContextVar[dict[int, _Spikes] | None] = ContextVar("qsnn_kept_spikes", default=None)


@contextmanager
def spikes_as_bytes() -> Iterator[None]:
    """Let what is made in the block keep :func:`known_spikes` for its backward as bytes; values are bit-equal.

    Other tensors are kept as they are, and one that was changed in place since is refused, as autograd does. Where
    somebody else says how tensors are kept (torch.utils.checkpoint, save_on_cpu), that stays as it is.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        yield
        return
    known: dict[int, _Spikes] = {}

    def pack(tensor: Tensor) -> Any:
        spikes = known.get(tensor.untyped_storage()._cdata)
        if spikes is None or (spikes.version, spikes.dtype) != (tensor._version, tensor.dtype):
            # detached: a node that keeps its own output would never be freed
            return tensor.detach(), tensor._version
        return spikes, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept[0], _Spikes):
            return kept[0].amplified(*kept[1:])  # type: ignore[no-any-return]
        tensor, version = kept
        if tensor._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward needs was changed in place after it was "
                f"used; write the operation without a trailing underscore or inplace=True"
            )
        return tensor  # type: ignore[no-any-return]

    token = _KNOWN.set(known)
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _KNOWN.reset(token)
        known.clear()  # autograd holds both functions to the end; each layer's bytes go when it is through


def known_spikes(amplified: Tensor, codes: Tensor, theta: Tensor) -> None:
    """Say that ``amplified`` is θ times ``codes``, bytes; see :func:`spikes_as_bytes`.

    Shape:
        amplified and codes: (T, B, *), in one layout; theta: () or (C, 1, ...).
    """
    known = _KNOWN.get()
    if known is not None:
        storage = amplified.untyped_storage()
        # the weak reference keeps the address from being given to another storage
        known[storage._cdata] = _Spikes(
            StorageWeakRef(storage), amplified._version, codes, theta, amplified.dtype
        )  # fmt: skip
