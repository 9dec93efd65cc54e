"""The command line: the chain of commands, the whole flow, resuming, and one line for every wrong input."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import pytest
import safetensors.torch
import torch

import qsnn
from qsnn.checkpoint import read_recipe
from qsnn.cli import main as cli
from qsnn.cli.config import LOW_BITS, RunConfig
from qsnn.cli.main import main
from qsnn.distillation.config import DistillConfig
from qsnn.export.hub import save_pretrained
from qsnn.export.onnx import OnnxConfig
from qsnn.export.write import FORMATS
from qsnn.measure.task import TASKS
from qsnn.options import TaskName

STAGES = ("teacher", "qann", "snn", "student", "folded")
TINY = """
from torch import nn

def make(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, num_classes),
    )

def wide(num_classes):
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, num_classes))

def pooled(num_classes):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, num_classes))

def fails():
    raise ValueError("this model is not finished")

not_a_model = 3
"""


def qsnn_command(*args: object) -> None:
    main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of one's own on Python's path, and its name."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tiny_model.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "tiny_model:make"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that one command after the other makes."""
    at = tmp_path_factory.mktemp("chain")
    short = ("--epochs", 1, "--train-images", 256)
    qsnn_command("train", "--data", "digits", "--model", "vgg-small", "--out", at / "teacher", *short)
    qsnn_command("quantize", at / "teacher", "--weight-bits", 2, "--levels", 2, *short, "--out", at / "qann")
    qsnn_command("convert", at / "qann", "--timesteps", 2, "--firing", "online", "--out", at / "snn")
    qsnn_command(
        "distill", at / "snn", "--teacher", at / "qann", "--timesteps", 2, *short, "--out", at / "student"
    )  # fmt: skip
    qsnn_command("fold", at / "student", "--out", at / "folded")
    return at


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(".safetensors")}


class Steps:
    """Counts the steps of all training, and stops it by Ctrl-C at the n-th one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.last, self.backward = 0, -1, torch.Tensor.backward
        monkeypatch.setattr(torch.Tensor, "backward", lambda *args, **options: self._count(*args, **options))

    def _count(self, *args: Any, **options: Any) -> None:
        self.done += 1
        if self.done == self.last:
            raise KeyboardInterrupt
        self.backward(*args, **options)

    def of(self, *args: object) -> int:
        self.done, self.last = 0, -1
        qsnn_command(*args)
        return self.done

    def stop_at(self, step: int, *args: object) -> None:
        self.done, self.last = 0, step
        with pytest.raises(SystemExit) as left:
            qsnn_command(*args)
        assert left.value.code == 130 and self.done == step


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    monkeypatch.setattr("qsnn.export.deployed.SECONDS", 0.01)
    return Steps(monkeypatch)


# ---- laws


def test_each_command_continues_from_the_file_before(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipes = {name: qsnn.read_recipe(chain / name) for name in STAGES}
    hashes = {name: hashlib.sha256((chain / name).read_bytes()).hexdigest() for name in STAGES}
    assert {name: recipe["sha256"] for name, recipe in recipes.items()} == hashes
    assert [recipes[name].get("parent") for name in STAGES] == [None, *(hashes[name] for name in STAGES[:-1])]
    assert [recipes[name]["kind"] for name in STAGES] == list(STAGES)
    assert recipes["student"]["teacher"] == hashes["qann"]
    folded = recipes["folded"]
    assert folded["data"]["name"] == "digits"
    assert (folded["quantize"]["weight_bits"], folded["distill"]["timesteps"]) == (2, 2)
    assert folded["train"]["train_images"] == 256
    assert sorted(path.name for path in chain.iterdir()) == sorted(STAGES)  # no state of a finished training is left


def test_a_command_does_what_the_function_does(chain: Path, tmp_path: Path, images: torch.Tensor) -> None:
    teacher, data = qsnn.load(chain / "teacher"), qsnn.load_data("digits")
    qann = qsnn.quantize(teacher, data, qsnn.QuantizeConfig(weight_bits=2, levels=2))
    qsnn.fit(qann, data, qsnn.TrainConfig(epochs=1, train_images=256, kd_weight=0.0, **LOW_BITS), teacher=teacher)
    assert torch.equal(qann(images), qsnn.load(chain / "qann")(images))
    qsnn_command("quantize", chain / "teacher", "--act-bits", 1, "--epochs", 0, "--out", tmp_path / "calibrated")
    calibrated = qsnn.quantize(teacher, data, qsnn.QuantizeConfig(act_bits=1))  # --epochs 0 only calibrates
    assert torch.equal(calibrated.eval()(images), qsnn.load(tmp_path / "calibrated")(images))
    for name, value in teacher.state_dict().items():
        if name.endswith("weight"):
            assert torch.equal(qsnn.load(tmp_path / "calibrated").state_dict()[name], value)


def test_a_float_network_converts_with_its_data(chain: Path, tmp_path: Path, images: torch.Tensor) -> None:
    qsnn_command("convert", chain / "teacher", "--timesteps", 3, "--reset", "hard", "--out", tmp_path / "plain")
    config = qsnn.ConvertConfig(timesteps=3, reset="hard")
    expected = qsnn.convert(qsnn.load(chain / "teacher"), qsnn.load_data("digits"), config)
    assert torch.equal(expected.eval()(images), qsnn.load(tmp_path / "plain")(images))
    qsnn_command("convert", chain / "qann", "--calibrate", "--out", tmp_path / "corrected")
    assert qsnn.read_recipe(tmp_path / "corrected")["corrected"]
    with pytest.raises(SystemExit) as left:
        qsnn_command("convert", chain / "teacher", "--certify", "--out", tmp_path / "never")
    assert left.value.code == 2 and not (tmp_path / "never").exists()


def test_a_flow_that_was_stopped_ends_with_the_same_weights(
    tiny: str, tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine steps an epoch; stopped in the second epoch of each of the three trainings."""
    options = ("--model", tiny, "--epochs", 2, 2, 2, "--max-timesteps", 2, "--batch-size", 128)
    assert steps.of("run", "--out", tmp_path / "whole" / "flow", *options) == 54
    stopped = tmp_path / "stopped" / "flow"
    for step in (12, 9 + 12, 9 + 12):
        capsys.readouterr()
        steps.stop_at(step, "run", "--out", stopped, *options)
        assert capsys.readouterr().err.startswith("qsnn: stopped; the same command goes on from the last checkpoint")
        assert len(list(stopped.glob(".*.resume"))) == 1
    assert steps.of("run", "--out", stopped, *options) == 9
    assert not list(stopped.glob(".*.resume"))
    assert files(stopped) == files(tmp_path / "whole" / "flow") and len(files(stopped)) == 5


