"""Everything that names a device, on a GPU: ``pytest -m gpu``. QSNN_GPU=cpu runs the same tests on a CPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qsnn
from qsnn.cli.main import main

DEVICE = os.environ.get("QSNN_GPU", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU here"),
]
FEW = {"epochs": 3, "train_images": 1024, "batch_size": 64}
CPU = DEVICE == "cpu"


@pytest.fixture(scope="module")
def data(digits: qsnn.Data) -> qsnn.Data:
    return replace(digits, train=digits.train.to(DEVICE), val=digits.val.to(DEVICE), test=digits.test.to(DEVICE))


@pytest.fixture(scope="module")
def nets(data: qsnn.Data) -> dict[str, nn.Module]:
    """The whole flow, on the device."""
    teacher = qsnn.create_model("vgg-small", data, seed=0).to(DEVICE)
    qsnn.fit(teacher, data, qsnn.TrainConfig(lr=0.05, **FEW))
    qann = qsnn.quantize(teacher, data)
    qsnn.fit(qann, data, qsnn.TrainConfig(lr=0.02, **FEW), teacher=teacher)
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2, firing="online"))
    student = qsnn.distill(snn, qann, data, qsnn.DistillConfig(timesteps=2, **FEW))
    return {"teacher": teacher, "qann": qann, "snn": snn, "student": student, "folded": qsnn.fold(student)}


def device_of(model: nn.Module) -> str:
    return next(t.device.type for t in (*model.parameters(), *model.buffers()))


def test_every_network_stays_on_the_device(nets: dict[str, nn.Module]) -> None:
    assert {name: device_of(net) for name, net in nets.items()} == dict.fromkeys(nets, DEVICE)


def test_the_certificate_holds_on_the_device(nets: dict[str, nn.Module], data: qsnn.Data) -> None:
    assert qsnn.certify(nets["snn"], nets["qann"], data.test).exact


@pytest.mark.parametrize("firing", ["online", "deferred"])
def test_a_folded_network_has_the_same_bits_as_on_a_cpu(
    nets: dict[str, nn.Module], digits: qsnn.Data, firing: str
) -> None:
    images = torch.stack([digits.test[i][0] for i in range(64)])
    there = nets["folded"](images.to(DEVICE), firing=firing).cpu()
    here = copy.deepcopy(nets["folded"]).cpu()(images, firing=firing)
    assert torch.equal(there, here)
    assert torch.equal(there[:, :7], nets["folded"](images[:7].to(DEVICE), firing=firing).cpu()), "the batch size"


def test_accuracy_and_benchmark_agree(nets: dict[str, nn.Module], data: qsnn.Data, digits: qsnn.Data) -> None:
    result = qsnn.benchmark(nets["folded"], data.test, timesteps=4)
    assert (
        result.accuracy[-1]
        == qsnn.benchmark(copy.deepcopy(nets["folded"]).cpu(), digits.test, timesteps=4).accuracy[-1]
    )
    assert abs(qsnn.accuracy(nets["teacher"], data.test) - qsnn.accuracy(nets["teacher"], digits.test)) < 0.5


def test_a_float_network_converts_on_the_device(nets: dict[str, nn.Module], data: qsnn.Data) -> None:
    snn = qsnn.convert(nets["teacher"], data, qsnn.ConvertConfig(timesteps=4))
    assert device_of(snn) == DEVICE
    assert qsnn.benchmark(snn, data.test, timesteps=4).accuracy[-1] > 50


@pytest.mark.filterwarnings("ignore:this CPU has no arithmetic for bfloat16")
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "bf16", "compile": True}, {"compile": True}])
def test_training_in_bfloat16_and_compiled(options: dict, nets: dict[str, nn.Module], data: qsnn.Data) -> None:
    if CPU and "compile" in options:
        pytest.skip("takes minutes on a CPU")
    config = qsnn.TrainConfig(**{**FEW, "lr": 0.05}, **options)
    history = qsnn.fit(qsnn.create_model("study", data, seed=0).to(DEVICE), data, config)
    assert history[-1].loss < history[0].loss
    student = qsnn.distill(nets["snn"], nets["qann"], data, qsnn.DistillConfig(**FEW, **options))
    assert qsnn.benchmark(student, data.test, timesteps=2).accuracy[1] > 50


def test_files_come_back_to_the_device(nets: dict[str, nn.Module], data: qsnn.Data, tmp_path: Path) -> None:
    qsnn.save(nets["folded"], tmp_path / "folded.safetensors")
    again = qsnn.load(tmp_path / "folded.safetensors").to(DEVICE)
    images = data.test[0][0][None].to(DEVICE)
    assert torch.equal(again(images), nets["folded"](images))


def test_a_run_that_was_stopped_goes_on_there(data: qsnn.Data, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, steps: int) -> None:
        if step == 20:
            raise Stop

    config = qsnn.TrainConfig(lr=0.05, **{**FEW, "epochs": 2})
    whole, stopped = (qsnn.create_model("study", data, seed=0).to(DEVICE) for _ in range(2))
    history = qsnn.fit(whole, data, config)
    with pytest.raises(Stop):
        qsnn.fit(copy.deepcopy(stopped), data, config, resume=tmp_path / "state", after_step=stop)
    again = qsnn.fit(stopped, data, config, resume=tmp_path / "state")
    assert len(again) == 2 and abs(again[-1].loss - history[-1].loss) < (1e-9 if CPU else 0.05)


def test_the_command_line_on_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    main(
        ["run", "--device", DEVICE, "--model", "study", "--epochs", "1", "1", "1", "--max-timesteps", "2", "--out", out]
    )
    assert "certificate: EXACT" in capsys.readouterr().out


def test_one_process_of_torchrun(tmp_path: Path) -> None:
    """NCCL and SyncBatchNorm with one rank (gloo on a CPU)."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "qsnn", "train"]
    options = ["--data", "digits", "--model", "study", "--epochs", "1", "--train-images", "128", "--device", DEVICE]
    made = subprocess.run(
        [*run, *options, "--out", str(tmp_path / "teacher.safetensors")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert qsnn.load(tmp_path / "teacher.safetensors") is not None
