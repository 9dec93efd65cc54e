"""Arrays in memory as a data set: feature vectors, signals or images, with classes or with numbers to predict."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from qsnn.data.images import Data, ImageSet, split_by_class

Pair = tuple[Any, Any]
"""Inputs and targets."""
_FILE_NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("X_{}", "y_{}"), ("{}_x", "{}_y"))
"""How .npz files name the arrays of a part."""


class TableSet(ImageSet):
    r"""Float inputs in memory with classes or numbers; an item is :math:`((x - \mathrm{mean}) / \mathrm{std}, y)`.

    Args:
        images: the inputs, as they are.
        labels: int64 classes, or float32 targets.
        mean, std: of each feature of a vector, of each channel of a signal or an image.
    Shape:
        images: (N, F), (N, C, L) or (N, C, H, W); labels: (N, *); an item: one of the inputs, float32, and its label.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Check and keep; nothing is copied."""
        if not len(images) or len(labels) != len(images) or not len(mean) == len(std) == images.shape[1]:
            raise ValueError(
                f"expected inputs (N, F) or (N, C, ...) with N labels, and mean and std of each feature or channel, "
                f"got {tuple(images.shape)}, {len(labels)} labels, {len(mean)} and {len(std)}"
            )
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """One input, normalised, and its class, or its targets."""
        image, label = self.normalise(self.images[index : index + 1])[0], self.labels[index]
        return image, label if label.dim() or label.is_floating_point() else int(label)

    def normalise(self, images: Tensor) -> Tensor:
        """Inputs as a network sees them, float32, of the same shape."""
        shape = (-1, *[1] * (images.dim() - 2))
        mean, std = (
            torch.tensor(a, dtype=torch.float32, device=images.device).view(shape) for a in (self.mean, self.std)
        )
        return (images.float() - mean) / std

    def _like(self, images: Tensor, labels: Tensor) -> TableSet:
        return TableSet(images, labels, self.mean, self.std)


def from_arrays(
    inputs: Any,
    targets: Any = None,
    *,
    val: Pair | Dataset[Any] | None = None,
    test: Pair | Dataset[Any] | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    name: str = "arrays",
    seed: int = 0,
) -> Data:
    r"""Return arrays as a data set of three parts, normalised by the training part's own numbers.

    Args:
        inputs: NumPy arrays, tensors, or a ``TensorDataset`` of inputs and targets. Bytes (uint8) are images with
            pixels 0 to 255; any other numbers are taken as they are.
        targets: whole numbers are classes 0 to K - 1, of each input, or in a map of each pixel (there 255 is left out);
            floats are numbers to predict (regression).
        val, test: (inputs, targets) held out; by default a part of the first two, the same of each class.
        val_fraction, test_fraction: how large that part is, (0, 1); of what is left for training, and of all.
        mean, std: of each feature or channel (of pixels: on [0, 1]); by default of the training part.
        classes: names by class; by default the numbers.
        name: shown in reports.
        seed: chooses the validation part; never the test part.
    Shape:
        inputs: (N, F), (N, C, L), (N, C, H, W), or images of bytes (N, H, W) or (N, H, W, C) too; targets: (N,),
        (N, 1) classes, (N, H, W) or (N, L) maps of classes, or (N, *) floats.
    Raises:
        ValueError: shapes or numbers that do not fit together, NaN, or too few items of a class.

    >>> import numpy as np
    >>> rows = np.random.RandomState(0).randn(100, 8)
    >>> data = from_arrays(rows, (rows[:, 0] > 0).astype(int))
    >>> data
    Data(arrays: 81 train, 9 val, 10 test vectors of 8, 2 classes)
    """
    x, y = _pair(inputs if targets is None else (inputs, targets), name)
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part, given, fraction, chosen in (("test", test, test_fraction, 0), ("val", val, val_fraction, seed)):
        if given is not None:
            parts[part] = _pair(given, f"{name}, {part}")
            continue
        keep, out = _halves(y, fraction, chosen, name, part)
        parts[part], (x, y) = (x[out], y[out]), (x[keep], y[keep])
    parts["train"] = x, y
    if len({(tuple(a.shape[1:]), a.dtype, b.is_floating_point()) for a, b in parts.values()}) > 1:
        got = {part: (tuple(a.shape), str(a.dtype), str(b.dtype)) for part, (a, b) in parts.items()}
        raise ValueError(f"expected inputs of one shape and kind in every part of {name}, got {got}")
    if not y.is_floating_point():
        seen = torch.cat([b[b != 255] if b.dim() > 1 else b for _, b in parts.values()])
        count, lowest = int(seen.max()) + 1, int(seen.min())
        if lowest < 0 or (classes is not None and len(classes) < count):
            want = "0 and up" if classes is None else f"0 to {len(classes) - 1}"
            raise ValueError(f"expected classes {want} in {name}, got {lowest} to {count - 1}")
        classes = tuple(map(str, range(count))) if classes is None else tuple(classes)
    numbers = (x.double() / 255 if x.dtype == torch.uint8 else x.double()).transpose(0, 1).flatten(1)
    found_std = numbers.std(1, correction=0)
    found_std[found_std == 0] = 1.0  # a feature that never changes
    m = tuple(numbers.mean(1).tolist()) if mean is None else tuple(mean)
    s = tuple(found_std.tolist()) if std is None else tuple(std)
    kind = ImageSet if x.dtype == torch.uint8 else TableSet
    train, held, tested = (kind(*parts[part], m, s) for part in ("train", "val", "test"))
    return Data(name=name, train=train, val=held, test=tested, mean=m, std=s, classes=tuple(classes or ()))


def load_table(path: Path, **options: Any) -> Data:
    """Read a ``.npz`` file; called by :func:`qsnn.load_data`.

    Its arrays are ``x`` and ``y``, or ``x_train``, ``y_train``, ``x_test``, ``y_test`` (with ``x_val``, ``y_val``), or
    ``train_images``, ``train_labels`` and so on. Pickled objects are never read.

    Raises:
        ValueError: no such file of arrays, other names, or see :func:`from_arrays`.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ValueError(f"expected arrays in {path}, cannot read it ({error}); write it with numpy.savez") from error
    for x, y in (("x", "y"), ("X", "y")):
        if x in arrays and y in arrays:
            return from_arrays(arrays[x], arrays[y], name=str(path), **options)
    for x, y in _FILE_NAMES:
        parts = {
            part: (arrays[x.format(part)], arrays[y.format(part)])
            for part in ("train", "val", "test") if x.format(part) in arrays and y.format(part) in arrays
        }  # fmt: skip
        if "train" in parts:
            inputs, targets = parts["train"]
            val, test = parts.get("val"), parts.get("test")
            return from_arrays(inputs, targets, val=val, test=test, name=str(path), **options)
    raise ValueError(
        f"expected arrays x and y, or x_train, y_train, x_test and y_test in {path}, got {', '.join(arrays) or 'none'}"
    )


