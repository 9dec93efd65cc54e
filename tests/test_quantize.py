"""quantize(): the argument stays, precision is what was asked for, and what cannot be quantized is named."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qsnn
from qsnn.quant.quantize import activation_quants
from qsnn.quant.weights import weight_bits


def test_the_argument_is_unchanged(teacher: nn.Module, digits: qsnn.Data) -> None:
    before = copy.deepcopy(teacher.state_dict())
    qsnn.quantize(teacher, digits)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("brevitas" in type(m).__module__ for m in teacher.modules())


def test_outputs_do_not_depend_on_the_batch(qann: nn.Module, images: torch.Tensor) -> None:
    with torch.no_grad():
        together = qann(images)
        alone = torch.cat([qann(image[None]) for image in images])
        assert torch.allclose(together, alone, atol=1e-5)
        assert torch.allclose(together.flip(0), qann(images.flip(0)), atol=1e-5)


@pytest.mark.parametrize(
    ("act_bits", "levels", "expected"), [(None, None, 2), (1, None, 1), (3, None, 7), (None, 5, 5), (2, 2, 2)]
)
def test_levels(act_bits: int | None, levels: int | None, expected: int, teacher: nn.Module, digits: qsnn.Data) -> None:
    qann = qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(act_bits=act_bits, levels=levels))
    quants = activation_quants(qann)
    assert len(quants) == 4 and {quant.levels for quant in quants.values()} == {expected}
    seen: set[int] = set()
    hooks = [
        qann.get_submodule(name).register_forward_hook(
            lambda m, a, y, s=quant.step: seen.update((y / s).round().int().unique().tolist())
        )
        for name, quant in quants.items()
    ]
    qann.eval()(next(qsnn.batches(digits.train, 256))[0])
    for hook in hooks:
        hook.remove()
    assert seen == set(range(expected + 1))


def test_first_and_last_layer_keep_eight_bits_and_patterns_win(teacher: nn.Module, digits: qsnn.Data) -> None:
    config = qsnn.QuantizeConfig(weight_bits=2, overrides={"7": 3, "1*": 1})
    qann = qsnn.quantize(teacher, digits, config)
    bits = {name: weight_bits(m) for name, m in qann.named_modules() if hasattr(m, "weight_quant")}
    assert bits == {"0": 8, "3": 2, "7": 3, "10": 1, "15": 1}


@torch.no_grad()
def test_the_calibrated_step_has_the_least_squared_error(digits: qsnn.Data) -> None:
    from qsnn.quant.activations import level_quant
    from qsnn.quant.quantize import _activation

    x = torch.randn(4096).abs()
    module = _activation(qsnn.QuantizeConfig(levels=2), nn.ReLU())
    quant = level_quant(module)
    quant.calibrate_(x)
    chosen = float((module(x) - x).square().mean())
    for factor in (0.7, 0.85, 1.2, 1.5):
        quant.scaling_impl.value.data.mul_(factor)
        assert chosen < float((module(x) - x).square().mean())
        quant.scaling_impl.value.data.div_(factor)


class Functional(nn.Module):
    """A functional relu, a ReLU used twice, a residual addition, a concatenation, a grouped convolution."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        left = self.relu(self.left(x) + x)
        right = self.relu(self.right(x))
        return self.head(torch.cat([left, right], 1).mean((2, 3)))


def test_functional_relu_and_shared_modules(digits: qsnn.Data) -> None:
    qann = qsnn.quantize(Functional(), digits)
    assert len(activation_quants(qann)) == 3
    assert len({float(quant.step.detach()) for quant in activation_quants(qann).values()}) > 1


def test_calibration_reads_any_source_of_images(teacher: nn.Module, digits: qsnn.Data) -> None:
    batches = list(qsnn.batches(digits.train.head(100), 32))
    from_list = qsnn.quantize(teacher, batches, qsnn.QuantizeConfig(calibration_images=64))
    from_set = qsnn.quantize(teacher, digits.train.head(64))
    for a, b in zip(activation_quants(from_list).values(), activation_quants(from_set).values(), strict=True):
        assert torch.equal(a.step, b.step)


def test_what_cannot_be_quantized_is_named_all_at_once(digits: qsnn.Data) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )
    with pytest.raises(ValueError, match=r"1 \(GELU: put nn\.ReLU.*; 3 \(Sigmoid: put nn\.ReLU"):
        qsnn.quantize(model, digits)


def test_nothing_to_quantize(digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match="nothing to quantize"):
        qsnn.quantize(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits)


def test_no_data_and_empty_data(teacher: nn.Module) -> None:
    with pytest.raises(ValueError, match="needs data"):
        qsnn.quantize(teacher)
    with pytest.raises(ValueError, match="at least one batch"):
        qsnn.quantize(teacher, [])


def test_nan_pixels(teacher: nn.Module) -> None:
    images = torch.zeros(4, 1, 8, 8)
    images[2, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"(?i)nan"):
        qsnn.quantize(teacher, [(images, torch.zeros(4, dtype=torch.int64))])


def test_control_flow_cannot_be_followed(digits: qsnn.Data) -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.fx"):
        qsnn.quantize(Branching(), digits)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight_bits": 9}, "1 to 8, 16"),
        ({"first_last_bits": 0}, "first_last_bits must be a whole number from 1"),
        ({"act_bits": 0}, "act_bits"),
        ({"levels": 0}, "levels"),
        ({"act_bits": 2, "levels": 7}, "do not fit"),
        ({"input_bits": 1}, "input_bits"),
        ({"calibration_images": 0}, "calibration_images"),
        ({"overrides": {"*": 11}}, "1 to 8, 16"),
    ],
)
def test_impossible_precisions(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        qsnn.QuantizeConfig(**options)


def test_a_threshold_scale_multiplies_what_calibration_found(teacher: nn.Module, digits: qsnn.Data) -> None:
    plain = activation_quants(qsnn.quantize(teacher, digits))
    half = activation_quants(qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(threshold_scale=0.5)))
    first, last = next(iter(plain)), list(plain)[-1]
    assert half[first].step.item() == pytest.approx(0.5 * plain[first].step.item())
    assert half[last].step.item() < plain[last].step.item()  # calibrated on what the layers before now give
    with pytest.raises(ValueError, match="threshold_scale must be a number above 0"):
        qsnn.QuantizeConfig(threshold_scale=0.0)
