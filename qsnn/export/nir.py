"""A folded network as a NIR graph, and into the simulators that read one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from qsnn.export.gains import limits_of, weighted_range
from qsnn.export.nir_graph import Emit, Graph, Value
from qsnn.export.nir_read import RELAYS, import_nir
from qsnn.export.nir_read import load_into as load_into
from qsnn.files import write_atomic
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import IntegerInput, IntegerLayer, SumPool
from qsnn.folded.neurons import Current, CurrentIF
from qsnn.folded.terms import sides as as_tuple
from qsnn.graph.modules import Add, Concat, Sum
from qsnn.graph.recipe import input_shape_of
from qsnn.snn.network import SNN
from qsnn.snn.neurons import Repeat

RELAY_THRESHOLD = 0.999
EXACT = {np.float32: 2**22, np.float64: 2**51}
"""Sums of quarters are exact below this."""


def write(folded: SNN, path: str | Path, *, timesteps: int | None = None) -> Written:
    r"""Write a folded network as a NIR graph whose every spike and integer logit at T = 2 is :func:`qsnn.fold`'s.

    NIR's IF has no initial potential and no bias. The integer table M of :class:`~qsnn.folded.integer.IntegerIF` is an
    IF with :math:`\Theta = M_{2,1} - M_{2,0}`, :math:`b = M_{1,0} - M_{2,0}` and
    :math:`v_0 = \Theta - M_{1,0} - b`. Two relay channels bring :math:`v_0 + \tfrac12` (at the first step) and b (at
    each) in as weights; the half makes > and >= agree. Pooling is written as a dense convolution, gains and signs go
    into weights. The reset is soft: NIR cannot say so, and :func:`load_into` sets it.

    The input of the graph is (C + 2, H, W): the integers of the input's quantizer, then the two relays. Its output are
    integer logits A; the answer is the mean over the steps of :math:`g A + b` (gains and biases are in the metadata).

    Args:
        folded: from :func:`qsnn.fold`, with a quantized input.
        path: the file to write.
        timesteps: 1 or 2; default the network's.
    Returns:
        What was written: numbers are float32, or float64 where the gains of a residual sum need more.
    Raises:
        TypeError: not an SNN.
        ValueError: not folded, T > 2 (its table is an IF only by chance), or parts that NIR has no node for, by name.
        ImportError: the package ``nir`` is missing.
    """
    nir = import_nir()
    if not isinstance(folded, SNN):
        raise TypeError(f"expected a folded SNN, got {type(folded).__name__}")
    if not folded.folded:
        raise ValueError("this network is not folded; call qsnn.fold(snn) first")
    steps = timesteps or folded.timesteps
    if steps > 2:
        raise ValueError(
            f"expected timesteps of 1 or 2, got {steps}: NIR's IF has one threshold, and for more steps the rounded "
            f"integer thresholds are in general not those of an IF neuron; write T = 2"
        )
    shape = input_shape_of(folded)
    if shape is None or len(shape) != 3:
        raise ValueError(f"expected images of a known shape (C, H, W), got {shape}; quantize with data records it")
    graph = Graph(nir, folded, shape, steps, EMIT)
    with torch.no_grad():
        graph.run()
    dtype = next((kind for kind, most in EXACT.items() if graph.largest < most), None)
    if dtype is None:
        raise ValueError(f"cannot be written as NIR: its sums reach {graph.largest:,.0f}, beyond what float64 holds")
    for node in graph.nodes.values():
        for name in ("weight", "bias", "r", "v_threshold", "v_reset"):
            if hasattr(node, name):
                setattr(node, name, getattr(node, name).astype(dtype))
    found = nir.NIRGraph(nodes=graph.nodes, edges=graph.edges, metadata=graph.metadata, type_check=False)
    beside = Path(path).with_name(f".{Path(path).name}.part")
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        nir.write(beside, found)
        write_atomic(path, beside.read_bytes())
    finally:
        beside.unlink(missing_ok=True)
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    return Written({kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}, np.dtype(dtype).name)


@dataclass(frozen=True)
class Written:
    """What a NIR file holds. ``str()`` is one line."""

    nodes: dict[str, int]
    """How many nodes of each type."""
    dtype: str
    """Of its numbers; a simulator that reads float64 as float32 is not exact."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.nodes.items()) + f" in {self.dtype}"


