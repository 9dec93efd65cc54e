"""One question, one command: ``python benchmarks/study.py NAME`` trains what it compares, prints a table, adds records.

A row whose record is there already (same config) is not run again, so a long table fills across calls. Teachers are
kept in ``runs/study`` under the hash of their config. Default size: the study net (16-16-32-32-64 channels), 20,000
training images, 4 epochs a stage; ``--full`` uses all images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import qsnn
from qsnn.records import Record, append, environment, now, read

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
    for label, options in PRECISIONS.items():
        training = setting.training(0.1, batch_size=64, kd_weight=0.0)  # better than lr 0.04, batch 128 at every one
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


STUDIES = {"precision": precision, "certificates": certificates, "online": online}


def run(name: str, data_name: str, seeds: list[int], full: bool, data_root: Path | None) -> list[Record]:
    """Run the rows of a study that have no record yet; return all of them."""
    path = HERE / "records" / f"study-{name}.jsonl"
    console, data = Console(), qsnn.load_data(data_name, root=data_root)
    images, epochs = (None, 12) if full else (20_000, 4)
    wanted: list[tuple[str, int, dict[str, Any]]] = []
    for seed in seeds:
        setting = Setting(data_name, "study", epochs, images, seed)
        for label, options, measure in STUDIES[name](setting, data):
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
    keys = list(records[0].metrics)
    table = Table(title=f"{name} on {records[0].data}")
    table.add_column("setting")
    for key in keys:
        table.add_column(key, justify="right")
    for label in labels:
        rows = [r for r in records if r.name.partition("/")[2] == label]
        cells = []
        for key in keys:
            values = [float(r.metrics[key]) for r in rows]
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
    parser.add_argument("--data-root", type=Path, default=None)
    args = parser.parse_args()
    print_table(args.name, run(args.name, args.data, args.seeds, args.full, args.data_root))


if __name__ == "__main__":
    main()
