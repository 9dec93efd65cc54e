"""Counting spikes and what they cause, step by step, while a spiking network runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsnn.folded.layers import FloatLayer, IntegerLayer, layer_options, weighted_sum
from qsnn.graph.hooks import watching
from qsnn.graph.kinds import CLASSES
from qsnn.snn.counts import counted_layers, timed
from qsnn.snn.network import SNN, TimeLoop

_FINEST = 4096
"""Spikes of more levels than this are no spikes: the layer multiplies [1]."""


def _magnitude(x: Tensor) -> Tensor:
    """|x|, which is x itself where nothing is below 0: one pass that writes nothing, in the place of a copy."""
    return x if x.numel() and bool(x.amin() >= 0) else x.abs()


def _wide(x: Tensor) -> torch.dtype:
    """What sums of x are made in: whole numbers below 2^24 are exact in float32, and no copy is made of it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_step(x: Tensor) -> Tensor:
    """Sum of |x| over all but time: (T, B, *) -> (T,), image by image and then in float64."""
    inner = tuple(range(2, x.dim()))
    by_image = _magnitude(x).sum(inner, dtype=_wide(x)) if inner else _magnitude(x)
    return by_image.sum(1, dtype=torch.float64).cpu()


def _over_images(x: Tensor) -> Tensor:
    """Sum of |x| over images: (T, B, *) -> (T, *) in float64; in the order in which x lies in memory."""
    order = [0, 1, *sorted(range(2, x.dim()), key=x.stride, reverse=True)]
    parts = _magnitude(x).permute(order).split(_FINEST, 1)  # sums of so many levels of so many images are below 2^24
    total = torch.stack([part.sum(1, dtype=_wide(x)) for part in parts]).sum(0, dtype=torch.float64)
    back = sorted(range(total.dim()), key=[order[0], *(place - 1 for place in order[2:])].__getitem__)
    return total.permute(back)


