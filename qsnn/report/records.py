"""Results are records: what was measured, on which data, by which code, on which machine; and safe writing of files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import subprocess
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qsnn.files import target_of

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One result, with everything needed to ask for it again.

    No field has a default: a line read back must never be filled in with the machine or the date that reads it.
    """

    name: str
    """What was measured, e.g. "run/student"."""
    data: str
    """Name of the data set."""
    seed: int
    """Seed of the run."""
    n: int
    """Test images the metrics were measured on."""
    metrics: dict[str, Any]
    """Name to number, or to a list of numbers (None where there is none)."""
    config: dict[str, Any]
    """Every setting, as JSON has it: string keys, lists for tuples."""
    environment: dict[str, Any]
    """What ``environment()`` returned on the machine that measured."""
    time: str
    """When it was measured, ISO 8601, UTC."""


def now() -> str:
    """Return the present second in UTC as ISO 8601, for ``Record.time``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(device: str | None = None) -> dict[str, Any]:
    """Say which code, versions and device make a result; no host name, no user, no path.

    ``commit`` is None unless this very file is tracked by git; ``dirty`` tells whether a file of the package differs
    from that commit. A package that is not installed has the version None.

    Args:
        device: what the result is measured on, "cpu" or "cuda"; None takes CUDA where there is one.
    """
    import torch

    # the number of threads may change during a process; the rest is looked up once
    return {**_machine(device), "threads": torch.get_num_threads()}


@cache
def _machine(device: str | None) -> dict[str, Any]:
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # a venv may lie inside a foreign checkout
    tracked = _git("ls-files", "--error-unmatch", "report/records.py") is not None
    commit = _git("rev-parse", "HEAD") if tracked else None
    return {
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--", ".")),
        "qsnn": _version("qsnn") or "0",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "brevitas", "spikingjelly", "numpy")},
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu(),
        "cores": os.cpu_count(),
    }


def _git(*args: str) -> str | None:
    # without optional locks, `status` leaves the index alone while someone else commits
    command = ["git", "--no-optional-locks", "-C", str(_PACKAGE), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)  # reads metadata: importing brevitas takes seconds
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def append(path: str | Path, record: Record) -> None:
    """Add ``record`` to a file of JSON lines, in one write, so that two processes may append to the same file.

    A last line that was cut by a crash is removed: its record was never reported as written.

    Args:
        path: the file; it and its folder are made where missing.
        record: what to add.
    Raises:
        ValueError: the record holds something that JSON has no word for (nan, a tensor, a path), or the file holds
            something else than records.
        OSError: the disk took only a part of the line; names the path.
    """
    _append(path, record, once=False)


def append_once(path: str | Path, record: Record) -> bool:
    """Like :func:`append`, unless the file has this result already: of the same code and configuration, at any time.

    So a run that was stopped while it wrote its records, and goes on, doubles none.

    Returns:
        whether the record was written.
    """
    return _append(path, record, once=True)


def _append(path: str | Path, record: Record, *, once: bool) -> bool:
    try:
        text = json.dumps(asdict(record), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"record {record.name!r}: expected finite numbers, strings, None, lists and dicts, came: {error}; "
            f"convert with float(), str() or .tolist(), and write None for a number that does not exist"
        ) from error
    line = text.encode() + b"\n"
    target = target_of(path)
    file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process may be mending, too
        size = os.fstat(file).st_size
        whole = _whole(path, file, size)
        if whole < size:
            os.ftruncate(file, whole)
        if once and _same(path, record):
            return False
        written = os.write(file, line)
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    finally:
        os.close(file)
    if written != len(line):
        raise OSError(f"{path}: expected to write {len(line)} bytes, came {written}; free some space, append again")
    return True


def check_records(path: str | Path) -> None:
    """Refuse a file that is there and holds something else than records; commands call it before they measure.

    Raises:
        ValueError: it is no file of records.
    """
    target = target_of(path)
    if target.exists():
        file = os.open(target, os.O_RDONLY)
        try:
            _whole(path, file, os.fstat(file).st_size)
        finally:
            os.close(file)


def _whole(path: str | Path, file: int, size: int) -> int:
    """Bytes of the whole lines of a file of records; a last record that lacks only its newline is given one.

    Raises:
        ValueError: its first line is no record, nor the beginning of one.
    """
    begin = os.pread(file, 16 * 2**20, 0)
    first, newline, _ = begin.partition(b"\n")
    start = b'{"name": "'
    if size and not (_is_record(first) if newline else first.startswith(start[: len(first)]) or _is_record(first)):
        raise ValueError(f"{path} holds no records, but {first[:40]!r}; name another file, or a new one")
    if not size or os.pread(file, 1, size - 1) == b"\n":
        return size
    back, last = size, b""
    while back and b"\n" not in last:
        back = max(0, back - 65536)
        last = os.pread(file, size - back, back)
    last = last.rpartition(b"\n")[2]
    if not _is_record(last):
        return size - len(last)
    os.write(file, b"\n")
    return size + 1


def _is_record(line: bytes) -> bool:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and {"name", "data", "metrics"} <= set(fields)


def _same(path: str | Path, record: Record) -> bool:
    def key(one: Record) -> str:
        code = one.environment.get("commit"), one.environment.get("device"), one.environment.get("dirty")
        return json.dumps([one.name, one.data, one.seed, one.n, one.config, code], sort_keys=True)

    return key(record) in map(key, read(path))


def read(path: str | Path) -> list[Record]:
    """Read every record of a file that ``append`` wrote.

    Warns:
        UserWarning: the last line was cut (a crash while writing); it is left out.
    Raises:
        ValueError: another line is not a record; names the file and the line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a complete line ends in "\n", so that an empty piece follows it
                message = f"{path}:{number}: the last line was cut after {len(line)} bytes; that record is left out"
                warnings.warn(message, stacklevel=2)
                continue
            raise ValueError(
                f"{path}:{number}: expected a JSON record, came {line[:40]!r} ({error}); "
                f"if a crash cut this line, delete it"
            ) from error
        try:
            records.append(Record(**fields))
        except TypeError as error:
            wanted = ", ".join(Record.__dataclass_fields__)
            raise ValueError(
                f"{path}:{number}: expected a JSON object with {wanted}; came {line[:40]!r} ({error}); "
                f"delete the line or add what it lacks"
            ) from error
    return records
