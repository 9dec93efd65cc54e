"""Gates: a step of one level times spikes is spikes, exact when deferred; qkformer and convnext made of them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import power_of_two, scramble
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qsnn
from qsnn.folded.gates import IntegerGate
from qsnn.graph.call import Call, calling
from qsnn.graph.hooks import recorded, recorded_inputs
from qsnn.quant.activations import level_quant
from qsnn.snn.neurons import GateNode

SCALES = st.sampled_from([1.0, 0.1, 0.3, -0.7, 2.0**-20])


def run(gate: nn.Module, x: Tensor, firing: str) -> Tensor:
    """Currents (T, B, *) -> gates (T, B, *)."""
    with calling(Call(len(x), firing)):
        return gate(x.flatten(0, 1)).unflatten(0, (len(x), -1))  # type: ignore[no-any-return]


@torch.no_grad()
def attending(digits: qsnn.Data, name: str = "qkformer", **options: int) -> nn.Module:
    """A network with random batch norms whose gates are open for half of what they see."""
    net = scramble(qsnn.create_model(name, digits, **options))
    for gate in [module for module in net.modules() if isinstance(module, qsnn.Gate)]:
        with recorded_inputs({"gate": gate}) as seen:
            net(next(qsnn.batches(digits.train, 256))[0])
        gate.level.fill_(seen["gate"].median())
    return net


# ---- laws


@given(
    counts=st.lists(st.lists(st.integers(-9, 9), min_size=3, max_size=3), min_size=1, max_size=5),
    level=st.sampled_from([0.0, 0.5, 1.0, -2.25, 3.0]),
)
def test_deferred_the_neuron_is_the_gate_of_the_mean_ties_included(counts: list[list[int]], level: float) -> None:
    x = torch.tensor(counts).double().unsqueeze(1) / 4  # quarters add up exactly
    gate = qsnn.Gate(level).double()
    deferred, online = run(GateNode(gate), x, "deferred"), run(GateNode(gate), x, "online")
    for t in range(len(x)):
        exact = [sum(Fraction(row[i], 4) for row in counts[: t + 1]) >= (t + 1) * Fraction(level) for i in range(3)]
        assert online[t, 0].tolist() == exact
    assert all(torch.equal(step, online[-1]) for step in deferred)
    if len(x) & (len(x) - 1) == 0:  # a mean over 1, 2 or 4 steps is exact
        assert torch.equal(deferred[-1], gate(x.mean(0)))


@given(
    counts=st.lists(st.integers(-50, 50), min_size=1, max_size=4), scale=SCALES, other=SCALES, bias=SCALES,
    level=st.sampled_from([0.0, 0.1, 0.3, 1.0, -0.7]), divisor=st.sampled_from([1, 3, 4]),
)  # fmt: skip
def test_integer_gates_follow_the_exact_rationals(
    counts: list[int], scale: float, other: float, bias: float, level: float, divisor: int
) -> None:
    factors = torch.tensor([[scale], [other]], dtype=torch.float64)
    gate = IntegerGate(factors, divisor, torch.tensor([bias]).double(), torch.tensor(level), ())
    x = torch.tensor(counts, dtype=torch.float32).view(-1, 1, 1)
    gain = Fraction(scale) * Fraction(other) / divisor
    exact = [
        sum(counts[:t]) * gain + t * Fraction(float(gate.bias)) >= t * Fraction(float(gate.level))
        for t in range(1, len(counts) + 1)
    ]
    assert run(gate, x, "online").flatten().tolist() == exact
    assert run(gate, x, "deferred").flatten().tolist() == [exact[-1]] * len(exact)


def test_a_channel_without_gain_decides_by_its_bias() -> None:
    gate = IntegerGate(torch.tensor([[0.0, 0.0, -1.0]]).double(), 1, torch.tensor([0.5, 0.4, 0.0]).double(),
                       torch.tensor(0.5), (3, 1))  # fmt: skip
    x = torch.tensor([[-3.0, 5.0], [5.0, 5.0], [-1.0, 1.0]]).view(1, 1, 3, 2)
    assert run(gate, x, "online").view(3, 2).tolist() == [[1, 1], [0, 0], [1, 0]]


def test_gated_spikes_keep_their_levels_and_ties_are_exact(digits: qsnn.Data) -> None:
    net = attending(digits)
    qann = power_of_two(qsnn.quantize(net, digits, qsnn.QuantizeConfig(weight_bits=4, levels=2)).eval())
    gate, step = qann.get_submodule("9.gate"), level_quant(qann.get_submodule("9.query.2")).step
    gate.level.data.copy_((gate.level / step).detach().round() * step.detach())  # sums meet the level exactly
    certificate = qsnn.certify(qsnn.convert(qann), qann, digits.test, images=100)
    (check,) = [layer for layer in certificate.layers if layer.name == "9.gate"]
    assert certificate.verdict == "EXACT" and check.ties > 0
    with recorded({"product": dict(qann.named_modules())["mul"], "gate": gate}) as seen, torch.no_grad():
        qann(next(qsnn.batches(digits.test, 50))[0])
    key = level_quant(qann.get_submodule("9.key.2")).step
    assert set((seen["product"] / key).unique().tolist()) == {0.0, 1.0, 2.0}
    assert set(seen["gate"].unique().tolist()) == {0.0, 1.0}


NETS = [
    ("qkformer", {}, 4, 2), ("qkformer", {}, 1, 3), ("qkformer", {}, 16, 1), ("convnext", {}, 4, 2),
    ("convnext", {"expand": False, "groups": 8}, 1, 2), ("qkformer", {"attention": "self"}, 4, 2),
    ("qkformer", {"attention": "channel"}, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "bits", "levels"), NETS)
def test_qkformer_and_convnext_are_exact(name: str, options: dict, bits: int, levels: int, digits: qsnn.Data) -> None:
    net = attending(digits, name, **options)
    qann = qsnn.quantize(net, digits, qsnn.QuantizeConfig(weight_bits=bits, levels=levels)).eval()
    certificate = qsnn.certify(qsnn.convert(qann), qann, digits.test, images=200)
    assert certificate.exact and certificate.timesteps == levels, str(certificate)
    assert ("9.gate" in [layer.name for layer in certificate.layers]) == (name == "qkformer")


@pytest.mark.parametrize("firing", ["online", "deferred"])
def test_folding_keeps_every_gate_at_every_T(firing: str, digits: qsnn.Data, images: Tensor) -> None:
    net = attending(digits)
    snn = qsnn.convert(qsnn.quantize(net, digits)).double().eval()
    folded = qsnn.fold(snn)
    names = [name for name, _ in folded.neurons()]
    assert isinstance(folded.network.get_submodule("9.gate"), IntegerGate)
    with torch.no_grad(), recorded({n: snn.network.get_submodule(n) for n in names}) as wanted:
        expected = snn(images.double(), timesteps=3, firing=firing)
    with torch.no_grad(), recorded({n: folded.network.get_submodule(n) for n in names}) as found:
        answers = folded(images, timesteps=3, firing=firing)
    for name in names:
        assert torch.equal(found[name].double(), wanted[name]), name
    assert torch.allclose(answers.double(), expected)
    assert 0 < float(found["9.gate"].mean()) < 1


# ---- by hand


def test_value_and_gradient_by_hand() -> None:
    gate = qsnn.Gate(level=1.0, width=2.0)
    x = torch.tensor([[0.0, 0.5, 1.0, 1.9], [2.0, 3.0, 1.5, -1.0]], requires_grad=True)
    a = gate(x)
    assert a.tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]
    (a * torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])).sum().backward()
    # half of what comes where |x - 1| < 1; of that the level takes the sum, less 1/sqrt(4): N = 4 elements a sample
    assert x.grad.tolist() == [[0, 1.0, 1.5, 2.0], [0, 0, 3.5, 0]]
    assert float(gate.level.grad) == -(1.0 + 1.5 + 2.0 + 3.5) / 2


@pytest.mark.parametrize("firing", ["online", "deferred"])
def test_the_neurons_gradient_is_that_of_the_gate_on_the_mean(firing: str) -> None:
    gate = qsnn.Gate(level=1.0, width=2.0)
    x = torch.tensor([[[0.5]], [[2.5]]], requires_grad=True)  # means 0.5 and 1.5: both inside the box
    a = run(GateNode(gate), x, firing)
    assert a.flatten().tolist() == ([0, 1] if firing == "online" else [1, 1])
    (a.flatten() * torch.tensor([1.0, 10.0])).sum().backward()
    # the second mean holds half of each step, the box half of that; online the first decides by its own step
    assert x.grad.flatten().tolist() == ([0.5 + 2.5, 2.5] if firing == "online" else [11 / 4, 11 / 4])


class Small(nn.Module):
    """Four channels of 2x2 pixels: two are the query, two the key."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(1, 4, 1, bias=False), nn.ReLU()
        self.gate, self.last = qsnn.Gate(1.5), nn.Linear(8, 3, bias=False)
        nn.init.ones_(self.stem.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.stem(x))
        passed = self.gate(y[:, :2].sum(1, keepdim=True)) * y[:, 2:]
        return self.last(passed.flatten(1))  # type: ignore[no-any-return]


