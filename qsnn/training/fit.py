"""fit(): the only training loop. Teachers, quantization-aware training and spiking students all go through it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsnn.data.batches import batch_sizes, batches
from qsnn.data.images import Data, first_of
from qsnn.data.memory import batch_within, keep_freed_memory, laid_out, lay_out_, within
from qsnn.data.mixing import mixed, over_both
from qsnn.graph.arrived import QsnnWarning, arrived, evaluating, mark_frozen_norms_, to_float32_
from qsnn.graph.recipe import recipe_of, set_recipe
from qsnn.graph.trace import device_of
from qsnn.measure.accuracy import added_up, answer, find_task
from qsnn.measure.heads import Asked, Tasks, heads
from qsnn.options import expect
from qsnn.training.averaging import NORM_IMAGES, WeightAverage, estimate_norms_
from qsnn.training.config import TrainConfig
from qsnn.training.processes import average_buffers_, is_main, rank_and_world, shared, total_of, wait
from qsnn.training.progress import Bar, StateFile
from qsnn.training.resume import Epoch, Progress, read_state, refuse_not_finite, save_state
from qsnn.training.tensorboard import Board

CHECKPOINT_SECONDS = 300.0
"""A run with a ``resume`` file writes its state after each epoch, and within a long one every so many seconds [s]."""
DIVERGED = 100.0
"""A run stops where its loss is so many times the mean loss of its first epoch [1]."""

Loss = Callable[[nn.Module, Tensor, Any], "Tensor | dict[str, Tensor]"]
"""(model, images, labels) -> the loss, or its weighted terms by name."""


def fit(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    task: Asked = None,
    after_step: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
    tensorboard: str | Path | None = None,
    label: str = "train",
    memory: int | str | None = None,
) -> list[Epoch]:
    r"""Train ``model`` in place on ``data.train``; it ends in eval mode. Return one :class:`Epoch` for each.

    Parameters that are frozen (``requires_grad=False``) stay as they are, and so do batch norms in eval mode whose
    holder is in training mode, also in what is made from the model and trained again.

    The loss is the cross entropy, or with a teacher
    :math:`(1-\lambda)\,CE + \lambda\,\tau^2\,KL(p_\tau^{teacher}\,\|\,p_\tau)`, or ``loss(model, images, labels)``.
    Of one logit CE and KL are those of a Bernoulli variable, of maps the mean over the pixels, of numbers mean squared
    errors; over several heads they are added. Validation shows accuracy, mean IoU or mean squared error.
    The order of the images, augmentation and dropout follow from the seed and the step alone, so that a run that was
    killed and continued from ``resume`` ends with the same weights as one that was not.

    Started by torchrun, each process takes its share of every batch (DDP), so that ``batch_size`` stays the number of
    images a step; all end with the same weights, and the first writes.

    Args:
        model: any torch module that maps images to (B, K), (B,), maps (B, K, H, W) or several of these; or an SNN.
        data: where training and validation images come from; labels in the structure of the answers.
        config: epochs, learning rate and the like.
        teacher: a model that answers like this one.
        loss: takes the place of the loss above.
        task: "classification", "binary" (one logit, decided by its sign), "segmentation" or "regression", or one for
            each head; by default found from the labels and the shape of the answers.
        after_step: called after each update, with the number of updates so far and that of the whole run.
        resume: file for the state; where it exists and belongs to the same config, training goes on from it. It is
            left for the caller to delete.
        tensorboard: folder for TensorBoard: loss terms, accuracy, of an SNN also by T, and firing rates by layer.
        label: shown beside the progress bar.
        memory: what a batch of the validation may take, bytes or "512M"; default 1 GiB.
    Raises:
        FloatingPointError: the loss is NaN, infinite or far above where it began; says in which step, which state was
            the last good one, and what to try.
        ValueError: ``resume`` belongs to another run, labels that do not belong to the answers, or nothing to train.
    Source:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (the KL term).

    >>> import contextlib, io, qsnn
    >>> data = qsnn.load_data("digits")
    >>> teacher = qsnn.create_model("study", data)
    >>> with contextlib.redirect_stdout(io.StringIO()):  # the progress bar
    ...     (epoch,) = qsnn.fit(teacher, data, qsnn.TrainConfig(epochs=1, train_images=128))
    >>> epoch.loss > 0, 0 <= epoch.val_accuracy <= 100
    (True, True)
    """
    expect("fit(model, data)", "model", model, nn.Module)
    expect("fit(model, data)", "data", data, "train val")
    if torch.is_inference_mode_enabled():
        raise ValueError("nothing is trained in torch.inference_mode(); call fit outside")
    expect("fit(model, data, teacher=model)", "teacher", teacher, (nn.Module, type(None)))
    for name, value in (("loss", loss), ("after_step", after_step)):
        if value is not None and not callable(value):
            raise TypeError(f"expected {name} as a function, got {type(value).__name__}; leave it out, or pass one")
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise TypeError(f"expected a TrainConfig, got {type(config).__name__}; call fit(model, data, TrainConfig(...))")
    if config.mixup and loss is not None and not hasattr(loss, "takes_mixed"):
        raise ValueError("mixup asks a loss for the labels of two images; mix in your own loss, and leave mixup 0")
    to_float32_(model)
    if config.precision == "bf16" and not _computes_bf16(device_of(model)):
        warnings.warn(
            "this CPU has no arithmetic for bfloat16 and emulates it: precision='bf16' takes many times as long as "
            "'fp32' here", QsnnWarning, stacklevel=2,
        )  # fmt: skip
    teacher = None if teacher is None else arrived(teacher)
    frozen = mark_frozen_norms_(model)
    loader = _Loader(data, config, model)
    state = read_state(resume, asdict(config))
    if state is not None:
        state.load_(model)  # before the optimizer: Brevitas makes new parameters when it loads
    optimizer, scheduler = _optimizer(model, config, len(loader))
    done = Progress() if state is None else state.restore_(optimizer, scheduler)
    average = WeightAverage(model, config.ema) if config.ema else None
    if average is not None and state is not None:
        average.restore_(state.average)
    if len(done.history) == config.epochs:
        model.eval()
        return done.history
    _leave_file(model)
    keep_freed_memory()
    tasks = _tasks(model, data, task, loss)
    step = _Step(model, loss or _default_loss(config, teacher, tasks), config.precision)
    total, begun = config.epochs * len(loader), len(done.history) * len(loader) + done.batch
    bar = Bar(label, config.epochs, total, begun)
    board = Board(tensorboard if is_main() else None)
    kept = StateFile(
        resume, CHECKPOINT_SECONDS,
        lambda path: save_state(
            path, model, optimizer, scheduler, asdict(config), done, {} if average is None else average.weights
        ),
    )  # fmt: skip
    with bar, torch.random.fork_rng(), board, torch.enable_grad(), evaluating(*[] if teacher is None else [teacher]):
        for epoch in range(len(done.history), config.epochs):
            # convolutions and batch norm run faster in channels-last on a CPU
            lay_out_(_awake_(model, frozen), torch.channels_last)
            with shared(step) as shared_step:
                run = torch.compile(shared_step) if config.compile else shared_step
                for images, labels, weight in loader.epoch(epoch, done.batch):
                    optimizer.zero_grad(set_to_none=True)
                    value, terms = run(images, labels)
                    number = float(value.detach())
                    _refuse_divergence(number, done, config, label, resume)
                    (value * weight).backward()
                    optimizer.step()
                    scheduler.step()
                    if after_step is not None:
                        after_step(scheduler.last_epoch, total)
                    if average is not None:
                        average.update_(model, scheduler.last_epoch)
                    done.batch, done.total = done.batch + 1, done.total + number
                    board.step(scheduler.last_epoch, terms, scheduler.get_last_lr()[0])
                    bar.step()
                    kept.save_if_due()
            if average is not None and epoch + 1 == config.epochs:
                average.apply_(model)
                estimate_norms_(model, loader.some(NORM_IMAGES), frozen)
            lay_out_(model.eval(), torch.contiguous_format)
            refuse_not_finite(model, _last_good(resume, len(done.history)))
            average_buffers_(model)
            done.history.append(_ended(model, data, epoch + 1, done.total, len(loader), tasks, memory))
            done.batch, done.total = 0, 0.0
            kept.save()
            wait()
            board.epoch(scheduler.last_epoch, done.history[-1], model, data.val, tasks)
            bar.epoch(done.history[-1])
    model.eval()
    return done.history


def _computes_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16. Without them torch takes 10 to 30 times as long on a CPU."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not in builds without oneDNN
    return device.type != "cpu" or asked is None or bool(asked())


class _Loader:
    """The batches of each epoch. Their order, augmentation and dropout follow from the seed and the step alone."""

    def __init__(self, data: Data, config: TrainConfig, model: nn.Module) -> None:
        train: Any = data.train
        if config.train_images is not None:
            train = first_of(train, config.train_images)
        if not hasattr(train, "__len__"):
            raise ValueError("data.train must be a Dataset with a length")
        self.train, self.config, self.model = train, config, model
        self.augment = config.augment or data.augment
        self.rank, self.world = rank_and_world()
        self.sizes = batch_sizes(len(train), config.batch_size, self.world)

    def __len__(self) -> int:
        """Steps an epoch."""
        return len(self.sizes)

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Any, float]]:
        """Images, labels, and weight of their loss, of this process, from batch ``first`` on; every step is seeded."""
        seed = self.config.seed * 1_000_003 + epoch
        parts = batches(
            self.train, self.config.batch_size, generator=torch.Generator().manual_seed(seed), augment=self.augment,
            model=self.model, share=(self.rank, self.world),
        )  # fmt: skip
        for batch, (images, labels) in enumerate(parts):
            if batch < first:  # done before the run was stopped
                continue
            torch.manual_seed((seed * len(self) + batch) * self.world + self.rank)
            # DDP takes the mean over processes, whose shares of the batch may differ by one image
            weight = len(images) * self.world / self.sizes[batch]
            if self.config.mixup:
                images, labels = mixed(images, labels, self.config.mixup)
            yield laid_out(images, torch.channels_last), labels, weight

    def some(self, images: int) -> Iterator[Tensor]:
        """The first batches of an epoch's kind, about so many images, for batch norms."""
        for seen, (batch, _, _) in enumerate(self.epoch(0, 0)):
            if seen * self.config.batch_size >= images:
                return
            yield batch


