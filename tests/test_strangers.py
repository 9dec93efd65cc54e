"""A stranger's file is data: nothing that it names is run; what it was trained for is what it is asked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import qsnn
from qsnn import files
from qsnn.checkpoint import check_data
from qsnn.cli.main import main
from qsnn.files import held, sealed, unsealed
from qsnn.training import resume

GOLDEN = Path(__file__).parent / "golden"


def golden(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The recipe and the tensors of a file of the version before."""
    raw = (GOLDEN / f"{kind}.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["qsnn"]), safetensors.torch.load(raw)


def forged(path: Path, golden_kind: str, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A file with a right checksum: a golden one, with these keys of the metadata and these tensors in their place."""
    recipe, found = golden(golden_kind)
    text = unsealed({**recipe, **changes})
    path.write_bytes(sealed(safetensors.torch.save({**found, **(tensors or {})}, {"qsnn": text})))
    return path


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a command says that must end with status 2 and one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(arg) for arg in args])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.startswith("qsnn: ") and said.count("\n") == 1, said
    return said[6:-1]


# ---- no code of a file runs


PLANTED = [
    {"name": "subprocess:call", "options": {"args": "touch OWNED", "shell": True}},
    {"name": "os:system", "options": {"command": "touch OWNED"}},
    {"name": "builtins:exec", "options": {}},
    {"name": "planted:make", "options": {}},
    {"name": "vgg-small", "options": {"pooling": "__import__('os').system('touch OWNED')"}},
    {"name": "\x1b]0;owned\x07:\x1b[31m", "options": {}},
]


@pytest.mark.parametrize("spec", PLANTED, ids=lambda spec: repr(spec["name"]))
def test_nothing_that_a_file_names_is_run(
    spec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text("import pathlib\npathlib.Path('OWNED').touch()\nmake = None\n")
    file = {kind: forged(tmp_path / kind, kind, model=spec) for kind in ("teacher", "qann", "snn", "folded")}
    good, out = GOLDEN / "snn.safetensors", ("--out", "out")
    expert = GOLDEN / "qann.safetensors"
    for name, path in file.items():
        for verb in (qsnn.load, lambda path: qsnn.load(path, model="some.other:function")):
            with pytest.raises(ValueError, match=name) as caught:
                verb(path)
            assert str(caught.value).startswith(str(path)) and str(caught.value).isprintable()
    teacher, snn = file["teacher"], file["snn"]
    for command in (
        ("info", teacher), ("info", teacher, "--model", "a:b"), ("quantize", teacher, *out), ("convert", teacher, *out),
        ("fold", snn, *out), ("benchmark", file["folded"]), ("benchmark", good, snn),
        ("distill", snn, "--teacher", expert, *out), ("distill", good, "--teacher", teacher, *out),
    ):  # fmt: skip
        assert refused(capsys, *command).isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "planted.py", "qann", "snn", "teacher"]


def test_what_would_give_a_model_of_ones_own_is_said(tmp_path: Path) -> None:
    path = forged(tmp_path / "own", "teacher", model={"name": "package.module:function", "options": {}})
    with pytest.raises(ValueError, match=r"own is built by 'package\.module:function', which is not qsnn's own") as e:
        qsnn.load(path)
    assert str(e.value).endswith("name it: load(path, model=function), or --model package.module:function")
    with pytest.raises(ValueError, match=r"and not by VggSmall; if you trust it"):
        qsnn.load(path, model=type(qsnn.create_model("study", qsnn.load_data("digits"))))
    with pytest.raises(ValueError, match=r"teacher holds qsnn's own model 'resnet-small'; leave model="):
        qsnn.load(forged(tmp_path / "teacher", "teacher"), model="package.module:function")
    with pytest.raises(TypeError, match=r"got int; call load\(path, model=function\)"):
        qsnn.load(path, model=3)  # type: ignore[arg-type]


def test_a_folder_that_only_a_file_names_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**golden("teacher")[0]["data"], "name": "/etc/\x1b[2J"}
    path = forged(tmp_path / "teacher", "teacher", data=data)
    said = refused(capsys, "quantize", path, "--out", tmp_path / "out")
    assert said == f"{path} was made for the images in '/etc/\\\\x1b[2J'; if you trust it, add --data FOLDER"


# ---- damage


def test_a_file_of_the_version_before_has_no_checksum() -> None:
    with pytest.warns(UserWarning, match=r"^.*teacher\.safetensors has no checksum: it was written by an older"):
        assert qsnn.read_recipe(GOLDEN / "teacher.safetensors")["kind"] == "teacher"


def test_every_bit_counts(tmp_path: Path) -> None:
    path = forged(tmp_path / "file", "teacher")
    raw = path.read_bytes()
    for place in range(0, len(raw), 4099):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        with pytest.raises(ValueError, match=f"^{path} "):
            qsnn.load(path)
    path.write_bytes(raw)
    qsnn.load(path)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("teacher", "1.running_var", -1.0, "variance in '1.running_var' that is below 0"),
        ("teacher", "0.weight", float("nan"), "NaN or infinity in '0.weight'"),
        ("snn", "network.2.threshold", 0.0, "threshold in 'network.2.threshold' that is not above 0"),
        ("folded", "network.2.threshold", -1.0, "threshold in 'network.2.threshold' that is not above 0"),
        ("folded", "network.input_quant.step", 0.0, "step in 'network.input_quant.step' that is not above 0"),
        ("folded", "network.2.divisors", 0, "divisors in 'network.2.divisors' that is not above 0"),
        ("student", "network.2.initial", float("inf"), "NaN or infinity in 'network.2.initial'"),
    ],
)
def test_numbers_that_no_network_has(kind: str, name: str, value: float, message: str, tmp_path: Path) -> None:
    tensor = golden(kind)[1][name]
    path = forged(tmp_path / "file", kind, {name: torch.full_like(tensor, value)})
    with pytest.raises(ValueError, match=f"^{path} holds .*{message}"):
        qsnn.load(path)


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("teacher", {"0.weight": torch.zeros(16, 1, 3, 3, dtype=torch.float64)}, "holds '0.weight' as torch.float64"),
        ("teacher", {"extra": torch.zeros(1)}, "Unexpected key 'extra'"),
        ("snn", {"network.2.threshold": torch.ones(3, dtype=torch.float64)}, "file .*"),
        ("teacher", {"1.bias": torch.zeros(17)}, "size mismatch for 1.bias"),
    ],
)
def test_tensors_that_do_not_fit(kind: str, tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    path = forged(tmp_path / "file", kind, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        qsnn.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"num_classes": 10**9, "data": {}}, "num_classes"),
        ({"num_classes": 10**6, "data": {}}, r"does not fit .*size mismatch for 7\.weight, \(10, 32\) in the file"),
        ({"input_shape": [1, 60_000, 60_000]}, "asks for images of"),
        ({"input_shape": [1, 8.5, 8]}, "Expected `int`, got `float`"),
        ({"model": {"name": "resnet18", "options": {}}}, "size mismatch for 0.weight"),
        ({"model": {"name": "resnet-small", "options": {"blocks": 10**9}}}, "'resnet-small' with 'blocks'"),
        ({"quantize": {"levels": float("1e9")}}, "levels must be a whole number from 1 to 255"),
        ({"quantize": {"colour": "red"}}, "colour"),
        ({"distill": {"lr": -1}}, "lr must be a number above 0"),
        ({"parent": "x"}, "parent"),
        ({"kind": "snn"}, "a 'snn' without the config 'convert'"),
    ],
)
def test_metadata_that_no_version_wrote(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = forged(tmp_path / "file", "teacher", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        qsnn.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_only_files_of_a_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/zero", tmp_path):
        for read in (qsnn.load, qsnn.read_recipe, lambda path: qsnn.load_weights(nn.Linear(1, 1), path)):
            with pytest.raises(ValueError, match=f"^{place} is a (pipe|device|folder); expected a file"):
                read(place)
    path = forged(tmp_path / "file", "teacher")
    monkeypatch.setattr(files, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match=r"file has [\d,]+ bytes; expected at most 1,000"):
        qsnn.load(path)
    monkeypatch.undo()
    monkeypatch.setattr(files, "LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="file is no safetensors file, or a truncated one"):
        qsnn.load(path)


def test_the_parent_is_the_very_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qann, other = forged(tmp_path / "qann", "qann"), forged(tmp_path / "other", "qann", train={"epochs": 1})
    qsnn.save(qsnn.convert(qsnn.load(qann)), tmp_path / "snn")
    qsnn.load(tmp_path / "snn", parent=qann)
    with pytest.raises(ValueError, match=f"^{tmp_path}/snn was not made from {other}, but from a file with the"):
        qsnn.load(tmp_path / "snn", parent=other)
    main(["info", str(tmp_path / "snn"), "--parent", str(qann)])
    assert "was not made from" in refused(capsys, "info", tmp_path / "snn", "--parent", other)


def test_a_model_with_nan_is_not_written(tmp_path: Path) -> None:
    model = qsnn.load(forged(tmp_path / "file", "teacher"))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match=r"file is not written, because the model holds NaN or infinity in '0"):
        qsnn.save(model, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights")
    with pytest.raises(ValueError, match=r"weights into .*(NaN|finite)"):
        qsnn.load_weights(model, tmp_path / "weights")


# ---- what was trained is what is answered for


@pytest.mark.parametrize("poisoned", [2, 4])
def test_a_last_step_that_makes_nan_ends_with_the_last_good_state(
    poisoned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps an epoch: the loss of the last one is finite still, its gradient is not."""
    data = qsnn.load_data("digits")
    config = qsnn.TrainConfig(epochs=2, train_images=64, batch_size=32, lr=0.01)
    state, model = tmp_path / "state", qsnn.create_model("study", data)
    calls: list[int] = []

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        value = nn.functional.cross_entropy(model(images), labels)
        if len(calls) == poisoned:
            value.register_hook(lambda grad: grad * float("nan"))
        return value

    with pytest.raises(FloatingPointError, match="the last step of the training left NaN or infinity in "):
        qsnn.fit(model, data, config, loss=loss, resume=state)
    assert state.exists() == (poisoned == 4)
    if state.exists():
        found = resume.read_state(state, dataclasses.asdict(config))
        assert found is not None and len(found.progress.history) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of two classes."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            at = tmp_path / "images" / part / name
            at.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(draw.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(at / f"{index}.png")
    return tmp_path / "images"


def test_a_renamed_class_is_refused_by_its_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, out = tmp_path / "teacher", ("--out", tmp_path / "out")
    main(["train", "--data", str(folder), "--model", "study", "--epochs", "0", "--out", str(teacher)])
    quantize = ("quantize", teacher, "--epochs", 0, *out)
    assert "add --data FOLDER" in refused(capsys, *quantize)
    main([str(word) for word in (*quantize, "--data", folder)])
    for part in ("train", "test"):
        (folder / part / "dog").rename(folder / part / "wolf")
    said = refused(capsys, *quantize, "--data", folder)
    assert f"{teacher} was trained for 2 classes, and " in said and "has 2, without dog and with wolf" in said
    for part in ("train", "test"):
        (folder / part / "wolf").rename(folder / part / "ant")
    assert "without dog and with ant" in refused(capsys, *quantize, "--data", folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("1", "0", *"23456789")}, "has 10, in another order"),
        ({"classes": tuple("0123456789a")}, "has 11, with a;"),
        ({"mean": (0.5,)}, r"with the mean \[0.3057\], and digits has \[0.5\]"),
        ({"std": (0.5,)}, r"with the std \[0.376\], and digits has \[0.5\]"),
    ],
)
def test_other_data_are_refused(change: dict[str, Any], message: str) -> None:
    data = qsnn.load_data("digits")
    check_data(golden("teacher")[0], data, "file")
    with pytest.raises(ValueError, match=f"^file was trained .*{message}"):
        check_data(golden("teacher")[0], dataclasses.replace(data, **change), "file")
    with pytest.raises(ValueError, match=r"file was trained on images of \(1, 9, 9\), and digits has \(1, 8, 8\)"):
        check_data({**golden("teacher")[0], "input_shape": [1, 9, 9]}, data, "file")


