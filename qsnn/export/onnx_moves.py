"""Functions and methods as ONNX nodes: what joins values, and what moves them to other places."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from qsnn.export.onnx_values import CannotWriteError, Values, Wire


def _joined(values: Values, node: fx.Node, shape: tuple[int, ...], wires: list[Wire]) -> tuple[list[Wire], Wire]:
    """Wires of one type and one length in time, and a wire of what they have in common."""
    wires = [values.ready(wire) for wire in wires]
    kinds = {(wire.dtype, wire.zero) for wire in wires}
    real, static = any(wire.real for wire in wires), all(wire.static for wire in wires)
    dtype = wires[0].dtype
    if len(kinds) > 1 or (not static and any(wire.static for wire in wires)):
        dtype = "f64" if any(wire.dtype in ("f64", "i32") for wire in wires) else "f32"
        wires = [values.cast(wire, dtype) for wire in wires]
    if real and not all(wire.real for wire in wires):
        wires = [replace(wire, names=tuple(values.increments(wire, dtype)), real=True) for wire in wires]
    if not static:
        factors = values.spans if real else values.steps
        wires = [
            replace(w, names=tuple(values.times(w.names[0], f, dtype) for f in factors), static=False)
            if w.static else w for w in wires
        ]  # fmt: skip
    most = max(wire.bound for wire in wires)
    ordered = all(wire.ordered for wire in wires)
    return wires, Wire((), dtype, shape, most, real, wires[0].zero, static, ordered)


def _cat(values: Values, node: fx.Node, shape: tuple[int, ...], wires: list[Wire]) -> Wire:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    wires, new = _joined(values, node, shape, wires)
    names = [values.graph.add("Concat", *parts, axis=dim) for parts in zip(*(w.names for w in wires), strict=True)]
    return replace(new, names=tuple(names))


def _add(values: Values, node: fx.Node, shape: tuple[int, ...], wires: list[Wire]) -> Wire:
    wires = [values.cast(w, "f32") if w.zero else w for w in map(values.ready, wires)]
    bound = sum(wire.bound for wire in wires)
    if any(w.dtype == "u8" for w in wires) and bound * values.timesteps > 255:
        wires = [values.cast(wire, "f32") for wire in wires]
    wires, new = _joined(values, node, shape, wires)
    names = [values.graph.add("Add", *parts) for parts in zip(*(w.names for w in wires), strict=True)]
    return replace(new, names=tuple(names), bound=bound, ordered=values.timesteps == 1)


def _moved(values: Values, node: fx.Node, shape: tuple[int, ...], wires: list[Wire]) -> Wire:
    """A view or a flatten: the batch stays in front, the other sides are known."""
    wire = values.ready(wires[0])
    target = values.graph.const([-1, *shape], "i64")
    return replace(wire, names=tuple(values.graph.add("Reshape", x, target) for x in wire.names), shape=shape)


def _transposed(values: Values, node: fx.Node, shape: tuple[int, ...], wires: list[Wire]) -> Wire:
    wire = values.ready(wires[0])
    order = list(range(wire.dims))
    given: Any = node.args[1:] or tuple(node.kwargs.values())
    given = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if node.target in (torch.permute, "permute"):
        order = [cast(int, d) % wire.dims for d in given]
    else:
        a, b = (cast(int, d) % wire.dims for d in given)
        order[a], order[b] = order[b], order[a]
    if order[0] != 0:
        raise CannotWriteError(f"{node.name}: it moves the batch")
    names = [values.graph.add("Transpose", x, perm=order) for x in wire.names]
    return replace(wire, names=tuple(names), shape=shape)


def _parts(values: Values, node: fx.Node, shape: Any, wires: list[Wire]) -> list[Wire]:
    """The pieces of a chunk or split; their sides stand in ``shape``."""
    wire = values.ready(wires[0])
    dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % wire.dims  # type: ignore[operator]
    if dim == 0:
        raise CannotWriteError(f"{node.name}: it splits the batch")
    parts, start, graph = [], 0, values.graph
    for part in shape:
        end = start + part[dim - 1]
        ends = [graph.const([x], "i64") for x in (start, end, dim)]
        parts.append(replace(wire, names=tuple(graph.add("Slice", x, *ends) for x in wire.names), shape=part))
        start = end
    return parts


def _item(values: Values, node: fx.Node, shape: tuple[int, ...], wires: list[Any]) -> Wire:
    if not isinstance(wires[0], list) or not isinstance(node.args[1], int):
        raise CannotWriteError(f"{node.name}: an index that is not a piece of a split")
    return cast(Wire, wires[0][node.args[1]])


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.cat: _cat, operator.add: _add, operator.iadd: _add, torch.add: _add, "add": _add, "add_": _add,
    torch.flatten: _moved, torch.reshape: _moved, torch.unsqueeze: _moved, torch.squeeze: _moved,
    "flatten": _moved, "view": _moved, "reshape": _moved, "contiguous": lambda v, n, s, w: w[0],
    torch.transpose: _transposed, torch.permute: _transposed, "transpose": _transposed, "permute": _transposed,
    torch.chunk: _parts, torch.split: _parts, "chunk": _parts, "split": _parts, operator.getitem: _item,
}  # fmt: skip
"""What writes a function or method: (values, node, shape of one image behind it, its inputs) -> wire."""
