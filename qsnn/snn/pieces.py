"""Values of a network for all calibration images, worked out in pieces of images when they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.graph.call import Call, calling
from qsnn.graph.kinds import does
from qsnn.graph.trace import called_once, module_of
from qsnn.snn.counts import timed
from qsnn.snn.neurons import IFNode

_IMAGES = 32
"""At most so many images are one piece."""
_VALUES = 2**17
"""At most so many values of a step of the largest layer are one piece (16 MiB of float32 in 32 steps).

Of a step, not of all T: what is chosen for a T must not depend on the others that are converted beside it.
"""


def in_pieces(images: Tensor, values: int) -> list[Tensor]:
    """Split images into pieces that hold no more than memory should, whatever order they come in.

    The images are sorted by their sums and dealt out like cards, so that every piece has dark and bright ones.

    Args:
        images: calibration images.
        values: the most values that a layer gives for one image in a step.
    Shape:
        images: (B, C, H, W); each piece (b, C, H, W).
    """
    images = images[images.flatten(1).double().sum(1).argsort()]
    size = max(1, min(_IMAGES, _VALUES // max(1, values)))
    count = -(-len(images) // size)
    return [images[first::count] for first in range(count)]


class Pieces(fx.Interpreter):
    """A spiking network on pieces of images; values are asked for node by node, in graph order.

    Only spikes are kept (a byte each), and what more than one layer reads; any other value is worked out from them
    when it is asked for, so that no current of all images and steps is ever held. What a layer gives may therefore
    change until a neuron behind it is :meth:`kept <keep>`.

    Args:
        network: of an :class:`~qsnn.SNN`.
        pieces: the images.
        call: T and the way of firing.
    """

    def __init__(self, network: fx.GraphModule, pieces: list[Tensor], call: Call) -> None:
        super().__init__(network)
        self.network, self.call, self.pieces = network, call, pieces
        self.order = list(network.graph.nodes)
        self.place = {node: index for index, node in enumerate(self.order)}
        self.once = called_once(network)
        self.timed = timed(network)
        """What has a value for each of the T steps."""
        self.arriving: set[fx.Node] = set()
        """Neurons and all behind them."""
        self.values: dict[fx.Node, list[Tensor]] = {}
        self.last: dict[fx.Node, int] = {}
        """The last place that reads a kept value, directly or through values that are not kept."""
        origins: dict[fx.Node, set[fx.Node]] = {}
        for index, node in enumerate(self.order):
            module = module_of(network, node)
            fires = isinstance(module, IFNode)
            if fires or any(source in self.arriving for source in node.all_input_nodes):
                self.arriving.add(node)
            read = set().union(*(origins[source] for source in node.all_input_nodes))
            self.last.update(dict.fromkeys(read, index))
            shared = len(node.users) > 1 and does(module) in ("weighs", "normalises", "adds", "joins")
            origins[node] = {node} if fires or shared or node.op == "placeholder" else read
            if node.op == "placeholder":
                self.values[node] = pieces

    def layer(self, node: fx.Node | None) -> nn.Module | None:
        """The layer that a node calls."""
        return module_of(self.network, node)

    def at(self, node: fx.Node, piece: int) -> Tensor:
        """What a node gives for a piece: (B, *), or (T·B, *) for one in time."""
        self.env: dict[fx.Node, Any] = {}
        with calling(self.call):
            self._find(node, piece)
        return self.env[node]

    def _find(self, node: fx.Node, piece: int) -> None:
        if node in self.env:
            return
        if node in self.values:
            value = self.values[node][piece]
            self.env[node] = value.to(self.pieces[0].dtype) if value.dtype == torch.int8 else value
            return
        for source in node.all_input_nodes:
            self._find(source, piece)
        self.env[node] = self.run_node(node)

    def mean(self, node: fx.Node) -> Tensor:
        """What a node gives for all images, the mean over T: (B, *)."""
        return torch.cat([self._in_time(node, piece).mean(0) for piece in range(len(self.pieces))])

    def _in_time(self, node: fx.Node, piece: int) -> Tensor:
        value = self.at(node, piece)
        return value.unflatten(0, (self.call.timesteps, -1)) if node in self.timed else value.unsqueeze(0)

    def current(self, node: fx.Node, piece: int) -> Tensor:
        """What a node gives for a piece at each of the T steps, (T, b, *)."""
        value = self._in_time(node, piece)
        return value.expand(self.call.timesteps, *value.shape[1:])

    def keep(self, node: fx.Node) -> None:
        """Go past a node: its value is kept where it is spikes or read more than once, and forgotten after use."""
        module = self.layer(node)
        shared = len(node.users) > 1 and does(module) in ("weighs", "normalises", "adds", "joins")
        if isinstance(module, IFNode):
            self.values[node] = [self.at(node, piece).to(torch.int8) for piece in range(len(self.pieces))]
        elif shared:
            self.values[node] = [self.at(node, piece) for piece in range(len(self.pieces))]
        for done in [one for one in self.values if self.last.get(one, -1) <= self.place[node] and one is not node]:
            del self.values[done]


class Reference(fx.Interpreter):
    """Runs the network of activations node by node on all images, and forgets what no later node needs.

    Args:
        network: the graph that spiking ones were made from.
        images: all of them.
        watched: names of nodes whose values will be asked for.
    """

    def __init__(self, network: fx.GraphModule, images: Tensor, watched: set[str]) -> None:
        super().__init__(network)
        self.order = list(network.graph.nodes)
        self.args_iter = iter([images])
        self.watched, self.place = watched, 0
        self.passed: dict[str, Tensor] = {}

    def value(self, name: str) -> Tensor:
        """Run up to the node of this name; return its value (B, *), handed out once for each time it is passed.

        Raises:
            ValueError: no such node is left to run.
        """
        while name not in self.passed and self.place < len(self.order):
            node = self.order[self.place]
            self.place += 1
            value = self.env[node] = self.run_node(node)
            for done in self.user_to_last_uses.get(node, []):
                if done is not node:
                    del self.env[done]
            if node.name in self.watched:
                self.passed[node.name] = value
        if name not in self.passed:
            raise ValueError(f"no node {name} is left to run")
        return self.passed[name]

    def forget(self, name: str) -> None:
        """The value will not be asked for again."""
        self.passed.pop(name, None)
