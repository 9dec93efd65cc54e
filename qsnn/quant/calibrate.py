"""Calibration: activation steps and channel means from a few hundred training images, without any training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.data.images import batches
from qsnn.graph.trace import BATCH_NORMS, LAYERS, call_nodes, module_of
from qsnn.quant.activations import LevelQuant, level_quant


@torch.no_grad()
def calibrate_(qann: fx.GraphModule, images: Tensor, model: nn.Module | None = None) -> None:
    """Set every activation step from one pass of ``images``, layer by layer in graph order, in place.

    With the float ``model`` the mean of every channel behind a convolution or linear layer is corrected to the float
    network's on the way (in the layer's bias, or in the statistics of the batch norm behind it, there with the
    variance), so that each later layer is calibrated on what really arrives.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
    """
    quants = [quant for module in qann.modules() if (quant := level_quant(module)) is not None]
    training = qann.training
    qann.eval()
    handles = [] if model is None else _correcting(qann, _float_statistics(model, images))
    groups: dict[int, list[LevelQuant]] = {}
    for quant in quants:
        quant.samples.clear()
        groups.setdefault(id(quant.samples), []).append(quant)
        quant.collecting = True
    try:
        qann(images)
        if any(len(group) > 1 for group in groups.values()):
            # the first layer of a shared step ran with a step that did not know the others yet: once more, with it
            for group in groups.values():
                for quant in group:
                    quant.collecting = len(group) == 1
                    quant.samples.clear()
            qann(images)
    finally:
        for handle in handles:
            handle.remove()
        for quant in quants:
            quant.collecting = False
            quant.samples.clear()
        qann.train(training)


def _float_statistics(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of every channel behind each layer with weights, by the layer's name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = _moments(output)

        return record

    training = model.training
    model.eval()
    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, LAYERS)]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return found


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    return x.mean(dims), x.var(dims, correction=0)


def _correcting(qann: fx.GraphModule, wanted: dict[str, tuple[Tensor, Tensor]]) -> list[Any]:
    """Hooks that correct each layer when it runs, so that what comes after it sees the corrected values."""
    done: set[str] = set()

    def hook(name: str, norm: Any) -> Any:
        def correct(layer: Any, args: Any, output: Tensor) -> Tensor | None:
            if name in done:
                return None
            done.add(name)
            (mean, var), (float_mean, float_var) = _moments(output), wanted[name]
            if norm is not None:
                ratio = (var / float_var.clamp(min=1e-12)).clamp(0.25, 4.0)
                norm.running_mean.sub_(float_mean).mul_(ratio.sqrt()).add_(mean)
                norm.running_var.mul_(ratio)
                return None
            if layer.bias is None:
                return None
            layer.bias.sub_(mean - float_mean)
            return output - (mean - float_mean).view(1, -1, *[1] * (output.dim() - 2))

        return correct

    handles = []
    for node, layer in call_nodes(qann):
        name = str(node.target)
        if name in wanted:
            after = module_of(qann, next(iter(node.users))) if len(node.users) == 1 else None
            norm = after if isinstance(after, BATCH_NORMS) and after.running_mean is not None else None
            handles.append(layer.register_forward_hook(hook(name, norm)))
    return handles


def calibration_images(source: Any, count: int) -> Tensor:
    """Return the first ``count`` images of a Dataset or an iterable of (images, labels), (N, C, H, W)."""
    found: list[Tensor] = []
    for images, _ in batches(source, min(count, 512)):
        found.append(images)
        if sum(len(part) for part in found) >= count:
            break
    return torch.cat(found)[:count]
