"""Files: only regular ones are read and written; written beside and renamed, with a checksum where they are ours."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import struct
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

LARGEST_FILE = 16 * 2**30
"""Largest file that is read [byte]."""
LARGEST_HEADER = 16 * 2**20
"""Largest header of a safetensors file that is read [byte]; one of 1,000 tensors takes 0.1 MB."""
_UNSEALED = "0" * 64
_KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
}  # fmt: skip


def shown(text: str) -> str:
    """A text of a file's in one line, its control characters as escapes: a terminal is shown them, never sent them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# ---- reading


def read_bytes(path: str | Path) -> bytes:
    """Return what a regular file holds; a link is followed.

    Raises:
        FileNotFoundError: no such file.
        TypeError: ``path`` is no path.
        ValueError: a folder, device, pipe or socket, a file that may not be read, or one above ``LARGEST_FILE``.
    """
    path = as_path(path)
    try:
        found = path.stat()
        kind = _special(found.st_mode)
        if kind:
            raise ValueError(f"{path} is {kind}; expected a file")
        if found.st_size > LARGEST_FILE:
            raise ValueError(f"{path} has {found.st_size:,} bytes; expected at most {LARGEST_FILE:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def as_path(path: Any) -> Path:
    """A path, with ``~`` expanded.

    Raises:
        TypeError: neither a string nor a path.
        ValueError: a string that no file can be named by.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected the path of a file, a string or a Path, got {type(path).__name__}")
    if not str(path) or "\0" in str(path):
        raise ValueError(f"{str(path)!r} names no file")
    return Path(path).expanduser()


def _special(mode: int) -> str | None:
    return next((kind for is_kind, kind in _KINDS.items() if is_kind(mode)), None)


def header(raw: bytes) -> dict[str, Any] | None:
    """The JSON header of a safetensors file, or None where there is none."""
    if len(raw) < 8:
        return None
    (size,) = struct.unpack("<Q", raw[:8])
    if size > min(LARGEST_HEADER, len(raw) - 8):
        return None
    try:
        found = msgspec.json.decode(raw[8 : 8 + size])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def metadata(found: dict[str, Any] | None, key: str) -> str | None:
    """The text under ``key`` in the metadata of a header, or None where there is none."""
    meta = (found or {}).get("__metadata__")
    text = meta.get(key) if isinstance(meta, dict) else None
    return text if isinstance(text, str) else None


def unsealed(recipe: dict[str, Any]) -> str:
    """The JSON of a file's metadata, with a place for the checksum that :func:`sealed` fills."""
    return json.dumps({"checksum": _UNSEALED, **recipe})


def sealed(raw: bytes) -> bytes:
    """A safetensors file with its checksum: the SHA-256 of all its bytes, with 64 zeros in the checksum's place."""
    place = _place(raw, _UNSEALED)
    if place is None:
        raise ValueError("this file has no place for a checksum; write its metadata with unsealed()")
    return b"".join((raw[:place], hashlib.sha256(raw).hexdigest().encode(), raw[place + 64 :]))


def opened(path: str | Path, raw: bytes, text: str) -> dict[str, Any]:
    """Return the metadata that ``text`` holds, once they and all tensors have the checksum that stands there.

    Args:
        path: what messages begin with.
        raw: the whole file.
        text: the JSON of :func:`unsealed`, as the file's header has it.
    Warns:
        UserWarning: the file has no checksum; it is of a version before.
    Raises:
        ValueError: no JSON object, or one with another checksum than the file has.
    """
    try:
        found = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its metadata are no JSON ({error}); make it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: its metadata are no JSON object; make it again")
    if "checksum" not in found:
        warnings.warn(f"{path} has no checksum: it was written by an older version; save it again", stacklevel=4)
        return found
    checksum = found.pop("checksum")
    place = _place(raw, checksum) if isinstance(checksum, str) else None
    if place is not None:
        digest = hashlib.sha256(memoryview(raw)[:place])
        digest.update(_UNSEALED.encode())
        digest.update(memoryview(raw)[place + 64 :])
    if place is None or digest.hexdigest() != checksum:
        raise ValueError(f"{path} is damaged: it has another checksum than was written into it; make it again")
    return found


def _place(raw: bytes, checksum: str) -> int | None:
    """Where the checksum stands: in a JSON string within the JSON of the header, so that its quotes are escaped."""
    before = b'{\\"checksum\\": \\"'
    place = raw.find(before + checksum.encode(), 0, LARGEST_HEADER) if len(checksum) == 64 else -1
    return None if place < 0 else place + len(before)


# ---- writing


def target_of(path: str | Path, *inputs: str | Path | None) -> Path:
    """Return the file that writing ``path`` writes, ``~`` and links followed; make its folder.

    Args:
        path: a regular file, or a new name.
        inputs: files that are read, of which it may be none.
    Raises:
        ValueError: a folder, device or pipe, one of ``inputs``, or a place that cannot be written.
    """
    path = as_path(path)
    target = Path(os.path.realpath(path))
    try:
        kind = _special(target.stat().st_mode) if target.exists() else None
        if kind == "a folder":
            raise ValueError(f"expected a file to write, {path} is a folder; name a file in it")
        if kind:
            raise ValueError(f"expected a file to write, {path} is {kind}; only regular files are written")
        for name in inputs:
            if name is not None and Path(os.path.realpath(as_path(name))) == target:
                raise ValueError(f"{path} would be written over while it is read; name another file to write")
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror} ({target.parent})") from error
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise ValueError(f"{path} cannot be written: no permission ({target.parent})")
    return target


def output(path: str | Path, *inputs: str | Path | None) -> Path:
    """Return the path as it was given, ``~`` expanded, once it can be written; before the work, not after it.

    Raises:
        ValueError: as :func:`target_of` says.
    """
    target_of(path, *inputs)
    return as_path(path)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a whole file or none of it: written beside ``path``, flushed to the disk, then renamed.

    What a process that was killed left half-written beside it goes.

    Args:
        path: a regular file or a new name, a link is followed; its folder is made where missing.
        data: the content; a string is encoded as UTF-8.
    Raises:
        OSError: it could not be written (the message names the path); ``path`` is then as it was.
        ValueError: ``path`` is a folder, a device or a pipe.
    """
    target = target_of(path)
    _remove_left(target)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(beside, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # while it is held, its writer lives
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(beside, target)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def _remove_left(target: Path) -> None:
    """Remove the ``.part`` files of writers that are dead: nobody holds their lock."""
    for left in target.parent.glob(f".{_escaped(target.name)}.????????.part"):
        try:
            with open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_size:  # an empty one may be about to be locked
                    left.unlink(missing_ok=True)
        except OSError:  # its writer lives, or was faster
            continue


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


@contextmanager
def held(path: str | Path) -> Iterator[None]:
    """Hold the right to write ``path`` while the block runs; a process that dies loses it.

    Raises:
        ValueError: another process holds it; says which.
    """
    target = Path(os.path.realpath(as_path(path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip()
            os.close(file)
            raise ValueError(
                f"{path} is being written by process {shown(holder) or 'unknown'}; wait for it, or write to another "
                f"place"
            ) from None
        try:
            if os.fstat(file).st_ino == os.stat(lock).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(file)  # the one before removed it between our two calls
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(file)
