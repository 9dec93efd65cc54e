"""Weights averaged over the last part of a training run, and the batch-norm statistics that belong to them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORM_IMAGES = 5_000
"""Training images that batch norms are estimated on where weights were averaged."""


class WeightAverage:
    r"""The exponential moving average of all trained parameters, :math:`\bar w \leftarrow d_n\,\bar w + (1 - d_n)\,w`.

    After update n, :math:`d_n = \min(d, \tfrac{1 + n}{10 + n})`, so that what the run began with is soon forgotten.

    Args:
        model: whose parameters are averaged; it trains on with its own.
        decay: d in (0, 1), no unit; the average reaches back about 1 / (1 - d) steps.
    Source:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; Tarvainen and Valpola,
        "Mean teachers are better role models", NeurIPS 2017 (exponential, of the weights of a student).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in _trained(model)}

    @torch.no_grad()
    def update_(self, model: nn.Module, step: int) -> None:
        """Take in the parameters after update number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in _trained(model):
            self.weights[name].lerp_(parameter, 1.0 - decay)

    def restore_(self, weights: dict[str, Tensor]) -> None:
        """Go on from the averages of a stopped run.

        Raises:
            ValueError: they are of another network.
        """
        shapes = [{name: tuple(value.shape) for name, value in held.items()} for held in (self.weights, weights)]
        if shapes[0] != shapes[1]:
            raise ValueError("the state holds averages of other weights; delete it to start over")
        for name, value in weights.items():
            self.weights[name].copy_(value)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Give the model the averages."""
        for name, parameter in _trained(model):
            parameter.copy_(self.weights[name])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def estimate_norms_(model: nn.Module, batches: Iterable[Tensor], frozen: Iterable[str] = ()) -> None:
    """Set the statistics of every batch norm to the plain mean over these batches, in place; the model ends in eval.

    Statistics that were gathered while the weights moved fit none of their averages.

    Args:
        model: the network.
        batches: images, (B, C, H, W) each.
        frozen: names of batch norms that keep what they have.
    Source:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018 (SWA).
    """
    kept = {
        module: module.momentum
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and name not in set(frozen)
    }
    model.eval()
    if not kept:
        return
    for norm in kept:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for: every batch counts alike
        norm.train()
    try:
        for images in batches:
            model(images)
    finally:
        for norm, momentum in kept.items():
            norm.momentum = momentum
            norm.eval()
