"""Layers with weights, input and pooling as ONNX nodes: for each the fastest form that is exact by its bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsnn.export.onnx_values import FLOAT32, FLOAT64, INT32, CannotWriteError, Values, Wire
from qsnn.folded.layers import FloatLayer, IntegerInput, IntegerLayer
from qsnn.folded.terms import sides as as_tuple

PAIR = 2**15 - 1
"""What a sum of two neighbouring products may be where a CPU adds them in 16 bits (AVX2 without VNNI, u8 x s8)."""


def array(x: Any) -> NDArray[Any]:
    """A tensor as numpy has it."""
    return x.detach().cpu().numpy()  # type: ignore[no-any-return]


def integer_input(values: Values, name: str, module: IntegerInput, shape: tuple[int, ...], wire: Wire) -> Wire:
    """Keep the input's quantizer open: who reads it says in which type; frames are written at once."""
    timed = not wire.static  # a sum over frames does not fit into 8 bits
    if timed and wire.kind != "frames" and values.deferred and values.timesteps > 1:
        raise CannotWriteError(f"{name}: frames that are changed before they are quantized; use firing='online'")
    small = values.counts == "u8" and module.levels <= 127 and not timed
    new = Wire((), "u8" if small else "f32", wire.shape, module.levels, zero=128 if small else 0, static=not timed,
               kind="input", layer=module, source=wire, place=values.graph.scope)  # fmt: skip
    return write_input(values, new, "f32") if timed else new


def write_input(values: Values, wire: Wire, dtype: str) -> Wire:
    """clip(round_half_up(x / s), -L, L), in u8 around 128 or in float32: by table for raw pixels, else in float64."""
    module, source, graph = wire.layer, wire.source, values.graph
    assert isinstance(module, IntegerInput) and source is not None
    levels, zero, kept = module.levels, 128 if dtype == "u8" else 0, graph.scope
    new = replace(wire, dtype=dtype, zero=zero, kind="value", layer=None, source=None)
    graph.scope = wire.place
    if source.kind == "pixels":
        assert values.tables is not None
        names = list(values.looked_up(source, array(module(torch.from_numpy(values.tables))) + zero, dtype).names)
    else:
        names = _quantized(values, module, source, dtype, zero)
    if source.kind == "frames" and values.deferred:
        names = names[-1:]
    graph.scope = kept
    return replace(new, names=tuple(names), bound=levels)


def _quantized(values: Values, module: IntegerInput, source: Wire, dtype: str, zero: int) -> list[str]:
    graph, levels, names = values.graph, module.levels, list[str]()
    step = array(module.step).astype(np.float64)
    # a quotient of two float32 is a half or at least 2**-26 away from one: then q + 1/2 + zero cannot round to a tie
    plain = source.dtype == "f32" and bool((step == step.astype(np.float32)).all()) and levels < 2**15
    for name in source.names:
        x = name if source.dtype == "f64" else graph.cast(name, "f64")
        q = graph.add("Div", x, graph.const(step, "f64"))
        if plain:
            q = graph.add("Floor", graph.add("Add", q, graph.const(zero + 0.5, "f64")))
        else:
            below = graph.add("Floor", q)
            up = graph.add("GreaterOrEqual", graph.add("Sub", q, below), graph.const(0.5, "f64"))
            q = graph.add("Add", graph.add("Add", below, graph.cast(up, "f64")), graph.const(float(zero), "f64"))
        q = graph.add("Clip", q, graph.const(float(zero - levels), "f64"), graph.const(float(zero + levels), "f64"))
        q = graph.cast(q, dtype)
        names.append(graph.add("Add", names[-1], q) if names else q)
    return names


def integer_layer(values: Values, name: str, module: IntegerLayer, shape: tuple[int, ...], wire: Wire) -> Wire:
    """Keep the layer open: its neuron may take it whole; whoever else needs the sums has them written."""
    bound = module.bound * values.timesteps**module.steps
    return Wire((), "", shape, bound, static=wire.static, kind="sum", layer=module, source=wire, place=name)


