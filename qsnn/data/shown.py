"""A bar on the terminal that says how far long work is."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset

_PATIENCE = 2.0
"""So long [s] work goes on without a bar."""
Part = TypeVar("Part")


def shown(parts: Iterable[Part], label: str, total: int | None = None) -> Iterator[Part]:
    """Yield the parts of some work one by one; after two seconds a bar on the terminal shows how far they are.

    It stands on stderr and goes when the work ends; where stderr is no terminal nothing is shown.

    Args:
        parts: of the work, such as batches.
        label: stands before the bar.
        total: how many parts there are; by default the length of ``parts``, where it has one.

    >>> list(shown([1, 2], "counting"))
    [1, 2]
    """
    text = TextColumn("{task.description:<12}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar, started, visible = Progress(*columns, console=Console(stderr=True), transient=True), time.monotonic(), False
    task = bar.add_task(label, total=len(parts) if total is None and isinstance(parts, Sized) else total)
    try:
        for part in parts:
            yield part
            bar.advance(task)
            if not visible and bar.console.is_terminal and time.monotonic() - started > _PATIENCE:
                visible = True
                bar.start()
    finally:
        if visible:
            bar.stop()


def batch_count(data: Any, batch_size: int, images: int | None = None) -> int | None:
    """How many batches :func:`qsnn.batches` makes of data, or of its first images; None where data does not say.

    >>> batch_count([1, 2], 4), batch_count(iter(()), 4)
    (2, None)
    """
    if not isinstance(data, Sized):
        return None
    if not isinstance(data, Dataset):  # a loader, which has batches of its own
        return len(data)
    return -(-min(len(data), images or len(data)) // batch_size)
