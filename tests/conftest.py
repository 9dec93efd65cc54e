"""Small nets on digits, and images on which their activations meet ties."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings
from torch import nn

import qsnn
from qsnn.quant.activations import level_quant

torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # two full thread pools on few cores slow each other down


settings.register_profile("qsnn", deadline=None, derandomize=True)
settings.load_profile("qsnn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--random-nets", type=int, default=30, help="random networks to certify")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["QSNN_RANDOM_NETS"] = str(config.getoption("--random-nets"))  # read where hypothesis is set up


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes, or a GPU, runs where it is asked for: ``pytest -m fuzz``, ``pytest -m gpu``."""
    for mark in ("fuzz", "gpu"):
        if mark not in str(config.getoption("markexpr")):
            left = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session")
def digits() -> qsnn.Data:
    return qsnn.load_data("digits")


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms random statistics and affines: some γ negative, one zero, in place; return the model in eval."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                shape = module.weight.shape
                module.weight.copy_(torch.randn(shape, generator=generator) * 0.7 + 0.5)
                module.weight[0] = 0.0
                module.bias.copy_(torch.randn(shape, generator=generator))
                module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(shape, generator=generator) * 1.5 + 0.5)
    return model.eval()


def power_of_two(qann: nn.Module) -> nn.Module:
    """Round every activation step to a power of two, in place: then ties really happen, and float32 is exact."""
    with torch.no_grad():
        for module in qann.modules():
            quant = level_quant(module)
            if quant is not None:
                step = float(quant.scaling_impl.value) / quant.levels
                quant.scaling_impl.value.fill_(2.0 ** round(torch.tensor(step).log2().item()) * quant.levels)
    return qann


def plain_net(digits: qsnn.Data) -> nn.Module:
    """No batch norm, scales that are powers of two: every sum is exact in float32, and ties happen."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (model[0], model[3], model[7]):
            layer.weight.mul_(64).round_().clamp_(-7, 7)
            layer.weight.flatten(1)[:, 0] = 7  # max|w| / 7 = 1: the scale is a power of two
            layer.bias.zero_()
    config = qsnn.QuantizeConfig(weight_bits=4, levels=2, first_last_bits=None)
    qann = power_of_two(qsnn.quantize(model.eval(), digits, config)).eval()
    with torch.no_grad():
        for module in qann.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    return qann


@pytest.fixture(scope="session")
def teacher(digits: qsnn.Data) -> nn.Module:
    return scramble(qsnn.create_model("vgg-small", digits))


@pytest.fixture(scope="session")
def qann(teacher: nn.Module, digits: qsnn.Data) -> nn.Module:
    return qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(weight_bits=4, levels=2)).eval()


@pytest.fixture(scope="session")
def snn(qann: nn.Module) -> qsnn.SNN:
    return qsnn.convert(qann)


@pytest.fixture(scope="session")
def images(digits: qsnn.Data) -> torch.Tensor:
    return next(qsnn.batches(digits.test, 32))[0]
