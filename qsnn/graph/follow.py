"""torch.fx follows a network on two small batches, so that every size is a number and every step in place is seen."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _orig_module_call
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_leaves, tree_unflatten

from qsnn.graph.kinds import kind_of, refused

_BATCHES = (2, 3)
"""Images of the two batches that a network is followed on: what differs between them is the batch size."""


class Following(fx.Proxy):
    """A value while a network is followed: a node of the graph, and the tensor it has for the example batch.

    Sizes are numbers, so that whatever a network computes from them is known. Only values of pixels are not.
    """

    value: Any = None
    stale: str | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]  # networks ask isinstance(x, torch.Tensor)
        return Tensor if isinstance(object.__getattribute__(self, "__dict__").get("value"), Tensor) else Following

    @property
    def shape(self) -> torch.Size:
        """Of the example."""
        return cast(torch.Size, self.value.shape)

    def size(self, dim: int | None = None) -> Any:
        """Of the example, as ``Tensor.size``."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements of the example."""
        return self.shape.numel()

    ndim = property(dim)
    ndimension = dim
    nelement = numel
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)
    is_cuda = property(lambda self: self.value.is_cuda)
    requires_grad = property(lambda self: False)
    training = property(lambda self: False)

    T = property(lambda self: self._turned("T"))
    mT = property(lambda self: self._turned("mT"))
    data = property(lambda self: self.detach())

    def _turned(self, name: str) -> Any:
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def is_contiguous(self, **options: Any) -> bool:
        """Of the example."""
        return bool(self.value.is_contiguous(**options))

    def is_floating_point(self) -> bool:
        """Of the example."""
        return bool(self.value.is_floating_point())

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, place) for place in range(len(self.value))])  # type: ignore[call-overload]

    def __bool__(self) -> bool:
        raise TypeError("the way through it depends on the values of an image")

    __int__ = __float__ = __index__ = __bool__  # type: ignore[assignment]

    def __setitem__(self, place: Any, value: Any) -> None:
        raise TypeError("it writes into a part of a tensor in place; build the tensor with torch.cat instead")


def _in_place(name: str) -> Callable[..., Any]:
    def operation(self: Following, other: Any) -> Any:
        return getattr(self, name)(other)

    return operation


for _operator, _method in (("add", "add_"), ("sub", "sub_"), ("mul", "mul_"), ("truediv", "div_")):
    setattr(Following, f"__i{_operator}__", _in_place(_method))  # fx would forget that x += y changes x for all


class Tracer(fx.Tracer):
    """torch.fx's tracer that runs every step on an example, and takes each layer of the table as one step."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.example = example
        self.values: list[weakref.ref[Following]] = []
        self.shapes: dict[fx.Node, Any] = {}
        self._inside, self._made = False, 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether ``m`` is one step: a kind of the table, a layer of torch.nn, Brevitas or SpikingJelly."""
        return is_step(m)

    def proxy(self, node: fx.Node) -> Following:
        """Return what stands for the value of a node."""
        found = Following(node, self)
        self.values.append(weakref.ref(found))
        return found

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a module, or run it where it is called on tensors: inside a step, or on what no image changes."""
        if self._inside or not any(type(leaf) is Following for leaf in tree_leaves((args, kwargs))):
            return forward(*args, **kwargs)
        paths = self.submodule_paths or {}
        if m not in paths:  # made on the way: a part of an nn.Sequential, or nn.ReLU()(x)
            if not is_step(m):
                return forward(*args, **kwargs)
            name = f"made_{self._made}"
            self._made += 1
            self.root.add_module(name, m)
            paths[m] = name
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a parameter as it is; it becomes a node where a step on a value reads it."""
        return attr_val

    def create_arg(self, a: Any) -> Any:
        """Return the node behind a value."""
        if named(a) is not None:  # heads go by name: fx would write a call of the class
            return super().create_arg(named(a))
        if type(a) is Following:
            if a.stale is not None:
                raise ValueError(
                    f"{a.stale} changes a tensor in place of which another part or view is used afterwards; write it "
                    f"without inplace=True, or without the underscore"
                )
            return a.node
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Add a step and run it on the example; what no tensor comes of is a number, and no step."""
        if kind == "placeholder":
            if args:
                return args[0]  # an input with a default keeps it
            if str(target).startswith("*"):
                return {} if str(target).startswith("**") else ()
        value, changed = self._run(kind, target, args, kwargs)
        if isinstance(value, tuple | list) and any(isinstance(part, tuple | list | dict) for part in value):
            layer = self.root.get_submodule(target) if kind == "call_module" else None
            reason = (layer is not None and refused(layer)) or "which gives values within values"
            raise ValueError(f"cannot take {target} ({reason})")
        if not isinstance(value, Tensor) and not (
            isinstance(value, tuple | list) and value and all(isinstance(part, Tensor) for part in value)
        ):
            return value
        found = cast(Following, super().create_proxy(kind, target, args, kwargs, *rest, **options))
        found.value = value
        self.shapes[found.node] = tuple(value.shape) if isinstance(value, Tensor) else [tuple(v.shape) for v in value]
        for tensor in changed:
            self._follow_change(tensor, found)
        if isinstance(value, Tensor):
            return found
        # of several results each is a value of its own, and the user's code holds them in a tuple, or by their names
        parts = [self.create_proxy("call_function", operator.getitem, (found, n), {}) for n in range(len(value))]
        named = type(value) not in (tuple, list) and hasattr(value, "n_fields")  # torch.return_types
        return type(value)(parts) if named else tuple(parts)

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        """What the step gives for the example, and which of its inputs it changed in place."""
        if kind == "placeholder":
            return self.example, []
        if kind == "get_attr":
            value: Any = self.root
            for name in str(target).split("."):
                value = getattr(value, name)
            return value, []
        given, named = (
            fx.node.map_aggregate(part, lambda a: a.value if type(a) is Following else a) for part in (args, kwargs)
        )
        tensors = [leaf for leaf in tree_leaves((given, named)) if isinstance(leaf, Tensor)]
        before = [tensor._version for tensor in tensors]
        self._inside = True
        try:
            with torch.no_grad():
                if kind == "call_module":
                    value = _orig_module_call(self.root.get_submodule(target), *given, **named)
                elif kind == "call_method":
                    value = getattr(given[0], target)(*given[1:], **named)
                else:
                    value = target(*given, **named)
        finally:
            self._inside = False
        return value, [t for t, version in zip(tensors, before, strict=True) if t._version != version]

    def _follow_change(self, changed: Tensor, result: Following) -> None:
        """After a step in place: who reads the tensor from now on reads the result; a part of it cannot be read."""
        place = changed.untyped_storage().data_ptr()
        for reference in self.values:
            other = reference()
            if other is None or other is result or not isinstance(other.value, Tensor):
                continue
            if other.value.untyped_storage().data_ptr() != place:
                continue
            same = result.value is changed or (
                other.value.data_ptr() == changed.data_ptr()
                and other.value.shape == changed.shape
                and other.value.stride() == changed.stride()
            )
            if same and other.value.shape == result.value.shape and other.value.stride() == result.value.stride():
                other.node = result.node
            else:
                other.stale = result.node.name


def named(value: Any) -> dict[str, Any] | None:
    """The fields of a named tuple or a dataclass that holds several answers; None for anything else."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


