"""qsnn.export to ONNX: every integer and every logit of the file is the folded network's, in every runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import scramble
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_fold import NETS
from test_kinds import DATA, FORMS, IMAGES, Net
from test_random_nets import BLOCK, RandomNet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qsnn

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from qsnn.export.affine import affine  # noqa: E402
from qsnn.export.onnx import OnnxConfig, onnx_model  # noqa: E402
from qsnn.export.onnx_layers import PAIR, eight_bit_weight  # noqa: E402
from qsnn.export.onnx_values import Values, Wire  # noqa: E402
from qsnn.export.packed import packed  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


def answered(model: Any, images: Tensor, threads: int = 1) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images.numpy()}), strict=True))


@torch.no_grad()
def expected(folded: qsnn.SNN, images: Tensor, **options: Any) -> dict[str, np.ndarray]:
    """The folded network's own answers, and the integers that went into its readout."""
    seen: list[Tensor] = []
    readout = folded.network.get_submodule("readout")
    handle = readout.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    logits = folded(images, **options)
    handle.remove()
    sums = seen[0].double().unflatten(0, (-1, len(images))).cumsum(0)
    if options["firing"] == "deferred":
        logits, sums = logits[0], sums[-1]
    return {"logits": logits.float().numpy(), "integer_logits": sums.numpy().astype(np.int64)}


def same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def folded_net(name: str, digits: qsnn.Data, bits: int = 4, levels: int = 2, **options: Any) -> qsnn.SNN:
    torch.manual_seed(1)
    config = qsnn.QuantizeConfig(weight_bits=bits, levels=levels, calibration_images=64, **options)
    return qsnn.fold(qsnn.convert(qsnn.quantize(scramble(NETS[name](digits)), digits, config).eval()))


@pytest.fixture(scope="module")
def plain(digits: qsnn.Data) -> qsnn.SNN:
    return folded_net("average pooling", digits)


@given(
    gain=st.floats(0.3, 900), start=st.floats(-2.0, 2.0), levels=st.integers(1, 15), factor=st.sampled_from([1, 2, 9]),
    bound=st.integers(0, 3000), whole=st.booleans(),
)  # fmt: skip
@settings(max_examples=60)
def test_one_rounding_counts_the_thresholds(
    gain: float, start: float, levels: int, factor: int, bound: int, whole: bool
) -> None:
    limits = np.ceil((np.arange(levels) + start) * gain).astype(np.int64)[:, None]
    found = affine(limits, np.array([bound]), factor, whole=whole)
    if found is None:  # no whole β leaves room: only with many levels
        assert levels > 2 and (whole or gain < 2)
        return
    m, beta = found
    a = np.arange(-bound, bound + 1)
    rounded = np.rint((a * factor + beta[0]).astype(np.float32) * m[0])
    np.testing.assert_array_equal(np.clip(rounded, 0, levels), (a >= limits).sum(0))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("bits", "levels"), [(1, 2), (2, 1), (4, 2), (8, 3)])
def test_every_logit_is_the_folded_networks(net: str, bits: int, levels: int, digits: qsnn.Data) -> None:
    folded = folded_net(net, digits, bits, levels)
    images = next(qsnn.batches(digits.test, 540))[0]
    for firing, timesteps in (("deferred", levels), ("online", 2)):
        model = onnx_model(folded, OnnxConfig(timesteps=timesteps, firing=firing))
        theirs = expected(folded, images, firing=firing, timesteps=timesteps)
        same(answered(model, images), theirs)


@pytest.mark.parametrize("levels", [7, 15])
def test_many_levels_in_one_pass(levels: int, digits: qsnn.Data, images: Tensor) -> None:
    folded = folded_net("average pooling", digits, levels=levels)
    model = onnx_model(folded, OnnxConfig(timesteps=levels, firing="deferred"))
    assert "QLinearConv" in {node.op_type for node in model.graph.node}
    same(answered(model, images), expected(folded, images, firing="deferred", timesteps=levels))


