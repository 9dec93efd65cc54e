"""fold() and certify(): spikes and answers stay (law 4), the SNN is the QANN (law 2), and a broken one is caught."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from conftest import plain_net, scramble
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qsnn
from qsnn.folded.builder import Builder
from qsnn.folded.firing import online, twice
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import IntegerInput, IntegerLayer
from qsnn.graph.call import Call, calling
from qsnn.snn.neurons import IFNode


def recorded(model: qsnn.SNN, images: Tensor, **options: object) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [m.register_forward_hook(lambda m, a, y, n=n: found.update({n: y})) for n, m in model.neurons()]
    with torch.no_grad():
        out = model(images, **options)
    for hook in hooks:
        hook.remove()
    return found, out


class Mixed(nn.Module):
    """Residual sums with and without a convolution, average and max pooling, depthwise, grouped, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.join = nn.ReLU()
        self.max = nn.MaxPool2d(2)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())
        self.squeeze, self.expand = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 8, 3, padding=1)  # a linear bottleneck
        self.act, self.pool = nn.ReLU(), nn.AvgPool2d(2)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.max(self.join(self.depthwise(x) + x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.pool(self.act(self.expand(self.squeeze(x)))))


NETS = {
    "average pooling": lambda data: qsnn.create_model("vgg-small", data),
    "max pooling": lambda data: qsnn.create_model("vgg-small", data, pooling="max"),
    "residual": lambda data: qsnn.create_model("resnet-small", data),
    "mixed": lambda data: Mixed(),
}


@pytest.fixture(scope="module", params=NETS)
def pair(request: pytest.FixtureRequest, digits: qsnn.Data) -> tuple[nn.Module, qsnn.SNN]:
    torch.manual_seed(1)
    model = scramble(NETS[request.param](digits))
    qann = qsnn.quantize(model, digits, qsnn.QuantizeConfig(weight_bits=4, levels=2)).eval()
    return qann, qsnn.convert(qann)


@pytest.mark.parametrize(("firing", "timesteps"), [("online", 2), ("online", 7), ("deferred", 2)])
def test_fold_leaves_every_spike_and_answer(
    pair: tuple[nn.Module, qsnn.SNN], images: Tensor, firing: str, timesteps: int
) -> None:
    _, snn = pair
    folded = qsnn.fold(snn)
    ours, answers = recorded(folded, images, firing=firing, timesteps=timesteps)
    theirs, expected = recorded(snn, images, firing=firing, timesteps=timesteps)
    assert list(ours) == list(theirs)
    flips = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    total = sum(spikes.numel() for spikes in ours.values())
    assert flips <= 2e-5 * total, f"float32 flips {flips} of {total}"
    assert float((answers.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.99


def test_the_snn_is_the_qann(pair: tuple[nn.Module, qsnn.SNN], digits: qsnn.Data) -> None:
    qann, snn = pair
    certificate = qsnn.certify(snn, qann, digits.train, images=1000)
    assert certificate.verdict == "EXACT", str(certificate)
    assert all(layer.elements > 0 for layer in certificate.layers)


@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("levels", [1, 3, 15])
def test_exact_at_every_precision(bits: int, levels: int, teacher: nn.Module, digits: qsnn.Data) -> None:
    qann = qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(weight_bits=bits, levels=levels)).eval()
    certificate = qsnn.certify(qsnn.convert(qann), qann, digits.test, images=40)
    assert certificate.exact, str(certificate)


def test_one_level_nets_are_exact_online_at_one_step(teacher: nn.Module, digits: qsnn.Data) -> None:
    qann = qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(weight_bits=1, levels=1)).eval()
    certificate = qsnn.certify(qsnn.convert(qann), qann, digits.test, firing="online", images=200)
    assert certificate.exact and certificate.timesteps == 1, str(certificate)


def test_ties_are_met_and_are_equal(digits: qsnn.Data) -> None:
    qann = plain_net(digits)
    snn = qsnn.convert(qann)
    certificate = qsnn.certify(snn, qann, digits.test)
    assert certificate.exact, str(certificate)
    assert sum(layer.ties for layer in certificate.layers) > 100
    x = next(qsnn.batches(digits.test, 540))[0]
    ours, answers = recorded(qsnn.fold(snn), x, timesteps=4)
    theirs, expected = recorded(snn, x, timesteps=4)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), "exact in float32, so no flip is allowed"
    assert torch.equal(answers.argmax(-1), expected.argmax(-1))


