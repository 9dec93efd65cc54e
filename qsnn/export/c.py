"""One C99 file of a folded network: packed weights, integer thresholds, static buffers, no floating point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from qsnn.data.images import normalise
from qsnn.export.c_text import POOL, packed, whole_type
from qsnn.export.c_writer import Emit, Value, Writer
from qsnn.export.gains import limits_of, scores_of, weighted_range
from qsnn.files import write_atomic
from qsnn.folded.layers import IntegerInput, IntegerLayer, SumPool
from qsnn.folded.neurons import Current, CurrentIF, IntegerIF
from qsnn.folded.terms import as_tuple
from qsnn.graph.recipe import input_shape_of, recipe_of
from qsnn.graph.trace import MAX_POOLS, module_of
from qsnn.snn.network import SNN
from qsnn.snn.neurons import PlusMinus, Repeat


@dataclass(frozen=True)
class Sizes:
    """What a C file asks of a controller [bytes], without the few kB of code. ``str()`` is one line."""

    weights: int
    """Packed weights, Σ weights · bits / 8."""
    flash: int
    """All constant tables: weights, thresholds, the input's table."""
    ram: int
    """Static buffers."""
    layers: tuple[str, ...]
    """The spiking layers, in the order in which ``qsnn_trace`` sees them."""
    exact: bool
    """Whether the logits are compared without any rounding (else to 70 bits; fold's own float64 has 53)."""

    def __str__(self) -> str:
        return f"flash {self.flash:,} bytes (weights {self.weights:,}), RAM {self.ram:,} bytes, beside the code"


def write(
    folded: SNN,
    path: str | Path,
    *,
    timesteps: int | None = None,
    firing: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Sizes:
    r"""Write a folded network as one C99 file without libraries: ``int qsnn_predict(const uint8_t *pixels)``.

    ``pixels`` are the bytes 0 to 255 of an image, (C, H, W), or of T frames, (T, C, H, W); the answer is the class.
    Every spike is :func:`qsnn.fold`'s. Where currents with float64 gains meet, integer gains are found with which
    every comparison, gone through for all inputs, comes out as fold's. The answer is the argmax of the exact logits,
    the first of equal ones; float64 may order logits differently that are equal but for its own rounding.

    Args:
        folded: from :func:`qsnn.fold`, with weights of at most 8 bit and a quantized input.
        path: the file to write.
        timesteps: T; default the network's.
        firing: "online" or "deferred"; default the network's.
        mean, std: of each channel, of pixels on [0, 1]; default what the network's recipe says of its data.
    Raises:
        TypeError: not an SNN.
        ValueError: not folded, unknown image shape or normalisation, or parts that no integers stand for: all of them
            are named.
    """
    if not isinstance(folded, SNN):
        raise TypeError(f"expected a folded SNN, got {type(folded).__name__}")
    if not folded.folded:
        raise ValueError("this network is not folded; call qsnn.fold(snn) first")
    shape, data = input_shape_of(folded), recipe_of(folded).get("data", {})
    if shape is None:
        raise ValueError("the image shape is unknown; quantize with data records it")
    norm = (mean or data.get("mean"), std or data.get("std"))
    if not norm[0] or not norm[1] or not len(norm[0]) == len(norm[1]) == shape[0]:
        raise ValueError(f"how pixels are normalised is unknown; give mean=... and std=... of {shape[0]} channels")
    steps, way = folded._checked(timesteps or folded.timesteps, firing or folded.firing)
    if way == "deferred" and steps > 127:
        raise ValueError(f"counts are bytes: expected timesteps of at most 127, got {steps}")
    writer = Writer(folded, shape, steps, way, norm, data.get("frames"), EMIT, _judge)
    with torch.no_grad():
        writer.run()
    write_atomic(path, writer.program.text(Path(path).stem, f"{way} firing, T = {steps}", shape))
    return Sizes(writer.weights, writer.program.flash, writer.program.ram, tuple(writer.layers), writer.exact)


def _input(w: Writer, node: fx.Node, module: Any) -> Value:
    (source,) = node.all_input_nodes
    if source.op != "placeholder":
        raise ValueError("the quantizer of the input must see the pixels themselves")
    channels, area = w.image[0], int(np.prod(w.image[1:]))
    bytes_ = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, channels, 1, 1)
    mean, std = w.norm
    real = normalise(bytes_, mean, std) if w.frames is None else bytes_.float() * (w.frames / std[0])
    table = module(real).flatten(1).numpy().T.astype(np.int64)  # (C, 256)
    one = bool((table == table[0]).all())
    name = w.program.table("pixel", table[0] if one else table, whole_type(table.min(), table.max()))
    summed = w.firing == "deferred" and w.frames is not None
    times = w.timesteps if summed else 1
    steps = w.timesteps if w.frames is not None and not summed else 1
    low, high = np.array([table.min() * times]), np.array([table.max() * times])
    new = w.buffered(Value(w.image, low, high, steps, monotone=w.frames is None))
    assert new.buffer is not None
    frame = f"t * {new.size} + " if w.frames is not None else ""
    level = f"{name}[{'' if one else 'c * 256 + '}pixels[{frame}c * {area} + p]]"
    if summed:
        target = f"({w.start(new, False)})[c * {area} + p]"
        after = f"{target} = ({new.buffer.type})sum;"
        w.loops(w.image, [], w.timesteps, [f"sum += {level};"], "int32_t sum = 0;", after)
    else:
        w.loops(w.image, [], steps, [f"({w.start(new, True)})[c * {area} + p] = {level};"])
    return new


