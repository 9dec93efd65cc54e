"""What a checkpoint may hold: one schema for its metadata, one rule for its tensors; nothing of it is called or run."""

from __future__ import annotations

import inspect
import math
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn

from qsnn.models.create import MODELS, build_model
from qsnn.models.spiking import SPIKING, build_spiking
from qsnn.options import CONFIGS, TaskName, Timesteps, WeightBits, config_class, problem

KINDS = ("teacher", "qann", "snn", "student", "folded")
LARGEST_IMAGE = 2**22
"""Largest number of values C·H·W of one image that a file may ask for."""

_Hash = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Name = Annotated[str, Meta(min_length=1, max_length=4096)]
_Real = Annotated[float, Meta(ge=-1e30, le=1e30)]
_Positive = Annotated[float, Meta(gt=0, le=1e30)]
_Side = Annotated[int, Meta(ge=1, le=LARGEST_IMAGE)]
_Classes = Annotated[int, Meta(ge=1, le=2**20)]


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    """The float network: its name, or package.module:function, and what the function takes."""

    name: Annotated[str, Meta(min_length=1, max_length=200)]
    options: dict[str, Any] = {}


class _Data(msgspec.Struct, forbid_unknown_fields=True):
    """The data set that a network was trained on."""

    name: _Name
    mean: list[_Real]
    std: list[_Positive]
    classes: Annotated[list[_Name], Meta(max_length=2**20)]
    frames: Timesteps | None = None


class Recipe(msgspec.Struct, forbid_unknown_fields=True):
    """Every key of the metadata; what a verb adds to a recipe gets its line here, or ``save`` refuses it."""

    kind: str
    model: _Model
    input_shape: Annotated[list[_Side], Meta(min_length=1, max_length=4)] | None = None
    num_classes: _Classes | None = None
    data: dict[str, Any] = {}
    task: TaskName | None = None
    spiking: bool = False
    corrected: bool = False
    quantize: dict[str, Any] | None = None
    convert: dict[str, Any] | None = None
    distill: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    mutual: dict[str, Any] | None = None
    teacher: _Hash | None = None
    parent: _Hash | None = None
    stage: dict[str, Any] | None = None
    configs: dict[str, Any] | None = None


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in the header of a safetensors file."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[Annotated[int, Meta(ge=0, le=2**40)]], Meta(max_length=8)]
    data_offsets: tuple[int, int]


def check_recipe(recipe: dict[str, Any]) -> Recipe:
    """Refuse metadata with a key, a type or a number that no checkpoint of ours has.

    Raises:
        ValueError: which key, what was expected, what came.
    """
    kind = recipe.get("kind")
    if kind not in KINDS:
        raise ValueError(f"holds a {kind!r:.80}, which this version does not know; expected {KINDS}")
    try:
        known = msgspec.convert(recipe, Recipe)
        if known.data:
            data = msgspec.convert(known.data, _Data)
            if len(data.mean) != len(data.std):
                raise ValueError(f"data: {len(data.mean)} means and {len(data.std)} standard deviations")
            if data.classes and known.num_classes not in (None, len(data.classes)):
                raise ValueError(f"num_classes is {known.num_classes}, but data has {len(data.classes)} classes")
        for name in CONFIGS:
            found = getattr(known, name)
            if found is not None:
                config_class(name)(**found)
    except (msgspec.ValidationError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"holds metadata that are not right: {error}") from None
    if known.input_shape and math.prod(known.input_shape) > LARGEST_IMAGE:
        raise ValueError(f"asks for images of {known.input_shape}; expected at most {LARGEST_IMAGE:,} values")
    needs: tuple[str, ...] = ()
    if known.kind != "teacher" and not known.spiking:
        needs = ("quantize",) if kind == "qann" else ("convert",)
    if any(getattr(known, name) is None for name in needs):
        raise ValueError(f"holds a {known.kind!r} without the config {needs[0]!r} that made it")
    if ":" not in known.model.name:
        _check_options(known.model.name, known.model.options)
        if known.input_shape is None or known.num_classes is None:
            raise ValueError(f"does not say the image shape and the number of classes of {known.model.name!r}")
    return known


