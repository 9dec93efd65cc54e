"""What a spiking network computes on counts, not on spikes: products of two quantized values, and what follows them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qsnn.graph.call import Call, this_call
from qsnn.graph.kinds import does
from qsnn.graph.product import Product
from qsnn.graph.trace import call_nodes, module_of
from qsnn.snn.neurons import IFNode, Repeat

ON_COUNTS = "computed on counts, not on spikes"
"""How every report calls these layers."""


class CountProduct(Product):
    r"""The :class:`~qsnn.graph.product.Product` of a network that fires deferred: of what came in all T steps.

    .. math::
        p = \sum_i \Big(\frac1T \sum_t x_t\Big) \Big(\frac1T \sum_t y_t\Big)

    It is one value an image, the same at every step. Law: spikes that come n of T times with amplitude θ = s·T have the
    mean s·n, so at T = L the product is the quantized network's, integer for integer. A product of single steps is not:
    the mean of products is no product of means. So it is refused online.

    Args:
        equation: of the product.
        timed: whether x and y have a value for each step, (T·B, \*); else they come of products, (B, \*).
    Shape:
        x and y: (T·B, \*) or (B, \*); p: (B, \*). With an image of its own for every step all are (T·B, \*).
    """

    def __init__(self, equation: str, timed: tuple[bool, bool] = (True, True)) -> None:
        super().__init__(equation)
        self.timed = timed

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The product of the means over T."""
        call = this_call()
        totals = zip(self.totals(call, x, y), self.timed, strict=True)
        means = [total / call.timesteps if timed else total for total, timed in totals]
        return self.at_every_step(call, torch.einsum(self.equation, *means))

    def totals(self, call: Call, x: Tensor, y: Tensor) -> list[Tensor]:
        """x and y, each summed over time where it has any, (B, *)."""
        found = []
        for each, timed in zip((x, y), self.timed, strict=True):
            stepped = each.unflatten(0, (call.timesteps, -1)) if timed or call.frames else each.unsqueeze(0)
            found.append(stepped.sum(0) if timed else stepped[0])  # what comes of a product is the same at every step
        return found

    def at_every_step(self, call: Call, product: Tensor) -> Tensor:
        """(B, *), or the same at every step where each has an image of its own, (T·B, *)."""
        if not call.frames:
            return product
        return product.expand(call.timesteps, *product.shape).flatten(0, 1)


def timed(network: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that have a value for each of the T steps; the others are computed once an image.

    Time begins at neurons, gates and :class:`~qsnn.snn.neurons.Repeat`, and ends in products of counts.
    """
    found: set[fx.Node] = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, CountProduct):
            continue
        begins = _fires(module) or isinstance(module, Repeat)
        if begins or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def on_counts(network: fx.GraphModule) -> list[fx.Node]:
    """Return the calls of layers that a spiking network computes on counts: of products, and of what sees them.

    That is every layer with weights, and every value that is gated, between a product and the next neuron.
    """
    behind: set[fx.Node] = set()
    found = []
    for node, module in call_nodes(network):
        sees = any(source in behind for source in node.all_input_nodes)
        multiplies = isinstance(module, CountProduct)
        if multiplies or (sees and not _fires(module)):
            behind.add(node)
        if multiplies or (sees and (does(module) in ("weighs", "gates") or hasattr(module, "weight_bits"))):
            found.append(node)
    return found


def counted_layers(network: nn.Module) -> list[str]:
    """Return the names of these layers, each once; of a network without a graph none."""
    if not isinstance(network, fx.GraphModule):
        return []
    return list(dict.fromkeys(str(node.target) for node in on_counts(network)))


def _fires(module: nn.Module | None) -> bool:
    return getattr(module, "is_spiking", False) or isinstance(module, IFNode)


def products(network: nn.Module) -> list[str]:
    """Return the names of the products of a network, spiking or not."""
    if not isinstance(network, fx.GraphModule):
        return []
    return [str(node.target) for node, module in call_nodes(network) if does(module) == "multiplies"]


def refuse_online(network: nn.Module, what: str) -> None:
    """Refuse online firing of a network that multiplies counts.

    Raises:
        ValueError: it does; all products are named.
    """
    names = products(network)
    if names:
        raise ValueError(
            f"{what} fires online, but {', '.join(names)} multiply counts, which are known only when every spike has "
            f"come; use firing='deferred'"
        )
