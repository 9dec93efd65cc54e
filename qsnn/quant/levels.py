"""The integers of an activation's levels, as Brevitas' quantizers are put together from parts."""

from __future__ import annotations

import torch
from brevitas.core.quant import IntQuant
from brevitas.core.utils import StatelessBuffer
from torch import Tensor, nn


class LevelIntQuant(IntQuant):
    r"""Brevitas' integer quantizer of any levels: :math:`\mathrm{clip}(\lfloor x/s + \tfrac12\rfloor, n_0, L)`.

    :math:`n_0 = 0`, or :math:`-L` where signed; s: the step. The gradient passes straight through the rounding.

    Source: Jacob et al., "Quantization and Training of Neural Networks ...", CVPR 2018.
    """

    def __init__(
        self, levels: int, signed: bool, narrow_range: bool, input_view_impl: nn.Module, float_to_int_impl: nn.Module
    ) -> None:
        super().__init__(narrow_range, signed, input_view_impl, float_to_int_impl)
        self.levels = levels

    def min_int(self, bit_width: Tensor) -> Tensor:
        """0, or -L when signed, as ()."""
        return torch.full_like(bit_width, -self.levels if self.signed else 0)

    def max_int(self, bit_width: Tensor) -> Tensor:
        """L, as ()."""
        return torch.full_like(bit_width, self.levels)


class LevelScaling(nn.Module):
    """The integer that the threshold θ is divided by to give the step, s = θ / L."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = StatelessBuffer(torch.tensor(float(levels)))

    def forward(self, bit_width: Tensor) -> Tensor:
        """L, as (), whatever the bit width."""
        return self.levels()
