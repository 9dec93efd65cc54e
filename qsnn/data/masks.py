"""A folder of images with masks as a data set: a class for each pixel, from grey, palette or black and white files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsnn.data.folders import ImageFiles, appearance, image_files, parts_of, read_headers, refuse_whole_disk
from qsnn.data.images import IGNORED, Data, hold_out
from qsnn.data.pixels import DEEP, SUFFIXES, opened_image

_IMAGES, _MASKS = ("images", "image", "imgs", "img"), ("masks", "mask", "labels", "annotations")
_SCANNED = 2000
"""So many masks are read to see which classes there are, evenly spread; what differs elsewhere is refused when read."""
_MOST_CLASSES = 200
"""More are no classes, but a photograph, or edges that were smoothed."""
_SPREAD = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies grey values of 2 and 4 bits by."""

Pairs = list[tuple[str, str]]


@dataclass(frozen=True, eq=False, repr=False)
class MaskSet(ImageFiles):
    """Image files with a mask file each; a mask is scaled and cut as its image is, by the nearest pixel.

    Args:
        samples: (image, mask) files.
        classes: K; a pixel of 255 counts nowhere.
        white: masks hold 0 and 255, which are the classes 0 and 1.
        shares: of the pixels of all masks, those of each class [1]; what is left is 255.
    Shape:
        an item: (C, H, W) float32 and (H, W) int64.
    Raises:
        ValueError: a file that cannot be read, or with another number (when the item is asked for).
    """

    classes: int = 2
    white: bool = False
    shares: tuple[float, ...] = ()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image, normalised, and the class of each of its pixels."""
        path = self.samples[index][1]
        values = read_mask(path, self.size)
        allowed = (values == 0) | (values == 255) if self.white else (values < self.classes) | (values == IGNORED)
        if not allowed.all():
            want = "0 and 255" if self.white else f"0 to {self.classes - 1}, and {IGNORED} where no class counts"
            raise ValueError(f"expected a mask of {want} in {path}, as the others are, got {values[~allowed][0]}")
        return self.image(index), torch.from_numpy(values // 255 if self.white else values)

    @property
    def told(self) -> str:
        """What the masks hold, in one line."""
        shown = sorted(range(self.classes), key=lambda i: -self.shares[i])[:10]
        line = ", ".join(f"{i} {100 * self.shares[i]:.1f} %" for i in sorted(shown))
        more = f", and {self.classes - 10} rarer ones" if self.classes > 10 else ""
        ignored = 1 - sum(self.shares)
        where = "; 0 is class 0, and 255 is class 1" if self.white else ""
        left = f"; {100 * ignored:.1f} % are {IGNORED} and count nowhere" if ignored > 1e-9 else ""
        return f"masks: share of each class in the pixels: {line}{more}{left}{where}"


def find_masks(folder: Path) -> dict[str, Pairs] | None:
    """Return the (image, mask) files of each part of a folder, "." where it has no parts; None: it has no masks.

    Args:
        folder: holds ``images/`` and ``masks/`` with equal names, or ``train/images/`` and so on, or ``images/train/``
            and so on. A mask may end in another suffix, or in ``_mask``.
    Raises:
        FileNotFoundError: a mask or an image is missing.
        ValueError: it is not clear which belongs to which.
    """
    refuse_whole_disk(folder)
    both = _both(folder)
    if both is not None:
        others = [name for name in _folders(folder) if folder / name not in both]
        others = [name for name in others if next(image_files(folder / name), None)]
        if others:
            raise ValueError(
                f"{folder} holds images with masks and also {others[0]}/ with images; if all are classes, rename "
                f"{both[0].name}/, else move {others[0]}/ elsewhere"
            )
        parts = parts_of(both[0])
        return {part: _pairs(where, _same_part(both[1], where.name, part)) for part, where in parts.items()}
    parts = {} if not _folders(folder) else parts_of(folder)
    found = {part: _both(where) for part, where in parts.items() if part != "."}
    if not any(found.values()):
        return None
    for part, pair in found.items():
        if pair is None:
            raise FileNotFoundError(f"expected images/ and masks/ in {parts[part]}, as in the other parts; add them")
    return {part: _pairs(*pair) for part, pair in found.items() if pair is not None}


def load_masks(
    folder: Path,
    pairs: dict[str, Pairs],
    *,
    image_size: int | tuple[int, int] | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    channels: int | None = None,
) -> Data:
    """Load a folder of images with masks; called by :func:`qsnn.load_data`, which says what the arguments are.

    Masks of 0 and 255 alone are of two classes; in any other 255 is left out of loss and score.

    Args:
        folder: names the data set.
        pairs: from :func:`find_masks`.
        image_size, val_fraction, seed, mean, std, channels: see :func:`qsnn.load_data`.
    Raises:
        ValueError: sizes that differ between an image and its mask, numbers that are no classes, too few pairs, or a
            file that is no readable image.
    """
    files = sorted(pair for part in pairs.values() for pair in part)
    headers = read_headers([image for image, _ in files])
    mask_headers = read_headers([mask for _, mask in files])
    differ = [pair for pair in files if headers[pair[0]].size != mask_headers[pair[1]].size]
    if differ:
        (image, mask), count = differ[0], len(differ)
        sizes = ["x".join(map(str, size)) for size in (headers[image].size, mask_headers[mask].size)]
        more = f" (and {count - 1} more)" if count > 1 else ""
        raise ValueError(
            f"expected a mask of its image's size, {sizes[0]} of {image}, got {sizes[1]} in {mask}{more}; scale it, by "
            f"the nearest pixel"
        )
    found = _classes_in([mask for _, mask in files], folder)
    train, val, test = _split(folder, pairs, val_fraction, seed)
    first = min(train)[0]
    look = appearance(folder, headers, first, image_size=image_size, mean=mean, std=std, channels=channels)
    sets = [MaskSet(part, **look, **found) for part in (train, val, test)]
    return Data(
        name=str(folder), train=sets[0], val=sets[1], test=sets[2], mean=look["mean"], std=look["std"],
        classes=tuple(map(str, range(found["classes"]))), augment="flip",
    )  # fmt: skip


def read_mask(path: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read the numbers of a mask: grey values, or places in the palette; white of one bit is 255.

    Args:
        path: the file.
        size: height and width [pixel]; another size is scaled by the nearest pixel and cut at the centre.
    Shape:
        returns (H, W) int64.
    Raises:
        ValueError: no readable image, or one whose pixels are no numbers (colours, transparency, JPEG).
    """
    from PIL import Image, ImageOps

    wrong = ""
    values: np.ndarray = np.zeros((1, 1), dtype=np.int64)
    with opened_image(path) as image:
        raw = str(image.tile[0][3]) if image.tile else ""
        if image.format in ("JPEG", "MPO"):
            wrong = "a JPEG, which changes numbers; save masks as PNG"
        elif image.mode in ("1", "L", "P", *DEEP) and image.mode != "F":
            values = np.array(image).astype(np.int64) * (255 if image.mode == "1" else 1)
            if not np.isin(values, (0, 255)).all():  # black and white stays so in any number of bits
                values //= next((spread for bits, spread in _SPREAD.items() if bits in raw), 1)
        elif image.mode in ("LA", "RGB", "RGBA"):
            pixels = np.array(image).astype(np.int64)
            colours = pixels[..., : {"LA": 1}.get(image.mode, 3)]
            if image.mode != "RGB" and not (pixels[..., -1] == 255).all():
                wrong = "one that is partly transparent"
            elif not (colours == colours[..., :1]).all():
                wrong = "colours; save the class numbers as a grey or palette PNG"
            values = colours[..., 0]
        else:
            wrong = f"an image of mode {image.mode}"
    if wrong or values.min() < 0:
        raise ValueError(f"expected a mask whose pixels are class numbers in {path}, got {wrong or values.min()}")
    if size not in (None, values.shape):
        numbers: Any = Image.fromarray(values.astype(np.int32))
        numbers = ImageOps.fit(numbers, size[::-1], Image.Resampling.NEAREST)  # type: ignore[index]
        values = np.array(numbers).astype(np.int64)
    return values


