"""load_data(): digits, torchvision's sets and folders of images, split and normalised."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qsnn.data import Data, ImageSet, hold_out, normalise
from qsnn.events import EVENTS, load_events

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


@dataclass(frozen=True, eq=False, repr=False)
class FolderSet(Dataset[tuple[Tensor, int]]):
    """Labelled RGB image files, read one at a time; an item is normalised as in `ImageSet`.

    Args:
        samples: (file, class) of each image.
        size: height and width [pixel]; another size is scaled and cut at the centre, so the aspect ratio stays.
        mean, std: mean and standard deviation of each channel, of pixels on [0, 1].
    Shape:
        an item: (3, H, W) float32 and an int.
    Raises:
        ValueError: a file is not a readable image (when the item is asked for).
    """

    samples: list[tuple[str, int]]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, normalised, and its label."""
        path, label = self.samples[index]
        pixels = torch.from_numpy(np.array(_open_rgb(path, self.size))).permute(2, 0, 1)
        return normalise(pixels, self.mean, self.std).contiguous(), label

    @property
    def black(self) -> Tensor:
        """A black pixel as an item has it, (3, 1, 1)."""
        return normalise(torch.zeros(len(self.mean), 1, 1), self.mean, self.std)

    def head(self, n: int) -> FolderSet:
        """The first n images, or all of them if there are fewer."""
        return replace(self, samples=self.samples[:n])


def load_data(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    val_fraction: float | None = None,
    image_size: int | None = None,
    timesteps: int | None = None,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Data:
    """Load a data set by its name, or a folder of images by its path.

    A folder holds ``train/CLASS/*`` and ``test/CLASS/*``, perhaps ``val/CLASS/*`` too; with ``val/`` but no ``test/``,
    ``val/`` is the test set. A folder of ``CLASS/*`` alone is split 80/10/10.

    Args:
        name: "digits" (comes with scikit-learn), "mnist", "fashion-mnist", "cifar10", the event sets "nmnist" and
            "dvsgesture" (see :mod:`qsnn.events`), or the path of a folder.
        root: where the files lie, or go when downloaded; by default $QSNN_DATA, else ~/.cache/qsnn.
        val_fraction: part of the training images held out for `val`, (0, 1), no unit; by default 5,000 images of a
            torchvision set, a tenth of digits, and of a folder its ``val/`` or a tenth.
        image_size: height and width of a folder's images [pixel]; by default those of the first one.
        timesteps: frames of a recording of an event set, one for each time step; by default 2.
        seed: chooses the images held out; never the test images. Keep it the same from teacher to student: with
            another one, `val` holds images that the teacher was trained on.
        mean, std: what is subtracted from each channel and what it is then divided by, of pixels on [0, 1], where
            a trained network wants other numbers than the data set's own; of a torchvision set.
    Raises:
        ValueError: a name that is neither known nor a folder, a damaged file, or an option out of range.
        FileNotFoundError: files that are missing and cannot be downloaded, or a folder without classes.
        ImportError: torchvision is missing, or does not fit the installed torch.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"expected 0 < val_fraction < 1, got {val_fraction}; 0.1 holds out a tenth")
    if image_size is not None and (image_size < 1 or name in NAMES):
        raise ValueError(f"expected image_size >= 1 pixel with a folder only, got {image_size} for {name}; omit it")
    if (mean is not None or std is not None) and name not in TORCHVISION:
        raise ValueError(f"expected mean and std with {', '.join(TORCHVISION)} only, got them for {name}; omit them")
    folder_of_sets = Path(root or os.environ.get("QSNN_DATA") or "~/.cache/qsnn").expanduser()
    if name in EVENTS:
        return load_events(str(name), folder_of_sets, 2 if timesteps is None else timesteps, val_fraction, seed)
    if timesteps is not None:
        raise ValueError(f"expected timesteps with an event set only ({', '.join(EVENTS)}), got it for {name}; omit it")
    if name == "digits":
        return _load_digits(val_fraction or 0.1, seed)
    if name in TORCHVISION:
        return _load_torchvision(str(name), folder_of_sets, val_fraction, seed, mean, std)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"unknown data set {str(name)!r}, and no folder of that name; use one of {', '.join(NAMES)}, "
            f"or the path of a folder with train/CLASS/*.png and test/CLASS/*.png"
        )
    return _load_folder(folder, image_size, val_fraction, seed)


def _load_digits(val_fraction: float, seed: int) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    y = digits.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(y)), test_size=0.3, stratify=y, random_state=0)
    train, val = train_test_split(rest, test_size=val_fraction, stratify=y[rest], random_state=seed)
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # they come as 0..16
    mean, std = (0.3057,), (0.3760,)  # of the 1,131 training images at seed 0
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
    name: str,
    root: Path,
    val_fraction: float | None,
    seed: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
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


def _open_rgb(path: str, size: tuple[int, int] | None = None) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some damaged PNGs
        raise ValueError(f"expected an image in {path}, cannot read it ({error}); repair or remove it") from error
    return rgb if size in (None, rgb.size[::-1]) else ImageOps.fit(rgb, size[::-1], Image.Resampling.BILINEAR)


def _load_folder(folder: Path, image_size: int | None, val_fraction: float | None, seed: int) -> Data:
    names = [part for part in ("train", "val", "test") if (folder / part).is_dir()]
    if names and ("train" not in names or len(names) == 1):
        raise ValueError(
            f"expected train/ beside test/ or val/ in {folder}, got only {'/, '.join(names)}/; "
            f"add what is missing, or use CLASS/*.png alone, which is split 80/10/10"
        )
    samples, classes = {}, {}
    for part in names or ["."]:
        try:
            found = _import_datasets().ImageFolder(folder / part)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"expected CLASS/*.png in {folder / part}, got: {error}; lay it out so") from error
        # Files come sorted by class; shuffled, the first few show every class.
        samples[part] = [found.samples[i] for i in np.random.RandomState(0).permutation(len(found.samples))]
        classes[part] = tuple(found.classes)
    if len(set(classes.values())) > 1:
        raise ValueError(f"expected the same class folders in every part of {folder}, got {classes}; make them agree")
    if not names:
        n = len(samples["."])
        keep, out = hold_out(n, round(n / 10), 0)
        samples = {"train": [samples["."][i] for i in keep], "test": [samples["."][i] for i in out]}
        val_fraction = val_fraction or 1 / 9  # of the nine tenths that are left
    train, test = samples["train"], samples.get("test") or samples["val"]
    if "test" in samples and "val" in samples and val_fraction is None:
        val = samples["val"]
    else:
        keep, out = hold_out(len(train), round(len(train) * (val_fraction or 0.1)), seed)
        train, val = [train[i] for i in keep], [train[i] for i in out]
    size = (image_size, image_size) if image_size else _open_rgb(min(train)[0]).size[::-1]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as pretrained torchvision models want them
    train_set, val_set, test_set = (FolderSet(files, size, mean, std) for files in (train, val, test))
    return Data(
        name=str(folder), train=train_set, val=val_set, test=test_set,
        mean=mean, std=std, classes=next(iter(classes.values())), augment="flip",
    )  # fmt: skip
