"""Calibration: activation steps and channel means from a few hundred training images, without any training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.data.batches import batches
from qsnn.graph.arrived import evaluating
from qsnn.graph.hooks import Watcher, watching
from qsnn.graph.kinds import does
from qsnn.graph.trace import call_nodes, called_once, module_of
from qsnn.quant.activations import LevelQuant, level_quant


@torch.no_grad()
def calibrate_(qann: fx.GraphModule, images: Tensor, network: fx.GraphModule | None = None) -> None:
    """Set every activation step from one pass of ``images``, layer by layer in graph order, in place.

    With the float ``network`` (spelled) the mean of every channel behind a layer with weights is corrected to the
    float network's on the way (in the layer's bias, or in the statistics of the batch norm behind it, there with the
    variance), so that each later layer is calibrated on what really arrives. The level of a gate goes where the gate is
    open as often as in the float network, halfway between two values of its input.

    Shape:
        images: (B, C, H, W), or whatever the network takes.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
    """
    quants = [quant for module in qann.modules() if (quant := level_quant(module)) is not None]
    found, passed = ({}, {}) if network is None else _float_statistics(network, images)
    layers, correct = _correcting(qann, found)
    gates: dict[str, nn.Module] = {name: qann.get_submodule(name) for name in passed}

    def level(name: str, gate: Any, args: Any, output: Tensor) -> Tensor:
        gate.level.fill_(_level_of(args[0], passed[name], gate.level))
        return (args[0] >= gate.level).to(output.dtype)

    groups: dict[int, list[LevelQuant]] = {}
    for quant in quants:
        quant.samples.clear()
        groups.setdefault(id(quant.samples), []).append(quant)
    with evaluating(qann), watching(layers, correct), watching(gates, level), _collecting(quants):
        qann(images)
        if any(len(group) > 1 for group in groups.values()):
            # the first layer of a shared step ran with a step that did not know the others yet: once more, with it
            for group in groups.values():
                for quant in group:
                    quant.collecting = len(group) == 1
                    quant.samples.clear()
            qann(images)


@contextmanager
def _collecting(quants: list[LevelQuant]) -> Iterator[None]:
    """Quantizers set their steps from what they see while the block runs."""
    for quant in quants:
        quant.collecting = True
    try:
        yield
    finally:
        for quant in quants:
            quant.collecting = False
            quant.samples.clear()


def _float_statistics(
    network: fx.GraphModule, images: Tensor
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Mean and variance of every channel behind each layer with weights, and how often each gate is open [1].

    Both by name; not where a layer is called twice.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    passed: dict[str, float] = {}

    def record(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if does(module) == "decides":
            passed[name] = float(output.mean())
        else:
            found[name] = _moments(output, module)

    once = called_once(network)
    layers = {str(node.target): module for node, module in call_nodes(network) if str(node.target) in once}
    layers = {name: module for name, module in layers.items() if does(module) in ("weighs", "decides")}
    with evaluating(network), watching(layers, record):
        network(images)
    return found, passed


def _level_of(x: Tensor, passed: float, level: Tensor) -> Tensor:
    """The level at which x is not below it as often as ``passed``, halfway between two of its values.

    Args:
        x: input of the gate; at most 2**20 of its elements are looked at, evenly spaced.
        passed: how often [1].
        level: kept where no other is nearer.
    """
    x = x.flatten()[:: max(1, x.numel() // 2**20)]
    values, counts = x.unique(return_counts=True)
    shares = counts.flip(0).cumsum(0).flip(0)[1:] / len(x)  # of what lies above the gap between two values
    if not len(shares):
        return level
    errors = (shares - passed).abs()
    best = int(errors.argmin())
    if float((x >= level).float().mean().sub(passed).abs()) <= float(errors[best]):
        return level
    return 0.5 * (values[best] + values[best + 1])


def _channels(layer: nn.Module, dims: int) -> int:
    """The dimension of the channels of a layer's output: the last one of a linear layer, else 1."""
    return dims - 1 if isinstance(layer, nn.Linear) else 1


def _moments(x: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    channels = _channels(layer, x.dim())
    dims = [d for d in range(x.dim()) if d != channels]
    return x.mean(dims), x.var(dims, correction=0)


def _correcting(qann: fx.GraphModule, wanted: dict[str, tuple[Tensor, Tensor]]) -> tuple[dict[str, nn.Module], Watcher]:
    """The layers to correct when they run, so that what comes after them sees the corrected values; and how."""
    done: set[str] = set()
    norms: dict[str, Any] = {}
    layers: dict[str, nn.Module] = {}
    for node, layer in call_nodes(qann):
        name = str(node.target)
        if name in wanted:
            after = module_of(qann, next(iter(node.users))) if len(node.users) == 1 else None
            norms[name] = after if does(after) == "normalises" else None
            layers[name] = layer

    def correct(name: str, layer: Any, args: Any, output: Tensor) -> Tensor | None:
        if name in done:
            return None
        done.add(name)
        (mean, var), (float_mean, float_var) = _moments(output, layer), wanted[name]
        norm = norms[name]
        if norm is not None:
            ratio = (var / float_var.clamp(min=1e-12)).clamp(0.25, 4.0)
            norm.running_mean.sub_(float_mean).mul_(ratio.sqrt()).add_(mean)
            norm.running_var.mul_(ratio)
            return None
        if layer.bias is None:
            return None
        layer.bias.sub_(mean - float_mean)
        shape = [1] * output.dim()
        shape[_channels(layer, output.dim())] = -1
        return output - (mean - float_mean).view(shape)

    return layers, correct


def calibration_images(source: Any, count: int) -> Tensor:
    """Return the first ``count`` images of a Dataset or an iterable of (images, labels), (N, C, H, W).

    Raises:
        ValueError: they have several shapes.
    """
    found: list[Tensor] = []
    for images, _ in batches(source, min(count, 512)):
        if found and images.shape[1:] != found[0].shape[1:]:
            one, other = tuple(found[0].shape[1:]), tuple(images.shape[1:])
            raise ValueError(f"expected images of one shape, got {one} and {other}; resize them, or pad them")
        found.append(images)
        if sum(len(part) for part in found) >= count:
            break
    return torch.cat(found)[:count]
