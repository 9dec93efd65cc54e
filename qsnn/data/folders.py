"""A folder of images as a data set: which files are in it, how they are split, and one at a time as a tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qsnn.data.images import Data, normalise, split_by_class
from qsnn.data.pixels import SUFFIXES, Header, full_scale, read_header, read_pixels
from qsnn.graph.arrived import QsnnWarning

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as pretrained torchvision models want them."""
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
"""Of one grey channel: the means of the three."""
_PARTS = {
    "train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")
}  # fmt: skip
_OTHER_FILES = 10_000
"""So many files that are no images, ten times as many as images, and a folder is not a data set."""

Samples = list[tuple[str, int]]


@dataclass(frozen=True, eq=False, repr=False)
class ImageFiles(Dataset[tuple[Tensor, Any]]):
    """Image files, read one at a time; an image is normalised as in `ImageSet`. What a label is, a subclass says.

    Args:
        samples: (file, label) of each image.
        size: height and width [pixel]; another size is scaled and cut at the centre, so the aspect ratio stays.
        mean, std: mean and standard deviation of each channel, of pixels on [0, 1]; one of each for grey, three for
            colours (a grey file then has three equal channels).
        full_scale: white in files of 16 or 32 bits.
        grey: no file holds colours, so that one channel and three hold the same.
    Raises:
        ValueError: a file is not a readable image (when the item is asked for).
    """

    samples: Sequence[tuple[str, Any]]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    full_scale: float = 65535.0
    grey: bool = False

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.samples)

    def image(self, index: int) -> Tensor:
        """One image, normalised, (C, H, W) float32."""
        path = self.samples[index][0]
        pixels = read_pixels(path, channels=len(self.mean), size=self.size, full_scale=self.full_scale)
        return normalise(pixels, self.mean, self.std).contiguous()

    @property
    def black(self) -> Tensor:
        """A black pixel as an item has it, (C, 1, 1)."""
        return normalise(torch.zeros(len(self.mean), 1, 1), self.mean, self.std)

    def head(self, n: int) -> ImageFiles:
        """The first n images, or all of them if there are fewer."""
        return replace(self, samples=self.samples[:n])


@dataclass(frozen=True, eq=False, repr=False)
class FolderSet(ImageFiles):
    """Image files with a class each.

    Shape:
        an item: (C, H, W) float32 and an int.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, normalised, and its class."""
        return self.image(index), self.samples[index][1]

    @property
    def labels(self) -> Tensor:
        """Class of each image, (N,) int64."""
        return torch.tensor([label for _, label in self.samples])


def load_folder(
    folder: Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    channels: int | None = None,
) -> Data:
    """Load a folder of images; called by :func:`qsnn.load_data`, which says what the arguments are.

    Every file's header is read; what is taken otherwise than it is stored is said once.

    Raises:
        FileNotFoundError: there are no class folders, or one without images.
        ValueError: parts or classes that do not fit together, too few images, or a file that is no readable image.
    """
    refuse_whole_disk(folder)
    parts = parts_of(folder)
    samples, classes = {}, {}
    for part, where in parts.items():
        classes[part], files = _classes_in(where)
        # Files come sorted by class; shuffled, the first few show every class.
        samples[part] = [files[i] for i in np.random.RandomState(0).permutation(len(files))]
    if len(set(classes.values())) > 1:
        raise ValueError(f"expected the same class folders in every part of {folder}, got {classes}; make them agree")
    headers = read_headers([path for files in samples.values() for path, _ in files])
    train, val, test = _split(folder, samples, val_fraction, seed)
    look = appearance(folder, headers, min(train)[0], image_size=image_size, mean=mean, std=std, channels=channels)
    sets = [FolderSet(files, **look) for files in (train, val, test)]
    return Data(
        name=str(folder), train=sets[0], val=sets[1], test=sets[2],
        mean=look["mean"], std=look["std"], classes=next(iter(classes.values())), augment="flip",
    )  # fmt: skip


