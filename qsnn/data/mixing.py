"""mixup: pairs of images of a batch become one, and a loss is asked for the labels of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Mixed:
    """Labels of images that are mixed: of each λ of the one and 1 - λ of the other."""

    one: Any
    other: Any
    share: float
    """λ [1]."""


def mixed(images: Tensor, labels: Any, alpha: float) -> tuple[Tensor, Mixed]:
    r"""Mix every image of a batch with another one, :math:`\lambda x_i + (1 - \lambda) x_j`, λ ~ Beta(α, α).

    λ, one for the batch, and the pairs come from torch's global generator.

    Shape:
        images and returned: (B, *).
    Source:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    order = torch.randperm(len(images))
    other = tree_map(lambda leaf: leaf[order.to(leaf.device)], labels)
    return torch.lerp(images[order.to(images.device)], images, share), Mixed(labels, other, share)


def over_both(loss: Callable[[Any], Any], labels: Any) -> Any:
    r"""Return what a loss gives for labels; of mixed ones :math:`\lambda\,\ell(y_i) + (1 - \lambda)\,\ell(y_j)`.

    Args:
        loss: gives a tensor, or tensors by name.
        labels: of a batch, or :class:`Mixed`.
    """
    if not isinstance(labels, Mixed):
        return loss(labels)
    return tree_map(lambda one, other: torch.lerp(other, one, labels.share), loss(labels.one), loss(labels.other))
