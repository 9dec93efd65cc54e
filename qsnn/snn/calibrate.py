"""Calibrating spiking networks on the spikes that really arrive: thresholds, biases, weights, layer by layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.data.shown import shown
from qsnn.graph.call import Call
from qsnn.graph.kinds import does
from qsnn.graph.trace import value_shapes
from qsnn.snn.fits import Trial, fit_layer_, fit_line_, largest, percentile_of, samples
from qsnn.snn.network import SNN
from qsnn.snn.neurons import IFNode
from qsnn.snn.pieces import Pieces, Reference, in_pieces

THRESHOLDS = ("mse", "max", "percentile")
CORRECTIONS = ("weights", "bias", "none")
INITIALS = ("mse", "half")
TARGETS = ("sums", "layers")

_SEEN = 128
"""Images that decide on a neuron, or more where they have few places."""
_SAMPLES = 8192
"""Values of each channel that decide on it (of each step; a quarter of them where steps are more than 8)."""


@torch.no_grad()
def correct_(
    snns: list[SNN],
    reference: fx.GraphModule,
    images: Tensor,
    *,
    threshold: str,
    percentile: float,
    correction: str,
    initial: str,
    targets: str,
) -> None:
    r"""Fit spiking networks to the network that they were made from, layer by layer in graph order, in place.

    The images are sorted, so their order does not matter. At every convolution or linear layer behind a neuron the
    input :math:`\bar u`, the mean over the T steps of what really arrives, is compared with what the layer gave in the
    reference, z:

    * "weights": :math:`W', b' = \arg\min \sum (W'\bar u + b' - z)^2 + \lambda |W' - W|^2`, in closed form; of
      five λ, the one that errs least on a quarter of the images, fitted on the others. Behind a ReLU only what it lets
      through counts: where z <= 0, any answer that is not positive will do;
    * "bias": :math:`b' = b + \mathrm{mean}(z - W\bar u)` by channel. Layers with quantized weights get this one, or,
      where a batch norm follows, its line by channel that fits best.

    Where the layer ends in an addition (of a residual block, say), z is the sum of the reference less the mean of what
    really comes over the other way, which thus loses its error too ("sums"; "layers" leaves that error alone).

    Every neuron that replaces a plain ReLU then takes the θ of each channel that suits the current that now arrives:
    "max" and "percentile" of the reference's activation y, or ("mse") the one of 24 fractions of its maximum with the
    least mean-squared error of :math:`\theta\,\mathrm{rate} - y` after T simulated steps; with ``initial`` "mse" v₀ and
    a change of the bias in front are chosen with it.

    Args:
        snns: made from one network, each for the T and firing that it is calibrated for.
        reference: the same graph with its activations.
        images: calibration images.
        threshold, percentile, correction, initial, targets: see :class:`qsnn.ConvertConfig`.
    Shape:
        images: (B, C, H, W).
    Source:
        Li et al., "A Free Lunch From ANN", ICML 2021 (calibration on arriving spikes, v₀); Nagel et al. 2019 (bias).
    """
    shapes = value_shapes(reference, tuple(images.shape[1:]))
    parts = in_pieces(images, max(math.prod(shape) for shape in shapes.values()))
    walks = [Pieces(snn.network, parts, Call(snn.timesteps, snn.firing)) for snn in snns]
    first = walks[0]
    jobs = {node.name: _job(first, node, correction) for node in first.order}
    ends = [_end(first, node, targets)[1] for node in first.order if jobs[node.name] in ("layer", "line")]
    watched = {name for name, job in jobs.items() if job} | {end.name for end in ends if end is not None}
    exact = Reference(reference, torch.cat(parts), watched)
    for index, node in enumerate(shown(first.order, "converting")):
        job = jobs[node.name]
        for walk in walks:
            one = walk.order[index]
            if job == "neuron":
                wanted = exact.value(one.name)
                _choose_(walk, one, wanted, threshold, percentile, initial)
            elif job:
                _correct_(walk, one, exact, targets, correction)
            walk.keep(one)
        exact.forget(node.name)


def _job(walk: Pieces, node: fx.Node, correction: str) -> str:
    """What there is to fit at a node: a "neuron", a "layer", a "line", or nothing."""
    module = walk.layer(node)
    if isinstance(module, IFNode):
        return "neuron" if module.threshold.dim() else ""  # in the place of a plain ReLU
    if correction == "none" or node not in walk.arriving or not node.all_input_nodes:
        return ""
    if node.all_input_nodes[0] not in walk.arriving:
        return ""
    if does(module) == "weighs" and str(node.target) in walk.once:
        return "layer"
    quantized = hasattr(walk.layer(node.all_input_nodes[0]), "weight_quant")
    return "line" if quantized and _affine(module) else ""


def _end(walk: Pieces, node: fx.Node, targets: str) -> tuple[list[nn.Module], fx.Node | None]:
    """The batch norms behind a layer that nothing else reads, and the addition that the layer is fitted to.

    None for it where there is none, or its other value is not known yet.
    """
    lines: list[nn.Module] = []
    last = node
    while len(last.users) == 1:
        (user,) = last.users
        module = walk.layer(user)
        if does(module) == "adds":
            others = [value for value in user.all_input_nodes if value is not last]
            known = targets == "sums" and len(others) == 1 and walk.place[others[0]] < walk.place[node]
            return lines, user if known else None
        if does(module) not in ("normalises", "passes"):
            break
        lines.append(module)  # type: ignore[arg-type]
        last = user
    return lines, None


def _correct_(walk: Pieces, node: fx.Node, exact: Reference, targets: str, correction: str) -> None:
    """Correct a layer, or the line of a batch norm, by the mean of what arrives at it."""
    layer: Any = walk.layer(node)
    x, (lines, addition) = walk.mean(node.all_input_nodes[0]), _end(walk, node, targets)
    if (x.dim() > 2 and isinstance(layer, nn.Linear)) or (does(layer) == "normalises" and lines):
        lines, addition = [], None  # channels are the last dimension here; two batch norms are one line
    last = node
    for _ in lines:
        (last,) = last.users
    other: Tensor | float = 0.0
    if addition is None:
        wanted = exact.value(node.name)
        for line in lines:
            wanted = line(wanted)
    else:
        wanted = exact.value(addition.name)
        other = walk.mean(next(value for value in addition.all_input_nodes if value is not last))
    if does(layer) == "normalises":
        fit_line_(layer, x, wanted - other)
        return
    given, gain = layer(x), None
    if lines:
        ends = torch.zeros(2, given.shape[1], *[1] * (given.dim() - 2), dtype=x.dtype, device=x.device)
        ends[1] = 1.0
        for line in lines:
            given, ends = line(given), line(ends)
        gain = (ends[1] - ends[0]).reshape(-1)
    (reader, *more) = (last if addition is None else addition).users or (node,)
    neuron = walk.layer(reader)
    fires = not more and isinstance(neuron, IFNode) and neuron.threshold.dim() > 0  # a ReLU follows
    fit_layer_(layer, x, wanted - given - other, correction, gain, rectified=wanted if fires else None)


def _choose_(walk: Pieces, node: fx.Node, wanted: Tensor, threshold: str, percentile: float, initial: str) -> None:
    """Give a neuron the θ of each channel, v₀ and the bias in front of it, that suit its current."""
    neuron: Any = walk.layer(node)
    top = largest(wanted)
    neuron.threshold.data = (percentile_of(wanted, percentile) if threshold == "percentile" else top).double()
    if threshold != "mse":
        return
    source = node.all_input_nodes[0]
    bias = _bias_before(walk, source)
    trial = Trial(neuron, *_sampled(walk, source, wanted), top, walk.call.firing)
    trial.thresholds()
    if initial == "mse":
        trial.starts(shifts=bias is not None)
    if bias is not None:
        bias.add_(trial.shift)
    neuron.threshold.data = trial.threshold.double()
    if initial == "mse":
        neuron.initial = trial.initial.double()


def _sampled(walk: Pieces, source: fx.Node, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the currents of a neuron and of the activations that they should give: (T, N, C) and (N, C)."""
    count = _SAMPLES if walk.call.timesteps <= 8 else _SAMPLES // 4
    places, row = wanted.numel() // (wanted.shape[1] * sum(map(len, walk.pieces))), 0
    enough = max(_SEEN, -(-count // places))
    used = -(-min(enough, sum(map(len, walk.pieces))) // len(walk.pieces[0]))
    currents, values = [], []
    for piece in range(used):
        current = walk.current(source, piece).movedim(2, -1)  # (T, b, *, C)
        rows = current.shape[1]
        value, row = wanted[row : row + rows].movedim(1, -1).flatten(0, -2), row + rows
        some = samples(len(value), -(-count // used)).to(value.device)
        currents.append(current.flatten(1, -2)[:, some])
        values.append(value[some])
    return torch.cat(currents, 1), torch.cat(values)


def _bias_before(walk: Pieces, node: fx.Node) -> Tensor | None:
    """The bias by channel that is added to what a node gives and to nothing else; None where there is none."""
    layer: Any = walk.layer(node)
    if len(node.users) > 1 or layer is None:
        return None
    if does(layer) in ("adds", "passes"):
        found = (_bias_before(walk, source) for source in reversed(node.all_input_nodes))
        return next((bias for bias in found if bias is not None), None)
    own = (does(layer) == "weighs" and not isinstance(layer, nn.Linear)) or _affine(layer)
    vector = isinstance(layer, nn.Linear) and walk.at(node, 0).dim() == 2
    return layer.bias if (own or vector) and str(node.target) in walk.once else None


def _affine(module: Any) -> bool:
    return does(module) == "normalises" and bool(module.affine)
