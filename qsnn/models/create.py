"""create_model(): our own networks by name, and models of the user's own as package.module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qsnn.data.images import Data
from qsnn.graph.recipe import data_recipe, recipe_of, set_recipe
from qsnn.models.ann import _resnet18, _resnet_small, _study, _vgg16, _vgg_small
from qsnn.models.attention import convnext, qkformer
from qsnn.models.spiking import SPIKING, build_spiking
from qsnn.snn.network import TimeLoop

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg-small": _vgg_small,
    "study": _study,
    "resnet-small": _resnet_small,
    "resnet18": _resnet18,
    "vgg16": _vgg16,
    "qkformer": qkformer,
    "convnext": convnext,
}


def create_model(name: str, data: Data | None = None, *, seed: int = 0, **options: Any) -> nn.Module:
    """Return a float network with fresh weights, plain ``nn.ReLU`` activations and one output a class.

    Args:
        name: "vgg-small" (0.03 to 0.2 M parameters by image size), "study" (16-16-32-32-64 channels), "resnet-small",
            "resnet18" and "vgg16" (with a stem of 3x3 and one linear layer, for small images), "qkformer" (attention
            that is exact as spikes), "convnext" (``groups``, ``expand``, ``blocks``); a spiking network from scratch
            (:func:`qsnn.models.spiking.build_spiking`): "spiking-resnet", "sew-resnet", "ms-resnet",
            "spiking-qkformer", "spiking-convnext"; or a function of your own as ``package.module:function``; it is
            called with ``num_classes=K`` where it takes that, and may return any model that torch.fx can follow.
        data: where the image shape and the number of classes come from. Our own models need it.
        seed: of the weights; the global random state is left as it was.
        options: passed on to the function, e.g. ``pooling="max"``.
    Raises:
        ValueError: an unknown name (the message lists the known ones), or a function that cannot be found.
    """
    shape = None if data is None else tuple(data.shape)
    model = build_model(name, shape, None if data is None else data.num_classes, seed=seed, **options)
    set_recipe(model, {**recipe_of(model), "data": data_recipe(data)})
    return model


def build_model(
    name: str, shape: tuple[int, ...] | None, num_classes: int | None, *, seed: int = 0, **options: Any
) -> nn.Module:
    """Like :func:`create_model`, from an image shape (C, H, W) and a number of classes; ``load`` calls it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if ":" in name:
            model = _call_named(name, num_classes, options)
        elif name in MODELS:
            if shape is None or num_classes is None:
                raise ValueError(f"create_model({name!r}) needs data: create_model({name!r}, load_data('digits'))")
            model = MODELS[name](shape, num_classes, **options)
        elif name in SPIKING:
            if shape is None or num_classes is None:
                raise ValueError(f"create_model({name!r}) needs data: create_model({name!r}, load_data('digits'))")
            model = build_spiking(name, shape, num_classes, **options)
        else:
            raise ValueError(
                f"unknown model {name!r}; known: {', '.join((*MODELS, *SPIKING))}, or your own as "
                f"package.module:function"
            )
    recipe = {
        "kind": "teacher",
        "model": {"name": name, "options": options},
        "input_shape": None if shape is None else list(shape),
        "num_classes": num_classes,
    }
    if isinstance(model, TimeLoop):
        recipe["spiking"] = True
    set_recipe(model, recipe)
    return model


def _call_named(name: str, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"cannot find {name!r} ({error}); expected package.module:function on Python's path"
        ) from error
    try:
        model = function(**options) if num_classes is None else function(num_classes=num_classes, **options)
    except TypeError:
        model = function(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model

