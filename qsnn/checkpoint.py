"""save() and load(): safetensors with the recipe of the model in the metadata; never pickle, and no code of a file."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from qsnn.contents import check_header, check_recipe, check_size, check_state, check_values
from qsnn.data.fitting import enough_outputs
from qsnn.files import header, metadata, opened, read_bytes, sealed, shown, target_of, unsealed, write_atomic
from qsnn.folded.fold import folded_structure
from qsnn.folded.prepared import PREPARED
from qsnn.graph.arrived import QsnnWarning, arrived, mark_frozen_norms_
from qsnn.graph.recipe import input_shape_of, recipe_of, set_recipe
from qsnn.graph.trace import value_shapes
from qsnn.models.create import build_model
from qsnn.models.spiking import SPIKING
from qsnn.models.weights import load_weights as load_weights
from qsnn.quant.activations import level_quant
from qsnn.quant.quantize import QuantizeConfig, quantized_structure
from qsnn.snn.config import ConvertConfig
from qsnn.snn.network import SNN, TimeLoop
from qsnn.snn.neurons import IFNode
from qsnn.snn.structure import spiking_structure

_KEY = "qsnn"
Named = str | Callable[..., nn.Module]
"""A model of one's own: its function, or "package.module:function"."""


def save(model: nn.Module, path: str | Path, *, model_name: str | None = None) -> str:
    """Write a model to a safetensors file and return the file's SHA-256.

    The metadata hold how to build the model again: its name, every config that made it, the data set's name and
    normalisation, the hash of the file it was made from, and a checksum of the whole. The file is written beside and
    renamed.

    >>> import tempfile, qsnn
    >>> model = qsnn.create_model("study", qsnn.load_data("digits"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     digest = qsnn.save(model, f"{folder}/teacher.safetensors")
    ...     qsnn.read_recipe(f"{folder}/teacher.safetensors")["sha256"] == digest
    True

    Args:
        model: from any of qsnn's verbs.
        path: the file, usually ``*.safetensors``.
        model_name: ``package.module:function`` that builds the float network, for a model of your own.
    Raises:
        TypeError: ``model`` is no network, or ``path`` no path.
        ValueError: it is not known how to build the model again, it holds NaN or infinity, or the file is a folder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; call save(model, 'file.safetensors')")
    target_of(path)
    model = arrived(model)
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
    try:
        check_recipe(json.loads(json.dumps(recipe)))
        check_values(tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not written, because the model {error}") from error
    raw = sealed(save_tensors(tensors, {_KEY: unsealed(recipe)}))
    write_atomic(path, raw)
    return hashlib.sha256(raw).hexdigest()


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the recipe in a file's metadata, and the file's own hash as ``sha256``.

    Warns:
        UserWarning: the file has no checksum; it is of a version before.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, no safetensors file, or not written by qsnn.
    """
    return _read(path)[0]


def load(
    path: str | Path, *, model: Named | Sequence[Named] | None = None, parent: str | Path | None = None
) -> nn.Module:
    """Build the model of a file that :func:`save` wrote, in eval mode; its outputs are bit-equal to the saved one's.

    A file is data: nothing that it names is imported or called, but what the caller names too.

    >>> import tempfile, qsnn
    >>> model = qsnn.create_model("study", qsnn.load_data("digits")).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     digest = qsnn.save(model, f"{folder}/teacher.safetensors")
    ...     loaded = qsnn.load(f"{folder}/teacher.safetensors")
    >>> image = qsnn.load_data("digits").test[0][0][None]
    >>> bool((loaded(image) == model(image)).all())
    True

    Args:
        path: the file.
        model: for a network that is not qsnn's own, the function that builds it, or its name as
            ``package.module:function``; or several, of which the file names one.
        parent: the file that this one was made from; it must be the very one.
    Warns:
        UserWarning: the file has no checksum; it is of a version before.
    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, not written by qsnn, does not fit the model it names, or names a model that
            the caller does not.
    """
    recipe, tensors = _read(path)
    if parent is not None and recipe.get("parent") != file_hash(parent):
        raise ValueError(f"{path} was not made from {parent}, but from a file with the SHA-256 {recipe.get('parent')}")
    function = _allowed(path, recipe["model"]["name"], model)
    name = recipe["model"]["name"]
    try:
        check_size(check_recipe({key: value for key, value in recipe.items() if key != "sha256"}), tensors)
        with torch.random.fork_rng():  # new layers draw weights, which are overwritten
            built = _build(recipe, tensors, function)
        check_state(built, tensors, name)
        built.load_state_dict(tensors)
        mark_frozen_norms_(built)  # by the function that built it
        built.eval()
        set_recipe(built, recipe)
        _answers(built, recipe)
    except Exception as error:  # whatever a file of a stranger makes the builders say, its name comes first
        raise ValueError(f"{path} {shown(' '.join(str(error).split()))}") from error
    return built


