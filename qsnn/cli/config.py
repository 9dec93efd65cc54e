"""What the whole flow is told, and what to type to get the same again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qsnn.options import (
    BatchSize,
    Epochs,
    Images,
    Levels,
    Part,
    Seed,
    TaskName,
    Timesteps,
    WeightBits,
    as_bytes,
    check_options,
)
from qsnn.training.budget import seconds_of
from qsnn.training.config import TrainConfig

# (teacher epochs, quantization-aware epochs, distillation epochs), chosen on validation accuracy and the time they take
EPOCHS = {"digits": (20, 60, 40), "mnist": (4, 4, 3), "fashion-mnist": (14, 8, 7), "cifar10": (20, 15, 10)}

LOW_BITS: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0, "batch_size": 64}
"""How low-precision weights are trained; under AdamW signs flip more readily."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the whole flow trains, and where it writes."""

    data: str = "digits"
    """"digits", "mnist", "fashion-mnist", "cifar10", the event set "nmnist" or "dvsgesture", or a folder of images."""
    out: Path = Path("runs/digits")
    """Folder for checkpoints, records, figure and report."""
    model: str = "vgg-small"
    """Name of the float network, or your own as package.module:function."""
    model_options: tuple[str, ...] = ()
    """Options of the network, each as NAME=VALUE, like attention=channel."""
    weights: Path | None = None
    """Trained float weights; the teacher is then not trained."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel, of pixels on [0, 1], as the weights want it; by default the data set's own."""
    std: tuple[float, ...] | None = None
    """Each channel is divided by it; by default the data set's own."""
    weight_bits: WeightBits = 4
    """Bits of the weights."""
    levels: Levels = 2
    """Nonzero activation levels L."""
    timesteps: Timesteps = 2
    """Time steps T of the student."""
    signed: bool = False
    """Spikes of -1 take back spikes that came too early: better in few steps, where the hardware can send them."""
    max_timesteps: Timesteps = 8
    """Largest T of the benchmark."""
    label_smoothing: Part = 0.0
    """Label smoothing of the student's cross entropy."""
    task: TaskName | None = None
    """"classification", "binary", "segmentation" or "regression"; by default found from the labels and the answers."""
    key: str | None = None
    """Which weights, where the file holds several: a dictionary's key, or the front of the names."""
    train_images: Images | None = None
    """Use only the first so many training images."""
    test_images: Images | None = None
    """Certify and measure on only the first so many test images."""
    batch_size: BatchSize | None = None
    """Images a step; by default 128 for the teacher, 64 where weights have few bits."""
    epochs: tuple[Epochs, Epochs, Epochs] | None = None
    """Epochs of teacher, quantization-aware training and distillation; by default chosen for the data set."""
    precision: str = "fp32"
    """Of all training: "fp32", or "bf16", short floats, faster on processors that have them."""
    budget: str | None = None
    """Time for all training, as 90s, 110m or 2h: a few steps are measured, and epochs chosen that fit into it."""
    seed: Seed = 0
    """Of weights, order and augmentation."""
    data_root: Path | None = None
    """Folder of the data sets; default $QSNN_DATA, else a cache folder."""
    device: str | None = None
    """"cpu", "cuda" or "cuda:1"; by default a GPU where there is one."""
    memory: str | None = None
    """What the images of one batch may take, like 512M or 4G; by default 1G."""
    fresh: bool = False
    """Start over, even where a stage is done."""

    def __post_init__(self) -> None:
        """Refuse before the training what would fail after it.

        Raises:
            ValueError: which option, and what it may be.
        """
        check_options(self)
        TrainConfig(precision=self.precision)
        if self.memory is not None:
            as_bytes(self.memory)
        if self.budget is not None:
            try:
                seconds_of(self.budget)
            except ValueError as error:
                raise ValueError(f"budget: {error}") from None
            if self.epochs is not None:
                raise ValueError(f"expected epochs or budget, got both, {self.epochs} and {self.budget!r}; leave one")


def command_of(options: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """What to type to get the same again: every option that is not the default, without the folders of this machine.

    Args:
        options: fields of a :class:`RunConfig`, also as a record holds them; one that is missing has its default.
        without: fields that are left out.
    """
    words = ["qsnn run"]
    for option in fields(RunConfig):
        value = options.get(option.name, option.default)
        value = tuple(value) if isinstance(value, list) else value  # as JSON has it
        left_out = option.name in ("data_root", "device", "memory", "fresh", *without)
        if left_out or (value == option.default and option.name != "data"):
            continue
        if isinstance(value, Path):
            value = value.name
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        words.append(f"--{option.name.replace('_', '-')}{'' if value is True else f' {value}'}")
    return " ".join(words)
