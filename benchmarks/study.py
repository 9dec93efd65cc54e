"""One question, one command: ``python benchmarks/study.py NAME`` trains what it compares, prints a table, adds records.

A row whose record is there already (same config) is not run again, so a long table fills across calls. Teachers are
kept in ``runs/study`` under the hash of their config. Default size: the study net (16-16-32-32-64 channels), 20,000
training images, 4 epochs a stage; ``--full`` uses all images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qsnn
from qsnn.records import Record, append, environment, now, read
from qsnn.report import draw_curve

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import questions

HERE = Path(__file__).resolve().parent
CACHE = Path("runs/study")


@dataclass(frozen=True)
class Setting:
    """What all rows of a study share."""

    data: str
    model: str
    epochs: int
    train_images: int | None
    seed: int

    def training(self, lr: float, **options: Any) -> qsnn.TrainConfig:
        """The options of one stage."""
        return qsnn.TrainConfig(epochs=self.epochs, lr=lr, train_images=self.train_images, seed=self.seed, **options)

    def low_bits(self) -> qsnn.TrainConfig:
        """Training of low-precision weights: AdamW, small batches, cross entropy; of 1 bit far better than SGD."""
        return self.training(0.01, optimizer="adamw", weight_decay=0.0, batch_size=64, kd_weight=0.0)


def cached(name: str, config: dict[str, Any], make: Callable[[], nn.Module]) -> nn.Module:
    """Load the model of this config, or make and keep it."""
    key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    path = CACHE / f"{name}-{key}.safetensors"
    if not path.exists():
        qsnn.save(make(), path)
    return qsnn.load(path)


def teacher_of(setting: Setting, data: qsnn.Data) -> nn.Module:
    """The float teacher of a setting, trained once."""

    def make() -> nn.Module:
        model = qsnn.create_model(setting.model, data, seed=setting.seed)
        qsnn.fit(model, data, setting.training(0.1), label="teacher")
        return model

    return cached("teacher", asdict(setting), make)


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


def precision(setting: Setting, data: qsnn.Data) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Accuracy after calibration and after quantization-aware training (cross entropy alone), and memory.

    32/32 is the float teacher trained on for the same epochs: the fair comparison.
    """
    training = setting.low_bits()
    for label, options in PRECISIONS.items():
        measure = partial(_precision_row, setting, data, label, options, training)
        yield label, {"quantize": options, "train": asdict(training)}, measure


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


def certificates(
    setting: Setting, data: qsnn.Data
) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
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


def online(setting: Setting, data: qsnn.Data) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """W4/L2: accuracy of the QANN and of its online SNN, as it is and corrected on arriving spikes for T = 2."""
    training = setting.training(0.04, batch_size=64, kd_weight=0.0)  # a gentler one keeps the spikes even
    for scale in THRESHOLD_SCALES:
        measure = partial(_online_row, setting, data, scale, training)
        yield f"threshold x {scale:g}", {"threshold_scale": scale, "train": asdict(training)}, measure


def _online_row(setting: Setting, data: qsnn.Data, scale: float, training: qsnn.TrainConfig) -> dict[str, Any]:
    teacher = teacher_of(setting, data)
    qann = qsnn.quantize(teacher, data, qsnn.QuantizeConfig(weight_bits=4, levels=2, threshold_scale=scale))
    qsnn.fit(qann, data, training, label=f"x {scale:g}")
    found = {"qann": qsnn.accuracy(qann, data.test)}
    snns = {"": qsnn.convert(qann), "corrected ": qsnn.convert(qann, data, qsnn.ConvertConfig(timesteps=2))}
    for kind, snn in snns.items():
        curve = qsnn.benchmark(snn, data.test, timesteps=8, firing="online").accuracy
        found |= {f"{kind}T={t}": curve[t - 1] for t in (1, 2, 4, 8)}
    return found


# --- distill: students of two steps beside their quantized teacher, trained on for as long ---------------------------

STUDENTS: dict[str, dict[str, int]] = {
    "W4": {"weight_bits": 4, "levels": 2},
    "W1": {"weight_bits": 1, "levels": 2},
    "fp16": {"weight_bits": 16, "levels": 2},
}


def qann_of(setting: Setting, data: qsnn.Data, options: dict[str, Any]) -> nn.Module:
    """The quantized network of a setting, trained once."""
    training = setting.low_bits()

    def make() -> nn.Module:
        qann = qsnn.quantize(teacher_of(setting, data), data, qsnn.QuantizeConfig(**options))
        qsnn.fit(qann, data, training, label="QANN")
        return qann

    return cached("qann", {"setting": asdict(setting), "quantize": options, "train": asdict(training)}, make)


