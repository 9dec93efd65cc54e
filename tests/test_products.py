"""Products of two quantized values: computed on counts, exact deferred at T = L, refused online, called so by all."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import scramble
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kinds import DATA, IMAGES, Net, a, b
from test_random_nets import SETTINGS, awkward
from torch import Tensor, nn

import qsnn
from qsnn.cli.config import RunConfig
from qsnn.cli.run import run
from qsnn.folded.layers import IntegerLayer, exact_dtype
from qsnn.folded.products import IntegerProduct
from qsnn.graph.call import Call, calling
from qsnn.graph.product import Product
from qsnn.graph.spell import trace
from qsnn.measure.check import check
from qsnn.models.attention import QKFormer
from qsnn.report.page import write_report
from qsnn.report.terminal import table
from qsnn.snn.counts import CountProduct, counted_layers, products

DEFERRED = qsnn.ConvertConfig(timesteps=2, firing="deferred")


def tokens(net: Net, x: Tensor) -> Tensor:
    """Spikes of the stem as tokens, (B, 64, 8)."""
    return a(net, x).flatten(2).mT


def relu_attention(net: Net, x: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """q (k^T v) / N with a shortcut, (B, 64, 8)."""
    x = tokens(net, x)
    q, k, v = (F.relu(net.line(part)) for part in (x, x * 0.5, x * 0.25))
    return F.relu(net.line(multiply(q, multiply(k.transpose(-2, -1), v)) / x.shape[1]) + x)


def heads(net: Net, x: Tensor) -> Tensor:
    """Two heads of four channels, (B, 2, 64, 4)."""
    return tokens(net, x).unflatten(2, (2, 4)).transpose(1, 2)


FORMS: dict[str, Callable[[Net, Tensor], Any]] = {
    "x @ y": lambda n, x: relu_attention(n, x, lambda q, k: q @ k),
    "einsum of a list": lambda n, x: torch.einsum("nta,nsa->nts", [y := tokens(n, x), y]),
    "heads": lambda n, x: (y := heads(n, x)) @ (y.mT @ y),
    "scores first": lambda n, x: F.relu((y := tokens(n, x)) @ y.mT - 0.1) @ y,
    "the ReLU right behind": lambda n, x: F.relu((y := tokens(n, x)) @ (y.mT @ y) * -0.1),
    "a batch norm behind": lambda n, x: F.relu(n.norm((y := a(n, x)) @ y.mT)),
    "elements": lambda n, x: F.relu(b(n, (y := a(n, x)) * F.relu(b(n, y)))),
    "squares in place": lambda n, x: F.relu(b(n, (y := a(n, x)).mul_(y))),
    "an image times its mean": lambda n, x: F.relu(b(n, (y := a(n, x)) * y.mean((2, 3), keepdim=True))),
    "a mean of gates": lambda n, x: F.relu(b(n, n.gate(y := a(n, x)).mean(1, keepdim=True) * y)),
    "sums by sums": lambda n, x: F.relu(b(n, F.avg_pool2d(y := a(n, x), 3, 1, 1) * (y + y))),
    "max pooled": lambda n, x: F.relu(b(n, F.max_pool2d(y := a(n, x), 3, 1, 1) @ y)),
    "scaled by channel": lambda n, x: F.relu(b(n, (a(n, x) * n.gain) @ (a(n, x) + 0.5))),
    "joined": lambda n, x: F.relu(n.wide(torch.cat([y := a(n, x), y * y], 1))),
    "a gated product": lambda n, x: F.relu(b(n, n.gate(y := a(n, x)) * (y @ y))),
    "a gate of a product": lambda n, x: F.relu(b(n, n.gate((y := a(n, x)) @ y / 8) * y)),
    "a gate of a sum of products": lambda n, x: F.relu(b(n, n.gate((y := a(n, x)) @ y / 8 + y * y) * y)),
    "pooled behind": lambda n, x: F.relu(b(n, F.avg_pool2d((y := a(n, x)) * y, 2))),
    "a product of products": lambda n, x: F.relu(b(n, ((y := a(n, x)) * y) @ (y * y))),
    "logits": lambda n, x: n.last(((y := a(n, x)) * y).flatten(1)),
    "two heads, one of spikes": lambda n, x: (n.last((y := a(n, x)).flatten(1)), n.last((y @ y).flatten(1))),
    "with a branch of the image": lambda n, x: F.relu(b(n, torch.cat([((y := a(n, x)) * y)[:, :5], x], 1))),
}  # fmt: skip


def made(form: str, levels: int = 3, bits: int = 4) -> tuple[nn.Module, qsnn.SNN]:
    """The quantized network of a form, and the spiking one."""
    qann = qsnn.quantize(Net(FORMS[form]), DATA, qsnn.QuantizeConfig(weight_bits=bits, levels=levels)).eval()
    return qann, qsnn.convert(qann, DEFERRED).eval()


# ---- laws


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exact_and_folds_at_every_T(form: str) -> None:
    qann, snn = made(form)
    certificate = qsnn.certify(snn, qann, DATA)
    assert certificate.exact and certificate.on_counts, str(certificate)
    folded, double = qsnn.fold(snn), snn.double()
    for steps in (1, 2, 5):
        found, wanted = folded(IMAGES, timesteps=steps), double(IMAGES.double(), timesteps=steps)
        for one, other in zip(*([each] if isinstance(each, Tensor) else each for each in (found, wanted)), strict=True):
            assert torch.allclose(one.double(), other, rtol=1e-6, atol=1e-6), steps


@given(
    counts=st.lists(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=2, max_size=2), min_size=1,
                    max_size=5),
)  # fmt: skip
def test_the_integers_are_the_products_of_the_counts(counts: list[list[list[int]]]) -> None:
    steps = len(counts)
    x, y = torch.tensor(counts).float().view(steps, 2, 1, 2, 3).unbind(1)
    product = CountProduct("abc,acd->abd")
    whole = IntegerProduct(product, (1.0, 1.0), (1, 1), 3)
    with calling(Call(steps, "deferred")):
        found, mean = whole(x.flatten(0, 1), y.mT.flatten(0, 1)), product(x.flatten(0, 1), y.mT.flatten(0, 1))
    for i in range(2):
        for j in range(2):
            exact = sum(sum(x[:, 0, i, c].tolist()) * sum(y[:, 0, j, c].tolist()) for c in range(3))
            assert found[0, i, j] == exact <= whole.bound * steps**whole.steps
            assert mean[0, i, j].item() == pytest.approx(float(Fraction(int(exact), steps**2)))


ATTENTION = st.fixed_dictionaries({
    "tokens": st.booleans(),  # k^T v first, or q k^T
    "heads": st.sampled_from([1, 2]),
    "squared": st.booleans(),
    "shortcut": st.booleans(),
    "requantized": st.booleans(),
    "pooled": st.sampled_from(["none", "avg", "max"]),
    "norm": st.booleans(),
    "seed": st.integers(0, 1000),
})  # fmt: skip


class Attending(nn.Module):
    """Blocks of attention without a softmax, drawn by hypothesis."""

    def __init__(self, blocks: list[dict], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.plan = blocks
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), awkward(nn.BatchNorm2d(4), seed), nn.ReLU())
        self.parts = nn.ModuleList(nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4)) for _ in blocks)
        self.norms = nn.ModuleList(awkward(nn.BatchNorm2d(4), block["seed"]) for block in blocks)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, parts, norm in zip(self.plan, self.parts, self.norms, strict=True):
            sides = x.shape[2:]
            source = {"avg": F.avg_pool2d, "max": F.max_pool2d}.get(block["pooled"], lambda y, *_: y)(x, 3, 1, 1)
            q, k, v = (
                F.relu(part(source)).flatten(2).unflatten(1, (block["heads"], -1)).mT for part in list(parts)[:3]
            )
            q = q * q if block["squared"] else q
            if block["tokens"]:
                inside = k.mT @ v / k.shape[2]
                y = q @ (F.relu(inside) if block["requantized"] else inside)
            else:
                inside = q @ k.mT / 4
                y = (F.relu(inside - 0.1) if block["requantized"] else inside) @ v / k.shape[2]
            y = parts[3](y.mT.flatten(1, 2).unflatten(2, tuple(sides)))
            y = norm(y) if block["norm"] else y
            x = F.relu(x + y if block["shortcut"] else y)
        return self.last(x.mean((2, 3)))


@settings(SETTINGS, max_examples=max(1, int(os.environ["QSNN_RANDOM_NETS"]) // 15))
@given(
    blocks=st.lists(ATTENTION, min_size=1, max_size=2),
    weight_bits=st.sampled_from([1, 2, 4, 8]),
    levels=st.sampled_from([1, 2, 3, 7]),
    seed=st.integers(0, 1000),
)
def test_every_random_attention_is_exact(blocks: list[dict], weight_bits: int, levels: int, seed: int) -> None:
    images = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    data = [(images, torch.zeros(8, dtype=torch.int64))]
    qann = qsnn.quantize(Attending(blocks, seed).eval(), data, qsnn.QuantizeConfig(
        weight_bits=weight_bits, levels=levels)).eval()  # fmt: skip
    certificate = qsnn.certify(qsnn.convert(qann, DEFERRED), qann, data)
    assert certificate.exact, str(certificate)


def test_a_file_holds_the_same_network(digits: qsnn.Data, images: Tensor, tmp_path: Path) -> None:
    net = scramble(qsnn.create_model("qkformer", digits, attention="relu"))
    qann = qsnn.quantize(net, digits).eval()
    snn = qsnn.convert(qann, DEFERRED)
    for model in (qann, snn, qsnn.fold(snn)):
        qsnn.save(model, tmp_path / "a.safetensors")
        assert torch.equal(qsnn.load(tmp_path / "a.safetensors")(images), model(images))


def test_frames_are_summed_before_they_are_multiplied() -> None:
    snn = made("with a branch of the image")[1]
    folded = qsnn.fold(snn)
    frames = torch.randn(4, 3, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        answers = folded(frames, timesteps=3), snn.double()(frames.double(), timesteps=3)
        same = folded(IMAGES[:, None].expand(-1, 3, -1, -1, -1), timesteps=3)
    assert torch.allclose(answers[0].double(), answers[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(same, folded(IMAGES, timesteps=3)), "frames that are all alike are one image"


@pytest.mark.parametrize("form", ["x @ y", "scaled by channel", "a gate of a sum of products", "joined", "logits"])
@pytest.mark.parametrize("kernels", ["int8", "float"])
def test_the_onnx_file_has_every_logit(form: str, kernels: str) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from qsnn.export.onnx import OnnxConfig, onnx_model

    folded = qsnn.fold(made(form)[1])
    for steps in (1, 3):
        model = onnx_model(folded, OnnxConfig(timesteps=steps, kernels=kernels))
        session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(["logits"], {"images": IMAGES.numpy()})
        with torch.no_grad():
            assert torch.equal(torch.from_numpy(found), folded(IMAGES, timesteps=steps)[0].float())


@pytest.mark.parametrize("multiply", [
    torch.matmul, torch.bmm, lambda q, k: q.matmul(k), lambda q, k: q.bmm(k), lambda q, k: q @ k,
    lambda q, k: torch.einsum("abc, acd -> abd", q, k), lambda q, k: torch.einsum("abc,acd->abd", [q, k]),
])  # fmt: skip
def test_one_product_in_all_its_spellings(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    network = trace(Net(lambda n, x: relu_attention(n, x, multiply)), (3, 8, 8))
    found = [module.equation for module in network.modules() if isinstance(module, Product)]
    assert found == ["abc,acd->abd"] * 2
    torch.testing.assert_close(network(IMAGES), Net(FORMS["x @ y"])(IMAGES))


# ---- by hand


class Squares(nn.Module):
    """Two channels of 2x2 pixels, of which the first is multiplied with the second as matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.last = nn.Conv2d(1, 2, 1, bias=False), nn.Linear(2, 4, bias=False), nn.Linear(8, 3)
        nn.init.ones_(self.stem.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.last(F.relu(self.mix(y[:, 0] @ y[:, 1])).flatten(1))  # type: ignore[no-any-return]


def test_operations_by_hand() -> None:
    image, label = torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64)
    qann = qsnn.quantize(Squares().eval(), [(image, label)], qsnn.QuantizeConfig(levels=3, weight_bits=4)).eval()
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=3, firing="deferred"))
    result = qsnn.benchmark(snn, [(image, label)], timesteps=3)
    costs = {layer.name: layer for layer in result.layers}
    # 2x2 sums of 2 products of counts up to 3; then 2 rows into 4 outputs of counts up to 2·3·3: once, not at each step
    assert (costs["matmul"].macs, costs["matmul"].synops) == (8, 0)
    assert (costs["matmul"].weight_bits, costs["matmul"].input_bits) == (2, 2)
    assert (costs["mix"].macs, costs["mix"].synops, costs["mix"].input_bits) == (16, 0, 5)
    assert costs["last"].macs == 0 and result.on_counts == ("matmul", "mix")
    assert result.macs == 8 + 16 + costs["stem"].macs


