"""convert(): a copy that is the QANN at T = L, deferred; neurons are SpikingJelly nodes; refusals say what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from spikingjelly.activation_based import monitor
from spikingjelly.activation_based.neuron import BaseNode
from torch import nn

import qsnn
from qsnn.quant.quantize import activation_quants


def test_the_argument_is_unchanged_and_nothing_is_shared(qann: nn.Module, snn: qsnn.SNN, images: torch.Tensor) -> None:
    before = copy.deepcopy(qann.state_dict())
    other = qsnn.convert(qann)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in qann.state_dict().items())


def test_neurons_carry_the_quantizers_thresholds(qann: nn.Module, snn: qsnn.SNN) -> None:
    quants, neurons = activation_quants(qann), dict(snn.neurons())
    assert list(quants) == list(neurons)
    for name, neuron in neurons.items():
        assert isinstance(neuron, BaseNode)
        assert torch.equal(neuron.threshold.detach(), (quants[name].step.double() * quants[name].levels).detach())


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_deferred_at_T_equal_L_is_the_qann(
    levels: int, teacher: nn.Module, digits: qsnn.Data, images: torch.Tensor
) -> None:
    qann = qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(levels=levels)).eval()
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=levels, firing="deferred"))
    with torch.no_grad():
        assert torch.allclose(snn(images)[0], qann(images), atol=1e-4)


def test_max_pool_before_the_activation_moves_behind_it(digits: qsnn.Data, images: torch.Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    )
    qann = qsnn.quantize(model.eval(), digits).eval()
    snn = qsnn.convert(qann)
    order = [str(node.target) for node in snn.network.graph.nodes if node.op == "call_module"]
    assert order.index("1") > order.index("3")
    with torch.no_grad():
        assert torch.allclose(snn(images, firing="deferred")[0], qann(images), atol=1e-5)
    with torch.no_grad():
        qann.get_submodule("2").weight[1] = -0.5
    with pytest.raises(ValueError, match="negative γ"):
        qsnn.convert(qann)


def test_the_static_front_runs_once(snn: qsnn.SNN, images: torch.Tensor) -> None:
    sizes: dict[str, int] = {}
    layers = {n: m for n, m in snn.network.named_modules() if isinstance(m, nn.Conv2d)}
    hooks = [m.register_forward_hook(lambda m, a, y, n=n: sizes.update({n: len(y)})) for n, m in layers.items()]
    with torch.no_grad():
        snn(images, timesteps=5)
    for hook in hooks:
        hook.remove()
    first, *others = sizes.values()
    assert first == len(images) and set(others) == {5 * len(images)}


def test_spikingjelly_monitors_work(snn: qsnn.SNN, images: torch.Tensor) -> None:
    with monitor.OutputMonitor(snn, BaseNode) as records, torch.no_grad():
        snn(images)
        assert len(records.records) == 4
        assert all(set(spikes.unique().tolist()) <= {0.0, 1.0} for spikes in records.records)


def test_plain_relus_ask_for_quantize(teacher: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"4 nn\.ReLU that are not quantized.*quantize\(model, data\).*convert\(model, data\)"
    ):
        qsnn.convert(teacher)


def test_uncalibrated(teacher: nn.Module) -> None:
    from qsnn.quant.quantize import quantized_structure

    with pytest.raises(ValueError, match="no step yet"):
        qsnn.convert(quantized_structure(teacher, qsnn.QuantizeConfig(), (1, 8, 8)))


@pytest.mark.parametrize("options", [{"timesteps": 0}, {"firing": "sometimes"}])
def test_impossible_options(options: dict) -> None:
    with pytest.raises(ValueError, match=r"from 1 to 4,096|online"):
        qsnn.ConvertConfig(**options)


def test_a_wrong_config_shows_the_call(qann: nn.Module) -> None:
    with pytest.raises(TypeError, match="ConvertConfig"):
        qsnn.convert(qann, {"timesteps": 2})