class Counter:
    r"""Counts spikes out of every neuron and accumulates in every layer behind one, for each time step.

    A spike counts once for every synapse it reaches: at the border of an image these are fewer. In the integer form
    the inputs of a layer are spikes, or sums of spikes behind an average pool, which count one by one. In a network of
    SpikingJelly modules inputs may be scaled, graded, ternary or averaged; there every input is divided by the smallest
    that is not zero, :math:`\sum |x| / \min_{x \ne 0} |x|`. Where the quotients are no whole numbers the layer sees a
    current, and its multiply-accumulates are counted instead: nothing is silently zero.

    A gate adds up what it sees, one accumulate for each spike; where it multiplies spikes, each spike that arrives
    costs one AND, counted as one accumulate, which is more than an AND of two bits costs. Behind it only the spikes
    that it lets pass count. What is computed on counts, a product of two quantized values and the layers behind it,
    sees no spikes: its multiply-accumulates are counted (:func:`qsnn.summary`), and none of them here.

    Args:
        model: a folded SNN, or a :class:`~qsnn.snn.network.TimeLoop`.
    """

    def __init__(self, model: SNN | TimeLoop) -> None:
        self.model = model
        self.spikes: dict[int, dict[str, Tensor]] = {}
        """By T of the pass: by neuron, spikes of each step over all images, (T,)."""
        self.synops: dict[int, dict[str, Tensor]] = {}
        """Likewise by layer, in units of ``unit``."""
        self.neurons: dict[str, int] = {}
        self.unit: dict[str, float] = {}
        self.currents: set[str] = set()
        """Layers that see a current, not spikes."""
        self._reach: dict[str, Tensor] = {}

    def rates(self, passed: int, steps: int, images: int) -> dict[str, float]:
        """Spikes a neuron and step by layer [1], over the first ``steps`` steps of the pass of T = ``passed``."""
        found = self.spikes.get(passed, {})
        return {name: float(n[:steps].sum()) / (self.neurons[name] * steps * images) for name, n in found.items()}

    def rate(self, passed: int, steps: int, images: int) -> float:
        """The same over all neurons."""
        total = sum(float(count[:steps].sum()) for count in self.spikes.get(passed, {}).values())
        return total / max(1, sum(self.neurons.values()) * steps * images)

    def layer_synops(self, passed: int, steps: int, images: int) -> dict[str, float]:
        """Synaptic operations of an image by layer, over the first ``steps`` steps."""
        found = self.synops.get(passed, {})
        return {
            name: float(n[:steps].sum()) / self.unit[name] / images
            for name, n in found.items() if name not in self.currents
        }  # fmt: skip

    @contextmanager
    def counting(self, steps: int) -> Iterator[None]:
        """Count what runs inside the block, a call of ``steps`` steps."""
        spikes, synops = self.spikes.setdefault(steps, {}), self.synops.setdefault(steps, {})
        single = isinstance(self.model, TimeLoop) and not self.model.multi_step
        calls: dict[str, int] = {}
        started = False
        front = self._front()

        def in_time(name: str, x: Tensor, dims: int) -> tuple[Tensor, slice]:
            """x as (steps, B, *), and which steps they are."""
            if not single:
                stepped = isinstance(self.model, TimeLoop) and x.dim() == dims + 1
                return (x if stepped else x.unflatten(0, (steps, -1))), slice(0, steps)
            at = calls[name] = calls.get(name, -1) + 1
            return x.unsqueeze(0), slice(at, at + 1)

        folded = isinstance(self.model, SNN)

        def fired(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal started
            started = True
            # a multi-step node of SpikingJelly gives (T, B, *), one of ours (T·B, *)
            x, at = in_time(name, output, output.dim() - (not folded and not single))
            spikes.setdefault(name, torch.zeros(steps, dtype=torch.float64))[at] += _by_step(x)
            self.neurons[name] = x[0, 0].numel()

        def arrived(name: str, module: Any, args: Any, output: Tensor) -> None:
            if name in front or not (started or folded):
                front.add(name)
                return  # it sees what the input gives alone: its MACs are counted as MACs
            if not hasattr(module, "weight"):  # a gate, or a value that is gated: one operation a spike
                x, at = in_time(name, args[-1], args[-1].dim())
                self.unit[name] = 1.0
                synops.setdefault(name, torch.zeros(steps, dtype=torch.float64))[at] += _by_step(x)
                return
            x, at = in_time(name, args[0], module.weight.dim())
            self._look_at(name, x, whole=isinstance(module, IntegerLayer | FloatLayer))
            total = _over_images(x)
            count = (total * self._reached(name, module, total.shape[1:])).flatten(1).sum(1).cpu()
            synops.setdefault(name, torch.zeros(steps, dtype=torch.float64))[at] += count

        neurons, layers = dict(self.model.neurons()), dict(self._layers())
        with watching(neurons, fired), watching(layers, arrived):
            yield

    def _front(self) -> set[str]:
        """The layers that no spike reaches, wherever they run; of a TimeLoop running shows which."""
        network: Any = self.model.network
        if isinstance(self.model, TimeLoop):
            return set()
        in_time = timed(network)
        nodes = (node for node in network.graph.nodes if node.op == "call_module")
        return {str(node.target) for node in nodes if in_time.isdisjoint(node.all_input_nodes)}

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        counts = set(counted_layers(self.model.network))
        for name, module in self.model.network.named_modules():
            if name in counts:
                continue
            if isinstance(self.model, TimeLoop):
                if isinstance(module, CLASSES["weighs"]):
                    yield name, module
            elif isinstance(module, IntegerLayer) or getattr(module, "spikes", False) is True:
                yield name, module

    def _look_at(self, name: str, x: Tensor, *, whole: bool) -> None:
        """Note the unit of a layer's input, and whether it is made of units at all."""
        if whole:  # the integer form: spikes are 1
            self.unit[name] = 1.0
            return
        magnitudes = x.abs()
        nonzero = magnitudes[magnitudes > 0]
        if not nonzero.numel():
            self.unit.setdefault(name, 1.0)
            return
        unit = min(float(nonzero.min()), self.unit.get(name, float("inf")))
        self.unit[name] = unit
        levels = nonzero / unit
        if float(levels.max()) > _FINEST or float((levels - levels.round()).abs().max()) > 1e-3:
            self.currents.add(name)

    def _reached(self, name: str, layer: Any, shape: torch.Size) -> Tensor:
        """Synapses that each input element reaches; the gradient of the sum of ones."""
        if name not in self._reach:
            options = layer.options if isinstance(layer, IntegerLayer | FloatLayer) else layer_options(layer)
            with torch.enable_grad():
                x = torch.zeros(1, *shape, dtype=torch.float64, device=layer.weight.device, requires_grad=True)
                ones = torch.ones_like(layer.weight, dtype=torch.float64, requires_grad=False)
                y = weighted_sum(x, ones, options)
                (self._reach[name],) = torch.autograd.grad(y.sum(), x)
        return self._reach[name][0]
