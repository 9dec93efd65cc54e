"""save() and load(): safetensors with the recipe of the model in the metadata; never pickle."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from qsnn.convert import ConvertConfig, spiking_structure
from qsnn.fold import fold
from qsnn.graph import recipe_of, set_recipe
from qsnn.loop import TimeLoop
from qsnn.models import build_model
from qsnn.neurons import IFNode
from qsnn.quantize import QuantizeConfig, quantized_structure
from qsnn.quantizers import level_quant
from qsnn.records import write_atomic

_KEY = "qsnn"
_PARALLEL = "module."
"""What DataParallel and DDP put before every name."""
KINDS = ("teacher", "qann", "snn", "student", "folded")


def save(model: nn.Module, path: str | Path, *, model_name: str | None = None) -> str:
    """Write a model to a safetensors file and return the file's SHA-256.

    The metadata hold how to build the model again: its name, every config that made it, the data set's name and
    normalisation, and the hash of the file it was made from. The file is written beside and renamed.

    Args:
        model: from any of qsnn's verbs.
        path: the file, usually ``*.safetensors``.
        model_name: ``package.module:function`` that builds the float network, for a model of your own.
    Raises:
        ValueError: it is not known how to build the model again, or the file is a folder.
    """
    _refuse_folder(path)
    recipe = recipe_of(model)
    if model_name is not None:
        recipe["model"] = {"name": model_name, "options": {}}
    if not recipe.get("model"):
        raise ValueError(
            f"do not know how to build this {type(model).__name__} again; name a function that does: "
            f"save(model, path, model_name='package.module:function')"
        )
    recipe.setdefault("kind", "teacher")
    recipe.pop("sha256", None)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    raw = save_tensors(tensors, {_KEY: json.dumps(recipe)})
    write_atomic(path, raw)
    return hashlib.sha256(raw).hexdigest()


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the recipe in a file's metadata, and the file's own hash as ``sha256``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, no safetensors file, or not written by qsnn.
    """
    return _read(path)[0]


def load(path: str | Path) -> nn.Module:
    """Build the model of a file that :func:`save` wrote, in eval mode; its outputs are bit-equal to the saved one's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, not written by qsnn, or does not fit the model it names.
    """
    recipe, tensors = _read(path)
    with torch.random.fork_rng():  # new layers draw weights, which are overwritten
        model = _build(recipe, tensors)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(f"{path} does not fit the model {recipe['model']['name']!r} it names:{first[0]}") from error
    model.eval()
    set_recipe(model, recipe)
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a float state_dict, a safetensors file or a ``torch.save`` of tensors alone, into ``model``, in place.

    A ``module.`` before every name, which DataParallel and DDP leave there, is taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or its names or shapes do not fit the model.
    """
    raw = _bytes(path)
    try:
        if _header(raw) is not None:
            tensors: Any = load_tensors(raw)
        else:
            tensors = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(tensors, dict):
            raise ValueError(f"expected a state_dict, got {type(tensors).__name__}")
        tensors = tensors.get("state_dict", tensors)
        if tensors and all(str(name).startswith(_PARALLEL) for name in tensors):
            tensors = {name.removeprefix(_PARALLEL): value for name, value in tensors.items()}
        model.load_state_dict(tensors)
    except Exception as error:  # torch.load raises many kinds for a broken file
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot load {path} into {type(model).__name__}: {reason}") from error


def resume_file(path: str | Path, *key: Any) -> Path:
    """Return where a training run that ends in ``path`` keeps its state between epochs; make the folder.

    The same command finds it again; a run of another model, data set or option finds none, and starts from the start.

    Args:
        path: the file that the run will write.
        key: all that the run depends on; what JSON has no word for counts by its ``repr``.
    Raises:
        ValueError: ``path`` is a folder (said before hours of training, not after).
    """
    _refuse_folder(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=repr).encode()).hexdigest()[:12]
    return path.with_name(f".{path.name}.{digest}.resume")


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        FileNotFoundError: no such file.
    """
    return hashlib.sha256(_bytes(path)).hexdigest()


def _refuse_folder(path: str | Path) -> None:
    if Path(path).is_dir():
        raise ValueError(f"expected a file to write, {path} is a folder; name a file in it")


def _build(recipe: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The structure a recipe describes, with weights and steps still to be loaded."""
    spec, shape = recipe["model"], recipe.get("input_shape")
    classes = recipe.get("num_classes") or len(recipe.get("data", {}).get("classes", ())) or None
    model = build_model(spec["name"], None if shape is None else tuple(shape), classes, **spec.get("options", {}))
    set_recipe(model, {**recipe, "kind": "teacher"})
    if recipe["kind"] == "teacher" or recipe.get("spiking"):
        if isinstance(model, TimeLoop):
            model.timesteps = recipe.get("convert", {}).get("timesteps", model.timesteps)
        return model
    if "quantize" in recipe:
        model = quantized_structure(model, QuantizeConfig(**recipe["quantize"]))
    if recipe["kind"] == "qann":
        return model
    for name, module in model.named_modules():
        quant = level_quant(module)
        if quant is not None:
            step = tensors.get(f"network.{name}.step", torch.ones(()))  # any step builds the same spiking network
            quant.scaling_impl.value.data.fill_(float(step) * quant.levels)
    snn = spiking_structure(model, ConvertConfig(**recipe["convert"]))
    for name, neuron in snn.neurons():  # a θ a channel; and fold joins spikes as integers only where θ is the same
        for what in ("threshold", "initial", "tau"):  # a trained one may be a value a channel
            value = tensors.get(f"network.{name}.{what}")
            if value is not None and isinstance(neuron, IFNode):
                getattr(neuron, what).data = value.clone()
    return fold(snn) if recipe["kind"] == "folded" else snn


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def _header(raw: bytes) -> dict[str, Any] | None:
    """The JSON header of a safetensors file, or None where there is none."""
    if len(raw) < 8:
        return None
    (size,) = struct.unpack("<Q", raw[:8])
    try:
        header = json.loads(raw[8 : 8 + size]) if size < 100_000_000 else None
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    raw = _bytes(path)
    header = _header(raw)
    if header is None:
        raise ValueError(f"{path} is no safetensors file, or a truncated one ({len(raw)} bytes)")
    text = (header.get("__metadata__") or {}).get(_KEY)
    if text is None:
        raise ValueError(
            f"{path} was not written by qsnn; for weights of your own: qsnn train --model ... --weights {path}"
        )
    try:
        tensors = load_tensors(raw)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); make it again") from error
    recipe = json.loads(text)
    if recipe.get("kind") not in KINDS:
        raise ValueError(f"{path} holds a {recipe.get('kind')!r}, which this version does not know; expected {KINDS}")
    return {**recipe, "sha256": hashlib.sha256(raw).hexdigest()}, tensors
