"""The table of ranges: what every number of every config may be; checked when the config is made, shown by --help."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Hashable
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

# counts; the upper ends are far above what anyone trains, and far below what would fill a disk or take years
Timesteps = Annotated[int, Meta(ge=1, le=4096)]
"""Simulation steps T."""
Epochs = Annotated[int, Meta(ge=0, le=100_000)]
"""Passes over the training images; 0 trains nothing."""
BatchSize = Annotated[int, Meta(ge=1, le=1_048_576)]
"""Images a step."""
Images = Annotated[int, Meta(ge=1, le=1_000_000_000)]
"""Images that are used at most."""
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
"""What numpy takes, too."""

TaskName = Literal["classification", "binary", "segmentation", "regression"]
"""What a network is asked; :data:`qsnn.measure.task.TASKS` says what each is."""

# precision
WeightBits = Annotated[int, Meta(ge=1, le=32)]
"""1 to 8, 16 or 32 [bit]; the numbers between are refused by :func:`qsnn.quant.weights.weight_quantizer`."""
ActBits = Annotated[int, Meta(ge=1, le=8)]
"""Bits of activations [bit]."""
InputBits = Annotated[int, Meta(ge=2, le=16)]
"""Bits of the signed input quantizer [bit]."""
Levels = Annotated[int, Meta(ge=1, le=255)]
"""Nonzero activation levels L."""
Percent = Annotated[float, Meta(gt=0, le=100)]
"""Part of all [%]."""

# real numbers: NaN and infinity lie in no range
Part = Annotated[float, Meta(ge=0, lt=1)]
"""Part of all, never all of it [1]."""
Share = Annotated[float, Meta(ge=0, le=1)]
"""Part of all, or all of it [1]."""
LearningRate = Annotated[float, Meta(gt=0, le=1000)]
"""Learning rate."""
Weight = Annotated[float, Meta(ge=0, le=1e6)]
"""Weight of a loss term, or of a penalty [1]."""
Factor = Annotated[float, Meta(gt=0, le=1e6)]
"""Factor on a threshold or a time constant, or a temperature [1]."""
Steps = Annotated[float, Meta(gt=0, le=1e6)]
"""Time constant [steps]."""
Slope = Annotated[float, Meta(ge=-1e6, le=1e6)]
"""What is added from layer to layer [steps]."""

CONFIGS = {
    "quantize": ("qsnn.quant.quantize", "QuantizeConfig"),
    "convert": ("qsnn.snn.config", "ConvertConfig"),
    "train": ("qsnn.training.config", "TrainConfig"),
    "distill": ("qsnn.distillation.config", "DistillConfig"),
    "mutual": ("qsnn.distillation.config", "DistillConfig"),
}
"""Where the configs stand that a checkpoint keeps, by its key: by name, for some stand below the checkpoint's room."""


def config_class(key: str) -> Any:
    """The config that a checkpoint keeps under ``key``."""
    module, name = CONFIGS[key]
    return getattr(importlib.import_module(module), name)


@cache
def hints_of(kind: Hashable) -> dict[str, Any]:
    """The type of every field of a dataclass, its range included."""
    return get_type_hints(kind, include_extras=True)


def check_options(config: Any) -> None:
    """Refuse a config one of whose fields has another type than it says, or a number out of its range.

    A bool is no number here, 4.5 and 4.0 are no whole numbers, NaN and infinity lie in no range. What is found wrong
    is named with all that is wrong beside it.

    Raises:
        ValueError: each such field with its range and its value.
    """
    hints = hints_of(type(config))  # type: ignore[arg-type]
    wrong = [problem(item.name, getattr(config, item.name), hints[item.name]) for item in fields(config)]
    if any(wrong):
        raise ValueError("; ".join(text for text in wrong if text))


def check_option(name: str, value: Any, hint: Any) -> None:
    """Refuse one value that stands in no config, like :func:`check_options`.

    Raises:
        ValueError: its name, its range and its value.
    """
    text = problem(name, value, hint)
    if text:
        raise ValueError(text)


def expect(call: str, name: str, value: Any, kind: type | tuple[type, ...] | str) -> None:
    """Refuse a foreign object in the place of a network, data or a name.

    Args:
        call: the call that was meant.
        name: of the argument.
        value: what came.
        kind: the type that it must be of; or, as a string, the attributes that it must have.
    Raises:
        TypeError: what was expected, what came, and the call.
    """
    if isinstance(kind, str):
        fits, wanted = all(hasattr(value, attribute) for attribute in kind.split()), f"with {kind.replace(' ', ', ')}"
    else:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        fits, wanted = isinstance(value, kinds), "as " + " or ".join(one.__name__ for one in kinds)
    if not fits:
        raise TypeError(f"expected {name} {wanted}, got {type(value).__name__}; call {call}")


