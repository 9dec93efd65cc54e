"""What stands beside the training loop: the progress bar, and the state that is kept on the disk now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qsnn.measure.task import told
from qsnn.training.processes import is_main, rank_and_world
from qsnn.training.resume import Epoch


class Bar:
    """Steps done, steps in all and the last epoch's numbers, shown by the first process.

    Where the output is no terminal (a file, a pipe), one line an epoch takes the place of the moving bar.

    Args:
        label: stands before the bar.
        epochs: of the whole run.
        steps: of the whole run.
        done: steps that an earlier start of the run did.
    """

    def __init__(self, label: str, epochs: int, steps: int, done: int) -> None:
        self.label, self.epochs, speaks = label, epochs, is_main()
        self.progress = Progress(
            TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"), console=None if speaks else Console(quiet=True), disable=not speaks,
        )  # fmt: skip
        self.task = self.progress.add_task(label, total=steps, completed=done, note="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step(self) -> None:
        """One step more is done."""
        self.progress.advance(self.task)

    def epoch(self, epoch: Epoch) -> None:
        """Show what an epoch gave."""
        note = f"loss {epoch.loss:.3f}"
        if epoch.val_accuracy is not None:
            note += f", validation {told(epoch.metric, epoch.val_accuracy).removeprefix('accuracy ')}"
        self.progress.update(self.task, note=note)
        if not self.progress.console.is_terminal:
            self.progress.console.print(f"{self.label}: epoch {epoch.epoch}/{self.epochs}, {note}")


class StateFile:
    """The file that a run goes on from: written after every epoch, and within one when ``seconds`` have passed.

    Only the first process writes, and of several processes only after an epoch: within one each has its own sum of
    losses and its own batch-norm statistics.

    Args:
        path: None keeps nothing.
        seconds: the longest time without a state [s].
        write: writes the state of the run as it stands into the file.
    """

    def __init__(self, path: str | Path | None, seconds: float, write: Callable[[str | Path], None]) -> None:
        self.path, self.seconds, self.write = path, seconds, write
        self.saved = time.monotonic()

    def save(self) -> None:
        """Write the state."""
        if self.path is not None and is_main():
            self.write(self.path)
        self.saved = time.monotonic()

    def save_if_due(self) -> None:
        """Write the state if the last one is older than ``seconds``."""
        if rank_and_world()[1] == 1 and time.monotonic() - self.saved > self.seconds:
            self.save()
