"""check(): the whole front door in seconds, before any training: what becomes of every layer, and what it will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qsnn.data.batches import batches
from qsnn.data.fitting import describe, fitted
from qsnn.data.images import Data, first_of
from qsnn.data.memory import batch_within, keep_freed_memory, laid_out, lay_out_, within
from qsnn.graph.arrived import arrived, evaluating
from qsnn.graph.hooks import recorded
from qsnn.graph.kinds import DOES, kind_of, refused
from qsnn.graph.trace import call_nodes, device_of
from qsnn.measure.accuracy import answer, interval
from qsnn.measure.certify import certify
from qsnn.measure.heads import Asked, Curve, Tasks, find_tasks, heads
from qsnn.measure.task import told
from qsnn.options import Timesteps, check_option, expect, seen
from qsnn.quant.activations import is_sign, level_quant
from qsnn.quant.quantize import QuantizeConfig, quantize
from qsnn.quant.weights import weight_bits
from qsnn.snn.config import ConvertConfig
from qsnn.snn.convert import convert
from qsnn.snn.counts import products

_CALIBRATED, _CERTIFIED, _TIMED = 64, 8, 32
"""Images that set the steps, that are certified, and that are timed."""
_LISTED = 60
"""So many layers are shown; of more the first and the last half."""


@dataclass(frozen=True)
class LayerFate:
    """One layer: what it is, what it gives for one image, and what becomes of it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    becomes: str


