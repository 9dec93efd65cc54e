#!/usr/bin/env python3
"""CIFAR-10 from top to bottom: a float teacher, a W4/L2 QANN, a student of two binary steps, a table, records.

    python scripts/reproduce_cifar10.py                  # ResNet-18, for one GPU
    python scripts/reproduce_cifar10.py --model resnet20 --weights resnet20-12fca82f.th --budget 110m   # one CPU core
    python scripts/reproduce_cifar10.py --quick          # a small net on a fixed subset, for a CPU

Images, augmentation and batches live on the device; layers compute in bfloat16 on a GPU, channels-last. Every stage
writes its file and goes on where it was stopped. The student and the QANN that is trained on for as many epochs both
start from the same QANN. Published for comparison, binary spikes, T = 2: ResNet-18 94.75 %; the 0.27 M ResNet-20
82.25 % (SlipReLU), whose QANN of 2 bit has 90.96 % (APoT).
"""

import argparse
import copy
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

import qsnn
from qsnn.checkpoint import file_hash, load_weights
from qsnn.export.deployed import beside_teacher
from qsnn.report.records import append, environment, now
from qsnn.report.terminal import equal_logits, table
from qsnn.training.budget import Stage, epoch_seconds, read_plan, seconds_of, shared_epochs, told, write_plan
from qsnn.training.processes import start
from qsnn.training.stages import Stages

STRANGERS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What public ResNet-20 weights were trained with: ImageNet's numbers."""
MODELS = ("resnet18", "resnet20", "vgg16", "study", "qkformer", "convnext")

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", choices=MODELS, default="resnet18")
parser.add_argument("--weights", type=Path, default=None, help="trained float weights; the teacher is then not trained")
parser.add_argument("--weight-bits", type=int, default=4)
parser.add_argument("--quick", action="store_true", help="study net, the first 5,000 images, 4 epochs a stage")
parser.add_argument("--epochs", type=int, nargs=3, default=(40, 30, 30), metavar=("TEACHER", "QANN", "STUDENT"))
parser.add_argument("--budget", default=None, help="90s, 110m, 2h: epochs are chosen so that the training fits")
parser.add_argument("--batch-size", type=int, default=None, help="default 64, on a GPU 512; twice of a teacher")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default=None)
parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=None, help="of QANN, student")
parser.add_argument("--surrogate", choices=("rate", "box"), default="box", help="what the student's gradient is of")
parser.add_argument("--signed", action="store_true", help="spikes of -1 take back spikes that came too early")
parser.add_argument("--only", choices=("student", "qann-on"), default=None, help="train one of the last two, then stop")
parser.add_argument("--out", type=Path, default=None)
parser.add_argument("--records", type=Path, default=None, help="append the records here too")
args = parser.parse_args()

device = start(args.device)
model, epochs, images = (args.model, args.epochs, None) if not args.quick else ("study", (4, 4, 4), 5_000)
size = (f"-w{args.weight_bits}" if args.weight_bits != 4 else "") + ("-signed" if args.signed else "")
out = args.out or Path("runs") / f"cifar10-{model}{size}{'-quick' if args.quick else ''}-{args.seed}"
out.mkdir(parents=True, exist_ok=True)

# --- data, on the device ----------------------------------------------------------------------------------------------
data = qsnn.load_data("cifar10", **(STRANGERS if args.weights else {}))
data = replace(data, train=data.train.to(device), val=data.val.to(device), test=data.test.to(device))

# --- how each stage trains --------------------------------------------------------------------------------------------
precision = "bf16" if device.type == "cuda" else "fp32"
batch = args.batch_size or (512 if device.type == "cuda" else 64)
grown = (batch / 64) ** 0.5  # of the learning rates; for Adam Malladi et al., NeurIPS 2022
common = {"train_images": images, "precision": precision, "seed": args.seed}
given = args.precision or [precision]
# another order than in the stages before; what is trained on loses less of what it has at a third of the rate
last_two = {"seed": args.seed + 1, "precision": given[-1], "lr": 0.001 * grown}
low_bits = {
    "optimizer": "adamw", "lr": 0.003 * grown, "weight_decay": 0.0, "batch_size": batch, **common,
    "precision": given[0],
}  # fmt: skip
teacher_config = qsnn.TrainConfig(epochs=epochs[0], lr=0.1 * grown, label_smoothing=0.1, batch_size=2 * batch, **common)
quantize_config = qsnn.QuantizeConfig(weight_bits=args.weight_bits, levels=2)
qann_config = qsnn.TrainConfig(epochs=epochs[1], kd_weight=0.0, **low_bits)
on_config = replace(qann_config, epochs=epochs[2], **last_two)
convert_config = qsnn.ConvertConfig(timesteps=2, firing="online", signed=args.signed)
steps = 0.0 if args.signed else 0.5  # a first step that may be taken back need not answer by itself
student_config = qsnn.DistillConfig(
    timesteps=2, epochs=epochs[2], label_smoothing=0.0, ce_weight=1 - steps, step_ce_weight=steps, kd_weight=0.0,
    surrogate=args.surrogate, **{**low_bits, **last_two},
)  # fmt: skip


def make_teacher():
    """The float network, with fresh weights or a stranger's."""
    network = qsnn.create_model(model, data, seed=args.seed)
    if args.weights:
        load_weights(network, args.weights)
    return network.eval().to(device)


def distilled(network, part, config, **options):
    """A student; with both networks as teachers where the config asks for one."""
    return qsnn.distill(network, [qann, teacher], part, config, **options)


