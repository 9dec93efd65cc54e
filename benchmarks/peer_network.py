"""A quantized network as a SpikingJelly user makes it spike: Brevitas layers on (T·B), an IFNode for every activation.

It shares no module with ours; weights, θ and amplitude are those of the quantized network.
"""

from __future__ import annotations

import copy
from typing import Any

from spikingjelly.activation_based import neuron
from torch import Tensor, fx, nn

from qsnn.graph.trace import replace_module
from qsnn.quant.activations import level_quant


def peer_network(qann: fx.GraphModule, *, half: bool = False, **options: Any) -> nn.Module:
    """The network in SpikingJelly's multi-step mode, (T, B, *) -> (T, B, K).

    Args:
        qann: quantized; it is copied.
        half: every potential starts at θ/2 and not at 0.
        options: of :class:`spikingjelly.activation_based.neuron.IFNode`, such as ``surrogate_function``.
    """
    network = copy.deepcopy(qann)
    for name in {str(node.target) for node in qann.graph.nodes if node.op == "call_module"}:
        module = network.get_submodule(name)
        quant = level_quant(module)
        spikes = quant is not None and not quant.signed
        threshold = float(quant.step.detach()) * quant.levels if spikes else 0.0
        replace_module(network, name, _ScaledNode(threshold, half, options) if spikes else _Stepless(module))
    return network


class _Stepless(nn.Module):
    """A layer without a state on (T, B, *), as SpikingJelly's SeqToANNContainer runs it, also of two inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        answer: Tensor = self.module(*(x.flatten(0, 1) for x in inputs))
        return answer.unflatten(0, inputs[0].shape[:2])


class _ScaledNode(nn.Module):
    """An IFNode with soft reset whose spikes are θ and not 1."""

    def __init__(self, threshold: float, half: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.node = neuron.IFNode(v_threshold=threshold, v_reset=None, step_mode="m", **options)
        if half:
            self.node.set_reset_value("v", threshold / 2)
            self.node.reset()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        spikes: Tensor = self.node(x) * self.threshold
        return spikes
