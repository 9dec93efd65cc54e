"""Networks by name: He et al.'s for CIFAR, those of timm and torchvision, and a user's own functions."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import qsnn
from qsnn.models.ann import CifarResNet
from qsnn.models.create import build_model

needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is missing: pip install 'qsnn[timm]'")


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_the_networks_of_the_paper(depth: int, parameters: int) -> None:
    model = build_model(f"resnet{depth}", (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == parameters  # 0.27, 0.46, 0.66 and 0.85 M in table 6
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth
    names = list(dict(model.named_parameters()))
    assert names[:4] == ["conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.conv1.weight"]
    assert names[-3:] == [f"layer3.{(depth - 2) // 6 - 1}.bn2.bias", "linear.weight", "linear.bias"]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_its_shortcut_drops_pixels_and_pads_channels() -> None:
    block = build_model("resnet20", (3, 32, 32), 10).layer2[0].eval()  # type: ignore[index, union-attr]
    with torch.no_grad():
        block.bn2.weight.zero_()
        x = torch.rand(1, 16, 8, 8)
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()
    with pytest.raises(ValueError, match=r"6n \+ 2 .*got 18"):
        CifarResNet(3, 10, 18)


def test_a_network_for_vectors() -> None:
    data = qsnn.from_arrays(torch.randn(60, 7), torch.arange(60) % 3)
    assert qsnn.create_model("mlp", data)(torch.zeros(2, 7)).shape == (2, 3)


# ---- libraries


@pytest.fixture
def three(tmp_path: Path) -> qsnn.Data:
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return qsnn.from_arrays(images, torch.arange(60) % 3)


@pytest.mark.parametrize("name", ["torchvision:resnet18", pytest.param("timm:resnet18", marks=needs_timm)])
def test_pretrained_weights_where_they_are_on_disk(
    name: str, three: qsnn.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.warns(qsnn.QsnnWarning, match=rf"{name}: weights are fresh"):
        fresh = qsnn.create_model(name, three)
    assert fresh(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = qsnn.create_model(name, seed=5)  # 1,000 classes
    file = {"torchvision": "resnet18-f37072fd.pth", "timm": "resnet18_a1_0-d63eafa0.pth"}[name.partition(":")[0]]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(source.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    with pytest.warns(qsnn.QsnnWarning, match=rf"{name}: weights are those of .*{file}"):
        model = qsnn.create_model(name, three)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    same, other = dict(source.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(value, same[key]) for key, value in other.items() if not key.startswith("fc."))
    assert torch.equal(model.layer1[0].bn1.running_mean, source.layer1[0].bn1.running_mean)  # type: ignore[index, union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = qsnn.create_model(name)
    assert torch.equal(whole.fc.weight, source.fc.weight)  # type: ignore[union-attr]
    qsnn.save(model, tmp_path / "t.safetensors")
    ones = torch.ones(1, 3, 32, 32)
    assert torch.equal(qsnn.load(tmp_path / "t.safetensors", model=name)(ones), model.eval()(ones))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet1", r"torchvision has no classifier 'resnet1'; it has alexnet, "),
        pytest.param("timm:resnet1", r"timm has no network 'resnet1'; near it: resnet", marks=needs_timm),
        ("resnet21", r"unknown model 'resnet21'; known: vgg-small, .*timm:NAME and torchvision:NAME, or your own as"),
    ],
)
def test_names_that_are_none(name: str, message: str, three: qsnn.Data) -> None:
    with pytest.raises(ValueError, match=message):
        qsnn.create_model(name, three)
    with pytest.raises(ValueError, match="does not take these options"):
        build_model("torchvision:resnet18", (3, 32, 32), 3, colour="red")


# ---- a user's own


def own() -> nn.Module:
    return nn.Linear(2, 5)


def with_classes(num_classes: int = 7) -> nn.Module:
    return nn.Linear(2, num_classes)


def broken(num_classes: int) -> nn.Module:
    raise RuntimeError("no GPU\nhere")


def confused(num_classes: int) -> nn.Module:
    return nn.Linear("two", num_classes)  # type: ignore[arg-type]


instance = nn.Linear(2, 4)


def test_a_function_of_your_own() -> None:
    assert build_model(f"{__name__}:own", (2,), 3).out_features == 5
    assert build_model(f"{__name__}:with_classes", (2,), 3).out_features == 3
    assert build_model(f"{__name__}:with_classes", (2,), None).out_features == 7
    taken = build_model(f"{__name__}:instance", (2,), 3)
    assert taken.out_features == 4 and taken is not instance
    with pytest.raises(ValueError, match=rf"{__name__}:broken\(num_classes=3\) raised RuntimeError: no GPU here"):
        build_model(f"{__name__}:broken", (2,), 3)
    with pytest.raises(ValueError, match=r"confused\(num_classes=3\) raised TypeError"):
        build_model(f"{__name__}:confused", (2,), 3)
    with pytest.raises(ValueError, match=r"is a str, which is not callable; name a function"):
        build_model(f"{__name__}:__name__", (2,), 3)