def _layer(w: Writer, node: fx.Node, module: Any) -> Value:
    source, weight = w.stored(w.source(node)), module.integers.cpu().numpy().astype(np.int64)
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **module.options}
    if type(module) is not IntegerLayer or len(options) > 4 or (not module.options and len(source.shape) > 1):
        raise ValueError("only convolutions, and linear layers of a vector, are written")
    kernel = (*([1] * (4 - weight.ndim)), *weight.shape[2:])
    sides: dict[str, tuple[int, ...]] = {}
    for key in ("stride", "dilation", "padding"):
        given = options[key]
        if key == "padding" and isinstance(given, str):
            spans = [d * (k - 1) for d, k in zip(sides["dilation"], kernel, strict=True)]
            given = tuple(span // 2 if given == "same" else 0 for span in spans)
        given = as_tuple(given, max(weight.ndim - 2, 1))
        sides[key] = (*([0 if key == "padding" else 1] * (2 - len(given))), *given)
    shape, bits = w.shape(node), _bits(weight)
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
        bits, flat.shape[1], per_group, weight.shape[1], in_h, in_w, *kernel, shape[-1] if module.options else 1,
        *sides["stride"], *sides["padding"], *sides["dilation"],
    )  # fmt: skip
    w.program.layers.append(", ".join(map(str, (f"w{index}", *fields))))
    new = Value(shape, low, high, source.steps, layer=(f"l{index}", source), fan=flat.shape[1], times=source.times)
    behind = _behind(node)
    alone = len(behind) == 1 and EMIT.get(type(module_of(w.folded.network, behind[0]))) in (_neuron, _readout)
    return new if alone else w.stored(new)


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


def _neuron(w: Writer, node: fx.Node, module: Any) -> Value:
    inputs = [w.values[n] for n in node.all_input_nodes if n in w.values]
    if len(inputs) < len(node.all_input_nodes):
        raise ValueError("it sees a real current")
    ranges, deferred = [v.range for v in inputs], w.firing == "deferred"
    found = limits_of(module, ranges, w.timesteps, w.firing)
    shape, place, columns = inputs[0].shape, len(w.layers), found.limits.shape[1]
    reach = 1 if deferred else w.timesteps
    most = [np.maximum(np.abs(a), np.abs(b)) * reach for a, b in ranges]
    top = int(np.max(sum(np.abs(g) * m for g, m in zip(found.gains, most, strict=True))))
    top = max(top, *(int(m.max()) for m in most))
    if top >= 2**62:
        raise ValueError("its sums reach beyond 62 bit")
    held = whole_type(-top - 1, top + 1)
    total = "int64_t" if held == "int64_t" else "int32_t"
    limit = w.program.table(f"limit{place}", found.limits, whole_type(found.limits.min(), found.limits.max()))
    words = [f"a{j}" for j in range(len(inputs))]
    if (found.gains != 1).any():
        wide = "int64_t" if np.abs(found.gains).max() >= 2**31 else whole_type(found.gains.min(), found.gains.max())
        gain = w.program.table(f"gain{place}", found.gains, wide)
        step = "c" if found.gains.shape[1] > 1 else "0"
        words = [f"({total}){gain}[{j * found.gains.shape[1]} + {step}] * a{j}" for j in range(len(inputs))]
    channel = "c" if columns > 1 else "0"
    times = 1 if deferred else w.timesteps
    high = np.array([w.timesteps if deferred else 1])
    new = w.buffered(Value(shape, np.array([0]), high, times, monotone=True))
    target = f"({w.start(new, True)})[c * {new.area} + p]"
    if deferred:
        inner = [
            f"const {total} sum = {' + '.join(words)};", "int k = 0;", f"while (k < {w.timesteps} && "
            f"sum >= {limit}[k * {columns} + {channel}])", "    k++;", f"{target} = (int8_t)k;",
        ]  # fmt: skip
        w.loops(shape, inputs, 1, inner)
    else:
        inner = [
            f"sum += {' + '.join(words)};",
            f"const int fired = sum >= {limit}[(t * (t + 1) / 2 + k) * {columns} + {channel}];",
            f"{target} = (int8_t)fired;", "k += fired;",
        ]  # fmt: skip
        w.loops(shape, inputs, w.timesteps, inner, f"{total} sum = 0; int k = 0;")
    w.layers.append(str(node.target))
    w.program.body.append(f"qsnn_trace({place}, {w.start(new, False)}, {times}, {new.size});")
    return new


