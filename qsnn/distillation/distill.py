"""distill(): a spiking student of few time steps learns from the quantized teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from qsnn.data.images import Data, summed
from qsnn.data.mixing import Mixed, over_both
from qsnn.distillation.losses import (
    answer_divergence,
    correct_divergence,
    ensemble_divergence,
    negative_entropy,
    smoothed_cross_entropy,
    step_cross_entropy,
    step_divergence,
    step_regulariser,
    strong_divergence,
)
from qsnn.distillation.prune import finish_pruning_, prunable, start_pruning_
from qsnn.distillation.rates import current_distance, matches, rate_distance, teacher_layers
from qsnn.graph.arrived import arrived, evaluating
from qsnn.graph.hooks import recorded, recorded_inputs
from qsnn.graph.recipe import child_recipe, recipe_of, set_recipe
from qsnn.measure.accuracy import find_task
from qsnn.measure.heads import Asked, Tasks, heads, taught_by
from qsnn.measure.task import CLASSIFICATION, Task
from qsnn.options import (
    BatchSize,
    Epochs,
    Factor,
    Images,
    LearningRate,
    Part,
    Seed,
    Timesteps,
    Weight,
    check_options,
    expect,
)
from qsnn.snn.counts import refuse_online
from qsnn.snn.equations import firing_function
from qsnn.snn.network import SNN, TRAINED, TimeLoop, train_neurons_
from qsnn.snn.neurons import IFNode
from qsnn.training.fit import TrainConfig, fit


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student learns. The weights of the loss terms have no unit; 0 leaves a term out.

    The defaults are the recipe that was best on held-out images: the label teaches the answer after T steps and every
    single step, a threshold a layer and an initial potential a channel learn too, AdamW.
    """

    timesteps: Timesteps = 2
    """Simulation steps T of the student."""
    epochs: Epochs = 10
    """Passes over the training images."""
    lr: LearningRate = 0.01
    """Peak learning rate [1] (AdamW; of a deep network rather 0.001; about 0.02 for SGD)."""
    optimizer: str = "adamw"
    """"sgd" (Nesterov, momentum 0.9) or "adamw"."""
    batch_size: BatchSize = 64
    """Images a step."""
    weight_decay: Weight = 0.0
    """L2 penalty [1]; never on biases, batch norm and thresholds."""
    label_smoothing: Part = 0.0
    """Mass moved from the label to the other classes in the student's cross entropy [1], in [0, 1)."""
    ce_weight: Weight = 0.5
    """Weight of the cross entropy of the answer after T steps."""
    kd_weight: Weight = 0.0
    """Weight of the KL divergence from the teacher to the answer after T steps. The student starts as the teacher; on
    all data that were measured its labels then teach it more. Without labels: 1, and the terms of cross entropy 0."""
    answer_weight: Weight = 0.0
    """Weight of the KL divergence from the teacher to the answers after 1 to T steps: one student for every T."""
    step_ce_weight: Weight = 0.5
    """Weight of the cross entropy of every single step (TET)."""
    step_weight: Weight = 0.0
    """Weight of the KL divergence from the teacher to the logits of every single step."""
    ensemble_weight: Weight = 0.0
    """Weight of the KL divergence from the student's mean over time to its single steps."""
    correct_weight: Weight = 0.0
    """Weight of the KL divergence from the mean of the steps that answer rightly to every single step."""
    strong_weight: Weight = 0.0
    """Weight of the KL divergence from an image's strongest step to its weakest (Strong2Weak)."""
    entropy_weight: Weight = 0.0
    """Reward [1] of the entropy of every step's answer; beside a KL term of the teacher."""
    regulariser_weight: Weight = 0.0
    """Weight of the squared distance of every step's logits from 1 (TET)."""
    rate_weight: Weight = 0.0
    """Weight of the distance of the student's firing rates from the teacher's activations [1]."""
    current_weight: Weight = 0.0
    """Weight of the distance of the mean currents of the student's neurons from the teacher's pre-activations [1]."""
    rate_layers: tuple[str, ...] = ()
    """Layers whose rates or currents are matched, "name" or "student name:teacher name"; by default all neurons."""
    kd_temperature: Factor = 1.0
    """Temperature τ of the KL terms [1]."""
    train_threshold: str = "auto"
    """Train the thresholds: one a "layer", which is what "auto" means, or one a "channel": spikes of several sizes, so
    that the folded layers behind compute in floats; "" leaves them as they are."""
    train_initial: str = "auto"
    """Train the initial potentials, likewise; "auto": one a channel, of an SNN that knows the shape of its images;
    "step": one a channel and time step, so that each step has a threshold of its own."""
    train_tau: str = ""
    """Train the time constants of the leak, likewise; "auto" where there is a leak."""
    surrogate: str = "box"
    """Derivative of a spike: "box", "rate" (see :class:`qsnn.IFNode`), or one of SpikingJelly by name ("ATan")."""
    mutual: bool = False
    """Train the teacher too, which learns from the student; see :func:`distill_together`."""
    sparsity: Part = 0.0
    """Part of the weights that is pruned, by magnitude in every layer, growing during the training [1], in [0, 1)."""
    ema: Part = 0.0
    """Decay of the running mean of the weights that the student ends with [1]; see :class:`qsnn.TrainConfig`."""
    augment: str | None = None
    """"none", or of "flip", "shift" and "cutout" some, like "flip+shift"; None takes the data set's default."""
    mixup: Weight = 0.0
    """α with which images are mixed in pairs, for student and teacher alike [1]; see :class:`qsnn.TrainConfig`."""
    train_images: Images | None = None
    """Use only the first so many training images."""
    precision: str = "fp32"
    """"fp32", or "bf16" (autocast; see :class:`qsnn.TrainConfig`)."""
    compile: bool = False
    """Compile the step with torch.compile."""
    seed: Seed = 0
    """Of the order of the images, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            ValueError: which option, and what it may be.
        """
        check_options(self)
        weights = {name: value for name, value in asdict(self).items() if name.endswith("_weight")}
        if not any(weights.values()):
            raise ValueError(f"every loss term has weight 0; give at least one of {', '.join(weights)}")
        for name in ("train_threshold", "train_initial", "train_tau"):
            known = (*TRAINED, "step") if name == "train_initial" else TRAINED
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if self.mutual and not self.kd_weight:
            raise ValueError("mutual=True lets the teacher learn from the student by kd_weight, which is 0; give one")
        if self.rate_layers and not self._matches:
            raise ValueError(
                f"rate_layers={self.rate_layers} names layers to match, with rate_weight={self.rate_weight}; give a "
                f"rate_weight or current_weight above 0, or leave rate_layers away"
            )
        firing_function(self.surrogate)
        self.training()

    @property
    def _matches(self) -> bool:
        """Whether layers of student and teacher are compared."""
        return bool(self.rate_weight or self.current_weight)

    def training(self) -> TrainConfig:
        """Return the options of :func:`qsnn.fit` that are the same."""
        return TrainConfig(
            epochs=self.epochs, lr=self.lr, optimizer=self.optimizer, batch_size=self.batch_size,
            weight_decay=self.weight_decay, label_smoothing=self.label_smoothing, augment=self.augment,
            mixup=self.mixup, kd_temperature=self.kd_temperature, ema=self.ema, train_images=self.train_images,
            precision=self.precision, compile=self.compile, seed=self.seed,
        )  # fmt: skip


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


