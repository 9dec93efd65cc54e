"""The table of kinds: every pass knows every kind, every spelling keeps its meaning, and what has no kind is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qsnn
from qsnn.folded.kinds import FOLD
from qsnn.graph.kinds import ADVICE, DOES, KINDS, does, kind_of, refused
from qsnn.graph.modules import ClippedReLU
from qsnn.graph.spell import trace
from qsnn.graph.trace import call_nodes
from qsnn.quant.quantize import _LAYERS

Forward = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """A stem, whatever ``forward`` does with what it gives, and a head; layers that forwards share."""

    def __init__(self, forward: Forward, shape: tuple[int, ...] = (3, 8, 8)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = forward
        self.stem, self.mix = nn.Conv2d(shape[0], 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.up, self.wide = nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1), nn.Conv2d(16, 8, 1)
        self.position, self.gain = nn.Parameter(torch.randn(1, 8, 8, 8) / 4), nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.line, self.token = nn.Linear(8, 8), nn.Linear(64, 6)
        self.gate = qsnn.Gate(level=0.4)
        self.round = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.patch, self.coord = nn.Linear(32, 4), nn.Conv2d(10, 8, 3)
        self.register_buffer("order", torch.tensor([3, 2, 1, 0, 7, 7, 5, 4]))
        self.last = nn.LazyLinear(4)
        with torch.no_grad():
            self.norm.weight.uniform_(-1, 1)
            self.norm.bias.uniform_(-1, 1)
            self.norm.running_mean.normal_(std=0.2)
            self.train()(torch.randn(4, *shape))
        self.eval()

    def forward(self, x: Tensor) -> Any:
        x = self.way(self, x)
        done = isinstance(x, tuple | dict) or (x.dim() == 2 and x.shape[1] == 4)
        return x if done else self.last(torch.flatten(x, 1))


def a(net: Net, x: Tensor) -> Tensor:
    """Spikes of the stem, (B, 8, 8, 8)."""
    return F.relu(net.stem(x))


def b(net: Net, x: Tensor) -> Tensor:
    """A current, (B, 8, 8, 8)."""
    return net.mix(x)  # type: ignore[no-any-return]


class Through(torch.autograd.Function):
    """A ReLU whose gradient passes everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Clipped from below."""
        ctx.save_for_backward(x)
        return x.clamp(min=0)


def _iadd(net: Net, x: Tensor) -> Tensor:
    x = a(net, x)
    y = b(net, x)
    y += x
    return F.relu(y)


def _alias(net: Net, x: Tensor) -> Tensor:
    x = net.norm(net.stem(x))
    y = F.relu(x, inplace=True)  # whoever reads x from here on reads the rectified values
    return F.relu(b(net, y) + x)


def _shapes(net: Net, x: Tensor) -> Tensor:
    n, _, h, w = x.shape
    x = a(net, x)
    return F.relu(b(net, x.view(n, 8, h * w).reshape(x.size(0), -1, h, w)))


def _shortcut(net: Net, x: Tensor) -> Tensor:
    x = a(net, x)
    y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    return F.relu(net.wide(F.max_pool2d(y, 2, 2)))


def _siamese(net: Net, x: Tensor) -> Tensor:
    left, right = a(net, x), a(net, x.flip(0) * 0 + x * 0.5)
    return F.relu(net.wide(torch.cat([left, right], 1)))


FORMS: dict[str, Forward] = {
    # one activation in all spellings
    "relu function": lambda n, x: torch.relu(b(n, a(n, x))),
    "relu method": lambda n, x: b(n, a(n, x)).relu_(),
    "clamp(min=0)": lambda n, x: b(n, a(n, x)).clamp(min=0),
    "clamp(0, 2)": lambda n, x: torch.clamp(b(n, a(n, x)), 0, 0.5),
    "hardtanh": lambda n, x: F.hardtanh(b(n, a(n, x)), 0.0, 0.7),
    "relu6": lambda n, x: F.relu6(b(n, a(n, x))),
    "threshold": lambda n, x: F.threshold(b(n, a(n, x)), 0, 0),
    "maximum with 0": lambda n, x: torch.maximum(b(n, a(n, x)), torch.zeros(())),
    "a ReLU at the input": lambda n, x: F.relu(n.stem(F.relu(x))),
    # maxima
    "clamp(-0.4, 0.6)": lambda n, x: F.relu(b(n, n.stem(x).clamp(-0.4, 0.6))),
    "hardtanh from -1": lambda n, x: F.hardtanh(b(n, a(n, x))),
    "clamp(max)": lambda n, x: F.relu(b(n, a(n, x).clamp(max=0.7))),
    "maximum with a map": lambda n, x: F.relu(b(n, torch.maximum(n.stem(x), n.position))),
    "maximum of two": lambda n, x: torch.maximum(y := a(n, x), F.relu(b(n, y))),
    "minimum of currents": lambda n, x: F.relu(b(n, torch.minimum(n.stem(x), n.norm(n.stem(x))))),
    "maxout": lambda n, x: F.relu(b(n, torch.cat([torch.max(*n.stem(x).chunk(2, 1))] * 2, 1))),
    "absolute": lambda n, x: F.relu(b(n, n.stem(x).abs())),
    "amax over the map": lambda n, x: F.relu(b(n, a(n, x))).amax((2, 3)),
    "adaptive max pool": lambda n, x: F.relu(b(n, F.adaptive_max_pool2d(a(n, x), (4, None)))),
    # sizes
    "shape read": _shapes,
    "view(n, -1)": lambda n, x: F.relu(b(n, a(n, x))).view(x.size(0), -1),
    "flatten method": lambda n, x: F.relu(b(n, a(n, x))).flatten(1),
    "flatten(2)": lambda n, x: F.relu(n.token(a(n, x).flatten(2))),
    "unflatten": lambda n, x: F.relu(b(n, a(n, x).flatten(1).unflatten(1, (8, 8, 8)))),
    "negative dims": lambda n, x: F.relu(b(n, a(n, x).transpose(-1, -2).movedim(-1, -2))),
    "squeeze": lambda n, x: a(n, x).mean((-1, -2), keepdim=True).squeeze(-1).squeeze(-1),
    # averages
    "mean over the image": lambda n, x: F.relu(b(n, a(n, x))).mean((2, 3)),
    "mean(-1).mean(-1)": lambda n, x: F.relu(b(n, a(n, x))).mean(-1).mean(-1),
    "sum over the image": lambda n, x: F.relu(b(n, a(n, x))).sum((2, 3)),
    "avg_pool2d of the map": lambda n, x: F.avg_pool2d(a(n, x), x.size(3)),
    "avg_pool2d, ceil, no pad": lambda n, x: F.relu(b(n, F.avg_pool2d(
        a(n, x), 3, 2, 1, ceil_mode=True, count_include_pad=False))),
    "avg_pool2d, padded": lambda n, x: F.relu(b(n, F.avg_pool2d(n.stem(x), 3, 2, 1).relu())),
    "sum pool": lambda n, x: F.relu(b(n, F.avg_pool2d(a(n, x), 2, divisor_override=1))),
    "adaptive, unequal": lambda n, x: F.relu(b(n, F.adaptive_avg_pool2d(a(n, x), (3, 5)))),
    "adaptive of a current": lambda n, x: F.relu(F.adaptive_avg_pool2d(b(n, a(n, x)), 3)),
    "max pool, dilated": lambda n, x: F.relu(b(n, F.max_pool2d(a(n, x), 2, 1, dilation=2))),
    "max pool before the ReLU": lambda n, x: F.relu(F.max_pool2d(b(n, a(n, x)), 2)),
    # moves
    "shortcut A": _shortcut,
    "zeros joined": lambda n, x: F.relu(n.wide(torch.cat([y := a(n, x), torch.zeros_like(y)], 1))),
    "pads and cuts": lambda n, x: F.relu(b(n, F.pad(a(n, x), (1, -2, 2, 0)))),
    "chunk": lambda n, x: F.relu(b(n, torch.cat(a(n, x).chunk(2, 1)[::-1], 1))),
    "split and unbind": lambda n, x: F.relu(b(n, torch.stack(a(n, x).unbind(1), 1).split([8], 1)[0])),
    "slice with None": lambda n, x: F.relu(b(n, a(n, x)[:, None, :, 1:7].squeeze(1))),
    "channel shuffle": lambda n, x: F.relu(b(n, F.channel_shuffle(a(n, x), 2))),
    "pixel shuffle": lambda n, x: F.relu(n.mix(torch.cat([F.pixel_shuffle(a(n, x), 2)] * 4, 1))),
    "nearest upsampling": lambda n, x: F.relu(b(n, F.interpolate(a(n, x), scale_factor=2))),
    "upsampling to a size": lambda n, x: F.relu(b(n, F.interpolate(b(n, a(n, x)), size=(16, 24)))),
    "transposed convolution": lambda n, x: F.relu(n.up(a(n, x))),
    # sums, numbers, parameters
    "iadd": _iadd,
    "aliased in place": _alias,
    "alpha": lambda n, x: F.relu(torch.add(y := a(n, x), b(n, y), alpha=0.2)),
    "subtraction": lambda n, x: F.relu(b(n, y := a(n, x)) - y),
    "1 - x": lambda n, x: F.relu(1 - b(n, a(n, x))),
    "x + x": lambda n, x: F.relu(b(n, (y := a(n, x)) + y)),
    "CReLU": lambda n, x: F.relu(n.wide(torch.cat([F.relu(y := n.stem(x)), F.relu(-y)], 1))),
    "scaled by a number": lambda n, x: F.relu(b(n, a(n, x) * 0.5) / 3),
    "scaled by a parameter": lambda n, x: F.relu(b(n, a(n, x)) * n.gain),
    "scaled spikes": lambda n, x: F.relu(b(n, a(n, x) * n.gain)),
    "a number added": lambda n, x: F.relu(b(n, a(n, x) + 0.2)),
    "a position map": lambda n, x: F.relu(b(n, F.relu(n.stem(x) + n.position))),
    "a map behind the ReLU": lambda n, x: F.relu(b(n, a(n, x) + n.position)),
    "map, pad, pool": lambda n, x: F.relu(b(n, F.avg_pool2d(F.pad(a(n, x) + n.position, (1, 1, 0, 0)), 2))),
    "functional layers": lambda n, x: F.relu(F.batch_norm(
        F.conv2d(a(n, x), n.mix.weight, padding=1), n.norm.running_mean, n.norm.running_var, n.norm.weight,
        n.norm.bias)),
    # gates
    "Q-K token attention": lambda n, x: F.relu(b(n, (
        n.gate(F.relu(b(n, y := a(n, x))).unflatten(1, (2, 4)).sum(2, keepdim=True)) * y.unflatten(1, (2, 4))
    ).flatten(1, 2)) + y),
    "attention over (B, N, C)": lambda n, x: F.relu(n.line(
        n.gate(F.relu(n.line(y := a(n, x).flatten(2).mT)).sum(-1, keepdim=True)).mul(y))),
    "channel attention": lambda n, x: F.relu(b(n, (y := a(n, x)) * n.gate(y.mean((2, 3), keepdim=True)))),
    "a gate of a current": lambda n, x: F.relu(b(n, n.gate(n.norm(b(n, y := a(n, x)))) * y)),
    "a gate of a sum": lambda n, x: F.relu(b(n, n.gate(b(n, y := a(n, x)) + y) * y)),
    "a gated current": lambda n, x: F.relu(n.gate(y := a(n, x)) * b(n, y)),
    "a gated sum": lambda n, x: F.relu(n.gate(y := a(n, x)) * (n.norm(b(n, y)) + y)),
    "a gate by itself": lambda n, x: F.relu(b(n, n.gate(b(n, a(n, x))))),
    "a gate from the input": lambda n, x: F.relu(b(n, n.gate(x[:, :1]) * a(n, x))),
    "a gated input": lambda n, x: F.relu(n.stem(x * n.gate(a(n, x)[:, :1]))),
    "two gates": lambda n, x: F.relu(b(n, n.gate(y := a(n, x)) * n.gate(1 - y) * y)),
    "a shortcut of gated spikes": lambda n, x: F.relu(b(n, (y := a(n, x)) + n.gate(y[:, :1]) * F.relu(b(n, y)))),
    "gates moved and joined": lambda n, x: F.relu(b(n, torch.cat(
        [n.gate(y := a(n, x)[:, :4]), n.gate(0.3 - y)], 1).mT * a(n, x))),
    "max pool of a gate": lambda n, x: F.relu(b(n, F.max_pool2d(n.gate(y := a(n, x)), 3, 1, 1) * y)),
    "max pool before a gate": lambda n, x: F.relu(b(n, n.gate(F.max_pool2d(b(n, y := a(n, x)), 3, 1, 1)) * y)),
    "max pool of gated spikes": lambda n, x: F.relu(b(n, F.max_pool2d(n.gate((y := a(n, x))[:, :1]) * y, 2))),
    # values at other places, in any way; and numbers beside them
    "flipped, rolled, turned": lambda n, x: F.relu(b(n, torch.rot90(
        torch.roll(a(n, x).flip(-1), (1, 2), (1, 2)), 1, (2, 3)))),
    "repeated": lambda n, x: F.relu(b(n, a(n, x)[:, :4, ::2].repeat(1, 2, 1, 1).repeat_interleave(2, 2))),
    "expanded": lambda n, x: F.relu(b(n, (y := a(n, x)).mean((2, 3), keepdim=True).expand_as(y) + n.position.expand(
        len(x), -1, -1, -1))),
    "indexed": lambda n, x: F.relu(n.wide(torch.hstack([
        a(n, x[:, [2, 1, 0]])[:, n.order],
        a(n, x)[:, n.order > 3][:, :, torch.arange(7, -1, -1)].repeat(1, 2, 1, 1)]))),
    "unfolded": lambda n, x: F.relu(n.patch(F.unfold(a(n, x), 2, stride=4).mT)),
    "padded with values": lambda n, x: F.relu(n.round(F.pad(n.round(a(n, x)), (1, 2, 2, 1), "reflect")[..., 1:-2])),
    "padded with a number": lambda n, x: F.relu(b(n, F.pad(a(n, x), (1, 0, 0, 1), value=0.5))),
    "upsampled by 3/2": lambda n, x: F.relu(b(n, F.interpolate(a(n, x), size=(12, 6)))),
    "coordinates joined": lambda n, x: F.relu(n.coord(torch.cat([torch.linspace(-1, 1, 8).expand(
        len(x), 1, 8, 8), a(n, x), torch.ones(1, 1, 8, 8).expand(len(x), -1, -1, -1)], 1))),
    "chosen by a mask": lambda n, x: F.relu(b(n, torch.where(n.order > 3, a(n, x), 0.25).masked_fill(n.order == 7, 0))),
    # products by numbers, maxima over dimensions, what is made on the way
    "a matrix on the left": lambda n, x: F.relu(n.token.weight @ a(n, x).flatten(2).mT),
    "einsum by numbers": lambda n, x: torch.einsum("bchw->bc", F.relu(torch.einsum(
        "oc,bchw->bhow", n.line.weight, a(n, x))) / 64),
    "addmm": lambda n, x: F.relu(torch.addmm(n.line.bias, a(n, x).mean((2, 3)), n.line.weight)),
    "max over tokens": lambda n, x: torch.max(F.relu(b(n, a(n, x))).flatten(2), 2, keepdim=True)[0].squeeze(-1),
    "hard sigmoid": lambda n, x: F.relu(b(n, F.hardsigmoid(n.stem(x)))),
    "modules made on the way": lambda n, x: nn.Sequential(n.mix, nn.ReLU(), n.norm)[:2](nn.ReLU()(n.stem(x))),
    "an autograd function": lambda n, x: F.relu(b(n, Through.apply(n.stem(x)))),
    "checkpointed": lambda n, x: F.relu(b(n, checkpoint(lambda y: a(n, y), x, use_reentrant=False))),
    # layers called twice, branches, heads
    "a shared layer": lambda n, x: F.relu(b(n, F.relu(b(n, a(n, x))))),
    "a branch from the input": lambda n, x: F.relu(b(n, torch.cat([a(n, x)[:, :5], x], 1))),
    "a model called twice": lambda n, x: F.relu(n.wide(torch.cat([a(n, x), a(n, x * 0.5)], 1))),
    "two heads": lambda n, x: (b(n, y := a(n, x)), n.last(torch.flatten(y, 1))),
    "a map of heads": lambda n, x: {"map": b(n, y := a(n, x)), "class": n.last(torch.flatten(y, 1))},
    "softmax at the end": lambda n, x: F.log_softmax(n.last(torch.flatten(a(n, x), 1)), dim=1),
    "dropout function": lambda n, x: F.relu(b(n, F.dropout(a(n, x), 0.3, n.training))),
    # tokens
    "Linear on tokens": lambda n, x: F.relu(n.line(F.relu(n.line(a(n, x).flatten(2).transpose(1, 2))))),
    "Linear on (B, N, M, C)": lambda n, x: F.relu(n.line(a(n, x).permute(0, 2, 3, 1))),
    "mean over tokens": lambda n, x: F.relu(n.line(a(n, x).flatten(2).transpose(1, 2))).mean(1),
    "folded into the batch": lambda n, x: F.relu(n.line(a(n, x).permute(0, 2, 3, 1).reshape(-1, 8))).view(len(x), -1),
}  # fmt: skip

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
DATA = [(IMAGES, torch.zeros(6, dtype=torch.int64))]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exact_or_keeps_its_answer(form: str) -> None:
    net = Net(FORMS[form])
    qann = qsnn.quantize(net, DATA, qsnn.QuantizeConfig(weight_bits=4, levels=3)).eval()
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=3))
    certificate = qsnn.certify(snn, qann, DATA)
    assert certificate.exact, str(certificate)
    float_snn = qsnn.convert(net, DATA, qsnn.ConvertConfig(timesteps=2, correction="none"))
    qsnn.fold(float_snn)(IMAGES)
    qsnn.summary(qann)


class Leaky(nn.Module):
    """LeakyReLU as a module and as a function, PReLU with a slope for each channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)
        self.leaky, self.slopes = nn.LeakyReLU(0.2), nn.PReLU(8)
        self.slopes.weight.data.uniform_(0, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 8, 8) -> (B, 4)."""
        x = self.slopes(self.second(self.leaky(self.first(x))))
        return F.leaky_relu(self.third(x), 0.1).mean((2, 3))


def test_leaky_activations_have_levels_of_both_signs_where_asked(tmp_path: Path) -> None:
    net = Leaky().eval()
    with pytest.raises(ValueError, match=r"signed levels.*QuantizeConfig\(signed=True\)"):
        qsnn.quantize(net, DATA)
    config = qsnn.QuantizeConfig(weight_bits=8, levels=255, signed=True)
    qann = qsnn.quantize(net, DATA, config)
    assert float((qann(IMAGES) - net(IMAGES)).detach().std() / net(IMAGES).detach().std()) < 0.1
    assert qsnn.certify(qsnn.convert(qann), qann, DATA[:1]).exact
    assert any(parameter.shape == (8, 1, 1) for parameter in qann.parameters()), "slopes are trained on"
    qsnn.save(qann, tmp_path / "qann", model_name="test_kinds:Leaky")
    assert torch.equal(qsnn.load(tmp_path / "qann", model=Leaky)(IMAGES), qann.eval()(IMAGES))


def test_what_gives_values_within_values_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.last = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.cell(x)[0][:, -1]))

    with pytest.raises(ValueError, match=r"cell \(LSTM: a recurrent layer has its own time"):
        qsnn.quantize(Recurrent(), [(torch.randn(4, 5, 8), torch.zeros(4, dtype=torch.int64))])


def test_a_named_tuple_of_heads_goes_by_its_names() -> None:
    class Heads(NamedTuple):
        map: Tensor
        points: Tensor

    net = Net(lambda n, x: Heads(b(n, y := a(n, x)), n.last(torch.flatten(y, 1))))
    assert list(qsnn.quantize(net, DATA)(IMAGES)) == ["map", "points"]


def test_what_is_moved_is_moved_as_torch_does() -> None:
    """Each form of places by itself, without levels that would hide a value at the wrong place."""
    x = torch.arange(2 * 8 * 8 * 8.0).view(2, 8, 8, 8)
    moves: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.flip((1, 3)), lambda y: y.roll(3, 2), lambda y: y.tile((1, 2, 1)), lambda y: y.rot90(1, (1, 2)),
        lambda y: y[:, :1].expand(len(y), 8, 8, 8)[:, :, [1, 1, 0]], lambda y: y.tril(), lambda y: y.diagonal(0, 2, 3),
        lambda y: y.unfold(2, 3, 2), lambda y: F.unfold(y, 3, padding=1), lambda y: F.pad(y, (2, 1, 1, 2), "circular"),
        lambda y: y.repeat_interleave(torch.tensor([1, 0, 2, 1, 1, 1, 1, 3]), 3),
        lambda y: y[:, torch.arange(8) % 3 == 0],
        lambda y: y[..., [0, 3], 2:], lambda y: y[:, [1, 2], [3, 4]], lambda y: F.interpolate(y, (5, 12)),
    ]  # fmt: skip
    for move in moves:
        network = trace(Moved(move), (8, 8, 8))
        assert torch.equal(network(x), move(x))
        assert {does(module) for _, module in call_nodes(network)} == {"moves"}


class Moved(nn.Module):
    """What a function does."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return self.move(x)