@dataclass(frozen=True)
class Check:
    """What :func:`check` found; ``str()`` is a page."""

    model: str
    data: str
    accuracy: float | None
    """Of the float network as loaded [%], or what ``metric`` says; None where the labels belong to no task."""
    images: int
    """Test images that the accuracy was measured on."""
    layers: tuple[LayerFate, ...]
    refused: tuple[str, ...]
    """What cannot be quantized or converted, and what to write instead; empty where all can."""
    certificate: str | None
    """The certificate of a few images, before any training."""
    qat_seconds: float | None
    """One epoch of quantization-aware training on this machine [s]."""
    distill_seconds: float | None
    """One epoch of distillation at T time steps on this machine [s]; None where no online student can be."""
    timesteps: int
    """T."""
    metric: str = "accuracy"
    """"accuracy", "mean IoU" [%] or "mean squared error"; "" where the labels belong to no task."""

    @property
    def ready(self) -> bool:
        """True when nothing is refused, and the spiking network equals the quantized one."""
        return not self.refused and (self.certificate or "").startswith(("EXACT", "equal within"))

    def __str__(self) -> str:
        lines = [self.data, "", self.model]
        if self.accuracy is not None and self.metric != "accuracy":
            lines.append(f"{told(self.metric, self.accuracy)} of the float network, {self.images:,} test images")
        elif self.accuracy is not None:
            low, high = interval(self.accuracy / 100, self.images)
            lines.append(
                f"accuracy of the float network as loaded: {self.accuracy:.2f} % of {self.images:,} test images "
                f"({100 * low:.1f} to {100 * high:.1f})"
            )
        if self.layers:
            width = max(5, *(len(layer.name) for layer in self.layers))
            kinds = max(4, *(len(layer.kind) for layer in self.layers))
            lines += ["", f"{'layer':<{width}}  {'kind':<{kinds}}  {'output':<12}  becomes"]
            shown = self.layers
            if len(shown) > _LISTED:
                shown = (*shown[: _LISTED // 2], LayerFate("...", "", (), ""), *shown[-_LISTED // 2 :])
            lines += [
                f"{layer.name:<{width}}  {layer.kind:<{kinds}}  {'x'.join(map(str, layer.shape)):<12}  {layer.becomes}"
                for layer in shown
            ]
        lines.append("")
        lines += [f"refused: {reason}" for reason in self.refused]
        if self.certificate is not None:
            lines.append(f"certificate before training (deferred, {_CERTIFIED} images): {self.certificate}")
        if self.qat_seconds is not None:
            text = f"on this machine an epoch of quantization-aware training takes about {_told(self.qat_seconds)}, "
            if self.distill_seconds is None:
                text += "and there is no online student: products of counts fire deferred alone"
            else:
                text += f"an epoch of distillation at T = {self.timesteps} about {_told(self.distill_seconds)}"
            lines.append(text)
        return "\n".join(lines)


def check(
    model: nn.Module,
    data: Data,
    config: QuantizeConfig | None = None,
    *,
    timesteps: int = 2,
    seconds: float = 10.0,
    memory: int | str | None = None,
    task: Asked = None,
) -> Check:
    """Run the whole front door without training: accuracy as loaded, quantize, convert, certify, and time a step.

    Args:
        model: a trained float network; it is not changed.
        data: the data set it was trained for, normalised as it was trained.
        config: precision.
        timesteps: T of the student whose training is timed.
        memory: what a batch may take, bytes or "512M"; default 1 GiB.
        seconds: the accuracy is measured on as many of the first test images as fit into so long [s].
        task: "classification", "binary", "segmentation" or "regression", or one for each head; by default found from
            the labels and the shape of the answers.
    Raises:
        TypeError: not a module, not a data set.
        ValueError: the network and the data do not fit together, or not to the task that is asked for.

    >>> from qsnn.data.sources import load_data
    >>> digits = load_data("digits")
    >>> found = check(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), digits)
    >>> found.ready, found.certificate, [layer.kind for layer in found.layers]
    (True, 'EXACT', ['input', 'flatten', 'linear', 'ReLU', 'linear'])
    """
    if not isinstance(data, Data):
        raise TypeError(f"expected a Data, got {type(data).__name__}; call check(model, load_data(...))")
    expect("check(model, data)", "config", config, (QuantizeConfig, type(None)))
    check_option("timesteps", timesteps, Timesteps)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
        raise ValueError(f"expected seconds >= 0, got {seen(seconds)}; 10 is the default")
    model = arrived(model)
    data = fitted(data, model)
    keep_freed_memory()
    with within(memory):
        return _checked(model, data, config, timesteps, seconds, task)


def _checked(
    model: nn.Module, data: Data, config: QuantizeConfig | None, timesteps: int, seconds: float, task: Asked
) -> Check:
    loaded = _as_loaded(model, data, seconds, task)
    config = replace(config or QuantizeConfig(), calibration_images=_CALIBRATED)
    layers: tuple[LayerFate, ...] = ()
    refusals: list[str] = []
    verdict = qat = distill = None
    with torch.random.fork_rng(), evaluating(model):
        try:
            few = first_of(data.train, _CALIBRATED)
            qann = quantize(model, replace(data, train=few), config).eval()
            layers = fates(qann, next(batches(few, 2, device=device_of(model)))[0])
            online = not products(qann)
            snn = convert(qann, ConvertConfig(timesteps=timesteps, firing="online" if online else "deferred"))
            verdict = certify(snn, qann, first_of(data.test, _CERTIFIED)).verdict
            if loaded.tasks is not None:
                qat, distill = _epochs(model, qann, snn if online else None, data, timesteps, loaded.rate, loaded.tasks)
        except ValueError as error:  # each names all that it refuses, and what to write instead
            refusals.append(" ".join(str(error).split()))
            layers = layers or _as_they_come(model, refusals[0])
    parameters = sum(p.numel() for p in model.parameters())
    return Check(
        model=f"{type(model).__name__}: {parameters:,} parameters",
        data=describe(data),
        accuracy=loaded.score,
        images=loaded.images,
        layers=layers,
        refused=tuple(refusals),
        certificate=verdict,
        qat_seconds=qat,
        distill_seconds=distill,
        timesteps=timesteps,
        metric="" if loaded.tasks is None else loaded.tasks.first.metric,
    )


@torch.no_grad()
def fates(qann: Any, images: Tensor) -> tuple[LayerFate, ...]:
    """Return what each layer of a quantized network is and what it becomes, in the order of the graph.

    Args:
        qann: from :func:`qsnn.quantize`.
        images: a batch that it is run on.
    """
    modules = {str(node.target): module for node, module in call_nodes(qann)}
    with evaluating(qann), recorded(modules) as outputs:
        answer(qann, images)
    found = []
    for name, module in modules.items():
        kind, becomes = what_becomes_of(module)
        value = outputs.get(name)
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        found.append(LayerFate(name, kind, shape, becomes))
    return tuple(found)


def _as_they_come(model: nn.Module, refusal: str) -> tuple[LayerFate, ...]:
    """The layers of a network that cannot be quantized: which of them the refusal names."""
    found = []
    for name, module in model.named_modules():
        if name and not list(module.children()):
            kind, becomes = what_becomes_of(module)
            found.append(LayerFate(name, kind, (), "refused" if f" {name} (" in refusal else becomes))
    return tuple(found)


def what_becomes_of(module: nn.Module) -> tuple[str, str]:
    """Return the kind of a layer, and what becomes of it; the one place for these words."""
    quant = level_quant(module)
    if quant is not None and quant.signed:
        return "input", f"signed integers of {quant.levels.bit_length() + 1} bits"
    if quant is not None:
        return "ReLU", f"levels 0 to {quant.levels}; an IF neuron"
    if is_sign(module):
        return "sign", "a neuron of one step"
    kind = kind_of(module)
    if kind is not None and hasattr(module, "weight_quant"):
        bits = weight_bits(module)
        return kind.name, f"{'integers' if bits <= 8 else 'weights'} of {bits} bit{'s' * (bits > 1)}"
    if kind is None or refused(module) is not None:
        return type(module).__name__, "refused"
    return kind.name, DOES[kind.does].rpartition(": ")[2]


@dataclass(frozen=True)
class _Loaded:
    """What the float network answers as it was loaded."""

    tasks: Tasks | None
    """None where the labels belong to no task."""
    score: float | None
    """Of the first head."""
    images: int
    rate: float
    """Seconds an image."""


@torch.no_grad()
def _as_loaded(model: nn.Module, data: Data, seconds: float, task: Asked) -> _Loaded:
    """The score of as many of the first test images as fit into the time."""
    seen, curve = 0, Curve(1)
    tasks: Tasks | None = None
    device = device_of(model)
    size = 50 if device.type == "cpu" else 250  # what a core's cache holds is a fifth faster
    with evaluating(model):
        size = batch_within(lambda x: answer(model, x), data.test, size, device=device)
    begun = time.perf_counter()
    with evaluating(model):
        for images, labels in batches(data.test, size, device=device):
            answers = answer(model, laid_out(images, torch.channels_last))
            seen += len(images)
            try:
                tasks = find_tasks(answers, labels, tasks or task)
            except ValueError:
                if task is not None:
                    raise
                break
            curve.add(tasks, {name: each.unsqueeze(0) for name, each in heads(answers).items()}, heads(labels))
            if time.perf_counter() - begun > seconds:
                break
    rate = (time.perf_counter() - begun) / seen
    score = None if tasks is None else next(iter(curve.read(tasks).values()))[0]
    return _Loaded(tasks, score, seen, rate)


def _epochs(
    teacher: nn.Module, qann: nn.Module, snn: nn.Module | None, data: Data, timesteps: int, rate: float, tasks: Tasks
) -> tuple[float, float | None]:
    """Seconds of an epoch of QAT and of distillation, validation included, from one step of a few images each."""
    images, labels = next(batches(first_of(data.train, _TIMED), _TIMED, device=device_of(qann)))

    def qat(x: Tensor, y: Any) -> Tensor:
        return tasks.loss(heads(answer(qann, x)), heads(y))

    def student(x: Tensor, y: Any) -> Tensor:
        with torch.no_grad():
            target = heads(answer(teacher, x))
        assert snn is not None
        return tasks.taught(heads(answer(snn, x, timesteps=timesteps)), target, 1.0)

    train, val = len(data.train), len(data.val)  # type: ignore[arg-type]
    first = _step_seconds(qann, qat, images, labels) * train + rate * val
    if snn is None:
        return first, None
    return first, _step_seconds(snn, student, images, labels) * train + timesteps * rate * val


def _step_seconds(network: nn.Module, loss: Callable[[Tensor, Any], Tensor], x: Tensor, y: Any) -> float:
    """What one image of a training step takes [s], the better of two."""
    lay_out_(network.train(), torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6)
    x, times = laid_out(x, torch.channels_last), []
    for count in (4, len(x), len(x)):  # the first one is slow
        begun = time.perf_counter()
        loss(x[:count], tree_map(lambda labels, n=count: labels[:n], y)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / len(x[:count]))
    return min(times[1:])


def _told(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
