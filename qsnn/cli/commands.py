"""The subcommands of the command line: each is a thin call of one public function."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import tyro
from rich.console import Console
from torch import nn

from qsnn.checkpoint import file_hash, load, load_weights, read_recipe, resume_file, save
from qsnn.cli.run import RunConfig
from qsnn.cli.run import run as run_flow
from qsnn.data.images import Data
from qsnn.data.sources import load_data
from qsnn.distillation.distill import DistillConfig, distill_together
from qsnn.distillation.prune import zero_weights
from qsnn.folded.fold import fold as to_integers
from qsnn.graph.recipe import recipe_of
from qsnn.measure.accuracy import score
from qsnn.measure.certify import certify
from qsnn.measure.summary import summary
from qsnn.models.create import create_model
from qsnn.quant.quantize import QuantizeConfig
from qsnn.quant.quantize import quantize as to_qann
from qsnn.report.terminal import table
from qsnn.snn.convert import ConvertConfig
from qsnn.snn.convert import convert as to_snn
from qsnn.snn.network import SNN
from qsnn.training.fit import TrainConfig, fit
from qsnn.training.processes import is_main, start, wait

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
    data = data_of(cast(dict[str, Any], qann.qsnn_recipe), file, data_root) if plain or calibrate else None
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
        print(f"wrote {out} (validation {score(model, data.val)})")


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
    return model, data_of(cast(dict[str, Any], model.qsnn_recipe), file, root)


def data_of(recipe: dict[str, Any], file: Path, root: Path | None) -> Data:
    """Load the data set that a checkpoint was made for.

    Raises:
        ValueError: the checkpoint names none.
    """
    name = recipe.get("data", {}).get("name")
    if name is None:
        raise ValueError(f"{file} does not say which data set it was made for; use the Python interface")
    return load_data(name, root=root, timesteps=recipe["data"].get("frames"))


def _certify(snn: SNN, qann: nn.Module, file: Path, root: Path | None) -> None:
    certificate = certify(snn, qann, data_of(cast(dict[str, Any], qann.qsnn_recipe), file, root).test)
    print(certificate)
    if not certificate.exact:
        raise ValueError("the spiking network is not equal to the quantized one")
