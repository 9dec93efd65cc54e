"""Synops by hand, beside SpikingJelly's and NeuroBench's counters, and where those count nothing."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qsnn
from qsnn.data.memory import LiveMemory
from qsnn.measure.counting import _FINEST, _by_step, _over_images

IMAGE = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2)
LABEL = torch.zeros(1, dtype=torch.int64)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def net(*between: nn.Module, step_mode: str = "s", size: int = 2, **options: int) -> nn.Sequential:
    """A neuron for each pixel, firing where it is white; ``between``; a convolution of ones into two channels."""
    parts = layer if step_mode == "m" else nn
    extra = {"step_mode": "m"} if step_mode == "m" else {}
    first = parts.Conv2d(1, 1, 1, bias=False, **extra)
    second = parts.Conv2d(1, 2, 3, bias=False, **{"padding": 1, **options}, **extra)
    for module in (first, second):
        nn.init.ones_(module.weight)
    return nn.Sequential(
        first, neuron.IFNode(step_mode=step_mode), *between, second, neuron.IFNode(step_mode=step_mode),
        parts.Flatten(**extra), parts.Linear(2 * size * size, 3, bias=False, **extra),
    ).eval()  # fmt: skip


def count(model: nn.Module, image: Tensor = IMAGE, timesteps: int = 1) -> qsnn.Benchmark:
    return qsnn.benchmark(model, [(image, LABEL)], timesteps=timesteps)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_binary_spikes_in_time(step_mode: str) -> None:
    # a spike at a corner of 2x2 reaches 4 outputs of a padded 3x3 in 2 channels: 8; all of these fire, 3 synapses each
    result = count(net(step_mode=step_mode), timesteps=3)
    assert result.synops_by_t == (8 + 24, 2 * (8 + 24), 3 * (8 + 24))
    assert result.macs == 3 * 4, "the first layer, which this network computes at every step"
    assert result.spike_rate_by_t == pytest.approx([9 / 12] * 3)


@pytest.mark.parametrize("factor", [1.7, -0.3])
def test_scaled_spikes_count_as_spikes(factor: float) -> None:
    assert count(net(Scale(factor))).layers[1].synops == 8


def test_graded_spikes_count_by_their_level() -> None:
    image = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(1, 1, 2, 2)

    class Graded(neuron.IFNode):
        def forward(self, x: Tensor) -> Tensor:
            return x.floor()

    model = net()
    model[1] = Graded()
    assert count(model, image).layers[1].synops == 8 + 2 * 8


def test_averaged_spikes_count_one_by_one() -> None:
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, :2, :2] = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    image[0, 0, 2, 2] = 1.0
    # three spikes of one window and one of another, each reaches 8 synapses
    assert count(net(nn.AvgPool2d(2)), image).layers[1].synops == 4 * 8


def test_borders_strides_and_groups() -> None:
    assert count(net(padding=0, size=1), torch.ones(1, 1, 3, 3)).layers[1].synops == 9 * 2, "every pixel reaches 1"
    white = torch.ones(1, 1, 4, 4)
    by_hand = 2 * sum(rows * columns for rows in (1, 2, 1, 1) for columns in (1, 2, 1, 1))  # stride 2, padding 1
    assert count(net(stride=2, size=2), white).layers[1].synops == by_hand
    grouped = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), neuron.IFNode(), nn.Conv2d(4, 4, 1, groups=4, bias=False), neuron.IFNode(),
        nn.Flatten(), nn.Linear(16, 2),
    ).eval()  # fmt: skip
    nn.init.ones_(grouped[0].weight)
    assert count(grouped).layers[1].synops == 4, "each of 4 channels reaches the one of its group"


def test_a_current_is_multiplied() -> None:
    model = net(nn.Conv2d(1, 1, 1))  # a layer behind a layer: what reaches the second is no spike
    with torch.no_grad():
        model[2].bias.fill_(0.3)
        model[2].weight.fill_(0.77)
    found = count(model, torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2)).layers
    assert found[1].synops == 2 and found[2].synops == 0
    assert found[2].macs == found[2].dense_macs > 0


def test_equal_to_spikingjelly_where_it_can_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), neuron.IFNode(), nn.Conv2d(4, 6, 3, stride=2, padding=1), neuron.IFNode(),
        nn.Flatten(), nn.Linear(96, 5),
    ).eval()  # fmt: skip
    image = torch.rand(1, 1, 8, 8) * 4
    ours = count(model, image)
    counter = SynOpCounter()
    functional.reset_net(model)
    with DispatchCounterMode([counter]), torch.no_grad():
        model(image)
    functional.reset_net(model)
    assert counter.get_total() == ours.synops > 0


@pytest.mark.skipif(find_spec("neurobench") is None, reason="neurobench is not installed")
@pytest.mark.filterwarnings("ignore")
def test_equal_to_neurobench_where_it_can_count() -> None:
    try:
        from neurobench.benchmarks import Benchmark
        from neurobench.metrics.workload import SynapticOperations
        from neurobench.models import TorchModel
    except (ImportError, OSError) as error:
        pytest.skip(f"neurobench cannot be imported: {error}")
    torch.manual_seed(0)
    layers = nn.Linear(16, 12), neuron.IFNode(), nn.Linear(12, 8), neuron.IFNode(), nn.Linear(8, 3)
    model = nn.Sequential(nn.Flatten(), *layers).eval()
    with torch.no_grad():
        for module in layers[2::2]:
            module.weight.add_(0.3)  # so that the second neurons fire too
    images, labels = torch.rand(4, 1, 1, 16) * 4, torch.zeros(4, dtype=torch.int64)

    class Fresh(TorchModel):
        def __call__(self, batch: Tensor) -> Tensor:
            functional.reset_net(model)
            return super().__call__(batch)

    theirs = Fresh(model)
    theirs.add_activation_module(neuron.IFNode)
    loader = DataLoader(TensorDataset(images, labels), batch_size=1)
    found = Benchmark(theirs, loader, [], [], [[], [SynapticOperations]]).run(verbose=False)["SynapticOperations"]
    functional.reset_net(model)
    ours = qsnn.benchmark(model, [(images, labels)], timesteps=1)
    assert ours.layers[2].synops > 0
    assert found["Effective_ACs"] == ours.synops


def test_every_neuron_model_of_one_pass_is_that_of_its_own(snn: qsnn.SNN, digits: qsnn.Data) -> None:
    """The counts at t of a pass of 4 steps are those of a pass of t steps."""
    test = digits.test.head(64)  # type: ignore[attr-defined]
    whole = qsnn.benchmark(snn, test, timesteps=4)
    for t in (1, 2, 3):
        alone = qsnn.benchmark(snn, test, timesteps=t)
        assert alone.synops_by_t[-1] == whole.synops_by_t[t - 1]
        assert alone.spike_rate_by_t[-1] == pytest.approx(whole.spike_rate_by_t[t - 1])
    assert whole.synops == whole.synops_by_t[whole.made_for - 1]


def test_early_exit(snn: qsnn.SNN, digits: qsnn.Data) -> None:
    result = qsnn.benchmark(snn, digits.test, timesteps=4, exit_margin=0.5)
    asked, *grid = result.exits
    assert asked.margin == 0.5 and asked in grid
    means = [e.timesteps for e in grid]
    assert means == sorted(means) and 1 <= means[0] and means[-1] <= 4
    never = qsnn.benchmark(snn, digits.test, timesteps=4, exit_margin=1.0).exits[0]
    at_once = qsnn.benchmark(snn, digits.test, timesteps=4, exit_margin=0.0).exits[0]
    assert (at_once.timesteps, at_once.accuracy) == (1.0, pytest.approx(result.accuracy[0], abs=1e-3))
    assert never.accuracy == pytest.approx(result.accuracy[-1], abs=1.0)
    with pytest.raises(ValueError, match="exit_margin must be a number from 0 to 1"):
        qsnn.benchmark(snn, digits.test, exit_margin=2.0)
    with pytest.raises(ValueError, match="online firing"):
        qsnn.benchmark(snn, digits.test, exit_margin=0.5, firing="deferred")


def test_memory_of_tensors_that_live_together() -> None:
    x = torch.zeros(1000)
    with LiveMemory() as memory:
        y = x + 1  # 4,000 bytes
        z = y * 2  # and 4,000 more
        del y
        w = z.view(10, 100) + 1  # instead of y
    assert memory.peak == 8000 and memory.now == 8000
    del z, w
    assert memory.now == 0
    assert sys.getrefcount(x) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_are_exact_in_every_layout(dtype, signed, channels_last):
    x = torch.randint(-9 if signed else 0, 10, (2 * 3, 4, 5, 6)).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.unflatten(0, (2, 3))
    wanted = x.double().abs()
    assert torch.equal(_by_step(x), wanted.flatten(1).sum(1))
    assert torch.equal(_over_images(x), wanted.sum(1))


def test_sums_of_many_images_of_many_levels_are_exact():
    x = torch.full((1, 3 * _FINEST + 1, 2), float(_FINEST))
    assert torch.equal(_over_images(x), torch.full((1, 2), _FINEST * (3.0 * _FINEST + 1), dtype=torch.float64))
    assert _by_step(x).item() == 2 * _FINEST * (3.0 * _FINEST + 1)
    nothing = torch.zeros(2, 0, 3)
    assert torch.equal(_by_step(nothing), torch.zeros(2, dtype=torch.float64))
