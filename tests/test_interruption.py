"""A run that is killed at any moment and started again ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import qsnn
from qsnn.training import fit as train
from qsnn.training.resume import read_state

STATES = ".student*.resume"
KILLS = int(os.environ.get("QSNN_KILLS", "2"))
SHORT = qsnn.TrainConfig(epochs=2, lr=0.05, train_images=256)


def command(folder: Path) -> list[str]:
    names = [str(folder / f"{name}.safetensors") for name in ("snn", "qann", "student")]
    return [
        sys.executable, "-m", "qsnn", "distill", names[0], "--teacher", names[1], "--out", names[2], "--epochs", "30",
        "--device", "cpu",
    ]  # fmt: skip


def weights(path: Path) -> dict[str, torch.Tensor]:
    return qsnn.load(path).state_dict()


@pytest.fixture(scope="module")
def flow(digits: qsnn.Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    teacher = qsnn.create_model("study", digits)
    qsnn.fit(teacher, digits, SHORT)
    qann = qsnn.quantize(teacher, digits)
    qsnn.save(qann, folder / "qann.safetensors")
    qsnn.save(qsnn.convert(qann), folder / "snn.safetensors")
    return folder


@pytest.mark.slow
def test_killed_at_random_moments(flow: Path) -> None:
    """``QSNN_KILLS=100 pytest tests/test_interruption.py`` kills a hundred times: SIGKILL, SIGTERM and Ctrl-C.

    However it ended, it goes on to the same bytes.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(flow), check=True, env=environment, capture_output=True)
    student = flow / "student.safetensors"
    expected, whole = weights(student), student.read_bytes()
    draw, killed = random.Random(0), 0
    for _ in range(20 * KILLS):
        student.unlink(missing_ok=True)
        process = subprocess.Popen(command(flow), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # imports take seconds; they are no moment of interest
        while process.poll() is None and not list(flow.glob(STATES)):
            time.sleep(0.01)
        time.sleep(draw.random() * 1.5)
        sent = draw.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        process.send_signal(sent)
        killed += process.wait() in (-sent, 130)
        for path in list(flow.glob(STATES)):
            read_state(path, read_config(path))  # whole, never half-written
        if killed == KILLS:
            break
    assert killed == KILLS
    subprocess.run(command(flow), check=True, env=environment, capture_output=True)
    found = weights(student)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert student.read_bytes() == whole
    assert not list(flow.glob(STATES))


def read_config(path: Path) -> dict:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return json.loads(header["__metadata__"]["qsnn.fit"])["config"]


class Killed(Exception):
    pass


@pytest.mark.parametrize(("at", "ema"), [(1, 0.0), (3, 0.0), (5, 0.0), (1, 0.9), (5, 0.9), (8, 0.9)])
def test_stopped_within_an_epoch(
    at: int, ema: float, digits: qsnn.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state after every batch: the order, augmentation, dropout and learning rate go on where they were."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    config = qsnn.TrainConfig(epochs=3, lr=0.05, train_images=384, augment="flip+shift", ema=ema)  # 3 batches an epoch

    def model() -> nn.Module:
        torch.manual_seed(0)
        hidden = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout()
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))

    def stop(step: int, steps: int) -> None:
        if step == at + 1:
            raise Killed

    expected = model()
    qsnn.fit(expected, digits, config)
    state = tmp_path / "state"
    with pytest.raises(Killed):
        qsnn.fit(model(), digits, config, after_step=stop, resume=state)
    found = model()
    history = qsnn.fit(found, digits, config, resume=state)
    assert len(history) == 3
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


def test_a_full_disk_keeps_the_last_state(digits: qsnn.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, found = tmp_path / "state", []

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    def fill(step: int, steps: int) -> None:
        if step == steps:  # the state of the first epoch is written; that of the second will not fit
            found.append(state.read_bytes())
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(OSError, match="No space left"):
        qsnn.fit(qsnn.create_model("study", digits), digits, SHORT, after_step=fill, resume=state)
    assert state.read_bytes() == found[0]
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_divergence_names_step_state_and_remedy(digits: qsnn.Data, tmp_path: Path) -> None:
    state = tmp_path / "state"
    config = qsnn.TrainConfig(epochs=3, train_images=256)

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return model(images).square().mean() * (1.0 if len(calls) <= 2 else 1e6)

    calls: list[int] = []
    with pytest.raises(FloatingPointError, match=r"step 1 of epoch 2 of 'train'; try a lower lr.*state.*after epoch 1"):
        qsnn.fit(qsnn.create_model("study", digits), digits, config, loss=loss, resume=state)
    assert state.exists()
