"""What a training run keeps on the disk, so that a run that was killed ends with the weights of one that was not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from qsnn.files import header, metadata, opened, read_bytes, sealed, unsealed, write_atomic

_KEY = "qsnn.fit"
_KEPT = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}
"""What each optimizer keeps of a parameter."""
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean training loss, and the score on the validation images."""

    epoch: int
    loss: float
    val_accuracy: float | None
    """[%], or what ``metric`` says; None where nothing was scored."""
    metric: str = "accuracy"
    """"accuracy" [%], "mean IoU" [%], "mean squared error", or "" where nothing was scored."""


class _Epoch(msgspec.Struct, forbid_unknown_fields=True):
    """An epoch as a file may hold it."""

    epoch: Annotated[int, Meta(ge=1, le=2**53)]
    loss: _Finite
    val_accuracy: Annotated[float, Meta(ge=0, le=1e30)] | None
    metric: Literal["accuracy", "mean IoU", "mean squared error", ""] = "accuracy"

    def __post_init__(self) -> None:
        """Refuse a percent above 100."""
        if self.metric != "mean squared error" and (self.val_accuracy or 0.0) > 100:
            raise ValueError(f"expected {self.metric} from 0 to 100, got {self.val_accuracy}")


class _Progress(msgspec.Struct, forbid_unknown_fields=True):
    history: list[_Epoch]
    batch: _Count
    total: _Finite


class _Meta(msgspec.Struct, forbid_unknown_fields=True):
    """All metadata of a state: every key, its type and its range."""

    config: dict[str, Any]
    progress: _Progress
    step: _Count


@dataclass
class Progress:
    """How far a run is: the epochs that are done, and the batches of the one that is not."""

    history: list[Epoch] = field(default_factory=list)
    batch: int = 0
    """Batches done of the epoch after the last of ``history``."""
    total: float = 0.0
    """Sum of their losses."""


def save_state(
    path: str | Path,
    model: nn.Module,
    optimizer: Any,
    scheduler: Any,
    config: dict[str, Any],
    progress: Progress,
    average: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write all that a run goes on from beside the file and rename, so that a kill leaves the last good one.

    Args:
        path: the file.
        model: what is trained.
        optimizer: with its state.
        scheduler: of the learning rate.
        config: options of the run.
        progress: how far it is.
        average: the running means of its weights, by name, where it keeps them.
    Raises:
        FloatingPointError: the last step left NaN or infinity in a weight; the file is left as it is.
    """
    refuse_not_finite(model, f"; the last good state is {path}" if Path(path).exists() else "")
    tensors = {f"model.{name}": _plain(value) for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = _plain(torch.as_tensor(value))
    tensors |= {f"average.{name}": _plain(value) for name, value in average.items()}
    meta = {"config": config, "progress": asdict(progress), "step": scheduler.last_epoch}
    write_atomic(path, sealed(save_tensors(tensors, {_KEY: unsealed(meta)})))


def refuse_not_finite(model: nn.Module, good: str = "") -> None:
    """Refuse a network whose last step made NaN or infinity of a weight or a statistic.

    Args:
        model: what is trained.
        good: what there is to go back to, as the end of the sentence.
    Raises:
        FloatingPointError: which tensor, and what to try.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise FloatingPointError(
                f"the last step of the training left NaN or infinity in {name}; try a lower lr, or a longer "
                f"warmup{good}"
            )


def _plain(value: Tensor) -> Tensor:
    """A copy on the CPU: safetensors takes no two names for one tensor, which layers with one step have."""
    return value.detach().cpu().contiguous().clone()


@dataclass(frozen=True)
class State:
    """What :func:`read_state` found."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    step: int
    progress: Progress
    average: dict[str, Tensor]
    """The running means of the weights, by name; {} where the run keeps none."""

    def load_(self, model: nn.Module) -> None:
        """Give a network the weights it had, in place.

        Raises:
            ValueError: the state is another network's.
        """
        own = {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}
        found = {name: (value.dtype, tuple(value.shape)) for name, value in self.model.items()}
        for name in (*own, *found):
            if own.get(name) != found.get(name):
                raise ValueError(
                    f"{self.path} is the state of another network: {name!r} is {found.get(name, 'missing')} there and "
                    f"{own.get(name, 'missing')} here; delete it to start over"
                )
        model.load_state_dict(self.model)

    def restore_(self, optimizer: Any, scheduler: Any) -> Progress:
        """Set optimizer and learning rate as they were, in place; return the progress.

        Raises:
            ValueError: the state is another optimizer's.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        keys = _KEPT[type(optimizer).__name__]
        for index, state in self.optimizer.items():
            own = parameters[index].shape if index < len(parameters) else None
            fits = set(state) == keys and all(
                value.shape == (torch.Size() if name == "step" else own) and value.is_floating_point()
                for name, value in state.items()
            )
            if not fits or bool((state.get("exp_avg_sq", torch.zeros(())) < 0).any()):
                raise ValueError(
                    f"{self.path} is the state of another training: what it holds of parameter {index} does not fit; "
                    f"delete it to start over"
                )
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": optimizer.state_dict()["param_groups"]})
        scheduler.last_epoch = self.step
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.step)
        return self.progress


def read_state(path: str | Path | None, config: dict[str, Any]) -> State | None:
    """Read the state of a run with this configuration; None where there is no file.

    Warns:
        UserWarning: the file has no checksum; it is of a version before.
    Raises:
        ValueError: the file is damaged, or belongs to a run with other options.
    """
    if path is None or not Path(path).exists():
        return None
    path, raw = Path(path), read_bytes(path)
    text = metadata(header(raw), _KEY)
    if text is None:
        raise ValueError(f"{path} is no state of a training run; delete it to start over")
    try:
        meta = opened(path, raw, text)
        known = msgspec.convert(meta, _Meta)
        tensors = load_tensors(raw)
        named = [(*name.partition("."), value) for name, value in tensors.items()]
        optimizer: dict[int, dict[str, Tensor]] = {}
        for kind, _, name, value in named:
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name!r} holds NaN or infinity")
            if kind == "optimizer":
                index, _, key = name.partition(".")
                optimizer.setdefault(int(index), {})[key] = value
            elif kind not in ("model", "average"):
                raise ValueError(f"it holds {kind!r}, which is neither model, optimizer nor average")
    except (SafetensorError, msgspec.ValidationError, ValueError) as error:
        raise ValueError(f"{path} is no state of a training run ({error}); delete it to start over") from error
    if meta["config"] != json.loads(json.dumps(config)):
        raise ValueError(f"{path} is the state of a run with other options; delete it to start over")
    found = known.progress
    history = [Epoch(epoch.epoch, epoch.loss, epoch.val_accuracy, epoch.metric) for epoch in found.history]
    if [epoch.epoch for epoch in history] != list(range(1, len(history) + 1)):
        raise ValueError(f"{path} is no state of a training run (its epochs are no 1, 2, ...); delete it to start over")
    model, average = ({name: value for kind, _, name, value in named if kind == part} for part in ("model", "average"))
    return State(path, model, optimizer, known.step, Progress(history, found.batch, found.total), average)
