"""What a node of a spiking graph stands for when it is folded: integers times gains, plus a bias a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx


@dataclass(frozen=True)
class Term:
    """A node of the new graph and what one unit of it is worth: the product of ``factors`` over ``divisor``."""

    node: fx.Node
    factors: tuple[Tensor, ...] = ()
    divisor: int = 1
    integer: bool = True
    bound: float = 1.0

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


def as_tuple(x: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """A size for each dimension, from one for all or from a tuple."""
    return (x,) * dims if isinstance(x, int) else tuple(x)
