"""The IF neuron: law 1 (it is the quantizer on constant input), SpikingJelly's protocol, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based import functional
from torch import Tensor, nn

import qsnn
from qsnn.graph.call import Call, calling
from qsnn.quant.activations import round_half_up
from qsnn.snn.backward import AveragePool2d, IFFunction
from qsnn.snn.equations import Dynamics, simulate
from qsnn.snn.neurons import IFNode, Repeat

EIGHTHS = st.lists(st.integers(-64, 64), min_size=1, max_size=32)  # multiples of 1/8 add without rounding in float32


def counts(node: IFNode, current: Tensor, timesteps: int) -> Tensor:
    functional.reset_net(node)
    return node(current.expand(timesteps, *current.shape)).sum(0)


def quantizer(x: Tensor, theta: float, levels: int) -> Tensor:
    return round_half_up(x / (theta / levels)).clamp(0, levels)


@given(levels=st.sampled_from([1, 2, 4, 8]), x=EIGHTHS)
def test_if_at_T_equal_L_is_the_quantizer_ties_included(levels: int, x: list[int]) -> None:
    current = torch.tensor(x).float() / 8
    node = IFNode(2.0)
    # with θ = 2, L a power of two: x / s is a multiple of 1/16, halves are ties
    assert torch.equal(counts(node, current, levels), quantizer(current, 2.0, levels))


@given(levels=st.integers(1, 7), x=EIGHTHS)
def test_if_with_threshold_L_is_the_quantizer_for_any_L(levels: int, x: list[int]) -> None:
    current = torch.tensor(x).float() / 8
    assert torch.equal(counts(IFNode(float(levels)), current, levels), quantizer(current, float(levels), levels))


@given(levels=st.integers(1, 7), x=st.lists(EIGHTHS.filter(lambda v: len(v) >= 4), min_size=7, max_size=7))
def test_deferred_firing_is_the_quantizer_on_any_current(levels: int, x: list[list[int]]) -> None:
    current = torch.tensor([row[:4] for row in x[:levels]]).float() / 8
    node = IFNode(float(levels))
    node.firing = "deferred"
    spikes = node(current)
    expected = torch.floor((current.sum(0) + levels / 2) / levels).clamp(0, levels)
    assert torch.equal(spikes.sum(0), expected)
    assert torch.equal(spikes, spikes.sort(0, descending=True).values), "deferred spikes come first"


@given(x=st.lists(st.lists(st.integers(-16, 16), min_size=3, max_size=3), min_size=1, max_size=8))
def test_the_potential_is_input_minus_output(x: list[list[int]]) -> None:
    current = torch.tensor(x).float() / 8
    node = IFNode(1.0)
    spikes = node(current)
    assert torch.equal(node.v, 0.5 + current.sum(0) - spikes.sum(0))


def test_step_by_step_equals_all_steps_at_once() -> None:
    current = torch.randn(6, 5, 3)
    many, single = IFNode(0.7), IFNode(0.7, step_mode="s")
    together = many(current)
    assert torch.equal(torch.stack([single(x) for x in current]), together)
    assert torch.equal(single.v, many.v)
    functional.reset_net(single)
    assert torch.equal(single(current[0]), together[0]), "reset_net puts the potential back to half a threshold"


def test_gradient_equals_autograd_through_the_loop() -> None:
    theta, current = 0.8, torch.randn(4, 50, dtype=torch.float64)

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(h)
            return (h >= theta).double()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            (h,) = ctx.saved_tensors
            return grad * ((h - theta).abs() < theta / 2) / theta

    weight = torch.randn(4, 50, dtype=torch.float64)
    slow = current.clone().requires_grad_()
    v, spikes = torch.full((50,), theta / 2, dtype=torch.float64), []
    for x in slow:
        h = v + x
        spikes.append(Spike.apply(h))
        v = h - theta * spikes[-1]
    (torch.stack(spikes) * weight).sum().backward()

    fast = current.clone().requires_grad_()
    node = IFNode(theta).double()
    node.threshold.data.fill_(theta)
    (node(fast) * weight).sum().backward()
    assert torch.allclose(fast.grad, slow.grad, atol=1e-12)


def test_threshold_learns_where_it_is_asked_to() -> None:
    node = IFNode(0.8)
    node.threshold.requires_grad_()
    (node(torch.rand(3, 40)) * node.threshold).sum().backward()
    assert node.threshold.grad is not None and node.threshold.grad.isfinite()


def test_repeat_hands_a_value_to_every_step() -> None:
    x = torch.randn(2, 5)
    with calling(Call(3)):
        assert torch.equal(Repeat()(x).unflatten(0, (3, 2)), x.expand(3, 2, 5))


@pytest.mark.parametrize(
    "threshold", [0.0, -1.0, float("nan"), float("inf"), torch.ones(2, 2), torch.tensor([1.0, 0.0])]
)
def test_a_threshold_must_be_one_positive_number(threshold: float | Tensor) -> None:
    with pytest.raises(ValueError, match="positive, finite threshold"):
        IFNode(threshold)


def test_running_mean_and_prefix(snn: qsnn.SNN, images: Tensor) -> None:
    with torch.no_grad():
        z, m = snn.step_logits(images, timesteps=6), snn(images, timesteps=6)
        assert torch.allclose(m[-1], z.mean(0), atol=1e-5)
        assert torch.allclose(snn(images, timesteps=3), m[:3], atol=1e-5), "one checkpoint and one pass serve every T"
        assert snn(images, timesteps=4, firing="deferred").shape == (1, len(images), 10)


def test_no_state_is_left_from_the_batch_before(snn: qsnn.SNN, images: Tensor) -> None:
    with torch.no_grad():
        first = snn(images)
        snn(images.flip(0) * 3)
        assert torch.equal(snn(images), first)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (torch.zeros(2, 3, 8, 8), r"1, 8, 8"),
        (torch.zeros(2, 1, 28, 28), r"28"),
        (torch.zeros(1, 8, 8), r"B"),
        (torch.full((2, 1, 8, 8), float("nan")), "(?i)nan"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "float"),
    ],
)
def test_bad_images_are_refused(snn: qsnn.SNN, bad: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        snn(bad)


@pytest.mark.parametrize("options", [{"timesteps": 0}, {"timesteps": -1}, {"timesteps": 1.5}, {"firing": "burst"}])
def test_impossible_runs_are_refused(snn: qsnn.SNN, images: Tensor, options: dict) -> None:
    with pytest.raises(ValueError, match=r"from 1 to 4,096|online"):
        snn(images, **options)


def test_the_rate_gradient_is_that_of_the_activation() -> None:
    """r = clip(mean current / θ, 0, 1): its gradient to every step, to θ and to v₀; the forward is the same."""
    theta = 0.8
    x = (torch.rand(4, 5, 3, 2) * 1.6 - 0.4).requires_grad_()
    node, box = IFNode(theta, surrogate="rate"), IFNode(theta)
    for neuron in (node, box):
        neuron.train_("threshold")
        neuron.train_("initial")
    spikes = node(x)
    assert torch.equal(spikes, box(x))
    weight = torch.randn(5, 3, 2)
    (spikes.mean(0) * weight).sum().backward()
    mean = x.detach().mean(0)
    inside = (mean > 0) & (mean < theta)
    expected = torch.where(inside, weight, torch.zeros(())) / theta / 4
    assert torch.allclose(x.grad, expected.expand_as(x), atol=1e-6)
    assert torch.allclose(node.threshold.grad.float(), -(weight * mean / theta**2)[inside].sum() + expected.sum() * 0.5)
    assert torch.allclose(node.initial.grad.float(), expected.sum() * theta, atol=1e-5)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("leak", [None, 2.5])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("seen", ["spikes", "v", "y", "spikes v", "v y", "spikes v y"])
def test_the_fused_step_has_the_gradients_of_the_equation(channels, leak, seen, signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 3, 5, 5, generator=generator)
    weights = {part: torch.randn(x.shape, generator=generator) for part in ("spikes", "v", "y")}
    found = []
    for fused in (True, False):
        theta = torch.tensor([0.7, 1.0, 1.4]) if channels else torch.tensor(0.8)
        tau = None if leak is None else torch.full((3,) if channels else (), leak).requires_grad_()
        theta, start, current = theta.requires_grad_(), torch.full(x.shape[1:], 0.3).requires_grad_(), x.clone()
        shaped, slow = (None if a is None else a.view(-1, 1, 1) if channels else a for a in (theta, tau))
        current.requires_grad_()
        if fused:
            keep = None if slow is None else torch.exp(-1 / slow)
            spikes, v, y, _ = IFFunction.apply(current, shaped, start, 0, keep, None, signed, None)
        else:
            spikes, v, _ = simulate(current, shaped, start, Dynamics(signed=signed), slow)
            assert bool((spikes < 0).any()) == signed
            y = shaped * spikes
        outputs = {"spikes": spikes, "v": v, "y": y}
        sum((outputs[part] * weights[part][: len(outputs[part])]).sum() for part in seen.split()).backward()
        found.append([spikes, v, y, current.grad, theta.grad, start.grad] + ([] if tau is None else [tau.grad]))
    for ours, wanted in zip(*found, strict=True):
        assert torch.allclose(ours, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"stride": 1, "padding": 1}, {"ceil_mode": True, "count_include_pad": False}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_average_pool_keeps_no_input_and_has_the_gradients_of_torchs(options: dict, layout: torch.memory_format):
    x = torch.randn(4, 3, 7, 7).contiguous(memory_format=layout)
    pools = nn.AvgPool2d(3, **options), AveragePool2d(3, **options)
    found, kept = [], []
    for pool in pools:
        start = x.clone().requires_grad_()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            y = pool(start)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        found.append((y, start.grad))
        kept.append(sum(sizes))
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)
    assert kept == [x.numel(), 0]