def test_a_maximum_over_channels_has_one_threshold_or_is_refused() -> None:
    net = Net(lambda n, x: n.token(F.relu(b(n, a(n, x))).amax(1).flatten(1)))
    net.last = nn.Linear(6, 4)
    qann = qsnn.quantize(net, DATA, qsnn.QuantizeConfig(levels=3)).eval()
    assert qsnn.certify(qsnn.convert(qann), qann, DATA).exact
    with pytest.raises(ValueError, match=r"amax\w* \(a maximum over channels, .*quantize\(model, data\) first"):
        qsnn.convert(net, DATA)


@pytest.mark.parametrize("bits", [1, 16])
def test_what_makes_large_sums_or_signs_is_exact_too(bits: int) -> None:
    """fp16 weights right behind others make sums beyond the 53 bits of float64; a maximum of signs is -1 or 1."""
    net = Net(FORMS["max pool before the ReLU"] if bits == 1 else lambda n, x: F.relu(b(n, n.stem(x))))
    config = qsnn.QuantizeConfig(weight_bits=bits, act_form="sign" if bits == 1 else "levels")
    qann = qsnn.quantize(net, DATA, config).eval()
    timesteps = 1 if bits == 1 else 2
    certificate = qsnn.certify(qsnn.convert(qann, qsnn.ConvertConfig(timesteps=timesteps)), qann, DATA)
    assert certificate.exact, str(certificate)