def _nir() -> Any:
    try:
        import nir
    except ImportError:
        raise ImportError("NIR files need the package nir: pip install 'nir>=1.0.8'") from None
    return nir


def _added(graph: Graph, node: fx.Node, module: Any) -> Value:
    first, second = (graph.values[n] for n in node.args if isinstance(n, fx.Node))
    if first.layer is not None or second.layer is not None:
        raise ValueError("the sums of a layer are read by another one than a neuron")
    name = graph.linear(node.name, second, np.ones(1), None, np.zeros(1))  # the relays come from the first alone
    return replace(first, names=[*first.names, name], low=first.low + second.low, high=first.high + second.high)


def _placed(graph: Graph, node: fx.Node, value: Value, weight: np.ndarray, stride: tuple[int, int], first: bool) -> str:
    """Channels put to other places by a convolution of 1x1 (O, I); the relays pass through the first one alone."""
    shape = graph.shapes[node]
    moves = {"stride": stride, "padding": (0, 0), "dilation": (1, 1)}
    whole = _channels([], shape, value.low, value.high, (weight[..., None, None], moves, value))
    zero = np.zeros(shape[0])
    return graph.linear(node.name, whole, np.ones(1), zero if first else None, zero)


def _channels(names: list[str], shape: tuple[int, ...], low: np.ndarray, high: np.ndarray, layer: Any = None) -> Value:
    return Value(names, shape, low, high, (shape[0], shape[0] + 1), shape[0] + RELAYS, layer)


def _joined(graph: Graph, node: fx.Node, module: Any) -> Value:
    parts = [graph.values[n] for n in node.args if isinstance(n, fx.Node)]
    if module.dim != 1 or any(part.layer is not None or len(part.shape) != 3 for part in parts):
        raise ValueError("only maps of spikes are joined, channel by channel")
    names, place = [], 0
    for part in parts:
        weight = np.zeros((graph.shapes[node][0], part.shape[0]))
        weight[place : place + part.shape[0]] = np.eye(part.shape[0])
        names.append(_placed(graph, node, part, weight, (1, 1), first=place == 0))
        place += part.shape[0]
    low, high = min(int(p.low.min()) for p in parts), max(int(p.high.max()) for p in parts)
    return _channels(names, graph.shapes[node], np.array([min(low, 0)]), np.array([max(high, 0)]))


