"""Whatever goes wrong in a program ends with one line and an exit status; torch is not imported for it."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from qsnn.files import shown

OURS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""What the package raises for wrong input; its message says what to do."""
GOES_ON = "stopped; the same command goes on"


@contextlib.contextmanager
def one_line(program: str, stopped: str = GOES_ON) -> Iterator[None]:
    """Let an error in the block end the program with one line and exit status 2, Ctrl-C with 130.

    With QSNN_DEBUG=1 in the environment the traceback stands above the line.

    Args:
        program: whose line it is.
        stopped: what is said after Ctrl-C.
    Raises:
        SystemExit: with the status.

    >>> import contextlib, io
    >>> with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.suppress(SystemExit), one_line("count.py"):
    ...     raise ValueError("expected a whole number, got 1.5; round it")
    >>> said.getvalue()
    'count.py: expected a whole number, got 1.5; round it\\n'
    """
    try:
        yield
    except OURS as error:
        _end(2, program, flat(error))
    except KeyboardInterrupt:
        _end(130, program, stopped)
    except Exception as error:
        _end(2, program, f"{flat(error)} ({type(error).__name__}); qsnn did not foresee this: please report it, with "
             "the command you typed, `qsnn --version`, and what QSNN_DEBUG=1 before the command prints")  # fmt: skip


def flat(error: object) -> str:
    """The message in one line."""
    return shown(" ".join(str(error).split()))


def _end(status: int, program: str, line: str) -> NoReturn:
    if os.environ.get("QSNN_DEBUG") == "1":
        traceback.print_exc()
    print(f"{program}: {line}", file=sys.stderr)
    raise SystemExit(status) from None
