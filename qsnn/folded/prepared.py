"""What a folded layer computes once from its buffers: tables, gains, weights in the dtype they are used in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREPARED = 32
"""Largest T whose tables are made before the first call [steps]."""


class Prepared(nn.Module):
    """A layer that keeps what it makes of its buffers, until one of them changes.

    A buffer that is put in another's place is another tensor, and one that is written to counts its versions. torch
    counts neither writes through ``.data`` nor those of numpy: on a CPU the bytes are compared as well, which costs
    less than a microsecond; elsewhere :meth:`forget` makes sure, and nothing is read back from a device. A program
    that ``torch.export`` writes holds what was prepared by the call before it; what has changed since then is refused,
    for a tracer cannot make it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._prepared: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or another process, prepares for itself."""
        return {**self.__dict__, "_prepared": {}}

    def forget(self) -> None:
        """Let the next call prepare everything anew."""
        self._prepared = {}

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for each key, and again when a buffer has changed.

        Raises:
            RuntimeError: ``torch.export`` asks for what no call has prepared, or what has changed since.
        """
        prepared = self._prepared  # another thread may put a new one in its place
        if torch.compiler.is_exporting():
            if key not in prepared or not all(source.unwritten() for source in prepared["sources"].values()):
                raise RuntimeError(
                    f"{type(self).__name__} is not prepared for this T and firing, or was changed since it was; call "
                    f"the network once as it is to be exported, then torch.export.export(network, (images,))"
                )
            return prepared[key]
        if not _same(self._buffers, prepared.get("sources")):
            sources = {name: _Source(buffer) for name, buffer in self._buffers.items()}
            prepared = self._prepared = {"sources": sources}
        if key not in prepared:
            prepared[key] = make()
        return prepared[key]


def _nothing() -> bytes:
    return b""


class _Source:
    """A buffer or None, and what it was when it was read."""

    __slots__ = ("address", "buffer", "bytes", "memory", "read", "version")

    def __init__(self, buffer: Tensor | None) -> None:
        self.buffer, self.version = buffer, -1
        self.read: Callable[[], bytes] = _nothing
        if buffer is not None:
            self.address: Callable[[], int] = buffer.data_ptr
            plain = buffer.detach()
            if plain.device.type == "cpu" and plain.is_contiguous() and plain.numel():
                # the same memory; a dtype that numpy lacks is read as bytes
                words: Any = plain.reshape(-1).view(torch.uint8).numpy()
                self.read = memoryview(words).tobytes
            elif not buffer.is_inference():
                self.version = buffer._version
        else:
            self.address = int
        self.memory, self.bytes = self.address(), self.read()

    def unwritten(self) -> bool:
        """Whether it holds what it held."""
        return (
            self.read() == self.bytes
            and self.address() == self.memory
            and (self.version < 0 or self.buffer._version == self.version)  # type: ignore[union-attr]
        )


def _same(buffers: Mapping[str, Tensor | None], sources: Mapping[str, _Source] | None) -> bool:
    """Whether these are the buffers that were read, as they were then."""
    if sources is None or len(buffers) != len(sources):
        return False
    for name, source in sources.items():  # of every layer at every call: no more than it must
        if source.version >= 0 or buffers.get(name) is not source.buffer:
            if buffers.get(name) is not source.buffer or not source.unwritten():
                return False
        elif source.read() != source.bytes or source.address() != source.memory:
            return False
    return True
