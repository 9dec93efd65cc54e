"""What fits best, in closed form or by trying: weights and biases of a layer; θ, v₀ and bias of a neuron's channels."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsnn.snn.neurons import IFNode

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e3)
"""Pulls of the least-squares weights towards the trained ones, in mean squares of an input; the last: bias alone."""
_PATCHES = 65_536
"""At most so many patches, evenly spaced, go into a least-squares fit (or 8 for each unknown, where that is more)."""
_UNFOLDED = 2**23
"""At most so many values of patches are held at a time (32 MiB of float32)."""
_ROUNDS = 3
"""So often a fit behind a ReLU is made again, without what the ReLU takes away."""
_THRESHOLDS = torch.linspace(0.04, 1.0, 25)[1:].tolist()
"""Thresholds that are tried, in a channel's largest activations."""
_STARTS = (0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9)
_SHIFTS = (-0.2, -0.15, -0.1, -0.05, 0.05, 0.1, 0.15, 0.2)
_NEARBY = (0.7, 0.8, 0.9, 1.1, 1.2, 1.35)
"""Then, twice: v₀ and changes of the bias, in θ, and factors on θ."""


def by_channel(x: Tensor) -> Tensor:
    """(C, N) from (B, C, *)."""
    return x.transpose(0, 1).flatten(1)


def fit_layer_(
    layer: Any,
    x: Tensor,
    missing: Tensor,
    correction: str,
    gain: Tensor | None = None,
    *,
    rectified: Tensor | None = None,
) -> None:
    r"""Correct a layer's bias, and its float weights, so that it gives ``missing`` more than it does for x.

    Args:
        layer: called once in its network.
        x: what arrives, the mean over T.
        missing: what its answer lacks; behind a batch norm, in units of that one's answer.
        correction: "weights" or "bias".
        gain: g of each channel of the batch norm behind it, (C,).
        rectified: what the ReLU behind it should see: where that is not positive, any answer that is not will do.
    Source:
        Zhang et al., "Accelerating Very Deep Convolutional Networks", TPAMI 2016 (least squares behind a ReLU).
    """
    if isinstance(layer, nn.Linear):  # each token is an input of its own
        x, missing = x.flatten(0, -2), missing.flatten(0, -2)
        rectified = None if rectified is None else rectified.flatten(0, -2)
    gain = missing.new_ones(missing.shape[1]) if gain is None else gain
    reached = gain.abs() > 1e-3 * gain.abs().max()  # a channel that the batch norm takes away stays as it is
    share = torch.where(reached, gain, float("inf"))
    solvable = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear) and not hasattr(layer, "weight_quant")
    if correction == "bias" or not solvable or isinstance(getattr(layer, "padding", 0), str):
        if layer.bias is not None:
            layer.bias.add_(by_channel(missing).mean(1) / share)
        return
    held = torch.arange(len(x), device=x.device) % 4 == 1
    fit, check = _sums(layer, x[~held], missing[~held]), _sums(layer, x[held], missing[held])
    best, least = _RIDGES[0], float("inf")
    for ridge in _RIDGES:
        change = _solved(*fit, ridge)
        squares, products = check  # the error on images that were not fitted, but for a constant
        error = float((change * (squares @ change - 2 * products)).sum())
        if error < least:
            best, least = ridge, error
    squares, products = fit[0] + check[0], fit[1] + check[1]
    change = _solved(squares, products, best)
    for _ in range(0 if rectified is None else _ROUNDS):
        left = _sums(layer, x, missing, change, rectified)[1]
        change = _solved(squares, squares @ change + left, best)
    flat = change.mT.flatten(0, 1)  # (C_out, inputs + 1)
    flat = (flat / share[:, None].double()).to(x.dtype)
    layer.weight.add_(flat[:, :-1].reshape(layer.weight.shape))
    layer.bias.add_(flat[:, -1])