def _awake_(model: nn.Module, frozen: list[str]) -> nn.Module:
    """Training mode, but for batch norms that their owner had frozen."""
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()
    return model


def _leave_file(model: nn.Module) -> None:
    """Drop the hash of the file the model was loaded from: from now on its weights are others."""
    recipe = recipe_of(model)
    recipe.pop("sha256", None)
    set_recipe(model, recipe)


def _tasks(model: nn.Module, data: Data, task: Asked, loss: Loss | None) -> Tasks | None:
    """The tasks; None where a loss of the user's own goes with labels that belong to none: then nothing is scored."""
    try:
        return find_task(model, data.train, task)
    except ValueError:
        if loss is None or task is not None:
            raise
        return None


def _ended(
    model: nn.Module, data: Data, epoch: int, losses: float, steps: int, tasks: Tasks | None, memory: int | str | None
) -> Epoch:
    """What an epoch gave, over all processes; ``losses`` is the sum over the steps of this one."""
    (rank, world), device = rank_and_world(), device_of(model)
    mean_loss = float(total_of(torch.tensor(losses, device=device))) / world / steps
    if tasks is None:
        return Epoch(epoch, mean_loss, None, "")
    with within(memory), torch.no_grad():
        size = batch_within(lambda x: answer(model, x), data.val, 500, model=model)
    _, sums = added_up(model, data.val, size, (rank, world), tasks)
    scores = tasks.read({name: total_of(part.to(device)) for name, part in sums.items()})
    return Epoch(epoch, mean_loss, next(iter(scores.values())), tasks.first.metric)


