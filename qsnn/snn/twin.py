"""as_qann(): the quantized network that a student equals when it fires deferred."""

from __future__ import annotations

import copy

import torch
from torch import nn

from qsnn.graph.kinds import does
from qsnn.options import expect
from qsnn.quant.activations import level_quant
from qsnn.snn.network import SNN
from qsnn.snn.neurons import IFNode


@torch.no_grad()
def as_qann(student: SNN, qann: nn.Module) -> nn.Module:
    """Return a copy of a quantized network with the weights, batch norms and thresholds of a student made from it.

    Fired deferred at T = L the student equals this network, which :func:`qsnn.certify` proves.

    Args:
        student: from :func:`qsnn.distill`.
        qann: the network that :func:`convert` was given.
    Raises:
        TypeError: they are not an SNN and a network.
        ValueError: the student has no such twin: another neuron than the IF of one θ and v₀ = θ/2, or other layers.
    """
    call = "as_qann(student, qann)"
    expect(call, "student", student, SNN)
    expect(call, "qann", qann, nn.Module)
    twin = copy.deepcopy(qann)
    for name, module in student.network.named_modules():
        if isinstance(module, IFNode):
            try:
                quant = level_quant(twin.get_submodule(name))
            except AttributeError:
                raise ValueError(f"the two networks have different layers; look at {name}") from None
            if not module.dynamics.plain or module.threshold.dim() or bool((module.initial != 0.5).any()):
                raise ValueError(
                    f"{name} is no IF neuron of one threshold and half of it at the start, which the quantized network "
                    f"has; distill with train_threshold and train_initial of '' (or the threshold by 'layer')"
                )
            if quant is not None and float(quant.step.double() * quant.levels) != float(module.threshold):
                quant.set_threshold_(module.threshold)
        elif does(module) in ("weighs", "normalises", "decides", "scales", "shifts") or level_quant(module) is not None:
            try:
                twin.get_submodule(name).load_state_dict(module.state_dict())
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"the two networks have different layers; look at {name}") from error
    return twin
