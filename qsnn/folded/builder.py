"""The new graph of a folded network while it is built: its layers, and the shapes of the old graph's values."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qsnn.folded.layers import FloatLayer
from qsnn.folded.neurons import Current
from qsnn.folded.terms import Value, current_arguments, steps_of


class Builder:
    """Writes layers into a new graph; ``values`` says what each node of the old one stands for."""

    def __init__(self, network: fx.GraphModule, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.old, self.shapes, self.dtype = network, shapes, dtype
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Value] = {}

    def call(self, name: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """Add ``module`` under the path ``name`` (or name_1, ... where taken) and a call of it."""
        taken = {existing for existing, _ in self.root.named_modules()}
        unique, count = name, 0
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        parent = self.root
        *path, last = unique.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, module)
        return self.graph.call_module(unique, inputs)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of one image of a node's value."""
        return self.shapes[node.name][1:]

    def by_channel(self, x: Tensor, node: fx.Node) -> Tensor:
        """A number (), or one a channel (C,), dimension 1: (C, 1, ...), as an image of ``node`` needs it."""
        return x.reshape(-1, *[1] * (len(self.shape(node)) - 1)) if x.numel() > 1 else x.reshape(())

    def numbers(self, x: Tensor, node: fx.Node) -> Tensor:
        """Numbers that a layer holds, (1, *) or (*): (*) with as many dimensions as one image of ``node``."""
        rank = len(self.shape(node))
        x = x.detach().double()
        x = x[0] if x.dim() > rank else x.reshape(*[1] * (rank - x.dim()), *x.shape)
        return x.reshape(()) if x.numel() == 1 else x

    def absorbs(self, node: fx.Node) -> bool:
        """Whether a node of the new graph is a float layer that batch norm and θ can go into."""
        layer = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(layer, FloatLayer) and layer.bias is not None and layer.by_channel

    def current(self, value: Value, name: str) -> fx.Node:
        """A node that holds the value itself in float64."""
        (first, *rest) = value.terms
        if not rest and value.bias is None and not first.factors and (first.divisor, first.steps) == (1, 0):
            return first.node
        module = Current(*current_arguments(value), steps=steps_of(value))
        return self.call(name.replace(".", "_"), module, *(term.node for term in value.terms))
