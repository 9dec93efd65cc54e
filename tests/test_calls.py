"""Strange calls of the Python interface: a result, or one line that names what was expected; nothing from the inside.

A few run with the other tests; ``pytest -m fuzz tests/test_calls.py`` makes 500 (QSNN_FUZZ_CALLS, QSNN_FUZZ_SEED).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import random
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_fuzz import GOLDEN, SECONDS, SEED, STRANGE, at_most
from torch import nn

import qsnn
from qsnn.snn.equations import Dynamics

CALLS = int(os.environ.get("QSNN_FUZZ_CALLS", "500"))
OURS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
"""What the package raises for wrong input, as the docstrings say."""
FROM_INSIDE = re.compile(
    r"object is not|not subscriptable|unsupported operand|has no len|not supported between|has no attribute|"
    r"unhashable|bad operand|can't multiply|must be a (string|real number)|object cannot be interpreted|not iterable"
)
"""What Python says where something was used as what it is not."""
NOT_CALLED = {"Benchmark", "Certificate", "Gate", "QsnnWarning", "Record", "Summary"} | {
    name for name in qsnn.__all__ if name.endswith("Config")
}
"""Results, which are plain dataclasses; configs, whose every option test_fuzz.py asks for."""


def usual(folder: Path, data: qsnn.Data) -> dict[str, dict[str, Any]]:
    """For each public name a call that does something, by the names of its parameters, the optional ones among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        qann, snn = qsnn.load(GOLDEN / "qann.safetensors"), qsnn.load(GOLDEN / "snn.safetensors")
        student, folded = qsnn.load(GOLDEN / "student.safetensors"), qsnn.load(GOLDEN / "folded.safetensors")
    few, teacher = data.test.head(8), qsnn.create_model("study", data)  # type: ignore[attr-defined]
    small = qsnn.Data(
        name="digits", train=data.train.head(32), val=few, test=few, mean=data.mean, std=data.std,  # type: ignore
        classes=data.classes,
    )  # fmt: skip
    train, taught = qsnn.TrainConfig(epochs=1, batch_size=16), qsnn.DistillConfig(epochs=1, batch_size=16)
    layer = next(m for m in qann.modules() if hasattr(m, "weight_quant"))
    file = folder / "file"
    return {
        "SNN": {"network": snn.network, "timesteps": 2, "firing": "online", "folded": False},
        "IFNode": {"threshold": 1.0, "initial": 0.5, "dynamics": Dynamics(), "surrogate": "box", "step_mode": "m"},
        "Data": {"name": "x", "train": few, "val": few, "test": few, "mean": (0.5,), "std": (0.5,), "classes": ("a",)},
        "accuracy": {"model": snn, "source": few, "batch_size": 4, "task": "classification", "memory": "64M"},
        "as_qann": {"student": student, "qann": qann},
        "batches": {"data": few, "batch_size": 4, "augment": "none", "device": "cpu", "share": (0, 1)},
        "benchmark": {
            "model": snn, "loader": few, "timesteps": 2, "firing": "online", "name": "x", "reference": qann,
            "exit_margin": 0.5, "batch_size": 4, "memory": "64M", "task": "classification",
        },
        "certify": {
            "snn": folded, "qann": qann, "loader": few, "timesteps": 2, "firing": "deferred", "images": 4,
            "batch_size": 4, "memory": "64M",
        },
        "check": {"model": teacher, "data": small, "config": qsnn.QuantizeConfig(), "timesteps": 2, "seconds": 0.1},
        "convert": {"model": qann, "data": small, "config": qsnn.ConvertConfig(), "timesteps": (1, 2)},
        "create_model": {"name": "vgg-small", "data": small, "seed": 0, "pooling": "avg"},
        "distill": {"student": snn, "teacher": qann, "data": small, "config": taught, "label": "x", "memory": "64M"},
        "distill_together": {"student": snn, "teacher": qann, "data": small, "config": taught, "task": None},
        "export": {"folded": folded, "path": file, "format": "c", "firing": "deferred"},
        "fit": {
            "model": teacher, "data": small, "config": train, "teacher": qann, "loss": None, "task": "classification",
            "after_step": None, "resume": file, "tensorboard": None, "label": "x", "memory": "64M",
        },
        "fold": {"snn": snn, "dtype": torch.float64},
        "from_arrays": {
            "inputs": np.random.randn(40, 6), "targets": np.arange(40) % 3, "val_fraction": 0.2, "seed": 0,
            "mean": [0.0] * 6, "std": [1.0] * 6, "classes": ["a", "b", "c"], "name": "x",
        },
        "from_nir": {"path": file},
        "integer_weights": {"layer": layer},
        "load": {"path": GOLDEN / "qann.safetensors", "model": None, "parent": GOLDEN / "teacher.safetensors"},
        "load_data": {"name": "digits", "root": folder, "val_fraction": 0.1, "seed": 0, "mean": (0.5,), "std": (0.5,)},
        "load_weights": {"model": teacher, "path": GOLDEN / "teacher.safetensors", "key": "model"},
        "quantize": {"model": teacher, "data": small, "config": qsnn.QuantizeConfig(), "memory": "64M"},
        "read_recipe": {"path": GOLDEN / "qann.safetensors"},
        "save": {"model": qann, "path": file},
        "summary": {"model": qann, "shape": (1, 8, 8)},
    }  # fmt: skip


