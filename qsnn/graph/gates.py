"""Which values of a spelled network are gates: 0 or 1, and so may multiply another value."""

from __future__ import annotations

from torch import fx

from qsnn.graph.kinds import does
from qsnn.graph.trace import module_of

_STAYS = ("moves", "passes", "takes maxima", "joins", "gates")


def gives_gates(network: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a value is 0 or 1 everywhere: what a gate gives, moved, joined, pooled for maxima or gated."""
    what = does(module_of(network, node))
    return what == "decides" or (what in _STAYS and all(gives_gates(network, n) for n in node.all_input_nodes))
