"""Pruning during distillation: the smallest weights of every layer go, a few more at each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from qsnn.graph.kinds import CLASSES
from qsnn.quant.weights import integer_weights, weight_bits

_UPDATES = 100
"""How often the weights to prune are chosen in a run."""
_RAMP = 0.75
"""Part of the run in which the sparsity grows; the rest trains what is left."""


def sparsity_at(part: float, sparsity: float) -> float:
    r"""The part of the weights that is zero, :math:`s\,(1 - (1 - p/0.75)^3)`, from then on s.

    Args:
        part: p, the part of the run that is done [0, 1].
        sparsity: s at the end [0, 1).
    Source:
        Zhu & Gupta, "To prune, or not to prune", 2017 (the cubic schedule).

    >>> sparsity_at(0.0, 0.8), sparsity_at(0.75, 0.8), sparsity_at(1.0, 0.8)
    (0.0, 0.8, 0.8)
    """
    return sparsity * (1.0 - (1.0 - min(part / _RAMP, 1.0)) ** 3)


def prunable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with weights, by name.

    Raises:
        ValueError: weights of 1 bit, which have no zero; every such layer is named.
    """
    layers: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if isinstance(m, CLASSES["weighs"])}
    binary = [name for name, layer in layers.items() if weight_bits(layer) == 1]
    if binary:
        raise ValueError(
            f"weights of 1 bit have no zero and cannot be pruned: {', '.join(binary)}; use sparsity=0, or weights of "
            f"2 bits ({{-1, 0, 1}})"
        )
    return layers


def start_pruning_(model: nn.Module, sparsity: float) -> Callable[[int, int], None]:
    """Mask the weights of a model, in place; return what to call after each step, with (steps so far, steps in all).

    torch.nn.utils.prune keeps ``weight_orig`` and ``weight_mask`` in the state, so that a stopped run goes on.
    """
    layers = prunable(model)
    for layer in layers.values():
        prune.identity(layer, "weight")

    @torch.no_grad()
    def after_step(step: int, steps: int) -> None:
        if step % max(1, steps // _UPDATES) and step != steps:
            return
        amount = sparsity_at(step / steps, sparsity)
        for layer in layers.values():
            weight, mask = (getattr(layer, f"weight_{kind}") for kind in ("orig", "mask"))
            count = int(amount * weight.numel())
            # a weight that is masked counts as 0 here, the smallest magnitude, so that it stays masked
            mask.copy_(prune.L1Unstructured(count).compute_mask((weight * mask).contiguous(), torch.ones_like(mask)))

    return after_step


def finish_pruning_(model: nn.Module) -> None:
    """Make the masked weights zeros of ordinary layers, in place."""
    for module in model.modules():
        if isinstance(module, CLASSES["weighs"]) and prune.is_pruned(module):
            prune.remove(module, "weight")


def zero_weights(model: nn.Module) -> float:
    """Part of all weights that is zero as the network computes with them, quantized [0, 1]."""
    zeros = total = 0
    for module in model.modules():
        weight: Tensor | None = getattr(module, "weight", None)
        if isinstance(module, CLASSES["weighs"]):
            weight = integer_weights(module)[0]
        elif weight is None or weight.dim() < 2:
            continue
        zeros += int((weight == 0).sum())
        total += weight.numel()
    return zeros / max(1, total)
