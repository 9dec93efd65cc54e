"""What studies share: a setting, its networks, trained once and kept under the hash of their config, and helpers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

import qsnn
from qsnn.report.records import Record

CACHE = Path("runs/study")
MOST_EPOCHS = 5
"""A data set of few images is seen at most so many times as often."""
IMAGES = 2_000
"""Test images, the first of the data set, where many steps or many networks take long."""
Row = tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]
"""Label, the config that names it besides the setting, and what measures it."""
Load = Callable[[str], qsnn.Data]
"""A data set by its name; "nmnist:4" is N-MNIST in four frames."""

STUDENTS: dict[str, dict[str, int]] = {
    "W4": {"weight_bits": 4, "levels": 2},
    "W1": {"weight_bits": 1, "levels": 2},
    "fp16": {"weight_bits": 16, "levels": 2},
}
W4 = STUDENTS["W4"]


@dataclass(frozen=True)
class Setting:
    """What all rows of a study share."""

    data: str
    model: str
    epochs: int
    train_images: int | None
    seed: int

    def training(self, lr: float, **options: Any) -> qsnn.TrainConfig:
        """The options of one stage."""
        return qsnn.TrainConfig(epochs=self.epochs, lr=lr, train_images=self.train_images, seed=self.seed, **options)

    def low_bits(self) -> qsnn.TrainConfig:
        """Training of low-precision weights: AdamW, small batches, cross entropy; of 1 bit far better than SGD."""
        return self.training(0.01, optimizer="adamw", weight_decay=0.0, batch_size=64, kd_weight=0.0)

    def on(self, data: qsnn.Data) -> Setting:
        """The same for another data set; few images are seen up to :data:`MOST_EPOCHS` times as often."""
        images = self.train_images or len(data.train)  # type: ignore[arg-type]
        more = math.ceil(images / min(images, len(data.train)))  # type: ignore[arg-type]
        return replace(self, data=data.name, epochs=self.epochs * min(more, MOST_EPOCHS))


def cached(name: str, config: dict[str, Any], make: Callable[[], nn.Module]) -> nn.Module:
    """Load the model of this config, or make and keep it; another process that makes it is waited for."""
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    path = CACHE / f"{name}-{key}.safetensors"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            qsnn.save(make(), path)
    named = str({**config, **config.get("setting", {})}.get("model", ""))
    return qsnn.load(path, model=named if ":" in named else None)


def teacher_of(setting: Setting, data: qsnn.Data, **options: Any) -> nn.Module:
    """The float teacher of a setting, trained once."""

    def make() -> nn.Module:
        model = qsnn.create_model(setting.model, data, seed=setting.seed, **options)
        qsnn.fit(model, data, setting.training(0.1), label="teacher")
        return model

    return cached("teacher", {**asdict(setting), **({"options": options} if options else {})}, make)


def qann_of(setting: Setting, data: qsnn.Data, quantized: dict[str, Any], **options: Any) -> nn.Module:
    """The quantized network of a setting, trained once."""
    training = setting.low_bits()

    def make() -> nn.Module:
        qann = qsnn.quantize(teacher_of(setting, data, **options), data, qsnn.QuantizeConfig(**quantized))
        qsnn.fit(qann, data, training, label="QANN")
        return qann

    config = {"setting": asdict(setting), "quantize": quantized, "train": asdict(training)}
    return cached("qann", {**config, **({"options": options} if options else {})}, make)


def student_config(setting: Setting, **options: Any) -> qsnn.DistillConfig:
    """The recipe that is the default of :func:`qsnn.distill`, of the setting's size."""
    sizes: dict[str, Any] = {"epochs": setting.epochs, "train_images": setting.train_images, "seed": setting.seed}
    return qsnn.DistillConfig(**{**sizes, **options})


def short_student(setting: Setting, **options: Any) -> qsnn.DistillConfig:
    """Half the epochs and θ by channel, for studies whose students are compared with each other alone."""
    chosen: dict[str, Any] = {
        "epochs": max(1, setting.epochs // 2), "train_threshold": "channel", "train_initial": "channel",
    }  # fmt: skip
    return student_config(setting, **{**chosen, **options})


def student_of(
    setting: Setting, data: qsnn.Data, quantized: dict[str, Any], config: qsnn.DistillConfig, **options: Any
) -> qsnn.SNN:
    """The student of a quantized network, trained once."""

    def make() -> nn.Module:
        qann = qann_of(setting, data, quantized, **options)
        return qsnn.distill(qsnn.convert(qann), qann, data, config)  # type: ignore[no-any-return]

    known = {"setting": asdict(setting), "quantize": quantized, "distill": asdict(config), "options": options}
    return cached("student", known, make)  # type: ignore[return-value]


def of_qann(setting: Setting, **options: Any) -> dict[str, Any]:
    """The config of a row that works on the W4/L2 network of the setting."""
    return {**options, "quantize": W4, "train": asdict(setting.low_bits())}


def first_of(data: qsnn.Data) -> Any:
    """The first test images, for what takes long."""
    return data.test.head(IMAGES)  # type: ignore[attr-defined]


@torch.no_grad()
def curve_of(model: nn.Module, test: Any, timesteps: int = 8) -> dict[str, float]:
    """Online accuracy [%] at T = 1, 2, 4, ..., in one pass as the network stands, not folded."""
    right: Tensor | int = 0
    for images, labels in qsnn.batches(test, 500):
        answers = model(images, timesteps=timesteps)
        right = right + (answers.argmax(-1) == labels).sum(1)
    found = (100.0 * torch.as_tensor(right).double() / len(test)).tolist()
    return {f"T={t}": found[t - 1] for t in (1, 2, 4, 8, 16) if t <= timesteps}


def mean_of(records: Sequence[Record], label: str, key: str) -> float:
    """Mean over the seeds of one number of one row."""
    values = [float(r.metrics[key]) for r in records if r.name.partition("/")[2] == label]
    return sum(values) / len(values)
