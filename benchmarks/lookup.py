"""Finding records: which of them may be published, which are of one experiment, which a row has already."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import studies
from setting import Setting

from qsnn.cli.config import command_of
from qsnn.report.records import Record, read

Key = tuple[str, str, str]


def plain(config: Any) -> Any:
    """A config as JSON has it: lists for tuples."""
    return json.loads(json.dumps(config))


LATER = (
    "correct_weight", "strong_weight", "entropy_weight", "ema", "signed", "current_weight", "model_options", "mixup"
)  # fmt: skip
"""Options that came after most records were made; 0, or none, is what was before them and what such a record says."""


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _said(item) for name, item in value.items() if name not in LATER or item}
    return value


def key(name: str, data: str, config: dict[str, Any]) -> Key:
    """What tells one row from another: its name, its data set and its whole config."""
    return name, data, json.dumps(_said(config), sort_keys=True)


def stored(path: Path) -> dict[Key, Record]:
    """The last record of every row of a file; {} where there is no file."""
    return {key(r.name, r.data, r.config): r for r in (read(path) if path.exists() else [])}


def publishable(record: Record) -> bool:
    """Whether the record names the code that made it: a commit, and nothing changed since."""
    return bool(record.environment.get("commit")) and record.environment.get("dirty") is False


def published(folder: Path) -> list[Record]:
    """Every record of a folder that may be published; says how many may not."""
    records = [record for path in sorted(folder.glob("*.jsonl")) for record in read(path)]
    left_out = sum(not publishable(r) for r in records)
    if left_out:
        print(f"scripts/readme: left out {left_out} records of code that is not a clean commit", file=sys.stderr)
    return [r for r in records if publishable(r)]


def by_time(records: Iterable[Record]) -> list[Record]:
    """The oldest first."""
    return sorted(records, key=lambda r: datetime.fromisoformat(r.time))


def newest(records: Iterable[Record]) -> list[Record]:
    """Of records that differ in nothing but time and numbers, the newest, in the order of their first appearance."""
    return list({json.dumps([r.name, r.config], sort_keys=True): r for r in by_time(records)}.values())


def experiment(config: dict[str, Any]) -> str:
    """The config as text, without what differs between the seeds of one experiment: the seeds and the folder."""

    def without_seeds(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_seeds(item) for name, item in value.items() if name != "seed"}
        return value

    # run.epochs says only whether the epochs, which stand in each stage's config, were typed or are the default
    run = {name: value for name, value in config.get("run", {}).items() if name not in ("out", "epochs")}
    return json.dumps(without_seeds(_said({**config, "run": run})), sort_keys=True)


def flow(records: Iterable[Record], prefix: str, models: Sequence[str], data: str) -> dict[str, list[Record]]:
    """The rows of a flow's table: for each model one record a seed, {} where there are none.

    They have the config that the newest record has; of several records the newest counts; and a seed counts only
    where every model has it.
    """
    names = {f"{prefix}/{model}": model for model in models}
    mine = by_time(r for r in records if r.data == data and r.name in names)
    found: dict[str, dict[int, Record]] = {model: {} for model in models}
    for record in mine:
        if experiment(record.config) == experiment(mine[-1].config):
            found[names[record.name]][record.seed] = record
    seeds = sorted(set.intersection(*(set(rows) for rows in found.values())))
    return {model: [rows[seed] for seed in seeds] for model, rows in found.items()} if seeds else {}


NETWORK = ("data", "model", "model_options", "weight_bits", "levels", "signed")
"""Options of ``qsnn run`` that make another network of it."""


def networks(records: Iterable[Record], data: str) -> dict[str, list[Record]]:
    """The records of ``qsnn run`` on a data set, by the command that names the network; the usual one stands first."""
    found: dict[str, list[Record]] = {command_of({"data": data}): []}
    for record in records:
        if record.data == data and record.name.startswith("run/"):
            said = {name: value for name, value in record.config["run"].items() if name in NETWORK}
            found.setdefault(command_of({**said, "data": data}), []).append(record)
    return {command: mine for command, mine in found.items() if mine}


def drawing(command: str) -> str:
    """The name of a run's figure, without its ending, by its command: run-digits, run-digits-qkformer-w1."""
    short = {"weight-bits": "w", "levels": "l"}
    parts = ["run"]
    for option in command.split(" --")[1:]:
        name, *values = option.split()
        parts += [short.get(name, "") + value for value in values or [name]]
    return "-".join(re.findall(r"\w+", "-".join(parts)))


def labels(name: str) -> list[str]:
    """The rows that a study has today."""
    return [label for label, _, _ in studies.find(name).rows(Setting("", "study", 4, 20_000, 0), lambda _: None)]


def of_study(name: str, records: Sequence[Record], model: str = "study") -> list[Record]:
    """The records of a study's rows of today, each of the config that its newest record has."""
    found = []
    for label in labels(name):
        mine = newest(r for r in records if r.name == f"study-{name}/{label}")
        mine = [r for r in mine if r.config["setting"]["model"] == model]
        found += [r for r in mine if experiment(r.config) == experiment(mine[-1].config)]
    return found


def whole(name: str, records: Sequence[Record]) -> list[Record]:
    """Of :func:`of_study` the seeds that have every row; [] where a row has no record at all."""
    rows = of_study(name, records)
    wanted = {f"study-{name}/{label}" for label in labels(name)}
    seeds = [seed for seed in {r.seed for r in rows} if {r.name for r in rows if r.seed == seed} == wanted]
    return [r for r in rows if r.seed in seeds]


def timed(kind: str, records: Iterable[Record]) -> list[Record]:
    """Of throughput.py's records the newest of every name: an older one is of code that is no more."""
    return list({r.name: r for r in by_time(records) if r.name.startswith(f"throughput/{kind}/")}.values())


def by_label(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of every row of a study, in the rows' order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.name.partition("/")[2], []).append(record)
    return found
