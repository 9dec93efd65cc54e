"""The notes' questions that train networks to compare: residual nets, pooling, leak, layer by layer, event frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from setting import MOST_EPOCHS, STUDENTS, Row, Setting, qann_of, short_student, student_of, teacher_of
from torch import Tensor, nn

import qsnn
from qsnn.data.events import FrameSet
from qsnn.report.records import Record

W4 = STUDENTS["W4"]


def mean_of(records: Sequence[Record], label: str, key: str) -> float:
    """Mean over the seeds of one number of one row."""
    values = [float(r.metrics[key]) for r in records if r.name.partition("/")[2] == label]
    return sum(values) / len(values)


@torch.no_grad()
def curve_of(model: nn.Module, test: Any, timesteps: int = 8) -> dict[str, float]:
    """Online accuracy [%] at T = 1, 2, 4, ..., in one pass as the network stands, not folded."""
    right: Tensor | int = 0
    for images, labels in qsnn.batches(test, 500):
        answers = model(images, timesteps=timesteps)
        right = right + (answers.argmax(-1) == labels).sum(1)
    found = (100.0 * torch.as_tensor(right).double() / len(test)).tolist()
    return {f"T={t}": found[t - 1] for t in (1, 2, 4, 8, 16) if t <= timesteps}


# --- residual: do spiking residual nets differ, and how much does the learning rate matter? ---------------------------

RESIDUAL: dict[str, tuple[str, dict[str, str]]] = {
    "Spiking-ResNet": ("spiking-resnet", {}),
    "SEW-ADD": ("sew-resnet", {"connect": "ADD"}),
    "SEW-AND": ("sew-resnet", {"connect": "AND"}),
    "SEW-IAND": ("sew-resnet", {"connect": "IAND"}),
}
RATES = (1e-2, 1e-4)


def residual(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """MNIST, T = 2, trained from scratch with AdamW, half of the images, one epoch of many small batches."""
    for rate in RATES:
        for label, (name, options) in RESIDUAL.items():
            images = None if setting.train_images is None else setting.train_images // 2
            training = qsnn.TrainConfig(
                epochs=max(1, setting.epochs // 4), lr=rate, optimizer="adamw", weight_decay=0.0, batch_size=16,
                train_images=images, seed=setting.seed,
            )  # fmt: skip
            measure = partial(_residual_row, setting, data, name, options, training)
            yield f"{label}, lr {rate:g}", {"model": name, "options": options, "train": asdict(training)}, measure


def _residual_row(
    setting: Setting, data: qsnn.Data, name: str, options: dict[str, str], training: qsnn.TrainConfig
) -> dict[str, Any]:
    network = qsnn.create_model(name, data, seed=setting.seed, timesteps=2, **options)
    qsnn.fit(network, data, training, label=name)
    return curve_of(network, data.test, 2)


def residual_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {rate: {label: mean_of(records, f"{label}, lr {rate:g}", "T=2") for label in RESIDUAL} for rate in RATES}
    high, low = at[1e-2], at[1e-4]
    drop = sum(high.values()) / len(high) - sum(low.values()) / len(low)
    shown = "; ".join(
        f"lr {rate:g}: {', '.join(f'{label} {value:.2f}' for label, value in found.items())} %"
        for rate, found in at.items()
    )
    spread = max(high.values()) - min(high.values())
    training = records[0].config["train"]
    nets = "holds" if spread < 0.5 else "does not hold"
    rates = "cannot be told yet, 1e-4 has hardly learned" if max(low.values()) < 50 else (
        "holds" if drop > 1 else "does not hold"
    )  # fmt: skip
    size = f"{training['epochs']} epoch(s) of {training['train_images'] or 'all'} images"
    return (
        f"After {size}: that the nets differ by less than 0.1 point at 1e-2, as the notes found, {nets} (they differ "
        f"by {spread:.2f}); that 1e-4 costs about 4 points {rates} ({drop:.2f} on average): {shown}."
    )


# --- pooling: max or average, converted and distilled, static and event data ------------------------------------------

POOLINGS = ("avg", "max")


def pooling(setting: Setting, data: qsnn.Data, events: Callable[[], qsnn.Data]) -> Iterator[Row]:
    """T = 1 to 8: the float net calibrated for each T, and the W4/L2 student of T = 2; images, and N-MNIST."""
    for kind in POOLINGS:
        yield f"converted, {kind}", {"pooling": kind, "for": "each T"}, partial(_converted_row, setting, data, kind)
        config = short_student(setting)
        yield (
            f"distilled, {kind}", {"pooling": kind, "quantize": W4, "distill": asdict(config)},
            partial(_pooled_row, setting, data, kind),
        )  # fmt: skip
        yield (
            f"N-MNIST, distilled, {kind}",
            {"pooling": kind, "quantize": W4, "events": "nmnist", "T": 2, "most_epochs": MOST_EPOCHS},
            partial(_event_row, setting, events, kind),
        )  # fmt: skip


def _converted_row(setting: Setting, data: qsnn.Data, kind: str) -> dict[str, Any]:
    teacher = teacher_of(setting, data, pooling=kind)
    found = {"ann": qsnn.accuracy(teacher, data.test)}
    for t in (1, 2, 4, 8):
        snn = qsnn.convert(teacher, data, qsnn.ConvertConfig(timesteps=t, calibration_images=1024))
        found[f"T={t}"] = qsnn.accuracy(snn, data.test)
    return found


def _pooled_row(setting: Setting, data: qsnn.Data, kind: str) -> dict[str, Any]:
    found = {"ann": qsnn.accuracy(qann_of(setting, data, W4, pooling=kind), data.test)}
    return {**found, **curve_of(student_of(setting, data, W4, short_student(setting), pooling=kind), data.test)}


def _event_row(setting: Setting, events: Callable[[], qsnn.Data], kind: str) -> dict[str, Any]:
    data = events()
    own = setting.on(data)
    found = {"ann": qsnn.accuracy(qann_of(own, data, W4, pooling=kind), data.test)}
    student = student_of(own, data, W4, short_student(own), pooling=kind)
    return {**found, **curve_of(student, data.test, data.frames or 2), "n": len(data.test)}  # type: ignore[arg-type]


def pooling_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts = []
    for row in ("converted", "distilled", "N-MNIST, distilled"):
        avg, best = (mean_of(records, f"{row}, {kind}", "T=2") for kind in POOLINGS)
        parts.append(f"{row}: average {avg:.1f}, max {best:.1f}")
    wins = sum(mean_of(records, f"{row}, max", "T=2") > mean_of(records, f"{row}, avg", "T=2")
               for row in ("converted", "distilled", "N-MNIST, distilled"))  # fmt: skip
    verdict = {0: "Average pooling is better everywhere", 3: "Max pooling is better everywhere"}
    return f"{verdict.get(wins, 'It depends')} at T = 2 ({'; '.join(parts)} %)."


# --- tau: a leak that follows depth -----------------------------------------------------------------------------------

LEAKS: dict[str, dict[str, Any]] = {
    "none": {},
    "constant": {"tau": (4.0,)},
    "rising": {"tau": (2.0,), "tau_growth": 1.5},
    "falling": {"tau": (10.0,), "tau_growth": 1 / 1.5},
    "learned": {"tau": (4.0,)},
}


def tau(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """W4/L2 students of T = 4: no leak, the same in every layer, growing, shrinking, learned by layer; one epoch."""
    for label, options in LEAKS.items():
        learned = {"train_tau": "layer"} if label == "learned" else {}
        config = short_student(setting, timesteps=4, epochs=max(1, setting.epochs // 4), **learned)
        yield (
            label, {"convert": options, "quantize": W4, "distill": asdict(config)},
            partial(_tau_row, setting, data, options, config),
        )  # fmt: skip


def _tau_row(setting: Setting, data: qsnn.Data, options: dict[str, Any], config: qsnn.DistillConfig) -> dict[str, Any]:
    qann = qann_of(setting, data, W4)
    student = qsnn.distill(qsnn.convert(qann, qsnn.ConvertConfig(timesteps=4, **options)), qann, data, config)
    taus = [float(node.tau) for _, node in student.neurons() if node.tau is not None]
    return {
        **curve_of(student, data.test, 4),
        **{f"tau of layer {place}": value for place, value in enumerate(taus, 1)},
    }


def tau_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {label: mean_of(records, label, "T=4") for label in LEAKS}
    best = max(at, key=at.__getitem__)
    shown = ", ".join(f"{label} {value:.2f}" for label, value in at.items())
    layers = sum(key.startswith("tau of layer") for r in records for key in r.metrics) // max(
        1, sum("tau of layer 1" in r.metrics for r in records)
    )
    ends = [mean_of(records, "learned", f"tau of layer {place}") for place in (1, layers)]
    return (
        f'Leak "{best}" is best at T = 4 ({shown} %); learned from 4 steps everywhere, the time constants end at '
        f"{ends[0]:.1f} steps in the first layer and {ends[1]:.1f} in the last."
    )


# --- hybrid: ReLU by IF layer by layer during distillation ------------------------------------------------------------

ORDERS_OF_LAYERS = ("all at once", "from the input", "from the output", "blend")


class Blend(nn.Module):
    r"""An IF neuron takes the place of its activation: :math:`\alpha\,IF(x) + (1-\alpha)\,clip(Q(x/\theta), 0, 1)`.

    α follows the training steps that the module has seen: 0 before ``start``, 1 from ``end`` on, linear between.
    """

    def __init__(self, node: Any, levels: int, start: int, end: int) -> None:
        super().__init__()
        self.node, self.levels, self.start, self.end, self.seen = node, levels, start, end, 0

    @property
    def threshold(self) -> Tensor:
        """θ, which the layers behind multiply spikes by."""
        return self.node.threshold  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Currents -> spikes, or the levels n/L of the activation, (T·B, *)."""
        alpha = min(1.0, max(0.0, (self.seen - self.start) / max(1, self.end - self.start)))
        if self.training:
            self.seen += 1
        if alpha >= 1:
            return self.node(x)  # type: ignore[no-any-return]
        theta = self.threshold.to(x.dtype)
        y = (x / (theta.view(1, -1, *[1] * (x.dim() - 2)) if theta.dim() else theta)).clamp(0, 1)
        y = y + ((y * self.levels + 0.5).floor() / self.levels - y).detach()
        if self.node.constant_input:
            y = y.expand(self.node.timesteps, *y.shape).flatten(0, 1)
        return alpha * self.node(x) + (1 - alpha) * y if alpha > 0 else y


