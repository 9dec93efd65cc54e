"""A folded network as an ONNX file: every node by one small function from a table, every integer as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from qsnn.data.images import normalise
from qsnn.export.onnx_gates import current_gate, gating, integer_gate
from qsnn.export.onnx_layers import float_layer, integer_input, integer_layer, write_input, write_sum
from qsnn.export.onnx_moves import MOVES
from qsnn.export.onnx_neurons import current, current_if, dynamic_if, integer_if, real_if
from qsnn.export.onnx_pools import average_pool, count_pool, max_pool, sum_pool
from qsnn.export.onnx_products import integer_product, mean_product
from qsnn.export.onnx_values import TYPES, CannotWriteError, Values, Wire
from qsnn.files import write_atomic
from qsnn.folded.gates import CurrentGate, IntegerGate
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import CountPool, FloatLayer, IntegerInput, IntegerLayer, SumPool
from qsnn.folded.neurons import Current, CurrentIF, DynamicIF, RealIF
from qsnn.folded.products import IntegerProduct
from qsnn.graph.kinds import CLASSES
from qsnn.graph.modules import Gating
from qsnn.graph.recipe import child_recipe, input_shape_of
from qsnn.graph.trace import module_of, value_shapes
from qsnn.options import seen
from qsnn.snn.counts import CountProduct
from qsnn.snn.network import SNN
from qsnn.snn.neurons import PlusMinus, Repeat

OPSET, IR_VERSION = 17, 8
MOST_ONLINE, MOST_DEFERRED = 8, 255
"""Largest T that is unrolled; largest T whose counts fit into 8 bits."""
INPUTS, KERNELS = ("float", "uint8"), ("int8", "float")


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """What the file takes, and which arithmetic it uses."""

    timesteps: int | None = None
    """Time steps T; default what the network is made for."""
    firing: str | None = None
    """"online" (an answer after every step) or "deferred" (one integer pass); default what the network is made for."""
    input: str = "float"
    """"float": normalised images; "uint8": raw pixels, normalisation inside."""
    kernels: str = "int8"
    """"int8": 8-bit products where they are exact and the faster form; "float": float32 alone, for runtimes that lack
    them (OpenVINO)."""

    def __post_init__(self) -> None:
        """Refuse what is not known.

        Raises:
            ValueError: which option, and what it may be.
        """
        if self.input not in INPUTS:
            raise ValueError(f"expected input to be {' or '.join(map(repr, INPUTS))}, got {seen(self.input)}")
        if self.kernels not in KERNELS:
            raise ValueError(f"expected kernels to be {' or '.join(map(repr, KERNELS))}, got {seen(self.kernels)}")


def _same(values: Values, name: str, module: Any, shape: tuple[int, ...], wire: Wire) -> Wire:
    return wire


def _plus_minus(values: Values, name: str, module: PlusMinus, shape: tuple[int, ...], wire: Wire) -> Wire:
    wire = values.ready(wire)  # 2·spike around a zero of 1
    names = [values.graph.add("Add", x, x) for x in wire.names]
    if wire.dtype == "u8":
        return replace(wire, names=tuple(names), zero=1)
    names = [values.graph.add("Sub", x, values.graph.const(1, wire.dtype)) for x in names]
    return replace(wire, names=tuple(names))


MODULES: dict[tuple[type[nn.Module], ...], Callable[..., Wire]] = {
    (IntegerInput,): integer_input, (IntegerLayer,): integer_layer, (FloatLayer,): float_layer, (SumPool,): sum_pool,
    (IntegerIF,): integer_if, (DynamicIF,): dynamic_if, (CurrentIF,): current_if, (RealIF,): real_if,
    (IntegerGate,): integer_gate, (CurrentGate,): current_gate, (Gating,): gating,
    (IntegerProduct,): integer_product, (CountProduct,): mean_product,
    (Current,): current, (Repeat,): _same, (PlusMinus,): _plus_minus, (CountPool,): count_pool, **MOVES,
    CLASSES["takes maxima"]: max_pool, CLASSES["averages"]: average_pool,
}  # fmt: skip
"""What writes a module: (values, name, module, shape of one image behind it, its inputs) -> the wire it gives. The
first row that fits counts."""


def write_onnx(folded: SNN, path: str | Path, **options: Any) -> None:
    """Write a folded network as an ONNX file; see :func:`qsnn.export`.

    Raises:
        ValueError: an option, or nodes that have no ONNX form, all of them named.
    """
    config = OnnxConfig(**options)
    write_atomic(path, onnx_model(folded, config).SerializeToString())


def onnx_model(folded: SNN, config: OnnxConfig) -> onnx.ModelProto:
    """The checked ONNX model of a folded network."""
    timesteps, firing = folded._checked(
        folded.timesteps if config.timesteps is None else config.timesteps,
        folded.firing if config.firing is None else config.firing,
    )
    most = MOST_DEFERRED if firing == "deferred" else MOST_ONLINE
    if timesteps > most:
        raise ValueError(f"expected at most {most} steps of {firing} firing in an ONNX file, got timesteps={timesteps}")
    shape = input_shape_of(folded)
    if shape is None:
        raise ValueError("the image shape is unknown; quantize with data records it")
    # how an image file becomes the input: what qsnn.export.runtime reads, beside the data's mean and std
    files = {"mode": {1: "L", 3: "RGB"}.get(shape[0], ""), "resize": "fit, bilinear"}
    chosen = asdict(replace(config, timesteps=timesteps, firing=firing))
    recipe = child_recipe(folded, "onnx", export={**chosen, **files})
    data = recipe.get("data", {})
    frames = data.get("frames") is not None
    table = None
    if config.input == "uint8":
        if frames or len(data.get("mean", ())) != shape[0]:
            raise ValueError("input='uint8' needs the mean and std of image data in the recipe; use input='float'")
        pixels = torch.arange(256, dtype=torch.uint8).expand(shape[0], 256)[..., None]
        table = normalise(pixels, data["mean"], data["std"])[..., 0].numpy()
    signed = any(getattr(neuron, "signed", False) for _, neuron in folded.neurons())
    values = Values(timesteps, firing, "u8" if config.kernels == "int8" else "f32", table, signed)
    values.write_sum, values.write_input = write_sum, write_input
    return _finished(values, _walk(folded, values, shape, frames), recipe, shape, frames)


Answer = tuple[Wire, Wire | None]
"""A head's answers, and the integers that its readout was made of, if it was."""


