"""Trainable neurons: thresholds, initial potentials and time constants, one a layer or one a channel."""

from __future__ import annotations

from torch import Tensor, nn

from qsnn.graph import input_shape_of, value_shapes
from qsnn.neurons import SNN, IFNode


def train_neurons_(snn: SNN, threshold: str, initial: str, tau: str) -> list[tuple[nn.Parameter, Tensor | float]]:
    """Put threshold, initial potential and time constant into training, in place: "layer", "channel" or "" for not.

    Return these parameters with the least value that each may take.

    Raises:
        ValueError: a time constant where there is no leak, or channels of an unknown number.
    """
    neurons = [(name, neuron) for name, neuron in snn.neurons() if isinstance(neuron, IFNode)]
    shapes = value_shapes(snn.network, input_shape_of(snn))
    nodes = {str(node.target): node.name for node in snn.network.graph.nodes if node.op == "call_module"}
    limits: list[tuple[nn.Parameter, Tensor | float]] = []
    for name, neuron in neurons:
        for what, each in (("threshold", threshold), ("initial", initial), ("tau", tau)):
            if not each:
                continue
            channels = None
            if each == "channel":
                if nodes[name] not in shapes:
                    raise ValueError("a value a channel needs the image shape; convert a network that has seen data")
                channels = shapes[nodes[name]][1]
            neuron.train_(what, channels)
            value = getattr(neuron, what)
            # a threshold and a time constant stay above 0
            low: Tensor | float = 0.01 * value.detach().clone() if what == "threshold" else 0.05
            limits.append((value, low if what != "initial" else -1.0))
    return limits
