"""What a folded network's layers and pools are in C."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from qsnn.export.c_text import POOL, packed, whole_type
from qsnn.export.c_writer import Value, Writer
from qsnn.export.gains import weighted_range
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import SumPool
from qsnn.folded.neurons import Current, CurrentIF
from qsnn.folded.terms import sides as as_tuple
from qsnn.graph.trace import module_of
from qsnn.snn.neurons import Repeat


def layer(w: Writer, node: fx.Node, module: Any) -> Value:
    """An integer layer.

    Raises:
        ValueError: more than two dimensions, or sums beyond 32 bit.
    """
    source, weight = w.stored(w.source(node)), module.integers.cpu().numpy().astype(np.int64)
    options, shape = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **module.options}, w.shape(node)
    if weight.ndim > 4 or len(shape) > 3:
        raise ValueError("only convolutions over one or two dimensions are written")
    tokens = not module.options and len(source.shape) > 1
    if tokens:  # a linear layer of the last dimension is a 1x1 convolution once that stands first
        source = w.taken(source, w.places(source).movedim(-1, 1)[0])
        shape, weight = (shape[-1], *shape[:-1]), weight.reshape(*weight.shape, *[1] * (len(shape) - 1))
    elif "output_padding" in options:
        source, weight = _spaced(w, source, weight, options)
        options |= {"stride": 1, "padding": 0}
    new = _sums(w, source, weight, options, shape)
    if tokens:
        new = w.stored(new)
        return w.taken(new, w.places(new).movedim(1, -1)[0])
    behind = _behind(node)
    after = module_of(w.folded.network, behind[0]) if len(behind) == 1 else None
    alone = type(after) in (IntegerIF, CurrentIF, Current)  # it forms the sums itself, one by one
    return new if alone else w.stored(new)


def _spaced(w: Writer, source: Value, weight: np.ndarray, options: dict[str, Any]) -> tuple[Value, np.ndarray]:
    """A transposed convolution as a convolution of its input with zeros in between: that input, and the weights."""
    dims, groups = weight.ndim - 2, options["groups"]
    pads: list[int] = []
    spaced = w.places(source)
    stride, padding, dilation, more = (
        as_tuple(options[key], dims) for key in ("stride", "padding", "dilation", "output_padding")
    )
    for axis in range(dims):
        size = (spaced.shape[2 + axis] - 1) * stride[axis] + 1
        apart = spaced.new_zeros(*spaced.shape[: 2 + axis], size, *spaced.shape[3 + axis :])
        apart[(slice(None),) * (2 + axis) + (slice(None, None, stride[axis]),)] = spaced
        before = dilation[axis] * (weight.shape[2 + axis] - 1) - padding[axis]
        spaced, pads = apart, [before, before + more[axis], *pads]
    turned = np.flip(weight, tuple(range(2, weight.ndim))).reshape(groups, -1, *weight.shape[1:])
    turned = turned.swapaxes(1, 2).reshape(-1, len(weight) // groups, *weight.shape[2:])
    return w.taken(source, F.pad(spaced, pads)[0]), turned


def _sums(w: Writer, source: Value, weight: np.ndarray, options: dict[str, Any], shape: tuple[int, ...]) -> Value:
    """The sums of a convolution, or of a linear layer as one of 1x1, formed where they are asked for."""
    kernel = (*([1] * (4 - weight.ndim)), *weight.shape[2:])
    sides: dict[str, tuple[int, ...]] = {}
    for key in ("stride", "dilation", "padding"):
        given = options[key]
        if key == "padding" and isinstance(given, str):
            spans = [d * (k - 1) for d, k in zip(sides["dilation"], kernel, strict=True)]
            given = tuple(span // 2 if given == "same" else 0 for span in spans)
        given = as_tuple(given, max(weight.ndim - 2, 1))
        sides[key] = (*([0 if key == "padding" else 1] * (2 - len(given))), *given)
    bits = _bits(weight)
    flat = weight.reshape(len(weight), -1)
    low, high = weighted_range(flat, source.low, source.high)
    if max(-low.min(), high.max()) >= 2**31:
        raise ValueError(f"its sums reach {max(-low.min(), high.max()):,}, beyond 32 bit")
    index, per_group = len(w.program.layers), len(weight) // options["groups"]
    bytes_ = packed(flat, bits)
    w.weights += len(bytes_)
    w.program.table(f"w{index}", bytes_, "uint8_t")
    _, in_h, in_w = source.image
    fields = (
        bits, flat.shape[1], per_group, weight.shape[1], in_h, in_w, *kernel, shape[-1] if len(shape) > 1 else 1,
        *sides["stride"], *sides["padding"], *sides["dilation"],
    )  # fmt: skip
    w.program.layers.append(", ".join(map(str, (f"w{index}", *fields))))
    return Value(shape, low, high, source.steps, layer=(f"l{index}", source), fan=flat.shape[1], times=source.times)


def _behind(node: fx.Node) -> list[fx.Node]:
    """Who reads a node's value, also through repetitions over time."""
    found: list[fx.Node] = []
    for user in node.users:
        owner = user.graph.owning_module
        repeated = owner is not None and isinstance(module_of(owner, user), Repeat)
        found += _behind(user) if repeated else [user]
    return found


