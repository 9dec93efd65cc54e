"""Our own networks by name: shapes, names of parameters, and shortcuts that cut pixels and pad channels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import scramble
from torch import Tensor, nn

import qsnn
from qsnn.models import build_model
from qsnn.tune import train_neurons_

WEIGHTS = Path(os.environ.get("QSNN_DATA", "~/.cache/qsnn")).expanduser() / "resnet20-cifar10/resnet20-12fca82f.th"


def batch(count: int = 8, side: int = 16) -> list[tuple[Tensor, Tensor]]:
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return [(images, torch.zeros(count, dtype=torch.int64))]


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_parameters_are_those_of_the_paper(depth: int, parameters: int) -> None:
    network = build_model(f"resnet{depth}", (3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == parameters  # 0.27, 0.46, 0.66 and 0.85 M
    names = set(network.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= names
    assert not any("shortcut" in name for name in names)


def test_depth_is_6n_plus_2() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2 .*got 18"):
        qsnn.models.CifarResNet(3, 10, 18)


@pytest.mark.parametrize("bits", [1, 4])
def test_resnet20_is_exact(bits: int) -> None:
    network = scramble(build_model("resnet20", (3, 16, 16), 10))
    qann = qsnn.quantize(network, batch(), qsnn.QuantizeConfig(weight_bits=bits, levels=2))
    certificate = qsnn.certify(qsnn.convert(qann), qann, batch())
    assert certificate.exact and len(certificate.layers) == 19, str(certificate)


def test_thresholds_by_channel_go_through_the_shortcut(tmp_path: Path) -> None:
    network = scramble(build_model("resnet20", (3, 16, 16), 10))
    snn = qsnn.convert(qsnn.quantize(network, batch(), qsnn.QuantizeConfig(weight_bits=4, levels=2)))
    generator = torch.Generator().manual_seed(0)
    for parameter, _ in train_neurons_(snn, "channel", "channel", ""):
        parameter.data.mul_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    folded, images = qsnn.fold(snn), batch()[0][0]
    with torch.no_grad():
        expected, found = snn.double()(images.double(), timesteps=4), folded(images, timesteps=4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    qsnn.save(folded, tmp_path / "folded.safetensors")
    assert torch.equal(qsnn.load(tmp_path / "folded.safetensors")(images, timesteps=4), found)


class Padded(nn.Module):
    """A convolution whose current is cut and padded: what is padded has no bias, what is cut keeps it."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.second, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(6), nn.ReLU()
        self.head, self.options = nn.Linear(6 * 36, 10), options

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.relu(self.first(x)))[:, :, ::2, 1::2]
        x = self.last(self.norm(F.pad(x, (1, 1, 2, 0, 1, 1), **self.options)))  # type: ignore[arg-type]
        return self.head(torch.flatten(x, 1))  # type: ignore[no-any-return]


def test_currents_are_cut_and_padded() -> None:
    torch.manual_seed(0)
    qann = qsnn.quantize(scramble(Padded()), batch(side=8))
    certificate = qsnn.certify(qsnn.convert(qann), qann, batch(side=8))
    assert certificate.exact, str(certificate)


@pytest.mark.parametrize("options", [{"value": 1.0}, {"mode": "circular"}])
def test_other_pads_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="pad pads with other values than zeros"):
        qsnn.quantize(Padded(**options).eval(), batch(side=8))


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs the public ResNet-20 in $QSNN_DATA")
def test_a_strangers_weights() -> None:
    data = qsnn.load_data("cifar10", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    network = qsnn.create_model("resnet20", data)
    qsnn.load_weights(network, WEIGHTS)
    assert qsnn.accuracy(network, data.val.head(200)) > 98  # they were trained on these images
    assert network.qsnn_recipe["data"]["mean"] == [0.485, 0.456, 0.406]  # type: ignore[index,union-attr]
