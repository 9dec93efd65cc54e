"""Files: a safetensors header is read before its tensors; what is written is written beside and renamed."""

from __future__ import annotations

import json
import os
import struct
import uuid
from pathlib import Path
from typing import Any


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole file or none of it: written beside ``path``, flushed to the disk, then renamed.

    Args:
        path: the file; its folder is made where missing.
        data: the content; a string is encoded as UTF-8.
    Raises:
        OSError: it could not be written; ``path`` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(beside, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def header(raw: bytes) -> dict[str, Any] | None:
    """The JSON header of a safetensors file, or None where there is none."""
    if len(raw) < 8:
        return None
    (size,) = struct.unpack("<Q", raw[:8])
    try:
        header = json.loads(raw[8 : 8 + size]) if size < 100_000_000 else None
    except ValueError:
        return None
    return header if isinstance(header, dict) else None

