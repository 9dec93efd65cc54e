"""Which firing rates of a student are compared with which activations of its teacher, and how far they are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsnn.distillation.losses import rate_matching
from qsnn.snn.equations import per_channel
from qsnn.snn.neurons import GateNode, IFNode


@dataclass(frozen=True)
class Match:
    """A neuron of the student, and the module whose output is compared with the teacher's layer."""

    neuron: nn.Module
    seen: nn.Module
    """The neuron; or the max pool that was moved behind it, whose output stands where the activation stood."""


def matches(loop: Any, layers: Sequence[str]) -> dict[str, Match]:
    """Return what is compared, by the name of the teacher's layer.

    Args:
        loop: the student, an SNN or a TimeLoop.
        layers: "name" or "student name:teacher name"; none: all neurons.
    Raises:
        ValueError: no such neuron, or a student that runs one step at a time.
    """
    if not getattr(loop, "multi_step", True):
        raise ValueError("rate matching of a SpikingJelly network needs step_mode 'm'")
    neurons, probes, found = dict(loop.neurons()), getattr(loop, "probes", {}), {}
    for spec in layers or tuple(neurons):
        name, _, other = spec.partition(":")
        if name not in neurons:
            raise ValueError(f"rate_layers names {name!r}; the student's neurons are {', '.join(neurons)}")
        seen = loop.network.get_submodule(probes[name]) if name in probes else neurons[name]
        found[other or name] = Match(neurons[name], seen)
    return found


def teacher_layers(teacher: nn.Module, names: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the teacher's layers of these names.

    Raises:
        ValueError: the teacher has no such layer.
    """
    found = {}
    for name in names:
        try:
            found[name] = teacher.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"the teacher has no layer {name!r} to match firing rates with; name pairs: "
                f"rate_layers=('student name:teacher name', ...)"
            ) from None
    return found


def rate_distance(
    matched: Mapping[str, Match],
    outputs: Mapping[str, Tensor],
    activations: Mapping[str, Tensor],
    timesteps: int,
) -> Tensor:
    r"""How far the rates are from the activations: :func:`~qsnn.distillation.losses.rate_matching` over the layers.

    Args:
        matched: what is compared, by the teacher's layer.
        outputs: what ``Match.seen`` gave.
        activations: what the teacher's layers gave, constants to the gradient.
        timesteps: T.
    Shape:
        outputs: (T, B, *) or (T·B, *); activations: (B, *).
    """
    rates, thetas = {}, {}
    for name, match in matched.items():
        output, y = outputs[name], activations[name]
        steps = output if output.dim() == y.dim() + 1 else output.unflatten(0, (timesteps, -1))
        level: Any = 1.0  # of a gate, which is 0 or 1 in both networks
        if not isinstance(match.neuron, GateNode):
            level = match.neuron.threshold if isinstance(match.neuron, IFNode) else match.neuron.v_threshold
        theta = per_channel(torch.as_tensor(level).to(steps[0]), y.dim())
        # a neuron gives spikes, 0 or 1; a max pool behind it is fed θ·spikes already
        rates[name] = steps.mean(0) * (theta if match.seen is match.neuron else 1.0)
        thetas[name] = theta.detach()
    return rate_matching(rates, {name: y.detach() for name, y in activations.items()}, thetas)