def test_a_budget_becomes_epochs_once(
    tiny: str, tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "flow"
    run = ("run", "--model", tiny, "--budget", "4s", "--max-timesteps", 2, "--out", out)
    steps.of(*run)
    shown = capsys.readouterr().out
    assert "budget 0 min: teacher" in shown and "measuring" in shown
    plan = json.loads((out / "plan.json").read_text())
    assert sorted(plan["epochs"]) == ["QANN", "student", "teacher"] and min(plan["epochs"].values()) >= 1
    assert steps.of(*run) == 0  # not measured again, so that every stage is found done
    (out / "plan.json").write_text('{"about": {}, "epochs": {"QANN": -1}}')
    with pytest.raises(SystemExit) as left:
        qsnn_command(*run)
    assert left.value.code == 2 and "is no plan of epochs" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:this CPU has no arithmetic for bfloat16")
def test_a_flow_in_short_floats(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--epochs", 1, 1, 1, "--train-images", 128, "--test-images", 20, "--max-timesteps", 2)
    qsnn_command("run", "--model", tiny, "--precision", "bf16", *few, "--out", tmp_path)
    assert "certificate: EXACT" in capsys.readouterr().out, "what was trained so is as exact"
    config = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])["config"]
    assert [config[stage]["precision"] for stage in ("teacher", "train", "distill")] == ["bf16"] * 3


@pytest.mark.parametrize("command", ["train", "quantize", "distill"])
def test_a_command_that_was_stopped_ends_with_the_same_file(
    command: str, chain: Path, tmp_path: Path, steps: Steps, images: torch.Tensor
) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "train": ("train", "--data", "digits"),
        "quantize": ("quantize", chain / "teacher"),
        "distill": ("distill", chain / "snn", "--teacher", chain / "qann"),
    }
    run = (*arguments[command], "--epochs", 2, "--train-images", 256, "--batch-size", 128, "--out")
    assert steps.of(*run, tmp_path / "whole") == 4
    steps.stop_at(4, *run, tmp_path / "stopped")
    assert steps.of(*run, tmp_path / "stopped", "--lr", 0.001) == 4  # other options: from the start
    other = (tmp_path / "stopped").read_bytes()
    assert steps.of(*run, tmp_path / "stopped") == 2
    assert (tmp_path / "stopped").read_bytes() == (tmp_path / "whole").read_bytes() != other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped", "whole"]


def test_a_stopped_run_is_not_continued_by_another_one(chain: Path, tmp_path: Path, steps: Steps) -> None:
    """Two runs with the same training options and the same shapes, which only differ in what is trained."""
    options = ("--epochs", 2, "--train-images", 256, "--batch-size", 128, "--out", tmp_path / "out")
    steps.stop_at(4, "quantize", chain / "teacher", "--weight-bits", 4, *options)
    assert steps.of("quantize", chain / "teacher", "--weight-bits", 3, *options) == 4
    student = ("distill", chain / "snn", *options, "--teacher")
    steps.stop_at(4, *student, chain / "qann")
    assert steps.of(*student, chain / "teacher") == 4
    assert steps.of(*student, chain / "qann", "--timesteps", 1) == 4
    assert steps.of(*student, chain / "qann", "--step-weight", 0.5) == 4
    assert steps.of(*student, chain / "qann") == 2


