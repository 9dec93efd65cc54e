"""Labelled images: how a data set is held, normalised and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

IGNORED = 255
"""A pixel with this label, or one below 0, is not drawn into loss or score."""


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels 0..255 of any dtype, (..., C, H, W), to normalised float32."""
    m, s = (torch.tensor(a, dtype=torch.float32, device=images.device).view(-1, 1, 1) for a in (mean, std))
    return images.float().div(255).sub_(m).div_(s)


class ImageSet(Dataset[tuple[Tensor, Any]]):
    r"""Labelled images in memory, one byte a pixel; an item is :math:`((x / 255 - \mathrm{mean}) / \mathrm{std}, y)`.

    Args:
        images: pixels 0 to 255, uint8.
        labels: class of each image or of each pixel, int64; or numbers to predict, float32.
        mean, std: mean and standard deviation of each channel, of pixels on [0, 1].
    Shape:
        images: (N, C, H, W), N >= 1; labels: (N,), (N, H, W) or (N, \*); an item: (C, H, W) float32 and its label.
    Raises:
        ValueError: a dtype, a shape or a number of channels that differs from the above.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Check and keep; nothing is copied."""
        if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
            raise ValueError(
                f"expected uint8 images of shape (N, C, H, W) with N >= 1, got {images.dtype} {tuple(images.shape)}; "
                f"pass pixels 0..255, not yet normalised"
            )
        whole = labels.dtype == torch.int64 and labels.shape in (images.shape[:1], images[:, 0].shape)
        if not whole and (labels.dtype != torch.float32 or labels.shape[:1] != images.shape[:1]):
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"expected int64 labels of shape ({len(images)},), got {got}; pass one class an image")
        if not len(mean) == len(std) == images.shape[1] or min(std) <= 0:
            raise ValueError(f"expected mean and std > 0 of {images.shape[1]} channels, got mean={mean}, std={std}")
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """One image, normalised, and its class; or its map or numbers, a tensor."""
        label = self.labels[index]
        return self.normalise(self.images[index]), label if label.dim() or label.is_floating_point() else int(label)

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels 0..255 as a model sees them: (..., C, H, W) uint8 to float32."""
        return normalise(images, self.mean, self.std)

    def subset(self, indices: Tensor | Sequence[int] | np.ndarray | slice) -> ImageSet:
        """The images at these places, in this order; a slice shares memory, anything else copies."""
        at = indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.int64)
        return self._like(self.images[at], self.labels[at])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same images on a device, where batches are then made."""
        return self._like(self.images.to(device), self.labels.to(device))

    def _like(self, images: Tensor, labels: Tensor) -> ImageSet:
        return ImageSet(images, labels, self.mean, self.std)

    def head(self, n: int) -> ImageSet:
        """The first n images, or all of them if there are fewer."""
        return self.subset(slice(n))


@dataclass(frozen=True, kw_only=True, repr=False)
class Data:
    """A data set in three parts: train on `train`, choose on `val`, report on `test`."""

    name: str
    """What `load_data` was asked for."""
    train: Dataset[Any]
    """Training images; items are (image, label)."""
    val: Dataset[Any]
    """Images held out of training: every choice is made on these."""
    test: Dataset[Any]
    """Test images; their labels are for the final number only."""
    mean: tuple[float, ...]
    """What was subtracted from each channel, of pixels on [0, 1]."""
    std: tuple[float, ...]
    """What each channel was then divided by."""
    classes: tuple[str, ...]
    """Name of each class, by label."""
    augment: str = "none"
    """How `batches` varies the training images: "none", "flip", "shift" or "flip+shift"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image or of one frame, (C, L) of a signal, (F,) of a vector."""
        return tuple(_first_image(self.train).shape[-3:])

    @property
    def frames(self) -> int | None:
        """Frames of a recording, one for each time step; None for images."""
        item = _first_image(self.train)
        return int(item.shape[0]) if item.dim() == 4 else None

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    @property
    def outputs(self) -> int | None:
        """Number of answers a network gives: one a class (of a map: for each pixel), or one a number to predict."""
        label = self.train[0][1]
        return self.num_classes or (label.numel() if isinstance(label, Tensor) and label.dim() < 2 else None)

    def __repr__(self) -> str:
        """Name, number of images, shape and classes, in one line."""
        sizes = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in ("train", "val", "test"))
        what = {1: "vectors of", 2: "signals of"}.get(len(self.shape), "images of")
        what = what if self.frames is None else f"recordings of {self.frames} frames of"
        label = self.train[0][1]
        what = "images with masks of" if self.classes and isinstance(label, Tensor) and label.dim() > 1 else what
        answers = f"{self.num_classes} classes" if self.classes else "numbers to predict"
        return f"Data({self.name}: {sizes} {what} {'x'.join(map(str, self.shape))}, {answers})"


def _first_image(part: Any) -> Tensor:
    try:
        image = part[0][0]
    except (TypeError, IndexError, KeyError):
        image = None
    if not isinstance(image, Tensor) or not image.dim():
        got = f"{type(part).__name__} with {type(image).__name__} in it"
        raise ValueError(f"expected data.train to be a Dataset of (image, label) with at least one image, got {got}")
    return image


def hold_out(n: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of n items in two parts, the second of ``count``, chosen by the seed."""
    order = np.random.RandomState(seed).permutation(n)  # RandomState is frozen: a split survives numpy's next version
    count = min(max(count, 1), n - 1)
    return order[: n - count], order[n - count :]


def split_by_class(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices in two parts, the second with the same ``fraction`` of every class (stratified), chosen by the seed.

    A class of three or more gives at least one item to each part, and every class keeps one in the first; where no
    class has so many, the second part gets one item of the largest class.

    Args:
        labels: class of each item.
        fraction: of each class that goes into the second part, (0, 1).
        seed: chooses the items, and their order.
    Raises:
        ValueError: there is no item beyond one of each class.
    """
    random = np.random.RandomState(seed)  # RandomState is frozen: a split survives numpy's next version
    order = random.permutation(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    if len(labels) <= len(classes):
        raise ValueError(f"expected more items than classes to split, got {len(labels)} of {len(classes)} classes")
    take = np.minimum(np.maximum((counts * fraction + 0.5).astype(int), counts >= 3), counts - 1)
    if not take.any():
        take[counts.argmax()] = 1
    out = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes, take, strict=True):
        out[order[labels[order] == label][:count]] = True
    return order[~out[order]], order[out[order]]


def first_of(part: Any, n: int) -> Any:
    """The first n items of a data set, or all of them if there are fewer."""
    return part.head(n) if hasattr(part, "head") else Subset(part, range(min(n, len(part))))
