"""Every function, method and module of a user's network spelled as the one module of its kind.

``F.relu(x)``, ``x.relu()``, ``torch.relu_`` and ``nn.ReLU(inplace=True)`` become one ``nn.ReLU``; a mean over the
image, adaptive pooling to 1 and average pooling over the whole map become one; a size that was read becomes a number.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.graph.kinds import ADVICE, kind_of, refused
from qsnn.graph.modules import (
    Add,
    ClippedReLU,
    Concat,
    Mean,
    Pad,
    Permute,
    Scale,
    Shift,
    Slice,
    Sum,
    Upsample,
    View,
)
from qsnn.graph.trace import SPELLED, add_module, follow, module_of, refuse, spelled, unshare

Shape = tuple[int, ...]
Known = Callable[[nn.Module], bool]


class _Refused(Exception):
    """Why one step has no spelling; collected, so that all places are named at once."""


class Call:
    """One step of the followed network: its arguments with their shapes, and how to write modules in its place."""

    def __init__(self, speller: Speller, node: fx.Node) -> None:
        self.speller, self.node = speller, node
        self.name = getattr(node.target, "__name__", str(node.target))

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """The argument at a place or of a name; numbers and tuples as they are."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    @property
    def x(self) -> fx.Node:
        """The first input."""
        found = self.get(0, "input")
        return found if isinstance(found, fx.Node) else self.node.all_input_nodes[0]

    def shape(self, node: fx.Node | None = None) -> Shape:
        """The shape of a value (by default the first input's) for one batch of two images."""
        found: Shape = self.speller.shapes[(node or self.x).name][0]
        return found

    @property
    def out(self) -> Shape:
        """The shape of the result for the batch of two images."""
        return self.shape(self.node)

    def dims(self, value: Any, node: fx.Node | None = None) -> tuple[int, ...]:
        """Dimensions counted from the start.

        Raises:
            _Refused: the batch is among them.
        """
        rank = len(self.shape(node))
        if value is None:
            value = tuple(range(rank))
        found = tuple(d % rank for d in ((value,) if isinstance(value, int) else tuple(value)))
        if 0 in found:
            raise _Refused("goes over dimension 0, the batch: images of a batch must stay apart")
        return found

    def put(self, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """Write a module behind inputs (by default behind what stands for ``x``); return its node."""
        return self.speller.put(self.node.name, module, inputs or (self.at(self.x),))

    def at(self, node: Any) -> fx.Node:
        """What stands for a node of the followed graph.

        Raises:
            _Refused: it is a number or a tensor that no image changes.
        """
        found = self.speller.written.get(node)
        if not isinstance(found, fx.Node):
            raise _Refused("needs a value that depends on the image here")
        return found

    def constant(self, value: Any) -> Tensor | None:
        """A number or a tensor that no image changes; None for a value of the network."""
        return self.speller.constant(value)

    def view(self, shape: Sequence[int] | None = None, node: fx.Node | None = None) -> fx.Node:
        """Write the values of ``node`` in the shape of the result (or in ``shape``, the batch first)."""
        source = node or self.at(self.x)
        first, second = self.speller.shapes[self.node.name] if shape is None else (tuple(shape), None)
        if second is not None and (first[1:] != second[1:] or first[0] * 3 != second[0] * 2):
            raise _Refused("puts the batch somewhere else than first")
        if shape is None and node is None and first == self.shape():
            return source
        return self.speller.put(self.node.name, View(tuple(first[1:])), (source,))


Spelling = Callable[[Call], Any]


class Speller:
    """Walks the followed graph in order and writes the spelled one."""

    def __init__(self, raw: fx.GraphModule, shapes: dict[str, tuple[Any, Any]], known: Known) -> None:
        self.raw, self.shapes, self.known = raw, shapes, known
        self.graph = fx.Graph()
        self.written: dict[Any, Any] = {}
        self.places: list[str] = []
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
            except _Refused as reason:
                self.places.append(f"{self._place(node)} ({reason})")
                self.written[node] = self.written.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        refuse(self.places, "take")
        self.graph.lint()
        return fx.GraphModule(self.raw, self.graph, type(self.raw).__name__)

    def _place(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _write(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.written[node] = self.graph.placeholder(node.name)
        elif node.op == "output":
            self.graph.output(fx.node.map_arg(node.args[0], self._answer))
        elif node.op == "get_attr":
            self.written[node] = self._attribute(str(node.target))
        elif not any(isinstance(self._of(source), fx.Node | list) for source in node.all_input_nodes):
            self.written[node] = self._computed(node)
        elif node.op == "call_module":
            self.written[node] = self._module(node)
        else:
            name = getattr(node.target, "__name__", str(node.target))
            spelling = SPELLINGS.get(node.target) or SPELLINGS.get(name.removeprefix("__").removesuffix("__"))
            if spelling is None:
                raise _Refused(f"{name}: {ADVICE[name]}" if name in ADVICE else f"{name}, which spikes cannot follow")
            self.written[node] = spelling(Call(self, node))

    def _of(self, node: fx.Node) -> Any:
        return self.written.get(node)

    def _answer(self, node: fx.Node) -> fx.Node:
        found = self.written[node]
        if not isinstance(found, fx.Node):
            raise _Refused("an answer that does not depend on the image")
        return found

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
        if spelling is not None:
            found: fx.Node = spelling(call)
            return found
        if self._ends(node, module):
            self.ending.append(module)
            return call.at(call.x)
        reason = refused(module)
        if reason is not None and not (kind_of(module) is None and self.known(module)):
            raise _Refused(reason)
        given = (*node.args, *node.kwargs.values())
        inputs = [call.at(argument) for argument in given if isinstance(argument, fx.Node)]
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d) and _covers(module, call.shape()):
            return self.put(node.name, _adaptive(len(call.shape()) - 2), inputs)
        return self.graph.call_module(str(node.target), tuple(inputs))

    def _ends(self, node: fx.Node, module: nn.Module) -> bool:
        return isinstance(module, nn.Softmax | nn.LogSoftmax | nn.Sigmoid | nn.LogSigmoid) and ends(node)


def ends(node: fx.Node) -> bool:
    """Return whether nothing but the output sees a node."""
    return all(user.op == "output" for user in node.users)


def _ending(module: Callable[[Call], nn.Module]) -> Spelling:
    def spelling(call: Call) -> fx.Node:
        if not ends(call.node):
            raise _Refused(f"{call.name}: {ADVICE[call.name]}" if call.name in ADVICE else f"{call.name} in between")
        call.speller.ending.append(module(call))
        return call.at(call.x)

    return spelling


def _adaptive(sides: int) -> nn.Module:
    return {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[sides](1)


def _covers(pool: Any, shape: Shape) -> bool:
    """Whether an average pool has one window, which is the whole map."""
    sides = shape[2:]
    kernel = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * len(sides)
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,) * len(sides)
    plain = not any(padding) and not getattr(pool, "divisor_override", None)
    return plain and tuple(kernel) == sides


def _relu(call: Call) -> fx.Node:
    return call.put(nn.ReLU())


def _clipped(low: Any, high: Any, call: Call) -> fx.Node:
    if low is None or isinstance(low, fx.Node) or isinstance(high, fx.Node) or float(low) != 0.0:
        raise _Refused(f"{call.name} from {low} to {high}: only from 0 upwards, as a ReLU")
    return call.put(nn.ReLU() if high is None or math.isinf(high) else ClippedReLU(float(high)))


def _clamp(call: Call) -> fx.Node:
    return _clipped(call.get(1, "min"), call.get(2, "max"), call)


def _hardtanh(call: Call) -> fx.Node:
    return _clipped(call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0), call)


def _threshold(call: Call) -> fx.Node:
    level, value = call.get(1, "threshold"), call.get(2, "value")
    if level != 0 or value != 0:
        raise _Refused(f"threshold({level}, {value}): only threshold(0, 0), a ReLU")
    return call.put(nn.ReLU())


def _hardtanh_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    if module.min_val != 0:
        raise _Refused(f"Hardtanh from {module.min_val} to {module.max_val}: only from 0 upwards, as a ReLU")
    return _same_place(call, ClippedReLU(float(module.max_val)))


def _same_place(call: Call, module: nn.Module) -> fx.Node:
    """Put ``module`` under the very name of the module that it stands for."""
    name = str(call.node.target)
    parent, _, child = name.rpartition(".")
    setattr(call.speller.raw.get_submodule(parent), child, module)
    return call.speller.graph.call_module(name, (call.at(call.x),))


def _threshold_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    if module.threshold != 0 or module.value != 0:
        raise _Refused(f"Threshold({module.threshold}, {module.value}): only Threshold(0, 0), a ReLU")
    return _same_place(call, nn.ReLU())


def _unflatten_module(call: Call) -> fx.Node:
    return call.view()


def _zero_pad_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    if getattr(module, "value", 0) != 0:
        raise _Refused(f"padding with {module.value}: only with zeros")
    return _pad(call, module.padding)


def _pad_function(call: Call) -> fx.Node:
    mode, value = call.get(2, "mode", "constant"), call.get(3, "value", 0)
    if mode != "constant" or (value or 0) != 0:
        raise _Refused(f"padding mode {mode!r} with {value}: only with constant zeros")
    return _pad(call, call.get(1, "pad"))


def _pad(call: Call, pads: Any) -> fx.Node:
    pads = tuple(int(p) for p in pads)
    if len(pads) // 2 >= len(call.shape()) and any(pads[2 * (len(call.shape()) - 1) :]):
        raise _Refused("pads dimension 0, the batch")
    return call.put(Pad(pads[: 2 * (len(call.shape()) - 1)])) if any(pads) else call.at(call.x)


def _upsample_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    return _upsampled(call, module.mode)


def _interpolate(call: Call) -> fx.Node:
    return _upsampled(call, call.get(3, "mode", "nearest"))


def _upsampled(call: Call, mode: str) -> fx.Node:
    before, after = call.shape()[2:], call.out[2:]
    if mode not in ("nearest", "nearest-exact") or any(b % a for a, b in zip(before, after, strict=True)):
        raise _Refused(f"mode {mode!r} from {before} to {after}: {ADVICE['interpolate']}")
    return call.put(Upsample(tuple(b // a for a, b in zip(before, after, strict=True))))


def _dropout(call: Call) -> fx.Node:
    if call.get(2, "training", True) and call.get(1, "p", 0.5) > 0:
        raise _Refused(
            f"{call.name} drops values at inference too: call {call.name}(x, p, training=self.training), or use "
            f"nn.Dropout"
        )
    return call.put(nn.Dropout(call.get(1, "p", 0.5)))


def _average_pool(call: Call) -> fx.Node:
    options: dict[str, Any] = {
        "kernel_size": call.get(1, "kernel_size"), "stride": call.get(2, "stride") or None,
        "padding": call.get(3, "padding", 0), "ceil_mode": call.get(4, "ceil_mode", False),
        "count_include_pad": call.get(5, "count_include_pad", True),
    }  # fmt: skip
    sides = len(call.shape()) - 2
    if sides > 1:
        options["divisor_override"] = call.get(6, "divisor_override")
    pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[sides](**_tuples(options))
    return call.put(_adaptive(sides) if _covers(pool, call.shape()) else pool)


def _max_pool(call: Call) -> fx.Node:
    if call.get(6, "return_indices", False):
        raise _Refused("return_indices=True: spikes carry no indices")
    options = {
        "kernel_size": call.get(1, "kernel_size"), "stride": call.get(2, "stride") or None,
        "padding": call.get(3, "padding", 0), "dilation": call.get(4, "dilation", 1),
        "ceil_mode": bool(call.get(5, "ceil_mode", False)),
    }  # fmt: skip
    return call.put({1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[len(call.shape()) - 2](**_tuples(options)))


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _adaptive_pool(call: Call) -> fx.Node:
    size, sides = call.get(1, "output_size", 1), len(call.shape()) - 2
    kind = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[sides]
    return call.put(kind(tuple(size) if isinstance(size, list) else size))


def _mean(call: Call) -> fx.Node:
    dims, keep, shape = call.dims(call.get(1, "dim")), call.get(2, "keepdim", False), call.shape()
    if len(shape) > 2 and sorted(dims) == list(range(2, len(shape))):
        pooled = call.put(_adaptive(len(shape) - 2))
        return pooled if keep else call.speller.put(call.node.name, nn.Flatten(), (pooled,))
    return call.put(Mean(dims, bool(keep)))


def _sum(call: Call) -> fx.Node:
    return call.put(Sum(call.dims(call.get(1, "dim")), bool(call.get(2, "keepdim", False))))


def _flatten(call: Call) -> fx.Node:
    ends = call.get(1, "start_dim", 0), call.get(2, "end_dim", -1)
    return call.put(nn.Flatten()) if ends == (1, -1) else call.view()


def _as_view(call: Call) -> fx.Node:
    return call.view()


def _same(call: Call) -> fx.Node:
    return call.at(call.x)


def _permute(call: Call) -> fx.Node:
    rank = len(call.shape())
    order: Any = call.node.args[1:] or (call.get(1, "dims"),)
    given = order[0] if isinstance(order[0], list | tuple) else order
    return _permuted(call, tuple(d % rank for d in given))


def _permuted(call: Call, dims: tuple[int, ...]) -> fx.Node:
    if dims[0] != 0:
        raise _Refused("moves the batch from dimension 0")
    return call.at(call.x) if dims == tuple(range(len(dims))) else call.put(Permute(dims))


def _transpose(call: Call) -> fx.Node:
    dims = list(range(len(call.shape())))
    a, b = call.get(1, "dim0"), call.get(2, "dim1")
    dims[a], dims[b] = dims[b], dims[a]
    return _permuted(call, tuple(dims))


def _movedim(call: Call) -> fx.Node:
    sides = torch.zeros([place + 2 for place in range(len(call.shape()))])  # sides that tell the dimensions apart
    moved = sides.movedim(call.get(1, "source"), call.get(2, "destination"))
    return _permuted(call, tuple(side - 2 for side in moved.shape))


def _turned(call: Call) -> fx.Node:
    """x.T and x.mT."""
    rank, name = len(call.shape()), call.get(1, "name")
    dims = tuple(reversed(range(rank))) if name in ("T", "H") else (*range(rank - 2), rank - 1, rank - 2)
    return _permuted(call, dims)


def _getitem(call: Call) -> Any:
    source, place = call.get(0, "a"), call.get(1, "b")
    found = call.speller.written.get(source)
    if isinstance(found, list):
        return found[place]
    shape = call.shape(source)
    parts: list[Any] = list(place) if isinstance(place, tuple) else [place]
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - sum(part is not None for part in parts) + 1)
    kept = [part for part in parts if part is not None]
    if not all(isinstance(part, slice | int) for part in kept):
        raise _Refused("indexes with a tensor or a list; take slices")
    bounds: list[Any] = []
    for side, part in zip(shape, kept, strict=False):
        part = slice(part % side, part % side + 1) if isinstance(part, int) else part
        bounds.append(part.indices(side))
    if kept and (isinstance(kept[0], int) or bounds[0] != (0, shape[0], 1)):
        raise _Refused("takes images out of the batch")
    whole = all(bound == (0, side, 1) for bound, side in zip(bounds, shape, strict=False))
    node = call.at(source) if whole else call.put(Slice(tuple(bounds[1:])), call.at(source))
    if any(part is None or isinstance(part, int) for part in parts):
        return call.view(call.out, node)
    return node


def _parts(call: Call) -> list[fx.Node]:
    """chunk, split, tensor_split, unbind: a list of slices."""
    sizes: list[Shape] = call.speller.shapes[call.node.name][0]
    unbound = call.name == "unbind"
    place = call.get(1, "dim", 0) if unbound else call.get(2, "dim", 0)
    (dim,) = call.dims(place)
    found, start = [], 0
    for size in sizes:
        side = 1 if unbound else size[dim]
        bounds = [(0, n, 1) for n in call.shape()[1:]]
        bounds[dim - 1] = (start, start + side, 1)
        node = call.put(Slice(tuple(bounds)))
        found.append(call.view(size, node) if unbound else node)
        start += side
    return found


def _cat(call: Call) -> fx.Node:
    parts = list(call.get(0, "tensors"))
    values = [part for part in parts if call.constant(part) is None]
    rank = len(call.shape(values[0]))
    dim = call.get(1, "dim", call.node.kwargs.get("axis", 0)) % rank
    if dim == 0:
        raise _Refused("joins along dimension 0, the batch")
    if len(values) == len(parts):
        return call.put(Concat(dim), *(call.at(part) for part in parts))
    numbers = [call.constant(part) for part in parts if part is not values[0]]
    if len(values) > 1 or any(number is not None and bool((number != 0).any()) for number in numbers):
        raise _Refused("joins with numbers that are not zero")
    at = parts.index(values[0])
    sizes = [_shape_of(call, part)[dim] for part in parts]
    pads = [0] * (2 * (rank - dim))
    pads[-2:] = [sum(sizes[:at]), sum(sizes[at + 1 :])]
    return call.put(Pad(tuple(pads)), call.at(values[0]))


def _shape_of(call: Call, part: Any) -> Shape:
    """The shape of a value or of a tensor that no image changes."""
    constant = call.constant(part)
    return call.shape(part) if constant is None else tuple(constant.shape)


def _stack(call: Call) -> fx.Node:
    parts = list(call.get(0, "tensors"))
    rank = len(call.out)
    dim = call.get(1, "dim", 0) % rank
    if dim == 0:
        raise _Refused("stacks along dimension 0, the batch")
    raised = []
    for part in parts:
        shape = list(call.shape(part))
        shape.insert(dim, 1)
        raised.append(call.view(shape, call.at(part)))
    return call.put(Concat(dim), *raised)


def _scaled(call: Call, node: fx.Node, factor: Tensor) -> fx.Node:
    return call.put(Scale(_fits(call, factor)), node)


def _fits(call: Call, value: Tensor) -> Tensor:
    if value.dim() > len(call.out) or (value.dim() == len(call.out) and value.shape[0] != 1):
        raise _Refused(f"a tensor of shape {tuple(value.shape)} that differs from image to image of a batch")
    return value


def _sum_of(call: Call, sign: int, first: Any, second: Any, alpha: Any = 1) -> fx.Node:
    """first + sign·alpha·second."""
    a, b = call.constant(first), call.constant(second)
    factor = float(sign) * float(alpha)
    if b is not None:
        kept = b if factor == 1 else b.detach() * factor
        nothing = not isinstance(kept, nn.Parameter) and not bool((kept != 0).any())
        return call.at(first) if nothing else call.put(Shift(_fits(call, kept)), call.at(first))
    other = call.at(second) if factor == 1 else _scaled(call, call.at(second), torch.tensor(factor))
    if a is not None:
        return call.put(Shift(_fits(call, a)), other)
    if len(call.shape(first)) != len(call.shape(second)):
        raise _Refused(f"adds values of {len(call.shape(first))} and {len(call.shape(second))} dimensions")
    return call.put(Add(), call.at(first), other)


def _add(call: Call) -> fx.Node:
    return _sum_of(call, 1, call.get(0, "input"), call.get(1, "other"), call.node.kwargs.get("alpha", 1))


def _sub(call: Call) -> fx.Node:
    return _sum_of(call, -1, call.get(0, "input"), call.get(1, "other"), call.node.kwargs.get("alpha", 1))


def _rsub(call: Call) -> fx.Node:
    return _sum_of(call, -1, call.get(1, "other"), call.get(0, "input"), call.node.kwargs.get("alpha", 1))


def _mul(call: Call) -> fx.Node:
    first, second = call.get(0, "input"), call.get(1, "other")
    a, b = call.constant(first), call.constant(second)
    if a is None and b is None:
        raise _Refused(f"{call.name}: {ADVICE['mul']}")
    node, factor = (first, b) if b is not None else (second, a)
    assert factor is not None
    return _scaled(call, call.at(node), factor)


def _div(call: Call) -> fx.Node:
    factor = call.constant(call.get(1, "other"))
    if factor is None or call.node.kwargs.get("rounding_mode"):
        raise _Refused("divides by a value that depends on the image, or rounds")
    return _scaled(call, call.at(call.get(0, "input")), 1.0 / factor.detach())


def _neg(call: Call) -> fx.Node:
    return _scaled(call, call.at(call.x), torch.tensor(-1.0))


def _convolution(call: Call) -> fx.Node:
    weight, bias = call.constant(call.get(1, "weight")), call.constant(call.get(2, "bias"))
    if weight is None:
        raise _Refused("weights that depend on the image")
    dims, transposed = weight.dim() - 2, "transpose" in call.name
    names = ("stride", "padding", *(("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")))
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    options = _tuples({name: call.get(place, name, defaults[name]) for place, name in enumerate(names, 3)})
    kinds: dict[Any, Any] = {
        (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
        (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d,
    }  # fmt: skip
    width = weight.shape[1] * options["groups"]
    channels = (weight.shape[0], width) if transposed else (width, weight.shape[0])
    layer = kinds[dims, transposed](*channels, tuple(weight.shape[2:]), bias=bias is not None, **options)
    return call.put(_with(layer, weight, bias))


def _linear(call: Call) -> fx.Node:
    weight, bias = call.constant(call.get(1, "weight")), call.constant(call.get(2, "bias"))
    if weight is None:
        raise _Refused("weights that depend on the image")
    return call.put(_with(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight, bias))


def _matmul(call: Call) -> fx.Node:
    weight = call.constant(call.get(1, "other"))
    if weight is None or weight.dim() != 2:
        raise _Refused(f"{call.name}: {ADVICE['matmul']}")
    return call.put(_with(nn.Linear(weight.shape[0], weight.shape[1], False), weight.detach().T, None))


def _with(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    found: nn.Module = layer.to(weight.device)
    return found


def _batch_norm(call: Call) -> fx.Node:
    values = [call.constant(call.get(place, name)) for place, name in enumerate(
        ("running_mean", "running_var", "weight", "bias"), 1)]  # fmt: skip
    mean, var, weight, bias = values
    if mean is None or var is None or call.get(5, "training", False):
        raise _Refused("statistics of each batch's own; pass running statistics and training=self.training")
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(call.shape())]
    norm: Any = kind(len(mean), eps=call.get(7, "eps", 1e-5), affine=weight is not None)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    return call.put(norm if weight is None else _with(norm, weight, bias))


def _pixel(module: type[nn.Module]) -> Spelling:
    return lambda call: call.put(module(call.get(1, "upscale_factor", call.get(1, "downscale_factor"))))


def _shuffle(call: Call) -> fx.Node:
    return call.put(nn.ChannelShuffle(call.get(1, "groups")))


def _zeros_like(call: Call) -> Tensor:
    """A constant made after the shape of a value."""
    value = {"zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}[call.name]
    return torch.full(call.out, value)


def _maximum(call: Call) -> fx.Node:
    other = call.constant(call.get(1, "other"))
    if other is None or bool((other != 0).any()):
        raise _Refused(f"{call.name}: {ADVICE['maximum']}")
    return call.put(nn.ReLU())


SPELLINGS: dict[Any, Spelling] = {
    **dict.fromkeys((F.relu, torch.relu, F.relu_, "relu", "relu_"), _relu),
    F.relu6: lambda call: call.put(ClippedReLU(6.0)),
    nn.ReLU6: lambda call: _same_place(call, ClippedReLU(6.0)),
    nn.Hardtanh: _hardtanh_module, nn.Threshold: _threshold_module,
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"), _clamp),
    **dict.fromkeys((torch.clamp_min, "clamp_min", "clamp_min_"),
                    lambda call: _clipped(call.get(1, "min"), None, call)),
    **dict.fromkeys((F.hardtanh, F.hardtanh_, "hardtanh", "hardtanh_"), _hardtanh),
    **dict.fromkeys((F.threshold, torch.threshold, torch.threshold_), _threshold),
    **dict.fromkeys((torch.maximum, torch.max, "maximum", "max"), _maximum),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
                    _dropout),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _ending(lambda call: nn.Softmax(call.get(1, "dim")))),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"),
                    _ending(lambda call: nn.LogSoftmax(call.get(1, "dim")))),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), _ending(lambda call: nn.Sigmoid())),
    F.logsigmoid: _ending(lambda call: nn.LogSigmoid()),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d), _average_pool),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
                    _max_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d),
                    _adaptive_pool),
    **dict.fromkeys((torch.mean, "mean"), _mean), **dict.fromkeys((torch.sum, "sum"), _sum),
    **dict.fromkeys((torch.flatten, "flatten"), _flatten),
    **dict.fromkeys(
        (torch.reshape, torch.unsqueeze, torch.squeeze, torch.unflatten, torch.Tensor.view, nn.Unflatten, "view",
         "reshape", "unsqueeze", "squeeze", "unflatten", "view_as", "reshape_as", "unsqueeze_", "squeeze_"), _as_view,
    ),
    **dict.fromkeys(
        (torch.clone, torch.detach, "contiguous", "clone", "detach", "float", "to", "type", "type_as", "cpu", "cuda",
         "requires_grad_", "positive", operator.pos, torch.positive, nn.Identity), _same,
    ),
    **dict.fromkeys((torch.permute, "permute"), _permute),
    **dict.fromkeys((torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys((torch.movedim, torch.moveaxis, "movedim", "moveaxis"), _movedim),
    **dict.fromkeys((torch.t, "t"), lambda call: _permuted(call, (1, 0))),
    getattr: _turned, operator.getitem: _getitem,
    **dict.fromkeys((torch.narrow, "narrow"), lambda call: _narrow(call)),
    **dict.fromkeys((torch.select, "select"), lambda call: _select(call)),
    **dict.fromkeys((torch.chunk, torch.split, torch.unbind, torch.tensor_split, "chunk", "split", "unbind",
                     "tensor_split", "split_with_sizes"), _parts),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat), torch.stack: _stack,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"), _sub),
    **dict.fromkeys((torch.rsub, "rsub"), _rsub),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"), _mul),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_",
                     "divide", "true_divide"), _div),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative, "neg", "neg_", "negative"), _neg),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d), _convolution),
    F.linear: _linear, **dict.fromkeys((operator.matmul, torch.matmul, "matmul"), _matmul),
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.pad, torch.nn.functional.pad), _pad_function),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
                    _zero_pad_module),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d), _upsample_module),
    **dict.fromkeys((F.interpolate, F.upsample), _interpolate),
    F.pixel_shuffle: _pixel(nn.PixelShuffle), F.pixel_unshuffle: _pixel(nn.PixelUnshuffle),
    **dict.fromkeys((F.channel_shuffle, torch.channel_shuffle, F.native_channel_shuffle), _shuffle),
    **dict.fromkeys((torch.zeros_like, torch.ones_like, "new_zeros", "new_ones"), _zeros_like),
}  # fmt: skip
"""Functions, method names, and modules of torch.nn that are written in another form, each with how it is spelled."""


def _narrow(call: Call) -> fx.Node:
    (dim,) = call.dims(call.get(1, "dim"))
    bounds = [(0, n, 1) for n in call.shape()[1:]]
    start = call.get(2, "start")
    bounds[dim - 1] = (start, start + call.get(3, "length"), 1)
    return call.put(Slice(tuple(bounds)))


def _select(call: Call) -> fx.Node:
    (dim,) = call.dims(call.get(1, "dim"))
    bounds = [(0, n, 1) for n in call.shape()[1:]]
    start = call.get(2, "index") % call.shape()[dim]
    bounds[dim - 1] = (start, start + 1, 1)
    return call.view(call.out, call.put(Slice(tuple(bounds))))


def trace(model: nn.Module, shape: Shape | None, known: Known = lambda module: False) -> fx.GraphModule:
    """Return a copy of ``model`` as a graph of modules, one a kind; parameters are copied, names stay.

    Args:
        model: not changed. What quantize or convert made is spelled already, and is copied.
        shape: (C, H, W), or whatever one image has.
        known: whether a layer is taken that no row of the table names (a quantized activation).
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
    speller = Speller(raw, shapes, known)
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
