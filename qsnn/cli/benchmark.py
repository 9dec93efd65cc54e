"""``qsnn benchmark``: checkpoints side by side, as tables, a page, a figure, records or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from torch import nn

from qsnn.checkpoint import load
from qsnn.cli.commands import data_of
from qsnn.data.images import Data
from qsnn.files import write_atomic
from qsnn.graph.recipe import recipe_of
from qsnn.measure.benchmark import Benchmark
from qsnn.measure.benchmark import benchmark as run_benchmark
from qsnn.report.curve import draw_curve
from qsnn.report.page import write_report
from qsnn.report.records import Record, append, environment, now
from qsnn.report.terminal import energy_table, table
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
    place, models = start(device), _named(files)
    recipes = {name: recipe_of(model) for name, model in models.items()}
    data = _common_data(recipes, files[0], data_root)
    results = [
        run_benchmark(
            model.to(place), data.test, timesteps=timesteps, firing=firing, name=name,
            exit_margin=exit_margin if hasattr(model, "firing") else None,
        )
        for name, model in models.items()
    ]  # fmt: skip
    Console().print(table(results))
    Console().print(energy_table(results))
    title, world = f"{', '.join(models)} on {Path(data.name).name}", environment(place.type)
    if html is not None:
        command = f"qsnn benchmark {' '.join(file.name for file in files)} --timesteps {timesteps}"
        write_report(
            html, title=title, results=results, certificate=None, config=recipes, environment=world, command=command,
            notes=[], stages=None,
        )  # fmt: skip
    if figure is not None:
        draw_curve(results, figure, title=title)
    if records is not None:
        for result in results:
            append(records, _record(result, data, recipes[result.name], world))
    if json_file is not None:
        write_atomic(json_file, json.dumps({r.name: {"n": r.n, **r.metrics()} for r in results}, indent=1))
    for path in (html, figure, records, json_file):
        if path is not None:
            print(f"wrote {path}")


def _named(files: tuple[Path, ...]) -> dict[str, nn.Module]:
    """The models of several files, by name of the file; by its path where two names are the same."""
    if not files:
        raise ValueError("expected at least one checkpoint: qsnn benchmark FILE ...")
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    return {name: load(file) for name, file in zip(names, files, strict=True)}


def _common_data(recipes: dict[str, dict[str, Any]], file: Path, root: Path | None) -> Data:
    """The one data set that all these checkpoints were made for; ``file`` is the first of them."""
    sets = {str(recipe.get("data", {}).get("name")) for recipe in recipes.values()}
    if len(sets) > 1:
        raise ValueError(f"expected checkpoints of one data set, got {', '.join(sorted(sets))}; benchmark them apart")
    return data_of(next(iter(recipes.values())), file, root)


def _record(result: Benchmark, data: Data, recipe: dict[str, Any], world: dict[str, Any]) -> Record:
    seed = recipe.get("distill", recipe.get("train", {})).get("seed", 0)
    return Record(
        name=f"benchmark/{result.name}", data=Path(data.name).name, seed=seed, n=result.n, metrics=result.metrics(),
        config=recipe, environment=world, time=now(),
    )  # fmt: skip
