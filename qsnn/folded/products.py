"""Products of counts in a folded network: integers times integers, with the bounds that prove them exact."""

from __future__ import annotations

import torch
from torch import Tensor

from qsnn.folded.layers import exact_dtype
from qsnn.graph.call import this_call
from qsnn.snn.counts import CountProduct


class IntegerProduct(CountProduct):
    r"""Counts times counts, exact: :math:`N = \sum_i \big(\sum_t m_t\big) \big(\sum_t n_t\big)`.

    In float32, rounded to the nearest integer, where all sums that follow stay below 2**23, else in float64. A unit of
    N is worth the product of what units of m and n are worth over T for each of the two that was summed over time.

    Args:
        product: whose equation and timing are taken.
        bounds: largest m and n of one step.
        steps: for each of the two how many sums over time N has of it: bounds times T^steps.
        summed: products in each sum.
    Shape:
        m and n: (T·B, \*) or (B, \*), integers; N: (B, \*), integers in float32 or float64.
    Source:
        Katharopoulos et al., ICML 2020 (linear attention).
    """

    def __init__(self, product: CountProduct, bounds: tuple[float, float], steps: tuple[int, int], summed: int) -> None:
        super().__init__(product.equation, product.timed)
        self.bounds, self.each_steps = bounds, steps
        self.bound, self.steps = bounds[0] * bounds[1] * summed, sum(steps)

    def bits(self, timesteps: int) -> tuple[int, int]:
        """Of the largest counts that are multiplied at T [bit]."""
        (a, b), (first, second) = self.bounds, self.each_steps
        return int(a * timesteps**first).bit_length(), int(b * timesteps**second).bit_length()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The product of the sums over T."""
        call = this_call()
        dtype = exact_dtype(self.bound * call.timesteps ** (self.steps + 1))
        counts = (total.to(dtype) for total in self.totals(call, x.double(), y.double()))
        return self.at_every_step(call, torch.einsum(self.equation, *counts).round_())
