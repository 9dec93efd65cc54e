"""Which rates and currents of a student are compared with which layers of its teacher, and how far they are apart."""

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
        theta = _theta(match.neuron, y)
        # a neuron gives spikes, 0 or 1; a max pool behind it is fed θ·spikes already
        rates[name] = steps.mean(0) * (theta if match.seen is match.neuron else 1.0)
        thetas[name] = theta.detach()
    return rate_matching(rates, {name: y.detach() for name, y in activations.items()}, thetas)


def current_distance(
    matched: Mapping[str, Match], currents: Mapping[str, Tensor], inputs: Mapping[str, Tensor], timesteps: int
) -> Tensor:
    r"""How far mean currents are from the teacher's pre-activations, layer by layer, with no spike in between.

    :math:`\mathrm{mean}_l\,\mathrm{mean}\,((\bar x_l - z_l) / \theta_l)^2`; layers whose max pool stands behind the
    neuron are left out, for there the current has another shape.

    Args:
        matched: what is compared, by the teacher's layer.
        currents: what the student's neurons were given.
        inputs: what the teacher's layers were given, constants to the gradient.
        timesteps: T.
    Shape:
        currents: (T, B, *), (T·B, *), or (B, *) where the current is the same at every step; inputs: (B, *).
    Raises:
        ValueError: nothing is left to compare.
    """
    means, thetas = {}, {}
    for name, match in matched.items():
        x, z = currents[name], inputs[name]
        if match.seen is not match.neuron:
            continue
        if x.shape != z.shape:
            x = (x if x.dim() == z.dim() + 1 else x.unflatten(0, (timesteps, -1))).mean(0)
        means[name], thetas[name] = x, _theta(match.neuron, z).detach()
    if not means:
        raise ValueError("current_weight finds no layer to compare: all neurons stand in front of a max pool; use 0")
    return rate_matching(means, {name: inputs[name].detach() for name in means}, thetas)


def _theta(neuron: nn.Module, like: Tensor) -> Tensor:
    """θ in the dtype of ``like`` (B, C, *), shaped to meet it; 1 of a gate, which is 0 or 1 in both networks."""
    level: Any = 1.0
    if not isinstance(neuron, GateNode):
        level = neuron.threshold if isinstance(neuron, IFNode) else neuron.v_threshold
    return per_channel(torch.as_tensor(level).to(like), like.dim())
