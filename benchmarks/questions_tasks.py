"""The notes' questions across tasks: worse images, many tasks with one recipe or one network, bits against spikes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from questions_training import W4, curve_of, mean_of
from setting import MOST_EPOCHS, STUDENTS, Row, Setting, cached, qann_of, short_student, student_of, teacher_of
from torch import Tensor, nn
from torchvision.transforms import v2

import qsnn
from qsnn.data.images import ImageSet
from qsnn.measure.accuracy import answer
from qsnn.models.ann import VggSmall
from qsnn.report.records import Record

# --- generalize: noise, blur, occlusion, shift ------------------------------------------------------------------------

STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.0, 0.1, 0.2, 0.3, 0.4),  # standard deviation, of pixels on [0, 1]
    "blur": (0.0, 0.5, 1.0, 1.5, 2.0),  # σ [pixel]
    "occlusion": (0.0, 0.1, 0.2, 0.3, 0.4),  # part of the area, one square
    "shift": (0.0, 1.0, 2.0, 3.0, 4.0),  # [pixel] each way, edges filled with black
}
NETWORKS = ("teacher", "QANN", "student")


def worsened(images: ImageSet, kind: str, strength: float, seed: int = 0) -> ImageSet:
    """The images with one of torchvision's transforms; every network sees the same."""
    if not strength:
        return images
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels = images.images.float() / 255
        side = pixels.shape[-1]
        if kind == "noise":
            pixels = v2.GaussianNoise(sigma=strength)(pixels)
        elif kind == "blur":
            pixels = v2.GaussianBlur(kernel_size=2 * round(3 * strength) + 1, sigma=strength)(pixels)
        elif kind == "occlusion":
            erase = v2.RandomErasing(p=1.0, scale=(strength, strength), ratio=(1.0, 1.0))
            pixels = torch.stack([erase(image) for image in pixels])
        else:
            move = v2.RandomAffine(0, translate=(strength / side, strength / side))
            pixels = torch.stack([move(image) for image in pixels])
    return ImageSet((pixels.clamp(0, 1) * 255).round().to(torch.uint8), images.labels, images.mean, images.std)


def generalize(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """Accuracy against strength, first 2,000 test images; each trained for as many epochs in all."""
    config = short_student(setting)
    for kind, strengths in STRENGTHS.items():
        for network in NETWORKS:
            yield (
                f"{kind}, {network}", {"strengths": strengths, "quantize": W4, "distill": asdict(config)},
                partial(_generalize_row, setting, data, kind, network),
            )  # fmt: skip


def _trained_on(setting: Setting, data: qsnn.Data, network: str) -> nn.Module:
    """One of the three; each has seen as many epochs of training images in all its stages."""
    config = short_student(setting)
    if network == "student":
        return student_of(setting, data, W4, config)
    epochs = config.epochs if network == "QANN" else setting.epochs + config.epochs

    def make() -> nn.Module:
        model = teacher_of(setting, data) if network == "teacher" else qann_of(setting, data, W4)
        qsnn.fit(model, data, replace(setting.low_bits(), epochs=epochs), label=f"{network} on")
        return model

    return cached(f"{network}-on", {"setting": asdict(setting), "quantize": W4, "epochs": epochs}, make)


def _generalize_row(setting: Setting, data: qsnn.Data, kind: str, network: str) -> dict[str, Any]:
    model = _trained_on(setting, data, network)
    test: Any = data.test
    found = {
        f"strength {strength:g}": qsnn.accuracy(model, worsened(test.head(2000), kind, strength))
        for strength in STRENGTHS[kind]
    }
    return {**found, "n": len(test.head(2000))}


def generalize_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts, wins = [], 0
    for kind, strengths in STRENGTHS.items():
        lost = {
            network: mean_of(records, f"{kind}, {network}", "strength 0")
            - sum(mean_of(records, f"{kind}, {network}", f"strength {s:g}") for s in strengths[1:]) / len(strengths[1:])
            for network in NETWORKS
        }
        wins += lost["student"] < min(lost["teacher"], lost["QANN"])
        parts.append(f"{kind}: {', '.join(f'{name} {value:.1f}' for name, value in lost.items())}")
    verdict = "generalizes better" if wins == len(STRENGTHS) else (
        f"loses least in {wins} of {len(STRENGTHS)} cases" if wins else "does not generalize better"
    )  # fmt: skip
    return f"The spiking network {verdict}; points lost, mean over the strengths: {'; '.join(parts)}."


# --- tasks: one recipe on every data set ------------------------------------------------------------------------------

TASKS = ("digits", "mnist", "fashion-mnist", "nmnist")


def tasks(setting: Setting, load: Callable[[str], qsnn.Data], names: Sequence[str] = TASKS) -> Iterator[Row]:
    """Teacher, W4/L2 QANN and student of T = 2 with the same options; a small set is seen five times as often."""
    for name in names:
        config = short_student(setting)
        options = {"quantize": W4, "distill": asdict(config), "most_epochs": MOST_EPOCHS}
        yield name, options, partial(_task_row, setting, load, name)


def _task_row(setting: Setting, load: Callable[[str], qsnn.Data], name: str) -> dict[str, Any]:
    data = load(name)
    own = setting.on(data)
    found = {
        "teacher": qsnn.accuracy(teacher_of(own, data), data.test),
        "qann": qsnn.accuracy(qann_of(own, data, W4), data.test),
    }
    return {**found, **curve_of(student_of(own, data, W4, short_student(own)), data.test, 2), "n": len(data.test)}  # type: ignore[arg-type]


def tasks_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    lost = {label: mean_of(records, label, "teacher") - mean_of(records, label, "T=2") for label in labels}
    shown = ", ".join(f"{label} {value:+.2f}" for label, value in lost.items())
    worst = max(lost, key=lost.__getitem__)
    verdict = "serves" if lost[worst] <= 1 else "does not serve"
    return (
        f"One recipe {verdict} all {len(labels)} tasks with at most {max(0.0, lost[worst]):.2f} points lost from the "
        f"teacher to the T = 2 student ({worst}); teacher minus student: {shown} points."
    )


# --- code: ±1, 0/1 and spikes over time -------------------------------------------------------------------------------

CODES: dict[str, dict[str, Any]] = {
    "±1": {"weight_bits": 1, "act_form": "sign"},
    "0/1": {"weight_bits": 1, "act_bits": 1},
    "T = 2 spikes": STUDENTS["W1"],
}
WIDTHS: dict[str, tuple[float, ...]] = {"±1": (0.5, 1.0), "0/1": (1.0, 1.5), "T = 2 spikes": (1.0,)}
"""By the channels of the study net; the others are there to compare at equal synops."""


def widened(num_classes: int, width: float = 1.0) -> nn.Module:
    """The study net for images of one channel, with so many times its channels."""
    a, b, c = (round(width * channels) for channels in (16, 32, 64))
    return VggSmall(1, num_classes, [[a, a], [b, b], [c]])


def code(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """1-bit weights; the BNNs train for as long as the QANN and its student together."""
    for label, options in CODES.items():
        for width in WIDTHS[label]:
            yield (
                f"{label}, width {width:g}", {"quantize": options, "width": width},
                partial(_code_row, setting, data, label, width),
            )  # fmt: skip


def _code_row(setting: Setting, data: qsnn.Data, label: str, width: float) -> dict[str, Any]:
    own = replace(setting, model="questions_tasks:widened")
    config = short_student(setting)
    if label == "T = 2 spikes":
        snn = student_of(own, data, CODES[label], config, width=width)
        dense = 0
    else:
        longer = replace(own, epochs=own.epochs + config.epochs)
        qann = qann_of(longer, data, CODES[label], width=width)
        snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=1))
        layers = qsnn.summary(qann).layers
        dense = sum(layer.macs for layer in layers[1:])
    steps = 2 if label == "T = 2 spikes" else 1
    measured = qsnn.benchmark(snn, data.test, timesteps=steps, firing="online")
    return {
        "accuracy": measured.accuracy[-1],
        # of ±1 every input counts: it adds or subtracts, it is never silent
        "synops": float(dense) if label == "±1" else float(measured.synops or 0.0),
        "weight_bytes": qsnn.summary(snn).weight_bytes,
    }