def _sums(
    layer: Any, x: Tensor, missing: Tensor, change: Tensor | None = None, rectified: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of patch · patch and patch · error over images: (groups, n, n) and (groups, n, C_out / groups), float64.

    With a change of the weights the error is what is left after it, behind a ReLU, and patch · patch is left out.
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    inputs = layer.weight[0].numel() + 1
    squares = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=x.device)
    products = torch.zeros(groups, inputs, len(layer.weight) // groups, dtype=torch.float64, device=x.device)
    places = math.prod(missing.shape[2:])
    every = max(1, len(x) * places // max(_PATCHES, 8 * inputs))
    while math.gcd(every, places) > 1:  # else the same columns of every image
        every += 1
    some = min(4096 if places == 1 else 32, max(1, _UNFOLDED // (places * inputs * groups)))
    for first in range(0, len(x), some):
        start = first % every
        patches = _patches(layer, x[first : first + some])[:, start::every]
        errors = _as_patches(missing[first : first + some], groups)[:, start::every]
        if change is None or rectified is None:
            squares += (patches.mT @ patches).double()
        else:
            errors = errors - patches @ change.to(patches.dtype)
            goal = _as_patches(rectified[first : first + some], groups)[:, start::every]
            errors = torch.where(goal > 0, errors, (errors - goal).clamp(max=0))
        products += (patches.mT @ errors).double()
    return squares, products


def _as_patches(values: Tensor, groups: int) -> Tensor:
    """(B, C, *) as (groups, B·places, C / groups)."""
    values = values.flatten(2) if values.dim() > 2 else values[:, :, None]
    return values.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def _solved(squares: Tensor, products: Tensor, ridge: float) -> Tensor:
    """The change of weights and bias that fits best, pulled towards 0 by ``ridge`` mean squares of an input."""
    squares = squares.clone()
    diagonal = squares.diagonal(dim1=1, dim2=2)
    diagonal[:, :-1] += ridge * diagonal[:, :-1].mean(1, keepdim=True).clamp(min=1e-12)
    diagonal[:, -1].clamp_(min=1.0)  # no images, no bias
    return torch.linalg.solve(squares, products)


def _patches(layer: Any, x: Tensor) -> Tensor:
    """What each output sees, and a 1 for the bias: (groups, B·places, inputs + 1)."""
    if isinstance(layer, nn.Linear):
        seen = x.unsqueeze(0)
    else:
        options = [layer.kernel_size, layer.dilation, layer.padding, layer.stride]
        if x.dim() == 3:  # a signal is an image of one line
            x, options = x.unsqueeze(2), [(neutral, *o) for neutral, o in zip((1, 1, 0, 1), options, strict=True)]
        unfolded = F.unfold(x, *options)  # (B, C_in·kernel, places)
        seen = unfolded.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return torch.cat([seen, torch.ones_like(seen[..., :1])], -1)


def fit_line_(norm: Any, x: Tensor, wanted: Tensor) -> None:
    """Give a batch norm the line by channel that fits ``wanted`` best; a channel that is constant gets its mean."""
    given, wanted = by_channel(norm(x)), by_channel(wanted)
    centre, goal = given.mean(1), wanted.mean(1)
    spread = given.var(1, correction=0)
    slope = ((given - centre[:, None]) * (wanted - goal[:, None])).mean(1) / spread.clamp(min=1e-12)
    slope = torch.where(spread > 1e-12, slope, torch.zeros_like(slope)).clamp(0.25, 4.0)
    norm.weight.mul_(slope)
    norm.bias.copy_(norm.bias * slope + goal - centre * slope)


def largest(wanted: Tensor) -> Tensor:
    """The largest activation of each channel, (C,), of (B, C, *); of one that is never active, that of all."""
    top = by_channel(wanted).amax(1)
    highest = top.max() if bool(top.max() > 0) else torch.ones_like(top.max())
    return torch.where(top > 0, top, highest)  # a channel that is never active should stay silent


def percentile_of(wanted: Tensor, percentile: float) -> Tensor:
    """The percentile [%] of each channel's activations, (C,), of (B, C, *); its largest where that is 0."""
    values, top = by_channel(wanted), largest(wanted)
    theta = values.kthvalue(max(1, math.ceil(values.shape[1] * percentile / 100)), dim=1).values
    return torch.where(theta > 0, theta, top)


class Trial:
    r"""A neuron on samples of its current: which θ, v₀ and change of bias by channel err least.

    The error of a channel is the mean square of :math:`\theta\,\mathrm{rate} - y` after T steps.

    Args:
        neuron: not changed.
        current: x of each step.
        wanted: y.
        top: the largest y of each channel, (C,).
        firing: "online" or "deferred".
    Shape:
        current: (T, N, C); wanted: (N, C).
    """

    def __init__(self, neuron: IFNode, current: Tensor, wanted: Tensor, top: Tensor, firing: str) -> None:
        self.neuron, self.current, self.wanted, self.firing = copy.deepcopy(neuron), current, wanted, firing
        self.top, self.threshold = top, top
        self.initial = neuron.initial.to(top).expand_as(top)
        self.shift = torch.zeros_like(top)
        self.least = torch.full_like(top, float("inf"))

    def _scan(self, what: str, values: list[Tensor]) -> None:
        """Keep for each channel the "threshold", "initial" or "shift" that errs least, the others as they are."""
        now = {"threshold": self.threshold, "initial": self.initial, "shift": self.shift}
        best = now[what]
        for value in values:
            tried = {**now, what: value}
            self.neuron.threshold.data = tried["threshold"].double()
            self.neuron.initial.data = tried["initial"].double()
            rate = self.neuron.fired(self.current + tried["shift"], self.firing).mean(0)
            error = (rate * tried["threshold"] - self.wanted).square_().mean(0)
            better = error < self.least
            self.least, best = torch.where(better, error, self.least), torch.where(better, value, best)
        setattr(self, what, best)

    def thresholds(self) -> None:
        """Try θ alone."""
        self._scan("threshold", [self.top * fraction for fraction in _THRESHOLDS])

    def starts(self, shifts: bool) -> None:
        """Then v₀, changes of the bias where the current has one that can be changed, and θ, one after the other."""
        for _ in range(2):
            self._scan("initial", [torch.full_like(self.top, start) for start in _STARTS])
            if shifts:
                self._scan("shift", [self.shift + part * self.threshold for part in _SHIFTS])
            self._scan("threshold", [self.threshold * factor for factor in _NEARBY])


def samples(places: int, count: int) -> Tensor:
    """Indices of ``count`` of so many places, scattered but always the same; all where there are fewer."""
    if places <= count:
        return torch.arange(places)
    return torch.randperm(places, generator=torch.Generator().manual_seed(0))[:count].sort().values
