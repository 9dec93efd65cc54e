"""How many matrices does attention need: one, two or three?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from figures import dots
from setting import W4, Load, Row, Setting, curve_of, mean_of, qann_of, short_student, student_of, teacher_of

import qsnn
from qsnn.models.create import build_model
from qsnn.report.records import Record

QUESTION = "Does attention need three matrices, or are two enough, or one?"
SIZE = "`qkformer` of 16-32-64 channels, 20,000 images, 4 epochs a stage, students of half the epochs"
NET = "`qkformer` of 16-32-64 channels"
TITLES = {
    "teacher": "teacher [%]", "qann": "QANN [%]", "T=1": "student, T = 1 [%]", "T=2": "T = 2", "exact": "EXACT [%]",
    "parameters": "parameters", "synops": "synops", "macs": "MACs", "macs on counts": "of these on counts",
}  # fmt: skip
NOTE = (
    "W4/L2, students of half the epochs. One matrix: the keys of a head decide which tokens pass; two: queries decide, "
    "by token or by channel; "
    "three: ReLU attention q (k^T v) / N without a softmax, which is computed on counts, not on spikes: it fires "
    "deferred alone, where it is its QANN, and has no online student. The MLP is made wider or narrower until a row "
    "has the parameters, or the multiply-accumulates, of two matrices. EXACT: spike counts and logits of the deferred "
    "network, T = 2, that are the QANN's, of all test images. Synops and MACs of one image, deferred, T = 2."
)
FIGURE = dots("qann", "T=2")


FORMS = {"self": "one matrix", "token": "two, by token", "channel": "two, by channel", "relu": "three, ReLU attention"}
WIDTHS, HIDDEN = (16, 32, 64), 64
BASE = "token"


def _label(form: str, equal: str) -> str:
    return FORMS[form] if form in ("token", "channel") else f"{FORMS[form]}, equal {equal}"


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Teacher, QANN, deferred network and online student of every form, at equal parameters and at equal operations."""
    data = load(setting.data)
    for form in FORMS:
        for equal in ("parameters",) if form in ("token", "channel") else ("parameters", "operations"):
            known = {
                "attention": form, "equal": equal, "widths": WIDTHS, "hidden": HIDDEN, "quantize": W4,
                "train": asdict(setting.low_bits()), "distill": asdict(short_student(setting)),
            }  # fmt: skip
            yield _label(form, equal), known, partial(_attention_row, setting, data, form, equal)


def hidden_of(form: str, equal: str, shape: tuple[int, ...], classes: int) -> int:
    """Channels inside the MLPs at which a form has the parameters, or the MACs, of two matrices; both are a line."""

    def size(attention: str, hidden: int) -> int:
        network = build_model("qkformer", shape, classes, attention=attention, widths=WIDTHS, hidden=hidden).eval()
        found = qsnn.summary(network, shape)
        return found.macs if equal == "operations" else sum(p.numel() for p in network.parameters())

    wanted, low, high = size(BASE, HIDDEN), size(form, HIDDEN), size(form, 2 * HIDDEN)
    return max(1, round(HIDDEN + HIDDEN * (wanted - low) / (high - low)))


def _attention_row(setting: Setting, data: qsnn.Data, form: str, equal: str) -> dict[str, Any]:
    own = replace(setting, model="qkformer")
    hidden = hidden_of(form, equal, tuple(data.shape), data.num_classes)
    options = {"attention": form, "widths": list(WIDTHS), "hidden": hidden}
    teacher, qann = teacher_of(own, data, **options), qann_of(own, data, W4, **options)
    found: dict[str, Any] = {
        "teacher": qsnn.accuracy(teacher, data.test), "qann": qsnn.accuracy(qann, data.test),
        "parameters": sum(p.numel() for p in teacher.parameters()),
    }  # fmt: skip
    deferred = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2, firing="deferred"))
    found |= costs_of(deferred, qann, data)
    if not found["macs on counts"]:
        student = student_of(own, data, W4, short_student(own), **options)
        found |= curve_of(student, data.test, 2)
    return found


def costs_of(deferred: qsnn.SNN, qann: Any, data: qsnn.Data) -> dict[str, float]:
    """How much of a deferred network is its QANN's [%], and what it does for an image."""
    folded = qsnn.fold(deferred)
    certificate = qsnn.certify(folded, qann, data.test)
    result = qsnn.benchmark(folded, data.test.head(500), timesteps=2, firing="deferred")  # type: ignore[attr-defined]
    equal = sum(layer.equal for layer in certificate.layers) + certificate.same_logits
    every = sum(layer.elements for layer in certificate.layers) + certificate.logits
    counted = [layer.macs for layer in result.layers if layer.name in result.on_counts]
    return {
        "exact": 100.0 if certificate.exact else 100.0 * min(equal / every, 1 - 1e-6),
        "synops": result.synops or 0.0, "macs": result.macs, "macs on counts": sum(counted),
    }  # fmt: skip


def answer(records: Sequence[Record]) -> str:
    """One sentence."""

    def at(form: str, equal: str, key: str) -> float:
        return mean_of(records, _label(form, equal), key)

    parts = []
    for equal in ("parameters", "operations"):
        shown = ", ".join(f"{FORMS[form]} {at(form, equal, 'qann'):.2f}" for form in FORMS)
        parts.append(f"at equal {equal} {shown} %")
    gains = [at("relu", equal, "qann") - max(at(form, equal, "qann") for form in FORMS if form != "relu")
             for equal in ("parameters", "operations")]  # fmt: skip
    spared = max(at("token", "", "qann"), at("channel", "", "qann")) - max(
        at("self", equal, "qann") for equal in ("parameters", "operations")
    )
    need = "three are better" if min(gains) > 0.2 else "two are enough" if spared > 0.2 else "one is enough"
    online = ", ".join(f"{FORMS[form]} {at(form, 'parameters', 'T=2'):.2f}" for form in FORMS if form != "relu")
    proved = all(r.metrics["exact"] == 100.0 for r in records)
    return (
        f"Of the matrices of attention {need} (quantized: {'; '.join(parts)}); online students at T = 2: {online} %, "
        f"of three there is none; deferred {'every network is' if proved else 'not every network is'} EXACT."
    )
