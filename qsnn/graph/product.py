"""The product of two values of a network, in all its forms one module: what is summed over is written as letters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Product(nn.Module):
    r"""A product of two quantized values: of matrices, of elements, or any that ``torch.einsum`` writes for two.

    .. math::
        p_{b,o} = \sum_{i}\, x_{b,\cdot}\; y_{b,\cdot}, \qquad
        x = s_x m,\; y = s_y n \;\Rightarrow\; p = s_x s_y \sum_i m\,n

    with the letters i that the result does not have. Integers m and n give an integer times one scale, so that what
    follows (a batch norm, a layer, a quantized ReLU) sees integers. Converted it is a
    :class:`~qsnn.snn.neurons.CountProduct`: computed on counts, not on spikes.

    Args:
        equation: "abc,acd->abd"; the first letter of all three is the batch, and no letter stands twice in one.
    Shape:
        x, y and p: (B, \*), as the equation says.
    Source:
        Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", ICML 2020
        (attention without a softmax is two such products).

    >>> Product("abc,acd->abd")(torch.ones(1, 2, 3), torch.full((1, 3, 1), 2.0)).tolist()
    [[[6.0], [6.0]]]
    """

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def summed(self, x: tuple[int, ...], y: tuple[int, ...]) -> int:
        """Products in each sum, for values of these shapes (B, \\*)."""
        sides, out = self._sides(x, y), self.equation.partition("->")[2]
        return math.prod(side for letter, side in sides.items() if letter not in out)

    def macs(self, x: tuple[int, ...], y: tuple[int, ...]) -> int:
        """Multiply-accumulates of one image, for values of these shapes (B, \\*)."""
        return math.prod(side for letter, side in self._sides(x, y).items() if letter != self.equation[0])

    def _sides(self, x: tuple[int, ...], y: tuple[int, ...]) -> dict[str, int]:
        first, second = self.equation.partition("->")[0].split(",")
        sides: dict[str, int] = {}
        for letter, side in (*zip(first, x, strict=True), *zip(second, y, strict=True)):
            sides[letter] = max(side, sides.get(letter, 1))  # a side of 1 is repeated
        return sides

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, *) and (B, *) -> (B, *)."""
        return torch.einsum(self.equation, x, y)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return self.equation