def _readout(w: Writer, node: fx.Node, module: Any) -> None:
    inputs = [w.values[n] for n in node.all_input_nodes if n in w.values]
    if not w.readout(node) or len(inputs) < len(node.all_input_nodes):
        raise ValueError(REFUSED["Current"] if not w.readout(node) else "it sees a real current")
    shape = w.shape(node)
    if len(shape) != 1:
        raise ValueError(f"expected one vector of logits, got {shape}")
    found = scores_of(module, [v.range for v in inputs], w.timesteps, w.firing, shape[0])
    w.exact = found.exact
    rows = [*found.gains, found.bias]
    high = w.program.table("score_high", [[x >> 32 for x in row] for row in rows], "int64_t")
    low = w.program.table("score_low", [[x & 0xFFFFFFFF for x in row] for row in rows], "uint32_t")
    k, n = shape[0], len(inputs)
    sums = " ".join(f"int64_t s{j} = 0;" for j in range(n))
    words = [f"{{}}[{j * k} + c] * s{j}" for j in range(n)]
    w.program.body += ["int64_t best_high = 0, best_low = 0;"]
    after = (
        f"const int64_t low = {' + '.join(f'(int64_t){word.format(low)}' for word in words)} + {low}[{n * k} + c], "
        f"rest = low & 0xFFFFFFFFLL; "
        f"const int64_t high = {' + '.join(word.format(high) for word in words)} + {high}[{n * k} + c] "
        f"+ (low - rest) / 4294967296LL; "
        f"if (c == 0 || high > best_high || (high == best_high && rest > best_low)) "
        f"{{ answer = c; best_high = high; best_low = rest; }}"
    )
    steps = 1 if w.firing == "deferred" else w.timesteps
    w.loops(shape, inputs, steps, [f"s{j} += a{j};" for j in range(n)], sums, after)


def _pool(w: Writer, node: fx.Node, module: Any) -> Value:
    source, shape, summed = w.stored(w.source(node)), w.shape(node), isinstance(module, SumPool)
    if not summed and w.firing == "deferred" and not source.monotone:
        raise ValueError("firing deferred, a max pool must follow spikes of single neurons; use firing='online'")
    dims = len(shape) - 1
    names = ("kernel", "stride", "padding") if summed else ("kernel_size", "stride", "padding", "dilation")
    sides = [as_tuple(getattr(module, name), dims) for name in names] + ([(1,) * dims] if summed else [])
    fill = (1, 1, 0, 1)
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


def _plus_minus(w: Writer, node: fx.Node, module: Any) -> Value:
    source = w.source(node)
    return w.written(source.shape, np.array([-1]), np.array([1]), [source], "2 * a0 - 1")


def _repeat(w: Writer, node: fx.Node, module: Any) -> Value:
    source = w.source(node)
    once = w.firing == "deferred" and w.frames is None
    return replace(source, times=source.times * (w.timesteps if once else 1))


EMIT: dict[type, Emit] = {
    IntegerInput: _input,
    IntegerLayer: _layer,
    IntegerIF: _neuron,
    CurrentIF: _neuron,
    Current: _readout,
    SumPool: _pool,
    **dict.fromkeys(MAX_POOLS, _pool),
    PlusMinus: _plus_minus,
    Repeat: _repeat,
}
"""What writes each kind of module; a kind is found by its exact type."""

_REAL = "it computes in floats: "
REFUSED = {
    "FloatLayer": _REAL + "fp16 or float weights, a linear bottleneck, or an input without quantizer",
    "RealIF": _REAL + "its current is real",
    "DynamicIF": _REAL + "a leak, another reset, signed spikes or a membrane of few bits",
    "Current": _REAL + "a current between layers (a linear bottleneck)",
    "AvgPool1d": _REAL + "it averages a current",
    "AvgPool2d": _REAL + "it averages a current",
}
"""Kinds that stay real in a folded network, and why."""


def _judge(module: nn.Module | None, last: bool) -> str:
    kind = type(module).__name__
    if isinstance(module, IntegerLayer) and module.weight.dtype != torch.int8:
        return f"weights of {module.weight_bits} bit; at most 8 are packed"
    return "" if kind == "Current" and last else REFUSED.get(kind, "")
