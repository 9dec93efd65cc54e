"""What quantize, convert and fold share of torch.fx: tracing a model and naming the places in it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
ADD_METHODS = ("add", "add_")
VIEW_FUNCTIONS = (
    torch.transpose,
    torch.permute,
    torch.reshape,
    torch.chunk,
    torch.split,
    torch.unsqueeze,
    torch.squeeze,
)
MOVE_FUNCTIONS = (*VIEW_FUNCTIONS, torch.flatten, operator.getitem, F.pad)
"""The same, and what cuts values away or puts zeros beside them: a zero is a multiple of every step."""
VIEW_METHODS = ("view", "reshape", "transpose", "permute", "contiguous", "chunk", "split")
"""Operations that only move values to other places."""
_SHAPE_ARITHMETIC = (
    operator.getitem,
    operator.floordiv,
    operator.mul,
    operator.add,
    operator.sub,
    operator.truediv,
    int,
)


LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
RELUS = (nn.ReLU, nn.ReLU6)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
PASSED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
"""Layers that hand values on as they are at inference."""


class Tracer(fx.Tracer):
    """torch.fx's tracer that takes every layer of torch.nn, Brevitas and SpikingJelly, and ours, as one step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether ``m`` is one step of the graph."""
        ours = m.__module__.startswith(("brevitas.nn", "spikingjelly", "qsnn.neurons", "qsnn.integer", "qsnn.firing"))
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


def shape_nodes(network: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that stand for sizes, not tensors: ``x.size(0)``, ``x.shape[1] // 2`` and the like."""
    found: set[fx.Node] = set()
    for node in network.graph.nodes:
        size = is_call(node, (), ("size", "dim")) or (is_call(node, (getattr,)) and node.args[1] == "shape")
        derived = is_call(node, _SHAPE_ARITHMETIC) and node.all_input_nodes
        if size or (derived and all(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def value_shapes(network: fx.GraphModule, shape: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every node's value for one image, by name; nothing where the image shape is unknown."""
    if shape is None:
        return {}
    probe: Any = copy.deepcopy(network)
    weight = next(iter(network.parameters()))
    for module in probe.modules():
        if hasattr(module, "timesteps"):
            module.timesteps = 1
    ShapeProp(probe).run(torch.zeros(1, *shape, device=weight.device, dtype=weight.dtype))
    found = {node.name: node.meta.get("tensor_meta") for node in probe.graph.nodes}
    return {name: tuple(meta.shape) for name, meta in found.items() if hasattr(meta, "shape")}


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _as_module(node: fx.Node) -> list[nn.Module] | None:
    """The modules that do what a functional call of an activation, pooling or dropout does, or None."""
    if is_call(node, (F.relu, torch.relu, F.relu_, torch.relu_), ("relu", "relu_")):
        return [nn.ReLU()]
    if is_call(node, (F.relu6,)):
        return [nn.ReLU6()]
    if is_call(node, (F.dropout,)):
        return [nn.Dropout(_argument(node, 1, "p", 0.5))]
    if is_call(node, (F.adaptive_avg_pool2d,)):
        return [nn.AdaptiveAvgPool2d(_argument(node, 1, "output_size", 1))]
    if is_call(node, (F.avg_pool2d,)):
        kernel, stride = _argument(node, 1, "kernel_size", None), _argument(node, 2, "stride", None)
        padding, ceil = _argument(node, 3, "padding", 0), _argument(node, 4, "ceil_mode", False)
        return [nn.AvgPool2d(kernel, stride, padding, ceil, _argument(node, 5, "count_include_pad", True))]
    if is_call(node, (F.max_pool2d, torch.max_pool2d)):
        kernel, stride = _argument(node, 1, "kernel_size", None), _argument(node, 2, "stride", None)
        padding, dilation = _argument(node, 3, "padding", 0), _argument(node, 4, "dilation", 1)
        ceil = node.kwargs.get("ceil_mode", node.args[5] if len(node.args) > 5 and node.args[5] is not None else False)
        return [nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=bool(ceil))]
    if is_call(node, (torch.mean,), ("mean",)):
        dims, keep = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
        if isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]:
            return [nn.AdaptiveAvgPool2d(1)] + ([] if keep else [nn.Flatten()])
    return None


def zero_pads(node: fx.Node) -> tuple[int, ...] | None:
    """The widths of an ``F.pad`` with zeros, last dimension first; None for any other node.

    Raises:
        ValueError: a pad with other values than zeros, or one of unknown widths.
    """
    if not is_call(node, (F.pad,)):
        return None
    widths, mode = _argument(node, 1, "pad", ()), _argument(node, 2, "mode", "constant")
    fixed = isinstance(widths, list | tuple) and all(isinstance(width, int) for width in widths)
    if not fixed or mode != "constant" or _argument(node, 3, "value", None) not in (None, 0):
        raise ValueError(f"{node.name} pads with other values than zeros: only F.pad(x, widths) keeps spikes spikes")
    return tuple(widths)


def pixels_only(node: fx.Node) -> bool:
    """Whether a node takes slices of the pixels, ``x[:, :, ::2, ::2]``: all images and all channels stay."""
    if not is_call(node, (operator.getitem,)) or not isinstance(node.args[1], tuple):
        return False
    parts = node.args[1]
    return all(isinstance(part, slice) for part in parts) and parts[:2] == (slice(None), slice(None))


def modules_for_functions(network: fx.GraphModule) -> None:
    """Turn functional activations, pooling and dropout into modules, named by their place in the graph, in place."""
    for node in list(network.graph.nodes):
        modules = _as_module(node)
        if modules is None:
            continue
        last = node.all_input_nodes[0]
        for module in modules:
            name = add_module(network, node.name, module)
            with network.graph.inserting_before(node):
                last = network.graph.call_module(name, (last,))
        node.replace_all_uses_with(last)
        network.graph.erase_node(node)
    network.recompile()


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


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what these modules give out while the block runs."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def recipe_of(model: nn.Module) -> dict[str, Any]:
    """Return a copy of what is recorded of how ``model`` was made: its kind, model, data and configs.

    Every verb copies it from its argument and adds its own config; ``save`` writes it.
    """
    return copy.deepcopy(getattr(model, "qsnn_recipe", {}))


def set_recipe(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Record on ``model`` how it was made."""
    model.__dict__["qsnn_recipe"] = recipe


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