def _moved(graph: Graph, node: fx.Node, module: Any) -> Value:
    """Channels chosen, put in another order or beside zeros, and every k-th pixel; all else has no node in NIR."""
    value, shape = graph.source(node), graph.shapes[node]
    if len(shape) == 1:
        return _flattened(graph, node, module)
    if len(shape) == len(value.shape) == 3:
        before = torch.arange(1.0, int(np.prod(value.shape)) + 1, dtype=torch.float64).view(1, *value.shape)
        after = module(before)
        stride = tuple(-(-a // b) for a, b in zip(value.shape[1:], shape[1:], strict=True))
        chosen = before[0, :, :: stride[0], :: stride[1]]
        same = chosen.shape[1:] == after.shape[2:] and len(after) == 1
        weight = (after[0, :, None] == chosen[None]).flatten(2).all(2).double().numpy() if same else np.zeros((1, 1))
        if same and bool(((weight.sum(1) == 1) | (after[0] == 0).flatten(1).all(1).numpy()).all()):
            name = _placed(graph, node, value, weight, (stride[0], stride[1]), first=True)
            low, high = np.array([min(int(value.low.min()), 0)]), np.array([max(int(value.high.max()), 0)])
            return _channels([name], shape, low, high)
    raise ValueError("it moves values in a way that is no choice of channels and pixels")


def _summed(graph: Graph, node: fx.Node, module: Any) -> Value:
    value = graph.source(node)
    if len(value.shape) != 3 or sorted(module.dims) != [2, 3]:
        raise ValueError("only all pixels of a channel are summed")
    side = value.shape[1:]
    found = _sum_pool(graph, f"{node.name}_pool", value, SumPool(side, side, (0, 0)), (value.shape[0], 1, 1))
    return found if module.keepdim else _flat(graph, node, found)


def _flattened(graph: Graph, node: fx.Node, module: Any) -> Value:
    if len(graph.shapes[node]) != 1:
        raise ValueError("only all of an image is flattened")
    return _flat(graph, node, graph.source(node))


def _flat(graph: Graph, node: fx.Node, value: Value) -> Value:
    if len(value.shape) == 1:
        return value
    area = int(np.prod(value.shape[1:]))
    kind = graph.nir.Flatten(input_type={"input": np.array([value.width, *value.shape[1:]])}, start_dim=0, end_dim=-1)
    name, size = graph.add(node.name, kind, value.names), value.shape[0] * area
    low, high = (
        np.broadcast_to(np.broadcast_to(x, (value.shape[0],)).reshape(-1, 1), (value.shape[0], area)).reshape(-1)
        for x in (value.low, value.high)
    )
    return Value([name], (size,), low, high, (size, size + area), size + RELAYS * area)


def _input(graph: Graph, node: fx.Node, module: Any) -> Value:
    c, h, w = graph.image
    name = graph.add("input", graph.nir.Input(input_type={"input": np.array([c + RELAYS, h, w])}), [])
    graph.metadata |= {
        "input_step": module.step.double().reshape(-1).cpu().numpy(), "input_levels": int(module.levels),
        "timesteps": graph.timesteps, "written_by": "qsnn",
    }  # fmt: skip
    bound = np.array([module.levels])
    return Value([name], (c, h, w), -bound, bound, (c, c + 1), c + RELAYS)


def _layer(graph: Graph, node: fx.Node, module: Any) -> Value:
    if module.weight.dtype != torch.int8:
        raise ValueError(f"weights of {module.weight_bits} bit; at most 8 are written")
    source, weight = graph.source(node), module.integers.cpu().numpy()
    if "output_padding" in module.options:
        raise ValueError("NIR has no transposed convolution")
    if weight.ndim in (3, 5) or type(module) is not IntegerLayer or (weight.ndim == 2) != (len(source.shape) == 1):
        raise ValueError("only 2-d convolutions, and linear layers of a vector, are written")
    moves = {key: (1, 1) for key in ("stride", "dilation")} | {"padding": (0, 0)}
    if weight.ndim == 2:
        weight = weight[..., None, None]
    else:
        for key in ("stride", "dilation", "padding"):
            given = module.options[key]
            if given in ("same", "valid"):
                spans = [d * (k - 1) for d, k in zip(moves["dilation"], weight.shape[2:], strict=True)]
                if given == "same" and any(span % 2 for span in spans):
                    raise ValueError("padding='same' of an even kernel has no padding in NIR")
                given = tuple(span // 2 if given == "same" else 0 for span in spans)
            moves[key] = as_tuple(given, 2)  # type: ignore[assignment]
        groups, (o, i) = module.options["groups"], weight.shape[:2]
        dense = np.zeros((o, i * groups, *weight.shape[2:]))  # SpikingJelly reads no groups, and relays have none
        for g in range(groups):
            rows = slice(g * o // groups, (g + 1) * o // groups)
            dense[rows, g * i : (g + 1) * i] = weight[rows]
        weight = dense
    low, high = weighted_range(weight.reshape(len(weight), -1), source.low, source.high)
    shape = graph.shapes[node]
    return Value([], shape, low, high, (shape[0], shape[0] + 1), shape[0] + RELAYS, (weight, moves, source))


def _pool(graph: Graph, node: fx.Node, module: Any) -> Value:
    if len(graph.shapes[node]) != 3:
        raise ValueError("only 2-d pooling is written")
    return _sum_pool(graph, str(node.target), graph.source(node), module, graph.shapes[node])


def _sum_pool(graph: Graph, name: str, source: Value, module: SumPool, shape: tuple[int, ...]) -> Value:
    weight = np.eye(shape[0]).reshape(shape[0], shape[0], 1, 1) * np.ones((1, 1, *module.kernel))
    moves = {"stride": module.stride, "padding": module.padding, "dilation": (1, 1)}
    low, high = weighted_range(weight.reshape(shape[0], -1), source.low, source.high)
    value = _channels([], shape, low, high, (weight, moves, source))
    zero = np.zeros(shape[0])
    return replace(value, names=[graph.linear(name, value, np.ones(1), zero, zero)], layer=None)


def _neuron(graph: Graph, node: fx.Node, module: Any) -> Value:
    sources = [n for n in node.args if isinstance(n, fx.Node)]
    if any(n not in graph.values for n in sources):
        raise ValueError("it sees a real current")
    if module.signed:
        raise ValueError("its spikes are signed, and NIR's IF cannot take one back")
    inputs = [graph.values[n] for n in sources]
    ranges = [(v.low, v.high) for v in inputs]
    shape, channels = inputs[0].shape, inputs[0].shape[0]
    found = limits_of(module, ranges, graph.timesteps, "online", shape)
    if found.limits.shape[1] not in (1, channels):
        raise ValueError("its gains or biases differ within a channel, where a relay has one weight")
    limits = np.broadcast_to(found.limits, (len(found.limits), channels)).astype(float) - 0.5
    gains = np.broadcast_to(found.gains, (len(inputs), channels))
    if graph.timesteps == 1:
        (first,) = limits
        theta, bias = np.ones(channels), np.zeros(channels)
    else:
        first, later, again = limits
        again = np.where(again <= later, later + 0.25, again)  # θ below one unit: between the same two integers
        theta, bias = again - later, first - later
    start = theta - first - bias
    reach = sum(np.abs(g) * np.maximum(np.abs(a), np.abs(b)) for g, (a, b) in zip(gains, ranges, strict=True))
    top = float((reach * graph.timesteps + np.abs(start) + np.abs(bias) * graph.timesteps + theta).max())
    graph.largest = max(graph.largest, top)
    zero = np.zeros(channels)
    names = [
        graph.linear(f"{node.target}_in{j or ''}", value, gains[j], start if j == 0 else None, bias if j == 0 else zero)
        for j, value in enumerate(inputs)
    ]
    full = np.concatenate([theta, np.full(RELAYS, RELAY_THRESHOLD)])
    full = np.broadcast_to(full.reshape(-1, *[1] * (len(shape) - 1)), (channels + RELAYS, *shape[1:])).copy()
    kind = graph.nir.IF(r=np.ones_like(full), v_threshold=full, v_reset=np.zeros_like(full))
    name = graph.add(str(node.target), kind, names)
    return Value([name], shape, np.array([0]), np.array([1]), (channels, channels + 1), channels + RELAYS)


def _readout(graph: Graph, node: fx.Node, module: Any) -> None:
    inputs = [graph.values[n] for n in node.all_input_nodes if n in graph.values]
    if not any(user.op == "output" for user in node.users) or len(inputs) != 1 or len(inputs[0].shape) != 1:
        raise ValueError("a current between layers, or logits that are no single vector of integers, are real")
    (value,) = inputs
    name = graph.linear(f"{node.target}_in", value, np.ones(1), None, np.zeros(1), relay=False)
    classes = value.shape[0]
    graph.metadata |= {
        "gain": np.broadcast_to(module.gain(0, graph.timesteps).reshape(-1).double().cpu().numpy(), (classes,)).copy(),
        "bias": np.broadcast_to(module.step_bias.double().reshape(-1).cpu().numpy(), (classes,)).copy(),
    }
    graph.add("output", graph.nir.Output(output_type={"output": np.array([classes])}), [name])


EMIT: dict[Any, Emit] = {
    IntegerInput: _input,
    IntegerLayer: _layer,
    SumPool: _pool,
    IntegerIF: _neuron,
    CurrentIF: _neuron,
    Current: _readout,
    Add: _added,
    Concat: _joined,
    Sum: _summed,
    "moves": _moved,
    Repeat: lambda graph, node, module: graph.values[node.all_input_nodes[0]],
}
"""What writes each kind of module: by its exact type, else by what it does."""
