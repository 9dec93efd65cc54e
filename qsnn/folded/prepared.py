"""What a folded layer computes once from its buffers: tables, gains, weights in the dtype they are used in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
            if key not in prepared or not all(source.unwritten() for source in prepared["sources"]):
                raise RuntimeError(
                    f"{type(self).__name__} is not prepared for this T and firing, or was changed since it was; call "
                    f"the network once as it is to be exported, then torch.export.export(network, (images,))"
                )
            return prepared[key]
        if not _same(self._buffers.values(), prepared.get("sources")):
            sources = [_Source(buffer) for buffer in self._buffers.values() if buffer is not None]
            prepared = self._prepared = {"sources": sources}
        if key not in prepared:
            prepared[key] = make()
        return prepared[key]


class _Source:
    """A buffer, and what it was when it was read."""

    __slots__ = ("buffer", "bytes", "counted", "memory", "version", "words")

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.memory, self.counted = buffer, buffer.data_ptr(), not buffer.is_inference()
        self.version = buffer._version if self.counted else 0
        self.words: Any = None
        plain = buffer.detach()
        if plain.device.type == "cpu" and plain.is_contiguous() and plain.numel():
            # the same memory; a dtype that numpy lacks is read as bytes
            memory: Any = plain.reshape(-1).view(torch.uint8).numpy()
            self.words = memoryview(memory)
        self.bytes = None if self.words is None else self.words.tobytes()

    def unwritten(self) -> bool:
        """Whether it holds what it held."""
        return (
            (not self.counted or self.buffer._version == self.version)
            and self.buffer.data_ptr() == self.memory
            and (self.words is None or self.words.tobytes() == self.bytes)
        )


def _same(buffers: Iterable[Tensor | None], sources: list[_Source] | None) -> bool:
    """Whether these are the buffers that were read, as they were then."""
    if sources is None:
        return False
    place = 0
    for buffer in buffers:
        if buffer is None:
            continue
        if place >= len(sources) or sources[place].buffer is not buffer or not sources[place].unwritten():
            return False
        place += 1
    return place == len(sources)
