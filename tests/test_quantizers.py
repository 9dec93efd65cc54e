"""Quantizers: equation (Q) with its ties, integers that are bit-equal to what forward uses, traps that are closed."""

from __future__ import annotations

import brevitas.nn as qnn
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsnn.quant.activations import LevelActQuant, dense_dot, level_quant, round_half_up
from qsnn.quant.weights import integer_weights, weight_quantizer


def relu(levels: int, threshold: float | None = None) -> nn.Module:
    module = qnn.QuantReLU(act_quant=LevelActQuant, levels=levels, bit_width=max(1, levels.bit_length()))
    if threshold is not None:
        level_quant(module).scaling_impl.value.data.fill_(threshold)
    return module


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1))
def test_round_half_up_is_floor_of_x_plus_half_in_exact_arithmetic(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    exact = np.floor(x.double().numpy() + 0.5)  # float64 adds a half to any float32 of this size without rounding
    assert np.array_equal(round_half_up(x).double().numpy(), exact)


@given(levels=st.sampled_from([1, 2, 3, 7, 15, 255]), values=st.lists(st.floats(-40, 40, width=32), min_size=1))
def test_one_pass_equals_brevitas_chain_bit_for_bit(levels: int, values: list[float]) -> None:
    module, x = relu(levels, threshold=1.7), torch.tensor(values)
    fused = module(x)
    level_quant(module).fused = False
    assert torch.equal(fused, module(x))


@given(levels=st.sampled_from([1, 2, 4, 8]), n=st.lists(st.integers(-40, 40), min_size=1))
def test_ties_round_up(levels: int, n: list[int]) -> None:
    half_steps = torch.tensor(n).float() / 2
    expected = torch.floor(half_steps + 0.5).clamp(0, levels)
    assert torch.equal(relu(levels, threshold=float(levels))(half_steps), expected)


def test_trap_just_below_half() -> None:
    assert torch.equal(relu(2, threshold=2.0)(torch.tensor([0.49999997])), torch.zeros(1))


def test_gradient_is_that_of_learned_step_size_quantization() -> None:
    """Esser et al. 2020: to x it passes where 0 < x < θ; to s it is n - x/s there, L above, times 1/sqrt(N L)."""
    x = torch.linspace(0, 5, 141)[:-1] + 0.01  # away from the edges
    weight = torch.randn(140)
    module, inputs = relu(2, threshold=1.5), x.clone().requires_grad_()
    (module(inputs) * weight).sum().backward()
    inside, step = x < 1.5, 1.5 / 2
    assert torch.equal(inputs.grad, torch.where(inside, weight, torch.zeros(())))
    n = (x / step + 0.5).floor().clamp(0, 2)
    to_step = (weight * torch.where(inside, n - x / step, torch.full((), 2.0))).sum()
    # the parameter is θ = 2·s; its gradient is scaled by 1 / sqrt(elements of a sample * L)
    expected = to_step / 2 / (1 * 2) ** 0.5
    assert torch.allclose(level_quant(module).scaling_impl.value.grad, expected, rtol=1e-4)
    chain, again = relu(2, threshold=1.5), x.clone().requires_grad_()
    level_quant(chain).fused = False
    (chain(again) * weight).sum().backward()
    assert torch.allclose(again.grad[inside], inputs.grad[inside]), "inside as Brevitas' chain of operations"
    below = torch.tensor([-0.1, -5.0], requires_grad=True)
    relu(2, threshold=1.5)(below).sum().backward()
    assert torch.equal(below.grad, torch.zeros(2)), "as ReLU: nothing passes below 0"


def test_loading_a_state_keeps_the_layer_as_it_is() -> None:
    module = relu(2, threshold=2.0)
    before = str(module)
    module.load_state_dict(module.state_dict())
    assert str(module) == before and "activation_impl): Identity" in before


def test_dense_dot_for_both_layouts() -> None:
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = (a * b).sum()
    channels_last = torch.channels_last
    for pair in ((a, b), (a.to(memory_format=channels_last), b.to(memory_format=channels_last)), (a.mT, b.mT)):
        assert torch.allclose(dense_dot(*pair), expected, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 16, 32])
