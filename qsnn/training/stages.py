"""Stages of a flow that leave a file each: what is done is not done again, what was stopped goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsnn.checkpoint import Named, load, read_recipe, resume_file, save
from qsnn.graph.recipe import recipe_of, set_recipe


class Stages:
    """Makes the networks of a flow one after the other, and keeps each in ``folder`` as NAME.safetensors.

    Beside how the network was made, a file says of which stage it is: its options, and the hash of the file that it
    continues from. A later start loads a file that says the same, and makes any other again.

    >>> import tempfile, qsnn
    >>> data, lines = qsnn.load_data("digits"), []
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for _ in range(2):
    ...         stages = Stages(folder, say=lambda line: lines.append(line.split()[:2]))
    ...         teacher = stages.run("teacher", lambda state: qsnn.create_model("study", data), model="study")
    ...         qann = stages.run("qann", lambda state: qsnn.quantize(teacher, data), parent=teacher, levels=2)
    >>> [name for name, word in lines], lines[-1], sorted(stages.seconds)
    (['teacher:', 'qann:', 'teacher:', 'qann:'], ['qann:', 'done'], [])

    Args:
        folder: where the files are; made where missing.
        device: where the networks are handed back.
        fresh: make every stage again, whatever is there.
        say: takes one line for each stage.
        model: what builds the float network, where it is not qsnn's own (see :func:`qsnn.load`).
        check: takes each network that is loaded, and its file, and raises where it does not fit the data.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        fresh: bool = False,
        say: Callable[[str], None] = print,
        model: Named | None = None,
        check: Callable[[nn.Module, Path], None] | None = None,
    ) -> None:
        self.folder, self.device, self.fresh, self.say = Path(folder), device, fresh, say
        self.model, self.check = model, check
        self.seconds: dict[str, float] = {}
        """Time of each stage that was made, not loaded [s]; the caller may add what else took time."""

    def path(self, name: str) -> Path:
        """The file of a stage."""
        return self.folder / f"{name}.safetensors"

    def run(
        self, name: str, make: Callable[[Path], nn.Module], *, parent: nn.Module | None = None, **options: Any
    ) -> nn.Module:
        """Return the network of a stage, as its file has it.

        Args:
            name: of the stage, and of its file.
            make: makes the network. It is given a path where :func:`qsnn.fit` and :func:`qsnn.distill` may keep the
                state of a training (``resume``), which is deleted when the stage is done.
            parent: the network of the stage before, as :meth:`run` returned it.
            options: all that the stage depends on besides, as JSON has it.
        """
        stage = {"parent": None if parent is None else recipe_of(parent)["sha256"], **options}
        path, state = self.path(name), resume_file(self.path(name), stage)
        if self.fresh:
            path.unlink(missing_ok=True)
            state.unlink(missing_ok=True)
        if path.exists() and _same(read_recipe(path).get("stage"), json.loads(json.dumps(stage))):
            self.say(f"{name}: done before, loaded {path}")
            return self._loaded(path)
        started = time.perf_counter()
        model = make(state)
        set_recipe(model, {**recipe_of(model), "stage": stage})
        save(model, path)
        state.unlink(missing_ok=True)
        self.seconds[name] = time.perf_counter() - started
        self.say(f"{name}: {self.seconds[name]:.1f} s, wrote {path}")
        return self._loaded(path)

    def _loaded(self, path: Path) -> nn.Module:
        model = load(path, model=self.model)
        if self.check is not None:
            self.check(model, path)
        return model.to(self.device)


def _same(before: Any, now: Any) -> bool:
    """Whether two stages are one; an option that only one of them names, and leaves off, came or went with a version.

    New options of the configs are off by default, 0, False, empty or None, and then change nothing.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_same(before.get(name), now.get(name)) if name in before and name in now
                   else not before.get(name) and not now.get(name) for name in {*before, *now})  # fmt: skip
    return bool(before == now)