def broken_weight(snn: qsnn.SNN) -> qsnn.SNN:
    folded = qsnn.fold(snn)
    layer = [m for m in folded.modules() if isinstance(m, IntegerLayer)][1]
    layer.weight.view(-1)[5] ^= 1
    return folded


def broken_start(snn: qsnn.SNN) -> qsnn.SNN:
    for module in snn.modules():
        if isinstance(module, IFNode):
            module.initial = torch.zeros_like(module.initial)
    return qsnn.fold(snn)


def broken_threshold(snn: qsnn.SNN, strict: bool = False) -> qsnn.SNN:
    """One integer threshold higher by one; or all of them, which is > for >=."""
    folded = qsnn.fold(snn)
    neuron = next(m for m in folded.modules() if isinstance(m, IntegerIF))
    original = neuron._exact_table
    seen: list[Tensor] = []
    handle = neuron.register_forward_pre_hook(lambda m, args: seen.append(args[0].unflatten(0, (2, -1)).sum(0)))
    with torch.no_grad():
        folded(next(qsnn.batches(qsnn.load_data("digits").test, 200))[0], timesteps=2, firing="deferred")
    handle.remove()
    limits = neuron.table(2, "deferred")[0, 0].view(1, -1, 1, 1)
    reached = int((seen[0] == limits).sum((0, 2, 3)).argmax())  # a channel in which some image meets the threshold
    neuron._prepared.clear()

    def table(timesteps: int, last_only: bool) -> Tensor:
        exact = original(timesteps, last_only)
        exact[..., slice(None) if strict else reached] += 1
        return exact

    neuron._exact_table = table
    return folded


BREAKS = {
    "weight bit": broken_weight,
    "v0": broken_start,
    "threshold": broken_threshold,
    "greater": lambda snn: broken_threshold(snn, strict=True),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_network_is_not_exact(name: str, digits: qsnn.Data) -> None:
    qann = plain_net(digits)
    certificate = qsnn.certify(BREAKS[name](copy.deepcopy(qsnn.convert(qann))), qann, digits.test)
    assert not certificate.exact and "EXACT" not in str(certificate)
    assert any(words in certificate.verdict for words in ("(first: layer ", "look at the readout", "lie at a tie"))


def test_folded_outputs_do_not_depend_on_the_batch(snn: qsnn.SNN, images: Tensor) -> None:
    folded = qsnn.fold(snn)
    with torch.no_grad():
        together = folded(images)
        alone = torch.cat([folded(image[None]) for image in images], 1)
        assert torch.equal(together, alone)
        assert torch.equal(together.flip(1), folded(images.flip(0)))
        assert torch.equal(together, folded(images)), "nor on the batch before"


def test_fold_holds_integers_and_leaves_its_argument(snn: qsnn.SNN) -> None:
    before = copy.deepcopy(snn.state_dict())
    folded = qsnn.fold(snn)
    assert not list(folded.parameters())
    assert all(m.weight.dtype == torch.int8 for m in folded.modules() if isinstance(m, IntegerLayer))
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())