_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def as_bytes(memory: Any) -> int:
    """A size in bytes, from a whole number of bytes or from words like "512M" and "2G" (of 1024).

    Raises:
        ValueError: something else, or less than 1 MiB or more than 1024 TiB.

    >>> as_bytes("512M"), as_bytes("1.5G"), as_bytes(2**21)
    (536870912, 1610612736, 2097152)
    """
    found = None
    if isinstance(memory, int) and not isinstance(memory, bool):
        found = memory
    elif isinstance(memory, str):
        parts = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]?)(?:i?B)?", memory.strip(), re.IGNORECASE)
        found = None if parts is None else int(float(parts[1]) * 1024 ** _UNITS[parts[2].upper()])
    if found is None or not 2**20 <= found <= 2**50:
        raise ValueError(f"memory must be a size from 1M to 1024T, like '512M' or '2G', got {seen(memory)}")
    return found


def seen(value: object) -> str:
    """A value as an error shows it: one line, not long.

    >>> seen([1, 2])
    '[1, 2]'
    """
    return " ".join(repr(value).split())[:80]


def as_numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """Finite numbers, one for each channel; None stays None.

    Raises:
        ValueError: something else.
    """
    if values is None:
        return None
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = (math.nan,)
    if isinstance(values, str | bytes) or not found or not all(map(math.isfinite, found)):
        raise ValueError(f"expected finite mean and std > 0, a number for each channel, got {name}={seen(values)}")
    return found


def problem(name: str, value: Any, hint: Any) -> str | None:
    """What is wrong with the value of an option, in words; None where nothing is."""
    try:
        # numpy's float64 is a float, but msgspec takes exactly Python's
        msgspec.convert(float(value) if isinstance(value, float) else value, hint)
    except (msgspec.ValidationError, RecursionError, TypeError, AttributeError) as error:  # the last two: no JSON type
        shown = seen(value)
        wanted = _words(hint)
        return f"{name} must be {wanted}, got {shown}" if wanted else f"{name}: {error}, got {shown}"
    return None


def _words(hint: Any) -> str:
    """A type and its range in words."""
    inner, meta = _range(hint)
    if get_origin(inner) in (Union, UnionType):
        others = [kind for kind in get_args(inner) if kind is not NoneType]
        words = [*map(_words, others), "None"]
        return ", or ".join(words) if all(words) else ""
    if get_origin(inner) is tuple:
        kinds = get_args(inner)
        each = _words(kinds[0])
        count = "" if kinds[-1] is Ellipsis else f"{len(kinds)} "
        return f"{count}values in a tuple, each {each}" if each else ""
    if get_origin(inner) is dict:
        each = _words(get_args(inner)[1])
        return f"a dict of names, each {each}" if each else ""
    if get_origin(inner) is Literal:
        return f"one of {', '.join(map(repr, get_args(inner)))}"
    if inner is bool:
        return "True or False"
    if inner is str:
        return "a string"
    if inner not in (int, float):
        return ""
    what = "a whole number" if inner is int else "a number"
    if meta is None:
        return what
    if meta.ge is not None and meta.le is not None:
        return f"{what} from {_number(meta.ge)} to {_number(meta.le)}"
    low = f"of at least {_number(meta.ge)}" if meta.ge is not None else f"above {_number(meta.gt)}"
    high = f"at most {_number(meta.le)}" if meta.le is not None else f"below {_number(meta.lt)}"
    return f"{what} {low} and {high}"


def shown_range(hint: Any) -> str | None:
    """A number's range as --help shows it, "1..255", "0<..1000", "0..<1|None"; None where there is no range."""
    inner, meta = _range(hint)
    if meta is not None:
        low = _number(meta.ge) if meta.ge is not None else f"{_number(meta.gt)}<"
        high = _number(meta.le) if meta.le is not None else f"<{_number(meta.lt)}"
        return f"{low}..{high}"
    if get_origin(inner) in (Union, UnionType):
        parts = ["None" if kind is NoneType else shown_range(kind) for kind in get_args(inner)]
        return "|".join(map(str, parts)) if all(parts) else None
    if get_origin(inner) is tuple:
        kinds = get_args(inner)
        each = shown_range(kinds[0])
        return each and (f"[{each} ...]" if kinds[-1] is Ellipsis else " ".join([each] * len(kinds)))
    return None


def _range(hint: Any) -> tuple[Any, Meta | None]:
    if get_origin(hint) is not Annotated:
        return hint, None
    inner, *extras = get_args(hint)
    return inner, next((extra for extra in extras if isinstance(extra, Meta)), None)


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) and value < 10**10 else f"{value or 0:g}"