class _Step(nn.Module):
    """The loss of one batch as a module, which DDP and torch.compile can wrap: the sum, and its terms by name."""

    def __init__(self, model: nn.Module, loss: Loss, precision: str) -> None:
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision

    def forward(self, images: Tensor, labels: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.loss(self.model, images, labels)
        terms = found if isinstance(found, dict) else {"loss": found}
        total = torch.stack(list(terms.values())).sum()
        return total, {name: value.detach() for name, value in terms.items()}


def _refuse_divergence(loss: float, done: Progress, config: TrainConfig, label: str, resume: str | Path | None) -> None:
    limit = DIVERGED * max(done.history[0].loss, 0.1) if done.history else math.inf
    if math.isfinite(loss) and loss <= limit:
        return
    raise FloatingPointError(
        f"the loss is {loss:.6g} in step {done.batch + 1} of epoch {len(done.history) + 1} of {label!r}; try a lower "
        f"lr than {config.lr}, or a longer warmup than {config.warmup}{_last_good(resume, len(done.history))}"
    )


def _last_good(resume: str | Path | None, epochs: int) -> str:
    if resume is not None and Path(resume).exists():
        return f"; the last good state is {resume}, written after epoch {epochs}"
    return "; there is no state yet to go back to"


def _default_loss(config: TrainConfig, teacher: nn.Module | None, tasks: Tasks | None) -> Loss:
    assert tasks is not None

    def loss(model: nn.Module, images: Tensor, labels: Any) -> Tensor:
        answers = heads(answer(model, images))
        value: Tensor = over_both(lambda one: tasks.loss(answers, heads(one), config.label_smoothing), labels)
        if teacher is None or config.kd_weight == 0:
            return value
        with torch.no_grad():
            target = heads(answer(teacher, images))
        return (1 - config.kd_weight) * value + config.kd_weight * tasks.taught(answers, target, config.kd_temperature)

    return loss


def _optimizer(model: nn.Module, config: TrainConfig, per_epoch: int) -> tuple[Any, Any]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"every parameter of {type(model).__name__} is frozen; let one have requires_grad=True")
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr)
    steps = max(1, config.epochs * per_epoch)
    rising = max(1, round(config.warmup * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
