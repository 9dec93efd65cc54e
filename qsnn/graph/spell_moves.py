"""How what moves values is spelled: views, permutations, slices, zeros, upsampling, joins."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.graph.kinds import ADVICE
from qsnn.graph.modules import Concat, Pad, Permute, Shift, Slice, Upsample
from qsnn.graph.spell_places import PLACES, gathered
from qsnn.graph.step import Call, Refused, Shape, Spelling


def _unflatten_module(call: Call) -> fx.Node:
    return call.view()


def _upsample_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    return _upsampled(call, module.mode)


def _interpolate(call: Call) -> fx.Node:
    return _upsampled(call, call.get(3, "mode", "nearest"))


def _upsampled(call: Call, mode: str) -> fx.Node:
    before, after = call.shape()[2:], call.out[2:]
    if mode not in ("nearest", "nearest-exact"):
        raise Refused(f"mode {mode!r} from {before} to {after}: {ADVICE['interpolate']}")
    if any(b % a for a, b in zip(before, after, strict=True)):
        return gathered(call)
    return call.put(Upsample(tuple(b // a for a, b in zip(before, after, strict=True))))


def _flatten(call: Call) -> fx.Node:
    ends = call.get(1, "start_dim", 0), call.get(2, "end_dim", -1)
    return call.put(nn.Flatten()) if ends == (1, -1) else call.view()


def _as_view(call: Call) -> fx.Node:
    return call.view()


def _same(call: Call) -> fx.Node:
    return call.at(call.x)


def _permute(call: Call) -> fx.Node:
    rank = len(call.shape())
    order: Any = call.node.args[1:] or (call.get(1, "dims"),)
    given = order[0] if isinstance(order[0], list | tuple) else order
    return _permuted(call, tuple(d % rank for d in given))


def _permuted(call: Call, dims: tuple[int, ...]) -> fx.Node:
    if dims[0] != 0:
        raise Refused("moves the batch from dimension 0")
    return call.at(call.x) if dims == tuple(range(len(dims))) else call.put(Permute(dims))


def _transpose(call: Call) -> fx.Node:
    dims = list(range(len(call.shape())))
    a, b = call.get(1, "dim0"), call.get(2, "dim1")
    dims[a], dims[b] = dims[b], dims[a]
    return _permuted(call, tuple(dims))


def _movedim(call: Call) -> fx.Node:
    sides = torch.zeros([place + 2 for place in range(len(call.shape()))])  # sides that tell the dimensions apart
    moved = sides.movedim(call.get(1, "source"), call.get(2, "destination"))
    return _permuted(call, tuple(side - 2 for side in moved.shape))


def _turned(call: Call) -> fx.Node:
    """x.T and x.mT."""
    rank, name = len(call.shape()), call.get(1, "name")
    dims = tuple(reversed(range(rank))) if name in ("T", "H") else (*range(rank - 2), rank - 1, rank - 2)
    return _permuted(call, dims)


def _getitem(call: Call) -> Any:
    source, place = call.get(0, "a"), call.get(1, "b")
    found = call.speller.written.get(source)
    if isinstance(found, list):
        if found[place] is None and call.node.users:
            raise Refused("the places of a maximum are read; spikes carry none")
        return found[place]
    shape = call.shape(source)
    parts: list[Any] = list(place) if isinstance(place, tuple) else [place]
    at = next((at for at, part in enumerate(parts) if part is Ellipsis), None)
    if at is not None:
        parts[at : at + 1] = [slice(None)] * (len(shape) - sum(part is not None for part in parts) + 1)
    kept = [part for part in parts if part is not None]
    if not all(isinstance(part, slice | int) for part in kept):
        return gathered(call)
    bounds: list[Any] = []
    for side, part in zip(shape, kept, strict=False):
        part = slice(part % side, part % side + 1) if isinstance(part, int) else part
        bounds.append(part.indices(side))
    if kept and (isinstance(kept[0], int) or bounds[0] != (0, shape[0], 1)):
        raise Refused("takes images out of the batch")
    whole = all(bound == (0, side, 1) for bound, side in zip(bounds, shape, strict=False))
    node = call.at(source) if whole else call.put(Slice(tuple(bounds[1:])), call.at(source))
    if any(part is None or isinstance(part, int) for part in parts):
        return call.view(call.out, node)
    return node


def _parts(call: Call) -> list[fx.Node]:
    """chunk, split, tensor_split, unbind: a list of slices."""
    sizes: list[Shape] = call.speller.shapes[call.node.name][0]
    unbound = call.name == "unbind"
    place = call.get(1, "dim", 0) if unbound else call.get(2, "dim", 0)
    place = {"hsplit": 1, "dsplit": 2, "vsplit": 0}.get(call.name, place)
    (dim,) = call.dims(place)
    found, start = [], 0
    for size in sizes:
        side = 1 if unbound else size[dim]
        bounds = [(0, n, 1) for n in call.shape()[1:]]
        bounds[dim - 1] = (start, start + side, 1)
        node = call.put(Slice(tuple(bounds)))
        found.append(call.view(size, node) if unbound else node)
        start += side
    return found


def _cat(call: Call, along: int | None = None) -> fx.Node:
    parts = list(call.get(0, "tensors"))
    values = [part for part in parts if call.constant(part) is None]
    rank = len(call.shape(values[0]))
    dim = (call.get(1, "dim", call.node.kwargs.get("axis", 0)) if along is None else along) % rank
    if dim == 0:
        raise Refused("joins along dimension 0, the batch")
    if len(values) == len(parts):
        return call.put(Concat(dim), *(call.at(part) for part in parts))
    # numbers beside values: zeros there, and the numbers added to them
    shape, before = call.out, 0
    added: list[Tensor] = []
    joined: list[fx.Node] = []
    for place, part in enumerate(parts):
        side = _shape_of(call, part)[dim]
        number = call.constant(part)
        if number is not None:
            added.append(call.fits(number).expand(1, *shape[1:dim], side, *shape[dim + 1 :]).float())
            before += side
            continue
        added.append(torch.zeros(1, *shape[1:dim], side, *shape[dim + 1 :]))
        behind = 0
        if len(joined) == len(values) - 1:
            behind = sum(_shape_of(call, later)[dim] for later in parts[place + 1 :])
        pads = (*[0] * (2 * (rank - 1 - dim)), before, behind)
        joined.append(call.put(Pad(pads), call.at(part)) if before or behind else call.at(part))
        before = 0
    node = call.put(Concat(dim), *joined) if len(joined) > 1 else joined[0]
    numbers = torch.cat([number.to(added[0].device) for number in added], dim)
    return call.put(Shift(numbers.detach()), node) if bool((numbers != 0).any()) else node


def _shape_of(call: Call, part: Any) -> Shape:
    """The shape of a value or of a tensor that no image changes."""
    constant = call.constant(part)
    return call.shape(part) if constant is None else tuple(constant.shape)


def _joined_at(dim: int) -> Spelling:
    return lambda call: _cat(call, dim)


def _stack(call: Call) -> fx.Node:
    parts = list(call.get(0, "tensors"))
    rank = len(call.out)
    dim = call.get(1, "dim", 0) % rank
    if dim == 0:
        raise Refused("stacks along dimension 0, the batch")
    raised = []
    for part in parts:
        shape = list(call.shape(part))
        shape.insert(dim, 1)
        raised.append(call.view(shape, call.at(part)))
    return call.put(Concat(dim), *raised)


def _pixel(module: type[nn.Module]) -> Spelling:
    return lambda call: call.put(module(call.get(1, "upscale_factor", call.get(1, "downscale_factor"))))


def _shuffle(call: Call) -> fx.Node:
    return call.put(nn.ChannelShuffle(call.get(1, "groups")))


def _zeros_like(call: Call) -> Tensor:
    """A constant made after the shape of a value."""
    value = {"zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}[call.name]
    return torch.full(call.out, value)


def _narrow(call: Call) -> fx.Node:
    (dim,) = call.dims(call.get(1, "dim"))
    bounds = [(0, n, 1) for n in call.shape()[1:]]
    start = call.get(2, "start")
    bounds[dim - 1] = (start, start + call.get(3, "length"), 1)
    return call.put(Slice(tuple(bounds)))


def _select(call: Call) -> fx.Node:
    (dim,) = call.dims(call.get(1, "dim"))
    bounds = [(0, n, 1) for n in call.shape()[1:]]
    start = call.get(2, "index") % call.shape()[dim]
    bounds[dim - 1] = (start, start + 1, 1)
    return call.view(call.out, call.put(Slice(tuple(bounds))))


MOVES: dict[Any, Spelling] = {
    **PLACES,
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys(
        (torch.reshape, torch.unsqueeze, torch.squeeze, torch.unflatten, torch.Tensor.view, nn.Unflatten, "view",
         "reshape", "unsqueeze", "squeeze", "unflatten", "view_as", "reshape_as", "unsqueeze_", "squeeze_"), _as_view,
    ),
    **dict.fromkeys(
        (torch.clone, torch.detach, "contiguous", "clone", "detach", "float", "to", "type", "type_as", "cpu", "cuda",
         "requires_grad_", "positive", operator.pos, torch.positive, nn.Identity), _same,
    ),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys((torch.movedim, torch.moveaxis, "movedim", "moveaxis"), _movedim),
    **dict.fromkeys((torch.t, "t"), lambda call: _permuted(call, (1, 0))),
    getattr: _turned, operator.getitem: _getitem,
    **dict.fromkeys((torch.narrow, "narrow"), _narrow), **dict.fromkeys((torch.select, "select"), _select),
    **dict.fromkeys((torch.chunk, torch.split, torch.unbind, torch.tensor_split, "chunk", "split", "unbind",
                     "tensor_split", "split_with_sizes", torch.hsplit, torch.dsplit, "hsplit", "dsplit"), _parts),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat), torch.stack: _stack,
    **dict.fromkeys((torch.hstack, torch.column_stack), _joined_at(1)), torch.dstack: _joined_at(2),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d), _upsample_module),
    **dict.fromkeys((F.interpolate, F.upsample), _interpolate),
    F.pixel_shuffle: _pixel(nn.PixelShuffle), F.pixel_unshuffle: _pixel(nn.PixelUnshuffle),
    **dict.fromkeys((F.channel_shuffle, torch.channel_shuffle, F.native_channel_shuffle), _shuffle),
    **dict.fromkeys((torch.zeros_like, torch.ones_like, "new_zeros", "new_ones"), _zeros_like),
}  # fmt: skip
"""Functions, method names and modules of torch.nn that move values, each with how it is spelled."""