def _check_options(name: str, options: dict[str, Any]) -> None:
    """The options of a network of ours by the types in the signature of its function."""
    if name not in MODELS and name not in SPIKING:
        raise ValueError(f"asks for the unknown model {name!r:.80}; known: {', '.join((*MODELS, *SPIKING))}")
    takes: dict[str, Any] = {}
    for function in (MODELS[name],) if name in MODELS else (SPIKING[name], build_spiking):
        hints = get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not parameter.empty:
                takes[parameter.name] = hints.get(parameter.name, str)
    takes.update({own: hint for own, hint in (("timesteps", Timesteps), ("weight_bits", WeightBits)) if own in takes})
    for option, value in options.items():
        if option not in takes:
            raise ValueError(f"asks for {name!r} with {option!r:.80}; it takes {', '.join(takes) or 'no options'}")
        hint = takes[option]
        wrong = problem(option, value, Annotated[int, Meta(ge=1, le=4096)] if hint is int else hint)
        if wrong:
            raise ValueError(f"asks for {name!r} with impossible options: {wrong}")


def check_header(found: dict[str, Any]) -> None:
    """Refuse a header with tensors of a strange type or shape.

    Raises:
        ValueError: which tensor.
    """
    for name, entry in found.items():
        if name != "__metadata__":
            try:
                msgspec.convert(entry, _Entry)
            except msgspec.ValidationError as error:
                raise ValueError(f"holds a tensor {name!r:.80} that is none: {error}") from None


def check_values(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors with numbers that no network has: NaN, infinity, a θ, step, τ or variance of the wrong sign.

    θ, steps and time constants are above 0. A variance may be 0, in a channel that never fires: ε is added to it.

    Raises:
        ValueError: which tensor.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"holds NaN or infinity in {name!r}; a training that diverged, or damage")
        last = name.rpartition(".")[2]
        if name.endswith("scaling_impl.value") or last in ("threshold", "step", "tau", "divisors", "divisor"):
            if value.dtype is torch.bool or not bool((value > 0).all()):
                raise ValueError(f"holds a {last} in {name!r} that is not above 0")
        elif last == "running_var" and not bool((value >= 0).all()):
            raise ValueError(f"holds a variance in {name!r} that is below 0")


def check_size(known: Recipe, tensors: dict[str, Tensor]) -> None:
    """Refuse, before anything is allocated, a network that is larger than the tensors of its file.

    Raises:
        ValueError: what is too large, or which weight has another shape.
    """
    name = known.model.name
    if ":" in name:  # what the function makes cannot be known; its last layer has K rows or more, or one for two
        largest = max((size for value in tensors.values() for size in value.shape), default=0)
        if known.num_classes is not None and largest < known.num_classes:
            raise ValueError(f"asks for {known.num_classes:,} classes, but none of its tensors has as many rows")
        return
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        plan = build_model(name, tuple(known.input_shape or ()), known.num_classes, **known.model.options)
    total = sum(value.numel() for value in tensors.values())
    wanted = sum(parameter.numel() for parameter in plan.parameters())
    for weight, value in plan.named_parameters():
        found = tensors.get(weight, tensors.get(f"network.{weight}"))
        if found is not None and value.dim() > 1 and found.shape != value.shape:
            raise ValueError(
                f"does not fit the model {name!r} it names: size mismatch for {weight}, {tuple(found.shape)} in the "
                f"file, {tuple(value.shape)} in the model"
            )
    if wanted > 4 * total + 1_000_000:
        raise ValueError(f"names the model {name!r} with {wanted:,} parameters, but holds {total:,} numbers")


def check_state(model: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Refuse tensors that are not exactly those of the network: each name, shape and dtype.

    Raises:
        ValueError: the first that differs.
    """
    own = model.state_dict()
    for missing in (key for key in own if key not in tensors):
        raise ValueError(f"does not fit the model {name!r} it names: Missing key {missing!r}")
    for unknown in (key for key in tensors if key not in own):
        raise ValueError(f"does not fit the model {name!r} it names: Unexpected key {unknown!r:.120}")
    for key, value in own.items():
        found = tensors[key]
        if found.shape != value.shape:
            raise ValueError(
                f"does not fit the model {name!r} it names: size mismatch for {key}, {tuple(found.shape)} in the "
                f"file, {tuple(value.shape)} in the model"
            )
        if found.dtype != value.dtype:
            raise ValueError(f"holds {key!r} as {found.dtype}, and the model {name!r} has it as {value.dtype}")