def write_sum(values: Values, wire: Wire) -> Wire:
    """The sums of an integer layer: int32 from 8-bit matrices, or float32, or float64, as the bounds allow."""
    assert isinstance(wire.layer, IntegerLayer) and wire.source is not None
    module, graph, name = wire.layer, values.graph, wire.place
    source = wire.source if wire.source.kind == "input" else values.ready(wire.source)
    most = wire.bound * (1 if wire.static else values.timesteps)
    weight, shape = array(module.weight), wire.shape
    small = weight.dtype == np.int8
    transposed = "output_padding" in module.options
    eight = small and not transposed and source.dtype == "u8" and values.counts == "u8" and most < INT32
    scope, graph.scope = graph.scope, name
    try:
        if eight and (weight.ndim == 2 or most >= FLOAT32):
            stored, zeros, how = eight_bit_weight(values, weight, source)
            if weight.ndim == 2:
                stored = stored.T
            inputs = [graph.weight(stored), graph.const(source.zero, "u8")]
            inputs += [graph.const(zeros, "u8")] if zeros else []
            op = "MatMulInteger" if weight.ndim == 2 else "ConvInteger"
            options = {} if weight.ndim == 2 else _options(module, weight, source.shape, shape)
            names = [graph.add(op, x, *inputs, **options) for x in values.ready(source).names]
            values.note(name, f"{op}, {how}")
            return replace(wire, names=tuple(names), dtype="i32", kind="value", layer=None, source=None)
        if small and most < FLOAT32:
            kernel = graph.stored(weight.T if weight.ndim == 2 else weight, "i8", "f32")
            xs, dtype = values.cast(source, "f32").names, "f32"
            options = {} if weight.ndim == 2 else _options(module, weight, source.shape, shape)
            op = "MatMul" if weight.ndim == 2 else "ConvTranspose" if transposed else "Conv"
            names = [graph.add(op, x, kernel, **options) for x in xs]
            values.note(name, "float32 sums below 2**24")
        elif most < FLOAT64:
            xs, dtype = values.cast(source, "f64").names, "f64"
            kernel = _double_kernel(values, module, weight)
            if not small:  # IEEE half weights count in units of 2**-24
                kernel = graph.add("Mul", kernel, graph.const(2.0**24, "f64"))
            names = [double_layer(values, x, kernel, module, weight.shape, source.shape, shape) for x in xs]
            values.note(name, "float64 sums below 2**53")
        else:
            raise CannotWriteError(f"{name}: its sums reach {most:.3g}, which float64 does not hold exactly")
    finally:
        graph.scope = scope
    return replace(wire, names=tuple(names), dtype=dtype, kind="value", layer=None, source=None)


def eight_bit_weight(
    values: Values, weight: NDArray[Any], source: Wire, factor: int = 1
) -> tuple[NDArray[Any], int, str]:
    """Weights for 8-bit products, their zero point, and why none of them saturates.

    With AVX2 and no VNNI the products of u8 and s8 are added in pairs in 16 bits. Where the two largest weights of a
    channel times the largest input (the "pair" of the form) stay below that, s8 is exact; else the weights become u8
    around 128, whose products are added in 32 bits.
    """
    scaled = weight.astype(np.int32) * factor
    largest = source.zero + int(source.bound) * (1 if source.static else values.timesteps)
    rows = np.sort(np.abs(scaled).reshape(len(scaled), -1), 1)[:, -2:]
    pair = int(rows.sum(1).max()) * largest
    if pair <= PAIR:
        return scaled.astype(np.int8), 0, f"u8 x s8, pairs <= {pair}"
    return (scaled + 128).astype(np.uint8), 128, f"u8 x u8, pairs <= {pair}"


def float_layer(values: Values, name: str, module: FloatLayer, shape: tuple[int, ...], wire: Wire) -> Wire:
    """A layer of float weights, or that sees currents, in the float it has in qsnn."""
    graph, weight = values.graph, array(module.weight)
    source = values.ready(wire)
    dtype = "f64" if weight.dtype == np.float64 else "f32"
    xs = values.increments(source, dtype)
    bias = None if module.bias is None else array(module.bias)
    names = []
    spans = (1,) if source.static else values.spans
    if dtype == "f64":
        kernel = _double_kernel(values, module, weight)
    else:
        kernel = graph.const(weight.T if weight.ndim == 2 else weight, dtype)
    for x, span in zip(xs, spans, strict=True):
        if dtype == "f64":
            y = double_layer(values, x, kernel, module, weight.shape, source.shape, shape)
        elif weight.ndim == 2:
            y = graph.add("MatMul", x, kernel)
        else:
            op = "ConvTranspose" if "output_padding" in module.options else "Conv"
            y = graph.add(op, x, kernel, **_options(module, weight, source.shape, shape))
        if bias is not None:
            per = bias if weight.ndim == 2 else values.per_channel(bias, weight.ndim)
            y = graph.add("Add", y, graph.const(span * per, dtype))
        names.append(y)
    values.note(name, f"real: {'float64' if dtype == 'f64' else 'float32'} currents")
    return Wire(tuple(names), dtype, shape, real=True, static=source.static)


