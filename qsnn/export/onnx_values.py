"""What a node of a folded network stands for in an ONNX graph, and the graph that is being written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qsnn.export.packed import NODES, packed
from qsnn.folded.layers import IntegerInput, IntegerLayer

TYPES: dict[str, tuple[int, Any]] = {
    "u8": (TensorProto.UINT8, np.uint8), "i8": (TensorProto.INT8, np.int8), "i32": (TensorProto.INT32, np.int32),
    "i64": (TensorProto.INT64, np.int64), "f16": (TensorProto.FLOAT16, np.float16),
    "f32": (TensorProto.FLOAT, np.float32), "f64": (TensorProto.DOUBLE, np.float64),
    "bool": (TensorProto.BOOL, np.bool_),
}  # fmt: skip


FLOAT32, INT32, FLOAT64 = 2**24, 2**31, 2**53
"""Integers below these are exact, in whatever order they are added."""


class CannotWriteError(ValueError):
    """Why a node has no ONNX form."""


@dataclass(frozen=True)
class Wire:
    """A value in the graph: a tensor for each answer in time, (B, C, *), or one where it is the same at every step.

    Integers are sums over all steps up to the answer's; real currents are those of the steps since the answer before.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    """Of one image, (C, *)."""
    bound: float = float("inf")
    """Largest absolute value of one step."""
    real: bool = False
    zero: int = 0
    """What stands for 0 in u8."""
    static: bool = False
    """One tensor, the value of a single step, stands for every step."""
    ordered: bool = False
    """Spikes of single neurons: deferred they come first in time, so that a maximum of counts counts the maxima."""
    kind: str = "value"
    """"value"; "pixels": raw uint8 images; "frames": a real image a step; "sum" and "input": a layer, or the input's
    quantizer, not written yet."""
    layer: IntegerLayer | IntegerInput | None = None
    source: Wire | None = None
    place: str = ""

    @property
    def dims(self) -> int:
        """Dimensions, the batch included."""
        return len(self.shape) + 1


@dataclass
class Graph:
    """Nodes and constants of an ONNX graph; equal constants are stored once."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    scope: str = ""
    _known: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _published: dict[str, str] = field(default_factory=dict)
    _scopes: dict[str, int] = field(default_factory=dict)

    def const(self, value: Any, dtype: str) -> str:
        """The name of a constant."""
        array: NDArray[Any] = np.ascontiguousarray(np.asarray(value, dtype=TYPES[dtype][1])).reshape(np.shape(value))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._known:
            name = f"c{len(self.constants)}"
            self.constants[name] = numpy_helper.from_array(array, name)
            self._known[key] = name
        return self._known[key]

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of one output and return the output's name."""
        name, count = f"v{len(self.nodes)}", self._scopes.get(self.scope, 0)
        self._scopes[self.scope] = count + 1
        place = "" if count else self.scope  # the first node of a layer bears its name
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=place, **attributes))
        return name

    def publish(self, name: str, output: str) -> None:
        """Make a value an output of that name: the node that makes it is renamed; where none can be, one is added."""
        first = self._published.setdefault(name, output)
        if first != output or not any(name in node.output for node in self.nodes):
            source = first if first != output else name
            self.nodes.append(helper.make_node("Identity", [source], [output], name=output))
            return
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [output if each == name else each for each in names]

    def ones(self, shape: tuple[int, ...]) -> str:
        """A tensor of 1 in int8, which the file holds by its shape alone."""
        scope, self.scope = self.scope, ""
        one = numpy_helper.from_array(np.ones(1, dtype=np.int8))
        name = self.add("ConstantOfShape", self.const(shape, "i64"), value=one)
        self.scope = scope
        return name

    def used(self) -> list[onnx.TensorProto]:
        """The constants that some node reads."""
        read = {name for node in self.nodes for name in node.input}
        return [tensor for name, tensor in self.constants.items() if name in read]

    def cast(self, name: str, dtype: str) -> str:
        """The same values in another type."""
        return self.add("Cast", name, to=TYPES[dtype][0])

    def weight(self, weight: NDArray[Any]) -> str:
        """Weights in 8 bits; of fewer bits several to a byte, where that makes the file smaller.

        A runtime reads constants once, when it loads the file: what runs has 8-bit weights either way.
        """
        dtype = "u8" if weight.dtype == np.uint8 else "i8"
        known = ("weight", dtype, weight.shape, weight.tobytes())
        if known not in self._known:
            self._known[known] = self._packed(weight, dtype) or self.const(weight, dtype)
        return self._known[known]

    def _packed(self, weight: NDArray[Any], dtype: str) -> str | None:
        found = packed(weight)
        if found is None:
            return None
        codes, table = found
        new = 0 if (dtype, table.shape, table.tobytes()) in self._known else table.size
        if codes.size + new + NODES >= weight.size:
            return None
        scope, self.scope = self.scope, ""  # a layer's name is for what computes
        rows = self.add("Gather", self.const(table, dtype), self.cast(self.const(codes, "u8"), "i32"))
        name = self.add("Reshape", rows, self.const(weight.shape, "i64"))
        self.scope = scope
        return name

    def stored(self, weight: NDArray[Any], dtype: str, like: str) -> str:
        """A constant that is stored small and used in another type."""
        return self.cast(self.weight(weight) if dtype == "i8" else self.const(weight, dtype), like)


