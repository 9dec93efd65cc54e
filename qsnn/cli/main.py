"""The command line: parsing, and one line for every wrong input."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from qsnn.cli import commands, deploy
from qsnn.training.fit import CHECKPOINT_SECONDS
from qsnn.training.processes import stop

COMMANDS: dict[str, Callable[..., None]] = {
    "run": commands.run, "train": commands.train, "quantize": commands.quantize, "convert": commands.convert,
    "distill": commands.distill, "fold": commands.fold, "benchmark": commands.benchmark, "info": commands.info,
    **deploy.COMMANDS,
}  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line and exit status 2, Ctrl-C with 130."""
    if "" not in sys.path:
        sys.path.append("")  # a model of one's own in the working directory, also where the script `qsnn` is called
    rank = int(os.environ.get("RANK", 0))
    try:
        with contextlib.ExitStack() as stack:
            if rank:  # torchrun started several processes; the first one speaks
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            _parse(args)()
            stop()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"qsnn: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            "qsnn: stopped; the same command goes on from the last checkpoint (after every epoch, and within one every "
            f"{CHECKPOINT_SECONDS / 60:g} minutes)",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def _parse(args: list[str] | None) -> Callable[[], None]:
    """The command with its arguments, not yet called.

    tyro draws a box around the ValueError of a config that refuses an option; it is raised here instead, so that it
    becomes one line like any other. Parsing and calling are apart so that only what tyro prints is held back.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.extras.subcommand_cli_from_dict(
                {name: _later(command) for name, command in COMMANDS.items()},
                args=args,
                prog="qsnn",
                description="From a trained ANN to a spiking network that answers in two time steps, with proof.",
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as leave:
        failure = leave.__context__  # names the config, or the option that could not be read, which the box explains
        if failure is not None and isinstance(getattr(failure, "arg", None), str):
            raise ValueError(getattr(failure, "message", failure)) from None
        sys.stderr.write(shown.getvalue())
        raise


def _later(command: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(command)
    def later(*args: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **options)

    return later
