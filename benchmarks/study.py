"""One question, one command: ``python benchmarks/study.py NAME`` trains what it compares, prints a table, adds records.

A row whose record is there already (same config) is not run again, so a long table fills across calls. Networks that
several rows need are kept in ``runs/study`` under the hash of their config. Default size: the study net (16-16-32-32-64
channels), 20,000 training images, 4 epochs a stage; ``--full`` uses all images. ``--jobs`` rows run at a time, each on
its share of the cores. What a study is stands in ``studies/NAME.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import qsnn
from qsnn.cli.one_line import GOES_ON, one_line
from qsnn.files import write_atomic
from qsnn.report.records import Record, append, environment, now

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # this folder, and never studies/: see its docstring
import figures
import studies
from lookup import key, plain, stored
from setting import CACHE, Setting
from tables import plus_minus

HERE = Path(__file__).resolve().parent


def _load(root: Path | None, name: str) -> qsnn.Data:
    """A data set by name; recordings as four frames for the order of frames, else as two, one for each step."""
    name, _, steps = name.partition(":")
    return qsnn.load_data(name, root=root, timesteps=int(steps or 2) if name == "nmnist" else None)


def selected(
    name: str, data_name: str, seed: int, full: bool, data_root: Path | None, model: str, only: Sequence[str]
) -> list[tuple[Setting, str, dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The rows of one seed, each with its whole config; nothing is trained."""
    images, epochs = (None, 12) if full else (20_000, 4)
    setting = Setting(data_name, model, epochs, images, seed)
    return [
        (setting, label, plain({"setting": asdict(setting), **options}), measure)
        for label, options, measure in studies.find(name).rows(setting, partial(_load, data_root))
        if not only or label in only
    ]


def measured(name: str, path: Path, *options: Any) -> str:
    """Measure one row and append its record; return what the terminal says of it."""
    ((setting, label, config, measure),) = selected(name, *options)
    world, metrics = environment(), measure()
    n = metrics.pop("n", None) or len(_load(options[3], setting.data).test)  # type: ignore[arg-type]
    append(path, Record(
        name=f"study-{name}/{label}", data=setting.data, seed=setting.seed, n=n, metrics=metrics, config=config,
        environment=world, time=now(),
    ))  # fmt: skip
    shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
    return f"{label}, seed {setting.seed}: {shown}"


def _quiet(threads: int, log: Path) -> None:
    """A worker: its share of the cores, its output in a file."""
    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")


def run(
    name: str,
    data_name: str,
    seeds: Sequence[int],
    full: bool = False,
    data_root: Path | None = None,
    model: str = "study",
    only: Sequence[str] = (),
    jobs: int = 1,
) -> list[Record]:
    """Run the rows of a study that have no record yet, ``jobs`` at a time; return all of them."""
    path, console = HERE / "records" / f"study-{name}.jsonl", Console()
    rows = [row for seed in seeds for row in selected(name, data_name, seed, full, data_root, model, only)]
    if not rows:
        raise ValueError(f"study {name} has no row of {', '.join(only)}")
    keys = [key(f"study-{name}/{label}", setting.data, config) for setting, label, config, _ in rows]
    known = stored(path)
    missing = [
        (name, path, data_name, setting.seed, full, data_root, model, [label])
        for (setting, label, _, _), wanted in zip(rows, keys, strict=True)
        if wanted not in known
    ]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if jobs == 1:
        for options in missing:
            console.print(measured(*options), highlight=False)
    elif missing:
        CACHE.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when a worker imports torch
        pool = ProcessPoolExecutor(jobs, get_context("spawn"), _quiet, (threads, CACHE / f"{name}.log"))
        with pool, bar:
            task = bar.add_task(name, total=len(missing))
            waiting = [pool.submit(measured, *options) for options in missing]
            try:
                for done in as_completed(waiting):
                    bar.console.print(done.result(), highlight=False)
                    bar.advance(task)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    known = stored(path)
    return [known[wanted] for wanted in keys]


def print_table(name: str, records: list[Record]) -> None:
    """Mean ± standard deviation over the seeds of every metric, a row a label."""
    labels = list(dict.fromkeys(r.name.partition("/")[2] for r in records))
    keys = list(dict.fromkeys(k for r in records for k in r.metrics if not k.startswith("error")))
    table = Table(title=f"{name} on {records[0].data}")
    table.add_column("setting")
    for metric in keys:
        table.add_column(metric, justify="right")
    for label in labels:
        rows = [r for r in records if r.name.partition("/")[2] == label]
        values = ([float(r.metrics[metric]) for r in rows if metric in r.metrics] for metric in keys)
        table.add_row(label, *(plus_minus(found) if found else "" for found in values))
    Console().print(table)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=studies.names())
    parser.add_argument("--data", default=None, help="by default what the question is about")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--full", action="store_true", help="all training images, 12 epochs a stage")
    parser.add_argument("--model", default="study")
    parser.add_argument("--only", nargs="+", default=None, metavar="ROW", help="these rows of the table")
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument(
        "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="rows at a time, each on its share of the cores"
    )
    args = parser.parse_args()
    study = studies.find(args.name)
    with one_line("study.py", f"{GOES_ON} with the rows that are missing"):
        records = run(
            args.name, args.data or study.data, args.seeds, args.full, args.data_root, args.model, args.only or (),
            max(1, args.jobs),
        )  # fmt: skip
    print_table(args.name, records)
    if study.answer is not None and not args.only:
        if drawn := figures.of_study(args.name, records):
            path = CACHE / f"study-{args.name}.svg"
            write_atomic(path, drawn)
            print(f"drawn: {path}; scripts/readme draws the one that is published")
        print(study.answer(records))


if __name__ == "__main__":
    main()
