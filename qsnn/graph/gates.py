"""Which values of a spelled network may be multiplied: gates, which are 0 or 1, and what is quantized."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

from qsnn.graph.kinds import does
from qsnn.graph.trace import module_of

_COUNTED = ("fires", "decides", "multiplies")
_KEEPS = ("moves", "passes", "takes maxima", "averages", "adds", "joins", "gates", "scales", "shifts")
_STAYS = ("moves", "passes", "takes maxima", "joins", "gates")


def gives_gates(network: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a value is 0 or 1 everywhere: what a gate gives, moved, joined, pooled for maxima or gated."""
    what = does(module_of(network, node))
    return what == "decides" or (what in _STAYS and all(gives_gates(network, n) for n in node.all_input_nodes))


def gives_counts(network: fx.GraphModule, node: fx.Node, known: Callable[[nn.Module], bool]) -> bool:
    """Return whether a value is made of quantized ones alone: activations and gates, moved, summed, scaled, multiplied.

    Args:
        network: spelled so far.
        node: the value.
        known: whether a module that no row of the table names is a quantized activation.
    """
    module = module_of(network, node)
    what = does(module)
    if what in _COUNTED or (module is not None and known(module)):
        return True
    return what in _KEEPS and all(gives_counts(network, source, known) for source in node.all_input_nodes)
