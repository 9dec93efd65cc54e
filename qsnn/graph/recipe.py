"""How a network was made: a dictionary that every verb copies from its argument and adds its own config to."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of what is recorded of how ``model`` was made: its kind, model, data and configs.

    Every verb copies it from its argument and adds its own config; ``save`` writes it.
    """
    return copy.deepcopy(getattr(model, "qsnn_recipe", {}))


def set_recipe(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Record on ``model`` how it was made."""
    model.__dict__["qsnn_recipe"] = recipe
    if isinstance(model, fx.GraphModule):  # whose copies keep no attribute but these
        model.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {})["qsnn_recipe"] = recipe


def input_shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """Return the (C, H, W) of one image as the recipe has it, or None."""
    shape = recipe_of(model).get("input_shape")
    return tuple(shape) if shape else None


def data_recipe(data: Any) -> dict[str, Any]:
    """Return what a checkpoint records of a data set: name, normalisation, classes; {} for a bare loader."""
    if not hasattr(data, "classes"):
        return {}
    found = {"name": data.name, "mean": list(data.mean), "std": list(data.std), "classes": list(data.classes)}
    frames = getattr(data, "frames", None)
    return found if frames is None else {**found, "frames": frames}


def child_recipe(model: nn.Module, kind: str, **configs: Any) -> dict[str, Any]:
    """Return the recipe of what is made from ``model``: its own, the new kind and configs, and its file's hash."""
    recipe = recipe_of(model)
    parent = recipe.pop("sha256", None)
    if parent is not None:
        recipe["parent"] = parent
    return {**recipe, "kind": kind, **configs}