def _walk(folded: SNN, values: Values, shape: tuple[int, ...], frames: bool) -> list[Answer]:
    """Write every node; return the answers of every head.

    Raises:
        ValueError: all nodes that cannot be written.
    """
    network = folded.network
    shapes = value_shapes(network, shape)
    wires: dict[fx.Node, Wire] = {}
    missing: list[str] = []
    answers: list[Answer] = []
    for node in network.graph.nodes:
        if any(source not in wires for source in node.all_input_nodes):
            continue  # behind what is named already
        values.graph.scope = node.name
        try:
            if node.op == "placeholder":
                wires[node] = _placeholder(values, shape, frames)
            elif node.op == "output":
                answers = [_answer(values, network, source, wires) for source in tree_leaves(node.args[0])]
            else:
                wires[node] = _written(values, network, node, wires, shapes)
        except CannotWriteError as error:
            missing.append(str(error))
    if missing:
        raise ValueError(f"cannot write to ONNX: {'; '.join(missing)}")
    return answers


def _written(
    values: Values, network: fx.GraphModule, node: fx.Node, wires: dict[fx.Node, Wire],
    shapes: dict[str, tuple[int, ...]],
) -> Wire:  # fmt: skip
    module = module_of(network, node)
    if module is None:
        raise CannotWriteError(f"{node.name} ({getattr(node.target, '__name__', node.target)})")
    sources = [wires[source] for source in node.args if isinstance(source, fx.Node)]
    for kinds, emit in MODULES.items():
        if isinstance(module, kinds):
            return emit(values, str(node.target), module, shapes[node.name][1:], *sources)
    raise CannotWriteError(f"{node.target} ({type(module).__name__})")


def _placeholder(values: Values, shape: tuple[int, ...], frames: bool) -> Wire:
    if values.tables is not None:
        return Wire(("pixels",), "u8", shape, static=True, kind="pixels")
    if not frames:
        return Wire(("images",), "f32", shape, real=True, static=True)
    graph = values.graph
    names = [graph.add("Gather", "images", graph.const(t, "i64"), axis=1) for t in range(values.timesteps)]
    return Wire(tuple(names), "f32", shape, real=True, kind="frames")


def _answer(values: Values, network: fx.GraphModule, source: fx.Node, wires: dict[fx.Node, Wire]) -> Answer:
    """The mean of a readout over the steps so far, and the integer sums it was made of."""
    graph, wire, module = values.graph, wires[source], module_of(network, source)
    dtype = "f32" if values.ready(wire).dtype == "f32" and wire.real else "f64"
    sums = values.summed(wire, dtype)
    names = [graph.add("Div", x, graph.const(float(t), dtype)) if t > 1 else x
             for x, t in zip(sums, values.steps, strict=True)]  # fmt: skip
    inside = [wires[s] for s in source.all_input_nodes] if isinstance(module, Current) else []
    integers = None
    if len(inside) == 1 and not values.ready(inside[0]).real:
        kind = "i32" if inside[0].bound * values.timesteps < 2**31 else "i64"
        integers = replace(inside[0], names=tuple(values.summed(inside[0], kind)), dtype=kind)
    return replace(wire, names=tuple(graph.cast(name, "f32") for name in names), dtype="f32"), integers


def _finished(
    values: Values, answers: list[Answer], recipe: dict[str, Any], shape: tuple[int, ...], frames: bool
) -> onnx.ModelProto:
    """The model with its inputs, outputs and metadata, checked."""
    graph = values.graph
    graph.scope = "answer"
    heads = [f"_{place}" if place else "" for place in range(len(answers))]
    named = [(logits, f"logits{head}") for (logits, _), head in zip(answers, heads, strict=True)]
    named += [(sums, f"integer_logits{head}") for (_, sums), head in zip(answers, heads, strict=True) if sums]
    outputs = []
    for wire, name in named:
        front: list[str | int | None] = ["batch"] if values.deferred else [values.timesteps, "batch"]
        if values.deferred:
            graph.publish(wire.names[0], name)
        else:
            axes = graph.const([0], "i64")
            rows = [graph.add("Unsqueeze", x, axes) for x in wire.names]
            graph.nodes.append(helper.make_node("Concat", rows, [name], name=name, axis=0))
        sides: list[str | int | None] = [*front, *wire.shape]
        outputs.append(helper.make_tensor_value_info(name, TYPES[wire.dtype][0], sides))
    if values.tables is not None:
        entry = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", *shape])
    else:
        before: list[str | int | None] = ["batch", values.timesteps] if frames else ["batch"]
        entry = helper.make_tensor_value_info("images", TensorProto.FLOAT, [*before, *shape])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "qsnn", [entry], outputs, graph.used()),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qsnn",
    )  # fmt: skip
    helper.set_model_props(model, {
        name: json.dumps(value, separators=(",", ":")) for name, value in (("qsnn", recipe), ("forms", values.forms))
    })  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    return model
