"""A stranger's checkpoint: which tensors are in it, under whatever names, and which of them a model takes."""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from qsnn.files import header, read_bytes
from qsnn.graph.arrived import QsnnWarning

Tensors = dict[str, Tensor]

_WRAPPERS = ("module", "_orig_mod")
"""What DataParallel, DDP and torch.compile put into a name, at its front or in its middle."""
_AVERAGED = ("ema", "swa", "average", "shadow")
"""In the name of a second copy of the weights, averaged over training."""
_NOISE = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")
"""Counters that change no answer: of batch norm (old files lack it), of thop, of AveragedModel."""
_DEPTH = 4
"""So many dictionaries deep a checkpoint is searched."""
_SCALAR: Any = np.float64(0).__reduce__()[0]  # type: ignore[index]
_SAFE: list[Any] = [
    argparse.Namespace, np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in "?bhilBHILefd"),
]  # fmt: skip
"""What else is read beside tensors: the options and the NumPy numbers that training scripts keep; none of it runs."""


def load_weights(model: nn.Module, path: str | Path, *, key: str | None = None) -> None:
    """Load a stranger's trained weights into ``model``, in place: all of them fit, or none is touched.

    The file is a safetensors file or what ``torch.save`` wrote (``.pt``, ``.pth``, ``.th``), saved on any device; only
    tensors are read, never code (``weights_only=True``). Dictionaries around the weights (``state_dict``, ``model``,
    ``net``, ...), names that DataParallel, DDP, ``torch.compile`` or a module around changed (``module.``,
    ``_orig_mod.``, ``backbone.``), and pruned, weight-normed or spectrally normed weights are undone.

    Args:
        model: a float network.
        path: the file.
        key: which weights, where a file holds several: a dictionary's key ("ema") or the front of the names
            ("encoder_q"). By default those that fit; of two that do, not the averaged ones, which is said.
    Raises:
        FileNotFoundError: no such file.
        TypeError: ``model`` is no network.
        ValueError: the file cannot be read, its names or shapes do not fit the model (both sides are shown), several
            sets of weights fit, or a value is NaN or infinite.
    Warns:
        QsnnWarning: the file holds more than was taken.

    >>> import tempfile
    >>> trained, model = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": nn.DataParallel(trained).state_dict(), "epoch": 3}, f"{folder}/best.pth")
    ...     load_weights(model, f"{folder}/best.pth")
    >>> torch.equal(model.weight, trained.weight)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; call load_weights(model, 'file')")
    where = f"cannot load {path} into {type(model).__name__}"
    content = read_checkpoint(path, where)
    want: Tensors = dict(model.state_dict())
    found: dict[str, Fit] = {}
    for name, tensors in _candidates(content):
        for prefix, fit in _fitting(tensors, want).items():
            label = f"{name}.{prefix}".strip(".")
            if key is None or key in label.split("."):
                found[label] = fit
    if not found:
        raise ValueError(f"{where}: {_why_not(dict(_candidates(content)), want, key)}")
    name = _chosen({label: fit.tensors for label, fit in found.items()}, path, where)
    tensors, left = found[name].tensors, found[name].left
    for tensor_name, value in tensors.items():
        _refuse_values(value, want[tensor_name], f"{where}: {tensor_name}")
    left = [n for n in left if not any(label and n.startswith(f"{label}.") for label in found)]
    if left and key is None:
        text = f"of {path} only what stands under {name!r} is taken; left out: {_listed(left)}"
        warnings.warn(text, QsnnWarning, stacklevel=2)
    model.load_state_dict(tensors, strict=False)  # all but counters is there: _fitting saw to it


@dataclass(frozen=True)
class Fit:
    """Tensors under a model's own names, and the names in the file that are not among them."""

    tensors: Tensors
    left: list[str]