def _classes_in(masks: list[str], folder: Path) -> dict[str, Any]:
    """K, whether the masks are black and white, and the share of each class: what :class:`MaskSet` takes."""
    counts = np.zeros(65536, dtype=np.int64)
    for path in masks[:: max(1, -(-len(masks) // _SCANNED))]:
        counts += np.bincount(read_mask(path).clip(max=65535).ravel(), minlength=65536)
    values = np.flatnonzero(counts)
    white = values.tolist() == [0, IGNORED]
    numbers = np.array([0, 1]) if white else values[values != IGNORED]
    top = int(numbers.max(initial=0))
    # few and far apart: shades for the eye, like 0, 85 and 170
    if top == 0 or top >= _MOST_CLASSES or (top >= 32 and len(numbers) < top / 4):
        got = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
        raise ValueError(
            f"expected masks of class numbers from 0 on (255: counts nowhere), or of 0 and 255, in {folder}, got the "
            f"values {got}; write each class as its number, without smoothing edges"
        )
    found = counts[[0, IGNORED]] if white else counts[: top + 1]
    return {"classes": top + 1, "white": white, "shares": tuple((found / counts.sum()).tolist())}


def _split(folder: Path, pairs: dict[str, Pairs], val_fraction: float | None, seed: int) -> tuple[Pairs, Pairs, Pairs]:
    """Training, validation and test pairs; what is missing is held out of the training ones."""

    def held_out(files: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
        if len(files) < 2:
            raise ValueError(f"expected 3 or more images with masks to split, {folder} has too few; add some")
        keep, out = hold_out(len(files), round(len(files) * fraction), seed)
        return [files[i] for i in keep], [files[i] for i in out]

    if "." in pairs:
        train, test = held_out(pairs["."], 0.1, 0)
        val_fraction = val_fraction or 1 / 9  # of the nine tenths that are left
    else:
        train, test = pairs["train"], pairs.get("test") or pairs["val"]
        if "test" in pairs and "val" in pairs and val_fraction is None:
            return train, pairs["val"], test
    train, val = held_out(train, val_fraction or 0.1, seed)
    return train, val, test


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _both(folder: Path) -> tuple[Path, Path] | None:
    """The folders of the images and of the masks; None where they are no such two.

    Raises:
        FileNotFoundError: images/ stands alone.
    """
    names = _folders(folder)
    images, masks = ([name for name in names if name.lower() in known] for known in (_IMAGES, _MASKS))
    if images and names == images and not masks:
        raise FileNotFoundError(f"expected masks/ beside {images[0]}/ in {folder}, or class folders CLASS/; add them")
    if len(images) > 1 or len(masks) > 1:
        raise ValueError(f"expected one folder of images and one of masks in {folder}, got {', '.join(images + masks)}")
    return (folder / images[0], folder / masks[0]) if images and masks else None


def _same_part(masks: Path, name: str, part: str) -> Path:
    where = masks if part == "." else masks / name
    if not where.is_dir():
        raise FileNotFoundError(f"expected the masks of images/{name}/ in {where}, there is no such folder; add it")
    return where


def _pairs(images: Path, masks: Path) -> Pairs:
    found = [_by_name(images), _by_name(masks)]
    of_mask = {(name if name in found[0] else name.removesuffix("_mask")): path for name, path in found[1].items()}
    if len(of_mask) < len(found[1]):
        raise ValueError(f"expected one mask for each image in {masks}, got two, NAME and NAME_mask; remove one")
    if not found[0]:
        raise FileNotFoundError(f"expected images in {images}, got none ({', '.join(SUFFIXES)}); add them")
    for have, lack, what, where in ((found[0], of_mask, "mask", masks), (of_mask, found[0], "image", images)):
        missing = [path for name, path in have.items() if name not in lack]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise FileNotFoundError(
                f"expected a {what} of the same name in {where} for {missing[0]}{more}, got none; add it, or move the "
                f"other away"
            )
    pairs = [(path, of_mask[name]) for name, path in found[0].items()]
    return [pairs[i] for i in np.random.RandomState(0).permutation(len(pairs))]


def _by_name(folder: Path) -> dict[str, str]:
    """Every image file below a folder, by its path in it without the suffix."""
    found: dict[str, str] = {}
    for path in image_files(folder):
        name = str(Path(path).relative_to(folder).with_suffix(""))
        if name in found:
            raise ValueError(f"expected one file for each name, got {found[name]} and {path}; remove one")
        found[name] = path
    return found