def _bits(weight: np.ndarray) -> int:
    """The least of 1, 2, 4 and 8 bits that hold these integers."""
    if (np.abs(weight) == 1).all():
        return 1
    return next(b for b in (2, 4, 8) if -(1 << (b - 1)) <= weight.min() and weight.max() < 1 << (b - 1))


def pool(w: Writer, node: fx.Node, module: Any) -> Value:
    """Sums or maxima over windows.

    Raises:
        ValueError: more than two dimensions, or maxima of what is no spikes where all T are counted at once.
    """
    source, shape, summed = w.stored(w.source(node)), w.shape(node), isinstance(module, SumPool)
    if not summed and w.firing == "deferred" and not source.monotone:
        raise ValueError("firing deferred, a max pool must follow spikes of single neurons; use firing='online'")
    dims = len(shape) - 1
    if dims > 2:
        raise ValueError("only pools over one or two dimensions are written")
    names = ("kernel", "stride", "padding") if summed else ("kernel_size", "stride", "padding", "dilation")
    sides = [as_tuple(getattr(module, name), dims) for name in names] + ([(1,) * dims] if summed else [])
    return _windows(w, source, shape, sides, summed)


def _windows(w: Writer, source: Value, shape: tuple[int, ...], sides: list[tuple[int, ...]], summed: bool) -> Value:
    """Sums or maxima over windows, from their kernel, stride, padding and dilation."""
    dims, fill = len(shape) - 1, (1, 1, 0, 1)
    (k_h, k_w), (s_h, s_w), (p_h, p_w), (d_h, d_w) = (
        (*([one] * (2 - dims)), *side) for one, side in zip(fill, sides, strict=True)
    )
    _, in_h, in_w = source.image
    size = k_h * k_w if summed else 1
    low, high = (np.minimum(source.low * size, 0), np.maximum(source.high * size, 0)) if summed else source.range
    new = w.buffered(replace(source, shape=shape, low=low, high=high, monotone=source.monotone and not summed))
    names_ = dict(
        C=shape[0], AREA=new.area, OUT_W=shape[-1], S_H=s_h, S_W=s_w, P_H=p_h, P_W=p_w, D_H=d_h, D_W=d_w, K_H=k_h,
        K_W=k_w, IN_H=in_h, IN_W=in_w, STEPS=new.steps, SOURCE=w.start(source, True), TARGET=w.start(new, True),
        BEGIN="0" if summed else "INT32_MIN", TAKE="v += e;" if summed else "v = e > v ? e : v;",
        TYPE=new.buffer.type if new.buffer else "",
    )  # fmt: skip
    text = POOL
    for name, value in names_.items():
        text = text.replace(f"@{name}@", str(value))
    w.program.body += text.splitlines()
    return new


def count_pool(w: Writer, node: fx.Node, module: Any) -> Value:
    """Means over windows of several sizes, times their least common multiple: each sum times a whole number.

    Raises:
        ValueError: an adaptive pool, whose windows overlap irregularly, or more than two dimensions.
    """
    inner, source, shape = module.pool, w.stored(w.source(node)), w.shape(node)
    dims = len(shape) - 1
    if dims > 2 or not hasattr(inner, "kernel_size"):
        raise ValueError(
            "only average pools over one or two dimensions, and adaptive ones of equal windows, are written"
        )
    sides = [as_tuple(getattr(inner, name), dims) for name in ("kernel_size", "stride", "padding")]
    sums = _windows(w, source, shape, [*sides, (1,) * dims], True)
    ones = torch.ones(1, 1, *source.shape[1:], dtype=torch.float64)
    kernel, stride, padding = sides
    inside = F.pad(ones, [p for pad in reversed(padding) for p in (pad, pad + max(kernel) * max(stride))])
    counts = inside
    for axis in range(dims):
        counts = counts.unfold(2 + axis, kernel[axis], stride[axis]).narrow(2 + axis, 0, shape[1 + axis])
    counts = counts.flatten(2 + dims).sum(-1)
    factors = (module.multiple * inner(ones) / counts).round().numpy().astype(np.int64).reshape(-1)
    if (factors == 1).all():
        return sums
    name = w.program.table(f"share{len(w.program.tables)}", factors, whole_type(0, factors.max()))
    low, high = (x * int(factors.max()) for x in (sums.low, sums.high))
    new = w.written(shape, low, high, [replace(sums, times=1)], f"a0 * {name}[p]")
    return replace(new, times=sums.times)


def sum_over(w: Writer, node: fx.Node, module: Any) -> Value:
    """A sum over dimensions: over windows of one row, once these dimensions stand last."""
    source, shape = w.stored(w.source(node)), w.shape(node)
    at = w.places(source)
    kept = [d for d in range(1, at.dim()) if d not in module.dims]
    rows = at.permute(0, *kept, *module.dims).reshape(int(np.prod([at.shape[d] for d in kept])), 1, -1)
    found = _windows(w, w.taken(source, rows), (len(rows), 1, 1), [(1, rows.shape[2]), (1, 1), (0, 0), (1, 1)], True)
    return w.taken(found, w.places(found).reshape(shape))
