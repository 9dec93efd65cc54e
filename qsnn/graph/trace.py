"""A network as a graph of known layers: torch.fx follows it on two small batches, so that every size is a number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from qsnn.graph.arrived import evaluating
from qsnn.graph.call import Call, calling
from qsnn.graph.kinds import CLASSES, does, kind_of, refused
from qsnn.graph.recipe import recipe_of

SPELLED = "qsnn_ending"
"""Key in ``GraphModule.meta`` of a spelled network (a copy keeps it): what was taken off behind its last layer."""


def module_of(network: fx.GraphModule, node: Any) -> nn.Module | None:
    """Return the module that a ``call_module`` node calls, else None."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return network.get_submodule(cast(str, node.target))
    return None


def call_nodes(network: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module]]:
    """Yield every ``call_module`` node with its module, in graph order."""
    for node in network.graph.nodes:
        module = module_of(network, node)
        if module is not None:
            yield node, module


def spelled(network: nn.Module) -> bool:
    """Return whether a network is a graph of modules already, as :func:`qsnn.graph.spell.trace` makes it."""
    return isinstance(network, fx.GraphModule) and SPELLED in network.meta


def refuse(places: list[str], verb: str) -> None:
    """Raise one error that names all places that have no spiking form, each with what to write instead.

    Raises:
        ValueError: there is one.
    """
    if places:
        raise ValueError(f"cannot {verb} {'; '.join(places)}. `qsnn check` lists every layer and what becomes of it")


def unknown_layers(network: fx.GraphModule, known: Callable[[nn.Module], bool] = lambda module: False) -> list[str]:
    """Return "place (class: what to write instead)" for every layer that the table does not name.

    Args:
        network: spelled.
        known: whether a pass takes a module that is in no row (a quantized activation).
    """
    found = []
    for node, module in call_nodes(network):
        reason = refused(module)
        if reason is not None and not (kind_of(module) is None and known(module)):
            found.append(f"{node.target} ({reason})")
    return found


def value_shapes(network: fx.GraphModule, shape: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every node's value for one image, by name; nothing where the image shape is unknown."""
    if shape is None:
        return {}
    floats = [p for p in network.parameters() if p.is_floating_point()]  # thresholds have another dtype than weights
    weight = next((p for p in floats if p.dim() > 1), floats[0] if floats else torch.zeros(()))
    found: dict[str, tuple[int, ...]] = {}

    class _Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op != "get_attr":
                found[n.name] = tuple(value.shape)
            return value

    with torch.no_grad(), calling(Call()), evaluating(network):
        _Shapes(network).run(torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype))
    return found


def unshare(network: fx.GraphModule) -> None:
    """Give every call of a parameter-free module, or of a gate, that is called more than once its own copy, in place.

    A second call of module ``relu`` becomes ``relu_1``. Each call of a gate then has a level of its own, as each call
    of an activation has a step of its own when it is quantized.
    """
    seen: set[str] = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        if module is None:
            continue
        name = str(node.target)
        if name in seen and (does(module) == "decides" or not any(True for _ in module.parameters())):
            node.target = add_module(network, name, copy.deepcopy(module))
        seen.add(str(node.target))
    network.recompile()


def called_once(network: fx.GraphModule) -> set[str]:
    """Return the names of the modules that are called by one node alone."""
    names = [str(node.target) for node, _ in call_nodes(network)]
    return {name for name in names if names.count(name) == 1}


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


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, the CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


SPATIAL_3D = tuple(c for c in (*CLASSES["weighs"], *CLASSES["normalises"], *CLASSES["averages"]) if "3d" in c.__name__)
"""Layers of volumes: a network that holds one takes five-dimensional images, which are then no frames in time."""


def takes_frames(model: nn.Module, images: Tensor) -> bool:
    """Return whether images are frames in time, (B, T, C, H, W), for this network.

    What it was made for says so, where that is known: a folded network of volumes holds no layer that would tell.
    """
    if images.dim() != 5:
        return False
    shape = recipe_of(model).get("input_shape")
    if shape is not None:
        return len(shape) == 3
    return not any(isinstance(module, SPATIAL_3D) for module in model.modules())
