"""What a node of a spiking graph stands for when it is folded: integers times gains, plus a bias a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Term:
    """A node of the new graph and what one unit of it is worth: the product of ``factors`` over ``divisor``."""

    node: fx.Node
    factors: tuple[Tensor, ...] = ()
    divisor: int = 1
    integer: bool = True
    bound: float = 1.0
    spikes: bool = False
    """Whether its integers are sums of spikes of one layer: what a layer of float weights can take as they are."""

    @property
    def per_tensor(self) -> bool:
        """Whether one gain holds for all channels."""
        return all(factor.numel() == 1 for factor in self.factors)


@dataclass(frozen=True)
class Value:
    """What a node of the old graph stands for: the sum of its terms plus a bias a step."""

    terms: tuple[Term, ...]
    bias: Tensor | None = None

    @property
    def spikes_only(self) -> bool:
        """One integer term with one gain for the whole tensor: a layer can take it as integers."""
        return len(self.terms) == 1 and self.bias is None and self.terms[0].integer and self.terms[0].per_tensor

    @property
    def spikes_by_channel(self) -> bool:
        """One term of spikes whose gain may differ by channel: a layer of float weights can absorb the gain."""
        return len(self.terms) == 1 and self.bias is None and self.terms[0].spikes


def worth(value: Value) -> tuple[tuple[float, ...], int]:
    """What a unit of a single per-tensor term is worth, to compare."""
    (term,) = value.terms
    return tuple(sorted(float(factor) for factor in term.factors)), term.divisor


def stacked(factors: tuple[Tensor, ...]) -> Tensor:
    """(F, C): the factors of one gain, scalars spread over the channels."""
    if not factors:
        return torch.ones(1, 1, dtype=torch.float64)
    channels = max(factor.numel() for factor in factors)
    return torch.stack([factor.double().expand(channels) for factor in factors])


def input_gains(layer: Any, term: Term) -> Tensor:
    """What a unit of each input channel is worth, shaped to multiply the layer's weight."""
    gain = stacked(term.factors).prod(0) / term.divisor
    if gain.numel() == 1:
        return gain.view(())
    groups = getattr(layer, "groups", 1)
    rows = gain.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0)
    return rows.view(*rows.shape, *[1] * (layer.weight.dim() - 2))


def as_tuple(x: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """A size for each dimension, from one for all or from a tuple."""
    return (x,) * dims if isinstance(x, int) else tuple(x)


def pool_windows(
    pool: Any, sides: tuple[int, ...], name: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
    """Kernel, stride and padding of an average pool over ``sides``, and whether all windows have the kernel's size.

    Raises:
        ValueError: an adaptive pool, and ``sides`` is empty because the image shape is unknown.
    """
    if isinstance(pool, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        if not sides:
            raise ValueError(f"cannot fold {name}: the image shape is unknown; quantize with data records it")
        out = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * len(sides)
        goal = tuple(o or side for side, o in zip(sides, out, strict=True))
        kernel = tuple(max(1, side // o) for side, o in zip(sides, goal, strict=True))
        uniform = all(side % o == 0 for side, o in zip(sides, goal, strict=True))
        return kernel, kernel, (0,) * len(kernel), uniform
    dims = 1 if isinstance(pool, nn.AvgPool1d) else 2
    kernel, stride, padding = (as_tuple(x, dims) for x in (pool.kernel_size, pool.stride, pool.padding))
    # padding puts zeros into the border's windows, where the bias of a current is not
    return kernel, stride, padding, not pool.ceil_mode and not any(padding)