def test_bounds_that_no_float_holds_are_refused() -> None:
    assert exact_dtype(2.0**23 - 1) is torch.float32 and exact_dtype(2.0**52 - 1) is torch.float64
    product = IntegerProduct(CountProduct("ab,ab->ab"), (1e6, 1e6), (1, 1), 100)
    with calling(Call(100, "deferred")), pytest.raises(ValueError, match="do not fit into the 53 bits"):
        product(torch.ones(100, 1), torch.ones(100, 1))
    layer = IntegerLayer(torch.ones(1, 1, dtype=torch.int8), nn.Linear(1, 1), 1e6, 8, 4)
    with pytest.raises(ValueError, match="take fewer time steps"):
        layer.ready(1000)
    assert layer.ready(2).dtype is torch.float64


def test_equations() -> None:
    product = Product("bhnk,bhkm->bhnm")
    assert product.summed((9, 2, 5, 3), (9, 2, 3, 4)) == 3
    assert product.macs((9, 2, 5, 3), (9, 2, 3, 4)) == 2 * 5 * 3 * 4
    assert Product("bn,bn->bn").macs((1, 7), (1, 1)) == 7  # one side is repeated


# ---- what is said


def test_every_report_says_what_is_computed_on_counts(tmp_path: Path) -> None:
    qann, snn = made("x @ y")
    folded = qsnn.fold(snn)
    assert counted_layers(snn.network) == [*products(qann), "line"] and counted_layers(qann) == []
    assert counted_layers(folded.network) == ["matmul", "matmul_1", "line_3"]  # the fourth call of one layer
    said = "computed on counts, not on spikes: matmul, matmul_1, line"
    assert said in str(qsnn.summary(snn)) and said in str(qsnn.summary(folded))
    assert said in str(qsnn.certify(snn, qann, DATA)) and said not in str(qsnn.summary(qann))
    result = qsnn.benchmark(folded, DATA, timesteps=2)
    assert said in result.counts_said and said in str(table([result]).caption)
    write_report(tmp_path / "a.html", title="a", results=[result], certificate=None, config={}, environment={},
                 command="a", notes=[], stages=None)  # fmt: skip
    assert said in (tmp_path / "a.html").read_text()
    rows = {row.name: row for row in qsnn.summary(qann).layers}
    assert rows["matmul"].kind == "product" and rows["matmul"].macs == 8 * 8 * 64 and rows["matmul"].parameters == 0
    assert "A2A2" in qsnn.summary(qann).macs_by_precision


