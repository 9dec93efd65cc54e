"""distill(): a spiking student of few time steps learns from the quantized teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsnn.data import Data
from qsnn.dynamics import firing_function, per_channel
from qsnn.graph import child_recipe, recipe_of, recorded, set_recipe
from qsnn.loop import TimeLoop
from qsnn.losses import (
    answer_divergence,
    correct_divergence,
    ensemble_divergence,
    kl_divergence,
    negative_entropy,
    rate_matching,
    smoothed_cross_entropy,
    step_cross_entropy,
    step_divergence,
    step_regulariser,
    strong_divergence,
)
from qsnn.neurons import SNN, IFNode, summed
from qsnn.prune import finish_pruning_, prunable, start_pruning_
from qsnn.train import TrainConfig, fit
from qsnn.tune import train_neurons_

_TRAINED = ("", "layer", "channel")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student learns from its teacher. The weights of the loss terms have no unit; 0 leaves a term out."""

    timesteps: int = 2
    """Simulation steps T of the student."""
    epochs: int = 10
    """Passes over the training images."""
    lr: float = 0.02
    """Peak learning rate (SGD; about 0.002 for AdamW)."""
    optimizer: str = "sgd"
    """"sgd" (Nesterov, momentum 0.9) or "adamw"."""
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
    answer_weight: float = 0.0
    """Weight of the KL divergence from the teacher to the answers after 1 to T steps: one student for every T."""
    step_ce_weight: float = 0.0
    """Weight of the cross entropy of every single step (TET)."""
    step_weight: float = 0.0
    """Weight of the KL divergence from the teacher to the logits of every single step."""
    ensemble_weight: float = 0.0
    """Weight of the KL divergence from the student's mean over time to its single steps."""
    correct_weight: float = 0.0
    """Weight of the KL divergence from the mean of the steps that answer rightly to every single step."""
    strong_weight: float = 0.0
    """Weight of the KL divergence from an image's strongest step to its weakest (Strong2Weak)."""
    entropy_weight: float = 0.0
    """Reward of the entropy of every step's answer; beside a KL term of the teacher."""
    regulariser_weight: float = 0.0
    """Weight of the squared distance of every step's logits from 1 (TET)."""
    rate_weight: float = 0.0
    """Weight of the distance of the student's firing rates from the teacher's activations."""
    rate_layers: tuple[str, ...] = ()
    """Layers whose rates are matched, "name" or "student name:teacher name"; by default all neurons."""
    kd_temperature: float = 1.0
    """Temperature τ of the KL terms [1]."""
    train_threshold: str = ""
    """Train the thresholds: one a "layer" or one a "channel"; "" leaves them as they are."""
    train_initial: str = ""
    """Train the initial potentials, likewise."""
    train_tau: str = ""
    """Train the time constants of the leak, likewise."""
    surrogate: str = "box"
    """Derivative of a spike: "box", "rate" (see :class:`qsnn.IFNode`), or one of SpikingJelly by name ("ATan")."""
    mutual: bool = False
    """Train the teacher too, which learns from the student; see :func:`distill_together`."""
    sparsity: float = 0.0
    """Part of the weights that is pruned, by magnitude in every layer, growing during the training [0, 1)."""
    ema: float = 0.0
    """Decay of the running mean of the weights that the student ends with, by step; see :class:`qsnn.TrainConfig`."""
    augment: str | None = None
    """"none", "flip", "shift", "flip+shift"; None takes the data set's default."""
    train_images: int | None = None
    """Use only the first so many training images."""
    precision: str = "fp32"
    """"fp32", or "bf16" (autocast; for GPUs)."""
    compile: bool = False
    """Compile the step with torch.compile."""
    seed: int = 0
    """Of the order of the images, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            ValueError: which option, and what it may be.
        """
        if not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ValueError(f"timesteps must be a whole number of at least 1, got {self.timesteps!r}")
        weights = {name: value for name, value in asdict(self).items() if name.endswith("_weight")}
        if min(weights.values()) < 0:
            raise ValueError("the weights of the loss terms must not be negative")
        if not any(weights.values()):
            raise ValueError(f"every loss term has weight 0; give at least one of {', '.join(weights)}")
        for name in ("train_threshold", "train_initial", "train_tau"):
            if getattr(self, name) not in _TRAINED:
                raise ValueError(f"{name} must be '', 'layer' or 'channel', got {getattr(self, name)!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"expected 0 <= sparsity < 1, got {self.sparsity}")
        firing_function(self.surrogate)
        self.training()

    def training(self) -> TrainConfig:
        """Return the options of :func:`qsnn.fit` that are the same."""
        return TrainConfig(
            epochs=self.epochs, lr=self.lr, optimizer=self.optimizer, batch_size=self.batch_size,
            weight_decay=self.weight_decay, label_smoothing=self.label_smoothing, augment=self.augment,
            kd_temperature=self.kd_temperature, ema=self.ema, train_images=self.train_images, precision=self.precision,
            compile=self.compile, seed=self.seed,
        )  # fmt: skip


def distillation_loss(
    step_logits: Tensor, targets: Sequence[Tensor], labels: Tensor, config: DistillConfig
) -> dict[str, Tensor]:
    """Return the weighted terms that ``config`` names, by name; several teachers count alike.

    Shape:
        step_logits: (T, B, K); targets, the logits of each teacher: (B, K); labels: (B,).
    """

    def taught(term: Callable[[Tensor, Tensor, float], Tensor], z: Tensor) -> Tensor:
        return torch.stack([term(z, target, config.kd_temperature) for target in targets]).mean()

    terms: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "ce": (config.ce_weight, lambda: smoothed_cross_entropy(step_logits, labels, config.label_smoothing)),
        "kd": (config.kd_weight, lambda: taught(kl_divergence, step_logits.mean(0))),
        "answer": (config.answer_weight, lambda: taught(answer_divergence, step_logits)),
        "step_ce": (config.step_ce_weight, lambda: step_cross_entropy(step_logits, labels, config.label_smoothing)),
        "step": (config.step_weight, lambda: taught(step_divergence, step_logits)),
        "ensemble": (config.ensemble_weight, lambda: ensemble_divergence(step_logits, config.kd_temperature)),
        "correct": (config.correct_weight, lambda: correct_divergence(step_logits, labels, config.kd_temperature)),
        "strong": (config.strong_weight, lambda: strong_divergence(step_logits, labels, config.kd_temperature)),
        "entropy": (config.entropy_weight, lambda: negative_entropy(step_logits)),
        "regulariser": (config.regulariser_weight, lambda: step_regulariser(step_logits)),
    }
    return {name: weight * term() for name, (weight, term) in terms.items() if weight}


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    data: Data,
    config: DistillConfig | None = None,
    *,
    resume: str | Path | None = None,
    tensorboard: str | Path | None = None,
    label: str = "student",
) -> Any:
    """Return a trained copy of ``student`` that answers in ``config.timesteps`` steps, online.

    Args:
        student: an SNN from :func:`qsnn.convert`, whose Brevitas weights stay in training, so that it keeps their
            precision; or any network of SpikingJelly modules (see :class:`qsnn.neurons.TimeLoop`).
        teacher: the quantized or float network, logits (B, K); or several, e.g. both.
        data: training and validation images.
        config: loss terms and training options.
        resume: file for the state (see :func:`qsnn.fit`).
        tensorboard: folder for TensorBoard (see :func:`qsnn.fit`).
        label: shown beside the progress bar.
    Raises:
        TypeError: the student is no network, or ``config`` no DistillConfig.
        ValueError: the student is folded, holds no spiking node, or an option does not fit it.
    """
    return distill_together(
        student, teacher, data, config, resume=resume, tensorboard=tensorboard, label=label
    )[0]  # fmt: skip