def read_checkpoint(path: str | Path, where: str | None = None) -> dict[Any, Any]:
    """Return the dictionary in a file of weights; nothing in it is run.

    Args:
        path: a safetensors file, or what ``torch.save`` wrote.
        where: the front of the error.
    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or it holds no dictionary.
    """
    path, where = Path(path), where or f"cannot read {path}"
    raw = read_bytes(path)
    try:
        if header(raw) is not None:
            return load_tensors(raw)
        del raw
        with torch.serialization.safe_globals(_SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storage classes and of archives, which end below
            content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many kinds for a broken file
        raise ValueError(f"{where}: {_unreadable(error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a state_dict, got {type(content).__name__}")
    return dict(content)


def _unreadable(error: Exception) -> str:
    text = " ".join(str(error).split())
    again = "in the program that wrote it: torch.save(model.state_dict(), FILE)"
    if "TorchScript" in text:
        return f"it is a TorchScript archive, which is a program; {again}"
    if "GLOBAL" in text or "WeightsUnpickler" in text:
        found = re.search(r"GLOBAL ([\w.]+)", text)
        what = f" ({found[1]})" if found else ""
        return f"it holds Python objects{what} beside tensors, which are never run; {again}"
    return f"it is no file of weights, or a truncated or damaged one ({text[:150]}); copy it again, or {again}"


def _candidates(content: Mapping[Any, Any], name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    """Every dictionary of tensors, by the keys that lead to it."""
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in content.items():
        if isinstance(value, Mapping) and depth < _DEPTH:
            yield from _candidates(value, f"{name}.{key}".strip("."), depth + 1)


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _noise(name: str) -> bool:
    return name.rpartition(".")[2] in _NOISE


def _fitting(tensors: Tensors, want: Tensors) -> dict[str, Fit]:
    """The tensors under the model's own names, by the prefix that was taken off them; nothing where they do not fit."""
    targets = {_plain_name(name): name for name in want}
    if len(targets) < len(want):  # a model with a part that is really called "module"
        targets = {name: name for name in want}
    forms = [tensors, {_plain_name(name): value for name, value in tensors.items()}]
    with suppress(RuntimeError, IndexError):  # shapes that no layer can have made: then nothing fits
        forms.append(_values(forms[-1]))
    needed = {name for name in targets if not _noise(name)}
    for have in forms:
        found: dict[str, Fit] = {}
        for prefix, added in _prefixes(have, targets):
            inside = {
                added + name.removeprefix(prefix): value for name, value in have.items()
                if name.startswith(prefix) and not _noise(name)
            }  # fmt: skip
            same = needed == inside.keys() and all(
                want[targets[name]].shape == value.shape for name, value in inside.items()
            )
            if same and needed:
                counters = {
                    added + name.removeprefix(prefix): value for name, value in have.items() if name.startswith(prefix)
                }
                inside |= {n: v for n, v in counters.items() if n in targets and v.shape == want[targets[n]].shape}
                left = [name for name in have if not name.startswith(prefix) and not _noise(name)]
                found[prefix.strip(".")] = Fit({targets[name]: value for name, value in inside.items()}, left)
        if found:
            return found
    return {}


def _prefixes(have: Tensors, targets: Mapping[str, str]) -> list[tuple[str, str]]:
    """(taken off, put before) the names of a file, the likeliest first."""
    off: Counter[str] = Counter()
    on: Counter[str] = Counter()
    for names, others, count in ((have, targets, off), (targets, have, on)):
        for name in names:
            parts = name.split(".")
            for i in range(1, len(parts)):
                if ".".join(parts[i:]) in others:
                    count[".".join(parts[:i]) + "."] += 1
    return [("", ""), *((p, "") for p, _ in off.most_common(8)), *(("", p) for p, _ in on.most_common(2))]


def _values(tensors: Tensors) -> Tensors:
    """The weights that pruned and parametrized layers compute from what their checkpoint holds."""
    new = dict(tensors)

    def take(*names: str) -> list[Tensor] | None:
        return [new.pop(name).float() for name in names] if all(name in new for name in names) else None

    for name in tensors:
        at, _, last = name.rpartition(".")
        front = f"{at}." if at else ""
        if last.endswith("_orig"):
            plain = front + last.removesuffix("_orig")
            if (found := take(name, f"{plain}_mask")) is not None:  # torch.nn.utils.prune
                new[plain] = found[0] * found[1]
            elif (found := take(name, f"{plain}_u", f"{plain}_v")) is not None:  # spectral_norm, the older one
                new[plain] = found[0] / _sigma(*found)
        elif last.endswith("_g") and (found := take(name, f"{name.removesuffix('_g')}_v")) is not None:  # weight_norm
            new[front + last.removesuffix("_g")] = _weight_norm(*found)
        elif last in ("original0", "original") and ".parametrizations." in f".{at}":
            layer, _, plain = at.rpartition("parametrizations.")
            if (found := take(name, f"{at}.original1")) is not None:
                new[layer + plain] = _weight_norm(*found)
            elif (found := take(name, f"{at}.0._u", f"{at}.0._v")) is not None:
                new[layer + plain] = found[0] / _sigma(*found)
    return new


def _weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """g v / ‖v‖, the norm over every dimension that g has not."""
    dims = [i for i in range(v.dim()) if i >= g.dim() or g.shape[i] == 1]
    return v * (g / (v.square().sum(dims, keepdim=True) if dims else v.square()).sqrt())


def _sigma(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The largest singular value as the layer has it, u·W v."""
    matrix = weight.flatten(1) if weight.shape[0] == len(u) else weight.transpose(0, 1).flatten(1)
    return u @ (matrix @ v)


def _chosen(found: Mapping[str, Tensors], path: Any, where: str) -> str:
    names = list(found)
    plain = [name for name in names if not any(word in name.lower() for word in _AVERAGED)] or names
    first = {k: v for k, v in found[plain[0]].items() if not _noise(k)}
    others = [name for name in names if name != plain[0]]
    different = [name for name in others if any(not torch.equal(found[name][k], v) for k, v in first.items())]
    if any(name in plain for name in different):
        raise ValueError(
            f"{where}: {len(names)} sets of weights in it fit, {', '.join(map(repr, names))}; name one: "
            f"load_weights(model, path, key={names[0].rpartition('.')[2]!r})"
        )
    if different:
        warnings.warn(
            f"{path} holds weights under {plain[0]!r}, which are taken, and averaged ones under "
            f"{', '.join(map(repr, different))}: for those load_weights(model, path, "
            f"key={different[0].rpartition('.')[2]!r})",
            QsnnWarning,
            stacklevel=3,
        )
    return plain[0]


def _refuse_values(value: Tensor, target: Tensor, where: str) -> None:
    if target.is_floating_point() and not value.is_floating_point():
        raise ValueError(
            f"{where} holds {str(value.dtype).removeprefix('torch.')}, expected floats; load float weights"
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise ValueError(f"{where} holds {bad} values that are NaN or infinite; take an earlier checkpoint")


def _why_not(sets: Mapping[str, Tensors], want: Tensors, key: str | None) -> str:
    """Both sides' first names and counts, and what differs."""
    if not sets:
        return "expected a state_dict, the file holds no tensors under names"
    targets = {_plain_name(name): name for name in want if not _noise(name)}

    def closest(tensors: Tensors) -> Tensors:
        have = {_plain_name(name): value for name, value in tensors.items() if not _noise(name)}
        with suppress(RuntimeError, IndexError):
            have = _values(have)
        forms = [
            {on + name.removeprefix(off): v for name, v in have.items()} for off, on in _prefixes(have, targets)
        ]  # fmt: skip
        return max(forms, key=lambda form: len(targets.keys() & form.keys()))

    name, tensors = max(sets.items(), key=lambda item: len(targets.keys() & closest(item[1]).keys()))
    have = closest(tensors)
    shared = [n for n in have if n in targets]
    other = [n for n in shared if have[n].shape != want[targets[n]].shape]
    text = f"the file{f' (under {name!r})' if name else ''} holds {_listed(tensors)}; the network has {_listed(want)}"
    if key is not None:
        text += f"; nothing under key={key!r} fits"
    if not shared:
        return f"{text}; none of the names is the same: is it the network that was trained?"
    unknown, missing = [n for n in have if n not in targets], [n for n in targets if n not in have]
    if unknown:
        text += f"; not in the network: {_listed(unknown)}"
    if missing:
        text += f"; not in the file: {_listed(missing)}"
    if other:
        shapes = [
            f"{n} is {tuple(have[n].shape)} in the file and {tuple(want[targets[n]].shape)} in the network"
            for n in other[:3]
        ]
        text += f"; of another shape: {', '.join(shapes)}" + (f" and {len(other) - 3} more" if len(other) > 3 else "")
    return text


def _listed(names: Any) -> str:
    names = [name for name in names if not _noise(name)]
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
