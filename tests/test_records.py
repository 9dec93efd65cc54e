"""Records: what goes in comes out, a crash loses one line at most, and intervals mean what they say."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsnn.files import held, read_bytes, target_of, write_atomic
from qsnn.measure.accuracy import interval
from qsnn.report import records
from qsnn.report.records import Record, append, environment, read

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
json_dicts = st.dictionaries(st.text(), json_values, max_size=4)
fractions = st.floats(0, 1)


def record(**fields):
    """A small record, with ``fields`` in place of the defaults."""
    measured = {"name": "run/student", "data": "digits", "seed": 0, "n": 360, "metrics": {"accuracy": [98.0, 99.0]}}
    default = {**measured, "config": {"levels": 2}, "environment": {"commit": None}, "time": records.now()}
    return Record(**{**default, **fields})


@settings(deadline=None, derandomize=True)
@given(metrics=json_dicts, config=json_dicts, name=st.text(), seed=st.integers(0, 2**32))
def test_read_returns_what_was_appended(tmp_path_factory, metrics, config, name, seed):
    path = tmp_path_factory.mktemp("records") / "new" / "r.jsonl"
    written = [record(name=name, metrics=metrics, config=config, seed=seed), record()]
    for one in written:
        append(path, one)
    assert read(path) == written
    assert path.read_bytes().count(b"\n") == 2


def test_threads_that_append_to_one_file_lose_nothing(tmp_path):
    path = tmp_path / "r.jsonl"
    jobs = [threading.Thread(target=append, args=(path, record(seed=seed, name="x" * 5000))) for seed in range(16)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert sorted(one.seed for one in read(path)) == list(range(16))


def test_a_file_cut_anywhere_in_its_last_line_keeps_the_lines_before(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, record(seed=1))
    first = path.read_bytes()
    append(path, record(seed=2))
    whole = path.read_bytes()
    for cut in range(len(first) + 1, len(whole) - 1, 37):
        path.write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match=r"r\.jsonl:2: the last line was cut"):
            assert [one.seed for one in read(path)] == [1]
    path.write_bytes(whole[:-1])  # only the newline is missing: the record is complete
    assert [one.seed for one in read(path)] == [1, 2]
    append(path, record(seed=3))
    assert [one.seed for one in read(path)] == [1, 2, 3]


def test_a_line_cut_anywhere_is_mended_by_the_next_record(tmp_path):
    path = tmp_path / "r.jsonl"
    append(path, record(seed=1))
    first = path.read_bytes()
    append(path, record(seed=2))
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        append(path, record(seed=3))
        kept = [1] * (cut >= len(first) - 1) + [2] * (cut >= len(whole) - 1)
        assert [one.seed for one in read(path)] == [*kept, 3]


def test_a_run_that_goes_on_doubles_no_record(tmp_path):
    path = tmp_path / "r.jsonl"
    for _ in range(2):
        for name in ("run/teacher", "run/student"):
            records.append_once(path, record(name=name, time=records.now()))
    assert [one.name for one in read(path)] == ["run/teacher", "run/student"]
    assert records.append_once(path, record(seed=1)) and not records.append_once(path, record(seed=1))
    assert records.append_once(path, record(config={"levels": 3}))


@pytest.mark.parametrize("content", [b"hello", b"hello\n", b"{}\n", b"[1, 2]", b"\0\0", b'{"a": 1}\n{"name": "'])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for write in (records.check_records, lambda path: append(path, record())):
        with pytest.raises(ValueError, match=r"notes\.txt holds no records, but b"):
            write(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", ["not json", "[1]", "3", '{"name": "x"}', '{"name": '])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    append(path, record())
    with open(path, "a") as file:
        file.write(line + "\n")
    append(path, record())
    with pytest.raises(ValueError, match=r"r\.jsonl:2: expected a JSON"):
        read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_append_refuses_what_json_cannot_hold_and_writes_nothing(tmp_path, value):
    path = tmp_path / "r.jsonl"
    append(path, record())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="record 'run/student': expected finite numbers"):
        append(path, record(metrics={"accuracy": value}))
    assert path.read_bytes() == before


def test_a_full_disk_names_the_path(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*r\.jsonl'"):
        append(tmp_path / "r.jsonl", record())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        write_atomic(tmp_path / "file", "data")
    assert not (tmp_path / "file").exists()


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, data: len(data) - 1)
    with pytest.raises(OSError, match="free some space"):
        append(tmp_path / "r.jsonl", record())


@pytest.mark.parametrize("data", ["häßlich\n", b"\x00\xff"])
def test_write_atomic_writes_and_replaces(tmp_path, data):
    path = tmp_path / "new" / "file"
    write_atomic(path, b"old")
    write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [one.name for one in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_write_atomic_keeps_the_old_file_when_the_write_fails(tmp_path, monkeypatch, broken):
    def fail(*args):
        raise OSError("the disk is gone")

    path = tmp_path / "file"
    write_atomic(path, "old")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_write_atomic_follows_links_and_leaves_them(tmp_path, monkeypatch):
    target, link = tmp_path / "real" / "file", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    for data in (b"new", b"again"):  # to a new name, then to a file
        write_atomic(link, data)
        assert link.is_symlink() and target.read_bytes() == data
    monkeypatch.setenv("HOME", str(tmp_path))
    write_atomic("~/at_home", b"x")
    assert (tmp_path / "at_home").read_bytes() == b"x"


def test_only_regular_files_are_written_and_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_null").symlink_to("/dev/null")
    for place, kind in ((tmp_path, "folder"), (tmp_path / "pipe", "pipe"), ("/dev/null", "device")):
        with pytest.raises(ValueError, match=f"expected a file to write, .* is a {kind}"):
            write_atomic(place, b"x")
        with pytest.raises(ValueError, match=f"is a {kind}; expected a file"):
            read_bytes(place)
    with pytest.raises(ValueError, match="to_null is a device"):
        write_atomic(tmp_path / "to_null", b"x")
    assert Path("/dev/null").is_char_device()


def test_what_is_read_is_never_written(tmp_path):
    path, link = tmp_path / "a", tmp_path / "link"
    path.touch()
    link.symlink_to(path)
    for out, source in ((path, path), (link, path), (path, link), (tmp_path / "b" / ".." / "a", path)):
        with pytest.raises(ValueError, match="would be written over while it is read"):
            target_of(out, source)
    assert target_of(tmp_path / "new", path, None) == tmp_path / "new"
    with pytest.raises(ValueError, match=r"cannot be written: (Not a directory|File exists)"):
        target_of(path / "below")


def test_what_dead_writers_left_goes_and_what_live_ones_write_stays(tmp_path):
    dead, alive, other = (tmp_path / f".{name}.part" for name in ("file.0123abcd", "file.4567abcd", "else.0123abcd"))
    for path in (dead, alive, other):
        path.write_bytes(b"half")
    with open(alive, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(tmp_path / "file", b"new")
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, tmp_path / "file"])


def test_one_place_has_one_writer(tmp_path):
    path = tmp_path / "out"
    for _ in range(2):
        with held(path):
            assert (tmp_path / ".out.lock").exists()
            with pytest.raises(ValueError, match=rf"out is being written by process {os.getpid()}; wait"), held(path):
                pass
        assert not list(tmp_path.iterdir())
    code = f"import os; from qsnn.files import held\nwith held({str(path)!r}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    with held(path):  # the dead hold nothing
        pass


@settings(deadline=None, derandomize=True)
@given(p=fractions, n=st.integers(1, 10**6))
def test_interval_holds_p_and_stays_in_range_and_mirrors(p, n):
    low, high = interval(p, n)
    assert 0 <= low <= p <= high <= 1
    assert low < high
    mirrored = interval(1 - p, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


@settings(deadline=None, derandomize=True)
@given(p=fractions, n=st.integers(1, 10**5), more=st.integers(1, 10**5))
def test_interval_shrinks_with_n(p, n, more):
    narrow, wide = interval(p, n + more), interval(p, n)
    assert narrow[1] - narrow[0] <= wide[1] - wide[0]


def test_interval_golden():
    assert interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert interval(1.0, 100) == (pytest.approx(0.9630, abs=5e-5), 1.0)
    assert interval(0.0, 10) == (0.0, pytest.approx(0.2775, abs=5e-5))


@pytest.mark.parametrize(("p", "n", "message"), [
    (99.1, 100, "divide a percentage by 100"), (-0.1, 100, "0 to 1, came -0.1"),
    (float("nan"), 100, "came nan"), (0.5, 0, "n >= 1 answers, came 0"),
])  # fmt: skip
def test_interval_refuses(p, n, message):
    with pytest.raises(ValueError, match=message):
        interval(p, n)


def test_environment_says_what_ran_and_not_who_or_where():
    found = environment("cpu")
    versions = {"qsnn", "python", "torch", "brevitas", "spikingjelly", "numpy"}
    assert set(found) == versions | {"commit", "dirty", "device", "cores", "threads"}
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert (found["commit"] is None) == (found["dirty"] is None)
    assert found["torch"] and found["device"] and found["threads"] >= 1
    text = json.dumps({**found, "device": ""})
    assert os.sep not in text and os.uname().nodename not in text


def test_environment_is_the_callers_own_dict():
    environment()["torch"] = "changed"
    assert environment()["torch"] != "changed"


def test_environment_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    records._machine.cache_clear()
    assert environment("cpu")["commit"] is None
    records._machine.cache_clear()
