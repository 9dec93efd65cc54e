"""Calibrating a spiking network on the spikes that really arrive: thresholds, biases, weights, layer by layer."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.graph.call import Call, calling
from qsnn.graph.kinds import does
from qsnn.graph.trace import called_once, module_of
from qsnn.snn.equations import per_channel
from qsnn.snn.network import SNN
from qsnn.snn.neurons import IFNode

THRESHOLDS = ("mse", "max", "percentile")
CORRECTIONS = ("weights", "bias", "none")

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e3)
"""Pulls of the least-squares weights towards the trained ones, in mean squares of an input; the last: bias alone."""
_PATCHES = 65_536
"""At most so many patches, evenly spaced, go into a least-squares fit (or 8 for each unknown, where that is more)."""
_ELEMENTS = 2**22
"""At most so many values of a step, in whole images, decide on a threshold."""


@torch.no_grad()
def correct_(
    snn: SNN, reference: fx.GraphModule, images: Tensor, *, threshold: str, percentile: float, correction: str
) -> None:
    r"""Fit a spiking network to the network it was made from, layer by layer in graph order, in place.

    All calibration images run at once, sorted, so their order does not matter. At every convolution or linear layer
    behind a neuron the input :math:`\bar u`, the mean over the T steps of what really arrives, is compared with what
    the layer gave in the reference, z:

    * "weights": :math:`W', b' = \arg\min \sum (W'\bar u + b' - z)^2 + \lambda |W' - W|^2`, in closed form; of
      five λ, the one that errs least on a quarter of the images, fitted on the others;
    * "bias": :math:`b' = b + \mathrm{mean}(z - W\bar u)` by channel. Layers with quantized weights get this one, or,
      where a batch norm follows, its line by channel that fits best.

    Every neuron that replaces a plain ReLU then takes the θ of each channel that suits the current that now arrives:
    "max" and "percentile" of the reference's activation y, or ("mse") the one of 24 fractions of its maximum with the
    least mean-squared error of :math:`\theta\,\mathrm{rate} - y` after T simulated steps.

    Args:
        snn: made for the T and firing that it is calibrated for.
        reference: the same graph with its activations.
        images: calibration images.
        threshold, percentile, correction: see :class:`qsnn.ConvertConfig`.
    Shape:
        images: (B, C, H, W).
    Source:
        Li et al., "A Free Lunch From ANN", ICML 2021 (calibration on arriving spikes); Nagel et al. 2019 (bias).
    """
    images = images[images.flatten(1).double().sum(1).argsort()]  # whatever order they came in
    spiking, exact = _Stepper(snn.network), _Stepper(reference)
    spiking.start(images)
    exact.start(images)
    steps = snn.timesteps
    arriving: set[fx.Node] = set()
    once = called_once(snn.network)
    with calling(Call(steps, snn.firing)):
        for node in snn.network.graph.nodes:
            module = module_of(snn.network, node)
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            if isinstance(module, IFNode):
                if module.threshold.dim():  # in the place of a plain ReLU
                    current = _in_time(spiking.values[source], steps, module.constant_input)
                    wanted = exact.advance(node.name)
                    theta = _threshold(module, current, wanted, snn.firing, threshold, percentile)
                    module.threshold.data = theta.double()
                arriving.add(node)
            elif any(one in arriving for one in node.all_input_nodes):
                arriving.add(node)
                if correction != "none" and does(module) == "weighs" and str(node.target) in once:
                    mean = spiking.values[source].unflatten(0, (steps, -1)).mean(0)
                    _fit_layer_(module, mean, exact.advance(node.name), correction)
                elif correction != "none" and _affine(module) and _quantized(snn.network, source):
                    mean = spiking.values[source].unflatten(0, (steps, -1)).mean(0)
                    _fit_line_(module, mean, exact.advance(node.name))
            spiking.advance(node.name)


class _Stepper(fx.Interpreter):
    """Runs a graph node by node and forgets what no later node needs."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.order = list(network.graph.nodes)
        self.values: dict[Any, Any] = {}

    def start(self, images: Tensor) -> None:
        self.args_iter = iter([images])
        self.env = self.values
        self.place = 0

    def advance(self, name: str) -> Tensor:
        """Run up to the node of this name; return its value."""
        value = None
        while self.place < len(self.order):
            node = self.order[self.place]
            self.place += 1
            value = self.values[node] = self.run_node(node)
            for done in self.user_to_last_uses.get(node, []):
                if done is not node:
                    del self.values[done]
            if node.name == name:
                return value
        raise ValueError(f"no node {name} is left to run")


