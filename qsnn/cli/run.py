"""run(): the whole flow, from a data set to a student of two time steps and a report of what it cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from qsnn.checkpoint import check_data, file_hash
from qsnn.cli.config import EPOCHS, LOW_BITS, RunConfig, command_of
from qsnn.cli.inputs import held_by_first, load_trained_, model_options, set_task_
from qsnn.data.events import EVENTS
from qsnn.data.images import Data, first_of
from qsnn.data.memory import within
from qsnn.data.sources import load_data
from qsnn.distillation.config import DistillConfig
from qsnn.distillation.distill import distill
from qsnn.export.deployed import Deployed, beside_teacher
from qsnn.files import as_path, target_of
from qsnn.folded.fold import fold
from qsnn.graph.recipe import recipe_of
from qsnn.graph.spell import trace
from qsnn.measure.benchmark import benchmark
from qsnn.measure.certify import certify
from qsnn.measure.result import Benchmark
from qsnn.models.create import create_fitting
from qsnn.quant.quantize import QuantizeConfig, quantize
from qsnn.report.curve import draw_curve
from qsnn.report.page import write_report
from qsnn.report.records import Record, append_once, check_records, environment, now
from qsnn.report.terminal import equal_logits, kib, shown
from qsnn.snn.config import ConvertConfig
from qsnn.snn.convert import convert
from qsnn.snn.counts import refuse_online
from qsnn.snn.network import SNN, TimeLoop
from qsnn.training.budget import Stage, epoch_seconds, read_plan, seconds_of, shared_epochs, told, write_plan
from qsnn.training.config import TrainConfig
from qsnn.training.fit import fit
from qsnn.training.processes import is_main, start, wait
from qsnn.training.stages import Stages

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What the flow measured and wrote."""

    results: tuple[Benchmark, ...]
    certificate: str
    exact: bool
    files: tuple[Path, ...]


def run(config: RunConfig, say: Say = print) -> RunResult:
    """Train a teacher, quantize, convert, certify, distill, fold and benchmark it; write everything into ``out``.

    Stages that are done are not done again, and training goes on from its last epoch, as long as the configuration is
    the same; ``fresh`` starts over.

    Args:
        config: what to run.
        say: takes one line for each stage.
    """
    frames = config.timesteps if config.data in EVENTS else None  # of a recording, one a step
    data = load_data(config.data, root=config.data_root, timesteps=frames, mean=config.mean, std=config.std)
    if config.test_images is not None:
        data = replace(data, test=first_of(data.test, config.test_images))
    network, data = _fresh(config, data)
    if not isinstance(network, TimeLoop):
        network.eval()
        refuse_online(trace(network, tuple(data.shape)), "the student of `qsnn run`")
    flow = _Flow(config, data, say)
    with held_by_first(flow.out / "run"), within(config.memory):
        result = flow.run()
        gone = [str(path) for path in result.files if not path.exists()]
        if gone:
            raise FileNotFoundError(f"{', '.join(gone)} vanished while the flow ran; start it again")
    return result


def _fresh(config: RunConfig, data: Data) -> tuple[nn.Module, Data]:
    """The float network with fresh weights, and the data as it takes it."""
    return create_fitting(config.model, data, seed=config.seed, **model_options(config.model_options))


