"""benchmark(): accuracy against T, and what it costs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from qsnn.data.images import batches, summed
from qsnn.folded.fold import fold
from qsnn.graph.trace import device_of
from qsnn.measure.accuracy import interval
from qsnn.measure.counting import Counter, LiveMemory
from qsnn.measure.energy import Estimate, LayerCost, estimates
from qsnn.measure.summary import LayerSummary, Summary, summary
from qsnn.snn.network import SNN, TimeLoop

_STATE_BITS = {"int8": 8, "int16": 16, "fp16": 16}
MARGINS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Leads at which early exit is drawn [1]."""


@dataclass(frozen=True, kw_only=True)
class Exit:
    """Early exit: an image stops once the class in front leads by ``margin``."""

    margin: float
    """Difference of the two largest probabilities of the running answer [0, 1]."""
    timesteps: float
    """Mean over the images."""
    accuracy: float
    """[%]"""


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
    made_for: int
    """The T that the numbers below without a T of their own are for; 0 for an ANN."""
    spike_rates: dict[str, float]
    """Spikes per neuron and step [1] by layer."""
    spike_rate: float | None
    """The same over all neurons."""
    spike_rate_by_t: tuple[float, ...]
    """The same, one a T."""
    synops: float | None
    """Spike-driven accumulates per image."""
    synops_by_t: tuple[float, ...]
    """The same, one a T."""
    layers: tuple[LayerCost, ...]
    """What each layer with weights does for one image."""
    macs: float
    """Multiply-accumulates per image; of a spiking network those of layers that do not see spikes: before its first
    neuron, and at every step behind a linear bottleneck."""
    weight_bytes: int
    """Weights at their precision, all else at 32 bit [byte]."""
    weight_bytes_by_bits: dict[str, int]
    """The same, by the bits of the weights; biases, batch norm and thresholds as "other"."""
    state_bytes: int
    """Membranes of one image [byte]."""
    peak_bytes: int
    """Most memory of tensors at one time, while one image is answered, without the parameters [byte]."""
    latency_ms: float
    """Median time to answer one image [ms]."""
    throughput: float
    """Images a second, in batches."""
    energy: tuple[Estimate, ...]
    """Three estimates, which belong together."""
    exits: tuple[Exit, ...]
    """Early exit at several margins, the asked one first; () where it was not asked for."""
    confusion: list[list[int]] | None
    """Rows: label; columns: answer; at the T the model is made for."""
    agreement: tuple[float, ...] | None
    """Answers equal to the reference's [%], one a T."""
    overflows: int | None
    """Potentials that did not fit into the membrane's bits, over all steps run; None where it is float."""
    seconds: float
    """Time of the whole measurement [s]."""

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """Both ends of the 95 % interval of each accuracy [%] (Wilson)."""
        return tuple((100 * low, 100 * high) for low, high in (interval(a / 100, self.n) for a in self.accuracy))

    def metrics(self) -> dict[str, Any]:
        """Return the numbers as plain types, for a record."""
        found = {key: value for key, value in asdict(self).items() if key not in ("name", "n")}
        return {**found, "intervals": self.intervals}


