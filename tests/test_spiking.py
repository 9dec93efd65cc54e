"""Spiking networks from scratch: each learns, at any weight precision, is counted, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from torch import nn

import qsnn
from qsnn.cli.main import main
from qsnn.models.spiking import CONNECTIONS, SPIKING, QuantizedWeight, XnorWeight, build_spiking
from qsnn.quant.weights import weight_bits

NETS = [(name, {}) for name in SPIKING] + [("sew-resnet", {"connect": connect}) for connect in CONNECTIONS[1:]]


@pytest.mark.parametrize(("name", "options"), NETS)
def test_each_is_a_student_that_is_counted_saved_and_loaded(
    name: str, options: dict, digits: qsnn.Data, teacher: nn.Module, tmp_path: Path
) -> None:
    network = qsnn.create_model(name, digits, weight_bits=4, **options)
    config = qsnn.DistillConfig(timesteps=2, epochs=1, train_images=64, batch_size=32)
    student = qsnn.distill(network, teacher, digits, config)
    images = next(qsnn.batches(digits.test, 8))[0]
    assert student(images).shape == (2, 8, 10)
    moved = [not torch.equal(a, b) for a, b in zip(student.parameters(), network.parameters(), strict=True)]
    assert sum(moved) > 0.5 * len(moved)
    result = qsnn.benchmark(student, digits.test.head(16), timesteps=2)  # type: ignore[attr-defined]
    assert result.timesteps == (1, 2) and 0 < result.spike_rate < 1
    assert result.layers[0].macs > 0 and result.synops > 0
    qsnn.save(student, tmp_path / "a.safetensors")
    again = qsnn.load(tmp_path / "a.safetensors")
    assert torch.equal(again(images), student(images)) and again.timesteps == 2


def test_blocks_are_those_of_spikingjelly(digits: qsnn.Data) -> None:
    for name, block in (("sew-resnet", sew_resnet.BasicBlock), ("spiking-resnet", spiking_resnet.BasicBlock)):
        assert sum(isinstance(m, block) for m in qsnn.create_model(name, digits).modules()) == 3


def test_it_learns(digits: qsnn.Data) -> None:
    network = qsnn.create_model("ms-resnet", digits)
    qsnn.fit(network, digits, qsnn.TrainConfig(epochs=6, batch_size=32, optimizer="adamw", lr=0.005))
    assert qsnn.accuracy(network, digits.val) > 80


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32])
def test_weights_of_every_precision(bits: int) -> None:
    network = build_spiking("sew-resnet", (1, 8, 8), 10, weight_bits=bits)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [weight_bits(layer) for layer in layers[1:-1]] == [bits] * (len(layers) - 2)
    inner = layers[1].weight
    if bits == 1:
        assert len(inner[0].unique()) == 2
    elif bits <= 8:
        assert len(inner[0].unique()) <= 2**bits - 1
    elif bits == 16:
        assert torch.equal(inner, inner.half().float())
    network(torch.rand(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_gradient_passes_straight_through() -> None:
    for quantizer in (XnorWeight(), QuantizedWeight(4)):
        w = torch.randn(3, 4, requires_grad=True)
        (quantizer(w) * torch.arange(12.0).view(3, 4)).sum().backward()
        assert torch.equal(w.grad, torch.arange(12.0).view(3, 4))


def test_impossible_options(digits: qsnn.Data) -> None:
    for options, match in (
        ({"connect": "OR"}, "ADD, AND, IAND"), ({"neuron": "izhikevich"}, "if, lif, plif"),
        ({"weight_bits": 11}, "1 to 8, 16"), ({"depth": 3}, "does not know one of the options depth"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            qsnn.create_model("sew-resnet", digits, **options)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--train-images", "64", "--device", "cpu"]
    start, teacher, out = (str(tmp_path / name) for name in ("start", "teacher", "out"))
    main(["train", "--data", "digits", "--model", "sew-resnet", "--epochs", "0", "--out", start, "--device", "cpu"])
    main(["train", "--data", "digits", "--model", "study", "--epochs", "1", "--out", teacher, *short])
    main(["distill", start, "--teacher", teacher, "--epochs", "1", "--out", out, *short])
    main(["benchmark", out, "--timesteps", "2", "--device", "cpu"])
    assert "online" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fold", out, "--out", str(tmp_path / "folded")])
    assert "no integer form" in capsys.readouterr().err