# ---- places


def test_two_runs_do_not_write_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ("train", "--data", "digits", "--model", "study", "--epochs", 0, "--out", tmp_path / "out")
    with held(tmp_path / "out"):
        assert f"out is being written by process {os.getpid()}; wait for it" in refused(capsys, *train, "--seed", 1)
    with held(tmp_path / "flow" / "run"):
        said = refused(capsys, "run", "--model", "study", "--epochs", 0, 0, 0, "--out", tmp_path / "flow", "--seed", 1)
        assert "run is being written by process" in said
    main([str(word) for word in train])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out"]


def test_outputs_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    snn = forged(tmp_path / "snn", "snn")
    (tmp_path / "notes.txt").write_text("hello\n")
    monkeypatch.setattr("qsnn.cli.benchmark.run_benchmark", never)
    monkeypatch.setattr("qsnn.cli.commands.to_integers", never)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("fold", snn, "--out", snn), "would be written over while it is read"),
        (("fold", snn, "--out", "/dev/null"), "is a device; only regular files are written"),
        (("benchmark", snn, "--json", snn), "would be written over while it is read"),
        (("benchmark", snn, "--html", tmp_path), "is a folder"),
        (("benchmark", snn, "--records", tmp_path / "notes.txt"), "notes.txt holds no records, but b'hello'"),
        (("benchmark", snn, "--html", tmp_path / "a", "--json", tmp_path / "a"), "name one file"),
        (("benchmark", snn, "--timesteps", 10**9), "timesteps must be a whole number from 1 to 4,096"),
        (("benchmark", snn, "--exit-margin", "nan"), "exit_margin must be a number from 0 to 1, or None, got nan"),
        (("benchmark", snn, "--device", "meta"), "device"),
    ]
    for command, message in cases:
        assert message in refused(capsys, *command)
    assert (tmp_path / "notes.txt").read_text() == "hello\n"
    assert qsnn.read_recipe(snn)["kind"] == "snn"


def test_a_folder_that_vanishes_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsnn.cli import run

    draw: Callable[..., None] = run.draw_curve

    def gone(*args: Any, **options: Any) -> None:
        draw(*args, **options)
        (tmp_path / "flow" / "snn.safetensors").unlink()

    monkeypatch.setattr(run, "draw_curve", gone)
    short = ("--epochs", 0, 0, 0, "--max-timesteps", 1)
    said = refused(capsys, "run", "--model", "study", *short, "--out", tmp_path / "flow")
    assert "snn.safetensors vanished while the flow ran" in said
