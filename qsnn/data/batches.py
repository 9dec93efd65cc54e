"""How labelled images reach a model: in batches, checked, varied in training, on its device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, default_collate

from qsnn.data.images import IGNORED, Data, ImageSet
from qsnn.graph.recipe import input_shape_of
from qsnn.graph.trace import device_of, takes_frames
from qsnn.options import BatchSize, check_option, seen

AUGMENTS = ("none", *(kinds + more for kinds in ("flip", "shift", "flip+shift") for more in ("", "+cutout")), "cutout")


def check_images(images: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> None:
    """Refuse a batch that a model would answer with nonsense, or with an error that hides the cause.

    Args:
        images: normalised images.
        shape: what one image must be; by default any (C, H, W).
        dtype: of the network that sees them; by default any float.
    Shape:
        images: (B, C, H, W), B >= 1, (B, C, L) for signals, (B, F) for vectors; shape: that of one of them.
    Raises:
        ValueError: not a float tensor, another shape, or pixels that are NaN or infinite.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"expected a float tensor of normalised images, got {kind}; call ImageSet.normalise(images)")
    if images.is_meta or images.layout is not torch.strided:
        raise ValueError(f"expected a dense tensor of images, got {images.layout} on {images.device}; make it dense")
    if dtype is not None and images.dtype is not dtype:
        raise ValueError(f"expected images of {dtype}, as the network is, got {images.dtype}; call images.to({dtype})")
    want, got = ("B", *(shape or ("C", "H", "W"))), tuple(images.shape)
    if 0 in got or (got[1:] != tuple(shape) if shape else len(got) not in (2, 3, 4, 5)):
        hint = "add the batch: images.unsqueeze(0)" if len(got) == 3 else "resize them, or build the model for them"
        hint = "leave empty batches out" if got[:1] == (0,) else hint
        raise ValueError(f"expected images of shape ({', '.join(map(str, want))}), got {got}; {hint}")
    if math.isfinite(images.sum().item()):  # one NaN or inf spoils the sum; a sum that merely overflows passes below
        return
    bad = ~torch.isfinite(images).flatten(1)
    if bad.any():
        raise ValueError(
            f"expected finite pixels, got {int(bad.sum())} that are NaN or inf, first in image "
            f"{int(bad.any(1).nonzero()[0])} of the batch; look at that image and at the std it was divided by"
        )


def check_channels(images: Tensor, model: nn.Module | None) -> None:
    """Refuse a batch of another number of channels, or of another kind, than the network was made for.

    Args:
        images: (B, C, *), frames (B, T, C, *), or vectors (B, F).
        model: a network whose recipe tells the shape of an image; of any other nothing is known.
    Raises:
        ValueError: both shapes.
    """
    shape = None if model is None else input_shape_of(model)
    if shape is None:
        return
    at = images.dim() - len(shape)
    if at not in (1, 2) or images.shape[at] != shape[0]:
        want = f"(B, {', '.join(map(str, shape))})"
        got = tuple(images.shape)
        raise ValueError(f"expected images of shape {want}, as the network was made for, got {got}; use its own data")


