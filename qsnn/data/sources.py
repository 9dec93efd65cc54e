"""load_data(): digits, torchvision's sets, event sets, folders of images and files of arrays, split and normalised."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qsnn.data.events import EVENTS, load_events
from qsnn.data.folders import load_folder
from qsnn.data.images import Data, ImageSet, hold_out
from qsnn.data.masks import find_masks, load_masks
from qsnn.data.tables import load_table
from qsnn.options import Seed, as_numbers, check_option, expect, seen

# name: torchvision's class, mean and standard deviation of the training pixels on [0, 1], augmentation in training
TORCHVISION: dict[str, tuple[str, tuple[float, ...], tuple[float, ...], str]] = {
    "mnist": ("MNIST", (0.1307,), (0.3081,), "shift"),
    "fashion-mnist": ("FashionMNIST", (0.2860,), (0.3530,), "flip+shift"),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "flip+shift"),
}
NAMES = ("digits", *TORCHVISION, *EVENTS)

# md5 of the unpacked files: torchvision checks only the .gz it downloads, so a file damaged later would go unnoticed.
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_IDX_MD5 = {
    "MNIST": "6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624 "
    "2646ac647ad5339dbf082846283269ea 27ae3e4e09519cfbb04c329615203637",
    "FashionMNIST": "f4a8712d7a061bf5bd6d2ca38dc4d50a 9018921c3c673c538a1fc5bad174d6f9 "
    "8181f5470baa50b63fa0f6fddb340f0a 15d484375f8d13e6eb1aabb0c3f46965",
}


def load_data(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    val_fraction: float | None = None,
    image_size: int | tuple[int, int] | None = None,
    timesteps: int | None = None,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    channels: int | None = None,
) -> Data:
    """Load a data set by its name, or a folder of images or a file of arrays by its path.

    A folder holds ``train/CLASS/*`` and ``test/CLASS/*``, perhaps ``val/CLASS/*`` too; with ``val/`` but no ``test/``,
    ``val/`` is the test set. A folder of ``CLASS/*`` alone is split 80/10/10, each class alike. Images of 16 bits keep
    their content, transparency is laid on white, of an animation the first image counts; each is said once.
    For segmentation a folder holds ``images/*`` and ``masks/*`` of equal names (both perhaps within ``train/`` and
    ``test/``, or with these inside): grey or palette masks of class numbers, where 255 counts nowhere, or 0 and 255.

    Args:
        name: "digits" (comes with scikit-learn), "mnist", "fashion-mnist", "cifar10", the event sets "nmnist" and
            "dvsgesture" (see :mod:`qsnn.data.events`), or the path of a folder, or of a ``.npz`` file
            (:func:`qsnn.from_arrays`).
        root: where the files lie, or go when downloaded; by default $QSNN_DATA, else ~/.cache/qsnn.
        val_fraction: part of the training images held out for `val`, (0, 1), no unit; by default 5,000 images of a
            torchvision set, a tenth of digits, and of a folder its ``val/`` or a tenth.
        image_size: height and width of a folder's images, or one number for both [pixel]; by default those of the
            first one.
        timesteps: frames of a recording of an event set, one for each time step; by default 2.
        seed: chooses the images held out; never the test images. Keep it the same from teacher to student: with
            another one, `val` holds images that the teacher was trained on.
        mean, std: what is subtracted from each channel and what it is then divided by, of pixels on [0, 1], where a
            trained network wants other numbers than the data set's own.
        channels: of a folder's images, 1 or 3; by default 1 where all are grey with 8 bits, else 3.
    Raises:
        ValueError: a name that is neither known nor a folder, a damaged file, or an option out of range.
        FileNotFoundError: files that are missing and cannot be downloaded, or a folder without classes.
        ImportError: torchvision is missing, or does not fit the installed torch.

    >>> load_data("digits")
    Data(digits: 1,131 train, 126 val, 540 test images of 1x8x8, 10 classes)
    """
    expect("load_data('digits')", "name", name, (str, os.PathLike))
    if val_fraction is not None and not (isinstance(val_fraction, int | float) and 0 < val_fraction < 1):
        raise ValueError(f"expected 0 < val_fraction < 1, got {seen(val_fraction)}; 0.1 holds out a tenth")
    sizes = () if image_size is None else (image_size,) if isinstance(image_size, int) else image_size
    if (image_size is not None and len(sizes) not in (1, 2)) or min(sizes, default=1) < 1 or (sizes and name in NAMES):
        raise ValueError(f"expected image_size >= 1 pixel with a folder only, got {image_size} for {name}; omit it")
    if channels is not None and (channels not in (1, 3) or name in NAMES):
        raise ValueError(f"expected channels=1 or 3 with a folder only, got {channels} for {name}; omit it")
    mean, std = as_numbers("mean", mean), as_numbers("std", std)
    if std is not None and min(std) <= 0:
        raise ValueError(f"expected finite mean and std > 0, got mean={mean} and std={std}")
    check_option("seed", seed, Seed)
    folder_of_sets = Path(root or os.environ.get("QSNN_DATA") or "~/.cache/qsnn").expanduser()
    if name in EVENTS:
        if mean is not None or std is not None:
            raise ValueError(f"{name} holds counts of events, which have no mean and std of pixels; omit both")
        return load_events(str(name), folder_of_sets, 2 if timesteps is None else timesteps, val_fraction, seed)
    if timesteps is not None:
        raise ValueError(f"expected timesteps with an event set only ({', '.join(EVENTS)}), got it for {name}; omit it")
    if name == "digits":
        return _load_digits(val_fraction or 0.1, seed, mean, std)
    if name in TORCHVISION:
        return _load_torchvision(str(name), folder_of_sets, val_fraction, seed, mean, std)
    path = Path(name).expanduser()
    if path.is_dir():
        options: dict[str, Any] = {"mean": mean, "std": std, "channels": channels, "image_size": image_size}
        options |= {"val_fraction": val_fraction, "seed": seed}
        pairs = find_masks(path)
        return load_folder(path, **options) if pairs is None else load_masks(path, pairs, **options)
    if path.suffix == ".npz" and path.is_file() and not sizes and channels is None:
        return load_table(path, val_fraction=val_fraction or 0.1, seed=seed, mean=mean, std=std)
    raise ValueError(
        f"unknown data set {str(name)!r}, and no folder of that name; use one of {', '.join(NAMES)}, "
        f"or the path of a folder with train/CLASS/*.png and test/CLASS/*.png, or images/ and masks/, or of a .npz "
        f"file of arrays"
    )


def load_recorded(
    recorded: Mapping[str, Any],
    shape: Sequence[int] | None,
    *,
    root: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Data:
    """Load the data set that a network was made for as it was then: frames, normalisation, channels and image size.

    Args:
        recorded: what its checkpoint says of the data (:func:`qsnn.graph.recipe.data_recipe`).
        shape: of one image, as recorded.
        root: where the sets lie; see :func:`load_data`.
        folder: in the place of a recorded folder.
    Raises:
        ValueError: see :func:`load_data`.
    """
    name = recorded["name"] if folder is None else folder
    options: dict[str, Any] = {"timesteps": recorded.get("frames")}
    if name not in EVENTS:
        options |= {key: tuple(recorded[key]) for key in ("mean", "std") if recorded.get(key)}
        if name not in NAMES and shape is not None and len(shape) == 3 and Path(name).expanduser().is_dir():
            options |= {"channels": shape[0], "image_size": tuple(shape[1:])}
    return load_data(name, root=root, **options)


Numbers = tuple[float, ...] | None


def _load_digits(val_fraction: float, seed: int, mean: Numbers, std: Numbers) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    y = digits.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=val_fraction, stratify=y[rest], random_state=seed)
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # they come as 0..16
    mean, std = mean or (0.3057,), std or (0.3760,)  # of the 1,131 training images at seed 0
    images = ImageSet(torch.from_numpy(pixels), torch.from_numpy(y), mean, std)
    return Data(
        name="digits", train=images.subset(train), val=images.subset(val), test=images.subset(test),
        mean=mean, std=std, classes=tuple("0123456789"),
    )  # fmt: skip


def _import_datasets() -> ModuleType:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: operator torchvision::nms does not exist
        raise ImportError(
            f"expected a torchvision that fits torch {torch.__version__}, got: {error}; install both in one command "
            f"from one index, for example pip install --upgrade torch torchvision"
        ) from error
    return datasets


def _load_torchvision(
    name: str, root: Path, val_fraction: float | None, seed: int, mean: Numbers, std: Numbers
) -> Data:
    class_name, own_mean, own_std, augment = TORCHVISION[name]
    mean, std = mean or own_mean, std or own_std
    images = []
    for source in _read_torchvision(getattr(_import_datasets(), class_name), name, root):
        pixels = torch.as_tensor(source.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        images.append(ImageSet(pixels, torch.as_tensor(source.targets), mean, std))
        classes = tuple(label.partition(" - ")[0] for label in source.classes)  # MNIST's are "0 - zero"
    n = len(images[0])
    train, val = hold_out(n, 5000 if val_fraction is None else round(n * val_fraction), seed)
    return Data(
        name=name, train=images[0].subset(train), val=images[0].subset(val), test=images[1],
        mean=mean, std=std, classes=classes, augment=augment,
    )  # fmt: skip


def _read_torchvision(source: Any, name: str, root: Path) -> tuple[Any, Any]:
    """The training and the test part as torchvision reads them; only what is missing is downloaded."""
    from torchvision.datasets.utils import check_md5

    if name == "cifar10":
        folder, packed = root / source.base_folder, f"{source.filename} into {root}"
        md5 = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])
    else:
        folder = root / source.__name__ / "raw"
        packed = "the same with .gz at the end"
        md5 = dict(zip(_IDX, _IDX_MD5[source.__name__].split(), strict=True))
    missing = [file for file in md5 if not (folder / file).is_file()]
    if missing:
        try:
            source(root, download=True)
        except Exception as error:  # URLError, RuntimeError, EOFError, ...: torchvision names no common class
            raise FileNotFoundError(
                f"expected {name} in {folder}, but {', '.join(missing)} cannot be found there nor downloaded "
                f"({' '.join(str(error).split())}); put {', '.join(md5)} into {folder} (or {packed}), or set QSNN_DATA "
                f"or --data-root to the folder that holds {folder.relative_to(root).parts[0]}/"
            ) from error
    broken = [str(folder / file) for file in md5 if not check_md5(folder / file, md5[file])]
    if broken:
        raise ValueError(
            f"expected the published files of {name}, but {', '.join(broken)} has another md5 sum (cut short or "
            f"changed); delete it to have it downloaded again, or put an intact copy there"
        )
    with warnings.catch_warnings():  # the pickles of CIFAR-10 are older than what numpy wants of dtype(align=...)
        warnings.simplefilter("ignore", category=np.exceptions.VisibleDeprecationWarning)
        return source(root, train=True), source(root, train=False)
