"""Noise, blur, occlusion, shift: accuracy of teacher, QANN and student against their strength."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from figures import panels
from setting import W4, Load, Row, Setting, cached, first_of, mean_of, qann_of, short_student, student_of, teacher_of
from torch import nn
from torchvision.transforms import v2

import qsnn
from qsnn.data.images import ImageSet
from qsnn.report.records import Record

QUESTION = "Does the spiking net generalize better?"
SIZE = "first 2,000 test images"
FIGURE = panels({
    "noise": "noise: σ, pixels on [0, 1]", "blur": "blur: σ [pixel]", "occlusion": "occlusion: part of the area",
    "shift": "shift: up to so many pixels each way",
})  # fmt: skip


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


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Accuracy against strength, first 2,000 test images; each trained for as many epochs in all."""
    data = load(setting.data)
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
    test = first_of(data)
    found = {f"strength {s:g}": qsnn.accuracy(model, worsened(test, kind, s)) for s in STRENGTHS[kind]}
    return {**found, "n": len(test)}


def answer(records: Sequence[Record]) -> str:
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