def _augment(
    images: Tensor, labels: Any, augment: str, generator: torch.Generator, black: Tensor | float
) -> tuple[Tensor, Any]:
    """Flip left-right with probability 1/2, shift by up to p pixels each way, cut out a square; black fills the gaps.

    A map of classes moves with its image; on its border nothing counts. The square has half the image's side and its
    center anywhere (DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017).
    """
    if images.dim() == 5:  # all frames of a recording move together
        moved, labels = _augment(images.flatten(1, 2), labels, augment, generator, black)
        return moved.unflatten(1, images.shape[1:3]), labels
    maps = isinstance(labels, Tensor) and labels.dim() == 3 and labels.shape[1:] == images.shape[2:]
    maps = maps and not labels.is_floating_point()
    if not maps and any(leaf.dim() > 2 and leaf.shape[-2:] == images.shape[-2:] for leaf in tree_leaves(labels)):
        raise ValueError(f"augment={augment!r} moves images, not these maps; move both in your Dataset")
    b, _, h, w = images.shape
    if "flip" in augment:
        flip = torch.rand(b, generator=generator, device=generator.device) < 0.5
        images = torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)
        labels = torch.where(flip.to(labels.device)[:, None, None], labels.flip(-1), labels) if maps else labels
    if "shift" in augment:
        p = 2 if min(h, w) == 28 else max(1, min(h, w) // 8)  # 1 px at 8x8, 4 px at 32x32; MNIST's objects fill 28x28
        y, x = torch.randint(2 * p + 1, (2, b), generator=generator, device=generator.device).to(images.device)

        def shifted(maps: Tensor, border: Tensor | float) -> Tensor:
            padded = maps.new_empty(*maps.shape[:2], h + 2 * p, w + 2 * p)
            padded[:] = border
            padded[:, :, p : p + h, p : p + w] = maps
            windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (B, C, 2p + 1, 2p + 1, H, W), a view
            return windows[torch.arange(b, device=images.device), :, y, x]

        images = shifted(images, black)
        labels = shifted(labels[:, None], IGNORED)[:, 0] if maps else labels
    if "cutout" in augment:

        def near_its_center(size: int) -> Tensor:
            center = torch.randint(size, (b, 1), generator=generator, device=generator.device)
            away = torch.arange(size, device=center.device) - center
            return ((away >= -(size // 4)) & (away < size // 4)).to(images.device)

        cut = near_its_center(h)[:, None, :, None] & near_its_center(w)[:, None, None, :]
        images = torch.where(cut, torch.as_tensor(black, dtype=images.dtype, device=images.device), images)
    return images, labels


def batch_sizes(n: int, batch_size: int, world: int = 1) -> list[int]:
    """Sizes of the batches that n items are trained in; a last one too small for batch norm joins the one before.

    >>> batch_sizes(10, 4), batch_sizes(9, 4), batch_sizes(10, 4, world=2)
    ([4, 4, 2], [4, 5], [4, 6])
    """
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    if batch_size > 1 and len(sizes) > 1 and sizes[-1] < 2 * world:  # batch norm needs two images a process
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return sizes


def batches(
    data: Dataset[Any] | Iterable[Any],
    batch_size: int = 128,
    *,
    generator: torch.Generator | None = None,
    augment: str | None = None,
    device: torch.device | str | None = None,
    share: tuple[int, int] = (0, 1),
    model: nn.Module | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """One pass over the data in batches (images, labels); the last one may be smaller.

    In training, where a generator is given, a last batch of a single image joins the one before: batch norm needs two.

    Args:
        data: a Dataset of (image, label); or an iterable of batches (a DataLoader, a list), which keeps its own order
            and batch size.
        batch_size: images a batch, of a Dataset.
        generator: shuffles a Dataset and draws the augmentation; by default a Dataset is read in order.
        augment: "flip" (left-right), "shift" (a few pixels), "cutout" (a square turns black), several joined by "+" in
            this order, or "none"; drawn for each image.
        device: where the batches go; by default they stay where the data is.
        share: (rank, world): this process takes every world-th image of each batch of a Dataset; all must give
            generators of the same seed.
        model: the network that is to see them: they go to its device, and must have the channels it was made for.
    Shape:
        images: (B, C, H, W) float32; labels: (B, *) int64 or float32, in the structure of the data.
    Raises:
        TypeError: data is neither of the two.
        ValueError: an option out of range, augment without a generator, no data, or a batch that is not as above.

    >>> data = ImageSet(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.arange(5), (0.5,), (0.25,))
    >>> [(tuple(images.shape), labels.tolist()) for images, labels in batches(data, 3)]
    [((3, 1, 8, 8), [0, 1, 2]), ((2, 1, 8, 8), [3, 4])]
    """
    if isinstance(data, (Data, Tensor)) or not isinstance(data, Sized if isinstance(data, Dataset) else Iterable):
        hint = "pass a part: data.train" if isinstance(data, Data) else "pass [(images, labels)] or a loader"
        got = type(data).__name__
        raise TypeError(f"expected a Dataset with a length or an iterable of (images, labels), got {got}; {hint}")
    batch_size = int(batch_size) if isinstance(batch_size, np.integer) else batch_size
    check_option("batch_size", batch_size, BatchSize)
    augment = "none" if augment is None else augment
    if augment not in AUGMENTS:
        raise ValueError(f"expected augment to be one of {', '.join(AUGMENTS)}, got {seen(augment)}; None is 'none'")
    if augment != "none" and generator is None:
        call = "generator=torch.Generator().manual_seed(0)"
        raise ValueError(f"expected a generator to draw augment={augment!r} from, got None; pass {call}")
    device = device_of(model) if device is None and model is not None else device
    return _batches(data, batch_size, generator, augment, device, share, model)


def _batches(
    data: Any,
    batch_size: int,
    generator: torch.Generator | None,
    augment: str,
    device: torch.device | str | None,
    share: tuple[int, int],
    model: nn.Module | None,
) -> Iterator[tuple[Tensor, Any]]:
    batch = None
    raw = _raw_batches(data, batch_size, generator, share) if isinstance(data, Dataset) else data
    if generator is not None and share[1] > 1:  # the order is the same in every process, the augmentation is not
        generator = torch.Generator(generator.device).manual_seed(generator.initial_seed() + 1 + share[0])
    for batch in raw:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"expected a batch (images, labels), got {type(batch).__name__}; pass a pair of tensors")
        images, labels = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in batch)
        if not isinstance(data, ImageSet):  # whose images are right by construction; a look would stall a GPU
            check_images(images)
            labels = checked_labels(labels, len(images))
        check_channels(images, model)
        images, labels = images.to(device), tree_map(lambda leaf: leaf.to(device), labels)
        if generator is not None and augment != "none":
            # 0 is black in an ImageSet's bytes, and the mean colour in a normalised set that does not tell its black
            images, labels = _augment(images, labels, augment, generator, getattr(data, "black", 0.0))
        yield data.normalise(images) if isinstance(data, ImageSet) else images.float(), labels
    if batch is None:
        hint = "an iterator is used up after one pass: pass a list or a DataLoader"
        raise ValueError(f"expected at least one batch, got none from {type(data).__name__}; {hint}")


def checked_labels(labels: Any, count: int) -> Any:
    """Labels of a batch as losses take them: whole numbers and bools as int64, floats as float32.

    Args:
        labels: a tensor or an array (B, \\*), or a tuple, list or dict of them, one for each head of the network.
        count: B.
    Raises:
        ValueError: something else, another count, or a number that is NaN or infinite.
    """

    def checked(leaf: Any) -> Tensor:
        leaf = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or len(leaf) != count or leaf.is_complex():
            got = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            one = isinstance(leaf, int | float) or (isinstance(leaf, Tensor) and leaf.dim() == 0)
            single = "; a list of single (image, label) belongs into a torch.utils.data.DataLoader" if one else ""
            raise ValueError(
                f"expected labels of shape ({count},) or ({count}, ...), got {got}; pass a class, a map or numbers for "
                f"each image, of a network of several heads in the structure of its answers{single}"
            )
        if leaf.is_floating_point() and not torch.isfinite(leaf).all():
            raise ValueError("expected finite labels, got NaN or inf; fill or drop them")
        return leaf.float() if leaf.is_floating_point() else leaf.long()

    return tree_map(checked, labels)


def _raw_batches(
    data: Any, batch_size: int, generator: torch.Generator | None, share: tuple[int, int]
) -> Iterator[Any]:
    n, (rank, world) = len(data), share
    order = torch.arange(n)
    if generator is not None:
        order = torch.randperm(n, generator=generator, device=generator.device).cpu()
    training = generator is not None or world > 1
    for batch in order.split(batch_sizes(n, batch_size, world) if training else batch_size) if n else ():
        at = batch[rank::world]
        if isinstance(data, ImageSet):  # bytes: they are moved and augmented before they grow into floats
            yield data.images[at.to(data.images.device)], data.labels[at.to(data.labels.device)]
        else:
            try:
                batch = default_collate([data[i] for i in at.tolist()])
            except (TypeError, RuntimeError, LookupError, AttributeError) as error:
                raise ValueError(
                    f"expected {len(data)} items (image, label) of one shape from {type(data).__name__}, whose items "
                    f"{at[0]} to {at[-1]} cannot be read or stacked: {type(error).__name__}: "
                    f"{' '.join(str(error).split())[:200]}"
                ) from error
            yield batch


def summed(images: Tensor, model: nn.Module | None) -> Tensor:
    """What a network without time sees of frames (B, T, C, H, W): their mean over time; images stay as they are."""
    return images.mean(1) if images.dim() == 5 and (model is None or takes_frames(model, images)) else images
