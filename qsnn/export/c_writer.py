"""A folded graph, walked in order: what each node is in C, and the loops that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qsnn.export.c_text import Buffer, Program, whole_type
from qsnn.graph.call import Call, calling
from qsnn.graph.kinds import does
from qsnn.graph.modules import Add, Concat
from qsnn.graph.trace import module_of
from qsnn.snn.network import SNN


@dataclass
class Value:
    """What a node is in C: a buffer, or a layer whose sums are formed where they are asked for."""

    shape: tuple[int, ...]
    low: np.ndarray
    """Least integer, by channel, (C,) or (1,): of a step, or deferred of all T together."""
    high: np.ndarray
    """Largest one."""
    steps: int = 1
    """T where it differs from step to step, else 1."""
    buffer: Buffer | None = None
    offset: int = 0
    plane: int = 0
    """Elements from one step to the next."""
    layer: tuple[str, Value] | None = None
    """Its name in C and its input."""
    fan: int = 0
    """Weights of an output."""
    times: int = 1
    """T where one value stands for the sum of T equal steps."""
    monotone: bool = False
    """Deferred: spikes of single neurons, so that the largest count of a window is the count of the largest."""

    @property
    def size(self) -> int:
        """Elements of a step."""
        return int(np.prod(self.shape))

    @property
    def area(self) -> int:
        """Positions of a channel."""
        return int(np.prod(self.shape[1:]))

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W), with sides of 1 where there are fewer dimensions."""
        c, *rest = self.shape
        return (c, *([1] * (2 - len(rest))), *rest)  # type: ignore[return-value]

    @property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest of what it stands for."""
        return self.low * self.times, self.high * self.times


@dataclass
class Writer:
    """Walks the folded graph in order; ``values`` says what each node is in C."""

    folded: SNN
    image: tuple[int, ...]
    timesteps: int
    firing: str
    norm: tuple[Any, Any]
    frames: int | None
    emit: dict[type, Emit]
    """What writes each kind of module, by its exact type."""
    judge: Callable[[nn.Module | None, bool], str]
    """Why a module (the last one of the network, or not) cannot be written, or "" where it can."""
    program: Program = field(default_factory=Program)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    found: dict[fx.Node, Any] = field(default_factory=dict)
    """What every node gives for one image and step."""
    layers: list[str] = field(default_factory=list)
    refused: dict[fx.Node, str] = field(default_factory=dict)
    weights: int = 0
    exact: bool = True

    def run(self) -> None:
        """Write every node.

        Raises:
            ValueError: all nodes that no integers stand for, by name.
        """
        network = self.folded.network
        with calling(Call(1, self.firing)):
            interpreter = _Found(network)
            interpreter.found = self.found
            interpreter.run(torch.zeros(1, *self.image))
        for node in network.graph.nodes:
            self.program.step += 1
            module = module_of(network, node)
            lost = [n for n in node.all_input_nodes if n in self.refused]
            try:
                if why := self.judge(module, self.readout(node)):
                    raise ValueError(why)
                if lost or node.op in ("placeholder", "get_attr"):
                    if lost:  # what comes behind a refused node is not judged
                        self.refused[node] = ""
                    continue
                self._node(node, module)
            except ValueError as error:
                name = node.target if node.op == "call_module" else node.name
                self.refused[node] = f"{name} ({error})"
        found = [reason for reason in self.refused.values() if reason]
        if found:
            raise ValueError("cannot be written in integers: " + "; ".join(found))

    def readout(self, node: fx.Node) -> bool:
        """Whether a node is the network's last one."""
        return any(user.op == "output" for user in node.users)

    def _node(self, node: fx.Node, module: nn.Module | None) -> None:
        emit = self.emit.get(type(module))
        if emit is not None:
            value = emit(self, node, module)
            if value is not None:
                self.values[node] = value
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise ValueError("it has several outputs, expected one vector of logits")
            if node.all_input_nodes[0] in self.values:
                raise ValueError("its last layer gives no current of integers")
        elif isinstance(module, Add):
            parts = self.inputs(node)
            low, high = (np.asarray(sum(p.range[i] for p in parts)) for i in (0, 1))
            self.values[node] = self.written(parts[0].shape, low, high, parts, "a0 + a1")
        elif isinstance(module, Concat) and module.dim == 1:
            self.values[node] = self.joined(self.inputs(node), self.shape(node))
        elif does(module) == "moves":
            source = self.stored(self.source(node))
            at = module(self.places(source))  # type: ignore[misc]
            if at.shape[0] != 1:
                raise ValueError("it moves values between the batch and an image")
            self.values[node] = self.taken(source, at[0])
        else:
            raise ValueError(f"{node.target if module is None else type(module).__name__} has no form in C here")

    def places(self, value: Value) -> Tensor:
        """Where each element of a value stands, from 1, as one image (1, C, *)."""
        return torch.arange(1.0, value.size + 1, dtype=torch.float64).view(1, *value.shape)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's value for one image and step, (C, *)."""
        return tuple(self.found[node].shape[1:])

    def inputs(self, node: fx.Node) -> list[Value]:
        """What a node reads, in order; a value may come twice.

        Raises:
            ValueError: one of them is real.
        """
        sources = [n for n in node.args if isinstance(n, fx.Node)]
        if any(n not in self.values for n in sources):
            raise ValueError("it sees a real current")
        return [self.values[n] for n in sources]

    def source(self, node: fx.Node) -> Value:
        """What a node of one input reads.

        Raises:
            ValueError: that is real.
        """
        (source,) = node.all_input_nodes
        if source not in self.values:
            raise ValueError("it does not see integers; quantize with input_bits=8")
        return self.values[source]

    # text

    def buffered(self, value: Value) -> Value:
        """Give a value a buffer of its own."""
        buffer = self.program.buffer(whole_type(value.low, value.high), value.size * value.steps)
        return replace(value, buffer=buffer, offset=0, plane=value.size)

    def start(self, value: Value, t: bool) -> str:
        """Where the first element of a step stands."""
        assert value.buffer is not None
        words = [self.program.read(value.buffer)]
        words += [str(value.offset)] if value.offset else []
        words += [f"t * {value.plane}"] if t and value.steps > 1 else []
        return " + ".join(words)

    def element(self, value: Value, index: int, t: bool = True) -> str:
        """Channel c, position p of a value (at step t), an int32_t; rows of weights are held by ``index``."""
        if value.layer is not None:
            name, source = value.layer
            assert source.buffer is not None
            self.program.sums.add(source.buffer.type)
            text = f"qsnn_sum_{source.buffer.type}(&{name}, {self.start(source, t)}, row{index}, c, p)"
        else:
            text = f"({self.start(value, t)})[c * {value.area} + p]"
        return text if value.times == 1 else f"{value.times} * {text}"

    def loops(
        self,
        shape: tuple[int, ...],
        inputs: list[Value],
        steps: int,
        inner: list[str],
        before: str = "",
        after: str = "",
    ) -> None:
        """For every element: ``before``, at each step ``inner`` with the inputs as a0, a1, ..., then ``after``."""
        area, body = int(np.prod(shape[1:])), self.program.body
        body.append(f"for (int c = 0; c < {shape[0]}; c++) {{")
        for j, value in enumerate(inputs):
            if value.layer is not None:
                self.program.rows[j] = max(self.program.rows.get(j, 0), value.fan)
                body.append(f"    qsnn_row(&{value.layer[0]}, c, row{j});")
        body.append(f"    for (int p = 0; p < {area}; p++) {{")
        body += [f"        {before}"] if before else []
        once = [f"const int32_t a{j} = {self.element(v, j)};" for j, v in enumerate(inputs) if v.steps == 1]
        each = [f"const int32_t a{j} = {self.element(v, j)};" for j, v in enumerate(inputs) if v.steps > 1]
        body += [f"        {line}" for line in once]
        body.append(f"        for (int t = 0; t < {steps}; t++) {{")
        body += [f"            {line}" for line in (*each, *inner)]
        body += ["        }", *([f"        {after}"] if after else []), "    }", "}"]

    def written(
        self,
        shape: tuple[int, ...],
        low: np.ndarray,
        high: np.ndarray,
        inputs: list[Value],
        expression: str,
        **more: Any,
    ) -> Value:
        """A new buffer that holds an expression of the inputs."""
        steps = max(v.steps for v in inputs)
        new = self.buffered(Value(shape, low, high, steps, **more))
        assert new.buffer is not None
        target = f"({self.start(new, True)})[c * {new.area} + p]"
        self.loops(shape, inputs, steps, [f"{target} = ({new.buffer.type})({expression});"])
        return new

    def stored(self, value: Value) -> Value:
        """The value as a buffer; ``times`` stays."""
        if value.layer is None:
            return value
        plain = replace(value, times=1)
        new = self.written(value.shape, value.low, value.high, [plain], "a0", monotone=value.monotone)
        return replace(new, times=value.times)

    def joined(self, parts: list[Value], shape: tuple[int, ...]) -> Value:
        """Concatenated channels."""
        low, high = (np.asarray(f([f(p.range[i]) for p in parts])) for i, f in ((0, np.min), (1, np.max)))
        steps, place = max(p.steps for p in parts), 0
        new = self.buffered(Value(shape, low, high, steps, monotone=all(p.monotone for p in parts)))
        assert new.buffer is not None
        for part in parts:
            target = f"({self.start(replace(new, offset=place), True)})[c * {part.area} + p]"
            self.loops(part.shape, [part], steps, [f"{target} = ({new.buffer.type})a0;"])
            place += part.size
        return new

    def taken(self, value: Value, at: Tensor) -> Value:
        """The elements ``at`` (from 1, 0 for a zero) of a value."""
        index, shape = at.reshape(-1).numpy().astype(np.int64), tuple(at.shape)
        low, high = (
            np.concatenate([[0], np.broadcast_to(x.reshape(-1, 1), (value.shape[0], value.area)).reshape(-1)])[index]
            for x in (value.low, value.high)
        )
        low, high = low.reshape(shape[0], -1).min(1), high.reshape(shape[0], -1).max(1)
        new = replace(value, shape=shape, low=low, high=high)
        if index[0] and (np.diff(index) == 1).all():
            return replace(new, offset=value.offset + int(index[0]) - 1)
        width = "uint16_t" if index.max() < 2**16 else "uint32_t"
        name = self.program.table(f"from{len(self.program.tables)}", index, width)
        new = self.buffered(new)
        old = self.start(value, True)
        taken = f"{name}[c * {new.area} + p]"
        zero = f"{taken} == 0 ? 0 : " if not index.all() else ""
        assert new.buffer is not None
        self.loops(shape, [], new.steps, [
            f"({self.start(new, True)})[c * {new.area} + p] = ({new.buffer.type})({zero}({old})[{taken} - 1]);"
        ])  # fmt: skip
        return new


class _Found(fx.Interpreter):
    """Runs a graph once and keeps what every node gave."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n] = value
        return value

    found: dict[fx.Node, Any]


Emit = Callable[[Writer, fx.Node, Any], Value | None]
