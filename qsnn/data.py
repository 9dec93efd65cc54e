"""Labelled images: where they come from, how they are split, and how they reach a model in batches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

# name: torchvision's class, mean and standard deviation of the training pixels on [0, 1], augmentation in training
_TORCHVISION: dict[str, tuple[str, tuple[float, ...], tuple[float, ...], str]] = {
    "mnist": ("MNIST", (0.1307,), (0.3081,), "shift"),
    "fashion-mnist": ("FashionMNIST", (0.2860,), (0.3530,), "flip+shift"),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "flip+shift"),
}
NAMES = ("digits", *_TORCHVISION)
AUGMENTS = ("none", "flip", "shift", "flip+shift")

# md5 of the unpacked files: torchvision checks only the .gz it downloads, so a file damaged later would go unnoticed.
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_IDX_MD5 = {
    "MNIST": "6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624 "
    "2646ac647ad5339dbf082846283269ea 27ae3e4e09519cfbb04c329615203637",
    "FashionMNIST": "f4a8712d7a061bf5bd6d2ca38dc4d50a 9018921c3c673c538a1fc5bad174d6f9 "
    "8181f5470baa50b63fa0f6fddb340f0a 15d484375f8d13e6eb1aabb0c3f46965",
}


def _normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    m, s = (torch.tensor(a, dtype=torch.float32, device=images.device).view(-1, 1, 1) for a in (mean, std))
    return images.float().div(255).sub_(m).div_(s)


class ImageSet(Dataset[tuple[Tensor, int]]):
    r"""Labelled images in memory, one byte a pixel; an item is :math:`((x / 255 - \mathrm{mean}) / \mathrm{std}, y)`.

    Args:
        images: pixels 0 to 255, uint8.
        labels: class of each image, int64.
        mean, std: mean and standard deviation of each channel, of pixels on [0, 1].
    Shape:
        images: (N, C, H, W), N >= 1; labels: (N,); an item: (C, H, W) float32 and an int.
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
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise ValueError(f"expected int64 labels of shape ({len(images)},), got {got}; pass one class an image")
        if not len(mean) == len(std) == images.shape[1] or min(std) <= 0:
            raise ValueError(f"expected mean and std > 0 of {images.shape[1]} channels, got mean={mean}, std={std}")
        self.images, self.labels, self.mean, self.std = images, labels, mean, std

    def __len__(self) -> int:
        """Number of images N."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, normalised, and its label."""
        return self.normalise(self.images[index]), int(self.labels[index])

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels 0..255 as a model sees them: (..., C, H, W) uint8 to float32."""
        return _normalise(images, self.mean, self.std)

    def subset(self, indices: Tensor | Sequence[int] | np.ndarray | slice) -> ImageSet:
        """The images at these places, in this order; a slice shares memory, anything else copies."""
        at = indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[at], self.labels[at], self.mean, self.std)

    def head(self, n: int) -> ImageSet:
        """The first n images, or all of them if there are fewer."""
        return self.subset(slice(n))


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
        return _normalise(pixels, self.mean, self.std).contiguous(), label


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
        """(C, H, W) of one image."""
        return tuple(self.train[0][0].shape)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    def __repr__(self) -> str:
        """Name, number of images, shape and classes, in one line."""
        sizes = ", ".join(f"{len(getattr(self, part)):,} {part}" for part in ("train", "val", "test"))
        return f"Data({self.name}: {sizes} images of {'x'.join(map(str, self.shape))}, {self.num_classes} classes)"


def load_data(
    name: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    val_fraction: float | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> Data:
    """Load a data set by its name, or a folder of images by its path.

    A folder holds ``train/CLASS/*`` and ``test/CLASS/*``, perhaps ``val/CLASS/*`` too; with ``val/`` but no ``test/``,
    ``val/`` is the test set. A folder of ``CLASS/*`` alone is split 80/10/10.

    Args:
        name: "digits" (comes with scikit-learn), "mnist", "fashion-mnist", "cifar10", or the path of a folder.
        root: where the files lie, or go when downloaded; by default $QSNN_DATA, else ~/.cache/qsnn.
        val_fraction: part of the training images held out for `val`, (0, 1), no unit; by default 5,000 images of a
            torchvision set, a tenth of digits, and of a folder its ``val/`` or a tenth.
        image_size: height and width of a folder's images [pixel]; by default those of the first one.
        seed: chooses the images held out; never the test images. Keep it the same from teacher to student: with
            another one, `val` holds images that the teacher was trained on.
    Raises:
        ValueError: a name that is neither known nor a folder, a damaged file, or an option out of range.
        FileNotFoundError: files that are missing and cannot be downloaded, or a folder without classes.
        ImportError: torchvision is missing, or does not fit the installed torch.
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ValueError(f"expected 0 < val_fraction < 1, got {val_fraction}; 0.1 holds out a tenth")
    if image_size is not None and (image_size < 1 or name in NAMES):
        raise ValueError(f"expected image_size >= 1 pixel with a folder only, got {image_size} for {name}; omit it")
    if name == "digits":
        return _load_digits(val_fraction or 0.1, seed)
    if name in _TORCHVISION:
        root = Path(root or os.environ.get("QSNN_DATA") or "~/.cache/qsnn").expanduser()
        return _load_torchvision(str(name), root, val_fraction, seed)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"unknown data set {str(name)!r}, and no folder of that name; use one of {', '.join(NAMES)}, "
            f"or the path of a folder with train/CLASS/*.png and test/CLASS/*.png"
        )
    return _load_folder(folder, image_size, val_fraction, seed)


def _hold_out(n: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.RandomState(seed).permutation(n)  # RandomState is frozen: a split survives numpy's next version
    count = min(max(count, 1), n - 1)
    return order[: n - count], order[n - count :]


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


def _load_torchvision(name: str, root: Path, val_fraction: float | None, seed: int) -> Data:
    class_name, mean, std, augment = _TORCHVISION[name]
    images = []
    for source in _read_torchvision(getattr(_import_datasets(), class_name), name, root):
        pixels = torch.as_tensor(source.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        images.append(ImageSet(pixels, torch.as_tensor(source.targets), mean, std))
        classes = tuple(label.partition(" - ")[0] for label in source.classes)  # MNIST's are "0 - zero"
    n = len(images[0])
    train, val = _hold_out(n, 5000 if val_fraction is None else round(n * val_fraction), seed)
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
        keep, out = _hold_out(n, round(n / 10), 0)
        samples = {"train": [samples["."][i] for i in keep], "test": [samples["."][i] for i in out]}
        val_fraction = val_fraction or 1 / 9  # of the nine tenths that are left
    train, test = samples["train"], samples.get("test") or samples["val"]
    if "test" in samples and "val" in samples and val_fraction is None:
        val = samples["val"]
    else:
        keep, out = _hold_out(len(train), round(len(train) * (val_fraction or 0.1)), seed)
        train, val = [train[i] for i in keep], [train[i] for i in out]
    size = (image_size, image_size) if image_size else _open_rgb(min(train)[0]).size[::-1]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as pretrained torchvision models want them
    train_set, val_set, test_set = (FolderSet(files, size, mean, std) for files in (train, val, test))
    return Data(
        name=str(folder), train=train_set, val=val_set, test=test_set,
        mean=mean, std=std, classes=next(iter(classes.values())), augment="flip",
    )  # fmt: skip


def check_images(images: Tensor, shape: Sequence[int] | None = None) -> None:
    """Refuse a batch that a model would answer with nonsense, or with an error that hides the cause.

    Args:
        images: normalised images.
        shape: what one image must be; by default any (C, H, W).
    Shape:
        images: (B, C, H, W), B >= 1; shape: (C, H, W).
    Raises:
        ValueError: not a float tensor, another shape, or pixels that are NaN or infinite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"expected a float tensor of normalised images, got {kind}; call ImageSet.normalise(images)")
    want, got = ("B", *(shape or ("C", "H", "W"))), tuple(images.shape)
    if len(got) != len(want) or 0 in got or (shape and got[1:] != tuple(shape)):
        hint = "add the batch: images.unsqueeze(0)" if len(got) == 3 else "resize them, or build the model for them"
        raise ValueError(f"expected images of shape ({', '.join(map(str, want))}), got {got}; {hint}")
    if torch.isfinite(images.sum()):  # one NaN or inf spoils the sum; a sum that merely overflows passes below
        return
    bad = ~torch.isfinite(images).flatten(1)
    if bad.any():
        raise ValueError(
            f"expected finite pixels, got {int(bad.sum())} that are NaN or inf, first in image "
            f"{int(bad.any(1).nonzero()[0])} of the batch; look at that image and at the std it was divided by"
        )


def _augment(images: Tensor, augment: str, generator: torch.Generator, black: Tensor | float) -> Tensor:
    """Flip left-right with probability 1/2, then shift by up to p pixels each way; black fills the border."""
    b, c, h, w = images.shape
    if "flip" in augment:
        flip = torch.rand(b, generator=generator, device=generator.device) < 0.5
        images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)
    if "shift" in augment:
        p = 2 if min(h, w) == 28 else max(1, min(h, w) // 8)  # 1 px at 8x8, 4 px at 32x32; MNIST's objects fill 28x28
        padded = images.new_empty(b, c, h + 2 * p, w + 2 * p)
        padded[:] = black
        padded[:, :, p : p + h, p : p + w] = images
        y, x = torch.randint(2 * p + 1, (2, b), generator=generator, device=generator.device).to(images.device)
        windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (B, C, 2p + 1, 2p + 1, H, W), a view
        images = windows[torch.arange(b, device=images.device), :, y, x]
    return images


def num_batches(data: Dataset[Any] | Iterable[Any], batch_size: int = 128) -> int | None:
    """How many batches one pass of `batches` yields, or None when the data cannot tell."""
    try:
        n = len(data)  # type: ignore[arg-type]
    except TypeError:  # an iterator; also a DataLoader of an IterableDataset, which has __len__ but refuses it
        return None
    return -(-n // batch_size) if isinstance(data, Dataset) else n


def batches(
    data: Dataset[Any] | Iterable[Any],
    batch_size: int = 128,
    *,
    generator: torch.Generator | None = None,
    augment: str | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the data in batches (images, labels); the last one may be smaller.

    Args:
        data: a Dataset of (image, label); or an iterable of batches (a DataLoader, a list), which keeps its own order
            and batch size.
        batch_size: images a batch, of a Dataset.
        generator: shuffles a Dataset and draws the augmentation; by default a Dataset is read in order.
        augment: "flip" (left-right), "shift" (a few pixels), "flip+shift" or "none", drawn for each image.
        device: where the batches go; by default they stay where the data is.
    Shape:
        images: (B, C, H, W) float32; labels: (B,) int64.
    Raises:
        TypeError: data is neither of the two.
        ValueError: an option out of range, augment without a generator, no data, or a batch that is not as above.
    """
    if isinstance(data, (Data, Tensor)) or not isinstance(data, Sized if isinstance(data, Dataset) else Iterable):
        hint = "pass a part: data.train" if isinstance(data, Data) else "pass [(images, labels)] or a loader"
        got = type(data).__name__
        raise TypeError(f"expected a Dataset with a length or an iterable of (images, labels), got {got}; {hint}")
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}; 128 is the default")
    augment = augment or "none"
    if augment not in AUGMENTS:
        raise ValueError(f"expected augment to be one of {', '.join(AUGMENTS)}, got {augment!r}; None is 'none'")
    if augment != "none" and generator is None:
        call = "generator=torch.Generator().manual_seed(0)"
        raise ValueError(f"expected a generator to draw augment={augment!r} from, got None; pass {call}")
    return _batches(data, batch_size, generator, augment, device)


def _batches(
    data: Any, batch_size: int, generator: torch.Generator | None, augment: str, device: torch.device | str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    batch = None
    for batch in _raw_batches(data, batch_size, generator) if isinstance(data, Dataset) else data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"expected a batch (images, labels), got {type(batch).__name__}; pass a pair of tensors")
        images, labels = batch
        if not isinstance(data, ImageSet):  # whose images are right by construction; a look would stall a GPU
            check_images(images)
            if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != images.shape[:1]:
                got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
                raise ValueError(f"expected integer labels of shape ({len(images)},), got {got}; one class an image")
        images, labels = images.to(device), labels.to(device).long()
        if generator is not None and augment != "none":
            black: Tensor | float = 0.0  # an ImageSet's bytes; elsewhere, where black is not known, the mean colour
            if isinstance(data, FolderSet):
                black = _normalise(images.new_zeros(images.shape[1], 1, 1), data.mean, data.std)
            images = _augment(images, augment, generator, black)
        yield data.normalise(images) if isinstance(data, ImageSet) else images.float(), labels
    if batch is None:
        hint = "an iterator is used up after one pass: pass a list or a DataLoader"
        raise ValueError(f"expected at least one batch, got none from {type(data).__name__}; {hint}")


def _raw_batches(data: Any, batch_size: int, generator: torch.Generator | None) -> Iterator[Any]:
    n = len(data)
    order = torch.arange(n)
    if generator is not None:
        order = torch.randperm(n, generator=generator, device=generator.device).cpu()
    for at in order.split(batch_size) if n else ():
        if isinstance(data, ImageSet):  # bytes: they are moved and augmented before they grow into floats
            yield data.images[at.to(data.images.device)], data.labels[at.to(data.labels.device)]
        else:
            yield default_collate([data[i] for i in at.tolist()])
