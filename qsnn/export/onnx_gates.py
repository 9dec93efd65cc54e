"""Gates as ONNX nodes: a comparison decides, and Where hands a value on, or 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qsnn.export.onnx_layers import array
from qsnn.export.onnx_neurons import summed_currents
from qsnn.export.onnx_values import FLOAT32, Values, Wire
from qsnn.folded.gates import CurrentGate, IntegerGate
from qsnn.graph.modules import Gating

Shape = tuple[int, ...]


def integer_gate(values: Values, name: str, module: IntegerGate, shape: Shape, wire: Wire) -> Wire:
    """A_t >= M_t, of integers."""
    source, graph = values.ready(wire), values.graph
    dtype = source.dtype if source.dtype in ("i32", "f64") else "f32"
    source = values.cast(source, dtype)
    names = list(source.names) * (len(values.steps) if source.static else 1)
    sign, table = array(module.sign), array(module.table(values.timesteps))
    if (sign < 0).any():
        flip = graph.const(_shaped(module, sign), dtype)
        names = [graph.add("Mul", x, flip) for x in names]
    reached = []
    for t, x in zip(values.steps, names, strict=True):
        bound = source.bound * (1 if source.static else t)
        whole = np.clip(table[t - 1], -(2.0**53), 2.0**53).astype(np.int64)
        whole = -(-whole // t) if source.static else whole  # t·A >= M exactly when A >= ⌈M / t⌉
        limits = np.clip(whole, -bound, bound + 1)
        if dtype == "f32" and bound < FLOAT32 / 4:
            limits = limits - 0.5  # half a unit of room, should a runtime's float sums not be integers to the last bit
        reached.append(graph.add("GreaterOrEqual", x, graph.const(_shaped(module, limits), dtype)))
    values.note(name, "a comparison of integers")
    return _decided(values, reached, shape)


def current_gate(values: Values, name: str, module: CurrentGate, shape: Shape, *wires: Wire) -> Wire:
    """A sum of currents against t·λ, in float64."""
    graph, level = values.graph, array(module.level)
    totals = summed_currents(values, module, wires)
    reached = [
        graph.add("GreaterOrEqual", x, graph.const(float(t) * level, "f64"))
        for t, x in zip(values.steps, totals, strict=True)
    ]
    values.note(name, "real: sums of currents in float64")
    return _decided(values, reached, shape)


def gating(values: Values, name: str, module: Gating, shape: Shape, gate: Wire, wire: Wire) -> Wire:
    """The value of each step where the gate is 1 then, else 0."""
    graph, source, gate = values.graph, values.ready(wire), values.ready(gate)
    dtype = source.dtype
    if source.zero or (dtype == "u8" and source.static):  # T of them need more than 8 bits
        dtype = "f32" if source.bound * values.timesteps < FLOAT32 else "f64"
    source = values.cast(source, dtype)
    spans = values.spans if source.static else (1,) * len(values.spans)
    parts = values.increments(source, dtype) * (len(spans) if source.static else 1)
    zero, names = graph.const(0, dtype), list[str]()
    for x, opened, span in zip(parts, values.increments(gate, gate.dtype), spans, strict=True):
        passed = graph.add("Where", graph.cast(opened, "bool"), values.times(x, span, dtype), zero)
        names.append(graph.add("Add", names[-1], passed) if names and not source.real else passed)
    return replace(source, names=tuple(names), shape=shape, static=False)


def _shaped(module: IntegerGate, x: Any) -> Any:
    return x.reshape(module.shape if x.size > 1 else ())


def _decided(values: Values, reached: list[str], shape: Shape) -> Wire:
    """Decisions as counts up to each answer; deferred the one decision holds for all T steps."""
    graph, names = values.graph, list[str]()
    if values.deferred:
        counts = (graph.const(n, values.counts) for n in (values.timesteps, 0))
        names = [graph.add("Where", reached[0], *counts)]
    else:
        for opened in reached:
            one = graph.cast(opened, values.counts)
            names.append(graph.add("Add", names[-1], one) if names else one)
    return Wire(tuple(names), values.counts, shape, 1.0, ordered=True)
