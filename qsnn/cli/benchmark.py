"""``qsnn benchmark``: checkpoints and exported files side by side, as tables, a page, a figure, records or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from qsnn.checkpoint import check_data
from qsnn.cli.inputs import data_for, loaded, refuse_idle, set_task_
from qsnn.data.images import Data
from qsnn.data.memory import limit_memory
from qsnn.export.deployed import Deployed, parents_of, side_by_side
from qsnn.export.runtime import OnnxNetwork
from qsnn.files import as_path, output, target_of, write_atomic
from qsnn.graph.recipe import recipe_of
from qsnn.measure.benchmark import benchmark as run_benchmark
from qsnn.measure.result import Benchmark
from qsnn.options import Share, TaskName, Timesteps, check_option
from qsnn.report.curve import draw_curve
from qsnn.report.page import write_report
from qsnn.report.records import Record, append, check_records, environment, now
from qsnn.report.terminal import deployed_table, energy_table, table
from qsnn.training.processes import start


def benchmark(
    files: tyro.conf.Positional[tuple[Path, ...]],
    timesteps: int = 8,
    firing: str | None = None,
    html: Path | None = None,
    figure: Path | None = None,
    records: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    exit_margin: float | None = None,
    model: tuple[str, ...] = (),
    data: str | None = None,
    task: TaskName | None = None,
    data_root: Path | None = None,
    device: str | None = None,
    memory: str | None = None,
) -> None:
    """Measure accuracy against T, spikes, operations and time of checkpoints and exported files, on test images.

    Args:
        files: Checkpoints, and exported .onnx files beside the folded checkpoint that they came from.
        timesteps: Largest T; an exported file has its own.
        firing: online or deferred; default what the network is made for.
        html: Write a report here.
        figure: Draw accuracy against T here (.png or .svg).
        records: Append a record for each checkpoint here.
        json_file: Write all numbers of all checkpoints here.
        exit_margin: Also answer early, once the class in front leads by so much (0 to 1).
        model: Functions that build networks of your own, package.module:function, where the files name them.
        data: Folder of images, where the files name one.
        task: What the networks are asked; default as each file says, or found from the labels and the answers.
        data_root: Folder of the data sets; default $QSNN_DATA.
        device: cpu, cuda or cuda:1; default a GPU where there is one.
        memory: What the images of one batch may take, like 512M or 4G; default 1G.
    """
    limit_memory(memory)
    check_option("timesteps", timesteps, Timesteps)
    check_option("exit_margin", exit_margin, Share | None)
    html, figure, records, json_file = _outputs((html, figure, records, json_file), files)
    if records is not None:
        check_records(records)
    named = _named(files)
    paths = {name: file for name, file in named.items() if file.suffix != ".onnx"}
    if not paths and (html is not None or figure is not None or exit_margin is not None):
        raise ValueError("--html, --figure and --exit-margin need a checkpoint: give the one that the file came from")
    refuse_idle(model, list(paths.values()))
    place = start(device)
    models = {name: loaded(file, model) for name, file in paths.items()}
    exported = {
        name: OnnxNetwork(file, threads=torch.get_num_threads()) for name, file in named.items() if name not in paths
    }
    parents_of(exported, models)
    recipes = {name: recipe_of(models[name]) if name in models else exported[name].recipe for name in named}
    images = _common_data(recipes, named, data_root, data)
    results = [
        run_benchmark(
            network.to(place), images.test, timesteps=timesteps, firing=firing, name=name,
            exit_margin=exit_margin if hasattr(network, "firing") else None, task=set_task_(network, task),
        )
        for name, network in models.items()
    ]  # fmt: skip
    deployed = [] if not exported else side_by_side(
        {name: (named[name], network) for name, network in exported.items()},
        {result.name: (paths[result.name], models[result.name], result) for result in results}, images.test,
    )  # fmt: skip
    if results:
        Console().print(table(results))
        Console().print(energy_table(results))
    if deployed:
        Console().print(deployed_table(deployed))
    title, world = f"{', '.join(named)} on {Path(images.name).name}", environment(place.type)
    if html is not None:
        command = f"qsnn benchmark {' '.join(file.name for file in files)} --timesteps {timesteps}"
        write_report(
            html, title=title, results=results, certificate=None, config=recipes, environment=world, command=command,
            notes=[], stages=None, deployed=deployed,
        )  # fmt: skip
    if figure is not None:
        draw_curve(results, figure, title=title)
    answers: list[Benchmark | Deployed] = [*results, *(row for row in deployed if row.name in exported)]
    if records is not None:
        for result in answers:
            append(records, _record(result, images, recipes[result.name], world))
    if json_file is not None:
        write_atomic(json_file, json.dumps({r.name: {"n": r.n, **r.metrics()} for r in answers}, indent=1))
    for path in (html, figure, records, json_file):
        if path is not None:
            print(f"wrote {path}")


def _outputs(paths: tuple[Path | None, ...], files: tuple[Path, ...]) -> tuple[Path | None, ...]:
    """The places to write, each its own and none of them read; said before the work, not after it."""
    asked = [output(path, *files) for path in paths if path is not None]
    if len({target_of(path) for path in asked}) < len(asked):
        raise ValueError("two of --html, --figure, --records and --json name one file; give each its own")
    return tuple(None if path is None else as_path(path) for path in paths)


def _named(files: tuple[Path, ...]) -> dict[str, Path]:
    """The files, by their name; by their path where two names are the same."""
    if not files:
        raise ValueError("expected at least one checkpoint: qsnn benchmark FILE ...")
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    return dict(zip(names, files, strict=True))


def _common_data(
    recipes: dict[str, dict[str, Any]], files: dict[str, Path], root: Path | None, given: str | None
) -> Data:
    """The one data set that all these files were made for, of which each is checked."""
    sets = {str(recipe.get("data", {}).get("name")) for recipe in recipes.values()}
    if len(sets) > 1:
        raise ValueError(f"expected checkpoints of one data set, got {', '.join(sorted(sets))}; benchmark them apart")
    first = next(iter(files))
    data = data_for(recipes[first], files[first], root, given)
    for name, recipe in recipes.items():
        check_data(recipe, data, files[name])
    return data


def _record(result: Benchmark | Deployed, data: Data, recipe: dict[str, Any], world: dict[str, Any]) -> Record:
    seed = recipe.get("distill", recipe.get("train", {})).get("seed", 0)
    return Record(
        name=f"benchmark/{result.name}", data=Path(data.name).name, seed=seed, n=result.n or 0,
        metrics=result.metrics(), config=recipe, environment=world, time=now(),
    )  # fmt: skip
