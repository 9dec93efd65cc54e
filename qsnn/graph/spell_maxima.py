"""How maxima are spelled: of two values by a ReLU of their difference, over a map by a max pool."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.graph.kinds import ADVICE
from qsnn.graph.modules import Add, ClippedReLU, Permute, Scale, Shift
from qsnn.graph.step import Call, Refused, Spelling

MAX_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
"""By the number of spatial dimensions."""


def _shifted(call: Call, node: fx.Node, value: Tensor) -> fx.Node:
    value = call.fits(value)
    return call.put(Shift(value.detach()), node) if bool((value != 0).any()) else node


def _negative(call: Call, node: fx.Node) -> fx.Node:
    return call.put(Scale(torch.tensor(-1.0)), node)


def clipped(call: Call, low: Any, high: Any) -> fx.Node:
    """Write clip(x, low, high): a ReLU, clipped where there is a ``high``, between two shifts where low is not 0.

    Raises:
        Refused: a limit depends on the image, or both are None.
    """
    limits = [None if limit is None else call.constant(limit) for limit in (low, high)]
    given = (low, high)
    if any(limit is None and value is not None for limit, value in zip(limits, given, strict=True)):
        raise Refused(f"{call.name} with a limit that depends on the image")
    bottom, top = (None if v is None or (v.numel() == 1 and math.isinf(float(v))) else v for v in limits)
    x = call.at(call.x)
    if bottom is None:
        if top is None:
            raise Refused(f"{call.name} without limits")
        # min(x, top) = top - relu(top - x)
        rest = call.put(nn.ReLU(), _shifted(call, _negative(call, x), top))
        return _shifted(call, _negative(call, rest), top)
    if top is None:
        fires: nn.Module = nn.ReLU()
    elif bottom.numel() == 1 and top.numel() == 1:
        if not float(top) > float(bottom):
            raise Refused(f"{call.name} from {float(bottom):g} to {float(top):g}, which is one number")
        fires = ClippedReLU(float(top - bottom))
    else:
        raise Refused(f"{call.name} to tensors of limits; clip to numbers")
    return _shifted(call, call.put(fires, _shifted(call, x, -bottom)), bottom)


def _maximum(call: Call) -> Any:
    """max(a, b) = a + relu(b - a); min likewise, with the signs turned."""
    first, second = call.get(0, "input"), call.get(1, "other")
    along = call.node.kwargs.get("dim", second if isinstance(second, int) else None)
    if along is not None and call.name == "max":
        return [_over_dims(call, call.dims(along), call.get(2, "keepdim", False), call.out[0]), None]
    if second is None or along is not None:
        raise Refused(f"{call.name}: {ADVICE['maximum']}")
    sign = -1.0 if call.name in ("minimum", "min", "fmin") else 1.0
    a, b = call.constant(first), call.constant(second)
    if a is not None or b is not None:
        call = Of(call, second if a is not None else first)
        limit = a if a is not None else b
        return clipped(call, *((limit, None) if sign > 0 else (None, limit)))
    if call.shape(first) != call.shape(second):
        raise Refused(f"compares values of shapes {call.shape(first)} and {call.shape(second)}")
    one, other = call.at(first), call.at(second)
    minus = _negative(call, one if sign > 0 else other)
    gap = call.put(nn.ReLU(), call.put(Add(), other if sign > 0 else one, minus))
    return call.put(Add(), one, gap if sign > 0 else _negative(call, gap))


class Of(Call):
    """A step of which another argument than the first is the value."""

    def __init__(self, call: Call, value: Any) -> None:
        super().__init__(call.speller, call.node)
        self.value = value

    @property
    def x(self) -> fx.Node:
        """The value."""
        found: fx.Node = self.value
        return found


def _absolute(call: Call) -> fx.Node:
    """|x| = relu(x) + relu(-x)."""
    x = call.at(call.x)
    return call.put(Add(), call.put(nn.ReLU(), x), call.put(nn.ReLU(), _negative(call, x)))


def _leaky_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    slope = module.weight if isinstance(module, nn.PReLU) else torch.tensor(float(module.negative_slope))
    return _leaky(call, slope)


def _leaky_function(call: Call) -> fx.Node:
    slope = call.constant(call.get(1, "weight" if "prelu" in call.name else "negative_slope", 0.01))
    if slope is None:
        raise Refused("a slope that depends on the image")
    return _leaky(call, slope)


def _leaky(call: Call, slope: Tensor) -> fx.Node:
    """x above 0 and αx below: relu(x) - α·relu(-x), levels of both signs from two activations."""
    if not call.speller.signed:
        layer = call.speller.raw.get_submodule(str(call.node.target)) if call.node.op == "call_module" else None
        raise Refused(f"{call.name if layer is None else type(layer).__name__}: {ADVICE['LeakyReLU']}")
    x = call.at(call.x)
    above, below = call.put(nn.ReLU(), x), call.put(nn.ReLU(), _negative(call, x))
    if slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (len(call.shape()) - 2))
    factor = nn.Parameter(-slope.detach()) if isinstance(slope, nn.Parameter) or slope.requires_grad else -slope
    return call.put(Add(), above, call.put(Scale(factor), below))


def _over(call: Call) -> fx.Node:
    found = call.get(1, "dim", ())
    return _over_dims(call, call.dims(None if found == () else found), call.get(2, "keepdim", False), call.out)


def _over_dims(call: Call, dims: tuple[int, ...], keep: bool, out: Any) -> fx.Node:
    """A maximum over the map is a max pool; over other dimensions it is one of signals, these moved behind."""
    shape = call.shape()
    if sorted(dims) != list(range(2, len(shape))) or len(shape) - 2 not in MAX_POOLS:
        others, last = [d for d in range(1, len(shape)) if d not in dims], math.prod(shape[d] for d in dims)
        order = (0, *others, *dims)
        node = call.at(call.x) if order == tuple(range(len(shape))) else call.put(Permute(order))
        node = call.view((0, math.prod(shape[d] for d in others), last), node)
        return call.view(out, call.put(nn.MaxPool1d(last), node))
    pooled = call.put(MAX_POOLS[len(shape) - 2](shape[2:]))
    return pooled if keep else call.speller.put(call.node.name, nn.Flatten(), (pooled,))


def _adaptive(call: Call) -> fx.Node:
    return _to_size(call, call.get(1, "output_size"), call.get(2, "return_indices", False))


def _adaptive_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    return _to_size(call, module.output_size, module.return_indices)


def _to_size(call: Call, size: Any, indices: bool) -> fx.Node:
    """An adaptive max pool whose windows are equal is a max pool."""
    sides = call.shape()[2:]
    given = tuple(size) if isinstance(size, list | tuple) else (size,) * len(sides)
    wanted = tuple(side if n is None else n for n, side in zip(given, sides, strict=True))
    if indices:
        raise Refused("return_indices=True: spikes carry no indices")
    if any(side % n for side, n in zip(sides, wanted, strict=True)):
        raise Refused(f"an adaptive maximum from {sides} to {wanted}: its windows overlap; use nn.MaxPool2d")
    return call.put(MAX_POOLS[len(sides)](tuple(side // n for side, n in zip(sides, wanted, strict=True))))


MAXIMA: dict[Any, Spelling] = {
    **dict.fromkeys((torch.maximum, torch.minimum, torch.max, torch.min, torch.fmax, torch.fmin, "maximum", "minimum",
                     "max", "min"), _maximum),
    **dict.fromkeys((torch.abs, torch.absolute, operator.abs, "abs", "absolute"), _absolute),
    **dict.fromkeys((torch.amax, "amax"), _over),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu, "prelu"), _leaky_function),
    **dict.fromkeys((nn.LeakyReLU, nn.PReLU), _leaky_module),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), _adaptive),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _adaptive_module),
}  # fmt: skip
"""Functions, method names and modules that take maxima, each with how it is spelled."""