@torch.no_grad()
def benchmark(
    model: nn.Module,
    loader: Any,
    *,
    timesteps: int = 8,
    firing: str | None = None,
    name: str | None = None,
    reference: nn.Module | None = None,
    exit_margin: float | None = None,
    batch_size: int = 250,
) -> Benchmark:
    r"""Measure accuracy for every T and what it costs, in one pass over the data.

    A spiking network is measured in its integer form (folded here if it is not). Online, one pass of ``timesteps``
    steps gives every T. Deferred firing takes a pass for each T, here the powers of two and the T the model is made
    for. How operations are counted: :class:`qsnn.measure.counting.Counter`; energy: :mod:`qsnn.measure.energy`.

    Args:
        model: a float network, a QANN, an SNN, or a network of SpikingJelly modules.
        loader: a Dataset or an iterable of (images, labels).
        timesteps: largest T.
        firing: "online" or "deferred"; default what the SNN is made for.
        name: shown in tables; default its kind.
        reference: a model whose answers are compared (the QANN, usually).
        exit_margin: also answer early: an image stops after the first step at which the two largest probabilities of
            the running answer differ by at least so much [0, 1]; accuracy and mean T at a range of margins.
        batch_size: images a call.
    Raises:
        ValueError: T < 1, no images, or a margin outside [0, 1] or of a network that has no steps.
    """
    if not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps must be a whole number of at least 1, got {timesteps!r}")
    started = time.perf_counter()
    kind = getattr(model, "qsnn_recipe", {}).get("kind", type(model).__name__)
    bits = _level_bits(model)
    runner: Any = _runner(model, timesteps)
    spiking = isinstance(runner, SNN | TimeLoop)
    steps: list[int] = []
    own = min(runner.timesteps, timesteps) if spiking else 0
    if isinstance(runner, SNN):
        firing = firing or runner.firing
    elif spiking:
        firing = "online"
    else:
        firing = None
    if spiking:
        powers = [2**i for i in range(timesteps.bit_length()) if 2**i <= timesteps]
        steps = list(range(1, timesteps + 1)) if firing == "online" else sorted({*powers, own})
    if exit_margin is not None and (not 0 <= exit_margin <= 1 or firing != "online"):
        raise ValueError(f"early exit needs a margin from 0 to 1 and online firing, got {exit_margin} and {firing}")
    counter = Counter(runner) if spiking else None
    margins = () if exit_margin is None else (exit_margin, *MARGINS)
    right = torch.zeros(max(1, len(steps)), dtype=torch.int64)
    agree = torch.zeros_like(right)
    left = torch.zeros(len(margins), 2, dtype=torch.float64)
    confusion: Tensor | None = None
    batch: Tensor | None = None
    seen = 0
    for images, labels in batches(loader, batch_size, device=device_of(model)):
        answers = _answers(runner, images, steps, firing, counter)
        classes = answers.argmax(-1)
        right += (classes == labels).sum(1).cpu()
        if reference is not None:
            agree += (classes == reference.eval()(summed(images, reference)).argmax(1)).sum(1).cpu()
        left += _exits(answers, classes, labels, margins)
        at = classes[steps.index(own)] if steps else classes[0]
        confusion = _add_confusion(confusion, labels, at, max(int(labels.max()), int(at.max())) + 1)
        batch = images if batch is None else batch
        seen += len(labels)
    if batch is None:
        raise ValueError("the data is empty: expected at least one batch of (images, labels)")
    first = batch[:1]
    weigh = summary(runner, tuple(first.shape[-3:] if first.dim() > 3 else first.shape[1:]))
    passed = {t: steps[-1] if firing == "online" else t for t in steps}
    layers = _costs(weigh, counter, passed.get(own, 0), own, seen)
    state = sum(counter.neurons.values()) if counter else 0
    held = {_STATE_BITS.get(getattr(getattr(m, "dynamics", None), "state_bits", None) or "") for m in runner.modules()}
    state_bits = max((bit for bit in held if bit), default=None)
    rate = counter.rate(passed[own], own, seen) if counter else None
    return Benchmark(
        name=name or str(kind),
        n=seen,
        timesteps=tuple(steps),
        accuracy=tuple(round(100.0 * int(r) / seen, 4) for r in right),
        firing=firing,
        made_for=own,
        spike_rates=counter.rates(passed[own], own, seen) if counter else {},
        spike_rate=rate,
        spike_rate_by_t=tuple(counter.rate(passed[t], t, seen) for t in steps) if counter else (),
        synops=sum(layer.synops for layer in layers) if counter else None,
        synops_by_t=tuple(sum(counter.layer_synops(passed[t], t, seen).values()) for t in steps) if counter else (),
        layers=layers,
        macs=sum(layer.macs for layer in layers),
        weight_bytes=weigh.weight_bytes,
        weight_bytes_by_bits=weigh.weight_bytes_by_bits,
        state_bytes=state * (state_bits or 32) // 8,
        peak_bytes=_peak(runner, first, own),
        latency_ms=1e3 * _time(runner, first, own, repeats=5),
        throughput=len(batch) / _time(runner, batch, own, repeats=2),
        energy=estimates(
            layers, spike_rate=rate, neuron_updates=state * own, state_bits=state_bits, level_bits=bits or 2
        ),
        exits=tuple(
            Exit(margin=m, timesteps=float(t) / seen, accuracy=100.0 * float(a) / seen)
            for m, (t, a) in zip(margins, left.tolist(), strict=True)
        ),
        confusion=None if confusion is None else confusion.tolist(),
        agreement=None if reference is None else tuple(round(100.0 * int(a) / seen, 4) for a in agree),
        overflows=_overflows(runner),
        seconds=time.perf_counter() - started,
    )