def student_config(setting: Setting, **options: Any) -> qsnn.DistillConfig:
    """How the students of the studies learn."""
    chosen: dict[str, Any] = {
        "epochs": setting.epochs, "lr": 0.01, "optimizer": "adamw", "weight_decay": 0.0, "batch_size": 64,
        "label_smoothing": 0.0, "ce_weight": 1.0, "kd_weight": 0.0, "surrogate": "rate",
        "train_images": setting.train_images, "seed": setting.seed,
    }  # fmt: skip
    return qsnn.DistillConfig(**{**chosen, **options})


def distill(setting: Setting, data: qsnn.Data) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Online students from the quantized network of each precision; one for every T; and what they have to beat."""
    two = student_config(setting, timesteps=2)
    # the gradient of single steps, and a loss on each of them: the first one has to answer too
    every = student_config(
        setting, timesteps=2, surrogate="box", ce_weight=0.5, step_ce_weight=0.5, train_threshold="channel",
        train_initial="channel",
    )  # fmt: skip
    trained = student_config(setting, timesteps=2, train_threshold="channel", train_initial="channel")
    scratch = student_config(setting, timesteps=2, epochs=3 * setting.epochs)
    for label, options in STUDENTS.items():
        config = {"quantize": options, "train": asdict(setting.low_bits())}
        yield f"{label}, T = 2", {**config, "distill": asdict(two)}, partial(_student_row, setting, data, options, two)
    options = STUDENTS["W4"]
    config = {"quantize": options, "train": asdict(setting.low_bits())}
    yield (
        "W4, T = 2, neurons trained", {**config, "distill": asdict(trained)},
        partial(_student_row, setting, data, options, trained),
    )  # fmt: skip
    yield (
        "W4, every T", {**config, "distill": asdict(every)}, partial(_student_row, setting, data, options, every)
    )  # fmt: skip
    yield (
        "W4, T = 2, from scratch", {"quantize": options, "distill": asdict(scratch)},
        partial(_scratch_row, setting, data, options, scratch),
    )  # fmt: skip
    yield "SpikingJelly, best recipe at T = 2", {"recipes": "peers.py"}, partial(_peer_row, setting, data)


def _curve(snn: qsnn.SNN, data: qsnn.Data) -> dict[str, float]:
    curve = qsnn.benchmark(snn, data.test, timesteps=4, firing="online").accuracy
    return {f"T={t}": curve[t - 1] for t in (1, 2, 4)}


def _student_row(
    setting: Setting, data: qsnn.Data, options: dict[str, Any], config: qsnn.DistillConfig
) -> dict[str, Any]:
    qann = qann_of(setting, data, options)
    found = {"qann": qsnn.accuracy(qann, data.test)}
    student = qsnn.distill(qsnn.convert(qann), qann, data, config)
    if not config.train_threshold:
        longer = qann_of(setting, data, options)
        qsnn.fit(longer, data, setting.low_bits(), label="QANN on")
        found["qann on"] = qsnn.accuracy(longer, data.test)
    return {**found, **_curve(student, data)}


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


def smoothing(setting: Setting, data: qsnn.Data) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Label smoothing of the student alone, and of its quantized teacher alone; W4/L2, T = 2, half KL."""
    for where in ("student", "teacher"):
        for amount in SMOOTHINGS:
            if where == "teacher" and amount == 0:
                continue  # that is the student's first row
            on_student, on_teacher = (amount, 0.0) if where == "student" else (0.0, amount)
            config = student_config(setting, ce_weight=0.5, kd_weight=0.5, label_smoothing=on_student)
            yield (
                f"{where} {amount:g}", {"distill": asdict(config), "teacher_smoothing": on_teacher},
                partial(_smoothing_row, setting, data, config, on_teacher),
            )  # fmt: skip


def _smoothing_row(
    setting: Setting, data: qsnn.Data, config: qsnn.DistillConfig, on_teacher: float
) -> dict[str, Any]:
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


# --- the questions of questions.py, which work on the cached networks ------------------------------------------------


def _on_networks(study: Callable[..., Any]) -> Callable[[Setting, qsnn.Data], Iterator[Any]]:
    def rows(setting: Setting, data: qsnn.Data) -> Iterator[Any]:
        qann = qann_of(setting, data, STUDENTS["W4"])
        for label, options, measure in study(setting, data, teacher_of(setting, data), qann):
            yield label, {**options, "quantize": STUDENTS["W4"], "train": asdict(setting.low_bits())}, measure

    return rows


