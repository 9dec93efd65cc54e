"""Whole random networks are EXACT: hypothesis draws the shape of the net, the bits, and awkward batch norms."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qsnn


class RandomNet(nn.Module):
    """Blocks drawn by hypothesis, one after the other; each knows how it joins its input."""

    def __init__(self, blocks: list[dict], channels: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plan = blocks
        self.blocks = nn.ModuleList()
        self.pools = nn.ModuleList()
        width, side, averaged = channels, 16, False
        for block in blocks:
            groups = block["groups"] if width % block["groups"] == 0 and block["width"] % block["groups"] == 0 else 1
            out = width if block["join"] == "residual" else block["width"]
            groups = groups if out % groups == 0 else 1
            same, shown = block["join"] != "none", side
            kernel, stride = block["kernel"], 1 if same or side < 6 else block["stride"]
            padding = kernel // 2 if same or side < 6 else block["padding"]
            side = (side + 2 * padding - kernel) // stride + 1
            pool = block["pool"] if side >= 4 else "none"
            averaged = averaged and block["join"] == "concat"
            if averaged and pool == "max":
                pool = "avg"  # the maximum of averaged spikes is not what spikes could carry; convert refuses it
            averaged = averaged or pool == "avg"
            side = side if pool == "none" else side // 2
            layers: list[nn.Module] = [
                nn.Conv2d(width, out, kernel, stride, padding, groups=groups, bias=block["bias"])
            ]
            if block["linear"]:  # a linear bottleneck: a convolution right behind a convolution
                layers.append(nn.Conv2d(out, out, 1, bias=False))
            if block["norm"]:
                layers.append(awkward(nn.BatchNorm2d(out), block["seed"]))
            if block["join"] != "residual":
                layers.append(nn.ReLU())
            self.blocks.append(nn.Sequential(*layers))
            if block["extra"] in ("shift", "map"):  # numbers, or a map of them, added to what the block gets
                sides = (1, 1) if block["extra"] == "shift" else (shown, shown)
                self.register_parameter(f"added_{len(self.blocks)}", nn.Parameter(torch.randn(1, width, *sides) / 8))
            pools = {"avg": nn.AvgPool2d(2), "max": nn.MaxPool2d(2), "none": nn.Identity()}
            self.pools.append(pools[pool])
            width = width + out if block["join"] == "concat" else out
        self.relus = nn.ModuleList(nn.ReLU() for _ in blocks)
        self.gates = nn.ModuleList(qsnn.Gate(block["level"]) for block in blocks)
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        for place, (block, layers, pool, relu) in enumerate(
            zip(self.plan, self.blocks, self.pools, self.relus, strict=True), 1
        ):
            y = layers(changed(x, block["extra"], getattr(self, f"added_{place}", None)))
            if block["join"] == "residual":
                y = relu(torch.add(y, x, alpha=0.5 if block["extra"] == "alpha" else 1))
            elif block["join"] == "concat":
                y = torch.cat([x, y], 1)
            x = pool(gated(y, block["gate"], self.gates[place - 1]))
        return self.last(x)


def changed(x: Tensor, extra: str, added: Tensor | None) -> Tensor:
    """What stands before a block's convolution: moves, zeros, numbers; the shape stays."""
    if extra == "shuffle" and x.shape[1] % 2 == 0:
        return torch.cat(x.chunk(2, 1)[::-1], 1).transpose(-1, -2)
    if extra == "zeros":
        return F.pad(F.pad(x, (1, 1, 0, 0))[..., 1:-1], (0, 0, 0, 0, 1, 1))[:, 1:-1]
    if extra == "thinned":
        return F.interpolate(x[:, :, ::2, ::2], size=tuple(x.shape[2:]))[:, :, : x.size(2)] if x.size(2) % 2 == 0 else x
    if extra == "scale":
        return 0.5 * x
    if extra == "token":
        return x.flatten(2).mT.mT.unflatten(2, tuple(x.shape[2:]))
    return x if added is None else x + added