def _allowed(path: str | Path, name: str, given: Named | Sequence[Named] | None) -> Named | None:
    """What the caller gave for the model that a file names; None for one of ours."""
    named: Sequence[Any] = [] if given is None else [given] if isinstance(given, str) or callable(given) else given
    for one in named if isinstance(named, list | tuple) else [named]:
        if not isinstance(one, str) and not callable(one):
            raise TypeError(
                f"expected a function that builds the model, or its name, got {type(one).__name__}; call load(path, "
                f"model=function)"
            )
    wanted = shown(name)
    if ":" not in name:
        if named:
            raise ValueError(f"{path} holds qsnn's own model {wanted!r}; leave model= (--model) away")
        return None
    for one in named:
        if one == name if isinstance(one, str) else _is_named(one, name):
            return one  # type: ignore[no-any-return]
    got = ", ".join(one if isinstance(one, str) else getattr(one, "__qualname__", repr(one)) for one in named)
    raise ValueError(
        f"{path} is built by {wanted!r}, which is not qsnn's own{f', and not by {got}' if got else ''}; if you trust "
        f"it, name it: load(path, model=function), or --model {wanted}"
    )


def _is_named(function: Callable[..., Any], name: str) -> bool:
    """Whether a function is what ``package.module:function`` names; nothing is imported."""
    module, _, attribute = name.partition(":")
    if module in sys.modules and vars(sys.modules[module]).get(attribute) is function:
        return True  # also one that the module has from elsewhere
    place, own = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return own == attribute and place in (module, "__main__")  # a script is __main__ when it runs


def _answers(model: nn.Module, recipe: dict[str, Any]) -> None:
    """One black image goes through: tensors that each have a right shape may still not fit together."""
    shape, classes = recipe.get("input_shape"), recipe.get("num_classes")
    if not shape or math.prod(shape) == 0:
        return
    device = next((value.device for value in model.state_dict().values()), None)
    with torch.no_grad():
        image = torch.zeros(1, *shape, device=device)
        # an integer form makes its tables now; those of a stranger's T might fill the memory
        ready = isinstance(model, SNN) and model.folded and model.timesteps <= PREPARED
        steps = {"timesteps": model.timesteps if ready else 1} if isinstance(model, SNN | TimeLoop) else {}
        logits = model(image, **steps)
    axis = 2 if isinstance(model, SNN | TimeLoop) else 1
    known = isinstance(logits, torch.Tensor) and logits.dim() > axis
    if classes is not None and known and not enough_outputs(logits.shape[axis], classes):
        raise ValueError(f"does not answer with {classes} classes")


def check_data(recipe: dict[str, Any], data: Any, path: str | Path) -> None:
    """Refuse data that a network was not trained for: other classes, another normalisation or image shape.

    Args:
        recipe: of the network.
        data: a :class:`~qsnn.Data`.
        path: of its file, which messages begin with.
    Raises:
        ValueError: what differs.
    """
    asked, name = recipe.get("data") or {}, shown(str(data.name))
    classes, found = list(asked.get("classes", data.classes)), list(data.classes)
    if classes != found:
        odd = {"without": [c for c in classes if c not in found], "with": [c for c in found if c not in classes]}
        differ = [f"{what} {', '.join(map(shown, some[:5]))}" for what, some in odd.items() if some]
        raise ValueError(
            f"{path} was trained for {len(classes)} classes, and {name} has {len(found)}, "
            f"{' and '.join(differ) or 'in another order'}; name them as they were, or train again"
        )
    for what in ("mean", "std"):
        old, new = list(asked.get(what, getattr(data, what))), list(getattr(data, what))
        if len(old) != len(new) or any(abs(a - b) > 1e-6 for a, b in zip(old, new, strict=True)):
            raise ValueError(f"{path} was trained on images with the {what} {old}, and {name} has {new}; train again")
    shape = recipe.get("input_shape")
    if shape is not None and tuple(shape) != tuple(data.shape):
        raise ValueError(f"{path} was trained on images of {tuple(shape)}, and {name} has {tuple(data.shape)}")


