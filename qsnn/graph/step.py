"""One step of a followed network: its arguments with their shapes, and how modules are written in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from qsnn.graph.modules import View

if TYPE_CHECKING:
    from qsnn.graph.spell import Speller

Shape = tuple[int, ...]


class Refused(Exception):
    """Why one step has no spelling; collected, so that all places are named at once."""


class Call:
    """One step of the followed network: its arguments with their shapes, and how to write modules in its place."""

    def __init__(self, speller: Speller, node: fx.Node) -> None:
        self.speller, self.node = speller, node
        self.name = getattr(node.target, "__name__", str(node.target))

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """The argument at a place or of a name; numbers and tuples as they are."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    @property
    def x(self) -> fx.Node:
        """The first input."""
        found = self.get(0, "input")
        return found if isinstance(found, fx.Node) else self.node.all_input_nodes[0]

    def shape(self, node: fx.Node | None = None) -> Shape:
        """The shape of a value (by default the first input's) for one batch of two images."""
        found: Shape = self.speller.shapes[(node or self.x).name][0]
        return found

    @property
    def out(self) -> Shape:
        """The shape of the result for the batch of two images."""
        return self.shape(self.node)

    def dims(self, value: Any, node: fx.Node | None = None) -> tuple[int, ...]:
        """Dimensions counted from the start.

        Raises:
            Refused: the batch is among them.
        """
        rank = len(self.shape(node))
        if value is None:
            value = tuple(range(rank))
        found = tuple(d % rank for d in ((value,) if isinstance(value, int) else tuple(value)))
        if 0 in found:
            raise Refused("goes over dimension 0, the batch: images of a batch must stay apart")
        return found

    def put(self, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """Write a module behind inputs (by default behind what stands for ``x``); return its node."""
        return self.speller.put(self.node.name, module, inputs or (self.at(self.x),))

    def at(self, node: Any) -> fx.Node:
        """What stands for a node of the followed graph.

        Raises:
            Refused: it is a number or a tensor that no image changes.
        """
        found = self.speller.written.get(node)
        if not isinstance(found, fx.Node):
            raise Refused("needs a value that depends on the image here")
        return found

    def constant(self, value: Any) -> Tensor | None:
        """A number or a tensor that no image changes; None for a value of the network."""
        return self.speller.constant(value)

    def fits(self, value: Tensor) -> Tensor:
        """Numbers that meet every image of a batch alike.

        Raises:
            Refused: they differ from image to image.
        """
        if value.dim() > len(self.out) or (value.dim() == len(self.out) and value.shape[0] != 1):
            raise Refused(f"a tensor of shape {tuple(value.shape)} that differs from image to image of a batch")
        return value

    def view(self, shape: Sequence[int] | None = None, node: fx.Node | None = None) -> fx.Node:
        """Write the values of ``node`` in the shape of the result (or in ``shape``, the batch first)."""
        source = node or self.at(self.x)
        first, second = self.speller.shapes[self.node.name] if shape is None else (tuple(shape), None)
        if second is not None and (first[1:] != second[1:] or first[0] * 3 != second[0] * 2):
            raise Refused("puts the batch somewhere else than first")
        if shape is None and node is None and first == self.shape():
            return source
        return self.speller.put(self.node.name, View(tuple(first[1:])), (source,))


Spelling = Callable[[Call], Any]
"""Writes modules in the place of a step; returns the node of the last one, or a tensor that no image changes."""
