"""benchmark(): accuracy against T, and what it costs in spikes and operations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsnn.data import batches
from qsnn.fold import fold
from qsnn.graph import device_of
from qsnn.integer import FloatLayer, IntegerLayer
from qsnn.neurons import SNN
from qsnn.summary import LayerSummary, summary


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What :func:`benchmark` measured of one model."""

    name: str
    n: int
    """Images."""
    timesteps: tuple[int, ...]
    """The T's measured; () for an ANN."""
    accuracy: tuple[float, ...]
    """Right answers [%], one a T; one number for an ANN."""
    firing: str | None
    """"online" or "deferred"; None for an ANN."""
    spike_rates: dict[str, float]
    """Spikes per neuron and step [1] by layer, over the T steps the model is made for."""
    spike_rate: float | None
    """The same over all neurons."""
    synops: float | None
    """Spike-driven accumulates per image, over the T steps the model is made for."""
    macs: float
    """Multiply-accumulates per image; of a spiking network those of layers that do not see spikes: before its first
    neuron, and at every step behind a linear bottleneck."""
    weight_bytes: int
    """Weights at their precision, all else at 32 bit [byte]."""
    confusion: list[list[int]] | None
    """Rows: label; columns: answer; at the T the model is made for."""
    agreement: tuple[float, ...] | None
    """Answers equal to the reference's [%], one a T."""
    overflows: int | None
    """Potentials that did not fit into the membrane's bits, over all steps run; None where it is float."""
    seconds: float
    """Time of the whole measurement [s]."""

    def metrics(self) -> dict[str, Any]:
        """Return the numbers as plain types, for a record."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "n")}


@torch.no_grad()
def benchmark(
    model: nn.Module,
    loader: Any,
    *,
    timesteps: int = 8,
    firing: str | None = None,
    name: str | None = None,
    reference: nn.Module | None = None,
    batch_size: int = 250,
) -> Benchmark:
    r"""Measure accuracy for every T and count spikes and operations, in one pass over the data.

    A spiking network is measured in its integer form (folded here if it is not). Online, one pass of ``timesteps``
    steps gives every T. Deferred firing takes a pass for each T, here the powers of two and the T the model is made
    for. An operation is counted for every spike that arrives at every synapse it reaches: border pixels reach fewer,
    and the spikes that an average pool adds up count one by one.

    Args:
        model: a float network, a QANN or an SNN.
        loader: a Dataset or an iterable of (images, labels).
        timesteps: largest T.
        firing: "online" or "deferred"; default what the SNN is made for.
        name: shown in tables; default its kind.
        reference: a model whose answers are compared (the QANN, usually).
        batch_size: images a call.
    Raises:
        ValueError: T < 1, or no images.
    """
    if not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps must be a whole number of at least 1, got {timesteps!r}")
    started = time.perf_counter()
    kind = getattr(model, "qsnn_recipe", {}).get("kind", type(model).__name__)
    weigh = summary(model, _shape(model, loader))
    spiking = isinstance(model, SNN)
    if isinstance(model, SNN):
        model = model if model.folded else fold(model)
        firing = firing or model.firing
        powers = [2**i for i in range(timesteps.bit_length()) if 2**i <= timesteps]
        own = min(model.timesteps, timesteps)
        steps = list(range(1, timesteps + 1)) if firing == "online" else sorted({*powers, own})
    else:
        model, firing, steps, own = model.eval(), None, [], 0
    counter = _Counter(model, own) if isinstance(model, SNN) else None
    device = device_of(model)
    right = torch.zeros(max(1, len(steps)), dtype=torch.int64)
    agree = torch.zeros_like(right)
    confusion: Tensor | None = None
    seen = 0
    for images, labels in batches(loader, batch_size, device=device):
        answers = _answers(model, images, steps, firing, counter)
        right += (answers == labels).sum(1).cpu()
        if reference is not None:
            agree += (answers == reference.eval()(images).argmax(1)).sum(1).cpu()
        at = answers[steps.index(own)] if steps else answers[0]
        classes = max(int(labels.max()), int(at.max())) + 1
        confusion = _add_confusion(confusion, labels, at, classes)
        seen += len(labels)
    if not seen:
        raise ValueError("the data is empty: expected at least one batch of (images, labels)")
    return Benchmark(
        name=name or str(kind),
        n=seen,
        timesteps=tuple(steps),
        accuracy=tuple(round(100.0 * int(r) / seen, 4) for r in right),
        firing=firing,
        spike_rates=counter.rates(seen) if counter else {},
        spike_rate=counter.rate(seen) if counter else None,
        synops=counter.synops / seen if counter else None,
        macs=sum(layer.macs * _runs(layer, own, spiking) for layer in weigh.layers),
        weight_bytes=weigh.weight_bytes,
        confusion=None if confusion is None else confusion.tolist(),
        agreement=None if reference is None else tuple(round(100.0 * int(a) / seen, 4) for a in agree),
        overflows=_overflows(model),
        seconds=time.perf_counter() - started,
    )


def _overflows(model: nn.Module) -> int | None:
    neurons: list[Any] = [m for m in model.modules() if getattr(getattr(m, "dynamics", None), "state_bits", None)]
    return sum(neuron.overflows for neuron in neurons) if neurons else None


def _runs(layer: LayerSummary, steps: int, spiking: bool) -> int:
    """How often the MACs of a layer are done for one image: a spiking layer has accumulates instead."""
    if not spiking or layer.static:
        return 1
    return 0 if layer.input_bits == 1 else steps


def _shape(model: nn.Module, loader: Any) -> tuple[int, ...] | None:
    if getattr(model, "qsnn_recipe", {}).get("input_shape") or not hasattr(loader, "__getitem__"):
        return None
    return tuple(loader[0][0].shape)


def _answers(
    model: nn.Module, images: Tensor, steps: list[int], firing: str | None, counter: _Counter | None
) -> Tensor:
    """(len(steps) or 1, B): the class after each T."""
    if counter is None:
        return model(images).argmax(-1).reshape(1, -1)
    if firing == "online":
        with counter.counting(steps[-1]):
            return model(images, timesteps=steps[-1], firing=firing).argmax(-1)
    found = []
    for t in steps:
        if t == counter.own:
            with counter.counting(t):
                found.append(model(images, timesteps=t, firing=firing).argmax(-1))
        else:
            found.append(model(images, timesteps=t, firing=firing).argmax(-1))
    return torch.cat(found)


def _add_confusion(total: Tensor | None, labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    size = classes if total is None else max(classes, len(total))
    counts = torch.bincount(labels.cpu() * size + answers.cpu(), minlength=size * size).reshape(size, size)
    if total is not None:
        counts[: len(total), : len(total)] += total
    return counts


class _Counter:
    """Counts spikes out of every neuron and synaptic operations into every integer layer, for the first T steps."""

    def __init__(self, model: SNN, own: int) -> None:
        self.model, self.own = model, own
        self.synops = 0.0
        self.spikes: dict[str, float] = {}
        self.neurons: dict[str, int] = {}
        self._fanout: dict[nn.Module, Tensor] = {}
        self._steps = 1
        self._static: set[nn.Module] = set()

    def rates(self, images: int) -> dict[str, float]:
        return {name: count / (self.neurons[name] * self.own * images) for name, count in self.spikes.items()}

    def rate(self, images: int) -> float:
        return sum(self.spikes.values()) / (sum(self.neurons.values()) * self.own * images)

    @contextmanager
    def counting(self, steps: int) -> Iterator[None]:
        """Count what runs inside the block, which simulates ``steps`` steps."""
        self._steps = steps
        started = False

        def spikes(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                nonlocal started
                started = True
                own = output.unflatten(0, (steps, -1))[: self.own]
                self.spikes[name] = self.spikes.get(name, 0.0) + float(own.abs().sum(dtype=torch.float64))
                self.neurons[name] = own[0, 0].numel()

            return hook

        def operations(module: nn.Module, args: Any, output: Tensor) -> None:
            if not started:
                return  # before the first neuron: its MACs are counted as MACs
            own = args[0].unflatten(0, (steps, -1))[: self.own].sum((0, 1), dtype=torch.float64)
            self.synops += float((own.abs() * self._reach(module, own.shape)).sum())

        handles = [module.register_forward_hook(spikes(name)) for name, module in self.model.neurons()]
        layers = [m for m in self.model.modules() if isinstance(m, IntegerLayer) or getattr(m, "spikes", False) is True]
        handles += [layer.register_forward_hook(operations) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _reach(self, layer: nn.Module, shape: torch.Size) -> Tensor:
        """Nonzero-or-not synapses that each input element reaches; the gradient of the sum of ones."""
        assert isinstance(layer, IntegerLayer | FloatLayer)
        if layer not in self._fanout:
            with torch.enable_grad():
                x = torch.zeros(1, *shape, dtype=torch.float64, device=layer.weight.device, requires_grad=True)
                ones = torch.ones_like(layer.weight, dtype=torch.float64)
                if layer.options:
                    y = (F.conv1d if ones.dim() == 3 else F.conv2d)(x, ones, None, **layer.options)
                else:
                    y = F.linear(x, ones)
                (self._fanout[layer],) = torch.autograd.grad(y.sum(), x)
        return self._fanout[layer][0]
