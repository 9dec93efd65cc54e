"""The summary: what a network weighs and computes, checked by hand, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qsnn

GOLDEN = Path(__file__).parent / "golden" / "summary_digits.txt"


def layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weights, MACs, bits of the weights and of the input, by layer."""
    rows = qsnn.summary(model).layers
    return {row.name: (row.parameters, row.macs, row.weight_bits, row.input_bits) for row in rows}


# ---- laws


def test_memory_and_macs_by_hand(teacher: nn.Module, qann: nn.Module) -> None:
    """vgg-small on 8x8 digits: 24-24, pooled, 48-48, pooled, 10; convolutions 3x3 without bias."""
    channels, pixels = [(1, 24), (24, 24), (24, 48), (48, 48)], [64, 64, 16, 16]
    weights = [9 * inputs * outputs for inputs, outputs in channels] + [48 * 10]
    macs = [count * size for count, size in zip(weights, [*pixels, 1], strict=True)]
    assert (weights[1], macs[1]) == (5_184, 331_776)
    expected = list(zip(weights, macs, [8, 4, 4, 4, 8], [8, 2, 2, 2, 2], strict=True))
    assert list(layers(qann).values()) == expected
    norms, bias, thetas = 2 * (24 + 24 + 48 + 48), 10, 5  # γ', b' a channel; the linear layer; four ReLUs and the input
    found, plain = qsnn.summary(qann), qsnn.summary(teacher)
    assert found.other_parameters == norms + bias + thetas == 303
    assert plain.other_parameters == norms + bias
    by_precision = sum(count * bits for count, bits in zip(weights, [8, 4, 4, 4, 8], strict=True)) // 8
    assert found.weight_bytes == by_precision + 4 * 303 == 20_052
    assert found.float_bytes == 4 * (sum(weights) + 303) == 149_148
    assert plain.weight_bytes == plain.float_bytes == 4 * (sum(weights) + 298)
    assert found.macs == plain.macs == sum(macs) == 843_744
    assert found.macs_by_precision == {"W8A8": 13_824, "W4A2": 829_440, "W8A2": 480}
    assert plain.macs_by_precision == {"W32A32": 843_744}


def test_a_spiking_network_computes_its_first_layer_once(qann: nn.Module, snn: qsnn.SNN) -> None:
    folded = qsnn.fold(snn)
    for model in (snn, folded):
        rows = qsnn.summary(model).layers
        assert [row.static for row in rows] == [True, False, False, False, False]
        assert [row.input_bits for row in rows] == [8, 1, 1, 1, 1]
        assert [row.shape for row in rows] == [(24, 8, 8), (24, 8, 8), (48, 4, 4), (48, 4, 4), (10,)]
        assert qsnn.summary(model).macs_by_precision == {"W8A8": 13_824, "W4A1": 829_440, "W8A1": 480}
    assert not any(row.static for row in qsnn.summary(qann).layers)
    assert qsnn.summary(snn).weight_bytes == qsnn.summary(qann).weight_bytes
    # γ', b' a channel and of the read-out: the gain and the bias that are left
    assert qsnn.summary(folded).other_parameters == 2 * (24 + 24 + 48 + 48) + 2 * 10


@pytest.mark.parametrize(("bits", "ratio"), [(1, 32), (2, 16), (5, 6.4), (16, 2), (32, 1)])
def test_the_weights_count_at_their_precision(bits: int, ratio: float, teacher: nn.Module, digits: qsnn.Data) -> None:
    config = qsnn.QuantizeConfig(weight_bits=bits, first_last_bits=None, calibration_images=8)
    qann = qsnn.quantize(teacher, digits, config)
    for model in (qann, qsnn.convert(qann)):
        found = qsnn.summary(model)
        weights = sum(row.parameters for row in found.layers)
        assert {row.weight_bits for row in found.layers} == {bits}
        assert 4 * weights / sum(row.bytes for row in found.layers) == pytest.approx(ratio)
        assert found.weight_bytes == round(weights * bits / 8 + 4 * found.other_parameters)


def test_levels_are_bits_of_the_input(teacher: nn.Module, digits: qsnn.Data) -> None:
    for levels, bits in ((1, 1), (2, 2), (3, 2), (4, 3), (15, 4)):
        config = qsnn.QuantizeConfig(levels=levels, input_bits=None, calibration_images=8)
        qann = qsnn.quantize(teacher, digits, config)
        assert [row.input_bits for row in qsnn.summary(qann).layers] == [32, bits, bits, bits, bits]


def test_the_model_is_left_as_it_was(snn: qsnn.SNN, qann: nn.Module, images: Tensor) -> None:
    for model in (snn, qann):
        before = model(images)
        model.train()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        qsnn.summary(model)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.eval()(images), before)


def test_a_network_of_ones_own_takes_the_shape_it_is_given() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 5, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 6, 4, bias=False))
    first, last = qsnn.summary(model, (2, 10)).layers
    assert (first.kind, first.shape, first.parameters, first.macs) == ("conv1d", (3, 6), 30, 180)
    assert (last.kind, last.shape, last.parameters, last.macs) == ("linear", (4,), 72, 72)
    grouped = qsnn.summary(nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=4)), (4, 7, 7))
    assert (grouped.layers[0].parameters, grouped.layers[0].macs) == (8 * 9, 8 * 9 * 9)


# ---- golden


def test_the_table(qann: nn.Module) -> None:
    """To write it again: GOLDEN.write_text(f"{qsnn.summary(qann)}\\n")."""
    table = str(qsnn.summary(qann))
    assert f"{table}\n" == GOLDEN.read_text()
    rows = [line.split() for line in table.splitlines()]
    # 24·24·9 weights of 4 bit: 2,592 byte, used at each of 8·8 pixels
    assert rows[2] == ["3", "conv2d", "24x8x8", "4", "2", "5,184", "2.53", "331,776"]
    assert "memory: 19.58 KiB, float32 145.65 KiB (7.4 x)" in table  # 149,148 / 20,052
    assert table.endswith("\nMACs by precision: W8A8: 13,824, W4A2: 829,440, W8A2: 480")


# ---- refusals


def test_a_shape_that_nobody_told() -> None:
    with pytest.raises(ValueError, match=r"summary needs the image shape: summary\(model, \(C, H, W\)\)"):
        qsnn.summary(nn.Linear(2, 2))