class FitOptions(TypedDict, total=False):
    """Keywords that :func:`distill` hands on to :func:`qsnn.fit` as they are."""

    resume: str | Path | None
    tensorboard: str | Path | None
    label: str
    task: Asked
    memory: int | str | None


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    data: Data,
    config: DistillConfig | None = None,
    **options: Unpack[FitOptions],
) -> Any:
    """Return a trained copy of ``student`` that answers in ``config.timesteps`` steps, online.

    Args:
        student: an SNN from :func:`qsnn.convert`, whose Brevitas weights stay in training, so that it keeps their
            precision; or any network of SpikingJelly modules (see :class:`qsnn.snn.network.TimeLoop`).
        teacher: the quantized or float network, which answers like the student; or several, e.g. both.
        data: training and validation images.
        config: loss terms and training options.
        options: ``resume``, file for the state; ``tensorboard``, folder for TensorBoard; ``label``, shown beside the
            progress bar, by default "student"; ``memory``, of a batch of the validation; ``task``, by default found
            from the labels and the shape of the answers; see :func:`qsnn.fit`. Cross entropy and KL divergence are
            those of the task.
    Raises:
        TypeError: the student is no network, or ``config`` no DistillConfig.
        ValueError: the student is folded, holds no spiking node, an option does not fit it, or labels or teacher do
            not belong to its answers.

    >>> import contextlib, io, qsnn
    >>> data = qsnn.load_data("digits")
    >>> qann = qsnn.quantize(qsnn.create_model("study", data), data)
    >>> few = qsnn.DistillConfig(timesteps=2, epochs=1, train_images=64)
    >>> with contextlib.redirect_stdout(io.StringIO()):  # the progress bar
    ...     student = qsnn.distill(qsnn.convert(qann), qann, data, few)
    >>> student.timesteps, student.firing
    (2, 'online')
    """
    return distill_together(student, teacher, data, config, **options)[0]


