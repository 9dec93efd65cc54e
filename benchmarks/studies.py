"""The studies of the main flow: what low bits cost, certificates, online firing, students, label smoothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from questions_training import mean_of
from setting import STUDENTS, Row, Setting, qann_of, short_student, student_config, teacher_of
from torch import Tensor

import qsnn
from qsnn.report.records import Record

# --- precision: what low bits cost, after calibration alone and after training -------------------------------------

# label: (weight bits, activations); act_form fp16 and float have no spiking form
PRECISIONS: dict[str, dict[str, Any]] = {
    "32/32": {"weight_bits": 32, "act_form": "float", "input_bits": None, "first_last_bits": None},
    "16/16": {"weight_bits": 16, "act_form": "fp16", "input_bits": None, "first_last_bits": None},
    "8/8": {"weight_bits": 8, "act_bits": 8},
    "4/4": {"weight_bits": 4, "act_bits": 4},
    "4/2": {"weight_bits": 4, "act_bits": 2},
    "4/L2": {"weight_bits": 4, "levels": 2},
    "2/2": {"weight_bits": 2, "act_bits": 2},
    "1/2": {"weight_bits": 1, "act_bits": 2},
    "1/L2": {"weight_bits": 1, "levels": 2},
    "1/1": {"weight_bits": 1, "act_bits": 1},
    "1/±1": {"weight_bits": 1, "act_form": "sign"},
}


SMALL_STEPS: dict[str, dict[str, Any]] = {
    "32/32": {"batch_size": 32}, "4/L2": {"batch_size": 32}, "1/1": {"batch_size": 32, "lr": 0.005}
}  # fmt: skip
"""Where training differs from ``low_bits``, chosen on training images that were held out."""


def precision(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """Accuracy after calibration and after quantization-aware training (cross entropy alone), and memory.

    32/32 is the float teacher trained on for the same epochs: the fair comparison.
    """
    for label, options in PRECISIONS.items():
        training = replace(setting.low_bits(), **SMALL_STEPS.get(label, {}))
        measure = partial(_precision_row, setting, data, label, options, training)
        yield label, {"quantize": options, "train": asdict(training)}, measure


def precision_answer(records: Sequence[Record]) -> str:
    """One sentence; points lost against the better of the teacher and the teacher trained on, by seed."""
    best = {r.seed: max(r.metrics["teacher"], r.metrics["qat"]) for r in records if r.name.endswith("/32/32")}
    lost = {
        label: fmean(best[r.seed] - r.metrics["qat"] for r in records if r.name == f"study-precision/{label}")
        for label in PRECISIONS
        if any(r.name == f"study-precision/{label}" for r in records)
    }
    if not best:
        return "Points lost are counted against row 32/32, which has no record yet."
    shown = ", ".join(f"{label} {value:.2f}" for label, value in lost.items() if label != "32/32")
    free = [label for label, value in lost.items() if value <= 0.1 and label != "32/32"]
    return f"{', '.join(free) or 'No low precision'} cost{'' if len(free) > 1 else 's'} nothing; points lost: {shown}."


def _precision_row(
    setting: Setting, data: qsnn.Data, label: str, options: dict[str, Any], training: qsnn.TrainConfig
) -> dict[str, Any]:
    teacher = teacher_of(setting, data)
    before = qsnn.accuracy(teacher, data.test)
    if options.get("act_form") == "float":
        model, after_ptq = teacher_of(setting, data), before
    else:
        model = qsnn.quantize(teacher, data, qsnn.QuantizeConfig(**options))
        after_ptq = qsnn.accuracy(model, data.test)
    qsnn.fit(model, data, training, label=label)
    return {
        "teacher": before,
        "ptq": after_ptq,
        "qat": qsnn.accuracy(model, data.test),
        "weight_bytes": qsnn.summary(model).weight_bytes,
    }


# --- certificates: is the spiking network the quantized one, at every precision --------------------------------------

WEIGHTS: dict[str, int] = {"1": 1, "2": 2, "4": 4, "8": 8, "fp16": 16}
ACTIVATIONS: dict[str, dict[str, int]] = {
    "1": {"act_bits": 1}, "L2": {"levels": 2}, "2": {"act_bits": 2}, "4": {"act_bits": 4}
}  # fmt: skip


def certificates(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """Deferred firing at T = L against the QANN, every integer of every layer, on all test images; calibrated only."""
    for weights, bits in WEIGHTS.items():
        for activations, options in ACTIVATIONS.items():
            config = {"weight_bits": bits, **options}
            yield f"{weights}/{activations}", {"quantize": config}, partial(_certificate_row, setting, data, config)


def _certificate_row(setting: Setting, data: qsnn.Data, options: dict[str, Any]) -> dict[str, Any]:
    qann = qsnn.quantize(teacher_of(setting, data), data, qsnn.QuantizeConfig(**options))
    found = qsnn.certify(qsnn.convert(qann), qann, data.test)
    return {
        "exact": int(found.exact),
        "T": found.timesteps,
        "integers": sum(layer.elements for layer in found.layers),
        "differ": sum(layer.elements - layer.equal for layer in found.layers),
        "ties": sum(layer.ties for layer in found.layers),
    }


# --- online: how near few online steps come to the QANN without distillation ------------------------------------------

THRESHOLD_SCALES = (1.0, 0.5, 0.35, 0.25)


def online(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """W4/L2: accuracy of the QANN and of its online SNN, as it is and corrected on arriving spikes for T = 2."""
    training = setting.training(0.04, batch_size=64, kd_weight=0.0)  # a gentler one keeps the spikes even
    for scale in THRESHOLD_SCALES:
        measure = partial(_online_row, setting, data, scale, training, False)
        yield f"threshold x {scale:g}", {"threshold_scale": scale, "train": asdict(training)}, measure
    for scale in THRESHOLD_SCALES[:2]:
        measure = partial(_online_row, setting, data, scale, training, True)
        known = {"threshold_scale": scale, "signed": True, "train": asdict(training)}
        yield f"threshold x {scale:g}, signed spikes", known, measure


def online_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    reached = {
        label: max(mean_of(records, label, f"{kind}T=2") for kind in ("", "corrected ")) for label in labels
    }  # fmt: skip
    best = max(labels, key=reached.__getitem__)
    shown = ", ".join(f"{label} {mean_of(records, label, 'qann') - reached[label]:.2f}" for label in labels)
    return (
        f'Without distillation "{best}" answers best in two online steps, {reached[best]:.2f} %; points below its own '
        f"quantized network, with the better of the two conversions: {shown}."
    )


def _online_row(
    setting: Setting, data: qsnn.Data, scale: float, training: qsnn.TrainConfig, signed: bool
) -> dict[str, Any]:
    teacher = teacher_of(setting, data)
    qann = qsnn.quantize(teacher, data, qsnn.QuantizeConfig(weight_bits=4, levels=2, threshold_scale=scale))
    qsnn.fit(qann, data, training, label=f"x {scale:g}")
    found = {"qann": qsnn.accuracy(qann, data.test)}
    neurons = qsnn.ConvertConfig(timesteps=2, signed=signed)
    snns = {"": qsnn.convert(qann, neurons), "corrected ": qsnn.convert(qann, data, neurons)}
    for kind, snn in snns.items():
        curve = qsnn.benchmark(snn, data.test, timesteps=8, firing="online").accuracy
        found |= {f"{kind}T={t}": curve[t - 1] for t in (1, 2, 4, 8)}
    return found


# --- distill: students of two steps beside their quantized teacher, trained on for as long ---------------------------


def distill(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """Online students of T = 2 from the quantized network of each precision, and what they have to beat."""
    config, scratch = student_config(setting), student_config(setting, epochs=3 * setting.epochs)
    for label, options in STUDENTS.items():
        known = {"quantize": options, "train": asdict(setting.low_bits()), "distill": asdict(config)}
        yield label, known, partial(_student_row, setting, data, options, config)
    yield (
        "W4, from scratch", {"quantize": STUDENTS["W4"], "distill": asdict(scratch)},
        partial(_scratch_row, setting, data, STUDENTS["W4"], scratch),
    )  # fmt: skip
    yield "SpikingJelly, best recipe at T = 2", {"recipes": "peers.py"}, partial(_peer_row, setting, data)


def distill_answer(records: Sequence[Record]) -> str:
    """One sentence."""
    parts, enough = [], True
    for label in STUDENTS:
        two, qann, longer = (mean_of(records, label, key) for key in ("T=2", "qann", "qann on"))
        parts.append(f"{label} {two - qann:+.2f} ({two - longer:+.2f})")
        enough = enough and two >= qann - 0.1
    peer = mean_of(records, "SpikingJelly, best recipe at T = 2", "T=2")
    two, scratch = mean_of(records, "W4", "T=2"), mean_of(records, "W4, from scratch", "T=2")
    one = mean_of(records, "W4", "T=4") - mean_of(records, "W4", "T=1")
    return (
        f"Two steps are {'' if enough else 'not '}enough: students against the network that taught them "
        f"(in brackets: trained on for as long): "
        f"{', '.join(parts)} points; from scratch {scratch - two:+.2f}, SpikingJelly's best recipe {peer - two:+.1f}; "
        f"at T = 1 the W4 student is {one:.2f} below its T = 4."
    )


def _curve(snn: qsnn.SNN, data: qsnn.Data) -> dict[str, float]:
    curve = qsnn.benchmark(snn, data.test, timesteps=4, firing="online").accuracy
    return {f"T={t}": curve[t - 1] for t in (1, 2, 4)}


def _student_row(
    setting: Setting, data: qsnn.Data, options: dict[str, Any], config: qsnn.DistillConfig
) -> dict[str, Any]:
    qann = qann_of(setting, data, options)
    found = {"qann": qsnn.accuracy(qann, data.test)}
    student = qsnn.distill(qsnn.convert(qann), qann, data, config)
    longer = qann_of(setting, data, options)
    qsnn.fit(longer, data, setting.low_bits(), label="QANN on")
    return {**found, "qann on": qsnn.accuracy(longer, data.test), **_curve(student, data)}


def _scratch_row(
    setting: Setting, data: qsnn.Data, options: dict[str, Any], config: qsnn.DistillConfig
) -> dict[str, Any]:
    fresh = qsnn.create_model(setting.model, data, seed=setting.seed)
    start = qsnn.convert(qsnn.quantize(fresh, data, qsnn.QuantizeConfig(**options)))
    return _curve(qsnn.distill(start, fresh, data, config), data)  # no term of the loss asks the teacher


def _peer_row(setting: Setting, data: qsnn.Data) -> dict[str, Any]:
    import peers

    return peers.best_of_spikingjelly(teacher_of(setting, data), data, 2)


# --- smoothing: does label smoothing help, on the student, on the teacher? ------------------------------------------

SMOOTHINGS = (0.0, 0.05, 0.1, 0.2)


def smoothing(setting: Setting, data: qsnn.Data) -> Iterator[Row]:
    """Label smoothing of the student alone, and of its quantized teacher alone; W4/L2, T = 2, with KL."""
    for where in ("student", "teacher"):
        for amount in SMOOTHINGS:
            if where == "teacher" and amount == 0:
                continue  # that is the student's first row
            on_student, on_teacher = (amount, 0.0) if where == "student" else (0.0, amount)
            config = short_student(setting, kd_weight=0.5, label_smoothing=on_student)
            yield (
                f"{where} {amount:g}", {"distill": asdict(config), "teacher_smoothing": on_teacher},
                partial(_smoothing_row, setting, data, config, on_teacher),
            )  # fmt: skip


def _smoothing_row(setting: Setting, data: qsnn.Data, config: qsnn.DistillConfig, on_teacher: float) -> dict[str, Any]:
    if on_teacher:
        training = replace(setting.low_bits(), label_smoothing=on_teacher)
        qann = qsnn.quantize(teacher_of(setting, data), data, qsnn.QuantizeConfig(**STUDENTS["W4"]))
        qsnn.fit(qann, data, training, label="QANN")
    else:
        qann = qann_of(setting, data, STUDENTS["W4"])
    student = qsnn.distill(qsnn.convert(qann), qann, data, config)
    measured = qsnn.benchmark(student, data.test, timesteps=2, firing="online")
    logits = [(student(images)[-1], labels) for images, labels in qsnn.batches(data.test, 250)]
    error = calibration_error(torch.cat([z for z, _ in logits]), torch.cat([labels for _, labels in logits]))
    return {
        "qann": qsnn.accuracy(qann, data.test), "T=2": measured.accuracy[1], "ece": error,
        "spike rate": measured.spike_rate, "synops": measured.synops,
    }  # fmt: skip


def smoothing_answer(records: Sequence[Record]) -> str:
    """One sentence."""

    def at(label: str, key: str) -> float:
        return mean_of(records, label, key)

    parts = []
    for where in ("student", "teacher"):
        labels = [f"{where} {amount:g}" for amount in SMOOTHINGS[1:]]
        best = max(labels, key=lambda label: at(label, "T=2"))
        change = at(best, "T=2") - at("student 0", "T=2")
        verdict = "helps" if change > 0.1 else "hurts" if change < -0.1 else "changes little"
        parts.append(
            f"on the {where} it {verdict} (at best {change:+.2f} points of accuracy, {best.split()[1]}; calibration "
            f"error {at(best, 'ece'):.1f} against {at('student 0', 'ece'):.1f} %, spike rate "
            f"{at(best, 'spike rate'):.3f} against {at('student 0', 'spike rate'):.3f})"
        )
    return f"Label smoothing: {'; '.join(parts)}."


@torch.no_grad()
def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error [%]: :math:`\sum_b \tfrac{n_b}{n} |acc_b - conf_b|`, bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    confidence, answer = logits.softmax(-1).max(-1)
    right = (answer == labels).float()
    place = (confidence * bins).ceil().clamp(1, bins)
    gaps = [(right[place == b].sum() - confidence[place == b].sum()).abs() for b in range(1, bins + 1)]
    return 100.0 * float(sum(gaps)) / len(labels)