_ONE_AT_A_TIME = threading.RLock()
"""torch.fx, and what is followed beside it, puts its own functions into torch's classes while it traces."""


class _Context:
    """What a torch.autograd.Function gets while it is followed; nothing goes backward."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is kept."""

    mark_dirty = mark_non_differentiable = save_for_forward = set_materialize_grads = save_for_backward


@contextmanager
def _functions_followed() -> Iterator[None]:
    """Follow what a torch.autograd.Function computes forward; its own ``apply`` takes what is followed for tensors."""
    function: Any = torch.autograd.Function
    own = vars(function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(type(leaf) is Following for leaf in tree_leaves((args, kwargs))):
            return own.__get__(None, cls)(*args, **kwargs)
        apart = cls.setup_context is not function.setup_context
        return cls.forward(*args, **kwargs) if apart else cls.forward(_Context(), *args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = own


def is_step(module: nn.Module) -> bool:
    """Return whether a module is one step of a graph: a question of its class, not of where the class was written."""
    if kind_of(module) is not None or any(hasattr(module, name) for name in ("act_quant", "weight_quant", "step_mode")):
        return True
    if getattr(module, "is_spiking", False) or type(module).__module__.startswith("qsnn."):
        return not any(True for _ in module.children()) and not isinstance(module, nn.Sequential)
    return type(module).__module__.startswith("torch.nn.modules") and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    )


def follow(model: nn.Module, shape: tuple[int, ...]) -> tuple[fx.GraphModule, dict[str, tuple[Any, Any]]]:
    """Return the graph of a model in eval mode, and each node's shape for the two example batches.

    Args:
        model: not changed.
        shape: that of one image.
    Raises:
        ValueError: it takes another number of inputs, or its way depends on the values or the number of images.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():  # a hook is no layer; what it does shows when the answers are compared
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    needed = [
        parameter.name for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    if len(needed) != 1:
        instead = "join several along the channels, and slice them in forward" if needed else "write forward(self, x)"
        raise ValueError(f"expected a model with one input, {type(model).__name__} takes {needed}; {instead}")
    first = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    found = []
    for batch in _BATCHES:
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(batch, *shape, generator=generator).to(first.device, first.dtype)
        tracer = Tracer(example)
        try:
            # without gradients a block under torch.utils.checkpoint is run as it is
            with _ONE_AT_A_TIME, torch.no_grad(), _functions_followed():
                found.append((tracer.trace(model), tracer))
        except ValueError:
            raise
        except Exception as error:  # fx and the user's own code raise many kinds; each means the same to the user
            raise ValueError(
                f"cannot follow {type(model).__name__} with torch.fx on images of shape {tuple(shape)} ({error}); a "
                f"model must have one input and no control flow (nor assertion) that depends on its values"
            ) from error
    (graph, tracer), (again, other) = found
    _restructure_(graph)
    nodes, twins = list(graph.nodes), list(again.nodes)
    if list(map(_step, nodes)) != list(map(_step, twins)):
        raise ValueError(f"the way through {type(model).__name__} depends on the number of images in a batch")
    shapes = {n.name: (tracer.shapes.get(n), other.shapes.get(t)) for n, t in zip(nodes, twins, strict=True)}
    return fx.GraphModule(tracer.root, graph, type(model).__name__), shapes


def _restructure_(graph: fx.Graph) -> None:
    """Give answers their structure again, in place: of a model that takes ``**options`` fx writes a list of them."""
    if isinstance(graph._codegen, _PyTreeCodeGen):
        spec: Any = graph._codegen.pytree_info.out_spec
        (output,) = (node for node in graph.nodes if node.op == "output")
        output.args = (tree_unflatten(cast(Any, output.args[0]), spec),)
        graph.set_codegen(fx.graph.CodeGen())


def _step(node: fx.Node) -> tuple[str, str]:
    return node.op, "" if node.op == "get_attr" else str(node.target)  # constants are numbered
