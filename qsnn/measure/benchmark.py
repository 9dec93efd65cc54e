"""benchmark(): accuracy against T, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qsnn.data.batches import batches, summed
from qsnn.data.memory import batch_within, keep_freed_memory, peak_of, within
from qsnn.data.shown import batch_count, shown
from qsnn.folded.fold import fold
from qsnn.graph.arrived import arrived, evaluating
from qsnn.graph.recipe import recipe_of
from qsnn.graph.trace import takes_frames
from qsnn.measure.counting import Counter
from qsnn.measure.energy import LayerCost, estimates
from qsnn.measure.heads import Asked
from qsnn.measure.result import Benchmark
from qsnn.measure.summary import LayerSummary, Summary, summary
from qsnn.measure.tally import MARGINS, Tally
from qsnn.options import Share, Timesteps, check_option, expect
from qsnn.snn.network import SNN, TimeLoop

_STATE_BITS = {"int8": 8, "int16": 16, "fp16": 16}


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
    batch_size: int | None = None,
    memory: int | str | None = None,
    task: Asked = None,
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
        batch_size: images a call; by default up to 250, as many as fit into ``memory``.
        memory: what a batch may take, bytes or "512M"; default 1 GiB.
        task: "classification", "binary" (one logit, decided by its sign), "segmentation" (mean IoU) or "regression"
            (mean squared error), or one for each head; by default found from the labels and the shape of the answers.
    Raises:
        ValueError: T < 1, no images, labels that do not belong to the answers, or a margin outside [0, 1] or of a
            network that has no steps, or no one class an image.

    >>> import qsnn
    >>> data = qsnn.load_data("digits")
    >>> snn = qsnn.convert(qsnn.quantize(qsnn.create_model("study", data), data))
    >>> result = qsnn.benchmark(snn, data.test.head(20), timesteps=4)
    >>> result.n, result.timesteps, 0 < result.spike_rate < 1
    (20, (1, 2, 3, 4), True)
    """
    expect("benchmark(model, data.test)", "model", model, nn.Module)
    expect("benchmark(model, data.test, reference=qann)", "reference", reference, (nn.Module, type(None)))
    check_option("timesteps", timesteps, Timesteps)
    check_option("exit_margin", exit_margin, Share | None)
    keep_freed_memory()
    model = arrived(model)
    reference = None if reference is None else arrived(reference)
    with evaluating(model, *[] if reference is None else [reference]):
        return _measured(model, loader, timesteps, firing, name, reference, exit_margin, batch_size, memory, task)


