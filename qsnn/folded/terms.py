"""What a node of a spiking graph stands for when it is folded: integers times gains, plus a bias a step.

Gains and biases are tensors that broadcast against one image of the value: (), or with as many dimensions as it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.folded.layers import SumPool
from qsnn.graph.modules import Pad


@dataclass(frozen=True)
class Term:
    """A node of the new graph, and what one unit is worth: the product of ``factors`` over ``divisor``·T^``steps``.

    Its integers are at most ``bound``·T^``steps``: spikes of one step have steps = 0; the product of two values that
    were each summed over time has 2, and so its own mean at any T.
    """

    node: fx.Node
    factors: tuple[Tensor, ...] = ()
    divisor: int = 1
    integer: bool = True
    bound: float = 1.0
    spikes: bool = False
    """Whether its integers are sums of spikes of one layer: what a layer of float weights can take as they are."""
    steps: int = 0

    @property
    def per_tensor(self) -> bool:
        """Whether one gain holds for all values."""
        return all(factor.numel() == 1 for factor in self.factors)

    @property
    def per_channel(self) -> bool:
        """Whether the gain is the same at all places of a channel, dimension 1."""
        return all(factor.numel() == 1 or factor.numel() == factor.shape[0] for factor in self.factors)

    @property
    def gain(self) -> Tensor:
        """The gain in float64."""
        return product(self.factors) / self.divisor


@dataclass(frozen=True)
class Value:
    """What a node of the old graph stands for: the sum of its terms plus a bias a step."""

    terms: tuple[Term, ...]
    bias: Tensor | None = None

    @property
    def integer(self) -> bool:
        """One term of integers."""
        return len(self.terms) == 1 and self.terms[0].integer

    @property
    def spikes_only(self) -> bool:
        """One integer term with one gain for the whole tensor: a layer can take it as integers."""
        return self.integer and self.bias is None and self.terms[0].per_tensor

    @property
    def spikes_by_channel(self) -> bool:
        """One term of spikes whose gain may differ by channel: a layer of float weights can absorb the gain."""
        return len(self.terms) == 1 and self.bias is None and self.terms[0].spikes and self.terms[0].per_channel


def worth(value: Value) -> tuple[tuple[float, ...], int, int]:
    """What a unit of a single per-tensor term is worth, to compare."""
    (term,) = value.terms
    return tuple(sorted(float(factor) for factor in term.factors)), term.divisor, term.steps


def product(factors: tuple[Tensor, ...]) -> Tensor:
    """The product of factors in float64, in their order; () where there is none."""
    found = torch.ones((), dtype=torch.float64)
    for factor in factors:
        found = found * factor.double()
    return found


def spread(*tensors: Tensor) -> tuple[tuple[int, ...], list[Tensor]]:
    """The shape that tensors have together, () for numbers; and each of them flat, a number as (1,)."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors if t.numel() > 1))
    return tuple(shape), [t.expand(shape).reshape(-1) if t.numel() > 1 else t.reshape(1) for t in tensors]


def stacked(factors: tuple[Tensor, ...], shape: tuple[int, ...] | None = None) -> tuple[Tensor, tuple[int, ...]]:
    """(F, n): the factors of one gain, flat; and the shape that they have together (or ``shape``)."""
    if not factors:
        return torch.ones(1, 1, dtype=torch.float64), ()
    found = tuple(torch.broadcast_shapes(*(f.shape for f in factors if f.numel() > 1))) if shape is None else shape
    count = math.prod(found)
    flat = [(f.expand(found) if f.numel() > 1 else f.reshape(1).expand(count)).reshape(-1) for f in factors]
    return torch.stack([f.double() for f in flat]), found


def compressed(x: Tensor) -> Tensor:
    """The tensor with side 1 along every dimension in which it does not change; a number as ()."""
    for dim in range(x.dim()):
        first = x.narrow(dim, 0, 1)
        if x.shape[dim] > 1 and torch.equal(first.expand_as(x), x):
            x = first
    return x.reshape(()) if x.numel() == 1 else x


def input_gains(layer: Any, term: Term) -> Tensor:
    """What a unit of each input channel is worth, (C, 1, ...), shaped to multiply the layer's weight (C_out, C, *)."""
    gain = term.gain
    if gain.numel() == 1:
        return gain.view(())
    gain = gain.reshape(-1)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return gain.view(-1, *[1] * (layer.weight.dim() - 1))
    groups = getattr(layer, "groups", 1)
    rows = gain.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0)
    return rows.view(*rows.shape, *[1] * (layer.weight.dim() - 2))