def _in_time(current: Tensor, steps: int, constant: bool) -> Tensor:
    """(T, B, C, *) from (T·B, C, *), or from one step that stands for all."""
    return current.expand(steps, *current.shape) if constant else current.unflatten(0, (steps, -1))


def _affine(module: nn.Module | None) -> bool:
    return does(module) == "normalises" and bool(module.affine)  # type: ignore[union-attr]


def _quantized(network: fx.GraphModule, node: fx.Node | None) -> bool:
    return hasattr(module_of(network, node), "weight_quant")


def _by_channel(x: Tensor) -> Tensor:
    """(C, N) from (B, C, *)."""
    return x.transpose(0, 1).flatten(1)


def _threshold(neuron: IFNode, current: Tensor, wanted: Tensor, firing: str, method: str, percentile: float) -> Tensor:
    """θ of each channel, (C,), for a current (T, B, C, *) whose rate should be wanted/θ, (B, C, *)."""
    values = _by_channel(wanted)
    top = values.amax(1)
    highest = top.max() if bool(top.max() > 0) else torch.ones_like(top.max())
    top = torch.where(top > 0, top, highest)  # a channel that is never active should stay silent
    if method == "max":
        return top
    if method == "percentile":
        rank = max(1, math.ceil(values.shape[1] * percentile / 100))
        theta = values.kthvalue(rank, dim=1).values
        return torch.where(theta > 0, theta, top)
    every = math.ceil(wanted.numel() / _ELEMENTS)
    current, wanted = current[:, ::every], wanted[::every]
    trial = copy.deepcopy(neuron)
    best, least = top, torch.full_like(top, float("inf"))
    for fraction in torch.linspace(0.04, 1.0, 25, device=top.device)[1:]:
        theta = top * fraction
        trial.threshold.data = theta.double()
        rate = trial.fired(current, firing).mean(0)
        error = _by_channel((rate * per_channel(theta, rate.dim())).sub_(wanted).square_()).mean(1)
        better = error < least
        best, least = torch.where(better, theta, best), torch.where(better, error, least)
    return best


def _fit_layer_(layer: Any, x: Tensor, wanted: Tensor, correction: str) -> None:
    """Correct a layer's bias, and its float weights, so that it gives ``wanted`` for x."""
    if isinstance(layer, nn.Linear):  # each token is an input of its own
        x, wanted = x.flatten(0, -2), wanted.flatten(0, -2)
    missing = wanted - layer(x)
    solvable = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear) and not hasattr(layer, "weight_quant")
    if correction == "bias" or not solvable or isinstance(getattr(layer, "padding", 0), str):
        if layer.bias is not None:
            layer.bias.add_(_by_channel(missing).mean(1))
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
    change = _solved(fit[0] + check[0], fit[1] + check[1], best).mT.flatten(0, 1).to(x.dtype)  # (C_out, inputs + 1)
    layer.weight.add_(change[:, :-1].reshape(layer.weight.shape))
    layer.bias.add_(change[:, -1])


def _sums(layer: Any, x: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of patch · patch and patch · error over images: (groups, n, n) and (groups, n, C_out / groups), float64."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    inputs = layer.weight[0].numel() + 1
    squares = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=x.device)
    products = torch.zeros(groups, inputs, len(layer.weight) // groups, dtype=torch.float64, device=x.device)
    every = max(1, len(x) * math.prod(missing.shape[2:]) // max(_PATCHES, 8 * inputs))
    for first in range(0, len(x), 32):
        start = first % every
        patches = _patches(layer, x[first : first + 32])[:, start::every]
        errors = missing[first : first + 32].flatten(2) if missing.dim() > 2 else missing[first : first + 32, :, None]
        errors = errors.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)[:, start::every]
        squares += (patches.mT @ patches).double()
        products += (patches.mT @ errors).double()
    return squares, products


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


def _fit_line_(norm: Any, x: Tensor, wanted: Tensor) -> None:
    """Give a batch norm the line by channel that fits ``wanted`` best; a channel that is constant gets its mean."""
    given, wanted = _by_channel(norm(x)), _by_channel(wanted)
    centre, goal = given.mean(1), wanted.mean(1)
    spread = given.var(1, correction=0)
    slope = ((given - centre[:, None]) * (wanted - goal[:, None])).mean(1) / spread.clamp(min=1e-12)
    slope = torch.where(spread > 1e-12, slope, torch.zeros_like(slope)).clamp(0.25, 4.0)
    norm.weight.mul_(slope)
    norm.bias.copy_(norm.bias * slope + goal - centre * slope)
