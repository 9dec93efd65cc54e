"""distill(): a spiking student of few time steps learns from the quantized teacher."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsnn.data import Data
from qsnn.graph import child_recipe, recipe_of, set_recipe
from qsnn.neurons import SNN
from qsnn.train import TrainConfig, fit, kl_divergence


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student learns from its teacher. The weights of the loss terms have no unit; 0 leaves a term out."""

    timesteps: int = 2
    """Simulation steps T of the student."""
    epochs: int = 10
    """Passes over the training images."""
    lr: float = 0.02
    """Peak learning rate (SGD with Nesterov momentum)."""
    batch_size: int = 128
    """Images a step."""
    weight_decay: float = 5e-4
    """L2 penalty; never on biases, batch norm and thresholds."""
    label_smoothing: float = 0.1
    """Mass moved from the label to the other classes in the student's cross entropy [0, 1)."""
    ce_weight: float = 0.5
    """Weight of the cross entropy of the answer after T steps."""
    kd_weight: float = 0.5
    """Weight of the KL divergence from the teacher to the answer after T steps."""
    step_weight: float = 0.0
    """Weight of the KL divergence from the teacher to the logits of every single step."""
    kd_temperature: float = 1.0
    """Temperature τ of the KL terms [1]."""
    augment: str | None = None
    """"none", "flip", "shift", "flip+shift"; None takes the data set's default."""
    train_images: int | None = None
    """Use only the first so many training images."""
    seed: int = 0
    """Of the order of the images, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            ValueError: which option, and what it may be.
        """
        if not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ValueError(f"timesteps must be a whole number of at least 1, got {self.timesteps!r}")
        if min(self.ce_weight, self.kd_weight, self.step_weight) < 0:
            raise ValueError("the weights of the loss terms must not be negative")
        if not self.ce_weight + self.kd_weight + self.step_weight > 0:
            raise ValueError("every loss term has weight 0; give at least one of ce_weight, kd_weight, step_weight")
        self.training()

    def training(self) -> TrainConfig:
        """Return the options of :func:`qsnn.fit` that are the same."""
        return TrainConfig(
            epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing, kd_weight=min(self.kd_weight, 1.0), augment=self.augment,
            kd_temperature=self.kd_temperature, train_images=self.train_images, seed=self.seed,
        )  # fmt: skip


def smoothed_cross_entropy(step_logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    r""":math:`CE_\epsilon(\bar z, y)`, with the mean over time :math:`\bar z = \tfrac1T \sum_t z_t`.

    Shape:
        step_logits z: (T, B, K); labels: (B,).
    Source:
        Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016 (label smoothing).
    """
    return F.cross_entropy(step_logits.mean(0), labels, label_smoothing=smoothing)


def step_divergence(step_logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    r""":math:`\tfrac1T \sum_t \tau^2 KL(p^{teacher}_\tau \,\|\, p_\tau(z_t))`: every step is taught on its own.

    Shape:
        step_logits z: (T, B, K); target: (B, K).
    Source:
        Yu et al., "Efficient Logit-based Knowledge Distillation of Deep Spiking Neural Networks ...", CVPR 2025.
    """
    flat = step_logits.flatten(0, 1)
    return kl_divergence(flat, target.repeat(len(step_logits), 1), temperature)


def distillation_loss(step_logits: Tensor, target: Tensor, labels: Tensor, config: DistillConfig) -> Tensor:
    """Return the weighted sum of the terms that ``config`` names.

    Shape:
        step_logits: (T, B, K); target, the teacher's logits: (B, K); labels: (B,).
    """
    loss = step_logits.new_zeros(())
    if config.ce_weight:
        loss = loss + config.ce_weight * smoothed_cross_entropy(step_logits, labels, config.label_smoothing)
    if config.kd_weight:
        loss = loss + config.kd_weight * kl_divergence(step_logits.mean(0), target, config.kd_temperature)
    if config.step_weight:
        loss = loss + config.step_weight * step_divergence(step_logits, target, config.kd_temperature)
    return loss


def distill(
    student: SNN,
    teacher: nn.Module,
    data: Data,
    config: DistillConfig | None = None,
    *,
    resume: str | Path | None = None,
    label: str = "student",
) -> SNN:
    """Return a trained copy of ``student`` that answers in ``config.timesteps`` steps, online.

    Args:
        student: from :func:`qsnn.convert`; its Brevitas weights stay in training, so it keeps their precision.
        teacher: the quantized or float network, logits (B, K).
        data: training and validation images.
        config: loss terms and training options.
        resume: file for the state after each epoch (see :func:`qsnn.fit`).
        label: shown beside the progress bar.
    Raises:
        TypeError: the student is not an SNN.
        ValueError: the student is folded.
    """
    config = config or DistillConfig()
    if not isinstance(config, DistillConfig):
        raise TypeError(f"expected a DistillConfig, got {type(config).__name__}")
    if not isinstance(student, SNN):
        raise TypeError(f"the student must be an SNN, got {type(student).__name__}; call convert(qann) first")
    if student.folded:
        raise ValueError("a folded network cannot be trained; distill the one it was folded from, then fold")
    recipe = child_recipe(student, "student", distill=asdict(config))
    student = copy.deepcopy(student)
    student.timesteps, student.firing = config.timesteps, "online"
    teacher = teacher.eval()

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(images)
        assert isinstance(model, SNN)
        return distillation_loss(model.step_logits(images), target, labels, config)

    fit(student, data, config.training(), loss=loss, resume=resume, label=label)
    recipe["convert"] = {**recipe.get("convert", {}), "timesteps": config.timesteps, "firing": "online"}
    recipe["teacher"] = recipe_of(teacher).get("sha256")
    set_recipe(student, recipe)
    return student