def test_synops_of_a_gate_by_hand() -> None:
    image = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    label = torch.zeros(1, dtype=torch.int64)
    model = Small().eval()
    qann = qsnn.quantize(model, [(image, label)], qsnn.QuantizeConfig(levels=1, weight_bits=8))
    result = qsnn.benchmark(qsnn.convert(qann, qsnn.ConvertConfig(timesteps=1)), [(image, label)], timesteps=1)
    synops = {layer.name: layer.synops for layer in result.layers}
    # two white pixels, four channels: 4 query spikes are added up, 4 key spikes meet an AND, all pass to 3 outputs
    assert (synops["gate"], synops["mul"], synops["last"]) == (4, 4, 12)
    assert {layer.name: layer.macs for layer in result.layers}["mul"] == 0


def test_the_summary_names_gates_without_macs(digits: qsnn.Data) -> None:
    net = qsnn.create_model("qkformer", digits)
    rows = {row.name: row for row in qsnn.summary(net).layers}
    assert rows["9.gate"].kind == "gate" and rows["9.gate"].shape == (2, 1, 4, 4) and rows["9.gate"].macs == 0
    found = qsnn.summary(qsnn.quantize(net, digits))
    rows = {row.name: row for row in found.layers}
    assert rows["mul"].kind == "gating" and rows["mul"].input_bits == 2
    assert rows["9.projection.0"].input_bits == 2 and not any("W0" in key for key in found.macs_by_precision)


