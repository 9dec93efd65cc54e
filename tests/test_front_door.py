"""The front door: networks and data as people bring them are taken as they are meant, or refused by name at once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsnn

SMALL = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
SOME = [(torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2)]


def _spoiled(value: float) -> nn.Module:
    net = copy.deepcopy(SMALL)
    net[1].running_var[2] = value
    return net


def _in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        qsnn.quantize(SMALL, SOME)
    finally:
        torch.set_default_dtype(torch.float32)


def _made(verb: Any) -> Any:
    return verb(qsnn.convert(qsnn.quantize(SMALL, SOME)), SOME)


NONSENSE: dict[str, tuple[Any, str]] = {
    "a NaN in a statistic": (lambda: qsnn.quantize(_spoiled(float("nan")), SOME), r"NaN or infinity in 1\.running_var"),
    "converted with infinity": (lambda: qsnn.convert(_spoiled(float("inf")), SOME), r"cannot convert.*1\.running_var"),
    "inference mode": (torch.inference_mode()(lambda: qsnn.quantize(SMALL, SOME)), "trained; call it outside"),
    "doubles everywhere": (_in_float64, r"set_default_dtype\(torch\.float32\)"),
    "quantized twice": (lambda: qsnn.quantize(qsnn.quantize(SMALL, SOME), SOME), "expected a float network.*'qann'"),
    "a spiking network quantized": (lambda: _made(qsnn.quantize), "expected a float network.*'snn'"),
    "a spiking network converted": (lambda: _made(qsnn.convert), "got SNN, which spikes already"),
    "images of two sizes": (
        lambda: qsnn.quantize(SMALL, [*SOME, (torch.randn(2, 1, 5, 5), torch.zeros(2))]), r"\(1, 4, 4\) and \(1, 5",
    ),
    "no images in a batch": (lambda: qsnn.quantize(SMALL, [(SOME[0][0][:0], SOME[0][1][:0])]), "leave empty batches"),
    "a list of items": (lambda: qsnn.quantize(SMALL, [(SOME[0][0][0], 1)]), "into a torch.utils.data.DataLoader"),
    "complex numbers": (lambda: qsnn.from_arrays(torch.randn(9, 4) * 1j, torch.arange(9) % 2), "expected real numbers"),
    "one-hot labels of floats": (
        lambda: qsnn.accuracy(SMALL, [(SOME[0][0], torch.eye(2)[SOME[0][1]])]), r"as one-hot; pass labels\.argmax\(1\)",
    ),
    "classes as floats": (
        lambda: qsnn.accuracy(SMALL, [(SOME[0][0], SOME[0][1].float())]), r"pass labels\.long\(\), if they are classes",
    ),
    "two inputs": (lambda: qsnn.quantize(nn.Bilinear(4, 4, 2), SOME), "join several along the channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_by_name_before_the_work(name: str) -> None:
    call, message = NONSENSE[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_an_exported_program_has_no_layers() -> None:
    with pytest.raises(TypeError, match=r"exported by torch\.export.*the nn\.Module it was made from"):
        qsnn.quantize(torch.export.export(SMALL, (SOME[0][0],)).module(), SOME)


WRAPPED: dict[str, Any] = {
    "averaged": torch.optim.swa_utils.AveragedModel,
    "in parallel": nn.DataParallel,
    "of doubles": lambda net: net.double(),
    "weight norm": lambda net: _each_layer(net, torch.nn.utils.parametrizations.weight_norm),
    "old spectral norm": lambda net: _each_layer(net, torch.nn.utils.spectral_norm),
}
LATEST: list[str] = [""]


def _each_layer(net: nn.Module, change: Any) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            change(layer)
    return net


def wrapped() -> nn.Module:
    """As a script builds it, before anything is trained."""
    torch.manual_seed(1)
    return WRAPPED[LATEST[0]](copy.deepcopy(SMALL)).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.filterwarnings("ignore:a model of float64:qsnn.QsnnWarning", "ignore::FutureWarning")
def test_what_arrives_wrapped_is_loaded_again(name: str, tmp_path: Path) -> None:
    LATEST[0] = name
    images = SOME[0][0]
    qann = qsnn.quantize(wrapped(), SOME, qsnn.QuantizeConfig(levels=3)).eval()
    for number, made in enumerate((qann, qsnn.convert(qann), qsnn.convert(wrapped(), SOME))):
        path = tmp_path / f"{number}.safetensors"
        qsnn.save(made, path, model_name="test_front_door:wrapped")
        assert torch.equal(qsnn.load(path, model=wrapped)(images), made(images))


def test_training_under_no_grad_still_trains() -> None:
    part = torch.utils.data.TensorDataset(*SOME[0])
    data = qsnn.Data(name="few", train=part, val=part, test=part, mean=(0.0,), std=(1.0,), classes=("a", "b"))
    net = copy.deepcopy(SMALL)
    with torch.no_grad():
        qsnn.fit(net, data, qsnn.TrainConfig(epochs=1, batch_size=6))
    assert not torch.equal(net[0].weight, SMALL[0].weight)


class Late(nn.Module):
    """Two branches of the image; the second one runs after the first one's neurons."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 3, padding=1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 4, 4) -> (B, 3)."""
        y = torch.relu(self.first(x))
        return self.last(torch.flatten(y + torch.relu(self.second(x)), 1))


