"""Other neurons than the soft-reset IF: their equations, their storage, and that folding keeps their spikes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import scramble
from hypothesis import given
from hypothesis import strategies as st
from spikingjelly.activation_based.neuron import STBIFNode
from torch import Tensor

import qsnn
from qsnn.snn.equations import Dynamics, simulate
from qsnn.snn.neurons import IFNode

EIGHTHS = st.lists(st.integers(-24, 24), min_size=1, max_size=12)


def run(currents: list[float], dynamics: Dynamics, threshold: float = 1.0, v: float = 0.5) -> tuple[list[float], float]:
    x = torch.tensor(currents).view(-1, 1)
    spikes, v_end, _ = simulate(x, torch.tensor(threshold), torch.tensor([v]), dynamics)
    return spikes.flatten().tolist(), float(v_end)


@given(EIGHTHS)
def test_the_default_is_the_if_node(currents: list[int]) -> None:
    x = torch.tensor(currents).view(-1, 1, 1) / 8
    expected = IFNode(1.25)(x)
    spikes, *_ = simulate(x, torch.tensor(1.25), torch.full((1, 1), 0.625), Dynamics())
    assert torch.equal(spikes, expected)


def test_one_threshold_a_channel_is_one_node_a_channel() -> None:
    x, theta = torch.randn(5, 2, 3, 4), torch.tensor([0.5, 1.0, 2.0])
    together = IFNode(theta)(x)
    for c, value in enumerate(theta.tolist()):
        assert torch.equal(together[:, :, c], IFNode(value)(x[:, :, c]))


def test_hard_reset_forgets_what_is_above_the_threshold() -> None:
    assert run([2.0, 0.5, 0.5], Dynamics(reset="hard"), v=0.0) == ([1.0, 0.0, 1.0], 0.0)
    assert run([2.0, 0.5, 0.5], Dynamics(), v=0.0) == ([1.0, 1.0, 1.0], 0.0)


def test_decaying_reset_falls_towards_rest() -> None:
    spikes, v = run([2.0, 0.0], Dynamics(reset="decay", reset_tau=2.0), v=0.0)
    keep = math.exp(-1 / 2)
    assert spikes == [1.0, 1.0]  # 2·e^-½ = 1.21 is above 1 still
    assert v == pytest.approx(2 * keep * keep)


def test_leak() -> None:
    spikes, v = run([0.5, 0.5], Dynamics(tau=2.0), v=0.4)
    keep = math.exp(-1 / 2)
    first = 0.4 * keep + 0.5
    assert spikes == [0.0, 0.0] and v == pytest.approx(first * keep + 0.5)


@given(EIGHTHS)
def test_signed_spikes_are_spikingjellys_stbif(currents: list[int]) -> None:
    x = torch.tensor(currents).view(-1, 1, 1) / 8
    theirs = STBIFNode(1.0, level=1000, step_mode="m")
    assert torch.equal(IFNode(1.0, dynamics=Dynamics(signed=True))(x), theirs(x))


@given(EIGHTHS)
def test_signed_spikes_end_at_the_rounded_sum_once_the_input_has_ended(currents: list[int]) -> None:
    x = torch.tensor(currents + [0] * 40).view(-1, 1) / 8
    spikes, *_ = simulate(x, torch.tensor(1.0), torch.tensor([0.5]), Dynamics(signed=True))
    assert float(spikes.sum()) == max(0.0, math.floor(sum(currents) / 8 + 0.5))


@given(st.lists(st.integers(-16, 16), min_size=1, max_size=10))
def test_int8_is_exact_while_everything_fits(units: list[int]) -> None:
    x = torch.tensor(units).view(-1, 1) / 64  # multiples of u = θ/64
    exact, v, _ = simulate(x, torch.tensor(1.0), torch.tensor([0.5]), Dynamics())
    spikes, held, overflows = simulate(x, torch.tensor(1.0), torch.tensor([0.5]), Dynamics(state_bits="int8"))
    if overflows == 0:
        assert torch.equal(spikes, exact) and torch.equal(held, v)


def test_int8_saturates_and_counts() -> None:
    x = torch.tensor([[-5.0, 0.1], [0.0, 0.1]])
    _, v, overflows = simulate(x, torch.tensor(1.0), torch.tensor([0.5, 0.5]), Dynamics(state_bits="int8"))
    assert float(v[0]) == -2.0 and overflows == 1  # -4.5 does not fit; -2 after it does


def test_a_spike_that_takes_one_back_has_a_gradient_around_zero() -> None:
    # v0 = 0.5; h = 1.5 fires; h = 0.5 - 0.6 < 0 takes it back; h = 0.9 - 1.3 < 0 has nothing to take back
    x = torch.tensor([[1.0], [-0.6], [-1.3]], dtype=torch.float64, requires_grad=True)
    spikes, *_ = simulate(x, torch.tensor(1.0), torch.tensor([0.5], dtype=torch.float64), Dynamics(signed=True))
    assert spikes.flatten().tolist() == [1.0, -1.0, 0.0]
    # box of width θ around 0 where a spike may be taken back, around θ everywhere: h = -0.1 lies in the first
    (grad,) = torch.autograd.grad(spikes[1].sum(), x, retain_graph=True)
    assert grad[1].item() == 1.0
    (grad,) = torch.autograd.grad(spikes[2].sum(), x)
    assert grad[2].item() == 0.0


@pytest.mark.parametrize("state", ["int16", "fp16"])
def test_more_bits_are_closer(state: str) -> None:
    x = torch.rand(8, 1000) - 0.3
    start = torch.full((1000,), 0.5)
    errors = {}
    for bits in ("int8", state):
        spikes, v, overflows = simulate(x, torch.tensor(1.0), start, Dynamics(state_bits=bits))
        assert overflows == 0 or bits == "int8"
        errors[bits] = float((v + spikes.sum(0) - x.sum(0) - 0.5).abs().mean())
    assert 0 < errors[state] < errors["int8"] / 5


VARIANTS = [
    {"reset": "hard"}, {"reset": "decay", "reset_tau": 0.7}, {"tau": (4.0,)}, {"tau": (8.0,), "tau_growth": 0.5},
    {"signed": True}, {"state_bits": "int8"}, {"state_bits": "int16"}, {"state_bits": "fp16"},
    {"signed": True, "tau": (9.0,), "state_bits": "int16"},
]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_folding_keeps_spikes_and_answers(options: dict, qann: torch.nn.Module, images: Tensor) -> None:
    from test_fold import recorded

    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=4, **options))
    folded = qsnn.fold(snn)
    spikes, logits = recorded(snn.double(), images.double())
    kept, answers = recorded(folded, images)
    for name, train in spikes.items():
        share = float((train == kept[name]).double().mean())
        # a rounded membrane may stand exactly on θ or between two grid points, where the last bit of a sum decides
        assert share == 1.0 or (options.get("state_bits") and share > 0.999), (name, share)
    assert torch.equal(logits.argmax(-1), answers.argmax(-1)) or options.get("state_bits")


@pytest.mark.parametrize("timesteps", [2, 5, 10])
def test_signed_spikes_fold_to_integers(timesteps: int, teacher: torch.nn.Module, images: Tensor) -> None:
    """Where a spike is taken back follows from the same integer limits: no potential in floats is left."""
    from test_fold import recorded

    qann = qsnn.quantize(
        scramble(copy.deepcopy(teacher)), [(images, torch.zeros(len(images), dtype=torch.int64))]
    ).eval()
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=timesteps, signed=True))
    folded = qsnn.fold(snn)
    plain = qsnn.fold(qsnn.convert(qann))
    assert [type(n) for _, n in folded.neurons()] == [type(n) for _, n in plain.neurons()]
    spikes, logits = recorded(snn.double(), images.double())
    kept, answers = recorded(folded, images)
    assert any(bool((train < 0).any()) for train in spikes.values())
    assert all(torch.equal(train.float(), kept[name].float()) for name, train in spikes.items())
    assert torch.equal(logits.argmax(-1), answers.argmax(-1))


def test_overflows_are_reported(qann: torch.nn.Module, digits: qsnn.Data) -> None:
    snn = qsnn.convert(qann, qsnn.ConvertConfig(state_bits="int8"))
    measured = qsnn.benchmark(snn, digits.test.head(64), timesteps=2)
    assert measured.overflows is not None and measured.overflows > 0
    assert qsnn.benchmark(qsnn.convert(qann), digits.test.head(64), timesteps=2).overflows is None


def test_a_checkpoint_keeps_the_equation(qann: torch.nn.Module, images: Tensor, tmp_path: object) -> None:
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=3, tau=(3.0, 4.0, 5.0, 6.0), reset="hard"))
    qsnn.save(snn, f"{tmp_path}/a.safetensors")
    again = qsnn.load(f"{tmp_path}/a.safetensors")
    assert torch.equal(snn.eval()(images), again(images))
    assert [node.dynamics.tau for _, node in again.neurons()] == [3.0, 4.0, 5.0, 6.0]


def test_every_equation_can_be_trained() -> None:
    for options in ({"reset": "hard"}, {"reset": "decay"}, {"tau": 2.0}, {"signed": True}, {"state_bits": "int8"}):
        x = torch.rand(4, 2, 3, requires_grad=True)
        IFNode(torch.ones(3), dynamics=Dynamics(**options))(x).sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all()) and bool((x.grad != 0).any())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"reset": "soft-ish"}, "soft, hard, decay"),
        ({"tau": (0.0,)}, "above 0 and at most"),
        ({"state_bits": "int4"}, "int8, int16, fp16"),
        ({"signed": True, "reset": "hard"}, "soft reset"),
        ({"reset": "hard", "firing": "deferred"}, "online"),
        ({"tau": (1.0, 2.0)}, "one for each of 4"),
    ],
)
def test_impossible_options(options: dict, match: str, qann: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=match):
        qsnn.convert(qann, qsnn.ConvertConfig(**options))


def test_deferred_firing_has_one_equation(qann: torch.nn.Module, images: Tensor) -> None:
    snn = qsnn.convert(qann, qsnn.ConvertConfig(reset="hard"))
    for model in (snn, qsnn.fold(snn)):
        with pytest.raises(ValueError, match="firing='online'"):
            model(images, firing="deferred")
