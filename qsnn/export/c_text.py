"""C99 text: constant tables, buffers that share memory, and the few functions that every written network calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WIDTHS = {"int8_t": 1, "uint8_t": 1, "int16_t": 2, "uint16_t": 2, "int32_t": 4, "uint32_t": 4, "int64_t": 8}
"""Bytes of a number."""


def whole_type(low: Any, high: Any) -> str:
    """The narrowest signed type that holds low to high.

    Raises:
        ValueError: none of 64 bits does.
    """
    least, most = int(np.min(low)), int(np.max(high))
    for name in ("int8_t", "int16_t", "int32_t", "int64_t"):
        half = 1 << (8 * WIDTHS[name] - 1)
        if -half <= least and most < half:
            return name
    raise ValueError(f"its integers reach {max(-least, most):,}, beyond 64 bit")


def numbers(values: Iterable[int], type_name: str) -> str:
    """The lines of a table's numbers."""
    suffix = {"int64_t": "LL", "uint32_t": "U"}.get(type_name, "")
    lines, line = [], "   "
    for value in values:
        # -2**63 has no literal in C; no table holds it, for sums are bounded by 2**62
        word = f" {int(value)}{suffix},"
        if len(line) + len(word) > 118:
            lines.append(line)
            line = "   "
        line += word
    return "\n".join([*lines, line])


def packed(weight: np.ndarray, bits: int) -> np.ndarray:
    """Bytes of integers of 1 bit (-1 and 1), or of 2, 4 or 8 in two's complement, the first one in the lowest bits."""
    raw = (weight.reshape(-1) + 1) // 2 if bits == 1 else weight.reshape(-1) & ((1 << bits) - 1)
    each = 8 // bits
    raw = np.pad(raw, (0, -len(raw) % each)).reshape(-1, each)
    return (raw << (bits * np.arange(each))).sum(1)


@dataclass
class Buffer:
    """Static memory of a value, from the step that writes it to the last one that reads it."""

    name: str
    type: str
    count: int
    first: int
    last: int
    start: int = 0
    """Place in the pool of its type."""


@dataclass
class Program:
    """A C file while it is written. ``step`` numbers the operations, in the order in which they run."""

    step: int = 0
    tables: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    sums: set[str] = field(default_factory=set)
    """Types of the inputs of layers."""
    rows: dict[int, int] = field(default_factory=dict)
    """Weights of an output, the most, for each of the layers that are summed side by side."""
    flash: int = 0
    layers: list[str] = field(default_factory=list)
    """The fields of each layer, by number."""

    def table(self, name: str, values: Any, type_name: str) -> str:
        """Add a constant table; return its name."""
        flat = [int(v) for v in np.asarray(values, dtype=object).reshape(-1)]
        self.tables.append(f"static const {type_name} {name}[{len(flat)}] = {{\n{numbers(flat, type_name)}\n}};")
        self.flash += WIDTHS[type_name] * len(flat)
        return name

    def buffer(self, type_name: str, count: int) -> Buffer:
        """A buffer that is written by the present step."""
        found = Buffer(f"b{len(self.buffers)}", type_name, count, self.step, self.step)
        self.buffers.append(found)
        return found

    def read(self, buffer: Buffer) -> str:
        """The buffer's name; it lives at least to the present step."""
        buffer.last = max(buffer.last, self.step)
        return buffer.name

    def _pools(self) -> dict[str, int]:
        """Place the buffers, the largest first, so that what is alive at once does not overlap; sizes by type."""
        sizes: dict[str, int] = {}
        placed: list[Buffer] = []
        for new in sorted(self.buffers, key=lambda b: -b.count):
            taken = sorted(
                (b.start, b.start + b.count)
                for b in placed
                if b.type == new.type and b.first <= new.last and new.first <= b.last
            )
            new.start = 0
            for begin, end in taken:
                if new.start + new.count <= begin:
                    break
                new.start = max(new.start, end)
            placed.append(new)
            sizes[new.type] = max(sizes.get(new.type, 0), new.start + new.count)
        return sizes

    @property
    def ram(self) -> int:
        """Static bytes."""
        return sum(WIDTHS[name] * count for name, count in self._pools().items()) + sum(self.rows.values())

    def text(self, title: str, setting: str, shape: tuple[int, ...]) -> str:
        """The whole file."""
        pools = self._pools()
        memory = [f"static {name} pool_{name[:-2]}[{count}];" for name, count in sorted(pools.items())]
        memory += [f"static int8_t row{j}[{count}];" for j, count in sorted(self.rows.items())]
        places = [f"    {b.type} *const {b.name} = pool_{b.type[:-2]} + {b.start};" for b in self.buffers]
        size = "x".join(map(str, shape))
        head = HEAD.replace("@TITLE@", title).replace("@SETTING@", setting).replace("@SHAPE@", size)
        layer = LAYER if self.sums else ""
        sums = [SUM.replace("@", name) for name in sorted(self.sums)]
        tables = "\n\n".join(self.tables)
        tables += "".join(f"\n\nstatic const qsnn_layer l{i} = {{{fields}}};" for i, fields in enumerate(self.layers))
        body = "\n".join([*places, *(f"    {line}" for line in self.body)])
        end = "    return answer;\n}\n"
        return "\n".join([f"{head}\n{layer}{''.join(sums)}", tables, "", *memory, "", f"{PREDICT}{body}", end])


