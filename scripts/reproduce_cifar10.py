#!/usr/bin/env python3
"""CIFAR-10 from top to bottom: a float teacher, a W4/L2 QANN, a student of two binary steps, a table, records.

    python scripts/reproduce_cifar10.py                  # ResNet-18, for one GPU
    python scripts/reproduce_cifar10.py --model vgg16
    python scripts/reproduce_cifar10.py --quick          # a small net on a fixed subset, for a CPU

Images, augmentation and batches live on the device; layers compute in bfloat16, channels-last. Every stage writes its
file and goes on where it was stopped. Published for comparison: binary spikes, T = 2, ResNet-18: 94.75 %.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

import qsnn
from qsnn.checkpoint import resume_file
from qsnn.report.records import append, environment, now
from qsnn.report.terminal import table
from qsnn.training.processes import start

HERE = Path(__file__).resolve().parent.parent

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", choices=("resnet18", "vgg16", "study"), default="resnet18")
parser.add_argument("--quick", action="store_true", help="study net, the first 5,000 images, 4 epochs a stage")
parser.add_argument("--epochs", type=int, nargs=3, default=(40, 30, 30), metavar=("TEACHER", "QANN", "STUDENT"))
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default=None)
parser.add_argument("--out", type=Path, default=None)
parser.add_argument("--records", type=Path, default=None, help="append the records here too")
args = parser.parse_args()

device = start(args.device)
model, epochs, images = (args.model, args.epochs, None) if not args.quick else ("study", (4, 4, 4), 5_000)
out = args.out or Path("runs") / f"cifar10-{model}{'-quick' if args.quick else ''}-{args.seed}"
precision = "bf16" if device.type == "cuda" else "fp32"

# --- data, on the device ----------------------------------------------------------------------------------------------
data = qsnn.load_data("cifar10")
data = replace(data, train=data.train.to(device), val=data.val.to(device), test=data.test.to(device))

# --- how each stage trains --------------------------------------------------------------------------------------------
common = {"batch_size": 128, "train_images": images, "precision": precision, "seed": args.seed}
teacher_config = qsnn.TrainConfig(epochs=epochs[0], lr=0.1, label_smoothing=0.1, **common)
quantize_config = qsnn.QuantizeConfig(weight_bits=4, levels=2)
qann_config = qsnn.TrainConfig(epochs=epochs[1], lr=0.05, kd_weight=0.5, **common)
convert_config = qsnn.ConvertConfig(timesteps=2, firing="online")
student_config = qsnn.DistillConfig(
    timesteps=2, epochs=epochs[2], lr=0.05, ce_weight=0.5, kd_weight=0.5, label_smoothing=0.0, **common
)
configs = {
    "model": model, "teacher": asdict(teacher_config),
    "quantize": asdict(quantize_config), "train": asdict(qann_config),
    "convert": asdict(convert_config), "distill": asdict(student_config),
}  # fmt: skip
seconds = {}


def stage(name, make):
    """Load the file of a stage that is done, or make it, going on from its last state."""
    path = out / f"{name}.safetensors"
    state = resume_file(path, configs)
    if path.exists() and qsnn.read_recipe(path).get("configs") == configs:
        return qsnn.load(path).to(device)
    begun = time.perf_counter()
    made = make(state)
    made.qsnn_recipe = {**made.qsnn_recipe, "configs": configs}
    qsnn.save(made, path)
    state.unlink(missing_ok=True)
    seconds[name] = time.perf_counter() - begun
    print(f"{name}: {seconds[name]:.0f} s, wrote {path}")
    return qsnn.load(path).to(device)


def train_teacher(state):
    teacher = qsnn.create_model(model, data, seed=args.seed).to(device)
    qsnn.fit(teacher, data, teacher_config, resume=state, label="teacher")
    return teacher


def train_qann(state):
    qann = qsnn.quantize(teacher, data, quantize_config)
    qsnn.fit(qann, data, qann_config, teacher=teacher, resume=state, label="QANN")
    return qann


# --- the stages -------------------------------------------------------------------------------------------------------
teacher = stage("teacher", train_teacher)
qann = stage("qann", train_qann)
snn = stage("snn", lambda state: qsnn.convert(qann, convert_config))
certificate = qsnn.certify(snn, qann, data.test, images=1_000)
print(f"certificate, deferred at T = {certificate.timesteps}, {certificate.images} images: {certificate.verdict}")
student = stage("student", lambda state: qsnn.distill(snn, [qann, teacher], data, student_config, resume=state))

# --- test, read once --------------------------------------------------------------------------------------------------
models = {"teacher": teacher, "QANN": qann, "SNN online": snn, "student": student}
results = [qsnn.benchmark(m, data.test, timesteps=4, name=name, reference=qann) for name, m in models.items()]

Console().print(table(results))
world = environment(device.type)
for result in results:
    name = f"cifar10/{model}{'-quick' if args.quick else ''}/{result.name}"
    record = qsnn.Record(
        name=name, data="cifar10", seed=args.seed, n=result.n,
        metrics={**result.metrics(), "certificate": certificate.verdict, "stage_seconds": seconds}, config=configs,
        environment=world, time=now(),
    )  # fmt: skip
    for path in filter(None, (out / "records.jsonl", args.records)):
        append(path, record)
two = results[-1].accuracy[1]
print(f"student, two binary steps, online: {two:.2f} % of {results[-1].n:,} test images")
