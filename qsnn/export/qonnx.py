"""The quantized network (not the spiking one) as QONNX, where FPGA tools such as FINN and hls4ml start from."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsnn.files import write_atomic
from qsnn.graph.recipe import input_shape_of, recipe_of
from qsnn.quant.activations import LevelActProxy, LevelQuant, act_quant_of, is_sign, level_quant
from qsnn.quant.weights import weight_bits


def write(qann: nn.Module, path: str | Path, *, batch: int = 1) -> Path:
    r"""Write a quantized network as QONNX through Brevitas: ``Quant`` nodes around standard ONNX.

    QONNX's Quant holds :math:`s\,\mathrm{clip}(\mathrm{round}(x/s), 0, 2^b - 1)`, or :math:`2^b - 2` with a narrow
    range, so that L = 1, 2, 3, 6, 7, 14, 15, ... have a form. Its HALF_UP rounds a half away from zero, ours upwards:
    they differ for negative pixels that meet a half of the input's step exactly. Batch norm stays a node of its own.

    Args:
        qann: from :func:`qsnn.quantize`, calibrated. It is not changed.
        path: the file to write.
        batch: images of a call; FPGA tools want 1.
    Returns:
        The file.
    Raises:
        ImportError: onnx or onnxoptimizer is missing.
        ValueError: no quantized network, an unknown image shape, or layers that QONNX has no form for, all by name.
    """
    if recipe_of(qann).get("kind") not in (None, "qann") or not any(level_quant(m) for m in qann.modules()):
        raise ValueError("expected a quantized network; QONNX holds what quantize() returned, before convert()")
    shape = input_shape_of(qann)
    if shape is None:
        raise ValueError("the image shape is unknown; quantize with data records it")
    refused = [f"{name} ({why})" for name, module in qann.named_modules() if (why := _refusal(module))]
    if refused:
        raise ValueError("cannot be written as QONNX: " + "; ".join(refused))
    model = copy.deepcopy(qann).eval().cpu()
    for module in model.modules():
        if isinstance(module, LevelQuant):
            module.fused = False
    beside = Path(path).with_name(f".{Path(path).name}.part")
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.onnx, about its own future
            _manager().export(
                model, args=torch.zeros(batch, *shape), export_path=str(beside), dynamo=False, opset_version=17,
                input_names=["images"], output_names=["logits"],
            )  # fmt: skip
        write_atomic(path, _half_up(beside))
    finally:
        beside.unlink(missing_ok=True)
    return Path(path)


def _half_up(path: Path) -> bytes:
    """The file with activations that round a half up; Brevitas has no name for that, QONNX has."""
    import onnx

    model = onnx.load(path)
    stored = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Quant" and node.input[0] not in stored:
            for attribute in node.attribute:
                if attribute.name == "rounding_mode":
                    attribute.s = b"HALF_UP"
    return bytes(model.SerializeToString())


def _form(quant: LevelQuant) -> tuple[int, bool] | None:
    """Bits and narrow range of a Quant node that clips where these levels end, or None."""
    for narrow in (False, True):
        for bits in range(1, 17):
            top = 2 ** (bits - 1) - 1 if quant.signed else 2**bits - 1 - int(narrow)
            if top == quant.levels and narrow >= quant.signed:
                return bits, narrow
    return None


def _refusal(module: nn.Module) -> str:
    """Why QONNX cannot hold a layer, or ""."""
    quant = level_quant(module)
    if quant is not None:
        return "" if _form(quant) else f"{quant.levels} levels, neither 2**b - 1 nor 2**b - 2"
    if is_sign(module):
        return "activations of ±1: BipolarQuant has no sign(0) of its own"
    if act_quant_of(module) is not None:
        return "fp16 activations"
    if hasattr(module, "weight_quant") and weight_bits(module) == 16:
        return "fp16 weights"
    return ""


def _manager() -> Any:
    """Brevitas' exporter, told what our activations are."""
    try:
        import onnx  # noqa: F401
        import onnxoptimizer  # noqa: F401
        from brevitas.export.onnx.qonnx.function import BrevitasQuantOp
        from brevitas.export.onnx.qonnx.handler import BrevitasActQuantProxyHandler
        from brevitas.export.onnx.qonnx.manager import QONNXManager
    except ImportError as error:
        raise ImportError(f"QONNX files need onnx and onnxoptimizer: pip install 'qsnn[qonnx]' ({error})") from None

    class LevelHandler(BrevitasActQuantProxyHandler):  # type: ignore[misc]
        handled_layer = LevelActProxy

        def prepare_for_export(self, module: Any) -> None:
            quant = module.fused_activation_quant_proxy.tensor_quant
            bits, narrow = _form(quant) or (0, False)
            self.quant_op = BrevitasQuantOp
            self.symbolic_kwargs = {
                "scale": quant.step.detach(), "zero_point": torch.tensor(0.0), "bit_width": torch.tensor(float(bits)),
                "narrow_range": narrow, "signed": quant.signed, "rounding_mode": "ROUND",
            }  # fmt: skip

    class Manager(QONNXManager):  # type: ignore[misc]
        handlers = [LevelHandler, *QONNXManager.handlers]  # noqa: RUF012

    return Manager