def test_neither_batch_nor_threads_nor_kernels_change_a_bit(plain: qsnn.SNN, digits: qsnn.Data) -> None:
    images = next(qsnn.batches(digits.test, 128))[0]
    for firing in ("deferred", "online"):
        for kernels in ("int8", "float"):
            model = onnx_model(plain, OnnxConfig(timesteps=3, firing=firing, kernels=kernels))
            theirs = expected(plain, images, firing=firing, timesteps=3)
            for count, threads in ((1, 1), (7, 2), (128, 2)):
                axis = int(firing == "online")
                part = {name: value.take(range(count), axis) for name, value in theirs.items()}
                same(answered(model, images[:count], threads), part)


def test_online_to_eight_steps(digits: qsnn.Data, images: Tensor) -> None:
    folded = folded_net("residual", digits)
    for kernels in ("int8", "float"):
        model = onnx_model(folded, OnnxConfig(timesteps=8, firing="online", kernels=kernels))
        same(answered(model, images), expected(folded, images, firing="online", timesteps=8))


def test_raw_pixels_give_the_same_bits(plain: qsnn.SNN, digits: qsnn.Data) -> None:
    theirs = expected(plain, next(qsnn.batches(digits.test, 540))[0], firing="deferred", timesteps=2)
    for kernels in ("int8", "float"):
        model = onnx_model(plain, OnnxConfig(firing="deferred", input="uint8", kernels=kernels))
        same(answered(model, digits.test.images), theirs)
    everything = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    theirs = expected(plain, digits.test.normalise(everything), firing="deferred", timesteps=2)
    same(answered(model, everything), theirs)


def test_frames_in_time(digits: qsnn.Data) -> None:
    folded = folded_net("residual", digits)
    folded.qsnn_recipe["data"]["frames"] = 3  # as a network of recordings has it
    frames = torch.stack([next(qsnn.batches(digits.test, 48))[0][i::3] for i in range(3)], 1)
    for firing in ("deferred", "online"):
        model = onnx_model(folded, OnnxConfig(timesteps=3, firing=firing))
        with torch.no_grad():
            theirs = folded(frames, firing=firing, timesteps=3).float().numpy()
        same({"logits": answered(model, frames)["logits"]}, {"logits": theirs[0] if firing == "deferred" else theirs})


class Moves(nn.Module):
    """Channel shuffle, splits, views, uneven pooling with padding, ceilings and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU())
        self.tail = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.ReLU(), nn.AvgPool2d(3, 2, padding=1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.tail(x).view(b, -1))


class Signal(nn.Module):
    """Convolutions in one dimension, over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(6, 4, 3), nn.ReLU(),
            nn.MaxPool1d(2), nn.Flatten(), nn.Linear(60, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.view(x.size(0), 1, 64))


