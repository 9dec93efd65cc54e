"""Records: what goes in comes out, a crash loses one line at most, and intervals mean what they say."""

import json
import os
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsnn.files import write_atomic
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


def test_after_a_cut_line_the_next_record_starts_on_its_own(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"name": "cu')
    append(path, record(seed=3))
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["seed"] == 3
    with pytest.raises(ValueError, match=r"r\.jsonl:1: expected a JSON record, came b'\{\"name\": \"cu'.*delete it"):
        read(path)


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