@pytest.mark.parametrize("kind", ["conv", "grouped", "linear"])
def test_integers_times_scale_are_what_forward_uses(bits: int, kind: str) -> None:
    options = weight_quantizer(bits)
    layer = {
        "conv": lambda: qnn.QuantConv2d(3, 6, 3, **options),
        "grouped": lambda: qnn.QuantConv2d(4, 8, 3, groups=4, **options),
        "linear": lambda: qnn.QuantLinear(5, 7, bias=True, **options),
    }[kind]()
    integers, scale = integer_weights(layer)
    used = layer.quant_weight()
    assert torch.equal((integers.to(scale.dtype) * scale).float(), getattr(used, "value", used))
    if bits <= 8:
        assert integers.dtype == torch.int8
        top = 1 if bits == 1 else 2 ** (bits - 1) - 1
        assert int(integers.abs().max()) <= top
        assert bits > 1 or bool((integers != 0).all()), "one bit is -1 or 1"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_integer_weights_are_the_formula_and_the_gradient_passes(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    layer = qnn.QuantConv2d(64, 8, 3, bias=False, **weight_quantizer(bits))
    layer.weight.data = torch.randn(8, 64, 3, 3)
    integers, step = integer_weights(layer)
    flat = layer.weight.detach().flatten(1)
    k = {2: 1.22, 3: 0.65, 4: 0.354}.get(bits, float("inf"))
    expected = torch.minimum(flat.abs().amax(1) / top, k * flat.square().mean(1).sqrt())
    assert torch.allclose(step.flatten(), expected)
    assert torch.equal(integers.float(), (layer.weight / step).round().clamp(-top, top))
    layer.quant_weight().value.sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_step_has_the_least_error_for_normal_weights(bits: int) -> None:
    layer = qnn.QuantLinear(100_000, 1, bias=False, **weight_quantizer(bits))
    layer.weight.data = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    w, (_, step) = layer.weight.detach(), integer_weights(layer)
    top = 2 ** (bits - 1) - 1

    def error(s: torch.Tensor) -> float:
        return float(((w / s).round().clamp(-top, top) * s - w).square().mean())

    assert error(step) < min(error(step * 0.95), error(step * 1.05))
    assert error(step) < 0.7 * error(w.abs().max() / top), "the largest weight is a poor ruler"


def test_a_dead_channel_has_zero_weights_not_nan() -> None:
    layer = qnn.QuantLinear(5, 2, bias=False, **weight_quantizer(4))
    layer.weight.data[0] = 0
    integers, step = integer_weights(layer)
    assert not integers[0].any() and bool(step.isfinite().all())


def test_xnor_scale_is_the_mean_magnitude() -> None:
    layer = qnn.QuantConv2d(3, 4, 3, **weight_quantizer(1))
    _, scale = integer_weights(layer)
    assert torch.allclose(scale.flatten(), layer.weight.abs().mean((1, 2, 3)))


def test_an_unset_step_is_an_error_not_a_silent_one() -> None:
    with pytest.raises(RuntimeError, match="no step yet"):
        relu(2)(torch.ones(3))
    with pytest.raises(RuntimeError, match="no step yet"):
        relu(2).eval()(torch.ones(3))


def test_a_loaded_step_is_used() -> None:
    source, target = relu(3, threshold=2.5), relu(3)
    target.load_state_dict(source.state_dict())
    x = torch.randn(100)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("bits", [0, -1, 9, 12, 64])
def test_bits_that_do_not_exist(bits: int) -> None:
    with pytest.raises(ValueError, match="1 to 8, 16"):
        weight_quantizer(bits)
