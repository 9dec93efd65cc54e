"""Activations become neurons at once, layer by layer or by a blend, during distillation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from figures import lines
from setting import W4, Load, Row, Setting, curve_of, mean_of, qann_of, short_student
from tables import by_steps
from torch import Tensor, nn

import qsnn
from qsnn.report.records import Record
from qsnn.snn.neurons import Repeat

QUESTION = "Replace ReLU by IF at once, layer by layer, or by a blend?"
SIZE = "students of half the epochs"
TITLES = by_steps(1, 2, 4, 8)
NOTE = "W4/L2, online."
FIGURE = lines()


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
            y = Repeat()(y)
        return alpha * self.node(x) + (1 - alpha) * y if alpha > 0 else y


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """The W4/L2 network becomes a student of T = 2: converted only, at once, layer by layer, or by a rising blend."""
    data = load(setting.data)
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


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    at = {label: mean_of(records, label, "T=2") for label in ("converted only", *ORDERS_OF_LAYERS)}
    best = max(ORDERS_OF_LAYERS, key=at.__getitem__)
    gain = at[best] - at["all at once"]
    return (
        f"Distillation is worth {at['all at once'] - at['converted only']:.1f} points at T = 2 over conversion alone; "
        f"replacing layers step by step {'adds' if gain > 0.1 else 'adds nothing:'} {gain:.2f} at best "
        f"({', '.join(f'{label} {value:.2f}' for label, value in at.items())} %)."
    )