def _measured(
    model: nn.Module,
    loader: Any,
    timesteps: int,
    firing: str | None,
    name: str | None,
    reference: nn.Module | None,
    exit_margin: float | None,
    batch_size: int | None,
    memory: int | str | None,
    task: Asked,
) -> Benchmark:
    """The work of :func:`benchmark`, on networks in eval mode."""
    started = time.perf_counter()
    run = _Run(model, timesteps, firing)
    margins = _margins(exit_margin, run)
    if batch_size is None:
        with within(memory):
            batch_size = batch_within(run.uncounted, loader, 250, model=model)
    tally = Tally(margins, len(run.steps), run.steps.index(run.own) if run.steps else 0, task)
    parts = batches(loader, batch_size, model=model)
    for images, labels in shown(parts, name or "benchmark", batch_count(loader, batch_size)):
        tally.add(run.answers(images), images, labels, reference)
    batch, seen, counter, own = tally.first_batch, tally.seen, run.counter, run.own
    if batch is None or tally.tasks is None:
        raise ValueError("the data is empty: expected at least one batch of (images, labels)")
    scores, tasks = tally.scores(), tally.tasks.by_head
    image = batch[:1]
    weigh = summary(run.network, tuple(image.shape[2:] if takes_frames(run.network, image) else image.shape[1:]))
    layers = _costs(weigh, run, seen)
    rate = counter.rate(run.passes[own], own, seen) if counter else None
    neurons, state_bits = sum(counter.neurons.values()) if counter else 0, run.state_bits()
    return Benchmark(
        name=name or str(recipe_of(model).get("kind", type(model).__name__)),
        n=seen,
        timesteps=tuple(run.steps),
        accuracy=next(iter(scores.values())),
        firing=run.firing,
        made_for=own,
        spike_rates=counter.rates(run.passes[own], own, seen) if counter else {},
        spike_rate=rate,
        spike_rate_by_t=tuple(counter.rate(run.passes[t], t, seen) for t in run.steps) if counter else (),
        synops=sum(layer.synops for layer in layers) if counter else None,
        synops_by_t=tuple(
            sum(counter.layer_synops(run.passes[t], t, seen).values()) for t in run.steps
        ) if counter else (),
        layers=layers,
        macs=sum(layer.macs for layer in layers),
        weight_bytes=weigh.weight_bytes,
        weight_bytes_by_bits=weigh.weight_bytes_by_bits,
        state_bytes=neurons * (state_bits or 32) // 8,
        peak_bytes=_peak(run, image),
        latency_ms=1e3 * _time(run, batch.split(1), calls=9),
        throughput=len(batch) / _time(run, [batch], calls=2),
        energy=estimates(
            layers, spike_rate=rate, neuron_updates=neurons * own, state_bits=state_bits,
            level_bits=_level_bits(model) or 2,
        ),
        exits=tally.exits(),
        confusion=None if tally.confusion is None else tally.confusion.tolist(),
        agreement=None if reference is None else tally.agreement(),
        overflows=run.overflows(),
        seconds=time.perf_counter() - started,
        metric=tally.tasks.first.metric,
        on_counts=weigh.on_counts,
        heads={} if len(scores) == 1 else {f"{name}, {tasks[name].metric}": values for name, values in scores.items()},
    )  # fmt: skip


class _Run:
    """A network as it is measured: the T's, the passes that give them, and the counter of a spiking one.

    Attributes:
        network: the integer form of an SNN, a SpikingJelly network in its time loop, an ANN as it is.
        firing: "online" or "deferred"; None for an ANN.
        own: the T that the network is made for; 0 for an ANN.
        steps: the T's that are measured; [] for an ANN.
        passes: for each T, the T of the pass that it is read from: online that of the one pass over all steps.
        counter: counts spikes and operations; None for an ANN.
    """

    def __init__(self, model: nn.Module, timesteps: int, firing: str | None) -> None:
        if not isinstance(timesteps, int) or timesteps < 1:
            raise ValueError(f"timesteps must be a whole number of at least 1, got {timesteps!r}")
        self.network: Any = as_measured(model, timesteps)
        self.firing, self.own, self.steps, self.counter = None, 0, [], None
        if isinstance(self.network, SNN | TimeLoop):
            self.firing = (firing or self.network.firing) if isinstance(self.network, SNN) else "online"
            self.own = min(self.network.timesteps, timesteps)
            powers = {2**i for i in range(timesteps.bit_length())}
            self.steps = list(range(1, timesteps + 1)) if self.firing == "online" else sorted({*powers, self.own})
            self.counter = Counter(self.network)
        self.passes = {t: self.steps[-1] if self.firing == "online" else t for t in self.steps}

    def call(self, images: Tensor, steps: int, firing: str | None = None) -> Any:
        """The answers of the network in ``steps`` steps (T, B, K), or of an ANN (B, K); or of several heads."""
        options: dict[str, Any] = {"timesteps": steps} if steps else {}
        if firing is not None and isinstance(self.network, SNN):
            options["firing"] = firing
        return self.network(images if steps else summed(images, self.network), **options)

    def answers(self, images: Tensor) -> Any:
        """The answer after each T, (len(steps) or 1, B, K), of each head; spikes and operations are counted."""
        return self._answers(images, self.counter)

    def uncounted(self, images: Tensor) -> Any:
        """The same in the same memory, but nothing that is counted stays."""
        before = [(neuron, neuron.overflows) for neuron in self._held()]
        found = self._answers(images, None if self.counter is None else Counter(self.network))
        for neuron, count in before:
            neuron.overflows = count
        return found

    def _answers(self, images: Tensor, counter: Counter | None) -> Any:
        if counter is None:
            return tree_map(lambda each: each.unsqueeze(0), self.call(images, 0))
        found = []
        for t in sorted(set(self.passes.values())):
            with counter.counting(t):
                found.append(self.call(images, t, self.firing))
        return tree_map(lambda *each: torch.cat(each), *found)

    def state_bits(self) -> int | None:
        """Bits of a membrane where they are set, the widest [bit]."""
        bits = [_STATE_BITS[kind] for kind in (_state_kind(m) for m in self.network.modules()) if kind in _STATE_BITS]
        return max(bits, default=None)

    def overflows(self) -> int | None:
        """Potentials that did not fit into their bits; None where no bits are set."""
        neurons = self._held()
        return sum(neuron.overflows for neuron in neurons) if neurons else None

    def _held(self) -> list[Any]:
        """The neurons whose membranes have few bits."""
        return [m for m in self.network.modules() if _state_kind(m)]


