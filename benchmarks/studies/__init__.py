"""One question, one file: ``studies/NAME.py`` holds all that ``study.py NAME`` asks, and is found by its name.

A file has ``QUESTION``, ``SIZE`` and ``rows``, and of the rest what it needs; the fields of :class:`Study` say what
each one is. ``rows`` must yield labels and configs without looking at the data: tables are made from records alone.

Some files are called as modules of Python are (``time``, ``code``): import them as ``studies.NAME``, never put this
folder on ``sys.path``, and run no file of it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from setting import Load, Row, Setting

from qsnn.report.records import Record

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Study:
    """What a file of this folder holds; fields of data stand there in capitals."""

    name: str
    question: str
    """The question, as a reader would ask it."""
    size: str
    """What is trained and measured, for the list of studies."""
    rows: Callable[[Setting, Load], Iterator[Row]]
    """(setting, load) -> label, config and measurement of every row; nothing is loaded or trained before one is
    measured."""
    answer: Callable[[Sequence[Record]], str] | None = None
    """Records of whole seeds -> the sentence at the end, with its full stop."""
    part: str = "test"
    """The images that the numbers are of: "test", or "validation" where something is chosen by them."""
    data: str = "fashion-mnist"
    """Data set where the command names none; "all": the rows choose."""
    net: str = ""
    """The networks, where they are not the one that the command names."""
    options: str = ""
    """Options of the command that made the published records."""
    titles: Mapping[str, str] | None = None
    """Metric -> head of its column in RESULTS.md."""
    table: Callable[[Sequence[Record]], str] | None = None
    """Records -> a table of its own, in the place of ``titles``."""
    note: str = ""
    """What the table shows, below it."""
    figure: Callable[[Any, Mapping[str, Sequence[Mapping[str, Any]]]], None] | None = None
    """(figure, label -> metrics of every seed) -> None, from figures.py."""


def names() -> list[str]:
    """Every study."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__init__")


def find(name: str) -> Study:
    """The study of a file.

    Raises:
        ValueError: the file lacks what every study has.
    """
    module = import_module(f"studies.{name}")
    spelled = {f.name: f.name if f.name in ("rows", "answer", "table") else f.name.upper() for f in fields(Study)}
    given = {field: getattr(module, word) for field, word in spelled.items() if hasattr(module, word)}
    lacking = [spelled[field] for field in ("question", "size", "rows") if field not in given]
    if lacking:
        raise ValueError(f"studies/{name}.py: expected {', '.join(lacking)}; studies/__init__.py says what they are")
    return Study(**{"name": name, **given})
