"""Every function, method and module of a user's network spelled as the one module of its kind.

``F.relu(x)``, ``x.relu()``, ``torch.relu_`` and ``nn.ReLU(inplace=True)`` become one ``nn.ReLU``; a mean over the
image, adaptive pooling to 1 and average pooling over the whole map become one; a size that was read becomes a number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qsnn.graph.follow import follow
from qsnn.graph.kinds import ADVICE, UNKNOWN, kind_of, refused
from qsnn.graph.spell_layers import COMPUTES, adaptive, covers, ends
from qsnn.graph.spell_moves import MOVES
from qsnn.graph.spell_products import PRODUCTS
from qsnn.graph.step import Call, Refused, Shape
from qsnn.graph.trace import SPELLED, add_module, module_of, refuse, spelled, unshare

Known = Callable[[nn.Module], bool]


SPELLINGS = {**COMPUTES, **PRODUCTS, **MOVES}


class Speller:
    """Walks the followed graph in order and writes the spelled one."""

    def __init__(
        self, raw: fx.GraphModule, shapes: dict[str, tuple[Any, Any]], known: Known, signed: bool = False
    ) -> None:
        self.raw, self.shapes, self.known, self.signed = raw, shapes, known, signed
        self.graph = fx.Graph()
        self.written: dict[Any, Any] = {}
        self.places: list[str] = []
        self.padding: dict[str, tuple[Any, str]] = {}
        """What convolutions padded with values of the image, which a step before them does now."""
        self.ending: list[nn.Module] = []
        """What was taken off behind the last layer: a softmax or a sigmoid."""

    def run(self) -> fx.GraphModule:
        """Return the spelled graph.

        Raises:
            ValueError: steps that have no spelling, all of them named.
        """
        for node in self.raw.graph.nodes:
            try:
                self._write(node)
            except Exception as error:
                reason = str(error)
                if not isinstance(error, Refused):  # a spelling that did not think of these arguments
                    name = getattr(node.target, "__name__", str(node.target))
                    reason = f"{name} with arguments that qsnn does not take: {' '.join(reason.split())[:200]}"
                self.places.append(f"{self._place(node)} ({reason})")
                # what comes behind it is still looked at, as if a value of the network had come of it
                values = tree_leaves([self.written.get(source) for source in node.all_input_nodes])
                instead = next((value for value in values if isinstance(value, fx.Node)), None)
                several = self.shapes[node.name][0]
                self.written[node] = [instead] * len(several) if isinstance(several, list) else instead
        refuse(self.places, "take")
        self.graph.lint()
        return fx.GraphModule(self.raw, self.graph, type(self.raw).__name__)

    def _place(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _write(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.written[node] = self.graph.placeholder(node.name)
        elif node.op == "output":
            self.graph.output(self._answers(node.args[0]))
        elif node.op == "get_attr":
            self.written[node] = self._attribute(str(node.target))
        elif not any(isinstance(self._of(source), fx.Node | list | None) for source in node.all_input_nodes):
            self.written[node] = self._computed(node)
        elif node.op == "call_module":
            self.written[node] = self._module(node)
        else:
            name = getattr(node.target, "__name__", str(node.target))
            spelling = SPELLINGS.get(node.target) or SPELLINGS.get(name.removeprefix("__").removesuffix("__"))
            if spelling is None:
                raise Refused(f"{name}: {ADVICE.get(name, UNKNOWN)}")
            self.written[node] = spelling(Call(self, node))

    def _of(self, node: fx.Node) -> Any:
        return self.written.get(node)

    def _answers(self, given: Any) -> Any:
        """The answers in their structure; what is the same for every image (None, a number) is left out."""
        if isinstance(given, fx.Node):
            found = self.written[given]
            return found if isinstance(found, fx.Node) else None
        if isinstance(given, Mapping):
            parts = {name: self._answers(part) for name, part in given.items()}
            kept: Any = {name: part for name, part in parts.items() if part is not None}
        elif isinstance(given, list | tuple):
            kept = type(given)(part for part in map(self._answers, given) if part is not None)
        else:
            return None
        return kept or None

    def _attribute(self, name: str) -> Tensor:
        value: Any = self.raw
        for part in name.split("."):
            value = getattr(value, part)
        return value  # type: ignore[no-any-return]

    def _computed(self, node: fx.Node) -> Any:
        """A step on tensors that no image changes: its value."""
        args: Any = fx.node.map_arg(node.args, self._of)
        kwargs: Any = fx.node.map_arg(node.kwargs, self._of)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = self.raw.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        with torch.no_grad():
            return function(*args, **kwargs)

    def constant(self, value: Any) -> Tensor | None:
        """A number or a tensor that no image changes; None for a value of the network."""
        found = self.written.get(value) if isinstance(value, fx.Node) else value
        if isinstance(found, bool | int | float):
            return torch.tensor(float(found))
        if not isinstance(found, Tensor):
            return None
        if found.dim() > 1 and found.shape[0] == 2 and bool((found[0] == found[1]).all()):
            return found[:1]  # spread over the two images of the example
        return found

    def put(self, name: str, module: nn.Module, inputs: Sequence[fx.Node]) -> fx.Node:
        """Write a call of a new module; return its node."""
        return self.graph.call_module(add_module(self.raw, name, module), tuple(inputs))

    def _module(self, node: fx.Node) -> fx.Node:
        """A module stays, under its name; some are written in the one form of their kind."""
        module: Any = module_of(self.raw, node)
        call = Call(self, node)
        spelling = SPELLINGS.get(type(module))
        found: fx.Node | None = None if spelling is None else spelling(call)
        if found is not None:
            return found
        if self._ends(node, module):
            self.ending.append(module)
            return call.at(call.x)
        reason = refused(module)
        if reason is not None and not (kind_of(module) is None and self.known(module)):
            raise Refused(reason)
        given = (*node.args, *node.kwargs.values())
        inputs = [call.at(argument) for argument in given if isinstance(argument, fx.Node)]
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d) and covers(module, call.shape()):
            return self.put(node.name, adaptive(len(call.shape()) - 2), inputs)
        return self.graph.call_module(str(node.target), tuple(inputs))

    def _ends(self, node: fx.Node, module: nn.Module) -> bool:
        return isinstance(module, nn.Softmax | nn.LogSoftmax | nn.Sigmoid | nn.LogSigmoid) and ends(node)


def trace(
    model: nn.Module, shape: Shape | None, known: Known = lambda module: False, *, signed: bool = False
) -> fx.GraphModule:
    """Return a copy of ``model`` as a graph of modules, one a kind; parameters are copied, names stay.

    Args:
        model: not changed. What quantize or convert made is spelled already, and is copied.
        shape: (C, H, W), or whatever one image has.
        known: whether a layer is taken that no row of the table names (a quantized activation).
        signed: take LeakyReLU and PReLU, each as two activations.
    Raises:
        ValueError: its control flow depends on the values of an image, it takes more than one input, or steps of it
            have no spelling (all of them are named).
    """
    if spelled(model):
        return copy.deepcopy(model)  # type: ignore[return-value]
    if shape is None:
        raise ValueError(f"the shape of an image is needed to follow {type(model).__name__}; give data")
    training = {name: module.training for name, module in model.named_modules()}
    raw, shapes = follow(model, shape)
    speller = Speller(raw, shapes, known, signed)
    network = speller.run()
    network.meta = {SPELLED: speller.ending}
    network.graph.eliminate_dead_code()
    unshare(network)
    network.recompile()
    for name, module in network.named_modules():
        module.training = training.get(name, model.training)
        if hasattr(module, "inplace"):
            module.__dict__["inplace"] = False  # the graph does not know that another reader sees the change
    return network
