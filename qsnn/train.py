"""fit(): the only training loop. Teachers, quantization-aware training and spiking students all go through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Subset

from qsnn.averaging import WeightAverage, estimate_norms_
from qsnn.board import Board
from qsnn.data import Data, batch_sizes, batches
from qsnn.graph import device_of, recipe_of, set_recipe
from qsnn.layout import keep_freed_memory, laid_out, lay_out_
from qsnn.loop import time_loop
from qsnn.losses import kl_divergence
from qsnn.neurons import summed
from qsnn.parallel import average_buffers_, is_main, rank_and_world, shared, total_of, wait
from qsnn.state import Epoch, read_state, save_state
from qsnn.state import Progress as Done

CHECKPOINT_SECONDS = 300.0
"""A run with a ``resume`` file writes its state after each epoch, and within one at the latest after so long [s]."""
NORM_IMAGES = 5_000
"""Training images that batch norms are estimated on where weights were averaged."""
DIVERGED = 100.0
"""A loss so many times that of the first epoch stops a run [1]."""

Loss = Callable[[nn.Module, Tensor, Tensor], "Tensor | dict[str, Tensor]"]
"""(model, images, labels) -> the loss, or its weighted terms by name."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained: SGD with Nesterov momentum or AdamW, linear warm-up, cosine decay to zero."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 0.1
    """Peak learning rate (SGD; about 0.002 for AdamW)."""
    optimizer: str = "sgd"
    """"sgd" (Nesterov, momentum 0.9) or "adamw"."""
    weight_decay: float = 5e-4
    """L2 penalty; never on biases, batch norm, quantizer steps and thresholds."""
    warmup: float = 0.1
    """Part of all steps in which the learning rate rises [1]."""
    label_smoothing: float = 0.0
    """Mass moved from the label to the other classes in the cross entropy [0, 1)."""
    kd_weight: float = 0.5
    """Where a teacher is given: weight of the KL term; the cross entropy has 1 - kd_weight [0, 1]."""
    kd_temperature: float = 1.0
    """Temperature τ of the KL term [1]."""
    ema: float = 0.0
    """Decay of the running mean of the weights that the run ends with, by step, e.g. 0.999; 0: the last weights. Batch
    norms are then estimated anew [0, 1)."""
    augment: str | None = None
    """"none", "flip", "shift", "flip+shift"; None takes the data set's default."""
    train_images: int | None = None
    """Use only the first so many training images."""
    precision: str = "fp32"
    """"fp32", or "bf16": layers compute in bfloat16 where that is safe (autocast); for GPUs."""
    compile: bool = False
    """Compile the step with torch.compile; takes a minute first, and needs a C++ compiler."""
    seed: int = 0
    """Of the order of the images, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            ValueError: which option, and what it may be.
        """
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(f"expected epochs >= 0 and batch_size >= 1, got {self.epochs} and {self.batch_size}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"expected 0 <= ema < 1, got {self.ema}; 0.999 reaches back about 1,000 steps")
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.kd_weight <= 1 or not self.kd_temperature > 0:
            raise ValueError(
                f"expected 0 <= label_smoothing < 1, 0 <= kd_weight <= 1, kd_temperature > 0, got "
                f"{self.label_smoothing}, {self.kd_weight}, {self.kd_temperature}"
            )


def fit(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    after_step: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
    tensorboard: str | Path | None = None,
    label: str = "train",
) -> list[Epoch]:
    r"""Train ``model`` in place on ``data.train``; it ends in eval mode. Return one :class:`Epoch` an epoch.

    The loss is the cross entropy, or with a teacher
    :math:`(1-\lambda)\,CE + \lambda\,\tau^2\,KL(p_\tau^{teacher}\,\|\,p_\tau)`, or ``loss(model, images, labels)``.
    The order of the images, augmentation and dropout follow from the seed and the step alone, so that a run that was
    killed and continued from ``resume`` ends with the same weights as one that was not.

    Started by torchrun, each process takes its share of every batch (DDP), so that ``batch_size`` stays the number of
    images a step; all end with the same weights, and the first writes.

    Args:
        model: any torch module that maps (B, C, H, W) to (B, K), or an SNN.
        data: where training and validation images come from.
        config: epochs, learning rate and the like.
        teacher: a model that gives logits (B, K).
        loss: takes the place of the loss above.
        after_step: called after each update, with the number of updates so far and that of the whole run.
        resume: file for the state; where it exists and belongs to the same config, training goes on from it. It is
            left for the caller to delete.
        tensorboard: folder for TensorBoard: loss terms, accuracy, of an SNN also by T, and firing rates by layer.
        label: shown beside the progress bar.
    Raises:
        FloatingPointError: the loss is NaN, infinite or far above where it began; says in which step, which state was
            the last good one, and what to try.
        ValueError: ``resume`` belongs to another run.
    Source:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (the KL term).
    """
    config = config or TrainConfig()
    if not isinstance(config, TrainConfig):
        raise TypeError(f"expected a TrainConfig, got {type(config).__name__}; call fit(model, data, TrainConfig(...))")
    device, (rank, world) = device_of(model), rank_and_world()
    train: Any = data.train
    if config.train_images is not None:
        train = _head(train, config.train_images)
    if not hasattr(train, "__len__"):
        raise ValueError("data.train must be a Dataset with a length")
    sizes = batch_sizes(len(train), config.batch_size, world)
    state = read_state(resume, asdict(config))
    if state is not None:
        model.load_state_dict(state.model)  # before the optimizer: Brevitas makes new parameters when it loads
    optimizer, scheduler = _optimizer(model, config, len(sizes))
    done = Done() if state is None else state.restore_(optimizer, scheduler)
    average = WeightAverage(model, config.ema) if config.ema else None
    if average is not None and state is not None:
        average.restore_(state.average)
    if config.epochs == len(done.history):
        model.eval()
        return done.history
    recipe = recipe_of(model)
    recipe.pop("sha256", None)  # the weights are no longer those of the file the model was loaded from
    set_recipe(model, recipe)
    step = _Step(model, loss or _default_loss(config, teacher), config.precision)
    if teacher is not None:
        teacher.eval()
    keep_freed_memory()
    board = Board(tensorboard if is_main() else None)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        if resume is not None and is_main():
            averaged = {} if average is None else average.weights
            save_state(resume, model, optimizer, scheduler, asdict(config), done, averaged)
        saved = time.monotonic()

    with _progress() as progress, torch.random.fork_rng(), board:
        total = config.epochs * len(sizes)
        bar = progress.add_task(label, total=total, completed=len(done.history) * len(sizes) + done.batch, note="")
        for epoch in range(len(done.history), config.epochs):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            lay_out_(model.train(), torch.channels_last)  # convolutions and batch norm run faster in it on a CPU
            parts = batches(
                train, config.batch_size, generator=generator, augment=config.augment or data.augment, device=device,
                share=(rank, world),
            )  # fmt: skip
            with shared(step) as shared_step:
                run = torch.compile(shared_step) if config.compile else shared_step
                for batch, (images, labels) in enumerate(parts):
                    if batch < done.batch:  # done before the run was stopped
                        continue
                    torch.manual_seed(((config.seed * 1_000_003 + epoch) * len(sizes) + batch) * world + rank)
                    optimizer.zero_grad(set_to_none=True)
                    value, terms = run(laid_out(images, torch.channels_last), labels)
                    number = float(value.detach())
                    _refuse_divergence(number, done, epoch, batch, label, config, resume)
                    # DDP takes the mean over processes, whose shares of the batch may differ by one image
                    (value if world == 1 else value * (len(images) * world / sizes[batch])).backward()
                    optimizer.step()
                    scheduler.step()
                    if after_step is not None:
                        after_step(scheduler.last_epoch, total)
                    if average is not None:
                        average.update_(model, scheduler.last_epoch)
                    done.batch, done.total = batch + 1, done.total + number
                    board.step(scheduler.last_epoch, terms, scheduler.get_last_lr()[0])
                    progress.advance(bar)
                    if world == 1 and time.monotonic() - saved > CHECKPOINT_SECONDS:
                        save()
            if average is not None and epoch + 1 == config.epochs:
                average.apply_(model)
                few = batches(
                    _head(train, NORM_IMAGES), config.batch_size, generator=generator, device=device,
                    augment=config.augment or data.augment, share=(rank, world),
                )  # fmt: skip
                estimate_norms_(model, (laid_out(images, torch.channels_last) for images, _ in few))
            lay_out_(model.eval(), torch.contiguous_format)
            average_buffers_(model)
            right, seen = total_of(torch.tensor(_count(model, data.val, 500, (rank, world)), device=device)).tolist()
            mean_loss = float(total_of(torch.tensor(done.total, device=device))) / world / len(sizes)
            done.history.append(Epoch(epoch + 1, mean_loss, 100.0 * right / max(1, seen)))
            done.batch, done.total = 0, 0.0
            save()
            wait()
            board.epoch(scheduler.last_epoch, done.history[-1], model, data.val)
            progress.update(bar, note=f"loss {mean_loss:.3f}, validation {done.history[-1].val_accuracy:.2f} %")
            if not progress.console.is_terminal:
                progress.console.print(
                    f"{label}: epoch {epoch + 1}/{config.epochs}, {progress.tasks[bar].fields['note']}"
                )
    model.eval()
    return done.history


def _head(part: Any, n: int) -> Any:
    """The first n images of a Dataset."""
    return part.head(n) if hasattr(part, "head") else Subset(part, range(min(n, len(part))))


class _Step(nn.Module):
    """The loss of one batch as a module, which DDP and torch.compile can wrap: the sum, and its terms by name."""

    def __init__(self, model: nn.Module, loss: Loss, precision: str) -> None:
        super().__init__()
        self.model, self.loss, self.precision = model, loss, precision

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.loss(self.model, images, labels)
        terms = found if isinstance(found, dict) else {"loss": found}
        total = torch.stack(list(terms.values())).sum()
        return total, {name: value.detach() for name, value in terms.items()}


def _refuse_divergence(
    loss: float, done: Done, epoch: int, batch: int, label: str, config: TrainConfig, resume: str | Path | None
) -> None:
    limit = DIVERGED * max(done.history[0].loss, 0.1) if done.history else math.inf
    if math.isfinite(loss) and loss <= limit:
        return
    good = "there is no state yet to go back to"
    if resume is not None and Path(resume).exists():
        good = f"the last good state is {resume}, written after epoch {len(done.history)}"
    raise FloatingPointError(
        f"the loss is {loss:.6g} in step {batch + 1} of epoch {epoch + 1} of {label!r}; try a lower lr than "
        f"{config.lr}, or a longer warmup than {config.warmup}; {good}"
    )


@torch.no_grad()
def accuracy(model: nn.Module, source: Any, batch_size: int = 500, **options: Any) -> float:
    """Return the percent of right answers; an SNN answers after its last step.

    Args:
        model: ANN or SNN.
        source: a Dataset or an iterable of (images, labels).
        batch_size: images a call.
        options: passed to the model, e.g. ``timesteps=4``.
    """
    training = model.training
    right, seen = _count(model.eval(), source, batch_size, (0, 1), **options)
    model.train(training)
    return 100.0 * right / max(1, seen)


def answer(model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    """The logits (B, K) of any network; a spiking one answers after its last step, and alone sees frames in time."""
    logits: Tensor = model(summed(images) if time_loop(model) is None else images, **options)
    return logits[-1] if logits.dim() == 3 else logits


@torch.no_grad()
def _count(model: nn.Module, source: Any, batch_size: int, share: tuple[int, int], **options: Any) -> tuple[int, int]:
    """Right answers, and all, of this process's share of the data."""
    right = seen = 0
    for images, labels in batches(source, batch_size, device=device_of(model), share=share):
        right += int((answer(model, images, **options).argmax(1) == labels).sum())
        seen += len(labels)
    return right, seen


def _default_loss(config: TrainConfig, teacher: nn.Module | None) -> Loss:
    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = answer(model, images)
        value = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if teacher is None or config.kd_weight == 0:
            return value
        with torch.no_grad():
            target = answer(teacher, images)
        kl = kl_divergence(logits, target, config.kd_temperature)
        return (1 - config.kd_weight) * value + config.kd_weight * kl

    return loss


def _optimizer(model: nn.Module, config: TrainConfig, per_epoch: int) -> tuple[Any, Any]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
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


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar, of the first process."""
    with Progress(
        TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=None if is_main() else Console(quiet=True), disable=not is_main(),
    ) as progress:  # fmt: skip
        yield progress
