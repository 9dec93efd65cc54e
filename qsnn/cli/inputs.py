"""What the commands share: files and data that are read, places that are written, options as --help shows them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from qsnn.checkpoint import check_data, load, read_recipe, save
from qsnn.data.images import Data
from qsnn.data.sources import NAMES, load_recorded
from qsnn.files import held, shown
from qsnn.graph.recipe import recipe_of, set_recipe
from qsnn.measure.accuracy import score
from qsnn.models.weights import load_weights
from qsnn.options import TaskName, hints_of, shown_range
from qsnn.training.processes import is_main, wait

_NOT_OPTIONS = ("name", "data", "shape", "num_classes", "seed", "pretrained", "function")
"""What a network is built from besides its options; the data and other options of the command line say it."""


def loaded(file: Path, models: Sequence[str], kinds: tuple[str, ...] | None = None) -> nn.Module:
    """The network of a file, which may name one of ``models`` as what builds it.

    Raises:
        ValueError: the file holds another kind than ``kinds``.
    """
    recipe = read_recipe(file)
    kind = recipe["kind"]
    # a spiking network from scratch is a student
    if kinds and kind not in kinds and not (recipe.get("spiking") and "student" in kinds):
        raise ValueError(f"{file} holds a {kind!r}; expected {' or '.join(map(repr, kinds))}")
    return load(file, model=models if ":" in recipe["model"]["name"] else None)


def refuse_idle(models: Sequence[str], files: Sequence[Path]) -> None:
    """Refuse a ``--model`` that none of the files names.

    Raises:
        ValueError: which.
    """
    named = {read_recipe(file)["model"]["name"] for file in files} if models else set()
    for model in models:
        if model not in named:
            names = ", ".join(shown(name) for name in sorted(named))
            raise ValueError(f"--model {model} is named by none of the files, which name {names}; leave it away")


def data_of(model: nn.Module, file: Path, root: Path | None, given: str | None = None) -> Data:
    """The data set that a network's file was made for; see :func:`data_for`."""
    return data_for(recipe_of(model), file, root, given)


def data_for(recipe: dict[str, Any], file: Path, root: Path | None, given: str | None = None) -> Data:
    """The data set that a file was made for, and nothing but that: what differs is refused.

    Args:
        recipe: of the file.
        file: what messages begin with.
        root: of the data sets.
        given: the folder of images, where the file names one: no folder is read that only a file names.
    Raises:
        ValueError: the file names no data set, or a folder that is not given; classes, normalisation or image shape
            are not those that it was trained on.
    """
    name = recipe.get("data", {}).get("name")
    if name is None and given is None:
        raise ValueError(f"{file} does not say which data set it was made for; name it with --data")
    if given is None and name not in NAMES:
        raise ValueError(f"{file} was made for the images in {shown(str(name))!r}; if you trust it, add --data FOLDER")
    if given is not None and name in NAMES and given != name:
        raise ValueError(f"{file} was made for the data set {name!r}, got --data {given}; leave it away")
    data = load_recorded(recipe.get("data", {}), recipe.get("input_shape"), root=root, folder=given)
    check_data(recipe, data, file)
    return data


def model_options(words: Sequence[str]) -> dict[str, Any]:
    """Options of a network as they are typed: ``attention=channel widths=[16,32]`` are a string and a list.

    Raises:
        ValueError: a word without "=", an option given twice, or one that the data or the command line decides.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"expected --model-options as NAME=VALUE, like attention=channel, got {word!r}")
        if name in found:
            raise ValueError(f"--model-options gives {name} twice; leave one away")
        if name in _NOT_OPTIONS:
            raise ValueError(f"--model-options cannot set {name}; it follows from --model, --data and --seed")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def load_trained_(model: nn.Module, weights: Path | None, key: str | None) -> bool:
    """Load a stranger's weights into a network, in place, where there are some; return whether there are.

    Raises:
        ValueError: see :func:`qsnn.load_weights`; or a key without a file.
    """
    if weights is None:
        if key is not None:
            raise ValueError(f"--key {key} says which of several weights in a file is meant; add --weights FILE")
        return False
    load_weights(model, weights, key=key)
    return True


def set_task_(model: nn.Module, task: TaskName | None) -> TaskName | None:
    """Record on a network what it is asked, where that is said; return what is recorded."""
    if task is not None:
        set_recipe(model, {**recipe_of(model), "task": task})
    return recipe_of(model).get("task")


def show_ranges(*configs: type) -> None:
    """Let --help show the range of each number in the place of its type: "1..255" for INT."""
    for config in configs:
        for name, hint in hints_of(config).items():
            text = shown_range(hint)
            if text:
                config.__annotations__[name] = Annotated[hint, tyro.conf.arg(metavar=text)]


def held_by_first(out: Path) -> AbstractContextManager[None]:
    """Hold the output while the block runs, in the first process, so that no other run writes it."""
    return held(out) if is_main() else nullcontext()


def write_model(model: nn.Module, out: Path, data: Data) -> None:
    """Write the file, from the first process, and say so."""
    if is_main():
        save(model, out)
        print(f"wrote {out} (validation {score(model, data.val, recipe_of(model).get('task'))})")


def finish(state: Path) -> None:
    """The training is over and its result written: its state goes."""
    if is_main():
        state.unlink(missing_ok=True)
    wait()