def test_quantizing_keeps_how_often_a_gate_is_open(digits: qsnn.Data) -> None:
    net = attending(digits)
    qann = qsnn.quantize(net, digits)
    images = next(qsnn.batches(digits.train, 512))[0]
    shares = []
    for model in (net, qann.eval()):
        with recorded({"gate": model.get_submodule("9.gate")}) as seen, torch.no_grad():
            model(images)
        shares.append(float(seen["gate"].mean()))
    assert 0.05 < shares[0] < 0.95 and abs(shares[0] - shares[1]) < 0.08


# ---- the flow


def test_a_student_with_gates_has_a_twin_and_is_loaded_again(digits: qsnn.Data, images: Tensor, tmp_path: Path) -> None:
    net = attending(digits)
    qann = qsnn.quantize(net, digits)
    config = qsnn.DistillConfig(
        timesteps=2, epochs=1, train_images=128, batch_size=32, rate_weight=0.1, train_threshold="", train_initial=""
    )
    student = qsnn.distill(qsnn.convert(qann), qann, digits, config)
    level = student.network.get_submodule("9.gate").level
    assert not torch.equal(level, qann.get_submodule("9.gate").level), "the level learns"
    twin = qsnn.as_qann(student, qann)
    assert qsnn.certify(student, twin, digits.test, images=50).exact
    for model in (student, qsnn.fold(student), twin):
        qsnn.save(model, tmp_path / "a.safetensors")
        assert torch.equal(qsnn.load(tmp_path / "a.safetensors")(images), model(images))


