"""benchmark(): the count by hand on 2x2 nets (law 8), one pass equals a pass per T, bad input."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from rich.console import Console
from torch import nn

import qsnn
from qsnn.data import shown
from qsnn.measure.benchmark import as_measured
from qsnn.quant.activations import level_quant


def two_by_two(pooling: nn.Module | None = None) -> qsnn.SNN:
    """One neuron per pixel of a 2x2 image, weight 1, threshold 1: a white pixel fires at every step. Then a 3x3
    convolution with padding, 2 channels out, whose spikes (if any) reach a linear layer."""
    layers: list[nn.Module] = [nn.Conv2d(1, 1, 1, bias=False), nn.ReLU()]
    if pooling is not None:
        layers.append(pooling)
    layers += [
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    ]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        for layer in layers:
            if isinstance(layer, nn.Conv2d) and layer.out_channels == 2:
                layer.weight.fill_(1.0)
                layer.weight[1] = -1.0  # never fires
    data = [(torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))]
    qann = qsnn.quantize(model, data, qsnn.QuantizeConfig(weight_bits=8, levels=1))
    for module in qann.modules():
        quant = level_quant(module)
        if quant is not None and not quant.signed:
            quant.scaling_impl.value.data.fill_(1.0)
    return qsnn.convert(qann, qsnn.ConvertConfig(timesteps=1))


def counted(snn: qsnn.SNN, image: list[list[float]], timesteps: int = 1) -> qsnn.Benchmark:
    images = torch.tensor(image).view(1, 1, 2, 2)
    snn.timesteps = timesteps
    return qsnn.benchmark(snn, [(images, torch.zeros(1, dtype=torch.int64))], timesteps=timesteps)


def test_synops_by_hand() -> None:
    # every pixel of a 2x2 map reaches all 4 outputs of a padded 3x3 convolution, in 2 channels: 8 synapses each.
    # One white pixel: 8; channel 0 then fires at all 4 positions, each spike reaches 2 outputs of the linear layer
    # through the pool: 4 * 2 = 8.
    result = counted(two_by_two(), [[1.0, 0.0], [0.0, 0.0]])
    assert result.synops == 8 + 8
    assert result.macs == 4, "the first layer: 4 pixels, one weight"
    assert result.spike_rates == {"1": 0.25, "3": 0.5}
    assert result.spike_rate == pytest.approx((1 + 4) / (4 + 8))


def test_synops_grow_with_time_and_with_spikes() -> None:
    one, all_white = counted(two_by_two(), [[1.0, 0.0], [0.0, 0.0]]), counted(two_by_two(), [[1.0, 1.0], [1.0, 1.0]])
    assert all_white.synops == 4 * 8 + 8
    assert counted(two_by_two(), [[1.0, 0.0], [0.0, 0.0]], timesteps=3).synops == 3 * one.synops
    assert counted(two_by_two(), [[0.0, 0.0], [0.0, 0.0]]).synops == 0


def test_pooled_spikes_are_counted_one_by_one() -> None:
    # behind a 2x2 average pool there is one pixel of up to 4 spikes; it reaches the 2 channels of one position
    result = counted(two_by_two(nn.AvgPool2d(2)), [[1.0, 1.0], [1.0, 0.0]])
    assert result.synops == 3 * 2 + 1 * 2, "three spikes reach 2 synapses each; then channel 0 fires once, 2 synapses"


def test_one_pass_gives_every_T(snn: qsnn.SNN, qann: nn.Module, digits: qsnn.Data) -> None:
    test = digits.test.head(200)
    result = qsnn.benchmark(snn, test, timesteps=5, reference=qann)
    assert result.timesteps == (1, 2, 3, 4, 5) and result.n == 200
    for t, measured in zip(result.timesteps, result.accuracy, strict=True):
        assert measured == pytest.approx(qsnn.accuracy(qsnn.fold(snn), test, timesteps=t), abs=1e-3)
    assert sum(map(sum, result.confusion)) == 200
    folded = qsnn.benchmark(qsnn.fold(snn), test, timesteps=5)
    assert (folded.accuracy, folded.synops, folded.spike_rates) == (result.accuracy, result.synops, result.spike_rates)


def test_deferred_at_L_agrees_with_the_qann_on_every_image(snn: qsnn.SNN, qann: nn.Module, digits: qsnn.Data) -> None:
    result = qsnn.benchmark(snn, digits.test, timesteps=4, firing="deferred", reference=qann)
    assert result.timesteps == (1, 2, 4)
    assert result.agreement[1] == 100.0
    assert result.accuracy[1] == qsnn.benchmark(qann, digits.test).accuracy[0]


def test_an_ann_has_one_accuracy_and_no_spikes(qann: nn.Module, teacher: nn.Module, digits: qsnn.Data) -> None:
    float_net, low = qsnn.benchmark(teacher, digits.test), qsnn.benchmark(qann, digits.test)
    assert float_net.timesteps == () and float_net.synops is None and float_net.spike_rate is None
    assert low.macs == float_net.macs and low.weight_bytes < float_net.weight_bytes / 5


def test_bad_input(snn: qsnn.SNN, digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match="timesteps must be a whole number from 1"):
        qsnn.benchmark(snn, digits.test, timesteps=0)
    with pytest.raises(ValueError, match="at least one batch"):
        qsnn.benchmark(snn, [])
    with pytest.raises(ValueError, match="28"):
        qsnn.benchmark(snn, [(torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64))])


@pytest.mark.parametrize("terminal", [True, False])
def test_long_measurements_show_how_far_they_are_on_a_terminal(digits, monkeypatch, terminal):
    written = io.StringIO()
    monkeypatch.setattr(shown, "_PATIENCE", -1.0)
    monkeypatch.setattr(shown, "Console", lambda **_: Console(file=written, force_terminal=terminal, width=90))
    qann = qsnn.quantize(qsnn.create_model("study", digits), digits)
    result = qsnn.benchmark(qann, digits.test.head(60), name="[/a] network", batch_size=20)
    certificate = qsnn.certify(qsnn.convert(qann), qann, digits.test, images=30, batch_size=20)
    assert result.n == 60 and certificate.images == 30
    found = [word in written.getvalue() for word in ("[/a] network", "1/3", "certificate", "1/2")]
    assert found == [terminal] * 4
    if terminal:
        assert written.getvalue().count("\x1b[?25l") == written.getvalue().count("\x1b[?25h") == 2  # the cursor is back


def test_a_measurement_that_is_cut_short_gives_the_terminal_back(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(shown, "_PATIENCE", -1.0)
    monkeypatch.setattr(shown, "Console", lambda **_: Console(file=written, force_terminal=True, width=90))
    for part in shown.shown(range(9), "work"):
        if part == 3:
            break
    assert written.getvalue().endswith("\x1b[2K") and "\x1b[?25h" in written.getvalue()


def test_a_network_without_integers_is_measured_in_float32_and_any_other_exactly(digits):
    model = qsnn.create_model("study", digits)
    plain = qsnn.convert(model, digits, qsnn.ConvertConfig(timesteps=2, calibration_images=32))
    low = qsnn.convert(qsnn.quantize(model, digits, qsnn.QuantizeConfig(weight_bits=16)))
    for snn, dtype in ((plain, torch.float32), (copy.deepcopy(plain).double(), torch.float64), (low, torch.float64)):
        measured, folded = as_measured(snn, 2), qsnn.fold(snn, dtype=dtype)
        for (name, ours), (_, wanted) in zip(measured.named_buffers(), folded.named_buffers(), strict=True):
            assert ours.dtype == wanted.dtype and torch.equal(ours, wanted), name
    result = qsnn.benchmark(qsnn.fold(plain, dtype=torch.float32), digits.test.head(100), timesteps=2)
    assert qsnn.benchmark(plain, digits.test.head(100), timesteps=2).accuracy == result.accuracy
