"""torchvision's networks go through quantize, convert and certify as they are (random weights, 32x32 images)."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import qsnn

NAMES = (
    "resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet", "squeezenet1_1", "shufflenet_v2_x1_0",
    "regnet_x_400mf",
)  # fmt: skip
FLOAT = ("resnet18", "squeezenet1_1", "mobilenet_v2")
"""Converted without training too; all of them stand in benchmarks/zoo.py."""
SLOW = ("resnet50",)


def batch(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [(images, torch.zeros(count, dtype=torch.int64))]


def network(name: str) -> nn.Module:
    """The network with fresh weights and batch norm statistics of real passes."""
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(num_classes=10, **options)
    if name == "vgg11_bn":
        model.classifier = nn.Linear(512 * 7 * 7, 10)  # its own has 120 M weights, which only take time
    with torch.no_grad():
        for _ in range(3):
            model.train()(batch()[0][0])
    return model.eval()


def certificate_of(name: str) -> qsnn.Certificate:
    config = qsnn.QuantizeConfig(weight_bits=8, act_bits=3)
    qann = qsnn.quantize(network(name), batch(), config).eval()
    return qsnn.certify(qsnn.convert(qann), qann, batch())


@pytest.mark.parametrize("name", NAMES)
def test_exact(name: str) -> None:
    certificate = certificate_of(name)
    assert certificate.exact and certificate.timesteps == 7, str(certificate)


@pytest.mark.parametrize("name", FLOAT)
def test_float_ones_convert_too(name: str) -> None:
    """Calibrated on the images it then answers, 32 steps go along with the network's own answers."""
    model, ((images, _),) = network(name), batch()
    snn = qsnn.convert(model, batch(), qsnn.ConvertConfig(timesteps=32, correction="bias", calibration_images=8))
    with torch.no_grad():
        answers, expected = snn(images)[-1], model(images)
        error = (answers - expected).square().mean() / expected.var()
    assert float(error) < 0.5
    assert len(list(qsnn.fold(snn).neurons())) == len(list(snn.neurons()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_exact_slow(name: str) -> None:
    assert certificate_of(name).exact


def test_a_silu_network_is_refused_with_every_place() -> None:
    with pytest.raises(ValueError, match=r"features\.0\.2 \(SiLU: put nn\.ReLU.*mul: a product") as error:
        qsnn.quantize(models.efficientnet_b0(num_classes=10).eval(), batch())
    assert str(error.value).count("(SiLU: ") > 10 and "(Sigmoid: " in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_timm_model_goes_the_same_way() -> None:
    import timm

    model = timm.create_model("resnet18", num_classes=10).eval()
    qann = qsnn.quantize(model, batch(), qsnn.QuantizeConfig(weight_bits=8, act_bits=3)).eval()
    assert qsnn.certify(qsnn.convert(qann), qann, batch()).exact
