"""How what puts values at other places is spelled, whatever its arguments: the step itself moves numbers of places."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.graph.modules import Index, Pad, Shift, Slice
from qsnn.graph.step import Call, Refused, Spelling
from qsnn.graph.trace import device_of


def replayed(call: Call, value: Tensor) -> Tensor:
    """What a step makes of ``value`` in the place of its input; its other arguments stay what they are.

    Raises:
        Refused: another argument depends on the image.
    """
    example = call.node.target if call.node.op == "call_function" else str(call.node.target)
    shape_alone = call.name == "expand_as"  # of the other value only the shape is read

    def given(node: fx.Node) -> Any:
        if node is call.x:
            return value
        found = call.speller.written.get(node)
        if isinstance(found, Tensor):
            return found
        if shape_alone:
            return value.new_zeros(call.shape(node))
        raise Refused(f"{call.name} by a value that depends on the image")

    args: Any = fx.node.map_arg(call.node.args, given)
    options: Any = fx.node.map_arg(call.node.kwargs, given)
    if call.node.op == "call_method":
        return getattr(args[0], str(example))(*args[1:], **options)  # type: ignore[no-any-return]
    step: Any = call.speller.raw.get_submodule(str(example)) if call.node.op == "call_module" else example
    return step(*args, **options)  # type: ignore[no-any-return]


def gathered(call: Call) -> fx.Node:
    """Any step that moves, repeats or drops the values of an image, or puts zeros between them.

    Raises:
        Refused: images of a batch would mix.
    """
    return moved(call, lambda places: replayed(call, places))


def moved(call: Call, step: Any) -> fx.Node:
    """Write what ``step`` does to the places of the values of ``call.x``; see :func:`gathered`."""
    shape = call.shape()
    size = math.prod(shape[1:])
    numbers = torch.arange(1, shape[0] * size + 1, dtype=torch.float64, device=device_of(call.speller.raw))
    with torch.no_grad():
        found = step(numbers.view(shape)).cpu()
    rows = [row - number * size * (row > 0) for number, row in enumerate(found)]
    first = rows[0]
    apart = len(found) == shape[0] and all(torch.equal(row, first) for row in rows)
    if not apart or not found[0].numel() or not 0 <= float(first.min()) <= float(first.max()) <= size:
        raise Refused(f"{call.name} moves the batch, or mixes its images: they must stay apart, along dimension 0")
    return _at_places(call, shape[1:], first.long() - 1)


def _at_places(call: Call, shape: tuple[int, ...], places: Tensor) -> fx.Node:
    """Values of an image of ``shape`` at places counted through it, -1 for a zero: a choice along each side, or any."""
    lines = _by_side(shape, places)
    if lines is not None:
        node = call.at(call.x)
        for dim, line in enumerate(lines, 1):
            node = _along(call, node, dim, shape, line)
        return node
    size, flat = math.prod(shape), places.flatten()
    node = call.view((0, size), call.at(call.x)) if len(shape) > 1 else call.at(call.x)
    if bool((flat < 0).any()):
        node, flat = call.put(Pad((0, 1)), node), torch.where(flat < 0, size, flat)
    return call.view((0, *places.shape), call.put(Index(1, flat), node))


def _by_side(shape: tuple[int, ...], places: Tensor) -> list[Tensor] | None:
    """For each side which of its places are taken, where that does not depend on the others."""
    if places.dim() != len(shape) or bool((places < 0).any()):
        return None
    lines = []
    for dim, side in enumerate(shape):
        at = places // math.prod(shape[dim + 1 :]) % side
        line = at.movedim(dim, 0).flatten(1)[:, 0]
        if not torch.equal(at, line.view(-1, *[1] * (places.dim() - 1 - dim)).expand_as(at)):
            return None
        lines.append(line)
    return lines


def _along(call: Call, node: fx.Node, dim: int, shape: tuple[int, ...], line: Tensor) -> fx.Node:
    start, step = int(line[0]), int(line[1] - line[0]) if len(line) > 1 else 1
    if step < 1 or not torch.equal(line, torch.arange(len(line)) * step + start):
        return call.put(Index(dim, line), node)
    if len(line) == shape[dim - 1]:
        return node
    bounds = [(0, side, 1) for side in shape[: dim - 1]]
    return call.put(Slice((*bounds, (start, start + step * (len(line) - 1) + 1, step))), node)


def padded(call: Call, pads: Any, mode: str = "constant", value: Any = 0) -> fx.Node:
    """Padding of any kind: zeros, another number, or values of the image."""
    pads, shape = tuple(int(p) for p in pads), call.shape()
    if mode != "constant":
        return moved(call, lambda places: F.pad(places, pads, mode))
    if len(pads) // 2 >= len(shape) and any(pads[2 * (len(shape) - 1) :]):
        raise Refused("pads dimension 0, the batch")
    pads = pads[: 2 * (len(shape) - 1)]
    if not any(pads):
        return call.at(call.x)
    node = call.put(Pad(pads))
    if not value:
        return node
    return call.put(Shift(F.pad(torch.zeros(1, *shape[1:]), pads, value=float(value))), node)


def _pad_function(call: Call) -> fx.Node:
    return padded(call, call.get(1, "pad"), call.get(2, "mode", "constant"), call.get(3, "value", 0))


def _pad_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    return padded(call, module.padding, value=getattr(module, "value", 0))


def _convolution_module(call: Call) -> fx.Node | None:
    """One that pads with values of the image: these first, then it without padding; None for any other."""
    name = str(call.node.target)
    layer: Any = call.speller.raw.get_submodule(name)
    padding = call.speller.padding.get(name)
    if padding is None:
        if layer.padding_mode == "zeros":
            return None
        padding = call.speller.padding[name] = (layer._reversed_padding_repeated_twice, layer.padding_mode)
        layer.padding, layer.padding_mode = (0,) * len(layer.kernel_size), "zeros"
    return call.speller.graph.call_module(name, (padded(call, *padding),))


PLACES: dict[Any, Spelling] = {
    **dict.fromkeys(
        (torch.flip, torch.fliplr, torch.roll, torch.rot90, torch.tile, torch.repeat_interleave, torch.index_select,
         torch.gather, torch.take_along_dim, torch.broadcast_to, torch.tril, torch.triu, torch.diagonal, F.unfold,
         "flip", "fliplr", "roll", "rot90", "tile", "repeat", "repeat_interleave", "index_select", "gather",
         "take_along_dim", "broadcast_to", "expand", "expand_as", "tril", "triu", "diagonal", "unfold", nn.Unfold,
         nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
         nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), gathered,
    ),
    F.pad: _pad_function,
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
                    _pad_module),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution_module),
}  # fmt: skip
"""Functions, method names and modules of torch.nn that put values at other places, each with how it is spelled."""
