"""Where a folded network that fires deferred needs one pass of a layer for all steps."""

from __future__ import annotations

from collections import Counter

from torch import fx

from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import IntegerLayer
from qsnn.graph.trace import module_of


def in_one_(network: fx.GraphModule) -> None:
    r"""Let layers whose sums go to integer neurons alone sum their input over time first, where they fire deferred.

    Such a neuron reads :math:`\sum_t W x_t`, which is :math:`W \sum_t x_t` in integers: one pass for all T steps. A
    layer that a current reads as well (a residual sum, the readout) keeps its steps apart, for floats are added step by
    step. Marked in place: ``whole`` of the layers and of their neurons.
    """
    calls = Counter(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    for node in network.graph.nodes:
        layer, readers = module_of(network, node) if node.op == "call_module" else None, list(node.users)
        if not isinstance(layer, IntegerLayer) or calls[str(node.target)] > 1:
            continue
        neurons = [module_of(network, reader) for reader in readers]
        once = all(calls[str(reader.target)] == 1 for reader in readers)
        if readers and once and all(isinstance(neuron, IntegerIF) for neuron in neurons):
            layer.whole = True
            for neuron in neurons:
                assert isinstance(neuron, IntegerIF)
                neuron.whole = True