def _double_kernel(values: Values, module: Any, weight: NDArray[Any]) -> str:
    """The weights as one matrix a group, (G, outputs, taps x inputs) in float64, or (inputs, outputs) of a linear."""
    kind = {"int8": "i8", "float16": "f16"}.get(str(weight.dtype), "f64")
    if weight.ndim == 2:
        rows: NDArray[Any] = weight.T
    else:
        weight = _turned(module, weight)
        groups = module.options["groups"]
        rows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1).swapaxes(2, 3)
        rows = rows.reshape(groups, len(weight) // groups, -1)
    return values.graph.const(rows, "f64") if kind == "f64" else values.graph.stored(rows, kind, "f64")


def double_layer(
    values: Values, x: str, kernel: str, module: Any, weight: tuple[int, ...], before: tuple[int, ...],
    after: tuple[int, ...],
) -> str:  # fmt: skip
    """A layer in float64, for which runtimes have matrices but no convolution: one slice for each tap of the kernel."""
    graph = values.graph
    if len(weight) == 2:
        return graph.add("MatMul", x, kernel)
    if "output_padding" in module.options:
        x, module, weight, before = _stuffed(values, x, module, weight, before)
    pads, dims = padding(module, weight, before, after), len(weight) - 2
    if any(pads):
        full = [0, 0, *pads[:dims], 0, 0, *pads[dims:]]
        x = graph.add("Pad", x, graph.const(full, "i64"), graph.const(0.0, "f64"))
    stride, dilation = as_tuple(module.options["stride"], dims), as_tuple(module.options["dilation"], dims)
    groups, axes = module.options["groups"], graph.const(list(range(2, 2 + dims)), "i64")
    points, taps = math.prod(after[1:]), []
    for tap in np.ndindex(*weight[2:]):
        start = [t * d for t, d in zip(tap, dilation, strict=True)]
        end = [a + (side - 1) * s + 1 for a, side, s in zip(start, after[1:], stride, strict=True)]
        part = graph.add("Slice", x, graph.const(start, "i64"), graph.const(end, "i64"), axes,
                         graph.const(list(stride), "i64"))  # fmt: skip
        taps.append(graph.add("Reshape", part, graph.const([-1, groups, weight[1], points], "i64")))
    stacked = graph.add("Concat", *taps, axis=2) if len(taps) > 1 else taps[0]
    return graph.add("Reshape", graph.add("MatMul", kernel, stacked), graph.const([-1, *after], "i64"))


def _turned(module: Any, weight: NDArray[Any]) -> NDArray[Any]:
    """The weights of the convolution that a transposed one is, on an input with zeros between its values."""
    if "output_padding" not in module.options:
        return weight
    groups = module.options["groups"]
    split = weight.reshape(groups, len(weight) // groups, *weight.shape[1:]).swapaxes(1, 2)
    joined = split.reshape(-1, *split.shape[2:])
    return np.ascontiguousarray(joined[(slice(None), slice(None), *[slice(None, None, -1)] * (weight.ndim - 2))])


def _stuffed(
    values: Values, x: str, module: Any, weight: tuple[int, ...], before: tuple[int, ...]
) -> tuple[str, Any, tuple[int, ...], tuple[int, ...]]:
    """A transposed convolution as a plain one: stride - 1 zeros between the values, and the border it sees."""
    graph, options, dims = values.graph, module.options, len(weight) - 2
    stride, dilation, given, more = (
        as_tuple(options[k], dims) for k in ("stride", "dilation", "padding", "output_padding")
    )
    if max(stride) > 1:
        split = [before[0]] + [side for pair in zip(before[1:], [1] * dims, strict=True) for side in pair]
        ends = [0, 0] + [side for pair in zip([0] * dims, [s - 1 for s in stride], strict=True) for side in pair]
        x = graph.add("Reshape", x, graph.const([-1, *split], "i64"))
        x = graph.add("Pad", x, graph.const([0] * len(ends) + ends, "i64"), graph.const(0.0, "f64"))
    wide = [side * s for side, s in zip(before[1:], stride, strict=True)]
    x = graph.add("Reshape", x, graph.const([-1, before[0], *wide], "i64"))
    edge = [d * (k - 1) - p for d, k, p in zip(dilation, weight[2:], given, strict=True)]
    last = [e + m - (s - 1) for e, m, s in zip(edge, more, stride, strict=True)]
    x = graph.add("Pad", x, graph.const([0, 0, *edge, 0, 0, *last], "i64"), graph.const(0.0, "f64"))
    groups = options["groups"]
    plain = SimpleNamespace(options={"stride": 1, "padding": 0, "dilation": options["dilation"], "groups": groups})
    sides = tuple(side + e + f for side, e, f in zip(wide, edge, last, strict=True))
    return x, plain, (weight[1] * groups, weight[0] // groups, *weight[2:]), (before[0], *sides)


def padding(module: Any, weight: tuple[int, ...], before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """Zeros before and behind each side, as ONNX lists them."""
    dims, given = len(weight) - 2, module.options["padding"]
    dilation = as_tuple(module.options["dilation"], dims)
    if given == "valid":
        return [0] * (2 * dims)
    if given == "same":  # torch puts the odd one behind
        total = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
        return [t // 2 for t in total] + [t - t // 2 for t in total]
    return [*as_tuple(given, dims)] * 2


def _options(module: Any, weight: NDArray[Any], before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, Any]:
    dims = weight.ndim - 2
    extra = module.options.get("output_padding")
    return {
        **({} if extra is None else {"output_padding": list(as_tuple(extra, dims))}),
        **moves(
            weight.shape[2:], padding(module, weight.shape, before, after), as_tuple(module.options["stride"], dims),
            as_tuple(module.options["dilation"], dims), module.options["groups"],
        ),
    }  # fmt: skip


def moves(
    kernel: Sequence[int], pads: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int = 1
) -> dict[str, Any]:
    """Where a window moves, as attributes; what is ONNX' default is left out."""
    dims = len(kernel)
    said: dict[str, Any] = {"kernel_shape": list(kernel)}
    usual = {"pads": [0] * 2 * dims, "strides": [1] * dims, "dilations": [1] * dims}
    given = {"pads": list(pads), "strides": list(stride), "dilations": list(dilation)}
    said |= {name: sides for name, sides in given.items() if sides != usual[name]}
    return said if groups == 1 else said | {"group": groups}


Fit = tuple[NDArray[np.float32], NDArray[Any]]
"""m and β of :func:`~qsnn.export.affine.affine`, a channel each."""


def rounded(
    values: Values, wire: Wire, weight: NDArray[Any], factor: int, fits: Sequence[Fit]
) -> tuple[list[str], str]:
    """clip(round(m·(d·A + β)), 0, 255) of an integer layer, for each answer in time, and by which kernel.

    A convolution of one input channel is 9 products an output: as floats, whose sums are integers below 2**24, it costs
    two thirds of what 8-bit products do. All others are one QLinearConv.
    """
    assert isinstance(wire.layer, IntegerLayer) and wire.source is not None
    graph, source = values.graph, wire.source
    options = _options(wire.layer, weight, source.shape, wire.shape)
    scales = [graph.const(m if (m != m[0]).any() else m[0], "f32") for m, _ in fits]
    most = max(float(wire.bound * factor + np.abs(beta).max()) for _, beta in fits)
    if source.kind == "input" and source.shape[0] == 1 and weight.ndim == 4 and most < FLOAT32:
        kernel = graph.stored((weight * factor).astype(np.int8), "i8", "f32")
        x, names = values.cast(source, "f32").names[0], []
        zeros = graph.const(np.zeros(len(weight)), "u8")
        for m, beta in fits:  # 1/m in float32, the quotient in float32: 3 * 2**-24, within the margin of the proof
            y = graph.add("Conv", x, kernel, graph.const(beta, "f32"), **options)
            steps = graph.const(1 / m.astype(np.float64), "f32")
            names.append(graph.add("QuantizeLinear", y, steps, zeros, axis=1))
        return names, "float32 sums below 2**24, rounded"
    source = values.ready(source)
    stored, zero, how = eight_bit_weight(values, weight, source, factor)
    kernel, one, none = graph.weight(stored), graph.const(np.float32(1), "f32"), graph.const(0, "u8")
    xs = source.names * len(fits) if source.static else source.names
    names = [
        graph.add("QLinearConv", x, one, graph.const(source.zero, "u8"), kernel, scale,
                  graph.const(zero, "u8" if zero else "i8"), one, none, graph.const(beta, "i32"), **options)
        for x, scale, (_, beta) in zip(xs, scales, fits, strict=True)
    ]  # fmt: skip
    return names, f"QLinearConv, {how}"
