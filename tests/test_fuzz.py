"""Damaged files, impossible options, strange command lines and tensors: refused in one line, or as if nothing were.

A few of each run with the other tests. ``pytest -m fuzz`` runs them for minutes; QSNN_FUZZ says how many (2,000) and
QSNN_FUZZ_SEED which (0).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import random
import resource
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import qsnn
from qsnn.cli.config import RunConfig
from qsnn.cli.main import main
from qsnn.files import sealed
from qsnn.options import hints_of
from qsnn.snn.equations import Dynamics
from qsnn.training.resume import read_state

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("teacher", "qann", "snn", "student", "folded")
MANY = int(os.environ.get("QSNN_FUZZ", "2000"))
SEED = int(os.environ.get("QSNN_FUZZ_SEED", "0"))
SECONDS = 60
"""Longer than this a single answer may not take, on a machine that does other things too [s]."""
CONFIGS = (qsnn.TrainConfig, qsnn.QuantizeConfig, qsnn.ConvertConfig, qsnn.DistillConfig, RunConfig, Dynamics)
STRANGE = (
    None, True, False, 0, 1, -1, 2, 4.5, 4.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, 10**9, -(10**9),
    2**63, 10**400,
    "", "x", "nan", "\x1b[31mred", "a" * 5000, "../../etc", "\0", "os:system", [], [[]], [1], {}, {"a": 1}, (), (1, 2),
    b"x", object(), Path("x"), torch.zeros(2),
)  # fmt: skip
JSON = tuple(value for value in STRANGE if value is None or isinstance(value, bool | int | float | str | list | dict))


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- mutations: of bytes, of the header, of the metadata


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def of_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Damage as disks, networks and editors make it."""
    at, length = draw.randrange(len(raw)), draw.choice((1, 2, 8, 64, 4096))
    if draw.random() < 0.4:  # the header is a small part of the file, and the more delicate one
        at = draw.randrange(min(len(raw), 8 + int.from_bytes(raw[:8], "little")))
    block = raw[at : at + length]
    how = draw.randrange(9)
    if how == 0:
        return raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]
    if how == 1:
        return raw[:at]
    if how == 2:
        return raw + draw.randbytes(length)
    if how == 3:
        return raw[:at] + bytes(len(block)) + raw[at + length :]
    if how == 4:
        return raw[:at] + draw.randbytes(len(block)) + raw[at + length :]
    if how == 5:
        return raw[:at] + raw[at + length :]
    if how == 6:
        return raw[:at] + block + raw[at:]
    if how == 7:
        other = draw.randrange(len(raw) - len(block))
        return raw[:at] + raw[other : other + len(block)] + raw[at + length :]
    return draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(raw), draw.randrange(2**20))).to_bytes(8, "little") + raw[8:]


