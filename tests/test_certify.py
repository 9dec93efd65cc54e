"""certify(): no planted difference is called EXACT, equal networks are, and what float64 cannot tell is said apart.

``QSNN_PLANTS=200 pytest tests/test_certify.py`` plants two hundred.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import plain_net, scramble
from torch import Tensor, nn

import qsnn
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import IntegerInput, IntegerLayer
from qsnn.folded.neurons import Current
from qsnn.graph.hooks import recorded
from qsnn.measure.certificate import Certificate
from qsnn.quant.activations import level_quant

PLANTS = int(os.environ.get("QSNN_PLANTS", "20"))
IMAGES = 24


class Residual(nn.Module):
    """Currents meet, and a sign of γ is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.relu, self.out, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.out(self.inner_norm(self.inner(x)) + x)
        return self.head(torch.nn.functional.avg_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def pairs(qann: nn.Module, digits: qsnn.Data) -> dict[str, tuple[nn.Module, qsnn.SNN]]:
    """Quantized networks and their integer forms: on ties, with batch norms, with a residual sum, of ±1."""
    torch.manual_seed(1)
    residual = scramble(Residual(), 1)
    signs = scramble(nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.BatchNorm1d(16),
        nn.ReLU(), nn.Linear(16, 10),
    ))  # fmt: skip
    found = {
        "ties": plain_net(digits), "norms": qann,
        "residual": qsnn.quantize(residual, digits, qsnn.QuantizeConfig(weight_bits=4, levels=3)).eval(),
        "signs": qsnn.quantize(signs, digits, qsnn.QuantizeConfig(weight_bits=1, act_form="sign")).eval(),
    }  # fmt: skip
    steps = {"signs": 1, "residual": 3}
    return {
        name: (model, qsnn.fold(qsnn.convert(model, qsnn.ConvertConfig(timesteps=steps.get(name, 2)))))
        for name, model in found.items()
    }


def certified(snn: qsnn.SNN, qann: nn.Module, data: Any, **options: Any) -> Certificate:
    return qsnn.certify(snn, qann, data, **{"images": IMAGES, **options})


# ---- plants: each changes something of the network after its first call, in place, and says what


def written(tensor: Tensor, at: Any, value: Any, draw: random.Random, holder: nn.Module, name: str) -> None:
    """Write in one of the ways in which people do: in place, through .data, through numpy, or another tensor."""
    new = tensor.detach().clone()
    new[at] = value
    how = draw.randrange(4)
    if how == 0:
        tensor.detach().copy_(new)
    elif how == 1:
        tensor.data[at] = value
    elif how == 2:
        tensor.detach().numpy()[...] = new.numpy()
    else:
        setattr(holder, name, new)


def layers_of(snn: qsnn.SNN, kind: type) -> list[Any]:
    return [module for module in snn.modules() if type(module) is kind]


def a_weight(snn: qsnn.SNN, draw: random.Random, last: bool = False) -> None:
    layers = layers_of(snn, IntegerLayer)
    layer = layers[-1] if last else draw.choice(layers)
    at = tuple(draw.randrange(side) for side in layer.weight.shape)
    value = layer.weight[at] + draw.choice((-1, 1)) if layer.weight[at].abs() < 127 else 0
    written(layer.weight, at, value, draw, layer, "weight")


def readout_of(snn: qsnn.SNN) -> Current:
    return layers_of(snn, Current)[-1]


def a_bias(snn: qsnn.SNN, draw: random.Random) -> None:
    readout = readout_of(snn)
    if readout.bias.numel() == 1:
        readout.bias = readout.bias.expand(10).clone()
        readout.shapes = [*readout.shapes[:-1], (10,)]
    at = draw.randrange(10)
    value = readout.bias[at] + draw.choice((5.0, -1.0, 1e-3, math.nan, math.inf, -math.inf))
    written(readout.bias, at, value, draw, readout, "bias")


def logits_scaled(snn: qsnn.SNN, draw: random.Random) -> None:
    readout = readout_of(snn)
    factor = draw.choice((3.0, 1.001, 1 + 1e-7, -1.0, 0.0, math.nan))
    readout.factors_0.mul_(torch.tensor([factor] + [1.0] * (len(readout.factors_0) - 1)).double()[:, None])
    readout.bias.mul_(factor)


