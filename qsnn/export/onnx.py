"""A folded network as an ONNX file: every node by one small function from a table, every integer as it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from qsnn.data.images import normalise
from qsnn.export.onnx_layers import (
    average_pool,
    float_layer,
    integer_input,
    integer_layer,
    max_pool,
    sum_pool,
    write_sum,
)
from qsnn.export.onnx_moves import FUNCTIONS
from qsnn.export.onnx_neurons import current, current_if, dynamic_if, integer_if, real_if
from qsnn.export.onnx_values import CannotWriteError, Values, Wire
from qsnn.files import write_atomic
from qsnn.folded.layers import FloatLayer, IntegerInput, IntegerLayer, SumPool
from qsnn.folded.neurons import Current, CurrentIF, DynamicIF, IntegerIF, RealIF
from qsnn.graph.recipe import child_recipe, input_shape_of
from qsnn.graph.trace import AVERAGE_POOLS, MAX_POOLS, shape_nodes
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
    """"int8": 8-bit products where they are exact; "float": float32 alone, for runtimes without them (OpenVINO)."""

    def __post_init__(self) -> None:
        """Refuse what is not known.

        Raises:
            ValueError: which option, and what it may be.
        """
        if self.input not in INPUTS:
            raise ValueError(f"expected input to be {' or '.join(map(repr, INPUTS))}, got {self.input!r}")
        if self.kernels not in KERNELS:
            raise ValueError(f"expected kernels to be {' or '.join(map(repr, KERNELS))}, got {self.kernels!r}")


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
    (Current,): current, (Repeat,): _same, (PlusMinus,): _plus_minus, MAX_POOLS: max_pool,
    AVERAGE_POOLS: average_pool,
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
    timesteps, firing = folded._checked(config.timesteps or folded.timesteps, config.firing or folded.firing)
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
    values = Values(timesteps, firing, "u8" if config.kernels == "int8" else "f32", table)
    values.write_sum = write_sum
    return _finished(values, _walk(folded, values, shape, frames), recipe, shape, frames)


def _shapes(network: fx.GraphModule, shape: tuple[int, ...]) -> dict[str, Any]:
    """The shape of every node's value for one image, without the batch; a list of them for a split."""
    found = []
    for batch in (2, 3):
        probe: Any = copy.deepcopy(network)
        for module in probe.modules():
            if hasattr(module, "timesteps"):
                module.timesteps = 1
        ShapeProp(probe).run(torch.zeros(batch, *shape, device=_device(network)))
        found.append({node.name: node.meta.get("tensor_meta") for node in probe.graph.nodes})
    shapes: dict[str, Any] = {}
    for name, meta in found[0].items():
        if hasattr(meta, "shape"):
            batches = meta.shape[:1], found[1][name].shape[:1]
            shapes[name] = tuple(meta.shape[1:]) if batches == ((2,), (3,)) else None
        elif isinstance(meta, tuple | list):
            shapes[name] = [tuple(part.shape[1:]) for part in meta]
    return shapes


def _device(network: nn.Module) -> torch.device:
    return next(iter((*network.parameters(), *network.buffers()))).device


def _walk(folded: SNN, values: Values, shape: tuple[int, ...], frames: bool) -> tuple[Wire, Wire | None]:
    """Write every node; return the readout's wire, and the integers that it was made of, if it was.

    Raises:
        ValueError: all nodes that cannot be written.
    """
    network = folded.network
    shapes, sizes = _shapes(network, shape), shape_nodes(network)
    wires: dict[fx.Node, Any] = {}
    missing: list[str] = []
    answer: tuple[Wire, Wire | None] | None = None
    for node in network.graph.nodes:
        if node in sizes:
            continue
        sources: list[Any] = [wires.get(source) for source in node.all_input_nodes if source not in sizes]
        if any(source is None for source in sources):
            continue  # behind what is named already
        values.graph.scope = node.name
        try:
            if node.op == "placeholder":
                wires[node] = _placeholder(values, shape, frames)
            elif node.op == "output":
                answer = _answer(values, network, node, sources[0], wires)
            elif node.op == "get_attr":
                raise CannotWriteError(f"{node.name} (a tensor of its own)")
            else:
                wires[node] = _written(values, network, node, sources, shapes.get(node.name))
        except CannotWriteError as error:
            missing.append(str(error))
    if missing:
        raise ValueError(f"cannot write to ONNX: {'; '.join(missing)}")
    assert answer is not None
    return answer