KINDS: dict[str, Any] = {
    "moves": (lambda data: Moves(), {"levels": 2}, {}),
    "one dimension": (lambda data: Signal(), {"levels": 2}, {}),
    "fp16 weights": (NETS["mixed"], {"weight_bits": 16, "levels": 2}, {}),
    "float weights": (NETS["mixed"], {"weight_bits": 32, "levels": 2}, {}),
    "float input": (NETS["mixed"], {"levels": 2, "input_bits": None}, {}),
    "16-bit input": (NETS["residual"], {"levels": 2, "input_bits": 16}, {}),
    "signs": (NETS["average pooling"], {"weight_bits": 1, "act_form": "sign"}, {"timesteps": 1}),
    "hard reset": (NETS["residual"], {"levels": 2}, {"reset": "hard", "tau": (4.0,)}),
    "signed spikes, few bits": (NETS["residual"], {"levels": 2}, {"signed": True, "state_bits": "int8"}),
    "signed spikes": (NETS["average pooling"], {"levels": 2}, {"signed": True}),
    "signed spikes meet": (NETS["residual"], {"levels": 3}, {"signed": True}),
    "signed spikes, float weights": (NETS["residual"], {"weight_bits": 32, "levels": 2}, {"signed": True}),
    "few bits": (NETS["residual"], {"levels": 2}, {"reset": "decay", "state_bits": "fp16"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_network_that_folds(kind: str, digits: qsnn.Data, images: Tensor) -> None:
    make, quantize, convert = KINDS[kind]
    torch.manual_seed(1)
    model = scramble(make(digits))
    config = {"weight_bits": 4, "calibration_images": 64, **quantize}
    qann = qsnn.quantize(model, digits, qsnn.QuantizeConfig(**config)).eval()
    folded = qsnn.fold(qsnn.convert(qann, qsnn.ConvertConfig(**convert)))
    steps = convert.get("timesteps", 3)
    special = {"reset", "signed", "tau"} & set(convert)
    for firing in ("online",) if special else ("online", "deferred"):
        written = onnx_model(folded, OnnxConfig(timesteps=steps, firing=firing))
        with torch.no_grad():
            theirs = folded(images, firing=firing, timesteps=steps)
        theirs = theirs[0] if firing == "deferred" else theirs
        same({"logits": answered(written, images)["logits"]}, {"logits": theirs.float().numpy()})


def test_a_converted_float_network_in_float64(teacher: nn.Module, digits: qsnn.Data, images: Tensor) -> None:
    folded = qsnn.fold(qsnn.convert(teacher, digits, qsnn.ConvertConfig(timesteps=4, calibration_images=32)))
    model = onnx_model(folded, OnnxConfig(timesteps=4, firing="online"))
    with torch.no_grad():
        same(answered(model, images), {"logits": folded(images, timesteps=4, firing="online").float().numpy()})
    forms = metadata(model)["forms"]
    assert forms and all(form.startswith("real: float64") for form in forms.values())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_folds(form: str) -> None:
    config = qsnn.QuantizeConfig(weight_bits=4, levels=3)
    folded = qsnn.fold(qsnn.convert(qsnn.quantize(Net(FORMS[form]), DATA, config).eval()))
    firing = ("deferred", "online")[list(FORMS).index(form) % 2]
    found = answered(onnx_model(folded, OnnxConfig(timesteps=3, firing=firing)), IMAGES)
    with torch.no_grad():
        heads = [z[0] if firing == "deferred" else z for z in tree_leaves(folded(IMAGES, timesteps=3, firing=firing))]
    names = [f"logits_{place}" if place else "logits" for place in range(len(heads))]
    same(found, {name: z.float().numpy() for name, z in zip(names, heads, strict=True)})


@given(
    blocks=st.lists(BLOCK, min_size=1, max_size=3), bits=st.sampled_from([1, 2, 4, 8, 16]),
    levels=st.sampled_from([1, 2, 3, 7]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=list(HealthCheck))
def test_random_networks(blocks: list[dict], bits: int, levels: int, seed: int) -> None:
    first = {**blocks[0], "join": "none", "linear": False}
    net = RandomNet([first, *blocks[1:]], channels=2, seed=seed).eval()
    images = torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(seed))
    data = [(images, torch.zeros(8, dtype=torch.int64))]
    qann = qsnn.quantize(net, data, qsnn.QuantizeConfig(weight_bits=bits, levels=levels)).eval()
    folded = qsnn.fold(qsnn.convert(qann))
    for firing, timesteps in (("deferred", levels), ("online", 2)):
        model = onnx_model(folded, OnnxConfig(timesteps=timesteps, firing=firing))
        theirs = expected(folded, images, firing=firing, timesteps=timesteps)
        same(answered(model, images), theirs)


@pytest.mark.parametrize("net", ["max pooling", "mixed"])
def test_the_reference_evaluator_agrees(net: str, digits: qsnn.Data, images: Tensor) -> None:
    from onnx.reference import ReferenceEvaluator

    folded = folded_net(net, digits)
    for firing in ("deferred", "online"):
        model = onnx_model(folded, OnnxConfig(firing=firing))
        onnx.checker.check_model(model, full_check=True)
        logits, integers = ReferenceEvaluator(model).run(None, {"images": images[:4].numpy()})
        same(answered(model, images[:4]), {"logits": logits, "integer_logits": integers})


def test_openvino_agrees(plain: qsnn.SNN, images: Tensor, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    for firing in ("deferred", "online"):
        path = qsnn.export(plain, tmp_path / f"{firing}.onnx", firing=firing, kernels="float")
        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        result = compiled(images.numpy())
        theirs = expected(plain, images, firing=firing, timesteps=2)
        np.testing.assert_array_equal(result["integer_logits"], theirs["integer_logits"])
        np.testing.assert_allclose(result["logits"], theirs["logits"], rtol=1e-5, atol=1e-6)


def test_fashion_mnist(digits: qsnn.Data) -> None:
    try:
        data = qsnn.load_data("fashion-mnist")
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not there")
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AvgPool2d(7), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    model = scramble(body)
    folded = qsnn.fold(qsnn.convert(qsnn.quantize(model, data, qsnn.QuantizeConfig(calibration_images=64)).eval()))
    written = onnx_model(folded, OnnxConfig(firing="deferred"))
    for images, _ in qsnn.batches(data.test.head(1000), 250):
        same(answered(written, images), expected(folded, images, firing="deferred", timesteps=2))


def test_pairs_of_products_do_not_saturate() -> None:
    values = Values(2, "deferred", "u8", None)
    counts = Wire(("x",), "u8", (4, 8, 8), 1.0)
    pixels = Wire(("x",), "u8", (4, 8, 8), 127.0, zero=128, static=True)
    weight = np.full((3, 4, 3, 3), 127, dtype=np.int8)
    stored, zero, form = eight_bit_weight(values, weight, counts)
    assert (stored.dtype, zero, form) == (np.int8, 0, "u8 x s8, pairs <= 508")
    stored, zero, form = eight_bit_weight(values, weight, pixels)
    assert stored.dtype == np.uint8 and zero == 128 and 2 * 127 * 255 > PAIR and form == "u8 x u8, pairs <= 64770"
    stored, zero, _ = eight_bit_weight(values, weight // 2, pixels)
    assert stored.dtype == np.int8 and int(np.abs(stored.astype(int)).max()) * 2 * 255 <= PAIR and zero == 0


def metadata(model: Any) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def test_the_golden_network(digits: qsnn.Data, tmp_path: Path) -> None:
    folded, logits = qsnn.load(GOLDEN / "folded.safetensors"), load_file(GOLDEN / "logits.safetensors")["folded"]
    path = qsnn.export(folded, tmp_path / "net.onnx")
    model = onnx.load(path)
    images = next(qsnn.batches(digits.test, logits.shape[1]))[0]
    same(answered(model, images), {"logits": logits.float().numpy()})
    found = metadata(model)
    assert found["qsnn"]["kind"] == "onnx" and found["qsnn"]["parent"] == folded.qsnn_recipe["sha256"]
    assert found["qsnn"]["data"]["classes"] == list("0123456789") and found["qsnn"]["export"]["firing"] == "online"


@pytest.mark.parametrize("bits, online, deferred", [(1, 0.38, 0.33), (4, 0.71, 0.66), (8, 1.18, 1.13)])
def test_a_file_is_hardly_larger_than_its_weights(
    bits: int, online: float, deferred: float, digits: qsnn.Data, tmp_path: Path
) -> None:
    model = scramble(qsnn.create_model("vgg-small", digits))
    folded = qsnn.fold(qsnn.convert(qsnn.quantize(model, digits, qsnn.QuantizeConfig(weight_bits=bits, levels=2))))
    weights = sum(value.numel() for name, value in folded.named_buffers() if name.endswith("weight"))
    for firing, most in (("online", online), ("deferred", deferred)):
        written = onnx_model(folded, OnnxConfig(firing=firing))
        assert written.ByteSize() < most * weights, "36,984 weights; larger networks have the same few thousand more"
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 3
        ort.InferenceSession(written.SerializeToString(), options, providers=["CPUExecutionProvider"])
        run = onnx.load(tmp_path / "run.onnx")
        assert not {node.op_type for node in run.graph.node} & {"Gather", "ConstantOfShape"}, "unpacked when loaded"


@given(
    values=st.lists(st.integers(-128, 127), min_size=1, max_size=20, unique=True), size=st.integers(1, 40),
    unsigned=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_packed_weights_are_the_weights(values: list[int], size: int, unsigned: bool, seed: int) -> None:
    kind, zero = (np.uint8, 128) if unsigned else (np.int8, 0)
    weight = (np.random.default_rng(seed).choice(values, (size, 2)) + zero).astype(kind)
    found, distinct = packed(weight), len(np.unique(weight))
    if found is None:
        assert distinct > 16
        return
    codes, table = found
    assert np.array_equal(table[codes].reshape(weight.shape), weight) and table.dtype == kind
    assert codes.size * table.shape[1] == weight.size and distinct <= 2 ** (8 // table.shape[1])


ORDERS = (
    "import qsnn; qsnn.export; import qsnn.export.runtime as r; from qsnn.export import write",
    "import qsnn.export.runtime as r; from qsnn.export import write; import qsnn",
    "from qsnn import export; import qsnn.export.write, qsnn, qsnn.export.runtime as r; assert export is qsnn.export",
)


@pytest.mark.parametrize("order", ORDERS)
def test_the_verb_stays_whatever_is_imported_first(order: str) -> None:
    check = "; assert callable(qsnn.export) and qsnn.export.__name__ == 'export' and r.OnnxNetwork"
    check += "; import sys; assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", order + check], check=True, cwd=Path(qsnn.__file__).parents[1])


def test_refusals(plain: qsnn.SNN, snn: qsnn.SNN, digits: qsnn.Data, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"call qsnn.export\(qsnn.fold\(snn\), path\)"):
        qsnn.export(snn, tmp_path / "a")
    with pytest.raises(ValueError, match="expected format to be one of 'onnx', 'nir'"):
        qsnn.export(plain, tmp_path / "a", format="tf")
    with pytest.raises(ValueError, match="is a folder"):
        qsnn.export(plain, tmp_path)
    with pytest.raises(ValueError, match="at most 8 steps of online firing"):
        qsnn.export(plain, tmp_path / "a", timesteps=9, firing="online")
    with pytest.raises(ValueError, match="expected kernels to be 'int8' or 'float'"):
        qsnn.export(plain, tmp_path / "a", kernels="fp4")
    with pytest.raises(TypeError, match="colour"):
        qsnn.export(plain, tmp_path / "a", colour=True)


def test_what_cannot_be_written_is_named_all_of_it(digits: qsnn.Data, tmp_path: Path) -> None:
    folded = folded_net("average pooling", digits)
    graph = folded.network.graph
    folded.network.add_submodule("strange", nn.Softsign())
    entry = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(entry):
        graph.call_module("strange", (entry,))
        graph.call_function(torch.sin, (entry,))
    with pytest.raises(ValueError, match=r"cannot write to ONNX: sin \(sin\); strange \(Softsign\)$"):
        qsnn.export(folded, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_a_name_says_the_format(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    data = [(torch.randn(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64))]
    folded = qsnn.fold(qsnn.convert(qsnn.quantize(net, data)))
    with pytest.raises(ValueError, match=r"ends in \.onnx for format 'onnx', got .*net\.c; or pass format='c'"):
        qsnn.export(folded, tmp_path / "net.c")
    with pytest.raises(ValueError, match=r"got .*net\.tflite; the formats are onnx, nir, c, qonnx, hub"):
        qsnn.export(folded, tmp_path / "net.tflite")
    assert not list(tmp_path.iterdir())
    assert qsnn.export(folded, tmp_path / "net").exists()


def test_an_output_is_named_where_it_is_made() -> None:
    graph = Values(2, "deferred", "u8", None).graph
    value = graph.add("Neg", "x")
    after = graph.add("Abs", value)
    graph.publish(value, "logits")
    graph.publish(value, "logits_1")
    graph.publish("x", "logits_2")
    edges = [(node.op_type, list(node.input), list(node.output)) for node in graph.nodes]
    assert edges[:2] == [("Neg", ["x"], ["logits"]), ("Abs", ["logits"], [after])]
    assert edges[2:] == [("Identity", ["logits"], ["logits_1"]), ("Identity", ["x"], ["logits_2"])]