def a_class_swapped(snn: qsnn.SNN, draw: random.Random) -> None:
    one, two = draw.sample(range(10), 2)
    order = list(range(10))
    order[one], order[two] = two, one
    readout, layer = readout_of(snn), layers_of(snn, IntegerLayer)[-1]
    layer.weight.copy_(layer.weight[order].clone())
    for name in ("factors_0", "bias"):
        value = getattr(readout, name)
        if value.shape[-1] == 10:
            setattr(readout, name, value[..., order].clone())


def channels_swapped(snn: qsnn.SNN, draw: random.Random) -> None:
    """Of one layer alone: its weights and its thresholds; or its weights only."""
    layers = layers_of(snn, IntegerLayer)
    layer = draw.choice(layers[:-1])
    order = list(range(len(layer.weight)))
    one, two = draw.sample(order, 2)
    order[one], order[two] = two, one
    layer.weight.copy_(layer.weight[order].clone())


def a_threshold(snn: qsnn.SNN, draw: random.Random) -> None:
    neurons = [m for _, m in snn.neurons() if hasattr(m, "threshold")]
    neuron: Any = draw.choice(neurons)
    name = draw.choice(("threshold", "initial", "bias"))
    value = getattr(neuron, name)
    at = tuple(draw.randrange(side) for side in value.shape)
    new = value[at] * draw.choice((1.3, 0.5, 2.0)) + (draw.choice((0.3, -0.3)) if name != "threshold" else 0.0)
    written(value, at if at else ..., new, draw, neuron, name)


def one_integer(snn: qsnn.SNN, draw: random.Random) -> None:
    """The threshold of one channel is one integer higher or lower; or of all: > stands for >=."""
    neurons = layers_of(snn, IntegerIF)
    neuron = draw.choice(neurons)
    original, by = neuron._exact_table, draw.choice((-1, 1))
    channel: Any = draw.choice((slice(None), draw.randrange(neuron.factors.shape[1])))

    def table(*args: Any) -> Tensor:
        exact = original(*args)
        exact[..., channel] += by
        return exact

    neuron._exact_table = table
    neuron._prepared.clear()


def the_input(snn: qsnn.SNN, draw: random.Random) -> None:
    (layer,) = layers_of(snn, IntegerInput)
    layer.step.mul_(draw.choice((1.01, 0.9, 2.0)))


def the_qann(qann: nn.Module, draw: random.Random) -> None:
    """The quantized network itself: a weight, a bias, a statistic or a step."""
    quants = [quant for m in qann.modules() if (quant := level_quant(m)) is not None]
    if quants and draw.random() < 0.2:
        quant = draw.choice(quants)
        quant.set_threshold_(float(quant.scaling_impl.value.detach()) * draw.choice((1.1, 0.7)))
        return
    named = [(name, value) for name, value in qann.state_dict().items() if value.numel() > 1]
    _, value = draw.choice(named)
    at = tuple(draw.randrange(side) for side in value.shape)
    value[at] = value[at] + draw.choice((1.0, -1.0, math.nan))


PLANTED: dict[str, Callable[[qsnn.SNN, random.Random], None]] = {
    "a weight": a_weight, "a weight of the readout": lambda snn, draw: a_weight(snn, draw, last=True),
    "a bias of the readout": a_bias, "the logits scaled": logits_scaled, "a class swapped": a_class_swapped,
    "channels swapped": channels_swapped, "a threshold": a_threshold, "one integer": one_integer,
    "the input": the_input,
}  # fmt: skip


def seen(snn: qsnn.SNN, images: Tensor, steps: int) -> list[Tensor]:
    """Everything that a network gives: the spikes of every layer, and the logits."""
    with torch.no_grad(), recorded(dict(snn.neurons())) as spikes:
        logits = snn(images, timesteps=steps, firing="deferred")
    return [*spikes.values(), logits]


def levels_of(qann: nn.Module) -> int:
    found = [quant.levels for m in qann.modules() if (quant := level_quant(m)) is not None and not quant.signed]
    return max(found, default=1)


