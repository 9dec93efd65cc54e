"""Which residual block: basic, SEW ADD, membrane shortcut, or ConvNeXt's with 3x3 convolutions in groups?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from figures import dots
from setting import (
    W4,
    Load,
    Row,
    Setting,
    curve_of,
    mean_of,
    qann_of,
    short_student,
    student_of,
    teacher_of,
)
from torch import Tensor, nn

import qsnn
from qsnn.models.attention import conv_norm
from qsnn.report.records import Record

QUESTION = "Which residual block spikes best, converted and from scratch?"
SIZE = "two blocks of 32 and 64 channels, 20,000 images; teacher and QANN 2 epochs, student 1; from scratch 5"
NET = "two blocks of 32 and 64 channels"
TITLES = {
    "teacher": "teacher [%]", "qann": "QANN [%]", "T=2": "T = 2 [%]", "scratch T=2": "from scratch, T = 2",
    "exact": "EXACT [%]", "parameters": "parameters", "synops": "synops",
}  # fmt: skip
NOTE = (
    "W4/L2. Basic: ReLU(x + f(x)); SEW ADD: x + ReLU(f(x)), spikes are added; membrane shortcut: x + f(ReLU(x)), "
    "currents are. ConvNeXt: 3x3 in groups, then 1x1 to twice the channels and back, or (without 1x1) 3x3 in groups to "
    "twice the channels and back. T = 2: the online student of the QANN; from scratch: the same network of random "
    "weights, trained as a student for as many epochs as the three stages together. EXACT as in `attention`."
)
FIGURE = dots("qann", "T=2", "scratch T=2")


GROUPS = (1, 8, 32)
BLOCKS: dict[str, dict[str, Any]] = {
    "basic": {"block": "basic"},
    "SEW ADD": {"block": "sew"},
    "membrane shortcut": {"block": "membrane"},
    **{
        f"ConvNeXt, groups {groups}{'' if expand else ', no 1x1'}": {
            "block": "convnext", "groups": groups, "expand": expand,
        }
        for expand in (True, False) for groups in GROUPS
    },
}  # fmt: skip
WIDTHS = (32, 64)


class Block(nn.Module):
    """A residual block without a change of size.

    Args:
        channels: C.
        block: "basic", "sew", "membrane" or "convnext".
        groups, expand: of "convnext", as in :class:`qsnn.models.attention.ConvNext`.
    Shape:
        x and y: (B, C, H, W).
    """

    def __init__(self, channels: int, block: str, groups: int, expand: bool) -> None:
        super().__init__()
        self.block, wide = block, 2 * channels
        if block != "convnext":
            layers = [*conv_norm(channels, channels), nn.ReLU(), *conv_norm(channels, channels)]
        elif expand:
            layers = [*conv_norm(channels, channels, groups=groups), nn.ReLU(), *conv_norm(channels, wide, 1),
                      nn.ReLU(), *conv_norm(wide, channels, 1)]  # fmt: skip
        else:
            layers = [*conv_norm(channels, wide, groups=groups), nn.ReLU(), *conv_norm(wide, channels, groups=groups)]
        self.body, self.relu = nn.Sequential(*layers), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.block == "membrane":
            return x + self.body(self.relu(x))  # type: ignore[no-any-return]
        if self.block == "sew":
            return x + self.relu(self.body(x))  # type: ignore[no-any-return]
        return self.relu(x + self.body(x))  # type: ignore[no-any-return]


def network(num_classes: int, channels: int, block: str, groups: int = 1, expand: bool = True) -> nn.Module:
    """A stem that halves the sides, a block, a convolution that halves them again, a block, and the readout."""
    layers: list[nn.Module] = []
    for before, width in zip((channels, *WIDTHS), WIDTHS, strict=False):
        # in front of a membrane shortcut stands a current, whose ReLU is the block's own
        layers += conv_norm(before, width, stride=2)
        layers += [] if block == "membrane" else [nn.ReLU()]
        layers.append(Block(width, block, groups, expand))
        layers += [nn.ReLU()] if block == "membrane" else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], num_classes))


def _stages(setting: Setting) -> Setting:
    """Half the epochs a stage, so that from scratch there are no more than about as many as in one."""
    return replace(setting, model="studies.blocks:network", epochs=max(1, setting.epochs // 2))


def _scratch(setting: Setting) -> qsnn.DistillConfig:
    own = _stages(setting)
    return short_student(setting, epochs=2 * own.epochs + short_student(own).epochs)


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Teacher, QANN and online student of every block, and the same network from scratch."""
    data, own = load(setting.data), _stages(setting)
    for label, options in BLOCKS.items():
        known = {
            "setting": asdict(replace(own, model=setting.model)), **options, "widths": WIDTHS, "quantize": W4,
            "train": asdict(own.low_bits()), "distill": asdict(short_student(own)),
            "scratch": asdict(_scratch(setting)),
        }  # fmt: skip
        yield label, known, partial(_block_row, setting, data, options)


def _block_row(setting: Setting, data: qsnn.Data, block: dict[str, Any]) -> dict[str, Any]:
    from studies.attention import costs_of

    own, options = _stages(setting), {"channels": data.shape[0], **block}
    teacher, qann = teacher_of(own, data, **options), qann_of(own, data, W4, **options)
    student = student_of(own, data, W4, short_student(own), **options)
    deferred = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2, firing="deferred"))
    costs = costs_of(deferred, qann, data)
    fresh = qsnn.create_model(own.model, data, seed=setting.seed, **options)
    start = qsnn.convert(qsnn.quantize(fresh, data, qsnn.QuantizeConfig(**W4)))
    scratch = qsnn.distill(start, fresh, data, _scratch(setting))  # no term of the loss asks the teacher
    return {
        "teacher": qsnn.accuracy(teacher, data.test), "qann": qsnn.accuracy(qann, data.test),
        **curve_of(student, data.test, 2), "scratch T=2": curve_of(scratch, data.test, 2)["T=2"],
        "exact": costs["exact"], "synops": costs["synops"],
        "parameters": sum(p.numel() for p in teacher.parameters()),
    }  # fmt: skip


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    by = {key: {label: mean_of(records, label, key) for label in BLOCKS} for key in ("T=2", "scratch T=2")}
    best = {key: max(BLOCKS, key=found.__getitem__) for key, found in by.items()}
    gain = sum(by["T=2"][label] - by["scratch T=2"][label] for label in BLOCKS) / len(BLOCKS)
    one, most = (f"ConvNeXt, groups {groups}" for groups in (GROUPS[0], GROUPS[-1]))
    grouped = by["T=2"][most] - by["T=2"][one]
    without = sum(by["T=2"][f"ConvNeXt, groups {g}, no 1x1"] - by["T=2"][f"ConvNeXt, groups {g}"] for g in GROUPS) / 3
    proved = all(r.metrics["exact"] == 100.0 for r in records)
    weighs = {label: mean_of(records, label, "parameters") for label in BLOCKS}
    shown = {
        key: f"{label} ({by[key][label]:.2f} %, {weighs[label] / 1000:.0f} k parameters)" for key, label in best.items()
    }
    return (
        f"At T = 2 the best block is {shown['T=2']} converted and distilled and {shown['scratch T=2']} from scratch; "
        f"by way of an ANN the blocks gain {gain:+.2f} points over as many epochs from scratch; {GROUPS[-1]} groups "
        f"instead of one change {grouped:+.2f} with {weighs[most] / weighs[one]:.2f} of the parameters, leaving the "
        f"1x1 convolutions away {without:+.2f}; deferred "
        f"{'every network is' if proved else 'not every network is'} EXACT."
    )