def as_measured(model: nn.Module, timesteps: int) -> nn.Module:
    """The form of a network that is measured: the integers of an SNN, SpikingJelly's modules in their time loop.

    A network of float32 weights alone, which has no integers, is measured in float32, as it runs: in a quarter of the
    time.
    """
    if isinstance(model, SNN):
        return model if model.folded else fold(model, dtype=torch.float32 if _runs_in_float32(model) else torch.float64)
    if isinstance(model, TimeLoop) or not any(isinstance(m, base.MemoryModule) for m in model.modules()):
        return model
    return TimeLoop(model, timesteps).eval()


def _runs_in_float32(model: nn.Module) -> bool:
    """Whether no layer has weights of few bits or of another float type."""
    quantized = any(hasattr(module, "weight_quant") for module in model.modules())
    return not quantized and all(p.dtype == torch.float32 for p in model.parameters() if p.dim() > 1)


def _margins(asked: float | None, run: _Run) -> tuple[float, ...]:
    """The leads at which early exit is measured, the asked one first; () where none is asked for."""
    if asked is None:
        return ()
    if not 0 <= asked <= 1 or run.firing != "online":
        raise ValueError(f"early exit needs a margin from 0 to 1 and online firing, got {asked} and {run.firing}")
    return (asked, *MARGINS)


def _state_kind(module: nn.Module) -> str | None:
    """How a neuron holds its membrane, e.g. "int8"; None for a float one, and for what is no neuron."""
    return getattr(getattr(module, "dynamics", None), "state_bits", None) or None


def _level_bits(model: nn.Module) -> int | None:
    """Bits of the activations of the quantized network that a spiking one was made from [bit]."""
    config = recipe_of(model).get("quantize")
    if not config:
        return None
    return int(config["levels"]).bit_length() if config.get("levels") else config.get("act_bits")


def _costs(weigh: Summary, run: _Run, images: int) -> tuple[LayerCost, ...]:
    """What each layer does for one image at the T that the network is made for."""
    synops = run.counter.layer_synops(run.passes[run.own], run.own, images) if run.counter else {}
    return tuple(
        LayerCost(
            name=layer.name, weight_bits=layer.weight_bits,
            input_bits=1 if layer.name in synops else layer.input_bits,
            macs=0 if layer.name in synops else layer.macs * _runs(layer, run),
            synops=synops.get(layer.name, 0.0), dense_macs=layer.macs,
        )
        for layer in weigh.layers
    )  # fmt: skip


def _runs(layer: LayerSummary, run: _Run) -> int:
    """How often the MACs of a layer that spikes do not drive are done for one image."""
    if run.counter is None or (layer.static and isinstance(run.network, SNN)):
        return 1
    return 0 if layer.input_bits == 1 else run.own


def _time(run: _Run, inputs: Sequence[Tensor], calls: int) -> float:
    """Median time of a call at the T that the network is made for, the input another each time; the first call warms
    up and is left out [s]."""
    seconds = []
    for call in range(calls + 1):
        images = inputs[call % len(inputs)]
        if images.is_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        tree_map(Tensor.cpu, run.call(images, run.own, run.firing))
        seconds.append(time.perf_counter() - begun)
    return median(seconds[1:])


def _peak(run: _Run, image: Tensor) -> int:
    return peak_of(lambda x: run.call(x, run.own, run.firing), image)