def test_no_planted_difference_is_exact(pairs: dict[str, tuple[nn.Module, qsnn.SNN]], digits: qsnn.Data) -> None:
    """Each plant changes at least one spike or one bit of a logit on these images; those that change none are drawn
    anew."""
    draw, done, tried = random.Random(0), 0, 0
    images = next(qsnn.batches(digits.test, IMAGES))[0]
    names = [*PLANTED, "the quantized network"]
    while done < PLANTS:
        tried += 1
        assert tried < 20 * PLANTS, "plants that change nothing"
        base, what = draw.choice(sorted(pairs)), names[done % len(names)]
        original, folded = pairs[base]
        qann, snn, steps = copy.deepcopy(original), copy.deepcopy(folded), levels_of(original)
        before = seen(snn, images, steps)
        if what in PLANTED:
            if what == "one integer" and not layers_of(snn, IntegerIF):
                continue
            PLANTED[what](snn, draw)
            after = seen(snn, images, steps)
        else:
            the_qann(qann, draw)
            with torch.no_grad():
                before, after = [original(images)], [qann(images)]
        if all(torch.equal(one, two) for one, two in zip(before, after, strict=True)):
            continue
        done += 1
        certificate = certified(snn, qann, digits.test)
        assert not certificate.exact and "EXACT" not in str(certificate), (base, what, done, str(certificate))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_on_both_sides_are_not_equal(
    value: float, pairs: dict[str, tuple[nn.Module, qsnn.SNN]], digits: qsnn.Data
) -> None:
    qann = copy.deepcopy(pairs["norms"][0])
    (*_, last) = [m for m in qann.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        last.bias[3] = value
    certificate = certified(qsnn.convert(qann), qann, digits.test)
    assert not certificate.within_rounding and certificate.largest_logit_difference > 1e300


def test_one_large_class_hides_no_other(pairs: dict[str, tuple[nn.Module, qsnn.SNN]], digits: qsnn.Data) -> None:
    """Both sides say 1e9 for one class, so all answers are equal; another class differs by 1e-3 or a class is
    infinite in the reference alone."""
    qann = copy.deepcopy(pairs["norms"][0])
    (*_, last) = [m for m in qann.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        last.bias[3] = 1e9
    snn = qsnn.fold(qsnn.convert(qann))
    assert certified(snn, qann, digits.test).exact
    readout_of(snn).bias[5] += 1e-3
    certificate = certified(snn, qann, digits.test)
    assert certificate.same_logits == certificate.logits - IMAGES
    assert certificate.same_answers == IMAGES and not certificate.exact
    with torch.no_grad():
        last.bias[3] = math.inf
    assert not certified(snn, qann, digits.test).within_rounding


@pytest.mark.parametrize("images", [0, -1, -250, True, 1.5, "3"])
def test_of_nothing_nothing_is_certified(
    images: Any, pairs: dict[str, tuple[nn.Module, qsnn.SNN]], digits: qsnn.Data
) -> None:
    qann, snn = pairs["norms"]
    with pytest.raises(ValueError, match=r"expected images >= 1, or None for all, got"):
        qsnn.certify(snn, qann, digits.test, images=images)


def test_equal_networks_are_exact_whatever_the_batch(
    pairs: dict[str, tuple[nn.Module, qsnn.SNN]], digits: qsnn.Data
) -> None:
    for name, (qann, snn) in pairs.items():
        found = [certified(snn, qann, digits.test, batch_size=size) for size in (5, 7, 250)]
        assert [c.verdict for c in found] == ["EXACT"] * 3, (name, str(found[0]))
        assert len({c.logits_sha256 for c in found}) == 1, name


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("firing", ["online", "deferred"])
def test_no_bit_of_an_answer_depends_on_the_batch(
    steps: int, firing: str, pairs: dict[str, tuple[nn.Module, qsnn.SNN]], images: Tensor
) -> None:
    for name, (_, snn) in pairs.items():
        if name == "signs" and steps > 1:
            continue
        with torch.no_grad():
            whole = snn(images, timesteps=steps, firing=firing)
            for size in (1, 5, 31):
                parts = torch.cat([snn(part, timesteps=steps, firing=firing) for part in images.split(size)], 1)
                assert torch.equal(parts, whole), (name, size)


@pytest.mark.parametrize("beta", [1e-20, -1e-20])
def test_what_float64_rounds_away_is_said_apart(beta: float, digits: qsnn.Data) -> None:
    """At an exact tie 1e-20 decides: the integer thresholds see it, float64 does not; all that follows is compared."""
    qann = plain_net(digits)
    assert certified(qsnn.convert(qann), qann, digits.test, images=540).verdict == "EXACT"
    with torch.no_grad():
        for module in qann.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias.fill_(beta)
    certificate = certified(qsnn.convert(qann), qann, digits.test, images=540)
    if beta > 0:  # a tie goes up anyway
        assert certificate.verdict == "EXACT"
        return
    assert certificate.within_rounding and not certificate.exact
    assert certificate.verdict.startswith("equal within rounding of the reference: ")
    assert sum(layer.rounding for layer in certificate.layers) > 100
    assert certificate.same_logits == certificate.logits and certificate.same_answers == certificate.answers
