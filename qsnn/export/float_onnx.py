"""A float network as an ONNX file: what a deployed network is compared with in the same runtime."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qsnn.export.runtime import session

OPSET = 17
CLOSE = 1e-4
"""Largest difference between the file's answers and torch's, as a share of the largest answer [1]."""


@torch.no_grad()
def write_float(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write a float network, and compare the file's answers with torch's.

    Args:
        model: the network.
        images: some of what it sees.
        path: the file.
    Shape:
        images: (B, C, H, W), B >= 2; of the file: images (B, C, H, W) to logits, logits_1, ..., B free.
    Raises:
        ValueError: torch cannot write this network, or the file answers otherwise.
    """
    model, images = copy.deepcopy(model).cpu().eval(), images.cpu()
    answers = tree_leaves(model(images))
    heads = [f"logits_{place}" if place else "logits" for place in range(len(answers))]
    free = {name: {0: "batch"} for name in ("images", *heads)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter that needs no further package is to go one day
            torch.onnx.export(
                model, (images[:1],), str(path), input_names=["images"], output_names=heads, opset_version=OPSET,
                dynamic_axes=free, dynamo=False,
            )  # fmt: skip
    except Exception as error:  # of many kinds, for whatever torch has no form for
        raise ValueError(f"torch cannot write it as ONNX: {' '.join(str(error).split())[:200]}") from None
    run = float_side(path, 1)
    for count in (1, len(images)):
        for ours, theirs in zip(run(images[:count].numpy()), answers, strict=True):
            wanted = theirs[:count]
            away = float((torch.from_numpy(ours) - wanted).abs().max()) if ours.shape == tuple(wanted.shape) else None
            if away is None or not away <= CLOSE * max(1.0, float(theirs.abs().max())):
                raise ValueError(f"its ONNX file answers otherwise than torch (by {away}); it is not compared")


def float_side(path: Path, threads: int) -> Callable[[NDArray[Any]], list[NDArray[Any]]]:
    """The call of such a file: images to the answers of every head."""
    running = session(path, threads=threads)
    return lambda images: running.run(None, {"images": images})  # type: ignore[no-any-return]