def test_the_square_of_quantized_values_is_exact_deferred() -> None:
    net = Net(lambda n, x: torch.square(a(n, x)) + b(n, a(n, x) ** 2))
    qann = qsnn.quantize(net, DATA, qsnn.QuantizeConfig(levels=3)).eval()
    assert qsnn.certify(qsnn.convert(qann, qsnn.ConvertConfig(firing="deferred")), qann, DATA).exact


@dataclass
class Answer:
    """As many libraries answer."""

    logits: Tensor
    loss: Tensor | None = None


def test_answers_come_in_any_structure(tmp_path: Path) -> None:
    shapes: dict[str, Forward] = {
        "a dataclass": lambda n, x: Answer(n.last(torch.flatten(a(n, x), 1))),
        "None beside": lambda n, x: {"logits": n.last(torch.flatten(a(n, x), 1)), "loss": None},
    }
    for name, forward in shapes.items():
        net = Net(FORMS["relu function"])
        net.way = forward
        qann = qsnn.quantize(Structured(net), DATA, qsnn.QuantizeConfig(levels=3)).eval()
        found = qann(IMAGES)
        assert list(found) == ["logits"], name
        assert qsnn.certify(qsnn.convert(qann), qann, DATA).exact
        assert list(qsnn.fold(qsnn.convert(qann))(IMAGES)) == ["logits"]
    twice = Net(lambda n, x: (y := n.last(torch.flatten(a(n, x), 1)), y))
    folded = qsnn.fold(qsnn.convert(twice, DATA))
    first, second = folded(IMAGES)
    assert torch.equal(first, second)
    written = pytest.importorskip("onnx").load(qsnn.export(folded, tmp_path / "twice.onnx", firing="deferred"))
    assert [output.name for output in written.graph.output] == ["logits", "logits_1"]