@pytest.mark.parametrize("firing", ["online", "deferred"])
@pytest.mark.parametrize("kernels", ["int8", "float"])
def test_the_onnx_file_has_every_logit(firing: str, kernels: str, digits: qsnn.Data, images: Tensor) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from qsnn.export.onnx import OnnxConfig, onnx_model

    folded = qsnn.fold(qsnn.convert(qsnn.quantize(attending(digits), digits).eval()))
    model = onnx_model(folded, OnnxConfig(timesteps=3, firing=firing, kernels=kernels))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        wanted = folded(images, timesteps=3, firing=firing).float()
    assert torch.equal(torch.from_numpy(found), wanted[0] if firing == "deferred" else wanted)


@pytest.mark.parametrize(("form", "said"), [("c", "integers"), ("nir", "NIR")])
def test_other_formats_refuse_gates_by_name(form: str, said: str, digits: qsnn.Data, tmp_path: Path) -> None:
    if form == "nir":
        pytest.importorskip("nir")
    qann = qsnn.quantize(attending(digits), digits, qsnn.QuantizeConfig(levels=2))
    folded = qsnn.fold(qsnn.convert(qann))
    with pytest.raises(ValueError, match=rf"cannot be written .* {said}: .*gate \(IntegerGate has no "):
        qsnn.export(folded, tmp_path / "a", format=form)
    assert not (tmp_path / "a").exists()


def test_files_of_the_spiking_qkformer_of_before_load(digits: qsnn.Data, images: Tensor, tmp_path: Path) -> None:
    model = qsnn.create_model("spiking-qkformer", digits, weight_bits=4).eval()
    path = tmp_path / "a.safetensors"
    qsnn.save(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["qsnn"])
    recipe["model"]["name"] = "qkformer"
    del recipe["checksum"]
    save_file(load_file(path), path, {"qsnn": json.dumps(recipe)})
    with pytest.warns(UserWarning, match="checksum"):
        again = qsnn.load(path)
    assert torch.equal(again(images), model(images))
    assert not hasattr(qsnn.create_model("qkformer", digits), "timesteps")


@pytest.mark.parametrize(("name", "most"), [("qkformer", 160_000), ("convnext", 250_000)])
def test_sizes_for_28_pixels(name: str, most: int) -> None:
    from qsnn.models.create import build_model

    net = build_model(name, (1, 28, 28), 10).eval()
    assert sum(p.numel() for p in net.parameters()) <= most
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# ---- errors


def test_impossible_gates() -> None:
    for level, width in ((0.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="a finite level and a width above 0"):
            qsnn.Gate(level, width)


def test_groups_that_do_not_divide(digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match="groups that divide the channels"):
        qsnn.create_model("convnext", digits, groups=7)


def test_what_takes_the_place_of_a_transformers_layers(digits: qsnn.Data) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Softmax(1), nn.GELU(), nn.LayerNorm(6), nn.Flatten(), nn.Linear(144, 10)
    )
    with pytest.raises(ValueError, match=r"qsnn\.Gate") as error:
        qsnn.quantize(net, digits)
    for words in ("2 (Softmax:", "3 (GELU: put nn.ReLU", "4 (LayerNorm: put nn.BatchNorm"):
        assert words in str(error.value)