@given(
    theta=st.integers(1, 64), gain=st.integers(1, 64), bias=st.integers(-64, 64), steps=st.integers(1, 6),
    inputs=st.lists(st.integers(-40, 40), min_size=6, max_size=6),
)  # fmt: skip
def test_integer_thresholds_are_the_if_neuron(theta: int, gain: int, bias: int, steps: int, inputs: list[int]) -> None:
    scale = 2.0**-4
    neuron = IntegerIF(
        torch.tensor([[gain * scale]], dtype=torch.float64), 1, torch.tensor([bias * scale], dtype=torch.float64),
        torch.tensor(theta * scale), 0.5, 40.0, (),
    )  # fmt: skip
    reference = IFNode(theta * scale)
    a = torch.tensor(inputs[:steps]).float().view(steps, 1)
    for firing in ("online", "deferred"):
        reference.firing = firing
        reference.reset()
        expected = reference((a * gain + bias).mul(scale).view(steps, 1, 1)).view(steps, 1)
        with calling(Call(steps, firing)):
            assert torch.equal(neuron(a), expected), firing


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_dead_channel_fires_by_its_bias(sign: float) -> None:
    neuron = IntegerIF(torch.zeros(1, 1), 1, torch.tensor([sign], dtype=torch.float64), torch.tensor(1.0), 0.5, 1.0, ())
    with calling(Call(3)):
        assert torch.equal(neuron(torch.ones(3, 1)), torch.full((3, 1), max(0.0, sign)))


def _negated(x: Tensor) -> Tensor:
    return -x


def _reversed(x: Tensor) -> Tensor:
    return x.flip(0)


def _more(x: Tensor) -> Tensor:
    return x + 0.1 * (x.double().abs().max() if bool(x.any()) else 1)


def _doubled(x: Tensor) -> Tensor:
    return x * 2


FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "sign": ("weight", _negated),
    "order of channels": ("weight", _reversed),
    "bias": ("bias", _more),
    "threshold": ("threshold", _doubled),
    "v0": ("initial", _doubled),
    "divisor": ("divisor", _doubled),
    "divisors": ("divisors", _doubled),
    "gain": ("factors", _doubled),
    "gains": ("factors_0", _doubled),
    "step": ("step", _doubled),
    "level": ("level", lambda x: x + 1),
}


