"""What a training run keeps on the disk, so that a run that was killed ends with the weights of one that was not."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from qsnn.records import write_atomic


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean training loss, validation accuracy [%]."""

    epoch: int
    loss: float
    val_accuracy: float


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
    average: dict[str, Tensor],
) -> None:
    """Write all that a run goes on from beside the file and rename, so that a kill leaves the last good one."""
    tensors = {f"model.{name}": _plain(value) for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = _plain(torch.as_tensor(value))
    tensors |= {f"average.{name}": _plain(value) for name, value in average.items()}
    meta = {"config": config, "progress": asdict(progress), "step": scheduler.last_epoch}
    write_atomic(path, save_tensors(tensors, {"qsnn.fit": json.dumps(meta)}))


def _plain(value: Tensor) -> Tensor:
    """A copy on the CPU: safetensors takes no two names for one tensor, which layers with one step have."""
    return value.detach().cpu().contiguous().clone()


@dataclass(frozen=True)
class State:
    """What :func:`read_state` found."""

    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    step: int
    progress: Progress
    average: dict[str, Tensor]

    def restore_(self, optimizer: Any, scheduler: Any) -> Progress:
        """Set optimizer and learning rate as they were, in place; return the progress."""
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": optimizer.state_dict()["param_groups"]})
        scheduler.last_epoch = self.step
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.step)
        return self.progress


def read_state(path: str | Path | None, config: dict[str, Any]) -> State | None:
    """Read the state of a run with this configuration; None where there is no file.

    Raises:
        ValueError: the file is damaged, or belongs to a run with other options.
    """
    if path is None or not Path(path).exists():
        return None
    raw = Path(path).read_bytes()
    try:
        tensors = load_tensors(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        meta = json.loads(header["__metadata__"]["qsnn.fit"])
        found = meta["progress"]
        progress = Progress([Epoch(**epoch) for epoch in found.pop("history")], **found)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no state of a training run ({error}); delete it to start over") from error
    if meta["config"] != json.loads(json.dumps(config)):
        raise ValueError(f"{path} is the state of a run with other options; delete it to start over")
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            optimizer.setdefault(int(index), {})[key] = value
    model = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    average = {name[8:]: value for name, value in tensors.items() if name.startswith("average.")}
    return State(model, optimizer, meta["step"], progress, average)