def time(setting: Setting, data: qsnn.Data) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """See :func:`questions.time`; it takes its own data set."""
    return questions.time(setting, None)


STUDIES = {
    "precision": precision, "certificates": certificates, "online": online, "distill": distill, "smoothing": smoothing,
    "reset": _on_networks(questions.reset), "levels": _on_networks(questions.levels),
    "readout": _on_networks(questions.readout), "time": time,
}  # fmt: skip
ANSWERS = {
    "reset": questions.reset_answer, "levels": questions.levels_answer, "readout": questions.readout_answer,
    "time": questions.time_answer,
}  # fmt: skip


def draw(name: str, records: list[Record]) -> Path:
    """Accuracy against T, a line a setting, mean and standard deviation over the seeds; return the file."""
    results, bands = [], {}
    for label in dict.fromkeys(r.name.partition("/")[2] for r in records):
        rows = [r.metrics for r in records if r.name.partition("/")[2] == label]
        steps = tuple(int(key[2:]) for key in rows[0] if key.startswith("T="))
        values = [[float(row[f"T={t}"]) for row in rows] for t in steps]
        n = records[0].n
        mean = tuple(fmean(v) for v in values)
        results.append(SimpleNamespace(name=label, n=n, timesteps=steps, accuracy=mean, exits=()))
        bands[label] = [stdev(v) if len(v) > 1 else 0.0 for v in values]
    path = HERE / "figures" / f"study-{name}.svg"
    seeds = len({r.seed for r in records})
    draw_curve(results, path, title=f"{name}, {records[0].data}, {seeds} seeds", spread=bands)  # type: ignore[arg-type]
    return path


def run(
    name: str,
    data_name: str,
    seeds: list[int],
    full: bool,
    data_root: Path | None,
    model: str = "study",
    only: list[str] | None = None,
) -> list[Record]:
    """Run the rows of a study that have no record yet; return all of them."""
    path = HERE / "records" / f"study-{name}.jsonl"
    console, data = Console(), qsnn.load_data(data_name, root=data_root)
    images, epochs = (None, 12) if full else (20_000, 4)
    wanted: list[tuple[str, int, dict[str, Any]]] = []
    for seed in seeds:
        setting = Setting(data_name, model, epochs, images, seed)
        for label, options, measure in STUDIES[name](setting, data):
            if only and label not in only:
                continue
            config = json.loads(json.dumps({"setting": asdict(setting), **options}))
            record_name = f"study-{name}/{label}"
            wanted.append((record_name, seed, config))
            known = read(path) if path.exists() else []
            if any(r.name == record_name and r.config == config for r in known):
                continue
            world = environment()
            metrics = measure()
            append(path, Record(
                name=record_name, data=data_name, seed=seed, n=len(data.test), metrics=metrics, config=config,
                environment=world, time=now(),
            ))  # fmt: skip
            console.print(f"{label}, seed {seed}: {metrics}", highlight=False)
    newest = {(r.name, json.dumps(r.config, sort_keys=True)): r for r in read(path)}
    return [newest[name, json.dumps(config, sort_keys=True)] for name, _, config in wanted]


def print_table(name: str, records: list[Record]) -> None:
    """Mean ± standard deviation over the seeds of every metric, a row a label."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    keys = list(dict.fromkeys(key for r in records for key in r.metrics if not key.startswith("error")))
    table = Table(title=f"{name} on {records[0].data}")
    table.add_column("setting")
    for key in keys:
        table.add_column(key, justify="right")
    for label in labels:
        rows = [r for r in records if r.name.partition("/")[2] == label]
        cells = []
        for key in keys:
            values = [float(r.metrics[key]) for r in rows if key in r.metrics]
            if not values:
                cells.append("")
                continue
            cells.append(f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else ""))
        table.add_row(label, *cells)
    Console().print(table)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--full", action="store_true", help="all training images, 12 epochs a stage")
    parser.add_argument("--model", default="study")
    parser.add_argument("--only", nargs="+", default=None, metavar="ROW", help="these rows of the table")
    parser.add_argument("--data-root", type=Path, default=None)
    args = parser.parse_args()
    name = "nmnist" if args.name == "time" else args.data
    records = run(args.name, name, args.seeds, args.full, args.data_root, args.model, args.only)
    print_table(args.name, records)
    if args.name in ANSWERS:
        print(f"drawn: {draw(args.name, records)}")
        print(ANSWERS[args.name](records))


if __name__ == "__main__":
    main()