class Gated(nn.Module):
    """A gate times spikes, behind a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), nn.Conv2d(6, 6, 1)
        self.gate, self.pool, self.head = qsnn.Gate(0.1), nn.AvgPool2d(3), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.pool(x * self.gate(self.side(x))).flatten(1))


@pytest.mark.parametrize("kind", ["quantized", "float", "gated", "leaky"])
def test_a_fault_in_any_layer_is_refused_by_name(kind: str, digits: qsnn.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault is planted in every layer that can have it; each of them must be found, where it is."""
    torch.manual_seed(2)
    net = scramble(Mixed() if kind in ("quantized", "float") else Gated())
    few = digits.train.head(16)
    config = qsnn.QuantizeConfig(weight_bits=4, levels=2, input_bits=None if kind == "leaky" else 8)
    dynamics = qsnn.ConvertConfig(tau=(4.0,)) if kind == "leaky" else qsnn.ConvertConfig()
    snn = qsnn.convert(net, few) if kind == "float" else qsnn.convert(qsnn.quantize(net, few, config), dynamics)
    put, seen, plant = Builder.call, [], [0, "", _negated]

    def call(self: Builder, name: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        place, what, change = plant
        seen.append((name, module))
        if len(seen) == place:
            getattr(module, what).data = change(getattr(module, what))
        return put(self, name, module, *inputs)

    monkeypatch.setattr(Builder, "call", call)
    qsnn.fold(snn)
    layers, tried = list(seen), set()
    for place, (name, module) in enumerate(layers, 1):
        for fault, (what, change) in FAULTS.items():
            value = getattr(module, what, None)
            unread = what == "threshold" and getattr(module, "unit", False)  # its layer counts in θ
            if unread or not isinstance(value, Tensor) or torch.equal(change(value), value):
                continue
            plant[:] = place, what, change
            seen.clear()
            with pytest.raises(ValueError, match="they differ from") as found:
                qsnn.fold(snn)
            said, last = str(found.value), name == "readout"
            assert last or name.removesuffix("_input") in said.replace(".", "_") or name in said, (fault, said)
            tried.add(fault)
    assert {"sign", "order of channels", "bias"} <= tried
    plant[:] = 0, "", _negated
    seen.clear()
    qsnn.fold(snn)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_are_no_fault(dtype: torch.dtype, digits: qsnn.Data) -> None:
    """Where potentials meet θ, rounding decides, and what a neuron does next hangs on it: no reason to refuse."""
    assert qsnn.fold(qsnn.convert(plain_net(digits), qsnn.ConvertConfig(timesteps=8)), dtype=dtype).folded
    for name in ("resnet-small", "study"):
        net = scramble(qsnn.create_model(name, digits))
        config = qsnn.ConvertConfig(timesteps=8, threshold="max", correction="none", calibration_images=16)
        assert qsnn.fold(qsnn.convert(net, digits, config), dtype=dtype).folded


def test_refusals(snn: qsnn.SNN, qann: nn.Module, teacher: nn.Module, digits: qsnn.Data) -> None:
    with pytest.raises(TypeError, match="expected an SNN"):
        qsnn.fold(qann)
    with pytest.raises(ValueError, match="folded already"):
        qsnn.fold(qsnn.fold(snn))
    with pytest.raises(TypeError, match="SNN first"):
        qsnn.certify(qann, snn, digits.test)
    with pytest.raises(ValueError, match="no quantized activation"):
        qsnn.certify(snn, teacher, digits.test)


@pytest.mark.parametrize("timesteps", [1, 2, 3])
def test_one_pass_for_all_steps_gives_the_spikes_of_a_pass_a_step(
    pair: tuple[nn.Module, qsnn.SNN], images: Tensor, timesteps: int
) -> None:
    folded = qsnn.fold(pair[1])
    apart = copy.deepcopy(folded)
    graph = {node.target: node for node in folded.network.graph.nodes if node.op == "call_module"}
    for name, module in folded.network.named_modules():
        if isinstance(module, IntegerLayer):
            readers = [folded.network.get_submodule(str(reader.target)) for reader in graph[name].users]
            assert module.whole == all(isinstance(reader, IntegerIF) for reader in readers), name
    marked = [module for module in apart.modules() if getattr(module, "whole", False)]
    for module in marked:
        module.whole = False
    assert marked
    for firing in ("deferred", "online"):
        ours, answers = recorded(folded, images, firing=firing, timesteps=timesteps)
        theirs, wanted = recorded(apart, images, firing=firing, timesteps=timesteps)
        assert torch.equal(answers, wanted) and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@given(
    first=st.integers(-9, 9), later=st.integers(-9, 9), rise=st.integers(0, 9),
    edge=st.sampled_from([0, 2**23, -(2**23)]),
)  # fmt: skip
def test_two_steps_at_once_are_the_two_steps(first: int, later: int, rise: int, edge: int) -> None:
    one, two = torch.meshgrid(torch.arange(-12.0, 13), torch.arange(-12.0, 13), indexing="ij")
    totals = [one.reshape(1, -1), (one + two).reshape(1, -1)]
    again = max(later, edge) if edge else later + rise
    limits = [torch.tensor([[float(limit)]]) for limit in (first, later if edge >= 0 else edge, again)]
    rows = [[limits[0]], limits[1:]]
    assert torch.equal(twice(totals, limits[0], limits[1], limits[2] - limits[1]), online(totals, rows))


@given(
    step=st.floats(2.0**-9, 1.0, width=32), place=st.integers(-130, 129), off=st.integers(-2, 2), short=st.booleans()
)
def test_pixels_are_rounded_half_up(step: float, place: int, off: int, short: bool) -> None:
    scale = torch.tensor([step], dtype=torch.float64) * (1 if short else 1 + 2.0**-40)
    x = ((place + 0.5) * scale).float()
    for _ in range(abs(off)):
        x = torch.nextafter(x, torch.full_like(x, float("inf") if off > 0 else -float("inf")))
    wanted = math.floor(Fraction(float(x.double() / scale)) + Fraction(1, 2))
    for pixels in (x, x.double()):
        assert float(IntegerInput(scale, 127)(pixels)) == max(-127, min(127, wanted))