def _written(values: Values, network: fx.GraphModule, node: fx.Node, sources: list[Any], shape: Any) -> Any:
    if shape is None:
        raise CannotWriteError(f"{node.name}: it moves the batch")
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        for kinds, emit in MODULES.items():
            if isinstance(module, kinds):
                return emit(values, str(node.target), module, shape, *sources)
        raise CannotWriteError(f"{node.target} ({type(module).__name__})")
    if node.target in FUNCTIONS:
        return FUNCTIONS[node.target](values, node, shape, sources)
    raise CannotWriteError(f"{node.name} ({getattr(node.target, '__name__', node.target)})")


def _placeholder(values: Values, shape: tuple[int, ...], frames: bool) -> Wire:
    if values.tables is not None:
        return Wire(("pixels",), "u8", shape, static=True, kind="pixels")
    if not frames:
        return Wire(("images",), "f32", shape, real=True, static=True)
    graph = values.graph
    names = [graph.add("Gather", "images", graph.const(t, "i64"), axis=1) for t in range(values.timesteps)]
    return Wire(tuple(names), "f32", shape, real=True, kind="frames")


def _answer(
    values: Values, network: fx.GraphModule, node: fx.Node, wire: Wire, wires: dict[fx.Node, Any]
) -> tuple[Wire, Wire | None]:
    """The mean of the readout over the steps so far, and the integer sums it was made of."""
    graph, (source,) = values.graph, node.all_input_nodes
    dtype = "f32" if values.ready(wire).dtype == "f32" and wire.real else "f64"
    sums = values.summed(wire, dtype)
    names = [graph.add("Div", x, graph.const(float(t), dtype)) if t > 1 else x
             for x, t in zip(sums, values.steps, strict=True)]  # fmt: skip
    module = network.get_submodule(str(source.target)) if source.op == "call_module" else None
    inside = [wires[s] for s in source.all_input_nodes] if isinstance(module, Current) else []
    integers = None
    if len(inside) == 1 and not values.ready(inside[0]).real:
        kind = "i32" if inside[0].bound * values.timesteps < 2**31 else "i64"
        integers = replace(inside[0], names=tuple(values.summed(inside[0], kind)), dtype=kind)
    return replace(wire, names=tuple(graph.cast(name, "f32") for name in names)), integers


def _finished(
    values: Values, answer: tuple[Wire, Wire | None], recipe: dict[str, Any], shape: tuple[int, ...], frames: bool
) -> onnx.ModelProto:
    """The model with its inputs, outputs and metadata, checked."""
    graph = values.graph
    graph.scope = "answer"
    logits, integers = answer
    outputs = []
    for wire, name, kind in ((logits, "logits", TensorProto.FLOAT), (integers, "integer_logits", TensorProto.INT32)):
        if wire is None:
            continue
        if wire.dtype == "i64":
            kind = TensorProto.INT64
        front: list[str | int | None] = ["batch"] if values.deferred else [values.timesteps, "batch"]
        if values.deferred:
            graph.nodes.append(helper.make_node("Identity", [wire.names[0]], [name], name=name))
        else:
            axes = graph.const([0], "i64")
            rows = [graph.add("Unsqueeze", x, axes) for x in wire.names]
            graph.nodes.append(helper.make_node("Concat", rows, [name], name=name, axis=0))
        sides: list[str | int | None] = [*front, *wire.shape]
        outputs.append(helper.make_tensor_value_info(name, kind, sides))
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
