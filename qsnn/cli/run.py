"""run(): the whole flow, from a data set to a student of two time steps and a report of what it cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from qsnn.checkpoint import check_data, file_hash
from qsnn.cli.inputs import held_by_first, load_trained_, model_options, set_task_
from qsnn.data.events import EVENTS
from qsnn.data.images import Data, first_of
from qsnn.data.memory import within
from qsnn.data.sources import load_data
from qsnn.distillation.distill import DistillConfig, distill
from qsnn.export.deployed import Deployed, beside_teacher
from qsnn.files import as_path, target_of
from qsnn.folded.fold import fold
from qsnn.graph.recipe import recipe_of
from qsnn.graph.spell import trace
from qsnn.measure.benchmark import Benchmark, benchmark
from qsnn.measure.certify import certify
from qsnn.models.create import create_fitting
from qsnn.options import (
    BatchSize,
    Epochs,
    Images,
    Levels,
    Part,
    Seed,
    TaskName,
    Timesteps,
    WeightBits,
    as_bytes,
    check_options,
)
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
from qsnn.training.fit import TrainConfig, fit
from qsnn.training.processes import is_main, start, wait
from qsnn.training.stages import Stages

Say = Callable[[str], None]

# (teacher epochs, quantization-aware epochs, distillation epochs), chosen on validation accuracy and the time they take
_EPOCHS = {"digits": (20, 60, 40), "mnist": (4, 4, 3), "fashion-mnist": (14, 8, 7), "cifar10": (20, 15, 10)}

LOW_BITS: dict[str, Any] = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.0, "batch_size": 64}
"""How low-precision weights are trained; under AdamW signs flip more readily."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the whole flow trains, and where it writes."""

    data: str = "digits"
    """"digits", "mnist", "fashion-mnist", "cifar10", the event set "nmnist" or "dvsgesture", or a folder of images."""
    out: Path = Path("runs/digits")
    """Folder for checkpoints, records, figure and report."""
    model: str = "vgg-small"
    """Name of the float network, or your own as package.module:function."""
    model_options: tuple[str, ...] = ()
    """Options of the network, each as NAME=VALUE, like attention=channel."""
    weights: Path | None = None
    """Trained float weights; the teacher is then not trained."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel, of pixels on [0, 1], as the weights want it; by default the data set's own."""
    std: tuple[float, ...] | None = None
    """Each channel is divided by it; by default the data set's own."""
    weight_bits: WeightBits = 4
    """Bits of the weights."""
    levels: Levels = 2
    """Nonzero activation levels L."""
    timesteps: Timesteps = 2
    """Time steps T of the student."""
    signed: bool = False
    """Spikes of -1 take back spikes that came too early: better in few steps, where the hardware can send them."""
    max_timesteps: Timesteps = 8
    """Largest T of the benchmark."""
    label_smoothing: Part = 0.0
    """Label smoothing of the student's cross entropy."""
    task: TaskName | None = None
    """"classification", "binary", "segmentation" or "regression"; by default found from the labels and the answers."""
    key: str | None = None
    """Which weights, where the file holds several: a dictionary's key, or the front of the names."""
    train_images: Images | None = None
    """Use only the first so many training images."""
    test_images: Images | None = None
    """Certify and measure on only the first so many test images."""
    batch_size: BatchSize | None = None
    """Images a step; by default 128 for the teacher, 64 where weights have few bits."""
    epochs: tuple[Epochs, Epochs, Epochs] | None = None
    """Epochs of teacher, quantization-aware training and distillation; by default chosen for the data set."""
    precision: str = "fp32"
    """Of all training: "fp32", or "bf16", short floats, faster on processors that have them."""
    budget: str | None = None
    """Time for all training, as 90s, 110m or 2h: a few steps are measured, and epochs chosen that fit into it."""
    seed: Seed = 0
    """Of weights, order and augmentation."""
    data_root: Path | None = None
    """Folder of the data sets; default $QSNN_DATA, else a cache folder."""
    device: str | None = None
    """"cpu", "cuda" or "cuda:1"; by default a GPU where there is one."""
    memory: str | None = None
    """What the images of one batch may take, like 512M or 4G; by default 1G."""
    fresh: bool = False
    """Start over, even where a stage is done."""

    def __post_init__(self) -> None:
        """Refuse before the training what would fail after it.

        Raises:
            ValueError: which option, and what it may be.
        """
        check_options(self)
        TrainConfig(precision=self.precision)
        if self.memory is not None:
            as_bytes(self.memory)
        if self.budget is not None:
            try:
                seconds_of(self.budget)
            except ValueError as error:
                raise ValueError(f"budget: {error}") from None
            if self.epochs is not None:
                raise ValueError(f"expected epochs or budget, got both, {self.epochs} and {self.budget!r}; leave one")


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
        self._configure(config.epochs or _EPOCHS.get(config.data, (20, 15, 10)))

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


def command_of(options: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """What to type to get the same again: every option that is not the default, without the folders of this machine.

    Args:
        options: fields of a :class:`RunConfig`, also as a record holds them; one that is missing has its default.
        without: fields that are left out.
    """
    words = ["qsnn run"]
    for option in fields(RunConfig):
        value = options.get(option.name, option.default)
        value = tuple(value) if isinstance(value, list) else value  # as JSON has it
        left_out = option.name in ("data_root", "device", "memory", "fresh", *without)
        if left_out or (value == option.default and option.name != "data"):
            continue
        if isinstance(value, Path):
            value = value.name
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        words.append(f"--{option.name.replace('_', '-')}{'' if value is True else f' {value}'}")
    return " ".join(words)


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, strings for paths."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
