"""Whether a network and a data set fit together, and what the data set is like: said before hours of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from qsnn.data.batches import summed
from qsnn.data.folders import with_channels
from qsnn.data.images import Data
from qsnn.data.masks import MaskSet
from qsnn.graph.arrived import arrived, evaluating


def fitted(data: Data, model: nn.Module) -> Data:
    """Return the data as the network takes it: grey images of a folder in one channel or in three.

    Two images are run, in eval mode.

    Args:
        data: a data set.
        model: any network; it is not changed.
    Raises:
        ValueError: the network does not take images of this shape, or gives fewer answers than there are classes.
    """
    model = arrived(model)
    try:
        logits = _run(model, data)
    except Exception as error:  # a layer of the user's own may raise anything
        takes = _channels_of(model)
        other = with_channels(data, takes) if takes is not None and takes != data.shape[0] else None
        if other is not None:
            return fitted(other, model)
        shape = "x".join(map(str, data.shape))
        hint = ""
        if takes is not None and takes != data.shape[0]:
            hint = f"its first convolution takes {takes} channels, the data has {data.shape[0]}: "
            hint += "build it for as many, or load_data(..., channels=1 or 3) of a folder"
        raise ValueError(
            f"{type(model).__name__} does not take the images of {data.name}, {shape}; "
            f"{hint or ' '.join(str(error).split())[:200]}"
        ) from error
    if isinstance(logits, Tensor) and logits.dim() > 1 and data.classes:
        label = data.train[0][1]
        size = tuple(label.shape) if isinstance(label, Tensor) else ()
        if size and size not in (logits.shape[2:], logits.shape[1:]):
            shown, want = (" x ".join(map(str, ("B", *shape))) for shape in (logits.shape[1:], ("K", *size)))
            hint = "build a network with an answer a pixel, like --model unet" if len(size) == 2 else "make them agree"
            raise ValueError(f"{type(model).__name__} answers {shown}, the labels of {data.name} want {want}; {hint}")
        if not enough_outputs(logits.shape[1], data.num_classes):
            raise ValueError(
                f"{type(model).__name__} gives {logits.shape[1]} outputs, {data.name} has {data.num_classes} classes "
                f"({', '.join(data.classes[:3])}, ...); give its last layer {data.num_classes} outputs"
            )
    return data


def enough_outputs(outputs: int, classes: int) -> bool:
    """Whether a network of so many outputs tells so many classes: one an output, or two by the sign of one logit."""
    return outputs >= classes or (outputs == 1 and classes == 2)


def class_counts(part: Dataset[Any], classes: int) -> list[int] | None:
    """Return the number of items of each class; None where the labels cannot be seen without loading every item."""
    labels = getattr(part, "labels", None)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() != 1:
        return None
    return torch.bincount(labels.cpu(), minlength=classes).tolist()


def describe(data: Data) -> str:
    """Return a data set's sizes, normalisation, and how many items each class has in each part.

    Of unequal classes the line says what always giving the most frequent answer would score.
    """
    lines = [repr(data)]
    if 1 <= len(data.mean) <= 4:
        numbers = [" ".join(f"{value:.4g}" for value in values) for values in (data.mean, data.std)]
        lines.append(f"normalised with mean {numbers[0]} and std {numbers[1]}")
    if isinstance(data.train, MaskSet):
        lines.append(data.train.told)
    parts = {name: class_counts(getattr(data, name), data.num_classes) for name in ("train", "val", "test")}
    counts = {name: found for name, found in parts.items() if found and sum(found)}
    if not data.classes or "train" not in counts:
        return "\n".join(lines)
    train = counts["train"]
    if max(train) < 2 * min(train):
        told = [f"{min(n):,} to {max(n):,} {part}" for part, n in counts.items()]
        return "\n".join([*lines, f"classes are balanced: each has {', '.join(told)} items"])
    shown = sorted(range(data.num_classes), key=lambda i: -train[i])
    if len(shown) > 20:
        shown = [*shown[:10], *shown[-10:]]
        lines.append("the 10 most and the 10 least frequent classes:")
    width = max(5, *(len(data.classes[i]) for i in shown))
    lines.append(f"{'class':<{width}}" + "".join(f"  {part:>8}" for part in counts))
    for i in shown:
        lines.append(f"{data.classes[i]:<{width}}" + "".join(f"  {found[i]:>8,}" for found in counts.values()))
    largest, smallest = train.index(max(train)), train.index(min(train))
    ratio = f"{max(train) / min(train):.1f} times the items of" if min(train) else "and there is no training item of"
    part = "test" if "test" in counts else "train"
    always = 100 * counts[part][largest] / sum(counts[part])
    lines.append(
        f"classes are imbalanced: {data.classes[largest]} has {ratio} {data.classes[smallest]}; always answering "
        f"{data.classes[largest]} would be right for {always:.1f} % of the {part} items"
    )
    return "\n".join(lines)


@torch.no_grad()
def _run(model: nn.Module, data: Data) -> Any:
    images = default_collate([data.train[i % len(data.train)][0] for i in range(2)])  # type: ignore[arg-type]
    spiking = hasattr(model, "timesteps")
    images = images if spiking else summed(images, model)
    for tensor in (*model.parameters(), *model.buffers()):
        images = images.to(tensor.device)
        break
    with evaluating(model):
        logits = model(images)
    return logits[-1] if spiking and isinstance(logits, Tensor) else logits


def _channels_of(model: nn.Module) -> int | None:
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return module.in_channels
    return None
