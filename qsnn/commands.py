"""The subcommands of the command line: each is a thin call of one public function."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from rich.console import Console
from torch import nn

from qsnn.benchmark import benchmark as run_benchmark
from qsnn.certify import certify
from qsnn.checkpoint import file_hash, load, load_weights, read_recipe, resume_file, save
from qsnn.convert import ConvertConfig
from qsnn.convert import convert as to_snn
from qsnn.data import Data
from qsnn.datasets import TORCHVISION, load_data
from qsnn.distill import DistillConfig, distill_together
from qsnn.fold import fold as to_integers
from qsnn.graph import recipe_of
from qsnn.models import create_model
from qsnn.neurons import SNN
from qsnn.parallel import is_main, start, wait
from qsnn.prune import zero_weights
from qsnn.quantize import QuantizeConfig
from qsnn.quantize import quantize as to_qann
from qsnn.records import Record, append, environment, now, write_atomic
from qsnn.report import draw_curve, write_report
from qsnn.run import RunConfig
from qsnn.run import run as run_flow
from qsnn.summary import summary
from qsnn.tables import energy_table, table
from qsnn.train import TrainConfig, accuracy, fit

_FILE = tyro.conf.Positional[Path]
_QAT = TrainConfig(epochs=8, lr=0.04, kd_weight=0.0)


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
    weights: Path | None = None,
    frames: int | None = None,
    data_root: Path | None = None,
    device: str | None = None,
    tensorboard: Path | None = None,
    config: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig(),  # noqa: B008
) -> None:
    """Train a float network, the teacher.

    Args:
        data: Data set: digits, mnist, fashion-mnist, cifar10, nmnist, dvsgesture, or a folder of images.
        out: File to write.
        model: Name of the network, or your own as package.module:function.
        frames: Frames of a recording of an event set, one for each time step; default 2.
        weights: Trained float weights to start from; with --epochs 0 they are only wrapped into a checkpoint.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        tensorboard: Folder for TensorBoard.
        config: Training options.
    """
    place, found = start(device), load_data(data, root=data_root, timesteps=frames)
    teacher = create_model(model, found, seed=config.seed)
    if weights is not None:
        load_weights(teacher, weights)
    begun = None if weights is None else file_hash(weights)
    _fit(teacher.to(place), found, config, out, begun, label="teacher", tensorboard=tensorboard)


def quantize(
    file: _FILE,
    out: Path,
    data_root: Path | None = None,
    device: str | None = None,
    tensorboard: Path | None = None,
    config: tyro.conf.OmitArgPrefixes[QuantizeConfig] = QuantizeConfig(),  # noqa: B008
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = _QAT,
) -> None:
    """Make a low-precision network of a float one: calibration, then quantization-aware training.

    Args:
        file: Checkpoint of the teacher.
        out: File to write.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        tensorboard: Folder for TensorBoard.
        config: Precision.
        training: Quantization-aware training; --epochs 0 only calibrates, --kd-weight 0.5 adds the teacher.
    """
    place, (teacher, data) = start(device), _loaded(file, data_root, ("teacher",))
    qann = to_qann(teacher.to(place), data, config)
    _fit(qann, data, training, out, label="QANN", teacher=teacher, tensorboard=tensorboard)


def convert(
    file: _FILE,
    out: Path,
    certify: bool = False,
    calibrate: bool = False,
    data_root: Path | None = None,
    config: tyro.conf.OmitArgPrefixes[ConvertConfig] = ConvertConfig(),  # noqa: B008
) -> None:
    """Turn a quantized network, or a calibrated float one, into a spiking one.

    Args:
        file: Checkpoint of the QANN, or of a float network with ReLUs.
        out: File to write.
        calibrate: Correct the layers of a QANN on the spikes that arrive; a float network always is.
        certify: Prove on the test images that deferred firing at T = L equals the QANN in every layer.
        data_root: Folder of the data sets; default $QSNN_DATA.
        config: Time steps and firing.
    """
    qann = load(file)
    _expect(qann, file, ("qann", "teacher"))
    plain = qann.qsnn_recipe["kind"] == "teacher"  # type: ignore[index]
    if certify and (plain or calibrate):
        raise ValueError(
            "--certify compares with a quantized network as it is; leave --calibrate away, or quantize first"
        )
    data = _data(cast(dict[str, Any], qann.qsnn_recipe), file, data_root) if plain or calibrate else None
    snn = to_snn(qann, data, config)
    save(snn, out)
    print(f"wrote {out}")
    if certify:
        _certify(snn, qann, file, data_root)


def distill(
    file: _FILE,
    teacher: tuple[Path, ...],
    out: Path,
    data_root: Path | None = None,
    device: str | None = None,
    tensorboard: Path | None = None,
    config: tyro.conf.OmitArgPrefixes[DistillConfig] = DistillConfig(),  # noqa: B008
) -> None:
    """Train a spiking student of few time steps against a teacher.

    Args:
        file: Checkpoint of the spiking network.
        teacher: Checkpoint of the quantized or float network it learns from; or of several.
        out: File to write; with --mutual the teacher goes beside it, as NAME-teacher.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        tensorboard: Folder for TensorBoard.
        config: Loss terms and training options.
    """
    place, (snn, data) = start(device), _loaded(file, data_root, ("snn", "student"))
    experts = [load(path).to(place) for path in teacher]
    for expert, path in zip(experts, teacher, strict=True):
        _expect(expert, path, ("teacher", "qann"))
    recipes = [expert.qsnn_recipe for expert in experts]
    state = resume_file(out, snn.qsnn_recipe, recipes, asdict(config))
    student, taught = distill_together(snn.to(place), experts, data, config, resume=state, tensorboard=tensorboard)
    _written(student, out, data)
    if config.mutual:
        _written(taught, out.with_name(f"{out.stem}-teacher{out.suffix}"), data)
    if config.sparsity:
        print(f"weights that are zero: {100 * zero_weights(student):.1f} %")
    _done(state)


def fold(file: _FILE, out: Path) -> None:
    """Turn a spiking network into its integer form.

    Args:
        file: Checkpoint of the SNN or student.
        out: File to write.
    """
    snn = load(file)
    _expect(snn, file, ("snn", "student"))
    if not isinstance(snn, SNN):
        raise ValueError(f"{file} holds a spiking network from scratch, which has no integer form; benchmark it as is")
    save(to_integers(cast(SNN, snn)), out)
    print(f"wrote {out}")


def benchmark(
    files: tyro.conf.Positional[tuple[Path, ...]],
    timesteps: int = 8,
    firing: str | None = None,
    html: Path | None = None,
    figure: Path | None = None,
    records: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    exit_margin: float | None = None,
    data_root: Path | None = None,
    device: str | None = None,
) -> None:
    """Measure accuracy against T, spikes and operations of one or several checkpoints, on the test images.

    Args:
        files: Checkpoints.
        timesteps: Largest T.
        firing: online or deferred; default what the network is made for.
        html: Write a report here.
        figure: Draw accuracy against T here (.png or .svg).
        records: Append a record for each checkpoint here.
        json_file: Write all numbers of all checkpoints here.
        exit_margin: Also answer early, once the class in front leads by so much (0 to 1).
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
    """
    if not files:
        raise ValueError("expected at least one checkpoint: qsnn benchmark FILE ...")
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    place = start(device)
    models = {name: load(file).to(place) for name, file in zip(names, files, strict=True)}
    recipes = {name: recipe_of(model) for name, model in models.items()}
    sets = {str(recipe.get("data", {}).get("name")) for recipe in recipes.values()}
    if len(sets) > 1:
        raise ValueError(f"expected checkpoints of one data set, got {', '.join(sorted(sets))}; benchmark them apart")
    data = _data(recipes[names[0]], files[0], data_root)
    results = [
        run_benchmark(
            model, data.test, timesteps=timesteps, firing=firing, name=name,
            exit_margin=exit_margin if hasattr(model, "firing") else None,
        )
        for name, model in models.items()
    ]  # fmt: skip
    Console().print(table(results))
    Console().print(energy_table(results))
    if json_file is not None:
        write_atomic(json_file, json.dumps({r.name: {"n": r.n, **r.metrics()} for r in results}, indent=1))
    world = environment(place.type)
    title = f"{', '.join(names)} on {Path(data.name).name}"
    if html is not None:
        command = f"qsnn benchmark {' '.join(file.name for file in files)} --timesteps {timesteps}"
        write_report(
            html, title=title, results=results, certificate=None, config=recipes, environment=world, command=command,
            notes=[], stages=None,
        )  # fmt: skip
    if figure is not None:
        draw_curve(results, figure, title=title)
    if records is not None:
        for result, recipe in zip(results, recipes.values(), strict=True):
            seed = recipe.get("distill", recipe.get("train", {})).get("seed", 0)
            append(records, Record(
                name=f"benchmark/{result.name}", data=Path(data.name).name, seed=seed, n=result.n,
                metrics=result.metrics(),
                config=recipe, environment=world, time=now(),
            ))  # fmt: skip
    for path in (html, figure, records, json_file):
        if path is not None:
            print(f"wrote {path}")


def info(file: _FILE) -> None:
    """Print what a checkpoint holds: how it was made, from what, and what it weighs.

    Args:
        file: A checkpoint of qsnn.
    """
    recipe = read_recipe(file)
    for key, value in recipe.items():
        print(f"{key}: {value}")
    print(summary(load(file)))


def _fit(model: nn.Module, data: Data, config: TrainConfig, out: Path, begun: Any = None, **options: Any) -> None:
    state = resume_file(out, model.qsnn_recipe, asdict(config), begun)
    fit(model, data, config, resume=state, **options)
    model.qsnn_recipe = {**model.qsnn_recipe, "train": asdict(config)}  # type: ignore[arg-type,assignment,dict-item]
    _written(model, out, data)
    _done(state)


def _written(model: nn.Module, out: Path, data: Data) -> None:
    """Write the file, from the first process, and say so."""
    if is_main():
        save(model, out)
        print(f"wrote {out} (validation accuracy {accuracy(model, data.val):.2f} %)")


def _done(state: Path) -> None:
    """The training is over and its result written: its state goes."""
    if is_main():
        state.unlink(missing_ok=True)
    wait()


def _expect(model: nn.Module, file: Path, kinds: tuple[str, ...]) -> None:
    recipe = recipe_of(model)
    kind = recipe["kind"]
    if recipe.get("spiking") and "student" in kinds:
        return  # a spiking network from scratch
    if kind not in kinds:
        raise ValueError(f"{file} holds a {kind!r}; expected {' or '.join(map(repr, kinds))}")


def _loaded(file: Path, root: Path | None, kinds: tuple[str, ...]) -> tuple[nn.Module, Data]:
    model = load(file)
    _expect(model, file, kinds)
    return model, _data(cast(dict[str, Any], model.qsnn_recipe), file, root)


def _data(recipe: dict[str, Any], file: Path, root: Path | None) -> Data:
    name = recipe.get("data", {}).get("name")
    if name is None:
        raise ValueError(f"{file} does not say which data set it was made for; use the Python interface")
    own = recipe["data"]  # what a torchvision set was normalised by belongs to the network; others have one way only
    mean, std = (tuple(own[key]) if name in TORCHVISION and key in own else None for key in ("mean", "std"))
    return load_data(name, root=root, timesteps=own.get("frames"), mean=mean, std=std)


def _certify(snn: SNN, qann: nn.Module, file: Path, root: Path | None) -> None:
    certificate = certify(snn, qann, _data(cast(dict[str, Any], qann.qsnn_recipe), file, root).test)
    print(certificate)
    if not certificate.exact:
        raise ValueError("the spiking network is not equal to the quantized one")
