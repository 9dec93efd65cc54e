"""One network with a head a task, or a network a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from figures import dots
from setting import W4, Load, Row, Setting, mean_of, short_student, student_of
from torch import Tensor, nn

import qsnn
from qsnn.data.images import ImageSet
from qsnn.measure.accuracy import answer as answer_of
from qsnn.report.records import Record

QUESTION = "One network for several tasks, or one each?"
SIZE = "MNIST, Fashion-MNIST, digits at 28x28"
TITLES = {
    "mnist": "mnist [%]", "fashion-mnist": "fashion-mnist [%]", "digits": "digits [%]", "weight_bytes": "weights [KiB]",
}  # fmt: skip
NOTE = "Students of T = 2, W4/L2."
FIGURE = dots("mnist", "fashion-mnist", "digits")


SHARED = ("mnist", "fashion-mnist", "digits")
SIDE = 28


def together(load: Load, setting: Setting) -> qsnn.Data:
    """One data set of all tasks; the labels of each follow those of the one before."""
    parts: dict[str, list[ImageSet]] = {"train": [], "val": [], "test": []}
    share = (setting.train_images or 60_000) // len(SHARED)
    classes: list[str] = []
    for name in SHARED:
        data = alone(load, name)
        for part, found in parts.items():
            images: Any = getattr(data, part)
            if part == "train":
                images = _repeated(images, share)
            found.append(ImageSet(images.images, images.labels + len(classes), data.mean, data.std))
        classes += [f"{name} {label}" for label in data.classes]
    mean, std = parts["train"][0].mean, parts["train"][0].std
    order = torch.randperm(share * len(SHARED), generator=torch.Generator().manual_seed(0))
    joined = {
        part: ImageSet(torch.cat([i.images for i in found]), torch.cat([i.labels for i in found]), mean, std)
        for part, found in parts.items()
    }
    return qsnn.Data(
        name="+".join(SHARED), train=joined["train"].subset(order), val=joined["val"], test=joined["test"],
        mean=mean, std=std, classes=tuple(classes), augment="shift",
    )  # fmt: skip


def _repeated(images: ImageSet, count: int) -> ImageSet:
    return images.subset(torch.arange(count) % len(images))


def alone(load: Load, name: str) -> qsnn.Data:
    """One task as it stands in :func:`together`: 28 x 28 pixels, normalised as MNIST."""
    data, first = load(name), load(SHARED[0])

    def resized(images: Any) -> ImageSet:
        pixels = images.images
        if pixels.shape[-1] != SIDE:
            pixels = F.interpolate(pixels.float(), size=(SIDE, SIDE), mode="bilinear").round().to(torch.uint8)
        return ImageSet(pixels, images.labels, first.mean, first.std)

    return replace(
        data, name=f"{name} {SIDE}x{SIDE}", train=resized(data.train), val=resized(data.val), test=resized(data.test),
        mean=first.mean, std=first.std, augment="shift",
    )  # fmt: skip


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """T = 2, W4/L2: one network whose last layer holds a head for each task, or a network a task, equal images."""
    share = (setting.train_images or 60_000) // len(SHARED)
    yield "shared", {"tasks": SHARED, "quantize": W4}, partial(_shared_row, setting, load)
    for name in SHARED:
        yield f"{name} alone", {"quantize": W4, "images": share}, partial(_alone_row, setting, load, name)


@torch.no_grad()
def head_accuracy(model: nn.Module, images: ImageSet, first: int, count: int) -> float:
    """Accuracy [%] of the outputs ``first`` to ``first + count``, the head that the task asks."""
    right = 0
    for batch, labels in qsnn.batches(images, 500):
        logits: Tensor = answer_of(model, batch)[:, first : first + count]
        right += int((logits.argmax(1) == labels - first).sum())
    return 100.0 * right / len(images)


def _shared_row(setting: Setting, load: Load) -> dict[str, Any]:
    data = together(load, setting)
    own = replace(setting, data=data.name)
    student = student_of(own, data, W4, short_student(own))
    found, first, test = {}, 0, data.test
    for name in SHARED:
        count = load(name).num_classes
        mine = (test.labels >= first) & (test.labels < first + count)  # type: ignore[attr-defined]
        found[name] = head_accuracy(student, test.subset(mine.nonzero().flatten()), first, count)  # type: ignore[attr-defined]
        first += count
    return {**found, "weight_bytes": qsnn.summary(student).weight_bytes, "n": len(test)}  # type: ignore[arg-type]


def _alone_row(setting: Setting, load: Load, name: str) -> dict[str, Any]:
    data = alone(load, name)
    share = (setting.train_images or 60_000) // len(SHARED)
    data = replace(data, train=_repeated(data.train, share))  # type: ignore[arg-type]
    own = replace(setting, data=data.name, train_images=share)
    student = student_of(own, data, W4, short_student(own))
    weight_bytes = qsnn.summary(student).weight_bytes
    return {name: qsnn.accuracy(student, data.test), "weight_bytes": weight_bytes, "n": len(data.test)}  # type: ignore[arg-type]


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    lost = {name: mean_of(records, f"{name} alone", name) - mean_of(records, "shared", name) for name in SHARED}
    memory = sum(mean_of(records, f"{name} alone", "weight_bytes") for name in SHARED)
    ratio = mean_of(records, "shared", "weight_bytes") / memory
    shown = ", ".join(f"{name} {value:+.2f}" for name, value in lost.items())
    return (
        f"One network with {len(SHARED)} heads takes {ratio:.2f} of the memory of {len(SHARED)} networks; a network a "
        f"task is better by {shown} points."
    )