def gated(y: Tensor, how: str, gate: nn.Module) -> Tensor:
    """What stands behind a block's activation: gates of all kinds, from spikes and from currents."""
    if how == "heads" and y.shape[1] % 2 == 0:
        heads = y.unflatten(1, (2, -1))
        return (gate(heads.sum(2, keepdim=True)) * heads).flatten(1, 2)
    if how == "tokens":
        return y * gate(y.mean(1, keepdim=True))
    if how == "channels":
        return gate(y.sum((2, 3), keepdim=True)) * y
    if how == "twice":
        return gate(y.mean(1, keepdim=True)) * y * gate(0.3 - y[:, :1])
    if how == "alone":
        return gate(y)
    if how == "shifted":  # what is gated holds a bias, which the gate shuts too
        return F.relu(gate(y[:, -1:].mT) * (y - 0.1))
    return y


def awkward(norm: nn.Module, seed: int) -> nn.Module:
    """Negative and zero γ, channels that never or always fire."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.weight.shape, generator=generator))
        norm.bias.copy_(torch.randn(norm.weight.shape, generator=generator))
        norm.running_mean.copy_(torch.randn(norm.weight.shape, generator=generator) * 0.2)
        norm.running_var.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.1)
        norm.weight[0] = 0.0
        norm.bias[-1] = -50.0  # dead
        if len(norm.bias) > 2:
            norm.bias[1] = 50.0  # always on
    return norm


GATES = ["none", "none", "heads", "tokens", "channels", "twice", "alone", "shifted"]
BLOCK = st.fixed_dictionaries({
    "width": st.sampled_from([2, 4, 6]),
    "kernel": st.sampled_from([1, 3]),
    "stride": st.sampled_from([1, 2]),
    "padding": st.sampled_from([0, 1]),
    "groups": st.sampled_from([1, 2]),
    "bias": st.booleans(),
    "norm": st.booleans(),
    "linear": st.sampled_from([False, False, True]),
    "join": st.sampled_from(["none", "none", "residual", "concat"]),
    "pool": st.sampled_from(["none", "none", "avg", "max"]),
    "extra": st.sampled_from(
        ["none", "none", "shuffle", "zeros", "thinned", "scale", "token", "shift", "map", "alpha"]
    ),
    "gate": st.sampled_from(GATES),
    "level": st.sampled_from([-0.5, 0.0, 0.25, 0.5, 1.0, 3.0]),
    "seed": st.integers(0, 1000),
})  # fmt: skip


SETTINGS = settings(
    max_examples=int(os.environ["QSNN_RANDOM_NETS"]),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)


@SETTINGS
@given(
    blocks=st.lists(BLOCK.map(lambda block: {**block, "gate": "none"}), min_size=1, max_size=3),
    weight_bits=st.sampled_from([1, 2, 3, 4, 8, 16]),
    levels=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 1000),
)
def test_every_random_network_is_exact(blocks: list[dict], weight_bits: int, levels: int, seed: int) -> None:
    certify_random_net(blocks, weight_bits, levels, seed)


@SETTINGS
@given(
    blocks=st.lists(BLOCK, min_size=1, max_size=3),
    gate=st.sampled_from([gate for gate in GATES if gate != "none"]),
    weight_bits=st.sampled_from([1, 2, 3, 4, 8, 16]),
    levels=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 1000),
)
def test_every_random_network_with_gates_is_exact(
    blocks: list[dict], gate: str, weight_bits: int, levels: int, seed: int
) -> None:
    certify_random_net([{**blocks[0], "gate": gate}, *blocks[1:]], weight_bits, levels, seed)


STEPS = (
    "plain", "up", "transposed", "clipped", "minus", "tokens", "shared", "input", "places", "maximum", "absolute",
)  # fmt: skip


class Various(nn.Module):
    """Steps of one width, of signals or images, that RandomNet does not have."""

    def __init__(self, plan: list[str], dims: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plan, self.dims = plan, dims
        conv: type[nn.Module] = nn.Conv1d if dims == 1 else nn.Conv2d
        turned: type[nn.Module] = nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose2d
        self.stem, self.same, self.last = conv(2, 4, 3, padding=1), conv(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.layers = nn.ModuleList()
        for place, step in enumerate(plan):
            layer: nn.Module = conv(6 if step == "input" else 4, 4, 3, padding=1)
            layer = nn.Linear(4, 4) if step == "tokens" else layer
            if step == "transposed":
                layer = turned(4, 4, 3, 2, 1, output_padding=1, groups=1 + place % 2)
            self.layers.append(layer)
        norm: type[nn.Module] = nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d
        self.norms = nn.ModuleList(awkward(norm(4), seed + place) for place, _ in enumerate(plan))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2, *) -> (B, 3)."""
        y = F.relu(self.stem(x))
        for step, layer, norm in zip(self.plan, self.layers, self.norms, strict=True):
            y = getattr(self, step)(y, x, layer, norm)
            y = y[..., ::2] if y.shape[-1] > 16 else y
            y = y[:, :, ::2] if y.shape[2] > 16 else y
        return self.last(y.flatten(2).mean(2))

    def plain(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        """A layer, a norm, a ReLU; so are the other steps, but for what their names say."""
        return F.relu(norm(layer(y)))

    def up(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return F.relu(norm(layer(F.interpolate(y, scale_factor=2))))

    transposed = plain

    def clipped(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return F.hardtanh(norm(layer(F.relu6(layer(y)))), -0.25 * (y.shape[-1] % 3), 0.75)

    def minus(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return F.relu(norm(layer(y)) - y)

    def tokens(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return F.relu(norm(layer(y.flatten(2).mT).mT.reshape(y.shape)))

    def shared(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return F.relu(norm(self.same(F.relu(norm(self.same(y))))))

    def input(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return F.relu(norm(layer(torch.cat([F.interpolate(x, size=y.shape[2:]), y], 1))))

    def places(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        y = F.pad(y[:, [2, 0, 1, 1]].flip(-1), (2, 0, 0, 0)[: 2 * self.dims], "replicate")
        return F.relu(norm(layer(y.roll(1, -1)[..., 1:-1])))

    def maximum(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return torch.maximum(y, F.relu(norm(layer(y))))

    def absolute(self, y: Tensor, x: Tensor, layer: nn.Module, norm: nn.Module) -> Tensor:
        return norm(layer(y)).abs()


@settings(SETTINGS, max_examples=max(1, int(os.environ["QSNN_RANDOM_NETS"]) // 3))
@given(
    plan=st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
    dims=st.sampled_from([1, 2]),
    weight_bits=st.sampled_from([1, 2, 3, 4, 8, 16]),
    levels=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 1000),
)
@example(plan=["plain", "transposed"], dims=2, weight_bits=1, levels=2, seed=3)  # in groups
def test_every_random_network_of_other_steps_is_exact(
    plan: list[str], dims: int, weight_bits: int, levels: int, seed: int
) -> None:
    certify(Various(plan, dims, seed), (2, *[6 + seed % 7] * dims), weight_bits, levels, seed)


def certify_random_net(blocks: list[dict], weight_bits: int, levels: int, seed: int) -> None:
    first = {**blocks[0], "join": "none", "linear": False, "extra": "none"}
    certify(RandomNet([first, *blocks[1:]], channels=2, seed=seed), (2, 16, 16), weight_bits, levels, seed)


def certify(net: nn.Module, shape: tuple[int, ...], weight_bits: int, levels: int, seed: int) -> None:
    images = torch.randn(8, *shape, generator=torch.Generator().manual_seed(seed))
    data = [(images, torch.zeros(8, dtype=torch.int64))]
    config = qsnn.QuantizeConfig(weight_bits=weight_bits, levels=levels)
    qann = qsnn.quantize(net.eval(), data, config).eval()
    certificate = qsnn.certify(qsnn.convert(qann), qann, data)
    assert certificate.exact, str(certificate)
