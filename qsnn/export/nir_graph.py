"""A NIR graph while it is written: values, layers with relay channels, and the walk over the folded graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qsnn.export.nir_read import RELAYS
from qsnn.export.real import REAL
from qsnn.graph.call import Call, calling
from qsnn.graph.kinds import does
from qsnn.graph.trace import module_of
from qsnn.snn.network import SNN


@dataclass
class Value:
    """Nodes whose sum a node of the folded graph is; or a layer that the neuron behind it will write."""

    names: list[str]
    shape: tuple[int, ...]
    """(C, H, W) without relays, or (F,)."""
    low: np.ndarray
    high: np.ndarray
    relays: tuple[int, int]
    """Where "start" and "clock" stand among the channels."""
    width: int
    """Channels with relays."""
    layer: tuple[np.ndarray, dict[str, tuple[int, int]], Value] | None = None
    """Integer weights (O, I, kH, kW), where they move, and their input."""


@dataclass
class Graph:
    """Walks the folded graph in order; ``values`` says what each node is in NIR."""

    nir: Any
    folded: SNN
    image: tuple[int, ...]
    timesteps: int
    emit: dict[Any, Emit]
    """What writes each kind of module: by its exact type, else by what it does."""
    nodes: dict[str, Any] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    values: dict[fx.Node, Value] = field(default_factory=dict)
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    largest: float = 0.0
    """Of all potentials and thresholds."""

    def run(self) -> None:
        """Write every node.

        Raises:
            ValueError: all nodes that NIR has no node for, by name.
        """
        network = self.folded.network
        graph = self

        class Shapes(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                graph.shapes[n] = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
                return value

        with calling(Call()):
            Shapes(network).run(torch.zeros(1, *self.image))
        refused, lost = [], set()
        for node in network.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            try:
                module = module_of(network, node)
                emit = self.emit.get(type(module), self.emit.get(does(module) if node.op != "output" else None))
                if emit is None and node.op != "output":
                    what = node.target if module is None else type(module).__name__
                    raise ValueError(REAL.get(str(what), f"{what} has no node in NIR that every simulator reads"))
                if any(n in lost for n in node.all_input_nodes):
                    lost.add(node)  # what comes behind a refused node is not judged
                    continue
                value = emit(self, node, module) if emit is not None else None
                if value is not None:
                    self.values[node] = value
            except ValueError as error:
                lost.add(node)
                refused.append(f"{node.target if node.op == 'call_module' else node.name} ({error})")
        if refused:
            raise ValueError("cannot be written as NIR: " + "; ".join(refused))

    def source(self, node: fx.Node) -> Value:
        """What a node of one input reads, as nodes of NIR."""
        (source,) = (n for n in node.all_input_nodes if n in self.values)
        value = self.values[source]
        if value.layer is not None:
            raise ValueError("the sums of a layer are read by another one than a neuron")
        return value

    def add(self, name: str, node: Any, inputs: list[str]) -> str:
        """Add a node of NIR behind others, whose sum it reads; return its name."""
        name = name.replace(".", "_")
        while name in self.nodes:
            name += "_"
        self.nodes[name] = node
        self.edges += [(source, name) for source in inputs]
        return name

    def linear(
        self,
        name: str,
        value: Value,
        gains: np.ndarray,
        start: np.ndarray | None,
        clock: np.ndarray,
        relay: bool = True,
    ) -> str:
        """Write a layer, its outputs times ``gains``; with ``start`` and ``clock`` from the relays, which go on."""
        weight, moves, source = value.layer if value.layer is not None else self.identity(value)
        more = RELAYS if relay else 0
        full = np.zeros((len(weight) + more, source.width, *weight.shape[2:]))
        full[: len(weight), : weight.shape[1]] = weight * gains.reshape(-1, 1, 1, 1)
        if start is not None:
            a, b = self.tap(moves, weight.shape[2:], source, value.shape)
            for place, given in zip(source.relays, (start, clock), strict=True):
                full[: len(weight), place, a, b] = given
            for j, place in enumerate(source.relays[:more]):
                full[len(weight) + j, place, a, b] = 1.0
        if len(source.shape) == 1:
            return self.add(name, self.nir.Linear(weight=full[..., 0, 0]), source.names)
        node = self.nir.Conv2d(
            input_shape=tuple(source.shape[1:]), weight=full, groups=1,
            bias=np.zeros(len(full)), **{key: tuple(map(int, side)) for key, side in moves.items()},
        )  # fmt: skip
        return self.add(name, node, source.names)

    def identity(self, value: Value) -> tuple[np.ndarray, dict[str, tuple[int, int]], Value]:
        """A layer that gives a value on."""
        eye = np.eye(value.shape[0]).reshape(value.shape[0], value.shape[0], 1, 1)
        return eye, {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}, value

    def tap(
        self, moves: dict[str, tuple[int, int]], kernel: tuple[int, ...], source: Value, out: tuple[int, ...]
    ) -> tuple[int, int]:
        """The element of the kernel that never reads padding, so that a relay passes everywhere."""
        found = []
        for axis in range(2):
            size = (*source.shape[1:], 1, 1)[axis]
            last = ((*out[1:], 1, 1)[axis] - 1) * moves["stride"][axis] - moves["padding"][axis]
            places = [
                a for a in range(kernel[axis])
                if a * moves["dilation"][axis] >= moves["padding"][axis]
                and last + a * moves["dilation"][axis] < size
            ]  # fmt: skip
            if not places:
                raise ValueError("every element of its kernel meets padding, so that no relay can pass")
            found.append(min(places, key=lambda a: abs(a - kernel[axis] // 2)))
        return found[0], found[1]


Emit = Callable[[Graph, fx.Node, Any], Value | None]