def _runner(model: nn.Module, timesteps: int) -> nn.Module:
    """What is measured: the integer form of an SNN, a SpikingJelly network in its time loop, an ANN as it is."""
    if isinstance(model, SNN):
        return model if model.folded else fold(model)
    if isinstance(model, TimeLoop) or not any(isinstance(m, base.MemoryModule) for m in model.modules()):
        return model.eval()
    return TimeLoop(model, timesteps).eval()


def _level_bits(model: nn.Module) -> int | None:
    """Bits of the activations of the quantized network that a spiking one was made from."""
    config = getattr(model, "qsnn_recipe", {}).get("quantize")
    if not config:
        return None
    return int(config["levels"]).bit_length() if config.get("levels") else config.get("act_bits")


def _costs(weigh: Summary, counter: Counter | None, passed: int, steps: int, images: int) -> tuple[LayerCost, ...]:
    synops = counter.layer_synops(passed, steps, images) if counter else {}
    return tuple(
        LayerCost(
            name=layer.name, weight_bits=layer.weight_bits,
            input_bits=1 if layer.name in synops else layer.input_bits,
            macs=0 if layer.name in synops else layer.macs * _runs(layer, steps, counter),
            synops=synops.get(layer.name, 0.0), dense_macs=layer.macs,
        )
        for layer in weigh.layers
    )  # fmt: skip


def _overflows(model: nn.Module) -> int | None:
    neurons: list[Any] = [m for m in model.modules() if getattr(getattr(m, "dynamics", None), "state_bits", None)]
    return sum(neuron.overflows for neuron in neurons) if neurons else None


def _runs(layer: LayerSummary, steps: int, counter: Counter | None) -> int:
    """How often the MACs of a layer that spikes do not drive are done for one image."""
    if counter is None or (layer.static and not isinstance(counter.model, TimeLoop)):
        return 1
    return 0 if layer.input_bits == 1 else steps


def _call(model: nn.Module, images: Tensor, steps: int, firing: str | None = None) -> Tensor:
    options: dict[str, Any] = {"timesteps": steps} if steps else {}
    if firing is not None and isinstance(model, SNN):
        options["firing"] = firing
    answers: Tensor = model(images if steps else summed(images, model), **options)
    return answers


def _time(model: nn.Module, images: Tensor, steps: int, repeats: int) -> float:
    """Median seconds of a call, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        if images.is_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        _call(model, images, steps).cpu()
        seconds.append(time.perf_counter() - begun)
    return median(seconds[1:])


def _peak(model: nn.Module, image: Tensor, steps: int) -> int:
    with LiveMemory() as memory:
        _call(model, image, steps)
    return memory.peak


def _answers(model: nn.Module, images: Tensor, steps: list[int], firing: str | None, counter: Counter | None) -> Tensor:
    """(len(steps) or 1, B, K): the answer after each T."""
    if counter is None:
        return _call(model, images, 0).unsqueeze(0)
    passes = [steps[-1]] if firing == "online" else steps
    found = []
    for t in passes:
        with counter.counting(t):
            found.append(_call(model, images, t, firing))
    return found[0] if firing == "online" else torch.cat(found)


def _exits(answers: Tensor, classes: Tensor, labels: Tensor, margins: tuple[float, ...]) -> Tensor:
    """For each margin the steps taken, and the right answers, over all images: (margins, 2)."""
    if not margins:
        return torch.zeros(0, 2, dtype=torch.float64)
    first, second = answers.softmax(-1).topk(2, -1).values.unbind(-1)
    last = len(answers) - 1
    rows = []
    for margin in margins:
        enough = (first - second) >= margin
        enough[last] = True
        stop = enough.int().argmax(0)
        picked = classes.gather(0, stop.unsqueeze(0))[0]
        rows.append([float((stop + 1).sum()), float((picked == labels).sum())])
    return torch.tensor(rows, dtype=torch.float64)


def _add_confusion(total: Tensor | None, labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    size = classes if total is None else max(classes, len(total))
    counts = torch.bincount(labels.cpu() * size + answers.cpu(), minlength=size * size).reshape(size, size)
    if total is not None:
        counts[: len(total), : len(total)] += total
    return counts
