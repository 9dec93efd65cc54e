"""An initial potential for each step: the equation, its gradients, its integer form, and every file it goes to."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import scramble
from hypothesis import given
from hypothesis import strategies as st
from test_export_c import assert_is_fold
from test_fold import NETS
from torch import Tensor

import qsnn
from qsnn.folded.integer import IntegerIF
from qsnn.folded.neurons import CurrentIF, least
from qsnn.snn.backward import IFFunction
from qsnn.snn.equations import Dynamics, pushed, simulate
from qsnn.snn.neurons import IFNode

ROWS = torch.tensor([[0.5, 0.2, 0.9], [0.3, -0.4, 0.0], [-0.2, 0.1, 0.6]], dtype=torch.float64)


def by_hand(x: Tensor, theta: float, dynamics: Dynamics) -> list[list[int]]:
    """The equation in Python, a neuron a column: what a row says goes to the potential before its step."""
    keep = 1.0 if dynamics.tau is None else math.exp(-1.0 / dynamics.tau)
    found = []
    for c in range(x.shape[1]):
        v, spikes = theta * float(ROWS[0, c]), list[int]()
        for t in range(len(x)):
            later = theta * float(ROWS[t, c]) if 0 < t < len(ROWS) else 0.0
            v = v * keep + float(x[t, c]) + later
            spike = int(v >= theta)
            if dynamics.signed and not spike and v < 0 and sum(spikes) > 0:
                spike = -1
            v -= theta * spike
            spikes.append(spike)
        found.append(spikes)
    return found


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("dynamics", [Dynamics(), Dynamics(signed=True), Dynamics(tau=2.0)])
def test_the_equation(steps: int, dynamics: Dynamics) -> None:
    draw = torch.Generator().manual_seed(steps)
    for _ in range(20):
        x = torch.randn(steps, 1, 3, generator=draw, dtype=torch.float64)
        for trained in (False, True):
            node = IFNode(0.8, initial=ROWS, dynamics=dynamics)
            spikes = node(x.clone().requires_grad_(trained))
            assert spikes.detach()[:, 0].T.long().tolist() == by_hand(x[:, 0], 0.8, dynamics)


def test_deferred_sees_all_of_it() -> None:
    x, node = torch.full((2, 1, 3), 0.25, dtype=torch.float64), IFNode(1.0, initial=ROWS)
    node.firing = "deferred"
    total = 0.5 + ROWS[:2].sum(0)  # 1.3, 0.3, 1.4
    assert node(x).sum(0)[0].tolist() == total.floor().clamp(0, 2).tolist()


@pytest.mark.parametrize(("signed", "leak"), [(False, None), (True, None), (False, 2.5)])
@pytest.mark.parametrize("repeats", [0, 3])
def test_the_fused_step_has_the_gradients_of_the_equation(signed: bool, leak: float | None, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, 3, 5, 5) if repeats else (3, 4, 3, 5, 5), generator=generator)
    weight = torch.randn(3, 4, 3, 5, 5, generator=generator)
    found = []
    for fused in (True, False):
        theta, rows = torch.tensor(0.8, requires_grad=True), ROWS.float().clone().requires_grad_()
        current = x.clone().requires_grad_()
        pushes, tau = (rows[1:] * theta).view(2, 3, 1, 1), None if leak is None else torch.tensor(leak)
        start = (rows[0] * theta).view(3, 1, 1).expand(4, 3, 5, 5)
        if fused:
            keep = None if tau is None else torch.exp(-1 / tau)
            spikes, *_ = IFFunction.apply(current, theta, start, repeats, keep, None, signed, pushes)
        else:
            stepped = pushed(current.expand(3, *x.shape) if repeats else current, pushes)
            spikes, *_ = simulate(stepped, theta, start, Dynamics(signed=signed), tau)
        (spikes * weight).sum().backward()
        found.append([spikes, current.grad, rows.grad, theta.grad])
    for ours, wanted in zip(*found, strict=True):
        assert torch.allclose(ours, wanted, atol=1e-4, rtol=1e-4)


@given(
    rows=st.lists(st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=2), min_size=1, max_size=4),
    theta=st.floats(0.125, 4, width=32), gain=st.floats(0.0625, 2, width=32), bias=st.floats(-2, 2, width=32),
    steps=st.integers(1, 5),
)  # fmt: skip
def test_every_threshold_is_the_exact_one(
    rows: list[list[float]], theta: float, gain: float, bias: float, steps: int
) -> None:
    neuron = IntegerIF(
        torch.tensor([[gain]]).double(), 1, torch.tensor([bias]).double(), torch.tensor(theta), torch.tensor(rows),
        50.0, (2, 1, 1),
    )  # fmt: skip
    table = neuron.table(steps, "online")
    for c in range(2):
        for t in range(1, steps + 1):
            put = sum((Fraction(row[c]) * Fraction(theta) for row in rows[:t]), Fraction(0))
            for k in range(t):
                need = (k + 1) * Fraction(theta) - put - t * Fraction(bias)
                assert table[t - 1, k, c] == least(need, Fraction(gain)), (t, k)
    assert torch.equal(neuron.table(steps, "deferred")[0], table[-1])


def in_onnx(folded: qsnn.SNN, images: Tensor, steps: int, firing: str) -> tuple[dict, dict]:
    """What ONNX Runtime answers, and what it has to."""
    pytest.importorskip("onnx", reason="onnx is missing: pip install 'qsnn[export]'")
    from test_export_onnx import answered, expected

    from qsnn.export.onnx import OnnxConfig, onnx_model

    model = onnx_model(folded, OnnxConfig(timesteps=steps, firing=firing))
    return answered(model, images), expected(folded, images, firing=firing, timesteps=steps)


def student(
    name: str, digits: qsnn.Data, bits: int = 4, signed: bool = False, channels: bool = False, steps: int = 2
) -> qsnn.SNN:
    """A network with a row a step in every neuron, as training leaves them."""
    torch.manual_seed(1)
    config = qsnn.QuantizeConfig(weight_bits=bits, levels=2, calibration_images=64)
    qann = qsnn.quantize(scramble(NETS[name](digits)), digits, config).eval()
    snn = qsnn.convert(qann, qsnn.ConvertConfig(signed=signed))
    teach = qsnn.DistillConfig(
        timesteps=steps, epochs=1, train_images=64, train_initial="step", train_threshold="channel" if channels else ""
    )
    made = qsnn.distill(snn, qann, digits, teach)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, neuron in made.neurons():
            assert neuron.initial.shape[0] == steps
            assert float(neuron.initial[1:].abs().max()) > 0, "it is trained"
            neuron.initial += 0.4 * torch.randn(neuron.initial.shape, generator=draw).double()
    return made.eval()


@pytest.mark.parametrize(("name", "options"), [
    ("average pooling", {}), ("residual", {}), ("residual", {"channels": True}), ("mixed", {"bits": 16}),
    ("average pooling", {"signed": True}), ("average pooling", {"steps": 4}),
])  # fmt: skip
def test_fold_leaves_every_answer(name: str, options: dict, digits: qsnn.Data, images: Tensor, tmp_path: Path) -> None:
    snn = student(name, digits, **options)
    folded, wide = qsnn.fold(snn), snn.double()
    ties = 0.0 if options.get("bits") != 16 else 0.02
    with torch.no_grad():
        for steps in (1, 2, 3, 9):
            ours, theirs = folded(images, timesteps=steps), wide(images.double(), timesteps=steps)
            assert float((ours - theirs).abs().amax(-1).gt(1e-4).double().mean()) <= ties, steps
    if name == "mixed":  # no network of ours, nor one by name
        return
    for each, file in ((folded, "folded.safetensors"), (snn.float(), "snn.safetensors")):
        qsnn.save(each, tmp_path / file)
        assert torch.equal(qsnn.load(tmp_path / file)(images), each(images))


@pytest.mark.parametrize("name", ["average pooling", "residual"])
def test_onnx_gives_the_folded_networks_logits(name: str, digits: qsnn.Data, images: Tensor) -> None:
    folded = qsnn.fold(student(name, digits))
    kinds = {type(module) for _, module in folded.neurons()}
    assert kinds == ({IntegerIF, CurrentIF} if name == "residual" else {IntegerIF})
    for firing, steps in (("online", 2), ("online", 4), ("deferred", 2)):
        ours, theirs = in_onnx(folded, images, steps, firing)
        from test_export_onnx import same  # which is skipped as a whole without onnx

        same(ours, theirs)


@pytest.mark.parametrize("name", ["average pooling", "residual"])
def test_c_gives_the_folded_networks_logits(name: str, digits: qsnn.Data, tmp_path: Path) -> None:
    folded, few = qsnn.fold(student(name, digits)), digits.test.head(60)
    for firing in ("online", "deferred"):
        assert_is_fold(folded, few.images, few.normalise(few.images), tmp_path, firing=firing, timesteps=2)


@pytest.mark.parametrize(
    ("options", "firing"), [({"bits": 16}, "online"), ({"bits": 16}, "deferred"), ({"channels": True}, "online")]
)
def test_real_currents_in_onnx(options: dict, firing: str, digits: qsnn.Data, images: Tensor) -> None:
    ours, theirs = in_onnx(qsnn.fold(student("average pooling", digits, **options)), images, 3, firing)
    assert all(abs(ours[name] - value).max() < 1e-3 for name, value in theirs.items() if name in ours)


def test_a_simulator_gives_every_logit(digits: qsnn.Data, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("nir", reason="nir is missing: pip install 'qsnn[nir]'")
    from test_export_nir import last_integers

    from qsnn.export.nir import load_into

    folded = qsnn.fold(student("residual", digits))
    qsnn.export(folded, tmp_path / "net.nir", format="nir")
    found = load_into("spikingjelly", tmp_path / "net.nir").integer_logits(images)
    assert torch.equal(found, last_integers(folded, images))


def test_refusals(digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match="one finite initial potential, one a channel, or a row a step"):
        IFNode(1.0, initial=torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="use step_mode='m'"):
        IFNode(1.0, initial=ROWS, step_mode="s")(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="train_threshold must be one of '', 'layer', 'channel', 'auto', got 'step'"):
        qsnn.DistillConfig(train_threshold="step")
    snn = student("average pooling", digits)
    qann = qsnn.quantize(scramble(NETS["average pooling"](digits)), digits)
    with pytest.raises(ValueError, match="no IF neuron of one threshold and half of it at the start"):
        qsnn.as_qann(snn, qann)