def resume_file(path: str | Path, *key: Any) -> Path:
    """Return where a training run that ends in ``path`` keeps its state between epochs; make the folder.

    The same command finds it again; a run of another model, data set or option finds none, and starts from the start.

    Args:
        path: the file that the run will write.
        key: all that the run depends on; what JSON has no word for counts by its ``repr``.
    Raises:
        ValueError: ``path`` cannot be written (said before hours of training, not after).
    """
    path = target_of(path)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=repr).encode()).hexdigest()[:12]
    return path.with_name(f".{path.name}.{digest}.resume")


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        FileNotFoundError: no such file.
    """
    return hashlib.sha256(read_bytes(path)).hexdigest()


def _build(recipe: dict[str, Any], tensors: dict[str, torch.Tensor], function: Named | None) -> nn.Module:
    """The structure a recipe describes, with weights and steps still to be loaded."""
    spec, shape = recipe["model"], recipe.get("input_shape")
    classes = recipe.get("num_classes") or len(recipe.get("data", {}).get("classes", ())) or None
    model = build_model(
        spec["name"], None if shape is None else tuple(shape), classes,
        function=None if isinstance(function, str) else function, **spec.get("options", {}),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QsnnWarning)  # another precision was said when the file was made
        model = arrived(model)  # as the verbs took it then: unwrapped, with plain parameters
    set_recipe(model, {**recipe, "kind": "teacher"})
    if recipe.get("spiking") and isinstance(model, SNN | TimeLoop):
        model.timesteps = recipe.get("convert", {}).get("timesteps", model.timesteps)
    if isinstance(model, SNN):  # one that came in as a spiking network (from_nir)
        return _with_thresholds(model, recipe, tensors)
    if recipe["kind"] == "teacher" or recipe.get("spiking"):
        return model
    if "quantize" in recipe:
        model = quantized_structure(model, QuantizeConfig(**recipe["quantize"]), tuple(shape or ()))
    if recipe["kind"] == "qann":
        return model
    for name, module in model.named_modules():
        quant = level_quant(module)
        if quant is not None:
            step = tensors.get(f"network.{name}.step", torch.ones(()))  # any step builds the same spiking network
            quant.set_threshold_(float(step) * quant.levels)
    snn = spiking_structure(model, ConvertConfig(**recipe["convert"]), tuple(shape or ()))
    return _with_thresholds(snn, recipe, tensors)


def _with_thresholds(snn: SNN, recipe: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SNN:
    """The spiking network with thresholds of the file's shapes, folded where the file's is."""
    shapes = value_shapes(snn.network, input_shape_of(snn)) if recipe["kind"] == "folded" else {}
    nodes = {str(node.target): node.name for node in snn.network.graph.nodes} if shapes else {}
    for name, neuron in snn.neurons():  # a θ a channel; and fold joins spikes as integers only where θ is the same
        for what in ("threshold", "initial", "tau"):  # a trained one may be a value a channel
            value = tensors.get(f"network.{name}.{what}")
            if value is not None and isinstance(neuron, IFNode):
                channels = shapes.get(nodes.get(name, ""), (0, 0))[1]
                if value.dim() and value.shape[-1] > channels > 0:  # where the bias is a map, fold spreads v0 too
                    value = value.unflatten(-1, (channels, -1))[..., 0]
                getattr(neuron, what).data = value.clone()
    return folded_structure(snn) if recipe["kind"] == "folded" else snn


def _renamed(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the names of today: "qkformer" was a spiking network before it was an ANN."""
    model = recipe.get("model")
    name = f"spiking-{model.get('name')}" if isinstance(model, dict) and recipe.get("spiking") is True else ""
    return {**recipe, "model": {**model, "name": name}} if isinstance(model, dict) and name in SPIKING else recipe


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The recipe and the tensors of a file, each checked for what it is, but not for whether they fit each other."""
    raw = read_bytes(path)
    found = header(raw)
    if found is None:
        raise ValueError(f"{path} is no safetensors file, or a truncated one ({len(raw)} bytes)")
    text = metadata(found, _KEY)
    if text is None:
        raise ValueError(
            f"{path} was not written by qsnn; for weights of your own: qsnn train --model ... --weights {path}"
        )
    try:
        check_header(found)
        tensors = load_tensors(raw)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({shown(str(error))}); make it again") from error
    except ValueError as error:
        raise ValueError(f"{path} {shown(str(error))}") from error
    recipe = _renamed(opened(path, raw, text))
    try:
        check_recipe(recipe)
        check_values(tensors)
    except ValueError as error:
        raise ValueError(f"{path} {shown(str(error))}") from error
    return {**recipe, "sha256": hashlib.sha256(raw).hexdigest()}, tensors
