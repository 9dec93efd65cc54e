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
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import qsnn
from qsnn.checkpoint import file_hash, load_weights
from qsnn.cli.one_line import one_line
from qsnn.export.deployed import beside_teacher
from qsnn.options import BatchSize, check_option
from qsnn.report.records import append, environment, now
from qsnn.report.terminal import equal_logits, table
from qsnn.training.budget import Stage, epoch_seconds, read_plan, seconds_of, shared_epochs, told, write_plan
from qsnn.training.processes import start
from qsnn.training.stages import Stages

STRANGERS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What public ResNet-20 weights were trained with: ImageNet's numbers."""
MODELS = ("resnet18", "resnet20", "vgg16", "study", "qkformer", "convnext")


def arguments() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--weights", type=Path, default=None, help="trained float weights; no teacher is trained then")
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
    parser.add_argument("--only", choices=("student", "qann-on"), default=None, help="train one of the last two, stop")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--records", type=Path, default=None, help="append the records here too")
    return parser.parse_args()


class Flow:
    """The stages of one run, each with its configuration."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, start(args.device)
        self.model, epochs, images = (args.model, args.epochs, None) if not args.quick else ("study", (4, 4, 4), 5_000)
        size = (f"-w{args.weight_bits}" if args.weight_bits != 4 else "") + ("-signed" if args.signed else "")
        self.name = f"{self.model}{size}{'-quick' if args.quick else ''}"
        self.out = args.out or Path("runs") / f"cifar10-{self.name}-{args.seed}"
        if args.budget:
            seconds_of(args.budget)
        self._configure(epochs, images)
        self.weights = {"sha256": file_hash(args.weights)} if args.weights else None
        data = qsnn.load_data("cifar10", **(STRANGERS if args.weights else {}))
        parts = {part: getattr(data, part).to(self.device) for part in ("train", "val", "test")}
        self.data = replace(data, **parts)
        self.out.mkdir(parents=True, exist_ok=True)
        self.stages = Stages(self.out, device=self.device, say=lambda line: print(line, flush=True))

    def _configure(self, epochs: tuple[int, int, int], images: int | None) -> None:
        """Set how each stage trains."""
        args = self.args
        usual = "bf16" if self.device.type == "cuda" else "fp32"
        self.batch = (512 if self.device.type == "cuda" else 64) if args.batch_size is None else args.batch_size
        check_option("batch_size", self.batch, BatchSize)
        grown = (self.batch / 64) ** 0.5  # of the learning rates; for Adam Malladi et al., NeurIPS 2022
        given = args.precision or [usual]
        common = {"train_images": images, "precision": usual, "seed": args.seed}
        low_bits: dict[str, Any] = {
            "optimizer": "adamw", "lr": 0.003 * grown, "weight_decay": 0.0, "batch_size": self.batch, **common,
            "precision": given[0],
        }  # fmt: skip
        # another order than in the stages before; what is trained on loses less of what it has at a third of the rate
        last_two = {"seed": args.seed + 1, "precision": given[-1], "lr": 0.001 * grown}
        self.teacher_config = qsnn.TrainConfig(
            epochs=epochs[0], lr=0.1 * grown, label_smoothing=0.1, batch_size=2 * self.batch, **common
        )
        self.quantize_config = qsnn.QuantizeConfig(weight_bits=args.weight_bits, levels=2)
        self.qann_config = qsnn.TrainConfig(epochs=epochs[1], kd_weight=0.0, **low_bits)
        self.on_config = replace(self.qann_config, epochs=epochs[2], **last_two)
        self.convert_config = qsnn.ConvertConfig(timesteps=2, firing="online", signed=args.signed)
        steps = 0.0 if args.signed else 0.5  # a first step that may be taken back need not answer by itself
        self.student_config = qsnn.DistillConfig(
            timesteps=2, epochs=epochs[2], label_smoothing=0.0, ce_weight=1 - steps, step_ce_weight=steps,
            kd_weight=0.0, surrogate=args.surrogate, **{**low_bits, **last_two},
        )  # fmt: skip

    # --- a budget becomes epochs, once: a run that goes on keeps its plan ---------------------------------------------

    def planned(self, budget: str) -> None:
        """Choose the epochs that fit into a budget."""
        plan = self.out / f"plan-{budget}.json"
        chosen = read_plan(plan).get("epochs")
        if chosen is None:
            seconds = seconds_of(budget)
            took = self._measured()
            # the QANN is trained on for as many epochs as the student: together they are one stage of the plan
            stages = {"qann": Stage(seconds=took["qann"], share=2.4)}
            stages["student + qann-on"] = Stage(seconds=took["student"] + took["qann"], share=1.0)
            if "teacher" in took:
                stages["teacher"] = Stage(seconds=took["teacher"], share=2.0)
            chosen = shared_epochs(seconds, stages)
            print(told(seconds, stages, chosen), flush=True)
            write_plan(plan, {"seconds": took}, chosen)
        self.teacher_config = replace(self.teacher_config, epochs=chosen.get("teacher", 0))
        self.qann_config = replace(self.qann_config, epochs=chosen["qann"])
        self.on_config = replace(self.on_config, epochs=chosen["student + qann-on"])
        self.student_config = replace(self.student_config, epochs=chosen["student + qann-on"])

    def _measured(self) -> dict[str, float]:
        """What an epoch of each stage takes that will be trained [s]."""
        print("measuring", flush=True)
        one: dict[str, Any] = {"epochs": 1, "train_images": None}
        float_net = self.float_network()
        low = qsnn.quantize(float_net, self.data, self.quantize_config)
        teacher, qann = replace(self.teacher_config, **one), replace(self.qann_config, **one)
        student = replace(self.student_config, **one)
        trains: dict[str, Callable[[qsnn.Data], Any]] = {
            "qann": lambda part: qsnn.fit(copy.deepcopy(low), part, qann),
            "student": lambda part: qsnn.distill(qsnn.convert(low), [low, float_net], part, student),
        }
        if self.weights is None:
            trains["teacher"] = lambda part: qsnn.fit(copy.deepcopy(float_net), part, teacher)
        images = self.qann_config.train_images
        return {
            name: epoch_seconds(train, self.data, batch_size=self.batch, images=images)
            for name, train in trains.items()
        }

    # --- the stages ---------------------------------------------------------------------------------------------------

    def float_network(self) -> nn.Module:
        """The float network, with fresh weights or a stranger's."""
        network: nn.Module = qsnn.create_model(self.model, self.data, seed=self.args.seed)
        if self.args.weights:
            load_weights(network, self.args.weights)
        return network.eval().to(self.device)

    def run(self) -> None:
        """Train what is not trained yet, test it once, print a table and append the records."""
        if self.args.budget:
            self.planned(self.args.budget)
        configs = {
            "model": self.model, "data": {"mean": list(self.data.mean), "std": list(self.data.std)},
            "teacher": self.weights or {"train": asdict(self.teacher_config)},
            "quantize": asdict(self.quantize_config), "train": asdict(self.qann_config), "on": asdict(self.on_config),
            "convert": asdict(self.convert_config), "distill": asdict(self.student_config),
        }  # fmt: skip

        def stage(name: str, needs: str, make: Callable[[Path], nn.Module], parent: nn.Module | None = None) -> Any:
            """Load the file of a stage that is done with these configs, or make it, going on from its last state."""
            known = {part: configs[part] for part in ("model", "data", *needs.split())}
            return self.stages.run(name, make, parent=parent, **known)

        teacher = stage("teacher", "teacher", self._teacher)
        qann = stage("qann", "quantize train", lambda state: self._qann(teacher, state), teacher)
        snn = stage("snn", "convert", lambda _: qsnn.convert(qann, self.convert_config), qann)
        last = {
            "student": lambda: stage("student", "distill", lambda state: self._student(snn, qann, teacher, state), snn),
            "qann-on": lambda: stage("qann-on", "on", lambda state: self._on(qann, state), qann),
        }
        if self.args.only:  # two processes share a machine of two cores; a third start tests what both have made
            last[self.args.only]()
            return
        student, on = last["student"](), last["qann-on"]()
        self._test({"teacher": teacher, "QANN": qann, "QANN on": on, "SNN online": snn}, student, configs)

    def _teacher(self, state: Path) -> nn.Module:
        network = self.float_network()
        if not self.args.weights:
            qsnn.fit(network, self.data, self.teacher_config, resume=state, label="teacher")
        return network

    def _qann(self, teacher: nn.Module, state: Path) -> nn.Module:
        network: nn.Module = qsnn.quantize(teacher, self.data, self.quantize_config)
        qsnn.fit(network, self.data, self.qann_config, resume=state, label="QANN")
        return network

    def _on(self, qann: nn.Module, state: Path) -> nn.Module:
        network = copy.deepcopy(qann)
        qsnn.fit(network, self.data, self.on_config, resume=state, label="QANN on")
        return network

    def _student(self, snn: nn.Module, qann: nn.Module, teacher: nn.Module, state: Path) -> Any:
        return qsnn.distill(snn, [qann, teacher], self.data, self.student_config, resume=state, label="student")

    # --- test, read once ----------------------------------------------------------------------------------------------

    def _test(self, models: dict[str, Any], student: Any, configs: dict[str, Any]) -> None:
        """Prove, benchmark, export; print a table and append the records."""
        qann, test = models["QANN"], self.data.test
        # spikes that take others back have no deferred form
        deferred = qsnn.convert(qann) if self.args.signed else models["SNN online"]
        certificate = qsnn.certify(deferred, qann, test)
        said = f"deferred at T = {certificate.timesteps}, {certificate.images} images: {certificate.verdict}"
        print("certificate,", said, flush=True)
        folded = qsnn.fold(student)
        models = {**models, "student": folded}
        results = [qsnn.benchmark(m, test, timesteps=4, name=name, reference=qann) for name, m in models.items()]
        teacher = models["teacher"].cpu()
        deployed, notes = beside_teacher(folded.cpu(), teacher, self.out / "net.onnx", test.to("cpu"))
        Console().print(table(results))
        for row in deployed[:1]:
            print(f"{row.name}: {row.file_bytes / 1024:.1f} KiB, equal logits on test images: {equal_logits(row)}")
        print("".join(f"{note}\n" for note in notes), end="")
        proved = {"certificate": certificate.verdict, "stage_seconds": self.stages.seconds}
        for result in (*results, *deployed):
            record = qsnn.Record(
                name=f"cifar10/{self.name}/{result.name}", data="cifar10", seed=self.args.seed, n=result.n,
                metrics={**result.metrics(), **proved}, config=configs, environment=environment(self.device.type),
                time=now(),
            )  # fmt: skip
            for path in filter(None, (self.out / "records.jsonl", self.args.records)):
                append(path, record)
        two = results[-1].accuracy[1]
        print(f"student, two binary steps, online: {two:.2f} % of {results[-1].n:,} test images")


if __name__ == "__main__":
    typed = arguments()
    with one_line("reproduce_cifar10.py"):
        Flow(typed).run()