class _Flow:
    def __init__(self, config: RunConfig, data: Data, say: Say) -> None:
        self.config, self.data, self.say, self.device = config, data, say, start(config.device)
        self.out = as_path(config.out)
        target_of(self.out / "records.jsonl", config.weights)
        check_records(self.out / "records.jsonl")
        own = config.model if ":" in config.model else None
        self.stages = Stages(
            self.out, device=self.device, fresh=config.fresh, say=say, model=own,
            check=lambda model, path: check_data(recipe_of(model), data, path),
        )  # fmt: skip
        self._configure(config.epochs or EPOCHS.get(config.data, (20, 15, 10)))

    def _configure(self, epochs: tuple[int, int, int]) -> None:
        """Set how each stage trains."""
        config = self.config
        few: dict[str, Any] = {"train_images": config.train_images, "precision": config.precision}
        if config.batch_size is not None:
            few["batch_size"] = config.batch_size
        self.teacher_config = TrainConfig(epochs=epochs[0], lr=0.1, seed=config.seed, **few)
        self.qat_config = TrainConfig(epochs=epochs[1], kd_weight=0.0, seed=config.seed, **{**LOW_BITS, **few})
        self.quantize_config = QuantizeConfig(weight_bits=config.weight_bits, levels=config.levels)
        if config.train_images is not None:
            most = min(self.quantize_config.calibration_images, config.train_images)
            self.quantize_config = replace(self.quantize_config, calibration_images=most)
        self.convert_config = ConvertConfig(timesteps=config.timesteps, firing="online", signed=config.signed)
        self.distill_config = DistillConfig(
            timesteps=config.timesteps,
            epochs=epochs[2],
            label_smoothing=config.label_smoothing,
            seed=config.seed,
            **few,
        )

    def _planned(self, budget: str) -> tuple[int, int, int]:
        """The epochs that fit into a budget, from the time of a few steps; measured once, then kept beside the files.

        The stages share the time as their usual epochs do.
        """
        plan = self.out / "plan.json"
        names = "data model weights weight_bits levels timesteps train_images batch_size".split()
        names += ["signed"] * self.config.signed + ["precision"] * (self.config.precision != "fp32")
        about = _plain({"budget": budget, **{name: getattr(self.config, name) for name in names}})
        found = read_plan(plan) if not self.config.fresh else {}
        if found.get("about") != about:
            stages = self._measured()
            epochs = shared_epochs(seconds_of(budget), stages)
            self.say(told(seconds_of(budget), stages, epochs))
            if is_main():  # whose clock decides for all
                write_plan(plan, about, epochs)
            wait()
            found = read_plan(plan)
        chosen = found["epochs"]
        return chosen.get("teacher", 0), chosen["QANN"], chosen["student"]

    def _measured(self) -> dict[str, Stage]:
        """What an epoch of each stage takes that will be trained."""
        self.say("measuring a few steps of each stage")
        task, data = self.config.task, self.data
        if self.config.train_images is not None:
            data = replace(data, train=first_of(data.train, self.config.train_images))
        teacher = _fresh(self.config, self.data)[0].to(self.device).eval()
        qann = quantize(teacher, self.data, self.quantize_config)
        snn = convert(qann, self.convert_config)
        first, second = (replace(config, epochs=1) for config in (self.teacher_config, self.qat_config))
        third = replace(self.distill_config, epochs=1)
        trains: dict[str, Callable[[Data], Any]] = {
            "teacher": lambda part: fit(copy.deepcopy(teacher), part, first, task=task),
            "QANN": lambda part: fit(copy.deepcopy(qann), part, second, teacher=teacher, task=task),
            "student": lambda part: distill(snn, qann, part, third, task=task),
        }
        usual: tuple[TrainConfig | DistillConfig, ...] = (self.teacher_config, self.qat_config, self.distill_config)
        return {
            name: Stage(seconds=epoch_seconds(train, data, batch_size=config.batch_size), share=float(config.epochs))
            for (name, train), config in zip(trains.items(), usual, strict=True)
            if name != "teacher" or self.config.weights is None
        }

    def run(self) -> RunResult:
        started = time.perf_counter()
        if self.config.budget is not None:
            self._configure(self._planned(self.config.budget))
        if self.config.signed:  # what cannot spike so is refused before the training
            fresh = _fresh(self.config, self.data)[0].to(self.device).eval()
            convert(quantize(fresh, self.data, self.quantize_config), self.convert_config)
        weights = None if self.config.weights is None else file_hash(self.config.weights)
        said: dict[str, Any] = {"key": self.config.key, "task": self.config.task}
        said["options"] = model_options(self.config.model_options) or None
        teacher = self.stages.run(
            "teacher", self._teacher, model=self.config.model, data=self.data.name, weights=weights,
            train=asdict(self.teacher_config), normalisation=[list(self.data.mean), list(self.data.std)],
            **{option: value for option, value in said.items() if value is not None},
        )  # fmt: skip
        qann = self.stages.run(
            "qann", lambda state: self._qann(teacher, state), parent=teacher,
            quantize=asdict(self.quantize_config), train=asdict(self.qat_config),
        )  # fmt: skip
        snn = cast(SNN, self.stages.run(
            "snn", lambda _: convert(qann, self.convert_config), parent=qann, convert=asdict(self.convert_config)
        ))  # fmt: skip
        deferred = convert(qann) if self.config.signed else snn  # what is taken back has no deferred form
        certificate = certify(deferred, qann, self.data.test)
        proved_on = f"deferred, T = {certificate.timesteps}, {certificate.images:,} test images"
        self.say(f"certificate: {certificate.verdict} ({proved_on})")
        student = cast(SNN, self.stages.run(
            "student", lambda state: self._student(snn, qann, state), parent=snn,
            distill=asdict(self.distill_config),
        ))  # fmt: skip
        folded = cast(SNN, self.stages.run("folded", lambda _: fold(student), parent=student))
        results = self._benchmark(teacher, qann, snn, deferred, folded)
        deployed, notes = self._export(teacher, folded)
        self.stages.seconds["all"] = time.perf_counter() - started
        files = self._write(results, certificate, deployed, notes)
        return RunResult(results, str(certificate), certificate.within_rounding, files)

    def _teacher(self, state: Path) -> nn.Module:
        teacher, _ = _fresh(self.config, self.data)
        task = set_task_(teacher, self.config.task)
        if load_trained_(teacher, self.config.weights, self.config.key):
            return teacher.eval()
        teacher.to(self.device)
        fit(teacher, self.data, self.teacher_config, resume=state, label="teacher", task=task)
        return teacher

    def _qann(self, teacher: nn.Module, state: Path) -> nn.Module:
        qann = quantize(teacher, self.data, self.quantize_config)
        fit(qann, self.data, self.qat_config, teacher=teacher, resume=state, label="QANN", task=self.config.task)
        return qann

    def _student(self, snn: nn.Module, qann: nn.Module, state: Path) -> nn.Module:
        student: nn.Module = distill(snn, qann, self.data, self.distill_config, resume=state, task=self.config.task)
        return student

    def _benchmark(
        self, teacher: nn.Module, qann: nn.Module, snn: SNN, deferred: SNN, student: SNN
    ) -> tuple[Benchmark, ...]:
        started = time.perf_counter()
        test, steps = self.data.test, self.config.max_timesteps
        if self.data.frames is not None:
            steps = min(steps, self.data.frames)
        said: dict[str, Any] = {"reference": qann, "task": self.config.task}
        results = (
            benchmark(teacher, test, name="teacher", **said),
            benchmark(qann, test, name="QANN", **said),
            benchmark(snn, test, timesteps=steps, name="SNN online", **said),
            benchmark(deferred, test, timesteps=steps, firing="deferred", name="SNN deferred", **said),
            benchmark(student, test, timesteps=steps, name="student", **said),
        )
        self.stages.seconds["benchmark"] = time.perf_counter() - started
        return results

    def _export(self, teacher: nn.Module, folded: SNN) -> tuple[list[Deployed], list[str]]:
        started = time.perf_counter()
        deployed, notes = beside_teacher(folded, teacher, self.out / "net.onnx", self.data.test)
        self.stages.seconds["export"] = time.perf_counter() - started
        for row in deployed[:1]:
            size, one = kib(row.file_bytes), shown(row.latency_ms, "deployed")
            self.say(f"{row.name}: {size} KiB, {one} ms an image, equal logits on test images: {equal_logits(row)}")
        for note in notes:
            self.say(note)
        return deployed, notes

    def _write(
        self, results: tuple[Benchmark, ...], certificate: Any, deployed: list[Deployed], notes: list[str]
    ) -> tuple[Path, ...]:
        curve, report, records = self.out / "curve.png", self.out / "report.html", self.out / "records.jsonl"
        weights = self.config.weights and self.config.weights.name  # a record holds no path of a machine
        config = _plain({
            "run": {
                **asdict(self.config), "out": self.out.name, "weights": weights, "data_root": None, "device": None,
                "memory": None, "fresh": False,
            },
            "teacher": asdict(self.teacher_config), "quantize": asdict(self.quantize_config),
            "train": asdict(self.qat_config), "distill": asdict(self.distill_config),
        })  # fmt: skip
        world = environment(self.device.type)
        metrics = [{**result.metrics(), "certificate": certificate.verdict} for result in results]
        measured: list[Benchmark | Deployed] = [*results, *deployed]
        for result, found in zip(measured, [*metrics, *(row.metrics() for row in deployed)], strict=True):
            append_once(records, Record(
                name=f"run/{result.name}", data=Path(self.data.name).name, seed=self.config.seed, n=result.n or 0,
                metrics=_plain(found),
                config=config, environment=world, time=now(),
            ))  # fmt: skip
        network = " ".join([self.config.model, *self.config.model_options])
        title = f"{network} on {Path(self.data.name).name}"
        draw_curve(results, curve, title=title)
        write_report(
            report, title=title, results=results, certificate=str(certificate), config=config, environment=world,
            command=command_of(vars(self.config)), notes=notes, stages=list(self.stages.seconds.items()),
            deployed=deployed,
        )  # fmt: skip
        names = ("teacher", "qann", "snn", "student", "folded")
        exported = [self.out / row.name for row in deployed[:1]]
        return (*(self.stages.path(name) for name in names), *exported, curve, report, records)


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, strings for paths."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