def of_tensors(raw: bytes, draw: random.Random) -> bytes:
    """Another header over the same bytes, or other numbers in a tensor."""
    header, body = parts(raw)
    names = [name for name in header if name != "__metadata__"]
    one, two = draw.choice(names), draw.choice(names)
    entry = header[one]
    how = draw.randrange(10)
    if how == 0:
        del header[one]
    elif how == 1:
        header[draw.choice((one + "x", "", "a" * 9999, "\x1b[2J", "__proto__", two))] = header.pop(one)
    elif how == 2:
        entry["dtype"] = draw.choice(("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "", 3, None))
    elif how == 3:
        shapes = ([], [0], [-1], [2**62, 4], [1] * 99, [*reversed(entry["shape"])], "x", [1.5], [None])
        entry["shape"] = draw.choice(shapes)
    elif how == 4:
        other = header[two]["data_offsets"]
        entry["data_offsets"] = draw.choice(([0, 0], [5, 1], [-4, 0], [0, 2**63], [0], "x", other))
    elif how == 5:
        header[one], header[two] = header[two], header[one]
    elif how == 6:
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += draw.randbytes(4)
    elif how == 7:
        header[draw.choice(("__metadata__", one))] = draw.choice((None, [], {}, "x", 3, {"qsnn": None}, {"qsnn": "[]"}))
    else:
        begin, end = entry["data_offsets"]
        kind = {"F64": torch.float64, "F32": torch.float32}.get(entry["dtype"])
        size = 0 if kind is None else torch.empty((), dtype=kind).element_size()
        if kind is not None and end > begin:
            at = begin + draw.randrange((end - begin) // size) * size
            value = torch.tensor(draw.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30)), dtype=kind)
            body = body[:at] + value.numpy().tobytes() + body[at + size :]
    return joined(header, body)


def of_metadata(raw: bytes, draw: random.Random) -> bytes:
    """A key, a type or a number of the metadata becomes another."""
    header, body = parts(raw)
    (key,) = header["__metadata__"]
    text = header["__metadata__"][key]
    found = json.loads(text)
    paths: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for name, value in inner:
            paths.append((node, name))
            walk(value)

    walk(found)
    node, name = draw.choice(paths)
    how = draw.randrange(6)
    if how == 0:
        del node[name]
    elif how == 1 and isinstance(node, dict):
        node[draw.choice(("", "x", "__class__", "checksum", str(name).upper()))] = node.pop(name)
    elif how == 2:
        other = draw.choice(paths)
        node[name] = other[0][other[1]] if other[1] in other[0] or isinstance(other[0], list) else None
    elif how == 3 and isinstance(node[name], int | float):
        node[name] = draw.choice((-node[name], node[name] + 1, node[name] * 10**9, node[name] + 0.5, str(node[name])))
    else:
        node[name] = draw.choice(JSON)
    try:
        changed = json.dumps(found)
    except (TypeError, ValueError, RecursionError):  # a node within itself
        changed = text.replace("{", "[", 1)
    if draw.random() < 0.1:
        deep = "[" * 100_000, '{"a":' * 50_000
        changed = draw.choice((*deep, "null", "", changed + " ", changed[:-1], "NaN", changed * 2))
    header["__metadata__"][key] = changed
    return joined(header, body)


def resealed(raw: bytes) -> bytes:
    """The mutation with a right checksum, as a stranger would write it; as it is where there is no place for one."""
    try:
        header, body = parts(raw)
        (key,) = header["__metadata__"]
        found = json.loads(header["__metadata__"][key])
        header["__metadata__"][key] = json.dumps({**found, "checksum": "0" * 64} if "checksum" not in found else found)
        raw = joined(header, body)
        mark = b'{\\"checksum\\": \\"'
        at = raw.index(mark) + len(mark)
        return sealed(raw[:at] + b"0" * 64 + raw[at + 64 :])
    except Exception:
        return raw


def mutated(raw: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(Exception):  # the second mutation of a file that is none any more
            raw = draw.choice((of_bytes, of_tensors, of_metadata))(raw, draw)
    return raw


# ---- what is mutated


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return safetensors.torch.load_file(GOLDEN / "logits.safetensors")["images"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each kind, with a checksum, and one that was trained from scratch."""
    folder = tmp_path_factory.mktemp("originals")
    for kind in KINDS:
        qsnn.save(qsnn.load(GOLDEN / f"{kind}.safetensors"), folder / kind)
    scratch = qsnn.create_model("sew-resnet", qsnn.load_data("digits"), weight_bits=4, neuron="plif", connect="IAND")
    qsnn.save(scratch.eval(), folder / "scratch")
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """A training state of each optimizer, and its configuration."""
    folder, data = tmp_path_factory.mktemp("states"), qsnn.load_data("digits")
    found = {}
    for optimizer in ("sgd", "adamw"):
        config = qsnn.TrainConfig(epochs=1, train_images=64, batch_size=32, optimizer=optimizer, lr=0.01)
        qsnn.fit(qsnn.create_model("study", data), data, config, resume=folder / optimizer)
        found[optimizer] = folder / optimizer, dataclasses.asdict(config)
    return found


def refusal(error: Exception, path: Path) -> None:
    """Every refusal is one line that begins with the file's name, with nothing in it that a terminal would obey."""
    text = str(error)
    assert isinstance(error, ValueError), repr(error)
    assert text.startswith(str(path)) and text.isprintable(), text[:300]


def files_refused(
    originals: dict[str, Path], images: torch.Tensor, at: Path, count: int, *, forge: bool
) -> Counter[str]:
    draw, outcomes = random.Random(f"files {SEED} {forge}"), Counter[str]()
    expected = {}
    with torch.no_grad():
        for name, path in originals.items():
            expected[name] = qsnn.load(path)(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        name = draw.choice(sorted(originals))
        raw = originals[name].read_bytes()
        changed = mutated(raw, draw)
        at.write_bytes(resealed(changed) if forge else changed)
        with at_most(SECONDS), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                logits = qsnn.load(at)(images)
            except Exception as error:
                refusal(error, at)
                outcomes["refused"] += 1
                continue
        same = logits.shape == expected[name].shape and torch.equal(logits, expected[name])
        assert same or forge or b"checksum" not in at.read_bytes()[:300], f"{name}: other answers from a damaged file"
        outcomes["equal" if same else "another network"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 1, f"{grown:.1f} GiB more than before"
    return outcomes


def states_refused(
    states: dict[str, tuple[Path, dict[str, Any]]], at: Path, count: int, *, forge: bool
) -> Counter[str]:
    draw, outcomes = random.Random(f"states {SEED} {forge}"), Counter[str]()
    data = qsnn.load_data("digits")
    for _ in range(count):
        path, config = states[draw.choice(sorted(states))]
        changed = mutated(path.read_bytes(), draw)
        at.write_bytes(resealed(changed) if forge else changed)
        model = qsnn.create_model("study", data)
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                qsnn.fit(model, data, qsnn.TrainConfig(**config), resume=at)
            except Exception as error:
                refusal(error, at)
                outcomes["refused"] += 1
                continue
        good = read_state(path, config)
        assert good is not None
        same = all(torch.equal(value, model.state_dict()[name]) for name, value in good.model.items())
        assert same or forge, "a damaged state changed the result"
        outcomes["equal" if same else "another network"] += 1
    return outcomes


# ---- laws


@pytest.mark.parametrize("forge", [False, True])
def test_damaged_checkpoints(originals: dict[str, Path], images: torch.Tensor, tmp_path: Path, forge: bool) -> None:
    assert files_refused(originals, images, tmp_path / "file", 25, forge=forge).total() == 25


@pytest.mark.parametrize("forge", [False, True])
def test_damaged_states(states: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path, forge: bool) -> None:
    assert states_refused(states, tmp_path / "state", 20, forge=forge).total() == 20


@pytest.mark.fuzz
@pytest.mark.parametrize("forge", [False, True])
def test_many_damaged_checkpoints(
    originals: dict[str, Path], images: torch.Tensor, tmp_path: Path, forge: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = files_refused(originals, images, tmp_path / "file", MANY, forge=forge)
    with capsys.disabled():
        print(f"\n{MANY:,} checkpoints{', their checksums made right' if forge else ''}: {dict(found)}")
    assert found.total() == MANY and (forge or found["another network"] == 0)


@pytest.mark.fuzz
@pytest.mark.parametrize("forge", [False, True])
def test_many_damaged_states(
    states: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path, forge: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = states_refused(states, tmp_path / "state", MANY // 4, forge=forge)
    with capsys.disabled():
        print(f"\n{MANY // 4:,} states{', their checksums made right' if forge else ''}: {dict(found)}")
    assert found.total() == MANY // 4


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_option_of_every_config_has_a_type_and_a_range(config: Any) -> None:
    """Whatever stands in an option: it is one, or a ValueError names it with its value."""
    for field in dataclasses.fields(config):
        for value in STRANGE:
            try:
                made = config(**{field.name: value})
            except ValueError as error:
                assert str(error) and "\n" not in str(error)
                assert field.name in str(error), (field.name, value, error)
                continue
            kept = getattr(made, field.name)
            assert not (isinstance(kept, float) and not math.isfinite(kept)), (field.name, value)
            hint = str(hints_of(config)[field.name])
            assert not isinstance(kept, bool) or "bool" in hint, (field.name, value)
            if isinstance(kept, int | float) and not isinstance(kept, bool):
                assert "msgspec" in hint, f"{field.name} has no range"


STRANGE_WORDS = (
    "", "-1", "0", "1", "2", "4.5", "nan", "inf", "-inf", "1e999", "9" * 400, "None", "True", "\x1b[31m", "ü",
    "a" * 5000, "/dev/null", "/dev/zero", ".", "missing", "os:system", "subprocess:call", "--", "--nope", "=",
    "[1]", "{}", "cuda:99", "\n", "*", "~", "-", "../x",
)  # fmt: skip


def command_lines(originals: dict[str, Path], draw: random.Random) -> list[str]:
    """A command line of ours with one to three words made strange."""
    file = {name: str(path) for name, path in originals.items()}
    lines = (
        ["info", draw.choice(list(file.values()))],
        ["fold", file["student"], "--out", "out"],
        ["convert", file["qann"], "--out", "out", "--timesteps", "2", "--firing", "online", "--reset-tau", "1.0"],
        ["quantize", file["teacher"], "--out", "out", "--epochs", "0", "--weight-bits", "4", "--levels", "2"],
        ["train", "--data", "digits", "--model", "study", "--out", "out", "--epochs", "0", "--batch-size", "32"],
        ["distill", file["snn"], "--teacher", file["qann"], "--out", "out", "--epochs", "0", "--kd-temperature", "2"],
        ["benchmark", file["folded"], "--timesteps", "2", "--records", "records", "--json", "json", "--device", "cpu"],
    )  # fmt: skip
    words = list(draw.choice(lines))
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(words))
        how = draw.randrange(5)
        if how == 0:
            words.insert(at, draw.choice(STRANGE_WORDS))
        elif how == 1 and len(words) > 1:
            del words[at]
        else:
            words[at] = draw.choice((*STRANGE_WORDS, *file.values()))
    return words


def lines_refused(originals: dict[str, Path], at: Path, count: int, patch: pytest.MonkeyPatch) -> Counter[str]:
    draw, outcomes = random.Random(f"lines {SEED}"), Counter[str]()
    patch.setenv("HOME", str(at))
    patch.chdir(at)
    kept = {path: path.read_bytes() for path in originals.values()}
    for _ in range(count):
        words = command_lines(originals, draw)
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), at_most(SECONDS):
            try:
                main(words)
            except SystemExit as left:
                code = int(left.code or 0)
        said = err.getvalue()
        assert code in (0, 2) and "Traceback" not in said, (words, code, said)
        if code == 2:
            one_line = said.startswith("qsnn: ") and said.count("\n") == 1
            assert one_line and said.rstrip("\n").isprintable(), (words, said)
        outcomes["refused" if code else "done"] += 1
        written = ("--out", "--records", "--json")
        read = {word for before, word in zip(["", *words], words, strict=False) if before not in written}
        for path, content in kept.items():
            if path.read_bytes() != content:
                assert str(path) not in read, (words, "a file that was read was written")
                path.write_bytes(content)
    assert Path("/dev/null").is_char_device()
    return outcomes


def test_strange_command_lines(originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_refused(originals, tmp_path, 15, monkeypatch).total() == 15


@pytest.mark.fuzz
def test_many_strange_command_lines(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = lines_refused(originals, tmp_path, MANY // 2, monkeypatch)
    with capsys.disabled():
        print(f"\n{MANY // 2:,} command lines: {dict(found)}")


def strange_tensors(images: torch.Tensor) -> dict[str, Any]:
    return {
        "float64": images.double(), "half": images.half(), "integers": images.long(), "bool": images > 0,
        "nan": images * math.nan, "infinity": images / 0, "expanded": images[:1].expand(4, -1, -1, -1),
        "not contiguous": images.transpose(2, 3), "two channels": images.repeat(1, 2, 1, 1), "empty": images[:0],
        "no batch": images[0], "complex": images + 0j, "meta": images.to("meta"), "sparse": images.to_sparse(),
        "a list": images.tolist(), "none": None, "text": "images", "huge": images * 1e30, "scalar": images.sum(),
        "six dimensions": images[None, None],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["snn", "student", "folded"])
def test_strange_tensors(kind: str, originals: dict[str, Path], images: torch.Tensor) -> None:
    """A spiking network answers with finite logits, or says in one line what it expected."""
    model = qsnn.load(originals[kind])
    for name, tensor in strange_tensors(images).items():
        try:
            with torch.no_grad():
                logits = model(tensor)
        except (ValueError, TypeError) as error:
            assert "expected" in str(error) and "\n" not in str(error), (name, error)
            continue
        assert bool(torch.isfinite(logits).all()), name


FOREIGN: dict[str, Callable[[Any], Any]] = {
    "save": lambda x: qsnn.save(x, "out"),
    "save to": lambda x: qsnn.save(torch.nn.Linear(1, 1), x),
    "load": lambda x: qsnn.load(x),
    "load a model": lambda x: qsnn.load(GOLDEN / "teacher.safetensors", model=x),
    "read_recipe": lambda x: qsnn.read_recipe(x),
    "load_weights": lambda x: qsnn.load_weights(x, GOLDEN / "teacher.safetensors"),
    "load_weights from": lambda x: qsnn.load_weights(torch.nn.Linear(1, 1), x),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_objects_in_the_place_of_files_and_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in STRANGE:
        if name == "load a model" and not isinstance(value, str | bytes | torch.Tensor) and not value:
            continue  # none is named
        with pytest.raises((TypeError, ValueError, FileNotFoundError)) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            FOREIGN[name](value)
        assert str(caught.value) and "\n" not in str(caught.value), (value, caught.value)
    assert not list(tmp_path.iterdir())


def public_calls(model: dict[str, Any], data: qsnn.Data) -> dict[str, Callable[[Any], Any]]:
    short = qsnn.TrainConfig(epochs=0)
    return {
        "quantize(x)": lambda x: qsnn.quantize(x, data),
        "quantize(model, x)": lambda x: qsnn.quantize(model["teacher"], x),
        "quantize(model, data, x)": lambda x: qsnn.quantize(model["teacher"], data, x),
        "convert(x)": lambda x: qsnn.convert(x),
        "convert(model, x)": lambda x: qsnn.convert(model["teacher"], x),
        "distill(x)": lambda x: qsnn.distill(x, model["qann"], data, qsnn.DistillConfig(epochs=0)),
        "distill(snn, x)": lambda x: qsnn.distill(model["snn"], x, data, qsnn.DistillConfig(epochs=0)),
        "distill(snn, qann, x)": lambda x: qsnn.distill(model["snn"], model["qann"], x),
        "distill(snn, qann, data, x)": lambda x: qsnn.distill(model["snn"], model["qann"], data, x),
        "fit(x)": lambda x: qsnn.fit(x, data, short),
        "fit(model, x)": lambda x: qsnn.fit(model["teacher"], x, short),
        "fit(model, data, x)": lambda x: qsnn.fit(model["teacher"], data, x),
        "fit(teacher=x)": lambda x: qsnn.fit(model["teacher"], data, short, teacher=x),
        "fold(x)": lambda x: qsnn.fold(x),
        "benchmark(x)": lambda x: qsnn.benchmark(x, data.test),
        "benchmark(snn, x)": lambda x: qsnn.benchmark(model["snn"], x),
        "benchmark(timesteps=x)": lambda x: qsnn.benchmark(model["snn"], data.test, timesteps=x),
        "certify(x)": lambda x: qsnn.certify(x, model["qann"], data.test),
        "certify(snn, x)": lambda x: qsnn.certify(model["snn"], x, data.test),
        "certify(snn, qann, x)": lambda x: qsnn.certify(model["snn"], model["qann"], x),
        "accuracy(x)": lambda x: qsnn.accuracy(x, data.test),
        "accuracy(qann, x)": lambda x: qsnn.accuracy(model["qann"], x),
        "summary(x)": lambda x: qsnn.summary(x),
        "create_model(x)": lambda x: qsnn.create_model(x, data),
        "create_model(name, x)": lambda x: qsnn.create_model("study", x),
        "load_data(x)": lambda x: qsnn.load_data(x),
    }


def test_foreign_objects_in_the_place_of_networks_and_data(
    originals: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends with a TypeError or ValueError of one line; none is taken for what it is not."""
    monkeypatch.chdir(tmp_path)
    absent = {"quantize(model, data, x)", "distill(snn, qann, data, x)", "fit(model, data, x)", "fit(teacher=x)"}
    calls = public_calls({kind: qsnn.load(originals[kind]) for kind in KINDS}, qsnn.load_data("digits"))
    for name, call in calls.items():
        for value in (None, 3, "text", {"a": 1}, [1], object(), torch.zeros(2)):
            if (value is None and name in absent) or (name == "benchmark(timesteps=x)" and isinstance(value, int)):
                continue
            with pytest.raises((TypeError, ValueError)) as caught:
                call(value)
            assert "\n" not in str(caught.value) and len(str(caught.value)) > 10, (name, value)
