"""QONNX: the package's own executor gives the quantized network's logits; what has no form there is refused by name."""

from __future__ import annotations

import pytest
import torch
from conftest import scramble
from test_fold import NETS

import qsnn

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra qonnx)")
pytest.importorskip("onnxoptimizer", reason="onnxoptimizer is not installed (extra qonnx)")

from qsnn.export.qonnx import write  # noqa: E402


@pytest.mark.filterwarnings("ignore")  # of qonnx's own imports
@pytest.mark.parametrize(("name", "bits", "levels"), [("average pooling", 1, 3), ("residual", 4, 2), ("mixed", 8, 6)])
def test_the_executor_gives_the_quantized_network(name, bits, levels, digits, tmp_path):
    pytest.importorskip("qonnx", reason="qonnx is not installed (extra qonnx)")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    torch.manual_seed(1)
    config = qsnn.QuantizeConfig(weight_bits=bits, levels=levels)
    qann = qsnn.quantize(scramble(NETS[name](digits)), digits, config).eval()
    images = next(qsnn.batches(digits.test, 100))[0]
    model = ModelWrapper(str(write(qann, tmp_path / "net.onnx", batch=100))).transform(InferShapes())
    logits = torch.from_numpy(execute_onnx(model, {"images": images.numpy()})["logits"])
    with torch.no_grad():
        expected = qann(images)
    # a sum that meets a step's edge to the last bit of float32 may round the other way: at most in one image
    far = (logits - expected).abs().amax(1) > 1e-5 * float(expected.abs().max())
    assert int(far.sum()) <= 1
    assert torch.equal(logits.argmax(1)[~far], expected.argmax(1)[~far])


def test_what_a_file_holds(qann, tmp_path):
    graph = onnx.load(write(qann, tmp_path / "net.onnx")).graph
    stored = {tensor.name for tensor in graph.initializer}
    rounding = {
        (node.input[0] in stored): {a.s for a in node.attribute if a.name == "rounding_mode"}
        for node in graph.node
        if node.op_type == "Quant"
    }
    assert rounding == {True: {b"ROUND"}, False: {b"HALF_UP"}}
    assert [value.name for value in graph.output] == ["logits"]


def test_refusals(teacher, qann, snn, digits, tmp_path):
    with pytest.raises(ValueError, match="expected a quantized network"):
        write(teacher, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="expected a quantized network"):
        write(snn, tmp_path / "net.onnx")
    half = qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(weight_bits=16, levels=4))
    with pytest.raises(ValueError, match=r"cannot be written as QONNX: .*4 levels, neither .* \(fp16 weights\)"):
        write(half, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()