def strange_call(calls: dict[str, dict[str, Any]], draw: random.Random) -> tuple[str, dict[str, Any]]:
    """One of the usual calls with one to three arguments made strange, swapped, left out or added."""
    name = draw.choice(sorted(calls))
    given = dict(calls[name])
    others = [value for call in calls.values() for value in call.values()]
    foreign = (
        *STRANGE, nn.Linear, nn.Linear(3, 2), nn.Sequential(), lambda *args: None, np.zeros((2, 3)), np.float32(1),
        torch.zeros(2, 3, 4), torch.zeros(0), iter(()), range(3), {1, 2}, Exception("x"), qsnn, print, type, ...,
        [(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())], [(None, None)], [nn.ReLU()], {"model": None},
        torch.device("cpu"), torch.float16, np.array(["a"]), torch.zeros(2, 1, 8, 8, requires_grad=True),
    )  # fmt: skip
    for _ in range(draw.choice((1, 1, 2, 3))):
        at, how = draw.choice(sorted(given)) if given else "", draw.randrange(8)
        if how == 0 and len(given) > 1:
            other = draw.choice(sorted(given))
            given[at], given[other] = given[other], given[at]
        elif how == 1 and at:
            del given[at]
        elif how == 2:
            given[draw.choice(("nope", "timesteps", "device", "config", "images"))] = draw.choice(foreign)
        elif at:
            given[at] = draw.choice(others if how < 5 else foreign)
    return name, given


def complaint(error: BaseException, given: dict[str, Any]) -> str | None:
    """Why an error is none of ours: its type, its text, or where it comes from; None where nothing is wrong."""
    text = str(error)
    if not isinstance(error, OURS) or isinstance(error, UnicodeError):
        return "another type"
    if not text or "\n" in text:
        return "no line"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TypeError) and re.search(r"(unexpected keyword|missing \d+|multiple values|positional)", text):
        named = re.search(r"keyword argument '(\w+)'", text)
        return None if len(frames) <= 3 or (named and named[1] in given) else "a wrong call inside"
    if FROM_INSIDE.search(text) and not re.search(r"expected|must be|must hold", text):
        return "from the inside"
    return None


def calls_refused(folder: Path, count: int, patch: pytest.MonkeyPatch, seed: str = "") -> Counter[str]:
    patch.chdir(folder)
    patch.setenv("HOME", str(folder))
    draw, outcomes, wrong = random.Random(f"calls {SEED} {seed}"), Counter[str](), []
    calls = usual(folder, qsnn.load_data("digits"))
    for place in range(count):
        name, given = strange_call(calls, draw)
        function: Callable[..., Any] = getattr(qsnn, name)
        said = f"{place}: {name}({', '.join(f'{key}={str(value)[:40]!r}' for key, value in given.items())})"
        with contextlib.redirect_stdout(io.StringIO()), at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = function(**given)
                if name == "batches":
                    next(found)
            except Exception as error:
                why = complaint(error, given)
                if why is not None:
                    wrong.append(f"{said} -> {why}: {type(error).__name__}: {str(error)[:200]!r}")
                outcomes["refused"] += 1
                continue
        outcomes["done"] += 1
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    return outcomes


def test_every_public_verb_is_called(tmp_path: Path, digits: qsnn.Data) -> None:
    calls = usual(tmp_path, digits)
    assert set(calls) == set(qsnn.__all__) - NOT_CALLED
    for name, given in calls.items():
        with contextlib.suppress(ValueError):  # of classes without a signature
            parameters = inspect.signature(getattr(qsnn, name)).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            assert open_ended or set(given) <= set(parameters), name


def test_strange_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_refused(tmp_path, 40, monkeypatch).total() == 40


@pytest.mark.fuzz
def test_many_strange_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = calls_refused(tmp_path, CALLS, monkeypatch, "many")
    with capsys.disabled():
        print(f"\n{CALLS:,} calls: {dict(found)}")