class Values:
    """What emitters share: the steps of the answers, and how a value is read as integers, increments or currents.

    Args:
        timesteps: T.
        firing: "online": an answer after every step; "deferred": one after all.
        counts: type that spike counts have, "u8" or "f32".
        tables: for raw pixels, the normalised value of each, (C, 256) float32.
        signed: whether a count may be less than the one before.
    """

    def __init__(
        self, timesteps: int, firing: str, counts: str, tables: NDArray[np.float32] | None, signed: bool = False
    ) -> None:
        self.graph, self.signed = Graph(), signed
        self.timesteps, self.deferred, self.counts, self.tables = timesteps, firing == "deferred", counts, tables
        self.steps = (timesteps,) if self.deferred else tuple(range(1, timesteps + 1))
        self.spans = (timesteps,) if self.deferred else (1,) * timesteps
        """Steps between an answer and the one before it."""
        self.forms: dict[str, str] = {}
        self._written: dict[tuple[Any, ...], Wire] = {}
        self.write_sum: Any = None
        self.write_input: Any = None

    def note(self, name: str, form: str) -> None:
        """Keep in which arithmetic a layer is written, for the file's metadata."""
        self.forms[name] = form

    def per_channel(self, x: NDArray[Any], dims: int) -> NDArray[Any]:
        """One value a channel, (C,), shaped to meet a tensor of ``dims`` dimensions."""
        return x.reshape(-1, *[1] * (dims - 2)) if x.ndim else x

    def ready(self, wire: Wire) -> Wire:
        """The wire with its tensors in the graph."""
        if wire.kind == "value":
            return wire
        key = wire.kind, id(wire.layer)
        if key not in self._written:
            if wire.kind == "input":
                self._written[key] = self.write_input(self, wire, wire.dtype)
            elif wire.kind == "pixels":
                assert self.tables is not None
                written = self.looked_up(wire, self.tables, "f32")
                self._written[key] = replace(written, real=True)
            elif wire.kind == "frames":
                names = wire.names[:1]
                for name in wire.names[1:]:
                    names = (self.graph.add("Add", names[0], name),)
                self._written[key] = replace(wire, names=names if self.deferred else wire.names, kind="value")
            else:
                self._written[key] = self.write_sum(self, wire)
        return self._written[key]

    def looked_up(self, pixels: Wire, table: NDArray[Any], dtype: str) -> Wire:
        """The entry of a table, (C, 256), for every pixel."""
        index = self.graph.cast(pixels.names[0], "i32")
        if len(table) > 1:
            index = self.graph.add("Add", index, self.graph.const(256 * np.arange(len(table)).reshape(-1, 1, 1), "i32"))
        name = self.graph.add("Gather", self.graph.const(table.reshape(-1), dtype), index, axis=0)
        return replace(pixels, names=(name,), dtype=dtype, kind="value")

    def cast(self, wire: Wire, dtype: str) -> Wire:
        """The wire's values themselves, zero point taken off, in another type."""
        if wire.kind == "input" and dtype == "f32" != wire.dtype:  # not by way of 8 bits
            key = wire.kind, id(wire.layer), dtype
            if key not in self._written:
                self._written[key] = self.write_input(self, wire, dtype)
            return self._written[key]
        wire = self.ready(wire)
        if wire.dtype == dtype and not wire.zero:
            return wire
        names = [self.graph.cast(name, dtype) if wire.dtype != dtype else name for name in wire.names]
        if wire.zero:
            names = [self.graph.add("Sub", name, self.graph.const(wire.zero, dtype)) for name in names]
        return replace(wire, names=tuple(names), dtype=dtype, zero=0)

    def times(self, name: str, factor: int, dtype: str) -> str:
        """A whole multiple."""
        return name if factor == 1 else self.graph.add("Mul", name, self.graph.const(factor, dtype))

    def summed(self, wire: Wire, dtype: str) -> list[str]:
        """The values summed over all steps up to each answer's, in ``dtype``."""
        wire = self.cast(wire, dtype)
        if wire.static:
            return [self.times(wire.names[0], t, dtype) for t in self.steps]
        if not wire.real:
            return list(wire.names)
        sums = [wire.names[0]]
        for name in wire.names[1:]:
            sums.append(self.graph.add("Add", sums[-1], name))
        return sums

    def increments(self, wire: Wire, dtype: str) -> list[str]:
        """The values of the steps since the answer before, one tensor an answer; one of a single step where static."""
        wire = self.ready(wire)
        if wire.static or wire.real or len(wire.names) == 1:
            return list(self.cast(wire, dtype).names)
        if self.signed:  # the small type may have no number below 0
            wire = self.cast(wire, dtype)
        before, names = "", []
        for name in wire.names:  # the difference in the small type; its zero point falls out, except of the first
            names.append(self.graph.add("Sub", name, before) if before else name)
            before = name
        first = self.cast(replace(wire, names=(names[0],)), dtype).names
        rest = self.cast(replace(wire, names=tuple(names[1:]), zero=0), dtype).names
        return [*first, *rest]
