"""The terms of the distillation loss, each with its formula and its source. They see the logits of single steps.

CE and KL are those of the task: of one logit those of a Bernoulli variable, of maps (T, B, K, H, W) the mean over the
pixels, of numbers (T, B, \\*) mean squared errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsnn.distillation.config import DistillConfig
from qsnn.measure.task import CLASSIFICATION, Task, kl_divergence


def smoothed_cross_entropy(
    step_logits: Tensor, labels: Tensor, smoothing: float = 0.0, task: Task = CLASSIFICATION
) -> Tensor:
    r""":math:`CE_\epsilon(\bar z, y)`, with the mean over time :math:`\bar z = \tfrac1T \sum_t z_t`.

    Shape:
        step_logits z: (T, B, K); labels: (B,).
    Source:
        Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016 (label smoothing).
    """
    return task.loss(step_logits.mean(0), labels, smoothing)


def step_cross_entropy(
    step_logits: Tensor, labels: Tensor, smoothing: float = 0.0, task: Task = CLASSIFICATION
) -> Tensor:
    r""":math:`\tfrac1T \sum_t CE_\epsilon(z_t, y)`: every step answers on its own (TET).

    Shape:
        step_logits z: (T, B, K); labels: (B,).
    Source:
        Deng et al., "Temporal Efficient Training of Spiking Neural Network via Gradient Re-weighting", ICLR 2022.
    """
    return task.loss(step_logits.flatten(0, 1), _repeated(labels, len(step_logits)), smoothing)


def step_regulariser(step_logits: Tensor, target: float = 1.0) -> Tensor:
    r""":math:`\tfrac1T \sum_t \mathrm{mean}\,(z_t - \phi)^2`: keeps outliers of single steps small (TET).

    Shape:
        step_logits z: (T, B, K); target φ: a number.
    Source:
        Deng et al., ICLR 2022 (φ is the threshold there, weight λ = 0.05 beside 1 - λ of the cross entropy).
    """
    return (step_logits - target).square().mean()


def step_divergence(
    step_logits: Tensor, target: Tensor, temperature: float = 1.0, task: Task = CLASSIFICATION
) -> Tensor:
    r""":math:`\tfrac1T \sum_t \tau^2 KL(p^{teacher}_\tau \,\|\, p_\tau(z_t))`: every step is taught on its own.

    Shape:
        step_logits z: (T, B, K); target: (B, K).
    Source:
        Yu et al., "Efficient Logit-based Knowledge Distillation of Deep Spiking Neural Networks for Full-Range
        Timestep Deployment", ICML 2025.
    """
    return task.taught(step_logits.flatten(0, 1), _repeated(target, len(step_logits)), temperature)


def ensemble_divergence(step_logits: Tensor, temperature: float = 1.0, task: Task = CLASSIFICATION) -> Tensor:
    r""":math:`\tfrac1T \sum_t \tau^2 KL(p_\tau(\bar z) \,\|\, p_\tau(z_t))`: every step follows the mean over time.

    The mean :math:`\bar z` is a constant to the gradient.

    Shape:
        step_logits z: (T, B, K).
    Source:
        Yu et al., ICML 2025 (the student's own ensemble over time as a second teacher).
    """
    return step_divergence(step_logits, step_logits.mean(0).detach(), temperature, task)


def correct_divergence(step_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`\tfrac1T \sum_t \tau^2 KL(p_\tau(\bar z_C) \,\|\, p_\tau(z_t))`: every step follows those that are right.

    :math:`\bar z_C` is the mean over the steps :math:`C = \{t : \arg\max z_t = y\}` that answer an image rightly, a
    constant to the gradient; an image that no step answers rightly adds 0.

    Shape:
        step_logits z: (T, B, K); labels y: (B,).
    Source:
        Yu et al., ICML 2025 (the ensemble over time as a teacher), here without the steps that would teach an error.
    """
    right = (step_logits.detach().argmax(-1) == labels).to(step_logits.dtype)  # (T, B)
    count = right.sum(0)
    target = (right.unsqueeze(-1) * step_logits.detach()).sum(0) / count.clamp(min=1).unsqueeze(-1)
    return _divergence(step_logits, target, temperature, (count > 0).to(step_logits.dtype))


def strong_divergence(step_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`\tau^2 KL(p_\tau(z_s) \,\|\, p_\tau(z_w))`, mean over the batch: the strongest step teaches the weakest.

    For each image, :math:`s = \arg\max_t p(z_t)_y` and :math:`w = \arg\min_t p(z_t)_y`, by the probability of the label
    y; :math:`z_s` is a constant to the gradient. With T = 1 it is 0.

    Shape:
        step_logits z: (T, B, K); labels y: (B,).
    Source:
        Ding et al., "Synergy Between the Strong and the Weak: Spiking Neural Networks are Inherently
        Self-Distillers", NeurIPS 2025 (Strong2Weak; there a step's confidence tells the strong from the weak).
    """
    images = torch.arange(len(labels), device=labels.device)
    sure = F.softmax(step_logits.detach(), -1)[:, images, labels]  # (T, B)
    strong, weak = step_logits.detach()[sure.argmax(0), images], step_logits[sure.argmin(0), images]
    return kl_divergence(weak, strong, temperature)


def negative_entropy(step_logits: Tensor) -> Tensor:
    r""":math:`-\tfrac1T \sum_t H(p(z_t))`, :math:`H(p) = -\sum_k p_k \log p_k`: no step grows too sure of itself.

    A term of the loss, so that its weight rewards entropy; from :math:`-\log K` (uniform) to 0 (certain).

    Shape:
        step_logits z: (T, B, K).
    Source:
        Yu et al., "Temporal Separation with Entropy Regularization for Knowledge Distillation in Spiking Neural
        Networks", CVPR 2025 (beside the KL of every step, so that a teacher's errors weigh less).
    """
    log_p = F.log_softmax(step_logits, -1)
    return (log_p.exp() * log_p).sum(-1).mean()


def _divergence(z: Tensor, target: Tensor, temperature: float, weight: Tensor) -> Tensor:
    """τ² KL(target ‖ z) of every image times its weight, mean over what comes before the classes.

    Shape:
        z: (..., B, K); target: (B, K); weight: (..., B), broadcast.
    """
    log_p, log_q = F.log_softmax(z / temperature, -1), F.log_softmax(target / temperature, -1)
    each = (log_q.exp() * (log_q - log_p)).sum(-1)
    return (each * weight).mean() * temperature**2


def answer_divergence(
    step_logits: Tensor, target: Tensor, temperature: float = 1.0, task: Task = CLASSIFICATION
) -> Tensor:
    r""":math:`\tfrac1T \sum_t \tau^2 KL(p^{teacher}_\tau \,\|\, p_\tau(m_t))`, with the answers
    :math:`m_t = \tfrac1t \sum_{i \le t} z_i`: what a user gets after t steps, for every t up to T.

    Shape:
        step_logits z: (T, B, K); target: (B, K).
    Source:
        Hinton et al. 2015, at every T at once.
    """
    counts = torch.arange(1, len(step_logits) + 1, device=step_logits.device)
    counts = counts.view(-1, *[1] * (step_logits.dim() - 1))
    return step_divergence(step_logits.cumsum(0) / counts, target, temperature, task)


def _repeated(labels: Tensor, steps: int) -> Tensor:
    """The same for every step: (B, \\*) -> (T·B, \\*)."""
    return labels.repeat(steps, *[1] * (labels.dim() - 1))


def rate_matching(rates: dict[str, Tensor], activations: dict[str, Tensor], scales: dict[str, Tensor]) -> Tensor:
    r""":math:`\mathrm{mean}_l\,\mathrm{mean}\,((r_l - y_l) / \theta_l)^2`, over layers l.

    Args:
        rates: r = θ·(spikes a step), the student's mean output of each layer.
        activations: y, the teacher's activation of the same layer.
        scales: θ of each layer.
    Shape:
        r and y: (B, *); θ: broadcast against them.
    Source:
        Hong et al., "LaSNN: Layer-wise ANN-to-SNN Distillation ...", 2023; Romero et al., "FitNets", ICLR 2015.
    """
    errors = [((rate - activations[name]) / scales[name]).square().mean() for name, rate in rates.items()]
    return torch.stack(errors).mean()


def distillation_loss(
    step_logits: Tensor, targets: Sequence[Tensor], labels: Tensor, config: DistillConfig, task: Task = CLASSIFICATION
) -> dict[str, Tensor]:
    """Return the weighted terms that ``config`` names, by name; several teachers count alike.

    Shape:
        step_logits: (T, B, K) or (T, B, \\*); targets, the logits of each teacher: (B, K) or (B, \\*); labels: (B,) or
        (B, \\*), as the task says.
    Raises:
        ValueError: a term that is for classes alone, with another task.
    """

    def taught(term: Callable[..., Tensor], z: Tensor, *options: Any) -> Tensor:
        return torch.stack([term(z, target, config.kd_temperature, *options) for target in targets]).mean()

    z, smoothing, temperature = step_logits, config.label_smoothing, config.kd_temperature
    terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "ce": (config.ce_weight, lambda: smoothed_cross_entropy(z, labels, smoothing, task)),
        "kd": (config.kd_weight, lambda: taught(task.taught, z.mean(0))),
        "answer": (config.answer_weight, lambda: taught(answer_divergence, z, task)),
        "step_ce": (config.step_ce_weight, lambda: step_cross_entropy(z, labels, smoothing, task)),
        "step": (config.step_weight, lambda: taught(step_divergence, z, task)),
        "ensemble": (config.ensemble_weight, lambda: ensemble_divergence(z, temperature, task)),
        "correct": (config.correct_weight, lambda: correct_divergence(z, labels, temperature)),
        "strong": (config.strong_weight, lambda: strong_divergence(z, labels, temperature)),
        "entropy": (config.entropy_weight, lambda: negative_entropy(z)),
        "regulariser": (config.regulariser_weight, lambda: step_regulariser(z)),
    }
    alone = [name for name in ("correct", "strong", "entropy") if terms[name][0]]
    if alone and task is not CLASSIFICATION:
        names = ", ".join(f"{name}_weight" for name in alone)
        raise ValueError(f"{names} are for classes, got labels of {task.name}; leave them 0")
    return {name: weight * term() for name, (weight, term) in terms.items() if weight}
