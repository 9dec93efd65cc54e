"""Pools as ONNX nodes: sums and maxima of spikes as integers, means of currents in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from qsnn.export.onnx_layers import array, moves
from qsnn.export.onnx_values import FLOAT32, CannotWriteError, Values, Wire
from qsnn.folded.layers import CountPool, SumPool
from qsnn.folded.terms import sides as as_tuple

_MATRIX = 2**22
"""Most entries of the matrix of an average pool of currents."""


def sum_pool(values: Values, name: str, module: SumPool, shape: tuple[int, ...], wire: Wire) -> Wire:
    """Window sums: a convolution with weights of 1, in 8 bits where they fit."""
    source, graph = values.ready(wire), values.graph
    size, channels = math.prod(module.kernel), source.shape[0]
    bound = source.bound * size
    most = bound * (1 if source.static else values.timesteps)
    options = moves(module.kernel, [*module.padding] * 2, module.stride, [1] * len(module.kernel), channels)
    ones = (channels, 1, *module.kernel)
    new = replace(source, shape=shape, bound=bound, ordered=False)
    if source.dtype == "u8" and not source.zero and most <= 255 and len(module.kernel) < 3:
        one, zero = graph.const(np.float32(1), "f32"), graph.const(0, "u8")
        weight = graph.ones(ones)
        names = [
            graph.add("QLinearConv", x, one, zero, weight, one, graph.const(0, "i8"), one, zero, **options)
            for x in source.names
        ]
        return replace(new, names=tuple(names))
    if most >= FLOAT32:
        raise CannotWriteError(f"{name}: its window sums reach {most:.3g}, which float32 does not hold exactly")
    source = values.cast(source, "f32")
    weight = graph.cast(graph.ones(ones), "f32")
    names = [graph.add("Conv", x, weight, **options) for x in source.names]
    return replace(new, names=tuple(names), dtype="f32", zero=0)


def _windows(
    values: Values, name: str, module: nn.Module, shape: tuple[int, ...], source: Wire, xs: list[str], dtype: str
) -> list[str]:
    """Window sums or means as the matrix that the pool is: right for every padding, ceiling and uneven window."""
    before, after = math.prod(source.shape[1:]), math.prod(shape[1:])
    if before * after > _MATRIX:
        raise CannotWriteError(f"{name}: an average pool from {before:,} to {after:,} places; {_MATRIX:,} pairs fit")
    graph = values.graph
    basis = torch.eye(before, dtype=torch.float64).view(before, 1, *source.shape[1:])
    matrix = graph.const(array(module(basis)).reshape(before, after), dtype)
    names = []
    for x in xs:
        flat = graph.add("Reshape", x, graph.const([-1, source.shape[0], before], "i64"))
        names.append(graph.add("Reshape", graph.add("MatMul", flat, matrix), graph.const([-1, *shape], "i64")))
    return names


def average_pool(values: Values, name: str, module: nn.Module, shape: tuple[int, ...], wire: Wire) -> Wire:
    """The mean of currents over windows."""
    source = values.ready(wire)
    dtype = "f32" if source.dtype == "f32" else "f64"
    names = _windows(values, name, module, shape, source, values.increments(source, dtype), dtype)
    values.note(name, "real: a mean of currents")
    return Wire(tuple(names), dtype, shape, real=True, static=source.static)


def count_pool(values: Values, name: str, module: CountPool, shape: tuple[int, ...], wire: Wire) -> Wire:
    """Integers over windows of several sizes, times their least common multiple."""
    source = values.ready(wire)
    places = math.prod(source.shape[1:])
    bound = source.bound * module.multiple * places
    dtype = "f32" if bound * values.timesteps < FLOAT32 else "f64"
    source = values.cast(source, dtype)
    names = _windows(values, name, module, shape, source, list(source.names), dtype)
    # a window's weights add up to the multiple, or with a divisor of its own to at most the places
    return replace(source, names=tuple(names), shape=shape, bound=bound, ordered=False)


def max_pool(values: Values, name: str, module: Any, shape: tuple[int, ...], wire: Wire) -> Wire:
    """The maximum of each step's spikes; of deferred spikes, which come first in time, the maximum of the counts."""
    source, graph = values.ready(wire), values.graph
    if source.real:
        raise CannotWriteError(f"{name}: a max pool of currents")
    if values.deferred and values.timesteps > 1 and not (source.ordered or source.static):
        raise CannotWriteError(f"{name}: a max pool behind a sum of spikes, deferred; export it with firing='online'")
    dims = len(shape) - 1
    kernel, stride, pad, gap = (
        as_tuple(x, dims) for x in (module.kernel_size, module.stride, module.padding, module.dilation)
    )
    # the end is padded to what torch's rounding gives, so that no runtime's own rule for ceil_mode is asked
    end = [
        max(0, (out - 1) * s + g * (k - 1) + 1 - side - p)
        for out, s, g, k, side, p in zip(shape[1:], stride, gap, kernel, source.shape[1:], pad, strict=True)
    ]
    options = moves(kernel, [*pad, *end], stride, gap)
    if source.static or len(source.names) == 1:
        names = [graph.add("MaxPool", x, **options) for x in source.names]
        return replace(source, names=tuple(names), shape=shape)
    names, before = [], ""
    for x in source.names:  # the spikes of one step, and what the pool lets through summed up again
        pooled = graph.add("MaxPool", graph.add("Sub", x, before) if before else x, **options)
        names.append(graph.add("Add", names[-1], pooled) if names else pooled)
        before = x
    return replace(source, names=tuple(names), shape=shape)