def distill_together(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    data: Data,
    config: DistillConfig | None = None,
    *,
    resume: str | Path | None = None,
    tensorboard: str | Path | None = None,
    label: str = "student",
) -> tuple[Any, nn.Module]:
    r"""Like :func:`distill`; return the student and the teacher.

    With ``config.mutual`` the teacher (one) is a trained copy: its loss is
    :math:`\lambda_{CE}\,CE(z^{teacher}, y) + \lambda_{KD}\,\tau^2 KL(p_\tau(\bar z) \,\|\, p^{teacher}_\tau)`, with
    the student's mean over time :math:`\bar z` a constant to its gradient, and the other way round. Without, it is
    the one that was given.

    Source:
        Zhang et al., "Deep Mutual Learning", CVPR 2018.
    """
    config = config or DistillConfig()
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    _check(student, teachers, config)
    recipe = child_recipe(student, "student", distill=asdict(config))
    pair = _Pair(copy.deepcopy(student), copy.deepcopy(teachers[0]) if config.mutual else None, config)
    others = [expert.eval() for expert in teachers] if not config.mutual else []
    loss, limits = _Loss(config, others), _prepared_neurons_(pair.student, config)
    pruned = start_pruning_(pair.student, config.sparsity) if config.sparsity else None

    def after_step(step: int, steps: int) -> None:
        for parameter, low in limits:
            parameter.data.clamp_(min=low)
        if pruned is not None:
            pruned(step, steps)

    fit(
        pair, data, config.training(), loss=loss, after_step=after_step, resume=resume, tensorboard=tensorboard,
        label=label,
    )  # fmt: skip
    finish_pruning_(pair.student)
    trained = pair.student
    for parameter, _ in limits:
        parameter.requires_grad_(False)
    recipe["convert"] = {**recipe.get("convert", {}), "timesteps": config.timesteps, "firing": "online"}
    recipe["teacher"] = recipe_of(teachers[0]).get("sha256")
    set_recipe(trained, recipe)
    if pair.teacher is not None:
        taught = {name: value for name, value in recipe_of(teachers[0]).items() if name != "sha256"}
        set_recipe(pair.teacher, {**taught, "mutual": asdict(config)})
    return trained, pair.teacher or teachers[0]