def hybrid(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """The W4/L2 network becomes a student of T = 2: converted only, at once, layer by layer, or by a rising blend."""
    config = short_student(setting, train_threshold="", train_initial="")
    yield "converted only", {"quantize": W4}, partial(_hybrid_row, setting, data, "converted only", config)
    for order in ORDERS_OF_LAYERS:
        yield (
            order, {"quantize": W4, "order": order, "distill": asdict(config)},
            partial(_hybrid_row, setting, data, order, config),
        )  # fmt: skip


def _hybrid_row(setting: Setting, data: qsnn.Data, order: str, config: qsnn.DistillConfig) -> dict[str, Any]:
    qann = qann_of(setting, data, W4)
    snn = qsnn.convert(qann)
    if order == "all at once":
        snn = qsnn.distill(snn, qann, data, config)
    elif order != "converted only":
        images = min(config.train_images or len(data.train), len(data.train))  # type: ignore[arg-type]
        steps = config.epochs * math.ceil(images / config.batch_size)
        snn = qsnn.distill(blended(snn, order, W4["levels"], steps), qann, data, config)
        for name, module in list(snn.network.named_modules()):
            if isinstance(module, Blend):
                snn.network.set_submodule(name, module.node)
    return curve_of(snn, data.test)


def blended(snn: qsnn.SNN, order: str, levels: int, steps: int) -> qsnn.SNN:
    """Put a :class:`Blend` in the place of every neuron, in place; all are neurons after half of the steps."""
    names = [name for name, _ in snn.neurons()]
    for place, name in enumerate(names):
        turn = place if order == "from the input" else len(names) - 1 - place
        start = end = round(0.5 * steps * turn / max(1, len(names) - 1))
        if order == "blend":
            start, end = 0, steps // 2
        snn.network.set_submodule(name, Blend(snn.network.get_submodule(name), levels, start, end))
    return snn


def hybrid_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {label: mean_of(records, label, "T=2") for label in ("converted only", *ORDERS_OF_LAYERS)}
    best = max(ORDERS_OF_LAYERS, key=at.__getitem__)
    gain = at[best] - at["all at once"]
    return (
        f"Distillation is worth {at['all at once'] - at['converted only']:.1f} points at T = 2 over conversion alone; "
        f"replacing layers step by step {'adds' if gain > 0.1 else 'adds nothing:'} {gain:.2f} at best "
        f"({', '.join(f'{label} {value:.2f}' for label, value in at.items())} %)."
    )


# --- time: is the order of event frames needed? -----------------------------------------------------------------------

ORDERS = ("in order", "shuffled", "summed", "repeated")


def frames_in_time(data: qsnn.Data, order: str) -> qsnn.Data:
    """The recordings with frames as they are, shuffled in each recording, all events in one of T frames, or the mean
    at every step (to the nearest event)."""

    def changed(part: Any) -> FrameSet:
        counts, steps = part.images, part.images.shape[1]
        if order == "shuffled":
            generator = torch.Generator().manual_seed(0)
            picks = torch.stack([torch.randperm(steps, generator=generator) for _ in range(len(counts))])
            counts = counts[torch.arange(len(counts))[:, None], picks]
        elif order == "summed":
            counts = torch.cat([counts.sum(1, keepdim=True).clamp(max=255).to(torch.uint8)] +
                               [torch.zeros_like(counts[:, :1])] * (steps - 1), 1)  # fmt: skip
        elif order == "repeated":
            counts = (counts.float().mean(1, keepdim=True).round()).to(torch.uint8).expand_as(counts).contiguous()
        return FrameSet(counts, part.labels, part.unit)

    return replace(data, train=changed(data.train), val=changed(data.val), test=changed(data.test))


def time(setting: Setting, events: Callable[[], qsnn.Data]) -> Iterator[Row]:
    """N-MNIST in four steps: a spiking network trained and tested on each order of the frames."""
    for order in ORDERS:
        yield order, {"order": order, "timesteps": 4}, partial(_time_row, setting, events, order)


def _time_row(setting: Setting, events: Callable[[], qsnn.Data], order: str) -> dict[str, Any]:
    data = frames_in_time(events(), order)
    network = qsnn.create_model("ms-resnet", data, seed=setting.seed, timesteps=4)
    training = qsnn.TrainConfig(epochs=12, batch_size=32, optimizer="adamw", lr=0.005, seed=setting.seed)
    qsnn.fit(network, data, training, label=order)
    curve = qsnn.benchmark(network, data.test, timesteps=4).accuracy
    shuffled = qsnn.accuracy(network, frames_in_time(data, "shuffled").test)
    return {**{f"T={t}": curve[t - 1] for t in (1, 2, 4)}, "tested shuffled": shuffled}


def time_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {order: mean_of(records, order, "T=4") for order in ORDERS}
    shown = ", ".join(f"{order} {value:.1f}" for order, value in at.items())
    gain = at["in order"] - max(at[order] for order in ORDERS[1:])
    verdict = "is needed" if gain > 1 else "is not needed for these recordings"
    return f"The order of the frames {verdict}: {shown} % after four steps."