HEAD = """\
/* @TITLE@: a spiking network in integers, @SETTING@. Written by qsnn.
 *
 *     int qsnn_predict(const uint8_t *pixels);      the class of an image of @SHAPE@ bytes, channels first
 *
 * C99, no library, no floating point, an int of 32 bits. Buffers are static: one call at a time.
 * With QSNN_TRACE defined, a function of yours sees the spikes of every layer (deferred: their counts, one step):
 *     void qsnn_trace(int layer, const int8_t *spikes, int steps, int size);
 */
#include <stdint.h>

#ifdef QSNN_TRACE
void qsnn_trace(int layer, const int8_t *spikes, int steps, int size);
#else
#define qsnn_trace(layer, spikes, steps, size) ((void)0)
#endif

int qsnn_predict(const uint8_t *pixels);
"""

LAYER = """
typedef struct {
    const uint8_t *weight;             /* packed, low bits first: 1 bit is -1 or 1, more are two's complement */
    int bits, fan, group;              /* bits of a weight, weights of an output, outputs of a group */
    int in_c, in_h, in_w, k_h, k_w;    /* inputs of a group, kernel */
    int out_w, stride_h, stride_w, pad_h, pad_w, step_h, step_w;
} qsnn_layer;

/* the weights of output c */
static void qsnn_row(const qsnn_layer *l, int c, int8_t *row)
{
    const int half = 1 << (l->bits - 1);
    for (int i = 0; i < l->fan; i++) {
        const int32_t at = ((int32_t)c * l->fan + i) * l->bits;
        const int v = (l->weight[at >> 3] >> (at & 7)) & (2 * half - 1);
        row[i] = (int8_t)(l->bits == 1 ? 2 * v - 1 : (v ^ half) - half);
    }
}
"""

SUM = """
/* output c at position p */
static int32_t qsnn_sum_@(const qsnn_layer *l, const @ *x, const int8_t *row, int c, int p)
{
    const int top = p / l->out_w * l->stride_h - l->pad_h, left = p % l->out_w * l->stride_w - l->pad_w;
    int32_t sum = 0;
    x += (int32_t)(c / l->group) * l->in_c * l->in_h * l->in_w;
    for (int i = 0; i < l->in_c; i++, x += l->in_h * l->in_w) {
        for (int a = 0; a < l->k_h; a++, row += l->k_w) {
            const int y = top + a * l->step_h;
            if (y < 0 || y >= l->in_h)
                continue;
            for (int b = 0; b < l->k_w; b++) {
                const int z = left + b * l->step_w;
                if (z >= 0 && z < l->in_w)
                    sum += (int32_t)row[b] * x[y * l->in_w + z];
            }
        }
    }
    return sum;
}
"""

PREDICT = """\
int qsnn_predict(const uint8_t *pixels)
{
    int answer = 0;
"""

POOL = """\
for (int c = 0; c < @C@; c++) {
    for (int p = 0; p < @AREA@; p++) {
        const int top = p / @OUT_W@ * @S_H@ - @P_H@, left = p % @OUT_W@ * @S_W@ - @P_W@;
        for (int t = 0; t < @STEPS@; t++) {
            int32_t v = @BEGIN@;
            for (int a = 0; a < @K_H@; a++) {
                for (int b = 0; b < @K_W@; b++) {
                    const int y = top + a * @D_H@, x = left + b * @D_W@;
                    if (y >= 0 && y < @IN_H@ && x >= 0 && x < @IN_W@) {
                        const int32_t e = (@SOURCE@)[(c * @IN_H@ + y) * @IN_W@ + x];
                        @TAKE@
                    }
                }
            }
            (@TARGET@)[c * @AREA@ + p] = (@TYPE@)v;
        }
    }
}"""