def _check(student: nn.Module, teachers: list[nn.Module], config: DistillConfig) -> None:
    if not isinstance(config, DistillConfig):
        raise TypeError(f"expected a DistillConfig, got {type(config).__name__}")
    if not isinstance(student, nn.Module) or not teachers or not all(isinstance(t, nn.Module) for t in teachers):
        raise TypeError(f"expected distill(student, teacher, data) with networks, got {type(student).__name__}")
    if getattr(student, "folded", False):
        raise ValueError("a folded network cannot be trained; distill the one it was folded from, then fold")
    if config.mutual and len(teachers) != 1:
        raise ValueError(f"mutual learning is between a student and one teacher, got {len(teachers)} teachers")
    if not isinstance(student, SNN) and (config.train_threshold or config.train_initial or config.train_tau):
        raise ValueError("train_threshold, train_initial and train_tau are for an SNN from convert")
    if config.sparsity:
        prunable(student)


class _Pair(nn.Module):
    """The student, and the teacher where it learns too; called, it answers as the student."""

    loop: Any

    def __init__(self, student: nn.Module, teacher: nn.Module | None, config: DistillConfig) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        loop: Any = student if isinstance(student, SNN | TimeLoop) else TimeLoop(student, config.timesteps)
        loop.timesteps, loop.firing = config.timesteps, "online"
        self.__dict__["loop"] = loop  # not a second name for the student in the state

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.loop(images)
        return answers


class _Loss:
    """(pair, images, labels) -> the weighted terms."""

    def __init__(self, config: DistillConfig, teachers: list[nn.Module]) -> None:
        self.config, self.teachers = config, teachers

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        assert isinstance(model, _Pair)
        config = self.config
        matched = self._matched(model) if config.rate_weight else {}
        taps = {name: _found(model.teacher or self.teachers[0], name) for name in matched}
        asked = config.kd_weight or config.answer_weight or config.step_weight or config.rate_weight
        seen, targets, taught = summed(images), [], None
        with recorded(taps) as activations:
            if model.teacher is not None:
                taught = model.teacher(seen)
                targets = [taught.detach()]
            elif asked:
                with torch.no_grad():
                    targets = [teacher(seen) for teacher in self.teachers]
        with recorded({name: probe for name, (probe, _) in matched.items()}) as outputs:
            z = model.loop.step_logits(images, timesteps=config.timesteps)
        terms = distillation_loss(z, targets, labels, config)
        if matched:
            terms["rate"] = config.rate_weight * _rate_term(matched, outputs, activations, len(z))
        if taught is not None:
            terms["teacher_ce"] = config.ce_weight * F.cross_entropy(taught, labels)
            terms["teacher_kd"] = config.kd_weight * kl_divergence(taught, z.mean(0).detach(), config.kd_temperature)
        return terms

    def _matched(self, pair: _Pair) -> dict[str, tuple[nn.Module, nn.Module]]:
        """By the teacher's layer: the student's module whose output is compared, and its neuron."""
        if not getattr(pair.loop, "multi_step", True):
            raise ValueError("rate matching of a SpikingJelly network needs step_mode 'm'")
        neurons = dict(pair.loop.neurons())
        probes = getattr(pair.loop, "probes", {})
        found = {}
        for spec in self.config.rate_layers or tuple(neurons):
            name, _, other = spec.partition(":")
            if name not in neurons:
                raise ValueError(f"rate_layers names {name!r}; the student's neurons are {', '.join(neurons)}")
            probe = pair.loop.network.get_submodule(probes[name]) if name in probes else neurons[name]
            found[other or name] = (probe, neurons[name])
        return found


def _rate_term(
    matched: dict[str, tuple[nn.Module, nn.Module]],
    outputs: dict[str, Tensor],
    activations: dict[str, Tensor],
    timesteps: int,
) -> Tensor:
    rates, thetas = {}, {}
    for name, (probe, neuron) in matched.items():
        output, y = outputs[name], activations[name]
        steps = output if output.dim() == y.dim() + 1 else output.unflatten(0, (timesteps, -1))
        level: Any = neuron.threshold if isinstance(neuron, IFNode) else neuron.v_threshold
        theta = per_channel(torch.as_tensor(level).to(steps[0]), y.dim())
        # a max pool behind the neuron already sees θ·spikes
        rates[name] = steps.mean(0) * (theta if probe is neuron else 1.0)
        thetas[name] = theta.detach()
    return rate_matching(rates, {name: y.detach() for name, y in activations.items()}, thetas)


def _found(teacher: nn.Module, name: str) -> nn.Module:
    try:
        return teacher.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the teacher has no layer {name!r} to match firing rates with; name pairs: "
            f"rate_layers=('student name:teacher name', ...)"
        ) from None


def _prepared_neurons_(student: nn.Module, config: DistillConfig) -> list[tuple[nn.Parameter, Tensor | float]]:
    """Set the surrogate, and put into training what ``config`` names; return that with its least values."""
    if not isinstance(student, SNN):
        return []
    for _, neuron in student.neurons():
        if isinstance(neuron, IFNode):
            neuron.surrogate = config.surrogate
    return train_neurons_(student, config.train_threshold, config.train_initial, config.train_tau)
