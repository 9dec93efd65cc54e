"""fit(): the only training loop. Teachers, quantization-aware training and spiking students all go through it."""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.utils.data import Subset

from qsnn.data import Data, batches, num_batches
from qsnn.graph import device_of, recipe_of, set_recipe
from qsnn.neurons import SNN
from qsnn.records import write_atomic

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's names for the options of mallopt, from malloc.h."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


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
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(f"expected epochs >= 0 and batch_size >= 1, got {self.epochs} and {self.batch_size}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.kd_weight <= 1 or not self.kd_temperature > 0:
            raise ValueError(
                f"expected 0 <= label_smoothing < 1, 0 <= kd_weight <= 1, kd_temperature > 0, got "
                f"{self.label_smoothing}, {self.kd_weight}, {self.kd_temperature}"
            )


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean training loss, validation accuracy [%], peak learning rate of its last step."""

    epoch: int
    loss: float
    val_accuracy: float


def fit(
    model: nn.Module,
    data: Data,
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    resume: str | Path | None = None,
    label: str = "train",
) -> list[Epoch]:
    r"""Train ``model`` in place on ``data.train``; it ends in eval mode. Return one :class:`Epoch` an epoch.

    The loss is the cross entropy, or with a teacher
    :math:`(1-\lambda)\,CE + \lambda\,\tau^2\,KL(p_\tau^{teacher}\,\|\,p_\tau)`, or ``loss(model, images, labels)``.
    The order of the images, augmentation and dropout follow from the seed and the epoch alone, so that a run that was
    killed and continued from ``resume`` ends with the same weights as one that was not.

    Args:
        model: any torch module that maps (B, C, H, W) to (B, K), or an SNN.
        data: where training and validation images come from.
        config: epochs, learning rate and the like.
        teacher: a model that gives logits (B, K).
        loss: takes the place of the loss above.
        resume: file for the state after each epoch; where it exists and belongs to the same config, training goes on
            from it. It is left for the caller to delete.
        label: shown beside the progress bar.
    Raises:
        FloatingPointError: the loss is NaN or infinite; says in which step and what to try.
        ValueError: ``resume`` belongs to another run.
    Source:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (the KL term).
    """
    config = config or TrainConfig()
    if not isinstance(config, TrainConfig):
        raise TypeError(f"expected a TrainConfig, got {type(config).__name__}; call fit(model, data, TrainConfig(...))")
    device = device_of(model)
    train: Any = data.train
    if config.train_images is not None:
        train = train.head(config.train_images) if hasattr(train, "head") else Subset(train, range(config.train_images))
    per_epoch = num_batches(train, config.batch_size)
    if per_epoch is None:
        raise ValueError("data.train must be a Dataset with a length")
    state = _read_state(resume, config)
    if state is not None:
        model.load_state_dict(state.model)  # before the optimizer: Brevitas makes new parameters when it loads
    optimizer, scheduler = _optimizer(model, config, per_epoch)
    history = [] if state is None else state.restore_(optimizer, scheduler)
    if config.epochs == len(history):
        model.eval()
        return history
    recipe = recipe_of(model)
    recipe.pop("sha256", None)  # the weights are no longer those of the file the model was loaded from
    set_recipe(model, recipe)
    step_loss = loss or _default_loss(config, teacher)
    if teacher is not None:
        teacher.eval()
    keep_freed_memory()
    with _progress() as progress, torch.random.fork_rng():
        bar = progress.add_task(label, total=config.epochs * per_epoch, completed=len(history) * per_epoch, note="")
        for epoch in range(len(history), config.epochs):
            torch.manual_seed(config.seed * 1_000_003 + epoch)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            augment = config.augment or data.augment
            lay_out_(model.train(), torch.channels_last)  # convolutions and batch norm run faster in it on a CPU
            total = torch.zeros((), device=device)
            for images, labels in batches(
                train, config.batch_size, generator=generator, augment=augment, device=device
            ):
                optimizer.zero_grad(set_to_none=True)
                value = step_loss(model, laid_out(images, torch.channels_last), labels)
                if not bool(value.detach().isfinite()):
                    raise FloatingPointError(
                        f"the loss is {float(value.detach())} in epoch {epoch + 1} of {label!r}; "
                        f"try a lower lr than {config.lr}"
                    )
                value.backward()
                optimizer.step()
                scheduler.step()
                total += value.detach()
                progress.advance(bar)
            lay_out_(model.eval(), torch.contiguous_format)
            history.append(Epoch(epoch + 1, float(total) / per_epoch, accuracy(model, data.val)))
            _save_state(resume, model, optimizer, scheduler, config, history)
            progress.update(bar, note=f"loss {history[-1].loss:.3f}, validation {history[-1].val_accuracy:.2f} %")
            if not progress.console.is_terminal:
                progress.console.print(
                    f"{label}: epoch {epoch + 1}/{config.epochs}, {progress.tasks[bar].fields['note']}"
                )
    model.eval()
    return history


@torch.no_grad()
def accuracy(model: nn.Module, source: Any, batch_size: int = 500, **options: Any) -> float:
    """Return the percent of right answers; an SNN answers after its last step.

    Args:
        model: ANN or SNN.
        source: a Dataset or an iterable of (images, labels).
        batch_size: images a call.
        options: passed to the model, e.g. ``timesteps=4``.
    """
    training, device = model.training, device_of(model)
    model.eval()
    right = seen = 0
    for images, labels in batches(source, batch_size, device=device):
        logits = model(images, **options)
        answer = (logits[-1] if logits.dim() == 3 else logits).argmax(1)
        right += int((answer == labels).sum())
        seen += len(labels)
    model.train(training)
    return 100.0 * right / max(1, seen)


def kl_divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`\tau^2\,KL(\mathrm{softmax}(t/\tau)\,\|\,\mathrm{softmax}(z/\tau))`, mean over the batch.

    Shape:
        logits z and target t: (B, K).
    Source:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    log_p, log_q = F.log_softmax(logits / temperature, -1), F.log_softmax(target / temperature, -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def _default_loss(config: TrainConfig, teacher: nn.Module | None) -> Loss:
    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        logits = model(images)
        if isinstance(model, SNN):
            logits = logits[-1]
        value = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        if teacher is None or config.kd_weight == 0:
            return value
        with torch.no_grad():
            target = teacher(images)
        kl = kl_divergence(logits, target, config.kd_temperature)
        return (1 - config.kd_weight) * value + config.kd_weight * kl

    return loss


def laid_out(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return a copy of a 4-d tensor with the strides of ``memory_format``; anything else as it is.

    ``Tensor.to`` leaves the strides of a tensor with one channel as they come. A convolution chooses its algorithm by
    them: it may be several times slower, and it may round differently, so that a continued run would not end with the
    weights of one that was not stopped.
    """
    return torch.empty_like(x, memory_format=memory_format).copy_(x) if x.dim() == 4 else x


def keep_freed_memory() -> None:
    """Let the C library of Linux (glibc) keep what is freed, instead of giving it back to the system, from now on.

    A training step frees tensors of megabytes and asks for the same again; by default each is mapped anew, and its
    pages are cleared at first touch, which takes up to a third of a step on a CPU. A limit that you set yourself
    (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``) stays, and elsewhere this does nothing.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@torch.no_grad()
def lay_out_(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Put all 4-d parameters of a model into a memory format, in place."""
    for parameter in model.parameters():
        parameter.data = laid_out(parameter, memory_format)


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


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip


def _save_state(
    path: str | Path | None, model: nn.Module, optimizer: Any, scheduler: Any, config: TrainConfig, history: list[Epoch]
) -> None:
    """Write model, optimizer and history beside the file and rename, so that a kill leaves the last good one."""
    if path is None:
        return
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).contiguous()
    meta = {"config": asdict(config), "history": [asdict(epoch) for epoch in history], "step": scheduler.last_epoch}
    write_atomic(path, save_tensors(tensors, {"qsnn.fit": json.dumps(meta)}))


@dataclass(frozen=True)
class _State:
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    step: int
    history: list[Epoch]

    def restore_(self, optimizer: Any, scheduler: Any) -> list[Epoch]:
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": optimizer.state_dict()["param_groups"]})
        scheduler.last_epoch = self.step
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.step)
        return list(self.history)


def _read_state(path: str | Path | None, config: TrainConfig) -> _State | None:
    if path is None or not Path(path).exists():
        return None
    raw = Path(path).read_bytes()
    try:
        tensors = load_tensors(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        meta = json.loads(header["__metadata__"]["qsnn.fit"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no state of a training run ({error}); delete it to start over") from error
    if meta["config"] != asdict(config):
        raise ValueError(f"{path} is the state of a run with other options; delete it to start over")
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            optimizer.setdefault(int(index), {})[key] = value
    model = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    return _State(model, optimizer, meta["step"], [Epoch(**epoch) for epoch in meta["history"]])