def distill_together(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module],
    data: Data,
    config: DistillConfig | None = None,
    **options: Unpack[FitOptions],
) -> tuple[Any, nn.Module]:
    r"""Do what :func:`distill` does, with the same arguments; return the student and the teacher.

    With ``config.mutual`` the teacher (one) is a trained copy: its loss is
    :math:`\lambda_{CE}\,CE(z^{teacher}, y) + \lambda_{KD}\,\tau^2 KL(p_\tau(\bar z) \,\|\, p^{teacher}_\tau)`, with
    the student's mean over time :math:`\bar z` a constant to its gradient, and the other way round. Without, it is
    the one that was given.

    Source:
        Zhang et al., "Deep Mutual Learning", CVPR 2018.
    """
    call = "distill(student, teacher, data)"
    expect(call, "teacher", teacher, (nn.Module, list, tuple))
    expect(call, "data", data, "train val")
    config = DistillConfig() if config is None else config
    teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
    student, *teachers = (arrived(one) if isinstance(one, nn.Module) else one for one in (student, *teachers))
    _check(student, teachers, config)
    pair = _Pair(copy.deepcopy(student), copy.deepcopy(teachers[0]) if config.mutual else None, config)
    fixed = [] if config.mutual else teachers
    limits = _prepared_neurons_(pair.student, config)
    pruned = start_pruning_(pair.student, config.sparsity) if config.sparsity else None

    def after_step(step: int, steps: int) -> None:
        for parameter, low in limits:
            parameter.data.clamp_(min=low)
        if pruned is not None:
            pruned(step, steps)

    tasks = _tasks(pair, data, config, options.get("task"))
    fit_options: FitOptions = {"label": "student", **options, "task": tasks}
    with evaluating(*fixed):
        fit(pair, data, config.training(), loss=_Loss(config, fixed, tasks), after_step=after_step, **fit_options)
    finish_pruning_(pair.student)
    for parameter, _ in limits:
        parameter.requires_grad_(False)
    _say_how_made_(pair, student, teachers[0], config)
    return pair.student, pair.teacher or teachers[0]


def _tasks(pair: _Pair, data: Data, config: DistillConfig, asked: Asked) -> Tasks:
    """The task of each head of the student."""
    tasks = find_task(pair, data.train, asked)
    if config.regulariser_weight and any(task.floats for task in tasks.by_head.values()):
        raise ValueError("regulariser_weight draws every output to 1, which is for logits, not for numbers; use 0")
    return tasks


def _say_how_made_(pair: _Pair, student: nn.Module, teacher: nn.Module, config: DistillConfig) -> None:
    """Record on the trained copies what they were made from, and how."""
    recipe = child_recipe(student, "student", distill=asdict(config))
    recipe["convert"] = {**recipe.get("convert", {}), "timesteps": config.timesteps, "firing": "online"}
    recipe["teacher"] = recipe_of(teacher).get("sha256")
    set_recipe(pair.student, recipe)
    if pair.teacher is not None:
        taught = {name: value for name, value in recipe_of(teacher).items() if name != "sha256"}
        set_recipe(pair.teacher, {**taught, "mutual": asdict(config)})


