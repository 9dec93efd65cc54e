"""What quantize, convert and fold share of torch.fx: tracing a model and naming the places in it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

RELU_FUNCTIONS = (F.relu, torch.relu, F.relu_, torch.relu_)
RELU_METHODS = ("relu", "relu_")
ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


class Tracer(fx.Tracer):
    """torch.fx's tracer that takes every layer of torch.nn, Brevitas and SpikingJelly, and ours, as one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether ``m`` is one step of the graph."""
        ours = m.__module__.startswith(("brevitas.nn", "spikingjelly", "qsnn.neurons", "qsnn.fold"))
        return ours or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Return a copy of ``model`` as an fx graph; parameters are copied, names stay.

    Raises:
        ValueError: the model's control flow depends on its input, or it takes more than one input.
    """
    model = copy.deepcopy(model)
    if isinstance(model, fx.GraphModule):
        return model
    try:
        graph = Tracer().trace(model)
    except Exception as error:  # fx raises many kinds; each means the same to the user
        raise ValueError(
            f"cannot follow {type(model).__name__} with torch.fx ({error}); "
            f"a model must have one input and no control flow that depends on it"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    required = [node for node in inputs if not node.args]
    if len(required) != 1:
        raise ValueError(f"expected a model with one input, {type(model).__name__} takes {[n.name for n in required]}")
    for extra in inputs:
        if extra.args and not extra.users:
            graph.erase_node(extra)
    return fx.GraphModule(model, graph, type(model).__name__)


def module_of(network: fx.GraphModule, node: Any) -> nn.Module | None:
    """Return the module that a ``call_module`` node calls, else None."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return network.get_submodule(cast(str, node.target))
    return None


def is_call(node: fx.Node, functions: tuple[Callable[..., Any], ...] = (), methods: tuple[str, ...] = ()) -> bool:
    """Return whether a node calls one of these functions, or a method of one of these names."""
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in methods
    )


def unshare(network: fx.GraphModule) -> None:
    """Give every call of a parameter-free module that is called more than once its own copy, in place.

    A second call of module ``relu`` becomes ``relu_1``.
    """
    seen: set[str] = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        if module is None:
            continue
        name = str(node.target)
        if name in seen and not any(True for _ in module.parameters()):
            node.target = add_module(network, name, copy.deepcopy(module))
        seen.add(str(node.target))
    network.recompile()


def add_module(network: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Add a module under ``name``, or ``name_1``, ... where that is taken; return the name it got."""
    taken = dict(network.named_modules())
    unique, count = name, 0
    while unique in taken or hasattr(network, unique):
        count += 1
        unique = f"{name}_{count}"
    network.add_submodule(unique, module)
    return unique


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def call_nodes(network: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """Yield every ``call_module`` node with its module, in graph order."""
    for node in network.graph.nodes:
        module = module_of(network, node)
        if module is not None:
            yield node, module


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of what is recorded of how ``model`` was made: its kind, model, data and configs.

    Every verb copies it from its argument and adds its own config; ``save`` writes it.
    """
    return copy.deepcopy(getattr(model, "qsnn_recipe", {}))


def input_shape_of(model: nn.Module) -> tuple[int, ...] | None:
    """Return the (C, H, W) of one image as the recipe has it, or None."""
    shape = recipe_of(model).get("input_shape")
    return tuple(shape) if shape else None


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, the CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def data_recipe(data: Any) -> dict[str, Any]:
    """Return what a checkpoint records of a data set: name, normalisation, classes; {} for a bare loader."""
    if not hasattr(data, "classes"):
        return {}
    return {"name": data.name, "mean": list(data.mean), "std": list(data.std), "classes": list(data.classes)}


def child_recipe(model: nn.Module, kind: str, **configs: Any) -> dict[str, Any]:
    """Return the recipe of what is made from ``model``: its own, the new kind and configs, and its file's hash."""
    recipe = recipe_of(model)
    parent = recipe.pop("sha256", None)
    if parent is not None:
        recipe["parent"] = parent
    return {**recipe, "kind": kind, **configs}