def test_the_whole_flow_with_signed_spikes(
    tiny: str, tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot take spikes back is refused before any training; the certificate is of the deferred network."""
    run = ("run", "--data", "digits", "--signed", "--epochs", 1, 1, 1, "--max-timesteps", 2, "--batch-size", 128)
    with pytest.raises(SystemExit):
        qsnn_command(*run, "--model", tiny.replace("make", "pooled"), "--out", tmp_path / "no")
    assert steps.done == 0 and "signed spikes: use average pooling" in capsys.readouterr().err
    assert steps.of(*run, "--model", tiny, "--out", tmp_path / "flow") == 27
    assert "certificate: EXACT (deferred, T = 2, 540 test images)" in capsys.readouterr().out
    student, folded = (
        qsnn.load(tmp_path / "flow" / f"{name}.safetensors", model=tiny) for name in ("student", "folded")
    )
    assert all(neuron.dynamics.signed for _, neuron in student.neurons())
    assert {type(neuron).__name__ for _, neuron in folded.neurons()} == {"IntegerIF"}
    again = ("run", "--data", "digits", "--epochs", 1, 1, 1, "--max-timesteps", 2, "--batch-size", 128, "--model", tiny)
    assert steps.of(*again, "--out", tmp_path / "flow") == 9  # the student alone
    plain = qsnn.load(tmp_path / "flow" / "student.safetensors", model=tiny)
    assert not any(neuron.dynamics.signed for _, neuron in plain.neurons())


def test_the_whole_flow_does_no_stage_twice(
    tiny: str, tmp_path: Path, steps: Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "flow"
    options = ("--epochs", 1, 1, 1, "--max-timesteps", 3, "--batch-size", 128)
    run = ("run", "--data", "digits", "--model", tiny, *options, "--out", out)
    assert steps.of(*run) == 27
    names = [*(f"{name}.safetensors" for name in STAGES), "net.onnx", "curve.png", "report.html", "records.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    shown = capsys.readouterr()
    assert "certificate: EXACT (deferred, T = 2, 540 test images)" in shown.out
    assert [line.strip() for line in shown.out.splitlines()[-len(names) :]] == [str(out / name) for name in names]
    report = (out / "report.html").read_text()
    given = "--max-timesteps 3 --batch-size 128 --epochs 1 1 1"
    assert f"qsnn run --data digits --out flow --model {tiny} {given}<" in report
    assert "<th>teacher.onnx</th>" in report and ">all of the folded network<" in report
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == [
        "run/teacher", "run/QANN", "run/SNN online", "run/SNN deferred", "run/student", "run/net.onnx",
        "run/teacher.onnx",
    ]  # fmt: skip
    assert {(record["data"], record["seed"], record["n"]) for record in records} == {("digits", 0, 540)}
    for name in names[:5]:
        assert str(tmp_path).encode() not in (out / name).read_bytes()
    assert str(tmp_path) not in report and str(tmp_path) not in (out / "records.jsonl").read_text()

    times = {name: (out / name).stat().st_mtime_ns for name in names[:5]}
    first = files(out)
    assert steps.of(*run) == 0
    assert re.findall(r"(\w+): done before", capsys.readouterr().out) == list(STAGES)
    assert {name: (out / name).stat().st_mtime_ns for name in names[:5]} == times

    for change, expected, kept in (
        (("--timesteps", 3), 9, ["teacher", "qann"]),
        (("--model", tiny.replace("make", "wide")), 27, []),
        (("--seed", 1), 27, []),
        (("--fresh",), 27, []),
    ):
        assert steps.of(*run, *change) == expected
        assert re.findall(r"(\w+): done before", capsys.readouterr().out) == kept
    assert files(out) == first  # seed 0 again: the same bytes

    torch.save(qsnn.load(out / "teacher.safetensors", model=tiny).state_dict(), tmp_path / "weights.pt")
    assert steps.of(*run, "--weights", tmp_path / "weights.pt") == 18
    assert str(tmp_path) not in (out / "records.jsonl").read_text()


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_model_of_ones_own_with_its_weights(
    form: str, tiny: str, tmp_path: Path, steps: Steps, images: torch.Tensor
) -> None:
    model = qsnn.create_model(tiny, qsnn.load_data("digits"), seed=5)
    weights = tmp_path / "weights"
    torch.save(model.state_dict(), weights) if form == "torch" else safetensors.torch.save_file(
        model.state_dict(), weights
    )
    teacher, qann = tmp_path / "teacher", tmp_path / "qann"
    assert steps.of(
        "train", "--data", "digits", "--model", tiny, "--weights", weights, "--epochs", 0, "--out", teacher
    ) == 0  # fmt: skip
    assert torch.equal(qsnn.load(teacher, model=tiny)(images), model.eval()(images))
    assert steps.of("quantize", teacher, "--model", tiny, "--epochs", 0, "--out", qann) == 0
    assert qsnn.read_recipe(qann)["model"] == {"name": tiny, "options": {}}
    trained = tmp_path / "trained"
    qsnn_command("train", "--data", "digits", "--model", tiny, "--weights", weights, "--epochs", 1, "--out", trained)
    assert not torch.equal(qsnn.load(trained, model=tiny)(images), model(images))


@pytest.mark.parametrize("key", ["model", "ema"])
def test_which_of_several_weights(key: str, tiny: str, tmp_path: Path, images: torch.Tensor) -> None:
    digits = qsnn.load_data("digits")
    models = {name: qsnn.create_model(tiny, digits, seed=seed).eval() for seed, name in enumerate(("model", "ema"))}
    torch.save({name: model.state_dict() for name, model in models.items()}, tmp_path / "both.pt")
    out, given = tmp_path / "teacher", ("--weights", tmp_path / "both.pt", "--key", key)
    qsnn_command("train", "--data", "digits", "--model", tiny, *given, "--epochs", 0, "--out", out)
    assert torch.equal(qsnn.load(out, model=tiny)(images), models[key](images))


def test_a_key_without_weights_and_a_task_that_does_not_fit(tmp_path: Path, refused: Callable[..., str]) -> None:
    short = ("--out", tmp_path / "x", "--data", "digits", "--model", "study")
    for command in (("train", *short), ("run", *short), ("check", *short[2:])):
        assert "--key ema says which of several weights in a file is meant; add --weights" in refused(
            *command, "--key", "ema"
        )
        assert "expected maps (B, K, H, W), integer labels (B, H, W) for task='segmentation', got answers" in refused(
            *command, "--task", "segmentation"
        )
        assert "invalid choice" in refused(*command, "--task", "colouring")
    assert sorted(get_args(TaskName)) == sorted(TASKS)


def test_options_of_a_network_are_typed_and_kept(
    tmp_path: Path, digits: qsnn.Data, images: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    file, said = tmp_path / "t.safetensors", ("--model-options", "attention=channel", "widths=[16, 32]", "hidden=8")
    few = ("--train-images", 64, "--epochs", 0)
    qsnn_command("train", "--data", "digits", "--model", "qkformer", *said, *few, "--out", file)
    options = {"attention": "channel", "widths": [16, 32], "hidden": 8}
    expected = qsnn.create_model("qkformer", digits, **options).eval()
    assert torch.equal(qsnn.load(file)(images), expected(images))
    assert read_recipe(file)["model"] == {"name": "qkformer", "options": options}
    qsnn_command("check", "--model", "qkformer", *said, "--seconds", 0.01)
    assert "9.gate" in capsys.readouterr().out


def test_a_flow_of_other_options_is_another_flow(tmp_path: Path) -> None:
    out, small = tmp_path / "run", ("--train-images", 64, "--test-images", 16, "--epochs", 0, 0, 0)
    qsnn_command("run", "--out", out, "--model", "mlp", "--model-options", "width=8", *small)
    (report,) = {(out / "report.html").read_text()}
    assert "mlp width=8 on digits" in report and "--model mlp --model-options width=8 " in report
    first = (out / "teacher.safetensors").stat().st_mtime_ns
    qsnn_command("run", "--out", out, "--model", "mlp", "--model-options", "width=8", *small)
    assert (out / "teacher.safetensors").stat().st_mtime_ns == first
    qsnn_command("run", "--out", out, "--model", "mlp", "--model-options", "width=9", *small)
    assert qsnn.load(out / "teacher.safetensors")[1].out_features == 9


@pytest.mark.parametrize(("words", "message"), [
    (["attention"], "expected --model-options as NAME=VALUE, like attention=channel, got 'attention'"),
    (["hidden=8", "hidden=9"], "--model-options gives hidden twice"),
    (["seed=3"], "--model-options cannot set seed; it follows from --model, --data and --seed"),
    (["hiden=8"], "qkformer knows attention, widths, hidden, got hiden"),
    (["attention=softmax"], "expected attention to be one of self, token, channel, relu, got 'softmax'"),
])  # fmt: skip
def test_options_that_a_network_does_not_take(words: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("check", "--model", "qkformer", "--model-options", *words)
    assert message in refused("run", "--model", "qkformer", "--model-options", *words)


def test_every_format_takes_its_own_options_alone() -> None:
    for name, form in FORMATS.items():
        function = getattr(importlib.import_module(form.module), form.function)
        parameters = inspect.signature(function).parameters
        if name in ("nir", "c", "qonnx"):
            assert {p for p, value in parameters.items() if value.kind is value.KEYWORD_ONLY} == set(form.options)
        taken = {"onnx": OnnxConfig, "hub": save_pretrained}.get(name, function)
        assert set(form.options) <= set(inspect.signature(taken).parameters), name


def test_export_refuses_what_a_format_does_not_take(chain: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    given: dict[str, tuple[object, ...]] = {
        "timesteps": (2,), "firing": ("online",), "input": ("uint8",), "kernels": ("int8",), "mean": (0.5,),
        "std": (0.5,), "batch": (1,), "repo_id": ("a/b",), "push": (),
    }  # fmt: skip
    for name, form in FORMATS.items():
        for option, value in given.items():
            if option not in form.options:
                word = f"--{option.replace('_', '-')}"
                said = refused("export", chain / "qann", "--format", name, word, *value, "--out", tmp_path / "x")
                assert f"--format {name} has no {word}; it takes --" in said
    assert "expected format to be one of" in refused(
        "export", chain / "qann", "--format", "tf", "--out", tmp_path / "x"
    )


def test_export_of_c_says_what_it_takes(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.c"
    qsnn_command("fold", chain / "snn", "--out", tmp_path / "folded")
    qsnn_command("export", tmp_path / "folded", "--format", "c", "--firing", "deferred", "--mean", 0.5, "--std", 0.5,
                 "--out", out)  # fmt: skip
    said = capsys.readouterr().out
    flash, weights, ram = (
        int(number.replace(",", ""))
        for number in re.search(r"flash ([\d,]+) bytes \(weights ([\d,]+)\), RAM ([\d,]+) bytes", said).groups()  # type: ignore[union-attr]
    )
    network = qsnn.load(tmp_path / "folded").network  # type: ignore[attr-defined]
    bits = sum(layer.weight.numel() * layer.weight_bits for layer in network.modules() if hasattr(layer, "weight_bits"))
    assert weights < flash < 3 * weights + 8192 and 0 < ram < 2**16 and 0.9 < weights / (bits / 8) < 1.2


# ---- what is shown


def test_distill_prunes_and_teaches_both(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--epochs", 1, "--train-images", 256, "--device", "cpu")
    out = tmp_path / "a.safetensors"
    qsnn_command(
        "distill", chain / "snn", "--teacher", chain / "qann", "--out", out, "--sparsity", 0.6, "--mutual",
        "--kd-weight", 0.5, "--tensorboard", tmp_path / "board", *short,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"weights that are zero: [67]\d\.\d %", said)
    assert qsnn.read_recipe(tmp_path / "a-teacher.safetensors")["kind"] == "qann"
    assert list((tmp_path / "board").iterdir())
    both = ("--teacher", chain / "qann", chain / "teacher")
    qsnn_command("distill", chain / "snn", *both, "--out", tmp_path / "b", *short)
    assert qsnn.read_recipe(tmp_path / "b")["kind"] == "student"


@pytest.mark.slow
def test_torchrun_writes_once_and_goes_on(chain: Path, tmp_path: Path) -> None:
    """Two processes, stopped after their first epoch, give the file of two that were not."""
    wide = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qsnn"]
    command = ["distill", str(chain / "snn"), "--teacher", str(chain / "qann"), "--epochs", "4", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = subprocess.run([*wide, *command, "--out", str(whole)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    process = subprocess.Popen([*wide, *command, "--out", str(parts)], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".parts*.resume")):
        time.sleep(0.01)
    process.terminate()
    process.wait()
    assert not parts.exists()
    subprocess.run([*wide, *command, "--out", str(parts)], env=environment, check=True, capture_output=True)
    assert weights(whole) == weights(parts)


def weights(path: Path) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in qsnn.load(path).state_dict().items()}


def test_convert_certifies(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qsnn_command("convert", chain / "qann", "--certify", "--firing", "deferred", "--out", tmp_path / "snn")
    shown = capsys.readouterr().out
    assert shown.startswith(f"wrote {tmp_path / 'snn'}\ndeferred firing, T = 2, 540 images\n")
    assert "answers equal: 540 of 540" in shown and shown.endswith("\nEXACT\n")


def test_benchmark_writes_what_it_is_asked_for(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    html, figure, records = tmp_path / "report.html", tmp_path / "curve.svg", tmp_path / "records.jsonl"
    qsnn_command(
        "benchmark", chain / "folded", chain / "qann", "--timesteps", 3, "--html", html, "--figure", figure,
        "--records", records,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert re.search(r"^folded +online ", shown, re.M) and re.search(r"^qann +ANN ", shown, re.M)
    assert "qsnn benchmark folded qann --timesteps 3" in html.read_text() and "<svg" in figure.read_text()
    read = [json.loads(line) for line in records.read_text().splitlines()]
    assert [(record["name"], record["n"]) for record in read] == [("benchmark/folded", 540), ("benchmark/qann", 540)]
    assert read[0]["metrics"]["timesteps"] == [1, 2, 3] and read[0]["config"]["kind"] == "folded"
    assert str(chain) not in html.read_text() + records.read_text()


def test_benchmark_tells_files_of_one_name_apart(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        (Path(name) / "snn").write_bytes((chain / "snn").read_bytes())
    qsnn_command("benchmark", "a/snn", "b/snn", "--timesteps", 1)
    assert re.findall(r"^([ab]/snn) +online ", capsys.readouterr().out, re.M) == ["a/snn", "b/snn"]


def test_info_tells_how_a_file_was_made_and_what_it_weighs(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qsnn_command("info", chain / "folded")
    shown = capsys.readouterr().out
    assert "kind: folded\n" in shown
    assert f"parent: {hashlib.sha256((chain / 'student').read_bytes()).hexdigest()}\n" in shown
    assert shown.endswith(f"{qsnn.summary(qsnn.load(chain / 'folded'))}\n")


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_every_option_is_explained(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as left:
        qsnn_command(*command.split(), "--help")
    shown = capsys.readouterr()
    assert left.value.code == 0 and not shown.err
    entries: list[str] = []
    for line in shown.out.replace("│", " ").splitlines():
        text = line.strip()
        if re.match(r" {1,6}(--?[a-z]|\[*PATH|• )", line):
            entries.append(text)
        elif line.startswith(" " * 12) and entries:
            entries[-1] += f" {text}"  # the help of an option with a long name stands below it
    assert len(entries) >= {"": 1 + len(cli.COMMANDS), "fold": 3, "info": 2}.get(command, 6)
    for entry in entries:
        explained = re.sub(r" \((default: .*|required)\)$", "", entry.replace("{None}|", "").removeprefix("• "))
        words = [word for word in explained.split()[1:] if re.search("[a-z]", word)]
        assert len(words) > (entry.startswith("•")), f"no help for: {entry}"
    if command in ("run", "distill"):
        for field in dataclasses.fields({"run": RunConfig, "distill": DistillConfig}[command]):
            assert f"--{field.name.replace('_', '-')} " in shown.out


# ---- refusals


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with status 2, nothing but one line on stderr; return that line."""

    def run(*args: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            qsnn_command(*args)
        shown = capsys.readouterr()
        assert left.value.code == 2
        assert shown.err.startswith("qsnn: ") and shown.err.count("\n") == 1 and shown.err.endswith("\n")
        return shown.err

    return run


def test_files_that_cannot_be_read(chain: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ("--out", tmp_path / "out")
    foreign, cut, missing = tmp_path / "foreign", tmp_path / "cut", tmp_path / "missing"
    safetensors.torch.save_file({"weight": torch.zeros(3)}, foreign)
    for file, message in ((missing, "no such file"), (cut, "truncated"), (foreign, "not written by qsnn")):
        for command in (
            ("quantize", file, *out), ("convert", file, *out), ("fold", file, *out), ("info", file),
            ("distill", file, "--teacher", chain / "qann", *out), ("distill", chain / "snn", "--teacher", file, *out),
            ("benchmark", chain / "snn", file),
        ):  # fmt: skip
            cut.write_bytes((chain / "teacher").read_bytes()[:-1])
            assert message in refused(*command)
    for name in ("train", "run"):
        assert "no such file" in refused(name, *out, "--data", "digits", "--weights", missing)
        assert "cannot load" in refused(name, *out, "--data", "digits", "--weights", cut)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["cut", "foreign"]


def test_the_wrong_kind_of_checkpoint(chain: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ("--out", tmp_path / "out")
    for args, message in (
        (("quantize", chain / "qann"), "holds a 'qann'; expected 'teacher'"),
        (("convert", chain / "snn"), "holds a 'snn'; expected 'qann' or 'teacher'"),
        (("distill", chain / "folded", "--teacher", chain / "qann"), "holds a 'folded'; expected 'snn' or 'student'"),
        (("distill", chain / "snn", "--teacher", chain / "snn"), "holds a 'snn'; expected 'teacher' or 'qann'"),
        (("fold", chain / "teacher"), "holds a 'teacher'; expected 'snn' or 'student'"),
        (("fold", chain / "folded"), "holds a 'folded'; expected 'snn' or 'student'"),
    ):
        assert message in refused(*args, *out)
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range(chain: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = ("--out", tmp_path / "out")
    for args, message in (
        (("convert", chain / "qann", "--timesteps", 0), "timesteps must be a whole number from 1 to 4,096, got 0"),
        (("distill", chain / "snn", "--teacher", chain / "qann", "--timesteps", 0), "timesteps must be"),
        (("run", "--timesteps", 0), "timesteps must be a whole number from 1 to 4,096, got 0"),
        (("run", "--max-timesteps", 0), "max_timesteps must be a whole number from 1 to 4,096, got 0"),
        (("run", "--weight-bits", 0), "weight_bits must be a whole number from 1 to 32, got 0"),
        (("run", "--levels", 0), "levels must be a whole number from 1 to 255"),
        (("run", "--precision", "fp8"), "precision must be 'fp32' or 'bf16', got 'fp8'"),
        (("run", "--budget", "2d"), "expected a time like 90s, 110m, 2h or 1h30m, got '2d'"),
        (("run", "--budget", "2h", "--epochs", 1, 1, 1), "expected epochs or budget, got both"),
        (("run", "--epochs", 1, 1, -1), "epochs must be 3 values in a tuple, each a whole number from 0"),
        (("quantize", chain / "teacher", "--weight-bits", 0), "weight_bits must be a whole number from 1 to 32, got 0"),
        (("quantize", chain / "teacher", "--weight-bits", 9), "weight bits must be 1 to 8, 16 (fp16) or 32"),
        (("quantize", chain / "teacher", "--act-bits", 0), "act_bits must be a whole number from 1 to 8, or None"),
        (("quantize", chain / "teacher", "--levels", 0), "levels must be a whole number from 1 to 255"),
        (("quantize", chain / "teacher", "--input-bits", 0), "input_bits must be a whole number from 2 to 16, or None"),
        (("quantize", chain / "teacher", "--act-bits", 1, "--levels", 2), "give only one of the two"),
        (("train", "--data", "digits", "--batch-size", 0), "batch_size must be a whole number from 1 to"),
        (("train", "--data", "digits", "--optimizer", "lion"), "optimizer must be 'sgd' or 'adamw', got 'lion'"),
        (("convert", chain / "qann", "--firing", "later"), "firing must be 'online' or 'deferred', got 'later'"),
    ):
        assert message in refused(*args, *out)
    assert "timesteps must be a whole number" in refused("benchmark", chain / "snn", "--timesteps", 0)
    assert "firing must be 'online'" in refused("benchmark", chain / "snn", "--firing", "later")
    assert "at least one checkpoint" in refused("benchmark")
    assert not list(tmp_path.iterdir())


def test_devices_that_are_not_there(tmp_path: Path, refused: Callable[..., str]) -> None:
    options = ("train", "--data", "digits", "--out", tmp_path / "a", "--device")
    assert "expected a device like 'cpu', 'cuda' or 'cuda:1', got 'tpus'" in refused(*options, "tpus")
    if not torch.cuda.is_available():
        assert "has no CUDA GPU" in refused(*options, "cuda")


def test_names_that_are_not_known(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    out = ("--out", tmp_path / "out")
    (tmp_path / "broken_model.py").write_text("def make(:")
    monkeypatch.syspath_prepend(tmp_path)
    for command in ("train", "run"):
        error = refused(command, "--data", "imagenet", *out)
        assert "unknown data set 'imagenet'" in error and "use one of digits, mnist, fashion-mnist, cifar10" in error
        for model, message in (
            ("resnet-152", "unknown model 'resnet-152'; known: vgg-small, study, resnet-small, resnet18, resnet20"),
            ("no_such_module:make", "cannot find 'no_such_module:make' (No module named 'no_such_module')"),
            (tiny.replace("make", "nothing"), "cannot find 'tiny_model:nothing' (module 'tiny_model' has no attribute"),
            ("broken_model:make", "cannot find 'broken_model:make' (invalid syntax"),
            (tiny.replace("make", "not_a_model"), "is not callable"),
            (tiny.replace("make", "fails"), "this model is not finished"),
        ):
            assert message in refused(command, "--data", "digits", "--model", model, *out)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["broken_model.py"]


def test_places_that_cannot_be_written(chain: Path, tmp_path: Path, steps: Steps, refused: Callable[..., str]) -> None:
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "is a folder; name a file in it"), (tmp_path / "file" / "out", "exist")):
        for args in (("train", "--data", "digits"), ("fold", chain / "snn"), ("convert", chain / "qann")):
            assert message in refused(*args, "--out", out)
    assert steps.done == 0  # said before the training, not after


def test_a_download_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    from torchvision import datasets

    def download(self: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.delenv("QSNN_DATA", raising=False)
    for command in ("train", "run"):
        error = refused(command, "--data", "mnist", "--data-root", tmp_path / "data", "--out", tmp_path / "out")
        assert "no route to host" in error
        assert "or set QSNN_DATA or --data-root to the folder that holds MNIST/" in error
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert "install both" in refused("train", "--data", "mnist", "--data-root", tmp_path, "--out", tmp_path / "out")


def test_checkpoints_of_two_data_sets_are_not_compared(
    chain: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    other = qsnn.load(chain / "teacher")
    other.qsnn_recipe["data"]["name"] = "mnist"  # type: ignore[index,assignment]
    qsnn.save(other, tmp_path / "other")
    assert "one data set, got digits, mnist;" in refused("benchmark", chain / "teacher", tmp_path / "other")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "a command is missing; use one of run, train,"),
        (["nothing"], "unknown command 'nothing'; use one of run, train,"),
        (["--nope"], "unknown command '--nope'"),
        (["info", "file", "--nope"], "unrecognized options: --nope; `qsnn info --help` lists the options"),
        (["train", "--data", "digits"], "missing from qsnn train: --out PATH"),
        (["run", "--epochs", "one"], "error parsing --epochs"),
        (["convert", "file", "--out", "out", "--timesteps", "two"], "error parsing --timesteps"),
        (["info", f"{'long' * 40}-{'name' * 40}"], f"{'long' * 40}-{'name' * 40}"),
    ],
)
def test_a_command_line_that_cannot_be_parsed(args: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused(*args)


def test_a_refusal_is_not_cut_by_a_narrow_terminal(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "a" * 200
    assert f"optimizer must be 'sgd' or 'adamw', got '{name}'" in refused(
        "train", "--data", "digits", "--out", "out", "--optimizer", name
    )
    assert os.environ["COLUMNS"] == "40"


def test_what_nobody_foresaw_is_one_line_that_says_how_to_report_it(
    refused: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(file: Path) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("qsnn.cli.commands.info", info)
    error = refused("info", "--file", "x")
    assert error.startswith("qsnn: two lines (RuntimeError); qsnn did not foresee this: please report it")
    assert "QSNN_DEBUG=1" in error
    monkeypatch.setenv("QSNN_DEBUG", "1")
    with pytest.raises(SystemExit) as left:
        main(["info", "--file", "x"])
    shown = capsys.readouterr().err
    assert left.value.code == 2 and shown.startswith("Traceback") and shown.endswith(error)


def test_the_table_of_commands_says_what_the_commands_say() -> None:
    for name, (module, line) in cli.COMMANDS.items():
        command = getattr(importlib.import_module(module), name)
        assert (inspect.getdoc(command) or "").splitlines()[0] == line


# ---- as a process of its own


def process(cwd: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """``qsnn`` as its script runs it (-P: without the working directory on Python's path)."""
    command = [sys.executable, "-P", "-m", "qsnn", *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )  # fmt: skip


def test_a_process_finds_a_model_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text(TINY)
    done = process(tmp_path, "train", "--data", "digits", "--model", "here:make", "--epochs", 0, "--out", "teacher")
    assert done.returncode == 0 and re.search(r"^wrote teacher \(validation accuracy \d+\.\d\d %\)$", done.stdout, re.M)
    assert [path.name for path in tmp_path.glob("teacher*")] == ["teacher"]


def test_a_process_that_fails_says_so_in_one_line(tmp_path: Path) -> None:
    done = process(tmp_path, "fold", "missing", "--out", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "qsnn: no such file: missing\n"


@pytest.mark.parametrize(
    ("args", "status"),
    [(["--help"], 0), (["-h"], 0), (["--version"], 0), ([], 2), (["nothing"], 2), (["nope", "-x"], 2)],
)
def test_an_answer_that_needs_no_torch_imports_none(args: list[str], status: int) -> None:
    """Torch takes seconds to import; so it is looked for, and no clock is read."""
    code = f"""
import sys
from qsnn.cli.main import main
try:
    main({args!r})
except SystemExit as left:
    assert left.code in ((None, 0) if {status} == 0 else ({status},)), left.code
assert not {{"torch", "numpy", "spikingjelly", "brevitas", "matplotlib"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (len(done.stdout) > 5) == (status == 0) and (len(done.stderr.splitlines()) == 1) == (status == 2)
    if args == ["--version"]:
        assert done.stdout == f"qsnn {qsnn.__version__}\n"


def test_no_command_prints_a_warning_of_somebody_else(chain: Path, tmp_path: Path) -> None:
    """CUDA_HOME without a GPU, on which torch comments when SpikingJelly imports its extension builder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for args in (
        ("train", "--data", "digits", "--model", "study", "--epochs", 0, "--out", "teacher"),
        ("quantize", "teacher", "--epochs", 0, "--out", "qann"),
        ("convert", "qann", "--certify", "--out", "snn"),
        ("benchmark", "snn", "qann", "--timesteps", 2, "--html", "report.html"),
    ):  # each imports what the others do
        command = [sys.executable, "-m", "qsnn", *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), args