def _check(student: nn.Module, teachers: list[nn.Module], config: DistillConfig) -> None:
    if not isinstance(config, DistillConfig):
        raise TypeError(f"expected a DistillConfig, got {type(config).__name__}")
    if not isinstance(student, nn.Module) or not teachers or not all(isinstance(t, nn.Module) for t in teachers):
        raise TypeError(f"expected distill(student, teacher, data) with networks, got {type(student).__name__}")
    if getattr(student, "folded", False):
        raise ValueError("a folded network cannot be trained; distill the one it was folded from, then fold")
    if isinstance(student, SNN):
        refuse_online(student.network, "a student")
    if config.mutual and len(teachers) != 1:
        raise ValueError(f"mutual learning is between a student and one teacher, got {len(teachers)} teachers")
    asked = {config.train_threshold, config.train_initial, config.train_tau} - {"", "auto"}
    if not isinstance(student, SNN) and asked:
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
        self.__dict__["loop"] = loop  # past nn.Module: as a submodule the student would stand twice in the state

    def forward(self, images: Tensor) -> Any:
        return self.loop(images)


class _Loss:
    """(pair, images, labels) -> the weighted terms."""

    takes_mixed = True

    def __init__(self, config: DistillConfig, teachers: list[nn.Module], tasks: Tasks) -> None:
        self.config, self.teachers, self.tasks = config, teachers, tasks
        self.first = True
        """In the first batch each teacher answers, though no term may ask it: one of another shape is refused."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Any) -> dict[str, Tensor]:
        assert isinstance(model, _Pair)
        config = self.config
        if not torch.compiler.is_compiling():
            for one in (labels.one, labels.other) if isinstance(labels, Mixed) else (labels,):
                self.tasks.check(heads(one))
        matched = matches(model.loop, config.rate_layers) if config._matches else {}
        layers = teacher_layers(model.teacher or self.teachers[0], matched) if matched else {}
        asked = config.kd_weight or config.answer_weight or config.step_weight or config._matches
        asked, self.first = asked or self.first, False
        seen, targets, taught = summed(images, self.teachers[0] if self.teachers else model.teacher), [], None
        with recorded(layers) as activations, recorded_inputs(layers) as inputs:
            if model.teacher is not None:
                taught = heads(model.teacher(seen))
                targets = [{name: each.detach() for name, each in taught.items()}]
            elif asked:
                with torch.no_grad():
                    targets = [heads(teacher(seen)) for teacher in self.teachers]
        seen_of = {name: match.seen for name, match in matched.items()}
        neurons = {name: match.neuron for name, match in matched.items()}
        with recorded(seen_of) as outputs, recorded_inputs(neurons) as currents:
            z = heads(model.loop.step_logits(images, timesteps=config.timesteps))
        terms: dict[str, Tensor] = over_both(lambda one: self._of_labels(z, targets, taught, heads(one)), labels)
        if config.rate_weight:
            terms["rate"] = config.rate_weight * rate_distance(matched, outputs, activations, config.timesteps)
        if config.current_weight:
            terms["current"] = config.current_weight * current_distance(matched, currents, inputs, config.timesteps)
        return terms

    def _of_labels(
        self, z: dict[str, Tensor], targets: list[dict[str, Tensor]], taught: dict[str, Tensor] | None, labels: Any
    ) -> dict[str, Tensor]:
        """The terms that ask for labels, or for answers of a teacher, by name."""
        config, labels, terms = self.config, self.tasks.own(labels), dict[str, Tensor]()
        for head, task in self.tasks.by_head.items():
            expected = [taught_by(target, head, z[head].shape[1:]) for target in targets]
            for name, term in distillation_loss(z[head], expected, labels[head], config, task).items():
                terms[name] = terms[name] + term if name in terms else term
        if taught is not None:
            means = {head: each.mean(0).detach() for head, each in z.items()}
            terms["teacher_ce"] = config.ce_weight * self.tasks.loss(taught, labels)
            terms["teacher_kd"] = config.kd_weight * self.tasks.taught(taught, means, config.kd_temperature)
        return terms


def _prepared_neurons_(student: nn.Module, config: DistillConfig) -> list[tuple[nn.Parameter, Tensor | float]]:
    """Set the surrogate, and put into training what ``config`` names; return that with its least values."""
    if not isinstance(student, SNN):
        return []
    for _, neuron in student.neurons():
        if isinstance(neuron, IFNode):
            neuron.surrogate = config.surrogate
    return train_neurons_(
        student, config.train_threshold, config.train_initial, config.train_tau, config.timesteps
    )  # fmt: skip