def moved(module: nn.Module, x: Tensor, shape: tuple[int, ...], *, gain: bool) -> Tensor | None:
    """What becomes of a gain or a bias when the values of an image of ``shape`` are moved; None where images would mix.

    Args:
        module: a layer that moves values.
        x: a gain or a bias.
        shape: of one image before it is moved, with the rows that it takes of the batch first.
        gain: where zeros are put in, any gain will do; a bias is 0 there.
    Shape:
        x: broadcasts against one image, (C, *); returned: against the moved image.
    """
    if gain and x.numel() == 1:
        return x
    if gain and isinstance(module, Pad):
        pads = list(module.pads) + [0] * (2 * x.dim() - len(module.pads))
        for place in range(x.dim()):
            if x.shape[x.dim() - 1 - place] == 1:
                pads[2 * place : 2 * place + 2] = [0, 0]
        return F.pad(x, pads, value=1.0)
    whole: Tensor = module(x.expand(shape))
    if len(whole) > 1 and not torch.equal(whole[:1].expand_as(whole), whole):
        return None
    return compressed(whole[0])


def summed_over(dims: tuple[int, ...], keepdim: bool, x: Tensor) -> Tensor | None:
    """A gain () or (C, *) behind a sum over dimensions (of the value, the batch is 0); None where it differs there."""
    if x.numel() == 1:
        return x
    for dim in dims:
        if x.shape[dim - 1] > 1:
            return None
    return x if keepdim else x.squeeze([dim - 1 for dim in dims])


def sides(x: Any, dims: int) -> tuple[int, ...]:
    """A size for each dimension, from one for all or from a tuple."""
    return (x,) * dims if isinstance(x, int) else tuple(x)


_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def regular(pool: Any, shape: tuple[int, ...]) -> SumPool | None:
    """The sum over the windows of an average pool, where all of an image (C, *) have one size and lie inside."""
    dims = len(shape) - 1
    if isinstance(pool, _ADAPTIVE):
        goal = [out or side for side, out in zip(shape[1:], sides(pool.output_size, dims), strict=True)]
        if any(side % out for side, out in zip(shape[1:], goal, strict=True)):
            return None
        kernel = tuple(side // out for side, out in zip(shape[1:], goal, strict=True))
        return SumPool(kernel, kernel, (0,) * dims)
    if pool.ceil_mode or any(sides(pool.padding, dims)) or getattr(pool, "divisor_override", None):
        return None
    return SumPool(sides(pool.kernel_size, dims), sides(pool.stride, dims), (0,) * dims)


def windows(pool: Any, shape: tuple[int, ...]) -> int:
    """The least common multiple of what the windows of an average pool divide by, for an image (C, *)."""
    ones = torch.ones(1, 1, *shape[1:], dtype=torch.float64)
    if isinstance(pool, _ADAPTIVE):
        multiple = 1
        for side, out in zip(shape[1:], sides(pool.output_size, len(shape) - 1), strict=True):
            at = torch.arange(out or side)
            sizes = ((at + 1) * side + (out or side) - 1) // (out or side) - at * side // (out or side)
            multiple *= math.lcm(*sizes.tolist())
        return multiple
    if isinstance(pool, nn.AvgPool1d):
        kernel, stride, padding = ((first, *sides(size, 1)) for first, size in (
            (1, pool.kernel_size), (1, pool.stride), (0, pool.padding)))  # fmt: skip
        flat = nn.AvgPool2d(kernel, stride, padding, pool.ceil_mode, pool.count_include_pad)  # type: ignore[arg-type]
        return windows(flat, (1, 1, shape[-1]))
    if pool.divisor_override:
        return int(pool.divisor_override)
    options = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad)
    function = F.avg_pool3d if isinstance(pool, nn.AvgPool3d) else F.avg_pool2d
    sizes = (function(ones, *options, divisor_override=1) / pool(ones)).round()  # a mean of ones leaves padding out
    return math.lcm(*(int(size) for size in sizes.unique()))


def on_terms(value: Value, change: Callable[[Term], Term | None]) -> Value | None:
    """The value with every term changed; None where one cannot be."""
    terms = [change(term) for term in value.terms]
    return None if any(term is None for term in terms) else replace(value, terms=tuple(t for t in terms if t))


def real(node: fx.Node) -> Value:
    """A value of the new graph that is no integer."""
    return Value((Term(node, integer=False, bound=float("inf")),))


def bias_of(value: Value) -> Tensor:
    """The bias a step, (C, *); () and 0 where there is none."""
    return torch.zeros((), dtype=torch.float64) if value.bias is None else value.bias


def scaled(value: Value, factor: Tensor) -> Value:
    """The value times a gain, () or (C, *)."""
    terms = tuple(replace(term, factors=(*term.factors, factor)) for term in value.terms)
    return Value(terms, None if value.bias is None else value.bias * factor)


def current_arguments(value: Value) -> tuple[list[Tensor], list[int], Tensor, list[tuple[int, ...]]]:
    """Factors (F, n), divisors, bias (n,) and shapes: what :class:`~qsnn.folded.neurons.Current` is made of."""
    factors, shapes = zip(*(stacked(term.factors) for term in value.terms), strict=True)
    bias = bias_of(value)
    flat = bias.reshape(-1)
    return list(factors), [term.divisor for term in value.terms], flat, [*shapes, tuple(bias.shape)]


def steps_of(value: Value) -> tuple[int, ...]:
    """Of each term how many sums over time it is a product of."""
    return tuple(term.steps for term in value.terms)
