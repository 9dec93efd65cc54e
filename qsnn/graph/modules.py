"""The layers of a spelled network that torch.nn does not have: each is one operation with its numbers fixed.

All keep the images of a batch apart: dimension 0 is the batch (in time: T·B), and no operation mixes or moves it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Step(torch.autograd.Function):
    """[x >= λ], with a box of area 1 and width w around λ in the place of its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: Tensor, width: Tensor, gain: float) -> Tensor:
        ctx.save_for_backward(x, level, width)
        ctx.gain = gain
        return (x >= level).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, level, width) = grads, ctx.saved_tensors
        inside = grad * ((x - level).abs() < 0.5 * width) / width
        to_level = -ctx.gain * inside.sum_to_size(level.shape) if ctx.needs_input_grad[1] else None
        return inside, to_level, None, None


def step_at(x: Tensor, level: Tensor, width: Tensor, gain: float) -> Tensor:
    r"""Return [x >= λ] with :math:`\partial/\partial x = [\,|x-\lambda| < w/2\,]/w`; that to λ is -gain times it.

    Shape:
        x and returned: (\*); level λ and width w: broadcast against x.
    """
    if torch.is_grad_enabled() and (x.requires_grad or level.requires_grad):
        return _Step.apply(x, level, width, gain)  # type: ignore[no-any-return]
    return (x >= level).to(x.dtype)


class Gate(nn.Module):
    r"""A step with one learned level λ: what multiplies a value by 0 or 1, and so has an exact spiking form.

    .. math::
        a = [\,x \ge \lambda\,], \qquad
        \frac{\partial a}{\partial x} = \frac{[\,|x - \lambda| < w/2\,]}{w}, \qquad
        \frac{\partial a}{\partial \lambda} = -\frac{1}{\sqrt N}\,\frac{[\,|x - \lambda| < w/2\,]}{w}

    with N elements a sample. ``gate(x) * value`` broadcasts as usual. Quantized, it stays as it is: one level, 0 or 1,
    no scale of its own; the product keeps the levels of the value, integers times one scale. Converted, it is a
    :class:`~qsnn.snn.neurons.GateNode`.

    Args:
        level: λ at the start [units of x].
        width: w > 0, over which the gradient passes straight through [units of x]; take the spread of x.
    Shape:
        x and a: (B, \*).
    Raises:
        ValueError: the width is not above 0, or a number is not finite.
    Source:
        Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013 (straight-through);
        Esser et al., ICLR 2020 (the gradient of a step by the square root of N).

    >>> gate = Gate(level=1.0)
    >>> gate(torch.tensor([[0.5, 1.0, 3.0]])) * torch.tensor([[7.0, 7.0, 7.0]])
    tensor([[0., 7., 7.]], grad_fn=<MulBackward0>)
    """

    level: nn.Parameter

    def __init__(self, level: float = 1.0, width: float = 1.0) -> None:
        super().__init__()
        if not 0 < width < float("inf") or not abs(level) < float("inf"):
            raise ValueError(f"expected a finite level and a width above 0, got {level} and {width}")
        self.level = nn.Parameter(torch.tensor(float(level)))
        self.width = float(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> 0 or 1, (B, *)."""
        level = self.level.to(x.dtype)
        return step_at(x, level, level.new_tensor(self.width), (x[:1].numel() or 1) ** -0.5)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"level={float(self.level.detach()):.4g}, width={self.width:g}"


class Gating(nn.Module):
    """a·y, for a gate a of 0 and 1 and any value y of the network: an AND, where y are spikes.

    Args:
        spikes: in the integer form, whether y are spikes or sums of them: each is then counted as one AND.
    """

    def __init__(self, *, spikes: bool = False) -> None:
        super().__init__()
        self.spikes = spikes

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        """(B, *) and (B, *), broadcast against each other -> (B, *)."""
        return gate * value


class Add(nn.Module):
    """x + y, for two values of the network."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, *) and (B, *) -> (B, *)."""
        return x + y


class Concat(nn.Module):
    """Values side by side along a dimension, 1 for channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *parts: Tensor) -> Tensor:
        """Any number of (B, *) -> (B, *)."""
        return torch.cat(parts, self.dim)


class Scale(nn.Module):
    """x·a, for a number or a tensor a that does not depend on the image.

    Args:
        value: a; a parameter stays one and is trained.
    Shape:
        a: broadcast against x; its dimension 0 is 1 where it has as many as x.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        _keep(self, value)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return x * self.value


class Shift(nn.Module):
    """x + b, for a number or a tensor b that does not depend on the image: a bias, a position map.

    Args:
        value: b; a parameter stays one and is trained.
    Shape:
        b: broadcast against x; its dimension 0 is 1 where it has as many as x.
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        _keep(self, value)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return x + self.value


def _keep(module: nn.Module, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        module.value = value
    else:
        module.register_buffer("value", value.detach().clone())


class ClippedReLU(nn.Module):
    r""":math:`\min(\max(x, 0), a)`; ReLU6 is a = 6.

    Args:
        cap: a > 0 [units of x].
    """

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return F.hardtanh(x, 0.0, self.cap)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"cap={self.cap:g}"


class View(nn.Module):
    """The same values in the same order in another shape; the batch takes what the named sides leave.

    Args:
        shape: every side but the first.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B', *shape)."""
        return x.reshape(-1, *self.shape)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return str(self.shape)


class Permute(nn.Module):
    """Dimensions in another order.

    Args:
        dims: for each dimension of the output, the one of the input; the first is 0.
    """

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return str(self.dims)


class Slice(nn.Module):
    """A part of the values: ``x[:, start:stop:step, ...]``.

    Args:
        bounds: (start, stop, step) of each dimension behind the batch; what is not named is kept whole.
    """

    def __init__(self, bounds: tuple[tuple[int, int, int], ...]) -> None:
        super().__init__()
        self.bounds = bounds

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return x[(slice(None), *(slice(*bound) for bound in self.bounds))]

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return str(self.bounds)


class Index(nn.Module):
    """Values at chosen places along one dimension, in any order, some of them several times or never.

    Args:
        dim: which, counted from the start; 0 is the batch, and stays.
        places: (N,) whole numbers.
    """

    places: Tensor

    def __init__(self, dim: int, places: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("places", places.long())

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *), with N places along ``dim``."""
        return x.index_select(self.dim, self.places)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"dim={self.dim}, {len(self.places)} places"


class Pad(nn.Module):
    """Zeros around the values; a negative number cuts off.

    Args:
        pads: as ``torch.nn.functional.pad`` takes them: before and after, the last dimension first.
    """

    def __init__(self, pads: tuple[int, ...]) -> None:
        super().__init__()
        self.pads = pads

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return F.pad(x, self.pads)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return str(self.pads)


class Upsample(nn.Module):
    """Nearest neighbour: each value k times along each of the last dimensions.

    Args:
        factors: k of each spatial dimension.
    """

    def __init__(self, factors: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *) -> (B, C, *)."""
        for place, factor in enumerate(self.factors, x.dim() - len(self.factors)):
            x = x.repeat_interleave(factor, place) if factor > 1 else x
        return x

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return str(self.factors)


class Mean(nn.Module):
    """The mean over dimensions behind the batch.

    Args:
        dims: which, counted from the start.
        keepdim: whether they stay, with side 1.
    """

    def __init__(self, dims: tuple[int, ...], keepdim: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return x.mean(self.dims, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"{self.dims}, keepdim={self.keepdim}"


class Sum(Mean):
    """The sum over dimensions behind the batch."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) -> (B, *)."""
        return x.sum(self.dims, keepdim=self.keepdim)