@pytest.mark.parametrize("timesteps", [2, 3])
def test_a_late_branch_from_the_image_is_counted_as_one(timesteps: int) -> None:
    """Six images: three steps do divide them, and would be counted across images without a word."""
    qann = qsnn.quantize(Late().eval(), SOME, qsnn.QuantizeConfig(levels=2)).eval()
    folded = qsnn.fold(qsnn.convert(qann))
    result = qsnn.benchmark(folded, SOME, timesteps=timesteps)
    assert result.macs == 16 * 2 + 16 * 2 * 9, "both branches see the image, once"
    spikes = []
    for _, neuron in folded.neurons():
        neuron.register_forward_hook(lambda module, args, output: spikes.append(float(output.sum())))
    folded(SOME[0][0], timesteps=timesteps)
    assert result.synops_by_t[-1] == pytest.approx(3 * sum(spikes) / 6), "every spike reaches three outputs"


def test_volumes_are_no_frames() -> None:
    """A folded network of volumes holds no layer that would tell; what it was made for does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(4, 2)).eval()
    part = torch.utils.data.TensorDataset(torch.randn(8, 1, 4, 6, 4), torch.arange(8) % 2)
    data = qsnn.Data(name="volumes", train=part, val=part, test=part, mean=(0.0,), std=(1.0,), classes=("a", "b"))
    net[4] = nn.Linear(2 * 1 * 2 * 1, 2)
    qann = qsnn.quantize(net, data, qsnn.QuantizeConfig(levels=3)).eval()
    snn = qsnn.convert(qann)
    assert qsnn.certify(snn, qann, data.test).exact
    result = qsnn.benchmark(qsnn.fold(snn), data.test, timesteps=3)
    right = (snn(part.tensors[0], timesteps=3)[-1].argmax(1) == part.tensors[1]).float().mean()
    assert result.accuracy[-1] == pytest.approx(100 * float(right))
    assert qsnn.fold(qsnn.convert(net, data))(part.tensors[0]).shape == (2, 8, 2)


@pytest.mark.parametrize("first", [nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AvgPool2d(3, 2, 1)])
def test_a_float_network_may_begin_with_a_mean(first: nn.Module) -> None:
    """The mean of pixels is taken in float64 as every current is, or the two forms differ at a tie."""
    torch.manual_seed(0)
    net = nn.Sequential(first, nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    images = torch.randn(16, 1, 6, 6)
    net(images)
    data = [(images, torch.zeros(16, dtype=torch.int64))]
    for made in (qsnn.convert(net.eval(), data), qsnn.convert(qsnn.quantize(net, data, qsnn.QuantizeConfig(
            input_bits=None)))):  # fmt: skip
        assert float((qsnn.fold(made)(images) - made(images)).detach().abs().max()) < 1e-4


class InADict(nn.Module):
    """One answer under a name, as torchvision's segmentation networks give it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(SMALL)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 1, 4, 4) -> {"out": (B, 2)}."""
        return {"out": self.net(x)}


def test_one_answer_in_a_dict_takes_plain_labels() -> None:
    part = torch.utils.data.TensorDataset(*SOME[0])
    data = qsnn.Data(name="few", train=part, val=part, test=part, mean=(0.0,), std=(1.0,), classes=("a", "b"))
    net, train = InADict(), qsnn.TrainConfig(epochs=1, batch_size=3)
    qsnn.fit(net, data, train)
    qann = qsnn.quantize(net, data)
    qsnn.fit(qann, data, train, teacher=net)
    student = qsnn.distill(qsnn.convert(qann), qann, data, qsnn.DistillConfig(epochs=1, batch_size=3))
    result = qsnn.benchmark(qsnn.fold(student), data.test, timesteps=2)
    right = (student(SOME[0][0])["out"][-1].argmax(1) == SOME[0][1]).float().mean()
    assert result.accuracy[-1] == pytest.approx(100 * float(right))
    assert qsnn.check(net.eval(), data, seconds=1).ready


class Placed(nn.Module):
    """A map added to the image, so that every place has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map, self.first, self.last = nn.Parameter(torch.randn(1, 1, 4, 4)), nn.Conv2d(1, 3, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 4, 4) -> (B, 2)."""
        return self.last(torch.flatten(torch.relu(self.first(x + self.map)), 1))


def test_a_folded_student_with_a_bias_by_place_is_loaded_again(tmp_path: Path) -> None:
    """Its initial potentials learn by channel, and fold spreads them over the places."""
    part = torch.utils.data.TensorDataset(*SOME[0])
    data = qsnn.Data(name="few", train=part, val=part, test=part, mean=(0.0,), std=(1.0,), classes=("a", "b"))
    qann = qsnn.quantize(Placed().eval(), data)
    folded = qsnn.fold(qsnn.distill(qsnn.convert(qann), qann, data, qsnn.DistillConfig(epochs=1, batch_size=3)))
    qsnn.save(folded, tmp_path / "folded", model_name="test_front_door:Placed")
    assert torch.equal(qsnn.load(tmp_path / "folded", model=Placed)(SOME[0][0]), folded(SOME[0][0]))
