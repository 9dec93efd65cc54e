"""One C99 file of a folded network: packed weights, integer thresholds, static buffers, no floating point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from qsnn.data.images import normalise
from qsnn.export.c_layers import count_pool, layer, pool, sum_over
from qsnn.export.c_text import whole_type
from qsnn.export.c_writer import Emit, Value, Writer
from qsnn.export.gains import alike, limits_of, scores_of
from qsnn.export.real import REAL
from qsnn.files import write_atomic
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import CountPool, IntegerInput, IntegerLayer, SumPool
from qsnn.folded.neurons import Current, CurrentIF
from qsnn.graph.kinds import CLASSES
from qsnn.graph.modules import Sum
from qsnn.graph.recipe import input_shape_of, recipe_of
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


def _neuron(w: Writer, node: fx.Node, module: Any) -> Value:
    inputs = w.inputs(node)
    ranges, deferred = [v.range for v in inputs], w.firing == "deferred"
    shape, place = inputs[0].shape, len(w.layers)
    found = limits_of(module, ranges, w.timesteps, w.firing, shape)
    columns = found.limits.shape[1]
    column = "0" if columns == 1 else "c" if columns == shape[0] else f"c * {int(np.prod(shape[1:]))} + p"
    reach = 1 if deferred else w.timesteps
    most = [np.maximum(np.abs(a), np.abs(b)) * reach for a, b in ranges]
    most = [alike(m, max(columns, m.size)) for m in most]
    top = int(np.max(sum(alike(np.abs(g), m.size) * m for g, m in zip(found.gains, most, strict=True))))
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
        words = [f"({total}){gain}[{j * columns} + {column}] * a{j}" for j in range(len(inputs))]
    times = 1 if deferred else w.timesteps
    high = np.array([w.timesteps if deferred else 1])
    low = np.array([-1 if module.signed else 0])
    new = w.buffered(Value(shape, low, high, times, monotone=not module.signed))
    target = f"({w.start(new, True)})[c * {new.area} + p]"
    if deferred:
        inner = [
            f"const {total} sum = {' + '.join(words)};", "int k = 0;", f"while (k < {w.timesteps} && "
            f"sum >= {limit}[k * {columns} + {column}])", "    k++;", f"{target} = (int8_t)k;",
        ]  # fmt: skip
        w.loops(shape, inputs, 1, inner)
    else:
        back = f" - (k > 0 && sum < {limit}[(t * (t + 1) / 2 + k - 1) * {columns} + {column}])" if module.signed else ""
        inner = [
            f"sum += {' + '.join(words)};",
            f"const int fired = (sum >= {limit}[(t * (t + 1) / 2 + k) * {columns} + {column}]){back};",
            f"{target} = (int8_t)fired;", "k += fired;",
        ]  # fmt: skip
        w.loops(shape, inputs, w.timesteps, inner, f"{total} sum = 0; int k = 0;")
    w.layers.append(str(node.target))
    w.program.body.append(f"qsnn_trace({place}, {w.start(new, False)}, {times}, {new.size});")
    return new


def _readout(w: Writer, node: fx.Node, module: Any) -> None:
    if not w.readout(node):
        raise ValueError(REAL["Current"])
    inputs = w.inputs(node)
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


def _plus_minus(w: Writer, node: fx.Node, module: Any) -> Value:
    source = w.source(node)
    return w.written(source.shape, np.array([-1]), np.array([1]), [source], "2 * a0 - 1")


def _repeat(w: Writer, node: fx.Node, module: Any) -> Value:
    source = w.source(node)
    once = w.firing == "deferred" and w.frames is None
    return replace(source, times=source.times * (w.timesteps if once else 1))


EMIT: dict[type, Emit] = {
    IntegerInput: _input,
    IntegerLayer: layer,
    IntegerIF: _neuron,
    CurrentIF: _neuron,
    Current: _readout,
    SumPool: pool,
    **dict.fromkeys(CLASSES["takes maxima"], pool),
    PlusMinus: _plus_minus,
    Repeat: _repeat,
    Sum: sum_over,
    CountPool: count_pool,
}
"""What writes each kind of module; a kind is found by its exact type."""


def _judge(module: nn.Module | None, last: bool) -> str:
    kind = type(module).__name__
    if isinstance(module, IntegerLayer) and module.weight.dtype != torch.int8:
        return f"weights of {module.weight_bits} bit; at most 8 are packed"
    return "" if kind == "Current" and last else REAL.get(kind, "")
