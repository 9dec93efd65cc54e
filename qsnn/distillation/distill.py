"""distill(): a spiking student of few time steps learns from the quantized teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from qsnn.data.batches import summed
from qsnn.data.images import Data
from qsnn.data.mixing import Mixed, over_both
from qsnn.distillation.config import DistillConfig
from qsnn.distillation.losses import distillation_loss
from qsnn.distillation.prune import finish_pruning_, prunable, start_pruning_
from qsnn.distillation.rates import current_distance, matches, rate_distance, teacher_layers
from qsnn.graph.arrived import arrived, evaluating
from qsnn.graph.hooks import recorded, recorded_inputs
from qsnn.graph.recipe import child_recipe, recipe_of, set_recipe
from qsnn.measure.accuracy import find_task
from qsnn.measure.heads import Asked, Tasks, heads, taught_by
from qsnn.options import expect
from qsnn.snn.counts import refuse_online
from qsnn.snn.network import SNN, TimeLoop, train_neurons_
from qsnn.snn.neurons import IFNode
from qsnn.training.fit import fit


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
        matched = matches(model.loop, config.rate_layers) if config.compares_layers else {}
        layers = teacher_layers(model.teacher or self.teachers[0], matched) if matched else {}
        asked = config.kd_weight or config.answer_weight or config.step_weight or config.compares_layers
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