def _pair(given: Any, name: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets as tensors: uint8 images (N, C, H, W), or float32; int64 classes, or float32 targets."""
    if isinstance(given, TensorDataset):
        given = given.tensors
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"expected inputs and targets in {name}, got {type(given).__name__}; pass both")
    try:
        x, y = (torch.as_tensor(array if isinstance(array, Tensor) else np.array(array)) for array in given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected arrays of numbers in {name}, got: {error}") from error
    if x.is_complex() or y.is_complex():
        raise ValueError(f"expected real numbers in {name}, got complex ones; pass their parts as channels")
    if x.dtype == torch.uint8 and x.dim() in (3, 4):
        if x.dim() == 3:
            x = x[:, None]
        elif x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
            x = x.permute(0, 3, 1, 2).contiguous()
    else:
        x = x.float()
    if y.dim() == 2 and y.shape[1] == 1 and not y.is_floating_point():
        y = y[:, 0]
    y = y.float() if y.is_floating_point() else y.long()
    fits = y.is_floating_point() or y.dim() == 1 or (x.dim() > 2 and y.shape[1:] == x.shape[2:])
    if x.dim() not in (2, 3, 4) or not len(x) or len(x) != len(y) or not fits:
        raise ValueError(
            f"expected inputs (N, F), (N, C, L) or (N, C, H, W) and a class, a map or numbers for each in {name}, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    for what, tensor in (("inputs", x), ("targets", y)):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            row = int(
                (~tensor.isfinite()).flatten(1 if tensor.dim() > 1 else 0).reshape(len(tensor), -1).any(1).nonzero()[0]
            )
            raise ValueError(f"expected finite {what} in {name}, got NaN or inf, first in row {row}; fill or drop them")
    return x, y


def _halves(y: Tensor, fraction: float, seed: int, name: str, part: str) -> tuple[Tensor, Tensor]:
    if not 0 < fraction < 1:
        raise ValueError(f"expected 0 < {part}_fraction < 1, got {fraction}; 0.1 holds out a tenth")
    labels = np.zeros(len(y), dtype=int) if y.is_floating_point() or y.dim() > 1 else y.numpy()
    try:
        keep, out = split_by_class(labels, fraction, seed)
    except ValueError as error:
        raise ValueError(f"cannot hold out a {part} part of {name}: {error}; pass {part}=(inputs, targets)") from error
    return torch.from_numpy(keep), torch.from_numpy(out)