def code_answer(records: Sequence[Record]) -> str:
    """One sentence."""

    def at(label: str, key: str) -> float:
        return mean_of(records, label, key)

    spikes, cost = at("T = 2 spikes, width 1", "accuracy"), at("T = 2 spikes, width 1", "synops")
    parts = []
    for label in ("±1", "0/1"):
        points = sorted((at(f"{label}, width {w:g}", "synops"), at(f"{label}, width {w:g}", "accuracy"))
                        for w in WIDTHS[label])  # fmt: skip
        (x0, y0), (x1, y1) = points
        equal = y0 + (y1 - y0) * (cost - x0) / (x1 - x0)
        parts.append((label, at(f"{label}, width 1", "accuracy"), equal))
    more = spikes > max(equal for _, _, equal in parts)
    shown = "; ".join(f"{label}: {same:.2f} and {equal:.2f}" for label, same, equal in parts)
    return (
        f"Spikes over two steps {'carry' if more else 'do not carry'} more than bits: {spikes:.2f} %, against (equal "
        f"weights, and between the two widths at equal synops) {shown} %."
    )


# --- multitask: one network with a head a task, or a network a task ---------------------------------------------------

SHARED = ("mnist", "fashion-mnist", "digits")
SIDE = 28


def together(load: Callable[[str], qsnn.Data], setting: Setting) -> qsnn.Data:
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


def alone(load: Callable[[str], qsnn.Data], name: str) -> qsnn.Data:
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


def multitask(setting: Setting, load: Callable[[str], qsnn.Data]) -> Iterator[Row]:
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
        logits: Tensor = answer(model, batch)[:, first : first + count]
        right += int((logits.argmax(1) == labels - first).sum())
    return 100.0 * right / len(images)


def _shared_row(setting: Setting, load: Callable[[str], qsnn.Data]) -> dict[str, Any]:
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


def _alone_row(setting: Setting, load: Callable[[str], qsnn.Data], name: str) -> dict[str, Any]:
    data = alone(load, name)
    share = (setting.train_images or 60_000) // len(SHARED)
    data = replace(data, train=_repeated(data.train, share))  # type: ignore[arg-type]
    own = replace(setting, data=data.name, train_images=share)
    student = student_of(own, data, W4, short_student(own))
    weight_bytes = qsnn.summary(student).weight_bytes
    return {name: qsnn.accuracy(student, data.test), "weight_bytes": weight_bytes, "n": len(data.test)}  # type: ignore[arg-type]


def multitask_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    lost = {name: mean_of(records, f"{name} alone", name) - mean_of(records, "shared", name) for name in SHARED}
    memory = sum(mean_of(records, f"{name} alone", "weight_bytes") for name in SHARED)
    ratio = mean_of(records, "shared", "weight_bytes") / memory
    shown = ", ".join(f"{name} {value:+.2f}" for name, value in lost.items())
    return (
        f"One network with {len(SHARED)} heads takes {ratio:.2f} of the memory of {len(SHARED)} networks; a network a "
        f"task is better by {shown} points."
    )
