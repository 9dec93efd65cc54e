"""What joins values, adds them up, and moves them to other places, as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from qsnn.export.onnx_values import FLOAT32, Values, Wire
from qsnn.graph.modules import Add, Concat, Mean, Pad, Permute, Slice, Sum, Upsample, View

Shape = tuple[int, ...]


def _joined(values: Values, shape: Shape, wires: list[Wire]) -> tuple[list[Wire], Wire]:
    """Wires of one type and one length in time, and a wire of what they have in common."""
    wires = [values.ready(wire) for wire in wires]
    kinds = {(wire.dtype, wire.zero) for wire in wires}
    real, static = any(wire.real for wire in wires), all(wire.static for wire in wires)
    dtype = wires[0].dtype
    if len(kinds) > 1 or (not static and any(wire.static for wire in wires)):
        dtype = "f64" if any(wire.dtype in ("f64", "i32") for wire in wires) else "f32"
        wires = [values.cast(wire, dtype) for wire in wires]
    if real and not all(wire.real for wire in wires):
        wires = [
            wire if wire.real else replace(wire, names=tuple(values.increments(wire, dtype)), real=True, zero=0)
            for wire in wires
        ]
    if not static:
        factors = values.spans if real else values.steps
        wires = [
            replace(w, names=tuple(values.times(w.names[0], f, dtype) for f in factors), static=False)
            if w.static else w for w in wires
        ]  # fmt: skip
    most = max(wire.bound for wire in wires)
    ordered = all(wire.ordered for wire in wires)
    return wires, Wire((), dtype, shape, most, real, wires[0].zero, static, ordered)


def concat(values: Values, name: str, module: Concat, shape: Shape, *wires: Wire) -> Wire:
    """Values side by side."""
    parts, new = _joined(values, shape, list(wires))
    names = [values.graph.add("Concat", *each, axis=module.dim) for each in zip(*(w.names for w in parts), strict=True)]
    return replace(new, names=tuple(names))


def add(values: Values, name: str, module: Add, shape: Shape, *wires: Wire) -> Wire:
    """Spikes of one worth, added as integers; or currents."""
    parts = [values.cast(w, "f32") if w.zero else w for w in map(values.ready, wires)]
    bound = sum(wire.bound for wire in parts)
    if any(w.dtype == "u8" for w in parts) and bound * values.timesteps > 255:
        parts = [values.cast(wire, "f32") for wire in parts]
    parts, new = _joined(values, shape, parts)
    names = [values.graph.add("Add", *each) for each in zip(*(w.names for w in parts), strict=True)]
    return replace(new, names=tuple(names), bound=bound, ordered=values.timesteps == 1)


def over_dims(values: Values, name: str, module: Mean, shape: Shape, wire: Wire) -> Wire:
    """A sum of integers, or a sum or mean of currents, over whole dimensions."""
    source, graph = values.ready(wire), values.graph
    count = math.prod(source.shape[dim - 1] for dim in module.dims)
    bound = source.bound * count
    mean = not isinstance(module, Sum)
    if source.real or mean:
        source = values.cast(source, "f32" if source.dtype == "f32" and source.real else "f64")
    else:
        source = values.cast(source, "f32" if bound * values.timesteps < FLOAT32 else "f64")
    keep = int(module.keepdim)
    if mean:
        names = [graph.add("ReduceMean", x, axes=list(module.dims), keepdims=keep) for x in source.names]
    else:
        axes = graph.const(list(module.dims), "i64")
        names = [graph.add("ReduceSum", x, axes, keepdims=keep) for x in source.names]
    return replace(source, names=tuple(names), shape=shape, bound=bound, ordered=False)


def _moving(move: Callable[[Values, Any, Wire, str, Shape], str]) -> Callable[..., Wire]:
    """What writes a move, from how one tensor is moved."""

    def written(values: Values, name: str, module: Any, shape: Shape, wire: Wire) -> Wire:
        source = values.ready(wire)
        return replace(source, names=tuple(move(values, module, source, x, shape) for x in source.names), shape=shape)

    return written


def _reshaped(values: Values, x: str, shape: Shape) -> str:
    return values.graph.add("Reshape", x, values.graph.const([-1, *shape], "i64"))


def _view(values: Values, module: Any, wire: Wire, x: str, shape: Shape) -> str:
    return _reshaped(values, x, shape)


def _permute(values: Values, module: Permute, wire: Wire, x: str, shape: Shape) -> str:
    return values.graph.add("Transpose", x, perm=list(module.dims))


def _slice(values: Values, module: Slice, wire: Wire, x: str, shape: Shape) -> str:
    starts, ends, steps = zip(*module.bounds, strict=True)
    bounds = (starts, ends, tuple(range(1, 1 + len(module.bounds))), steps)
    return values.graph.add("Slice", x, *(values.graph.const(part, "i64") for part in bounds))


def _pad(values: Values, module: Pad, wire: Wire, x: str, shape: Shape) -> str:
    pads = np.array(module.pads).reshape(-1, 2)[::-1]
    whole = np.zeros((wire.dims, 2), dtype=np.int64)
    whole[wire.dims - len(pads) :] = pads
    graph = values.graph  # what stands for 0 is what is put in
    return graph.add("Pad", x, graph.const(whole.T.reshape(-1), "i64"), graph.const(wire.zero, wire.dtype))


def _upsample(values: Values, module: Upsample, wire: Wire, x: str, shape: Shape) -> str:
    fixed = len(wire.shape) - len(module.factors)
    split, tiles = list(wire.shape[:fixed]), [1] * (fixed + 1)
    for side, factor in zip(wire.shape[fixed:], module.factors, strict=True):
        split += [side, 1]
        tiles += [1, factor]
    tiled = values.graph.add("Tile", _reshaped(values, x, tuple(split)), values.graph.const(tiles, "i64"))
    return _reshaped(values, tiled, shape)


def _shuffle(values: Values, module: Any, wire: Wire, x: str, shape: Shape) -> str:
    """Channel and pixel shuffles: the values as a larger grid, its sides in another order."""
    c, *rest = wire.shape
    if isinstance(module, nn.ChannelShuffle):
        split, order = (module.groups, c // module.groups, *rest), (0, 2, 1, *range(3, 3 + len(rest)))
    elif isinstance(module, nn.PixelShuffle):
        r, (h, w) = module.upscale_factor, rest
        split, order = (c // r**2, r, r, h, w), (0, 1, 4, 2, 5, 3)
    else:
        r, (h, w) = module.downscale_factor, rest
        split, order = (c, h // r, r, w // r, r), (0, 1, 3, 5, 2, 4)
    return _reshaped(values, values.graph.add("Transpose", _reshaped(values, x, split), perm=list(order)), shape)


MOVES: dict[tuple[type[nn.Module], ...], Callable[..., Wire]] = {
    (nn.Flatten, View): _moving(_view), (Permute,): _moving(_permute), (Slice,): _moving(_slice), (Pad,): _moving(_pad),
    (Upsample,): _moving(_upsample), (nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle): _moving(_shuffle),
    (Concat,): concat, (Add,): add, (Mean, Sum): over_dims,
}  # fmt: skip
"""What writes each module that moves, joins or adds up; see ``MODULES``."""