def appearance(
    folder: Path,
    headers: dict[str, Header],
    first: str,
    *,
    image_size: int | tuple[int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    channels: int | None,
) -> dict[str, Any]:
    """Return how the images of a folder are shown to a network: what :class:`ImageFiles` takes beside its samples.

    Args:
        folder: what the line begins with that says what is taken otherwise than it is stored.
        headers: of every image.
        first: the image that gives the size, where none is asked for.
        image_size, mean, std, channels: see :func:`qsnn.load_data`.
    Raises:
        ValueError: mean and std that do not fit the channels.
    """
    deep = [path for path, header in headers.items() if header.deep]
    grey = all(header.grey for header in headers.values())
    _say_what_is_taken(folder, headers, scale := full_scale(deep) if deep else 65535.0)
    if channels is None:
        given = len(mean or std or ())
        # 16 bits stay with three channels, as pretrained networks want them; a network of one channel gets one
        channels = given or (1 if grey and not deep else 3)
    if image_size is None:
        size = headers[first].size
    else:
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    mean, std = mean or (MEAN if channels == 3 else GREY_MEAN), std or (STD if channels == 3 else GREY_STD)
    if channels not in (1, 3) or not len(mean) == len(std) == channels:
        raise ValueError(
            f"expected mean and std of 1 channel (grey) or 3, got mean={mean} and std={std} for {channels} channels"
        )
    return {"size": size, "mean": mean, "std": std, "full_scale": scale, "grey": grey}


def refuse_whole_disk(folder: Path) -> None:
    """Refuse a disk or a home, whose every file would be looked at.

    Raises:
        ValueError: it is one.
    """
    if folder.resolve() in (Path(folder.resolve().anchor), Path.home().resolve()):
        raise ValueError(f"expected a folder of CLASS/*.png, {folder} is a whole disk or home; give the images' own")


def with_channels(data: Data, channels: int) -> Data | None:
    """Return a folder's grey images in one channel or in three, as a network takes them; None for any other data."""
    parts = [part for part in (data.train, data.val, data.test) if isinstance(part, ImageFiles) and part.grey]
    own = all((part.mean, part.std) in ((MEAN, STD), (GREY_MEAN, GREY_STD)) for part in parts)
    if len(parts) < 3 or channels not in (1, 3) or not own:  # numbers that were asked for stay
        return None
    mean, std = (MEAN, STD) if channels == 3 else (GREY_MEAN, GREY_STD)
    train, val, test = (replace(part, mean=mean, std=std) for part in parts)
    return replace(data, train=train, val=val, test=test, mean=mean, std=std)


def parts_of(folder: Path) -> dict[str, Path]:
    """The folders of the parts by name, or "." alone; spellings like Train/ and validation/ count where two agree."""
    there = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    exact = {part: folder / part for part in _PARTS if folder / part in there}
    spelt = {
        part: entry for part, names in _PARTS.items() for entry in reversed(there) if entry.name.lower() in names
    }  # fmt: skip
    found = exact or (spelt if "train" in spelt and len(spelt) > 1 else {})
    found = {**{part: spelt[part] for part in spelt if "train" in found}, **found}
    if found and ("train" not in found or len(found) == 1):
        raise ValueError(
            f"expected train/ beside test/ or val/ in {folder}, got only {'/, '.join(found)}/; "
            f"add what is missing, or use CLASS/*.png alone, which is split 80/10/10"
        )
    return found or {".": folder}


def _classes_in(folder: Path) -> tuple[tuple[str, ...], Samples]:
    """The class folders, sorted, and every image file below each; hidden folders and files are no part of it."""
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))
    )
    if not classes:
        loose = sum(1 for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
        got = f"{loose} images without a class folder" if loose else "no folder in it"
        raise FileNotFoundError(f"expected CLASS/*.png in {folder}, got: {got}; lay it out so")
    samples: Samples = []
    for label, name in enumerate(classes):
        files = list(image_files(folder / name))
        if not files:
            raise FileNotFoundError(
                f"expected CLASS/*.png in {folder}, got: no image in {name}/ ({', '.join(SUFFIXES)}); lay it out so"
            )
        samples += [(path, label) for path in files]
    return tuple(classes), samples


def image_files(folder: Path) -> Iterator[str]:
    """Every image file below a folder, links followed once, in the order of torchvision's ImageFolder."""
    images = others = 0
    seen: set[tuple[int, int]] = set()
    for root, below, names in os.walk(folder, followlinks=True):
        place = os.stat(root)
        if (place.st_dev, place.st_ino) in seen:  # a link to a folder above
            below.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        below[:] = sorted(name for name in below if not name.startswith((".", "__")))
        for name in sorted(names):
            path = os.path.join(root, name)
            if name.lower().endswith(SUFFIXES) and not name.startswith(".") and os.path.isfile(path):
                images += 1
                yield path
            else:
                others += 1
        if others > _OTHER_FILES and others > 10 * images:
            raise ValueError(
                f"expected a folder of images, {folder} holds {others:,} other files and {images:,} images so far; "
                f"give the folder of the images alone"
            )


def read_headers(paths: list[str]) -> dict[str, Header]:
    """Return the header of each image file."""
    with warnings.catch_warnings():  # Pillow warns of what read_header refuses, and of odd tags in a file
        warnings.simplefilter("ignore")
        return {path: read_header(path) for path in paths}


def _say_what_is_taken(folder: Path, headers: dict[str, Header], scale: float) -> None:
    """One line for what is taken otherwise than it is stored."""
    kinds = {
        f"of 16 or 32 bits: {scale:g} is white": sum(header.deep for header in headers.values()),
        "with transparency: they are laid on white": sum(header.alpha for header in headers.values()),
        "of 16 bits a colour: the upper 8 are kept": sum(header.halved for header in headers.values()),
        "animated: the first image counts": sum(header.animated for header in headers.values()),
    }
    said = "; ".join(f"{count:,} of {len(headers):,} images are {what}" for what, count in kinds.items() if count)
    if said:
        warnings.warn(f"{folder}: {said}", QsnnWarning, stacklevel=4)


def _split(
    folder: Path, samples: dict[str, Samples], val_fraction: float | None, seed: int
) -> tuple[Samples, Samples, Samples]:
    """Training, validation and test files; what is missing is taken from each class alike."""

    def held_out(files: Samples, fraction: float, seed: int, what: str) -> tuple[Samples, Samples]:
        labels = np.array([label for _, label in files])
        if len(files) <= len(set(labels)):
            raise ValueError(
                f"expected an image of each class to train on and more to {what}, {folder} has {len(files)} images of "
                f"{len(set(labels))} classes left for both; add images, 3 or more of each class"
            )
        keep, out = split_by_class(labels, fraction, seed)
        return [files[i] for i in keep], [files[i] for i in out]

    if "." in samples:
        train, test = held_out(samples["."], 0.1, 0, "test and validate")
        val_fraction = val_fraction or 1 / 9  # of the nine tenths that are left
    else:
        train, test = samples["train"], samples.get("test") or samples["val"]
        if "test" in samples and "val" in samples and val_fraction is None:
            return train, samples["val"], test
    train, val = held_out(train, val_fraction or 0.1, seed, "validate")
    return train, val, test