# --- a budget becomes epochs, once: a run that goes on keeps its plan -------------------------------------------------
if args.budget:
    plan = out / f"plan-{args.budget}.json"
    chosen = read_plan(plan).get("epochs")
    if chosen is None:
        budget, one = seconds_of(args.budget), {"epochs": 1, "train_images": None}
        float_net = make_teacher()
        low = qsnn.quantize(float_net, data, quantize_config)
        qann, teacher = low, float_net
        trains = {
            "qann": lambda part: qsnn.fit(copy.deepcopy(low), part, replace(qann_config, **one)),
            "student": lambda part: distilled(qsnn.convert(low), part, replace(student_config, **one)),
        }
        if not args.weights:
            trains["teacher"] = lambda part: qsnn.fit(copy.deepcopy(float_net), part, replace(teacher_config, **one))
        print("measuring", flush=True)
        took = {name: epoch_seconds(train, data, batch_size=batch, images=images) for name, train in trains.items()}
        # the QANN is trained on for as many epochs as the student: together they are one stage of the plan
        stages = {"qann": Stage(seconds=took["qann"], share=2.4)}
        stages["student + qann-on"] = Stage(seconds=took["student"] + took["qann"], share=1.0)
        if not args.weights:
            stages["teacher"] = Stage(seconds=took["teacher"], share=2.0)
        chosen = shared_epochs(budget, stages)
        print(told(budget, stages, chosen), flush=True)
        write_plan(plan, {"seconds": took}, chosen)
    teacher_config = replace(teacher_config, epochs=chosen.get("teacher", 0))
    qann_config = replace(qann_config, epochs=chosen["qann"])
    on_config = replace(on_config, epochs=chosen["student + qann-on"])
    student_config = replace(student_config, epochs=chosen["student + qann-on"])

weights = {"sha256": file_hash(args.weights)} if args.weights else {"train": asdict(teacher_config)}
configs = {
    "model": model, "data": {"mean": list(data.mean), "std": list(data.std)}, "teacher": weights,
    "quantize": asdict(quantize_config), "train": asdict(qann_config), "on": asdict(on_config),
    "convert": asdict(convert_config), "distill": asdict(student_config),
}  # fmt: skip
stages_of_run = Stages(out, device=device, say=lambda line: print(line, flush=True))


def stage(name, needs, make, parent=None):
    """Load the file of a stage that is done with these configs, or make it, going on from its last state."""
    return stages_of_run.run(name, make, parent=parent, **{part: configs[part] for part in ("model", "data", *needs)})


def train_teacher(state):
    network = make_teacher()
    if not args.weights:
        qsnn.fit(network, data, teacher_config, resume=state, label="teacher")
    return network


def train_qann(state):
    network = qsnn.quantize(teacher, data, quantize_config)
    qsnn.fit(network, data, qann_config, resume=state, label="QANN")
    return network


def train_on(state):
    network = copy.deepcopy(qann)
    qsnn.fit(network, data, on_config, resume=state, label="QANN on")
    return network


def train_student(state):
    return distilled(snn, data, student_config, resume=state, label="student")


# --- the stages -------------------------------------------------------------------------------------------------------
teacher = stage("teacher", ("teacher",), train_teacher)
qann = stage("qann", ("quantize", "train"), train_qann, teacher)
snn = stage("snn", ("convert",), lambda state: qsnn.convert(qann, convert_config), qann)
last = {
    "student": lambda: stage("student", ("distill",), train_student, snn),
    "qann-on": lambda: stage("qann-on", ("on",), train_on, qann),
}
if args.only:  # two processes share a machine of two cores; a third start tests what both have made
    last[args.only]()
    raise SystemExit(0)
student, on = last["student"](), last["qann-on"]()

# --- test, read once --------------------------------------------------------------------------------------------------
deferred = qsnn.convert(qann) if args.signed else snn  # spikes that take others back have no deferred form
certificate = qsnn.certify(deferred, qann, data.test)
said = f"deferred at T = {certificate.timesteps}, {certificate.images} images: {certificate.verdict}"
print("certificate,", said, flush=True)
folded = qsnn.fold(student)
models = {"teacher": teacher, "QANN": qann, "QANN on": on, "SNN online": snn, "student": folded}
results = [qsnn.benchmark(m, data.test, timesteps=4, name=name, reference=qann) for name, m in models.items()]

deployed, notes = beside_teacher(folded.cpu(), teacher.cpu(), out / "net.onnx", data.test.to("cpu"))
Console().print(table(results))
for row in deployed[:1]:
    print(f"{row.name}: {row.file_bytes / 1024:.1f} KiB, equal logits on test images: {equal_logits(row)}")
print("".join(f"{note}\n" for note in notes), end="")
world = environment(device.type)
proved = {"certificate": certificate.verdict, "stage_seconds": stages_of_run.seconds}
for result in (*results, *deployed):
    name = f"cifar10/{model}{size}{'-quick' if args.quick else ''}/{result.name}"
    record = qsnn.Record(
        name=name, data="cifar10", seed=args.seed, n=result.n, metrics={**result.metrics(), **proved},
        config=configs, environment=world, time=now(),
    )  # fmt: skip
    for path in filter(None, (out / "records.jsonl", args.records)):
        append(path, record)
two = results[-1].accuracy[1]
print(f"student, two binary steps, online: {two:.2f} % of {results[-1].n:,} test images")