class Structured(nn.Module):
    """Takes options, as many models do, and hands its answer on as it is."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, **options: Any) -> Any:
        """(B, *) -> an answer."""
        assert not options.get("labels"), f"none at inference: {options}"
        return self.net.way(self.net, x)


def test_a_hook_before_a_layer_shows() -> None:
    net = Net(FORMS["relu function"])
    net.mix.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(ValueError, match=r"does not answer as the network itself: they differ from layer mix on"):
        qsnn.quantize(net, DATA)


def test_batch_norm_of_several_processes_is_a_batch_norm() -> None:
    net = Net(FORMS["a gate of a current"])
    network = trace(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)), (3, 8, 8))
    assert type(network.get_submodule("norm")) is nn.BatchNorm2d
    assert torch.equal(network(IMAGES), net(IMAGES))


SHAPES = {
    "volumes": ((2, 6, 6, 6), [nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(
        4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)]),
    "signals": ((2, 12), [nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2), nn.ConvTranspose1d(
        4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)]),
    "vectors": ((7,), [nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_volumes_signals_and_vectors(name: str) -> None:
    shape, layers = SHAPES[name]
    data = [(torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.int64))]
    qann = qsnn.quantize(nn.Sequential(*layers).eval(), data, qsnn.QuantizeConfig(levels=3)).eval()
    certificate = qsnn.certify(qsnn.convert(qann), qann, data)
    assert certificate.exact, str(certificate)


def test_sixteen_bits_and_many_levels_stay_near_the_float_network() -> None:
    for form in ("aliased in place", "sum pool", "alpha", "shape read", "a map behind the ReLU"):
        net = Net(FORMS[form])
        with torch.no_grad():
            fine = qsnn.quantize(net, DATA, qsnn.QuantizeConfig(weight_bits=8, levels=255)).eval()(IMAGES)
            assert float((fine - net(IMAGES)).std() / net(IMAGES).std()) < 0.05, form


def test_every_pass_knows_every_kind() -> None:
    for kind in KINDS:
        assert kind.does in DOES
        assert kind.does in FOLD or kind.does == "fires", kind.name  # what fires is a neuron by then
        if kind.does == "weighs":
            assert all(module in _LAYERS for module in kind.modules), kind.name
    classes = [module for kind in KINDS for module in kind.modules]
    assert len(classes) == len(set(classes)), "a class belongs to one kind"


def test_a_class_counts_as_its_parent_only_where_it_computes_the_same() -> None:
    class Same(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    assert does(Same(1, 1, 1)) == "weighs" and kind_of(Other(1, 1, 1)) is None
    assert refused(nn.GELU()) == f"GELU: {ADVICE['GELU']}"


def test_one_activation_is_one_module() -> None:
    for form in ("relu function", "relu method", "clamp(min=0)", "threshold", "maximum with 0"):
        network = trace(Net(FORMS[form]), (3, 8, 8))
        assert [type(m) for _, m in call_nodes(network) if does(m) == "fires"] == [nn.ReLU, nn.ReLU], form
    clipped = [m for _, m in call_nodes(trace(Net(FORMS["clamp(0, 2)"]), (3, 8, 8))) if isinstance(m, ClippedReLU)]
    assert clipped[0].cap == 0.5


REFUSED: dict[str, tuple[Forward, str]] = {
    "a product": (lambda n, x: F.relu(b(n, b(n, y := a(n, x)) * y)), "mul: a product of two values"),
    "attention": (lambda n, x: F.relu(b(n, b(n, y := a(n, x)) @ y.mT)), r"matmul: a product .* qsnn\.Gate\(level\)"),
    "the image times itself": (lambda n, x: F.relu(n.stem(x * x)), "of quantized values alone: put nn.ReLU behind"),
    "a product over the batch": (lambda n, x: (y := a(n, x).flatten(1)) @ y.T @ y, "moves the batch"),
    "an einsum of three": (lambda n, x: torch.einsum("bchw,bchw,bchw->bchw", y := a(n, x), y, y), "takes two values"),
    "a diagonal": (lambda n, x: torch.einsum("bcnn,bchw->bchw", y := a(n, x), y), "no letter twice"),
    "softmax attention": (lambda n, x: (y := a(n, x)) @ (y @ y.mT).softmax(-1), r"relu\(q\) @ \(relu\(k\)\.mT"),
    "an average by the image": (lambda n, x: (y := a(n, x)) / y.sum((1, 2, 3), keepdim=True), "divides by a value"),
    "a comparison": (lambda n, x: F.relu(b(n, (y := a(n, x)) * (y > 0.5))), r"gt: use qsnn\.Gate\(level\)"),
    "over the batch": (lambda n, x: F.relu(b(n, a(n, x) - a(n, x).mean(0, keepdim=True))), "dimension 0, the batch"),
    "a softmax inside": (lambda n, x: F.relu(b(n, a(n, x).softmax(1))), r"softmax: .*right before the output.*\.Gate"),
    "a mean of windows": (lambda n, x: F.relu(b(n, F.interpolate(a(n, x), (8, 8), mode="area"))), "mode 'area'"),
    "images turned round": (lambda n, x: F.relu(b(n, a(n, x)) + a(n, x).flip(0)), "flip moves the batch, or mixes"),
    "a choice by values": (lambda n, x: b(n, torch.where((y := n.stem(x)) > 0, y, 0 * y)), "a ReLU, a clamp, or"),
    "scores are decided": (lambda n, x: a(n, x) + a(n, x).argmax(1, keepdim=True), "argmax: a network gives its"),
    "places of maxima": (lambda n, x: a(n, x) + a(n, x).max(3, keepdim=True)[1].float(), "spikes carry none"),
    "noise": (lambda n, x: F.relu(b(n, a(n, x) + torch.randn_like(x[:, :1]))), "randn_like: what is drawn at random"),
    "numbers that nobody thought of": (lambda n, x: F.relu(b(n, a(n, x))).cumsum(1), "cumsum: write it as"),
    "bilinear": (lambda n, x: F.avg_pool2d(F.interpolate(a(n, x), scale_factor=2, mode="bilinear"), 2), "bilinear"),
    "a leaky ReLU": (lambda n, x: F.leaky_relu(b(n, a(n, x))), "signed"),
    "dropout that never stops": (lambda n, x: F.relu(b(n, F.dropout(a(n, x), 0.5))), "training=self.training"),
    "values decide": (lambda n, x: F.relu(b(n, a(n, x))) if x.sum() > 0 else a(n, x), "depends on the values"),
    "written in place": (lambda n, x: _written(n, x), "in place"),
    "a view changed in place": (lambda n, x: _stale(n, x), "in place"),
}


def _written(net: Net, x: Tensor) -> Tensor:
    x = a(net, x)
    x[:, 0] = 0
    return x


def _stale(net: Net, x: Tensor) -> Tensor:
    y = net.stem(x)
    part = y[:, :4]
    y.relu_()
    return F.relu(torch.cat([part, y], 1))


@pytest.mark.parametrize("form", REFUSED)
def test_what_has_no_spiking_form_is_refused_by_name(form: str) -> None:
    forward, message = REFUSED[form]
    with pytest.raises(ValueError, match=message):
        net = Net(lambda n, x: F.relu(n.stem(x)))
        net.way = forward
        qsnn.quantize(net, DATA)


def test_all_places_are_named_at_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.LayerNorm(6), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(ValueError, match=r"1 \(GELU: .*; 2 \(LayerNorm: put nn\.BatchNorm"):
        qsnn.quantize(net, DATA)


def test_a_network_that_answers_otherwise_than_its_graph_is_refused() -> None:
    net = Net(FORMS["relu function"])
    net.mix.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match=r"does not answer as the network itself: they differ from layer mix on"):
        qsnn.quantize(net, DATA)


def test_every_module_keeps_its_own_training_flag() -> None:
    net = Net(FORMS["a shared layer"]).train()
    net.norm.eval()
    before = {name: module.training for name, module in net.named_modules()}
    qann = qsnn.quantize(net, DATA)
    qsnn.convert(net, DATA)
    assert {name: module.training for name, module in net.named_modules()} == before
    assert qann.get_submodule("stem").training
