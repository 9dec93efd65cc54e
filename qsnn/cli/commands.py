"""The subcommands of the command line: each is a thin call of one public function."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import tyro
from rich.console import Console
from torch import nn

from qsnn.checkpoint import check_data, file_hash, load, read_recipe, resume_file, save
from qsnn.cli.config import LOW_BITS, RunConfig
from qsnn.cli.inputs import (
    data_of,
    finish,
    held_by_first,
    load_trained_,
    loaded,
    refuse_idle,
    set_task_,
    show_ranges,
    write_model,
)
from qsnn.cli.inputs import model_options as options_of
from qsnn.cli.run import run as run_flow
from qsnn.data.fitting import describe
from qsnn.data.images import Data
from qsnn.data.memory import limit_memory
from qsnn.data.sources import NAMES, load_data
from qsnn.distillation.config import DistillConfig
from qsnn.distillation.distill import distill_together
from qsnn.distillation.prune import zero_weights
from qsnn.export.nir_student import told_semantics
from qsnn.files import output, shown
from qsnn.folded.fold import fold as to_integers
from qsnn.graph.recipe import recipe_of, set_recipe
from qsnn.measure.certify import certify
from qsnn.measure.summary import summary
from qsnn.models.create import create_fitting
from qsnn.options import TaskName
from qsnn.quant.quantize import QuantizeConfig
from qsnn.quant.quantize import quantize as to_qann
from qsnn.report.terminal import table
from qsnn.snn.config import ConvertConfig
from qsnn.snn.convert import convert as to_snn
from qsnn.snn.network import SNN
from qsnn.training.config import TrainConfig
from qsnn.training.fit import fit
from qsnn.training.processes import start

_FILE = tyro.conf.Positional[Path]
_MODELS = tuple[str, ...]
show_ranges(RunConfig, TrainConfig, QuantizeConfig, ConvertConfig, DistillConfig)
_QAT = TrainConfig(epochs=8, kd_weight=0.0, **LOW_BITS)


def run(config: tyro.conf.OmitArgPrefixes[RunConfig]) -> None:
    """Do the whole flow: teacher, QANN, SNN, certificate, student, fold, benchmark, report."""
    console = Console()
    if config.out == RunConfig().out and config.data != RunConfig().data:
        config = replace(config, out=Path("runs") / Path(config.data).name)
    result = run_flow(config, say=lambda line: console.print(line, highlight=False, soft_wrap=True))
    console.print(table(result.results))
    console.print("wrote:", *(str(path) for path in result.files), sep="\n  ", highlight=False, soft_wrap=True)
    if not result.exact:
        raise ValueError("the certificate does not say EXACT; see the report")


def train(
    data: str,
    out: Path,
    model: str = "vgg-small",
    model_options: tuple[str, ...] = (),
    weights: Path | None = None,
    key: str | None = None,
    task: TaskName | None = None,
    frames: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    data_root: Path | None = None,
    device: str | None = None,
    memory: str | None = None,
    tensorboard: Path | None = None,
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008
) -> None:
    """Train a float network, the teacher.

    Args:
        data: Data set: digits, mnist, fashion-mnist, cifar10, nmnist, dvsgesture, or a folder of images.
        out: File to write.
        model: Name of the network, or your own as package.module:function.
        model_options: Options of the network, each as NAME=VALUE, like attention=channel.
        frames: Frames of a recording of an event set, one for each time step; default 2.
        mean: Subtracted from each channel, of pixels on [0, 1]; default the data set's own.
        std: Each channel is divided by it; default the data set's own.
        weights: Trained float weights to start from; with --epochs 0 they are only wrapped into a checkpoint.
        key: Which weights, where the file holds several: a dictionary's key ("ema"), or the front of the names.
        task: What the network is asked; default found from the labels and the answers.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        memory: What the images of one batch may take, like 512M or 4G; default 1G.
        tensorboard: Folder for TensorBoard.
        config: Training options.
    """
    limit_memory(memory)
    place, out = start(device), output(out, weights)
    found = load_data(data, root=data_root, timesteps=frames, mean=mean, std=std)
    teacher, found = create_fitting(model, found, seed=config.seed, **options_of(model_options))
    load_trained_(teacher, weights, key)
    set_task_(teacher, task)
    begun = None if weights is None else (file_hash(weights), key)
    _fit(teacher.to(place), found, config, out, begun, label="teacher", tensorboard=tensorboard)


def quantize(
    file: _FILE,
    out: Path,
    model: _MODELS = (),
    data: str | None = None,
    task: TaskName | None = None,
    data_root: Path | None = None,
    device: str | None = None,
    memory: str | None = None,
    tensorboard: Path | None = None,
    config: tyro.conf.OmitArgPrefixes[QuantizeConfig] = QuantizeConfig(),  # noqa: B008
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = _QAT,
) -> None:
    """Make a low-precision network of a float one: calibration, then quantization-aware training.

    Args:
        file: Checkpoint of the teacher.
        out: File to write.
        model: Function that builds a network of your own, package.module:function, where the file names it.
        data: Folder of images, where the file names one.
        task: What the network is asked; default as its file says, or found from the labels and the answers.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        memory: What the images of one batch may take, like 512M or 4G; default 1G.
        tensorboard: Folder for TensorBoard.
        config: Precision.
        training: Quantization-aware training; --epochs 0 only calibrates, --kd-weight 0.5 adds the teacher.
    """
    limit_memory(memory)
    place, out = start(device), output(out, file)
    refuse_idle(model, [file])
    teacher = loaded(file, model, ("teacher",))
    set_task_(teacher, task)
    images = data_of(teacher, file, data_root, data)
    qann = to_qann(teacher.to(place), images, config)
    _fit(qann, images, training, out, label="QANN", teacher=teacher, tensorboard=tensorboard)


def convert(
    file: _FILE,
    out: Path,
    certify: bool = False,
    calibrate: bool = False,
    model: _MODELS = (),
    data: str | None = None,
    data_root: Path | None = None,
    memory: str | None = None,
    config: tyro.conf.OmitArgPrefixes[ConvertConfig] = ConvertConfig(),  # noqa: B008
) -> None:
    """Turn a quantized network, or a calibrated float one, into a spiking one.

    Args:
        file: Checkpoint of the QANN, or of a float network with ReLUs.
        out: File to write.
        calibrate: Correct the layers of a QANN on the spikes that arrive; a float network always is.
        certify: Prove on the test images that deferred firing at T = L equals the QANN in every layer.
        model: Function that builds a network of your own, package.module:function, where the file names it.
        data: Folder of images, where the file names one.
        data_root: Folder of the data sets; default $QSNN_DATA.
        memory: What the images of one batch may take, like 512M or 4G; default 1G.
        config: Time steps and firing.
    """
    limit_memory(memory)
    out = output(out, file)
    refuse_idle(model, [file])
    qann = loaded(file, model, ("qann", "teacher"))
    plain = qann.qsnn_recipe["kind"] == "teacher"  # type: ignore[index]
    if certify and (plain or calibrate):
        raise ValueError(
            "--certify compares with a quantized network as it is; leave --calibrate away, or quantize first"
        )
    images = data_of(qann, file, data_root, data) if plain or calibrate or certify else None
    snn = to_snn(qann, images if plain or calibrate else None, config)
    save(snn, out)
    print(f"wrote {out}")
    if certify:
        _certify(snn, qann, cast(Data, images))


def distill(
    file: _FILE,
    teacher: tuple[Path, ...],
    out: Path,
    model: _MODELS = (),
    data: str | None = None,
    task: TaskName | None = None,
    data_root: Path | None = None,
    device: str | None = None,
    memory: str | None = None,
    tensorboard: Path | None = None,
    config: tyro.conf.OmitArgPrefixes[DistillConfig] = DistillConfig(),  # noqa: B008
) -> None:
    """Train a spiking student of few time steps against a teacher.

    Args:
        file: Checkpoint of the spiking network.
        teacher: Checkpoint of the quantized or float network it learns from; or of several.
        out: File to write; with --mutual the teacher goes beside it, as NAME-teacher.
        model: Functions that build networks of your own, package.module:function, where the files name them.
        data: Folder of images, where the files name one.
        task: What the networks are asked; default as the file says, or found from the labels and the answers.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        memory: What the images of one batch may take, like 512M or 4G; default 1G.
        tensorboard: Folder for TensorBoard.
        config: Loss terms and training options.
    """
    limit_memory(memory)
    place, out = start(device), output(out, file, *teacher)
    refuse_idle(model, [file, *teacher])
    snn = loaded(file, model, ("snn", "student"))
    asked = set_task_(snn, task)
    images = data_of(snn, file, data_root, data)
    experts = [loaded(path, model, ("teacher", "qann")).to(place) for path in teacher]
    for expert, path in zip(experts, teacher, strict=True):
        check_data(recipe_of(expert), images, path)
    recipes = [expert.qsnn_recipe for expert in experts]
    state = resume_file(out, snn.qsnn_recipe, recipes, asdict(config))
    with held_by_first(out):
        student, taught = distill_together(
            snn.to(place), experts, images, config, resume=state, tensorboard=tensorboard, task=asked
        )  # fmt: skip
        write_model(student, out, images)
        if config.mutual:
            write_model(taught, out.with_name(f"{out.stem}-teacher{out.suffix}"), images)
        if config.sparsity:
            print(f"weights that are zero: {100 * zero_weights(student):.1f} %")
        finish(state)


def fold(file: _FILE, out: Path, model: _MODELS = ()) -> None:
    """Turn a spiking network into its integer form.

    Args:
        file: Checkpoint of the SNN or student.
        out: File to write.
        model: Function that builds a network of your own, package.module:function, where the file names it.
    """
    out = output(out, file)
    refuse_idle(model, [file])
    snn = loaded(file, model, ("snn", "student"))
    if not isinstance(snn, SNN):
        raise ValueError(f"{file} holds a spiking network from scratch, which has no integer form; benchmark it as is")
    save(to_integers(cast(SNN, snn)), out)
    print(f"wrote {out}")


def info(file: _FILE, model: _MODELS = (), parent: Path | None = None) -> None:
    """Print what a checkpoint holds, how it was made and what it weighs; or what a folder of images holds.

    Args:
        file: A checkpoint of qsnn, a folder of images, or the name of a data set.
        model: Function that builds a network of your own, package.module:function, where the file names it.
        parent: The file that this one was made from; another one is refused.
    """
    if file.is_dir() or str(file) in NAMES or file.suffix == ".npz":
        print(describe(load_data(file if file.is_dir() or file.suffix == ".npz" else str(file))))
        return
    recipe = read_recipe(file)
    for key, value in recipe.items():
        print(shown(f"{key}: {value}"))
    semantics = told_semantics(recipe)
    if semantics is not None:
        print(shown(semantics))
    print(summary(load(file, model=model or None, parent=parent)))


def _fit(model: nn.Module, data: Data, config: TrainConfig, out: Path, begun: Any = None, **options: Any) -> None:
    state = resume_file(out, model.qsnn_recipe, asdict(config), begun)
    with held_by_first(out):
        fit(model, data, config, resume=state, task=recipe_of(model).get("task"), **options)
        recipe = {**model.qsnn_recipe, "train": asdict(config)}  # type: ignore[dict-item]
        set_recipe(model, recipe)
        write_model(model, out, data)
        finish(state)


def _certify(snn: SNN, qann: nn.Module, data: Data) -> None:
    certificate = certify(snn, qann, data.test)
    print(certificate)
    if not certificate.within_rounding:
        raise ValueError("the spiking network is not equal to the quantized one")
