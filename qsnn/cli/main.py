"""The command line: which command is meant, and one line for everything that goes wrong.

This file imports neither torch nor anything that does, so that ``qsnn --help``, ``qsnn --version`` and a misspelled
command answer at once; a command's own file is imported when the command is called.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import io
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from qsnn import __version__
from qsnn.cli.one_line import flat, one_line

COMMANDS: dict[str, tuple[str, str]] = {
    "run": (
        "qsnn.cli.commands",
        "Do the whole flow: teacher, QANN, SNN, certificate, student, fold, benchmark, report.",
    ),
    "train": ("qsnn.cli.commands", "Train a float network, the teacher."),
    "quantize": (
        "qsnn.cli.commands",
        "Make a low-precision network of a float one: calibration, then quantization-aware training.",
    ),
    "convert": ("qsnn.cli.commands", "Turn a quantized network, or a calibrated float one, into a spiking one."),
    "distill": ("qsnn.cli.commands", "Train a spiking student of few time steps against a teacher."),
    "fold": ("qsnn.cli.commands", "Turn a spiking network into its integer form."),
    "benchmark": (
        "qsnn.cli.benchmark",
        "Measure accuracy against T, spikes, operations and time of checkpoints and exported files, on test images.",
    ),
    "info": (
        "qsnn.cli.commands",
        "Print what a checkpoint holds, how it was made and what it weighs; or what a folder of images holds.",
    ),
    "check": (
        "qsnn.cli.check",
        "Show what becomes of every layer of a network, its accuracy as loaded, and how long training will take.",
    ),
    "export": ("qsnn.cli.deploy", "Write a folded network to a file that runs without qsnn."),
    "predict": ("qsnn.cli.deploy", "Name the class of image files, one line each."),
}
"""By command: the module with the function of that name, and the first line of its docstring (a test compares)."""

_DESCRIPTION = """From a trained ANN to a spiking network that answers in two time steps, with proof.
`qsnn COMMAND --help` explains the options of a command, `qsnn --version` prints the version."""
_STOPPED = (
    "stopped; the same command goes on from the last checkpoint (one is written after every epoch of a training, and "
    "within an epoch every few minutes)"
)


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Whatever goes wrong ends with one line and exit status 2, Ctrl-C with 130. With QSNN_DEBUG=1 in the environment the
    traceback stands above the line.
    """
    if "" not in sys.path:
        sys.path.append("")  # a model of one's own in the working directory, also where the script `qsnn` is called
    words = sys.argv[1:] if args is None else args
    with one_line("qsnn", _STOPPED), _one_voice():
        _run(words)


def _run(words: Sequence[str]) -> None:
    if words and words[0] == "--version":
        print(f"qsnn {__version__}")
        return
    name = words[0] if words else ""
    if name in COMMANDS:
        _without_foreign_warnings()
        command = getattr(importlib.import_module(COMMANDS[name][0]), name)
        later = _parsed(_later(command), words[1:], prog=f"qsnn {name}")
        contextvars.copy_context().run(later)  # what --memory bounds is this command
        processes = sys.modules.get("qsnn.training.processes")
        if processes is not None:  # the command may have joined those that torchrun started
            processes.stop()
    elif {"-h", "--help"} & set(words):
        _parsed_commands(words)
    else:
        wrong = f"unknown command {name!r}" if words else "a command is missing"
        raise ValueError(f"{wrong}; use one of {', '.join(COMMANDS)}; `qsnn --help` says what each does")


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Of several processes that torchrun started only the first one prints."""
    if int(os.environ.get("RANK", 0)):
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    else:
        yield


def _without_foreign_warnings() -> None:
    """Leave out one warning: that there is no CUDA runtime, which torch logs where a CUDA_HOME is found.

    SpikingJelly imports torch.utils.cpp_extension, which logs it on import, for people who compile extensions. qsnn
    compiles none, and says itself when a GPU is asked for that is not there.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


# ---- parsing


def _parsed(command: Callable[..., Any], words: Sequence[str], *, prog: str) -> Callable[[], None]:
    """The command with its arguments, not yet called.

    Parsing and calling are apart so that only what the parser prints is held back: it explains a mistake in a box of
    many lines, which becomes one.
    """
    boxed = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxed), _room_for_a_line(words):
            later: Callable[[], None] = tyro.cli(
                command, args=list(words), prog=prog, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as left:
        if left.code in (None, 0):  # --help
            raise
        raise ValueError(_unboxed(boxed.getvalue(), prog)) from None
    return later


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    @functools.wraps(command)
    def later(*args: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **options)

    return later


@contextlib.contextmanager
def _room_for_a_line(words: Sequence[str]) -> Iterator[None]:
    """Make the terminal wide for tyro, unless it prints help: it would break long words of a message, like paths."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(words):
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def _unboxed(box: str, prog: str) -> str:
    """What tyro explains in a box, as one line: its first part, up to the rule; below stands how to get help.

    >>> _unboxed('''
    ... ╭─ Value error ───────────────────────╮
    ... │ Error parsing --seed: no whole      │
    ... │ number                              │
    ... │ ─────────────────────────────────── │
    ... │ For full helptext, see qsnn --help  │
    ... ╰─────────────────────────────────────╯''', "qsnn run")
    'error parsing --seed: no whole number; `qsnn run --help` lists the options'
    """
    rows = [row.strip(" │") for row in box.strip().splitlines()[1:]]  # without the title
    rows = list(itertools.dropwhile(_is_rule, rows))  # where the terminal knows ASCII alone, one stands below the title
    text = flat(" ".join(itertools.takewhile(lambda row: not _is_rule(row), rows)))
    refused = re.match(r"Error parsing (?!-)[\w.]*: ", text)  # a config that says itself what is wrong with an option
    if refused:
        return text[refused.end() :]
    return f"{text[:1].lower()}{text[1:]}; `{prog} --help` lists the options"


def _is_rule(row: str) -> bool:
    return not any(character.isalnum() for character in row)


def _parsed_commands(words: Sequence[str]) -> None:
    """Print the help of the program: functions without arguments stand for the commands."""

    def stand_in(line: str) -> Callable[[], None]:
        def command() -> None: ...

        command.__doc__ = line
        return command

    tyro.extras.subcommand_cli_from_dict(
        {name: stand_in(line) for name, (_, line) in COMMANDS.items()}, args=list(words), prog="qsnn",
        description=_DESCRIPTION,
    )  # fmt: skip
