"""Neurons as ONNX nodes. All count the thresholds that a sum over time has reached, and settle how many may fire."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qsnn.export.affine import affine
from qsnn.export.onnx_layers import array, rounded
from qsnn.export.onnx_values import Values, Wire
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import IntegerLayer
from qsnn.folded.neurons import Current, CurrentIF, DynamicIF, RealIF
from qsnn.snn.equations import later, offset_at

_FACTORS = (1, 2, 3, 4, 6, 8, 12, 16, 31, 63, 127)


def integer_if(values: Values, name: str, module: IntegerIF, shape: tuple[int, ...], wire: Wire) -> Wire:
    """Integer thresholds: in one node with the convolution before it where that is proved, else by comparisons."""
    new = Wire((), values.counts, shape, 1.0, ordered=not module.signed)
    counts = _in_the_convolution(values, name, module, wire)
    if counts is None:
        source = values.ready(wire)
        dtype = source.dtype if source.dtype in ("i32", "f64") else "f32"
        source = values.cast(source, dtype)
        sign = array(module.sign)
        names = list(source.names)
        if (sign < 0).any():
            flip = values.graph.const(_shaped(module, sign), dtype)
            names = [values.graph.add("Mul", x, flip) for x in names]
        counts, how = [], "comparisons"
        for t, x in zip(values.steps, names * (len(values.steps) if source.static else 1), strict=True):
            bound = np.array([wire.bound * (1 if source.static else t)]).astype(np.int64)
            limits = thresholds(values, module, t, source.static, bound)
            count, how = _counted_integers(values, x, limits, bound, dtype, module)
            counts.append(count)
        values.note(name, how)
    return replace(new, names=tuple(settled(values, counts, module.signed)))


def _shaped(module: IntegerIF, x: NDArray[Any]) -> NDArray[Any]:
    """Values, (n,) or (1,), in the shape in which they meet an image."""
    return x.reshape(module.shape if x.size > 1 else ())


def thresholds(
    values: Values, module: IntegerIF, step: int, static: bool, bound: NDArray[np.int64]
) -> NDArray[np.int64]:
    """M_{t,k} of the sum up to ``step``, (t, n), cut to what the sum can be; where static of one step's value."""
    table = array(module.table(values.timesteps, "deferred" if values.deferred else "online"))
    rows = table[0] if values.deferred else table[step - 1, :step]
    top = 2.0**53
    limits = np.clip(rows, -top, top).astype(np.int64)
    if static:  # t·A >= M exactly when A >= ⌈M / t⌉
        limits = -(-limits // step)
    return np.clip(limits, -bound, bound + 1)


def _in_the_convolution(values: Values, name: str, module: IntegerIF, wire: Wire) -> list[str] | None:
    layer, source = wire.layer, wire.source
    if not isinstance(layer, IntegerLayer) or source is None or values.counts != "u8":
        return None
    weight = array(layer.weight)
    by_channel = module.shape in ((), (len(weight), *[1] * (len(wire.shape) - 1)))
    if not 3 <= weight.ndim <= 4 or weight.dtype != np.int8 or not by_channel or "output_padding" in layer.options:
        return None
    source = source if source.kind == "input" else values.ready(source)
    if source.dtype != "u8":
        return None
    sign = np.broadcast_to(array(module.sign).astype(np.int64), len(weight))
    weight = weight.astype(np.int64) * sign.reshape(-1, *[1] * (weight.ndim - 1))
    rows = np.abs(weight).reshape(len(weight), -1).sum(1) * int(source.bound)
    steps = [(t, rows * (1 if source.static else t)) for t in values.steps]
    limits = [
        np.broadcast_to(thresholds(values, module, t, source.static, bound), (t, len(weight))) for t, bound in steps
    ]
    wire = replace(wire, source=source)
    once = _once(values, name, wire, weight, limits, rows) if source.static and len(steps) > 1 else None
    if once is not None:
        return once
    found = _fitted(weight, limits, [bound for _, bound in steps])
    if found is None:
        return None
    factor, fits = found
    counts, how = rounded(values, wire, weight, factor, fits)
    for place, (fit, (t, bound)) in enumerate(zip(fits, steps, strict=True)):
        highest = ((bound * factor + fit[1]) * fit[0].astype(np.float64)).max()
        if (values.deferred or t == 1) and highest > t + 0.499:  # later steps clip when they settle
            low, high = values.graph.const(0, "u8"), values.graph.const(t, "u8")
            counts[place] = values.graph.add("Clip", counts[place], low, high)
    values.note(name, how + (f", weights x {factor}" if factor > 1 else ""))
    return counts


def _fitted(
    weight: NDArray[Any], limits: list[NDArray[np.int64]], bounds: list[NDArray[np.int64]]
) -> tuple[int, list[tuple[NDArray[np.float32], NDArray[np.float64]]]] | None:
    """The smallest multiple of the weights in 8 bits with which all thresholds become a rounding, and that rounding."""
    for factor in _FACTORS:
        if int(np.abs(weight).max()) * factor > 127:
            return None
        found = [affine(m, bound, factor) for m, bound in zip(limits, bounds, strict=True)]
        fits = [fit for fit in found if fit is not None]
        if len(fits) == len(found):
            return factor, fits
    return None


def _once(
    values: Values, name: str, wire: Wire, weight: NDArray[Any], limits: list[NDArray[np.int64]],
    bound: NDArray[np.int64],
) -> list[str] | None:  # fmt: skip
    """The counts of all steps from one convolution of the image, where one rounding tells all thresholds apart.

    On a constant current the thresholds of all steps stand in one order in every channel; at T = 2 and v0 = θ/2 they
    are θ/4, θ/2 and 3θ/4.
    """
    rows = np.concatenate(limits)
    order = np.argsort(np.median(rows, 1), kind="stable")
    if (np.diff(rows[order], axis=0) < 0).any():
        return None
    found = _fitted(weight, [rows[order]], [bound])
    if found is None:
        return None
    factor, fits = found
    (y,), how = rounded(values, wire, weight, factor, fits)
    place = np.argsort(order, kind="stable") + 1  # how many thresholds are reached where this one is
    counts, start = [], 0
    for part in limits:
        ranks = np.sort(place[start : start + len(part)])
        counts.append(counted(values, y, ranks, "u8"))
        start += len(part)
    values.note(name, f"once for all steps, {how}" + (f", weights x {factor}" if factor > 1 else ""))
    return counts


def _counted_integers(
    values: Values, x: str, limits: NDArray[np.int64], bound: NDArray[np.int64], dtype: str, module: IntegerIF
) -> tuple[str, str]:
    """How many limits an integer sum has reached, and how that is found."""
    graph = values.graph
    if dtype == "f32" and len(limits) > 3:
        fit = affine(limits, np.broadcast_to(bound, limits.shape[1:]), whole=False)
        if fit is not None and (fit[1] == fit[1].astype(np.float32)).all() and int(bound.max()) < 2**20:
            m, beta = (graph.const(_shaped(module, z), "f32") for z in fit)
            y = graph.add("Round", graph.add("Mul", graph.add("Add", x, beta), m))
            y = graph.add("Clip", y, graph.const(0.0, "f32"), graph.const(float(len(limits)), "f32"))
            return (y if values.counts == "f32" else graph.cast(y, values.counts)), "one multiplication and rounding"
    edges: NDArray[Any] = limits
    if dtype == "f32" and int(bound.max()) < 2**22:
        edges = limits - 0.5  # half a unit of room, should a runtime's float sums not be integers to the last bit
    return counted(values, x, [_shaped(module, edge) for edge in edges], dtype), "comparisons"


def counted(values: Values, x: str, limits: Iterable[NDArray[Any]], dtype: str) -> str:
    """How many of the limits, each shaped to meet x, it has reached."""
    graph, count = values.graph, ""
    for limit in limits:
        reached = graph.add("GreaterOrEqual", x, graph.const(limit, dtype))
        one = graph.cast(reached, values.counts)
        count = graph.add("Add", count, one) if count else one
    return count


def settled(values: Values, counts: list[str], signed: bool = False) -> list[str]:
    """Spikes up to each answer: deferred what is counted; online at most one more than before, and never fewer.

    Signed ones may be one fewer, and never fewer than none.
    """
    if values.deferred:
        return counts
    graph, fired, one = values.graph, counts[:1], values.graph.const(1, values.counts)
    for count in counts[1:]:
        more = graph.add("Add", fired[-1], one)
        if signed:  # no number below 0 on the way, which bytes do not have
            least = graph.add("Sub", graph.add("Max", graph.add("Add", count, one), fired[-1]), one)
        else:
            least = graph.add("Max", count, fired[-1])
        fired.append(graph.add("Min", least, more))
    return fired


def _gains(values: Values, module: Current, wires: tuple[Wire, ...]) -> list[NDArray[np.float64]]:
    return [array(module.gain(index, values.timesteps)) for index in range(len(wires))]


def _added(values: Values, terms: list[list[str]], gains: list[NDArray[np.float64]]) -> list[str]:
    """Σ_j g_j·A_j in float64, in graph order, for each answer."""
    graph, totals = values.graph, []
    for parts in zip(*terms, strict=True):
        total = ""
        for part, gain in zip(parts, gains, strict=True):
            term = graph.add("Mul", graph.const(gain, "f64"), part)
            total = graph.add("Add", total, term) if total else term
        totals.append(total)
    return totals


def current(values: Values, name: str, module: Current, shape: tuple[int, ...], *wires: Wire) -> Wire:
    """The real current of the steps since the answer before, in float64."""
    wires = tuple(values.ready(wire) for wire in wires)
    static = all(wire.static for wire in wires)
    spans = (1,) if static else values.spans
    terms = [_spread(values, wire, static) for wire in wires]
    bias = array(module.step_bias)
    names = [
        values.graph.add("Add", total, values.graph.const(span * bias, "f64"))
        for total, span in zip(_added(values, terms, _gains(values, module, wires)), spans, strict=True)
    ]
    values.note(name, "real: float64 currents")
    return Wire(tuple(names), "f64", shape, real=True, static=static)


def _spread(values: Values, wire: Wire, static: bool) -> list[str]:
    names = values.increments(wire, "f64")
    if wire.static and not static:
        return [values.times(names[0], span, "f64") for span in values.spans]
    return names


def summed_currents(values: Values, module: Current, wires: tuple[Wire, ...]) -> list[str]:
    """Σ_j g_j·A_j + t·b in float64 over all steps up to each answer's."""
    graph, bias = values.graph, array(module.step_bias)
    wires = tuple(values.ready(wire) for wire in wires)
    totals = _added(values, [values.summed(wire, "f64") for wire in wires], _gains(values, module, wires))
    return [
        graph.add("Add", total, graph.const(float(t) * bias, "f64"))
        for t, total in zip(values.steps, totals, strict=True)
    ]


def current_if(values: Values, name: str, module: CurrentIF, shape: tuple[int, ...], *wires: Wire) -> Wire:
    """S >= (k + ½)·θ in float64, where currents meet or are real."""
    dims, totals = len(shape) + 1, summed_currents(values, module, wires)
    theta, counts = values.per_channel(array(module.threshold), dims), []
    for t, total in zip(values.steps, totals, strict=True):
        offset = values.per_channel(1.0 - array(offset_at(module.initial, t)), dims)
        counts.append(counted(values, total, [(k + offset) * theta for k in range(t)], "f64"))
    values.note(name, "real: sums of currents in float64")
    return Wire(tuple(settled(values, counts, module.signed)), values.counts, shape, 1.0, ordered=not module.signed)


def real_if(values: Values, name: str, module: RealIF, shape: tuple[int, ...], wire: Wire) -> Wire:
    """The IF neuron step by step on currents, in the float they come in."""
    source, graph = values.ready(wire), values.graph
    dtype = "f32" if source.dtype == "f32" else "f64"
    theta, start, later_on = module.equation(torch.float32 if dtype == "f32" else torch.float64, len(shape) + 1)
    pushes = [] if later_on is None else list(later_on[: values.timesteps - 1])
    xs = values.increments(source, dtype)
    if source.static:
        xs = [values.times(xs[0], span, dtype) for span in values.spans]
    limit, v = graph.const(array(theta), dtype), graph.const(array(start), dtype)
    values.note(name, f"real: {'float64' if dtype == 'f64' else 'float32'} potentials")
    if values.deferred and pushes:
        pushes = [torch.stack(pushes).sum(0)]
    for t, push in enumerate(pushes, 0 if values.deferred else 1):
        xs[t] = graph.add("Add", xs[t], graph.const(array(push), dtype))
    if values.deferred:
        total = graph.add("Div", graph.add("Add", xs[0], v), limit)
        most = graph.const(float(values.timesteps), dtype)
        count = graph.add("Clip", graph.add("Floor", total), graph.const(0.0, dtype), most)
        return Wire((graph.cast(count, values.counts),), values.counts, shape, 1.0, ordered=True)
    fired = list[str]()
    for x in xs:
        v = graph.add("Add", v, x)
        spike = graph.add("GreaterOrEqual", v, limit)
        count = graph.cast(spike, values.counts)
        fired.append(graph.add("Add", fired[-1], count) if fired else count)
        v = graph.add("Sub", v, graph.add("Mul", graph.cast(spike, dtype), limit))
    return Wire(tuple(fired), values.counts, shape, 1.0, ordered=True)


def dynamic_if(values: Values, name: str, module: DynamicIF, shape: tuple[int, ...], *wires: Wire) -> Wire:
    """Other resets, leak and membranes of few bits, signed or not: the equation of `Dynamics`, unrolled."""
    graph, rule, dims = values.graph, module.dynamics, len(shape) + 1
    drive = current(values, name, module, shape, *wires)
    xs = drive.names * (len(values.steps) if drive.static else 1)
    theta = values.per_channel(array(module.threshold), dims)
    limit, zero = graph.const(theta, "f64"), graph.const(0.0, "f64")
    keep = None
    if module.tau is not None:
        keep = graph.const(values.per_channel(array((-1.0 / module.tau).exp()), dims), "f64")
    fall = graph.const(1.0 - math.exp(-1.0 / rule.reset_tau), "f64")
    v = graph.const(values.per_channel(array(offset_at(module.initial, 1)), dims) * theta, "f64")
    pushes = later(module.initial, module.theta(dims), dims)
    fired = list[str]()
    for t, x in enumerate(xs):
        if pushes is not None and 0 < t <= len(pushes):
            x = graph.add("Add", x, graph.const(array(pushes[t - 1]), "f64"))
        h = _stored(values, graph.add("Add", graph.add("Mul", v, keep) if keep else v, x), theta, rule.state_bits)
        s = graph.cast(graph.add("GreaterOrEqual", h, limit), "f64")
        if rule.signed and fired:  # before the first spike there is none to take back
            below, some = graph.add("Less", h, zero), graph.add("Greater", fired[-1], zero)
            s = graph.add("Sub", s, graph.cast(graph.add("And", below, some), "f64"))
        if rule.reset == "soft":
            v = graph.add("Sub", h, graph.add("Mul", limit, s))
        else:
            lost = s if rule.reset == "hard" else graph.add("Mul", fall, s)
            v = graph.add("Mul", h, graph.add("Sub", graph.const(1.0, "f64"), lost))
        v = _stored(values, v, theta, rule.state_bits)
        fired.append(graph.add("Add", fired[-1], s) if fired else s)
    values.note(name, "real: float64 potentials")
    return values.cast(Wire(tuple(fired), "f64", shape, 1.0, ordered=not rule.signed),
                       "f32" if rule.signed else values.counts)  # fmt: skip


def _stored(values: Values, v: str, theta: NDArray[np.float64], state: str | None) -> str:
    """The potential as its storage holds it."""
    if state is None:
        return v
    graph = values.graph
    if state == "fp16":
        limit = graph.const(theta, "f64")
        held = graph.cast(graph.cast(graph.add("Div", v, limit), "f16"), "f64")
        held = graph.add("Clip", held, graph.const(-65504.0, "f64"), graph.const(65504.0, "f64"))
        return graph.add("Mul", held, limit)
    bits = 8 if state == "int8" else 16
    unit = graph.const(theta * 2.0 ** (2 - bits), "f64")
    n = graph.add("Round", graph.add("Div", v, unit))
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return graph.add("Mul", graph.add("Clip", n, graph.const(low, "f64"), graph.const(high, "f64")), unit)
