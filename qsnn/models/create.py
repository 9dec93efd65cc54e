"""create_model(): our own networks by name, and models of the user's own as package.module:function."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qsnn.data.fitting import fitted
from qsnn.data.images import Data
from qsnn.graph.recipe import data_recipe, recipe_of, set_recipe
from qsnn.models.ann import _cifar_resnet, _mlp, _resnet18, _resnet_small, _study, _unet, _vgg16, _vgg_small
from qsnn.models.attention import convnext, qkformer
from qsnn.models.libraries import LIBRARIES, build_from_library
from qsnn.models.spiking import SPIKING, build_spiking
from qsnn.options import expect
from qsnn.snn.network import TimeLoop

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg-small": _vgg_small,
    "study": _study,
    "resnet-small": _resnet_small,
    "resnet18": _resnet18,
    "resnet20": _cifar_resnet(20),
    "resnet32": _cifar_resnet(32),
    "resnet44": _cifar_resnet(44),
    "resnet56": _cifar_resnet(56),
    "vgg16": _vgg16,
    "mlp": _mlp,
    "unet": _unet,
    "qkformer": qkformer,
    "convnext": convnext,
}


def create_model(name: str, data: Data | None = None, *, seed: int = 0, **options: Any) -> nn.Module:
    """Return a float network with fresh weights, plain ``nn.ReLU`` activations and one output a class.

    Args:
        name: "vgg-small" (0.03 to 0.2 M parameters by image size), "study" (16-16-32-32-64 channels), "resnet-small",
            "resnet18" and "vgg16" (with a stem of 3x3 and one linear layer, for small images), "resnet20", "resnet32",
            "resnet44" and "resnet56" (16-32-64 channels, 0.27 to 0.85 M parameters), "mlp" (two layers of 128),
            "unet" (16-32-64 channels, an output a class and pixel; sides are multiples of 4), "qkformer"
            (``attention``: "self", "token", "channel" or "relu", which is computed on counts; ``widths``, ``hidden``),
            "convnext" (``groups``, ``expand``, ``blocks``); a spiking network from scratch
            (:func:`qsnn.models.spiking.build_spiking`): "spiking-resnet", "sew-resnet", "ms-resnet",
            "spiking-qkformer", "spiking-convnext"; "timm:NAME" and "torchvision:NAME" of those libraries, with their
            pretrained weights where these are on disk; or a function of your own as ``package.module:function``; it is
            called with ``num_classes=K`` where it takes that, and may return any model that torch.fx can follow.
        data: where the image shape and the number of classes come from. Our own models need it.
        seed: of the weights; the global random state is left as it was.
        options: passed on to the function, e.g. ``pooling="max"``.
    Raises:
        ValueError: an unknown name or option (the message lists the known ones), or a function that cannot be found.

    >>> from qsnn.data.sources import load_data
    >>> create_model("resnet20", load_data("digits"))(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    expect("create_model('study', load_data('digits'))", "name", name, str)
    expect("create_model('study', load_data('digits'))", "data", data, (Data, type(None)))
    shape = None if data is None else tuple(data.shape)
    classes = None if data is None else data.outputs
    model = build_model(name, shape, classes, seed=seed, pretrained=True, **options)
    set_recipe(model, {**recipe_of(model), "data": data_recipe(data)})
    return model


def create_fitting(name: str, data: Data, *, seed: int = 0, **options: Any) -> tuple[nn.Module, Data]:
    """Return a network by name, and the data as it takes it: :func:`create_model`, then :func:`fitted`.

    Raises:
        ValueError: an unknown name, or a network that does not fit the data.
    """
    model = create_model(name, data, seed=seed, **options)
    taken = fitted(data, model)
    if taken is not data:  # other channels: the recipe says which
        set_recipe(model, {**recipe_of(model), "data": data_recipe(taken), "input_shape": list(taken.shape)})
    return model, taken


def build_model(
    name: str,
    shape: tuple[int, ...] | None,
    num_classes: int | None,
    *,
    seed: int = 0,
    pretrained: bool = False,
    function: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """Like :func:`create_model`, from an image shape (C, H, W) and a number of classes; ``load`` calls it.

    A ``function`` is called in the place of importing the one that ``package.module:function`` names; a library's
    pretrained weights are looked for only where ``pretrained``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name.partition(":")[0] in LIBRARIES:
            model = build_from_library(name, shape, num_classes, pretrained, options)
        elif ":" in name:
            model = _call(function or _named(name), name, num_classes, options)
        elif name in MODELS:
            if shape is None or num_classes is None:
                raise ValueError(f"create_model({name!r}) needs data: create_model({name!r}, load_data('digits'))")
            _refuse_unknown(name, options)
            model = MODELS[name](shape, num_classes, **options)
        elif name in SPIKING:
            if shape is None or num_classes is None:
                raise ValueError(f"create_model({name!r}) needs data: create_model({name!r}, load_data('digits'))")
            model = build_spiking(name, shape, num_classes, **options)
        else:
            raise ValueError(
                f"unknown model {name!r}; known: {', '.join((*MODELS, *SPIKING))}, timm:NAME and torchvision:NAME, or "
                f"your own as package.module:function"
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


def _refuse_unknown(name: str, options: dict[str, Any]) -> None:
    known = list(inspect.signature(MODELS[name]).parameters)[2:]  # behind the shape and the number of classes
    wrong = [option for option in options if option not in known]
    if wrong:
        takes = f"knows {', '.join(known)}" if known else "takes no options"
        raise ValueError(f"{name} {takes}, got {', '.join(wrong)}")


def _named(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(
            f"cannot find {name!r} ({error}); expected package.module:function on Python's path"
        ) from error


def _call(function: Any, name: str, num_classes: int | None, options: dict[str, Any]) -> nn.Module:
    if isinstance(function, nn.Module):
        return copy.deepcopy(function)
    if not callable(function):
        raise ValueError(
            f"{name!r} is a {type(function).__name__}, which is not callable; name a function that returns the network"
        )
    if num_classes is not None and "num_classes" not in options and _takes(function, "num_classes"):
        options = {**options, "num_classes": num_classes}
    try:
        model = function(**options)
    except Exception as error:  # the function is the user's own, and may raise anything
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())}) raised {said}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _takes(function: Callable[..., Any], name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have none
        return False
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)