def test_check_says_that_there_is_no_online_student(digits: qsnn.Data) -> None:
    found = check(scramble(qsnn.create_model("qkformer", digits, attention="relu")), digits, seconds=0.1)
    assert found.ready and found.distill_seconds is None
    assert "not spikes; deferred alone" in str(found) and "no online student" in str(found)


# ---- errors


def test_online_is_refused_in_one_line(digits: qsnn.Data, tmp_path: Path) -> None:
    qann, snn = made("x @ y")
    message = r"fires online, but matmul, matmul_1 multiply.* firing='deferred'"
    for refused in (
        lambda: qsnn.convert(qann),
        lambda: snn(IMAGES, firing="online"),
        lambda: qsnn.fold(snn)(IMAGES, timesteps=1, firing="online"),
        lambda: qsnn.distill(snn, qann, digits),
        lambda: qsnn.benchmark(snn, DATA, firing="online"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)


def linear_attention(num_classes: int) -> nn.Module:
    """A network of one's own, for `qsnn run`."""
    return QKFormer(1, num_classes, [16, 32], 32, "relu")


def test_run_refuses_before_it_trains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the student of `qsnn run` fires online, but .* multiply counts"):
        run(RunConfig(data="digits", model="test_products:linear_attention", out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["nir", "c"])
def test_other_formats_refuse_products_by_name(form: str, tmp_path: Path) -> None:
    pytest.importorskip("nir")
    options = {"mean": [0.0] * 3, "std": [1.0] * 3} if form == "c" else {}
    with pytest.raises(ValueError, match=r"matmul \(IntegerProduct"):
        qsnn.export(qsnn.fold(made("x @ y")[1]), tmp_path / "a", format=form, **options)


def test_calibrated_networks_multiply_too() -> None:
    snn = qsnn.convert(Net(FORMS["x @ y"]), DATA, qsnn.ConvertConfig(timesteps=8, firing="deferred"))
    net = Net(FORMS["x @ y"])
    with torch.no_grad():
        found, wanted = qsnn.fold(snn)(IMAGES, timesteps=8)[0], net(IMAGES)
    assert float((found - wanted).std() / wanted.std()) < 0.5
