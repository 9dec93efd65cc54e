"""fold(): the integer form of a spiking network. Batch norm, scales and biases go into integer thresholds."""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.currents import Term, Value, input_gains, pool_windows, stacked, worth
from qsnn.firing import Current, CurrentIF, DynamicIF, IntegerIF, RealIF
from qsnn.graph import (
    ADD_FUNCTIONS,
    ADD_METHODS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    LAYERS,
    MAX_POOLS,
    PASSED,
    VIEW_FUNCTIONS,
    VIEW_METHODS,
    child_recipe,
    input_shape_of,
    is_call,
    module_of,
    pixels_only,
    set_recipe,
    shape_nodes,
    value_shapes,
    zero_pads,
)
from qsnn.integer import FloatLayer, IntegerInput, IntegerLayer, SumPool
from qsnn.neurons import SNN, IFNode, PlusMinus, Repeat, amplified
from qsnn.quantizers import level_quant
from qsnn.weights import integer_weights, weight_bits


def fold(snn: SNN, *, dtype: torch.dtype = torch.float64) -> SNN:
    r"""Return the integer form of a spiking network: integer weights, spikes 0/1, thresholds per channel.

    With integer weights W and spikes, a layer's input A is an integer. Scales, batch norm and bias go into what a unit
    of A is worth, :math:`g_c = \gamma'_c\, s_w\, \theta_{in}`, and a bias b_c; the neuron compares A with the integers
    of :class:`~qsnn.integer.IntegerIF`. γ < 0 flips a channel's weights, average pooling sums spikes. Where currents
    meet (a residual sum before its neuron) they are added in float64. Spikes and argmax are those of the unfolded
    network in float64, the scales read once in the dtype it runs in.

    Args:
        snn: what :func:`qsnn.convert` or :func:`qsnn.distill` returned. It is not changed; training mode is left.
        dtype: what layers of float weights run in. float32 is faster, and a spike may then flip where a potential
            meets θ to the last bit; layers of low-precision weights are exact in either.
    Raises:
        TypeError: not an SNN.
        ValueError: already folded, or an operation that has no integer form (it is named).
    """
    if not isinstance(snn, SNN):
        raise TypeError(f"expected an SNN from convert or distill, got {type(snn).__name__}")
    if snn.folded:
        raise ValueError("this network is folded already")
    network = copy.deepcopy(snn.network).eval()
    with torch.no_grad():
        folder = _Folder(network, value_shapes(network, input_shape_of(snn)), dtype)
        folded = SNN(folder.run(), snn.timesteps, snn.firing, folded=True, probes=snn.probes)
    folded.eval()
    set_recipe(folded, child_recipe(snn, "folded"))
    return folded


class _Folder:
    """Walks the old graph in order and builds the new one; ``values`` says what each old node stands for."""

    def __init__(self, network: fx.GraphModule, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.old, self.shapes, self.dtype = network, shapes, dtype
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Value] = {}
        self.sizes = shape_nodes(network)
        self.copied: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            value = self._fold_node(node)
            if value is not None:
                self.values[node] = value
        return fx.GraphModule(self.root, self.graph, "Folded")

    def _fold_node(self, node: fx.Node) -> Value | None:
        if node.op == "placeholder":
            return Value((Term(self.graph.placeholder(node.name), integer=False, bound=float("inf")),))
        if node.op == "get_attr":
            return None
        if node.op == "output":
            (source,) = node.all_input_nodes
            self.graph.output(self._current(self.values[source], "readout"))
            return None
        if node in self.sizes:
            self.copied[node] = self.graph.node_copy(node, self._counterpart)
            return None
        module = module_of(self.old, node)
        if module is not None:
            return self._module(node, module, self.values[node.all_input_nodes[0]])
        if is_call(node, (amplified,)):
            spikes, threshold = node.all_input_nodes
            theta: Tensor = operator.attrgetter(str(threshold.target))(self.old)
            return self._scaled(self.values[spikes], theta.detach().double().reshape(-1))
        if is_call(node, ADD_FUNCTIONS, ADD_METHODS) and len(node.all_input_nodes) == 2:
            return self._added(*(self.values[source] for source in node.all_input_nodes))
        if is_call(node, (torch.cat,)):
            return self._concatenated(node)
        if is_call(node, (torch.flatten,), ("flatten",)):
            return self._flattened(node, self.values[node.all_input_nodes[0]])
        if (widths := zero_pads(node)) is not None or pixels_only(node):
            return self._cut_or_padded(node, self.values[node.all_input_nodes[0]], widths or ())
        if is_call(node, (*VIEW_FUNCTIONS, operator.getitem), VIEW_METHODS):
            return self._moved(node, self.values[node.all_input_nodes[0]])
        raise ValueError(f"cannot fold {node.name} ({node.target}): it has no integer form")

    def _counterpart(self, node: fx.Node) -> fx.Node:
        """The new graph's node for a size, or for the first term of a value (whose shape is the same)."""
        return self.copied[node] if node in self.copied else self.values[node].terms[0].node

    def _moved(self, node: fx.Node, value: Value) -> Value:
        """A view, transposition or split: on integers with one gain it does the same; else on the current itself."""
        term = value.terms[0]
        if not value.spikes_only:
            term = Term(self._current(value, f"{node.name}_input"), integer=False, bound=float("inf"))
            self.values[node.all_input_nodes[0]] = Value((term,))
        return Value((replace(term, node=self.graph.node_copy(node, self._counterpart)),))

    def _cut_or_padded(self, node: fx.Node, value: Value, widths: tuple[int, ...]) -> Value:
        """Every second pixel, or zeros around pixels and channels: what a unit is worth goes with its channel."""
        source = node.all_input_nodes[0]
        dims = len(self.shapes.get(source.name, ()))
        channels = tuple(widths[2 * (dims - 2) :]) if dims else ()  # F.pad names the last dimension first
        if widths and (not dims or len(channels) > 2):
            why = "the image shape is unknown; quantize with data records it" if not dims else "it pads the batch"
            raise ValueError(f"cannot fold {node.name}: {why}")
        if len(value.terms) > 1 or (widths and value.bias is not None):  # there is no bias in what was padded
            term = Term(self._current(value, f"{node.name}_input"), integer=False, bound=float("inf"))
            value = Value((term,))
        (term,) = value.terms

        def beside(factor: Tensor) -> Tensor:
            return factor if factor.numel() == 1 or not channels else F.pad(factor, channels, value=1.0)

        new = self.graph.node_copy(node, lambda old: term.node if old is source else self._counterpart(old))
        return Value((replace(term, node=new, factors=tuple(map(beside, term.factors))),), value.bias)

    def _module(self, node: fx.Node, module: nn.Module, value: Value) -> Value:
        name = str(node.target)
        if isinstance(module, PASSED):
            return value
        if isinstance(module, IFNode):
            return self._neuron(name, module, value, alone=len(node.all_input_nodes[0].users) == 1)
        if isinstance(module, PlusMinus):
            (term,) = value.terms
            return Value((replace(term, node=self._call(name, PlusMinus(), term.node)),))
        if isinstance(module, Repeat):
            terms = tuple(replace(t, node=self._call(name, Repeat(), t.node)) for t in value.terms)
            return Value(terms, value.bias)
        quant = level_quant(module)
        if quant is not None:
            step = quant.step
            call = self._call(name, IntegerInput(step, quant.levels), value.terms[0].node)
            return Value((Term(call, (step.double().reshape(-1),), bound=quant.levels),))
        if isinstance(module, LAYERS):
            return self._layer(name, module, value)
        if isinstance(module, BATCH_NORMS):
            return self._batch_norm(node, module, value)
        if isinstance(module, AVERAGE_POOLS):
            return self._average_pool(node, module, value)
        if isinstance(module, MAX_POOLS):
            positive = all(bool((factor > 0).all()) for factor in value.terms[0].factors)
            if not ((value.spikes_only or value.spikes_by_channel) and positive):
                raise ValueError(f"cannot fold the max pool {name}: it must follow spikes")
            return Value((replace(value.terms[0], node=self._call(name, copy.deepcopy(module), value.terms[0].node)),))
        if isinstance(module, nn.Flatten):
            return self._flattened(node, value)
        raise ValueError(f"cannot fold {name} ({type(module).__name__}): it has no integer form")

    def _call(self, name: str, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """Add ``module`` under the path ``name`` (or name_1, ... where taken) and a call of it."""
        taken = {existing for existing, _ in self.root.named_modules()}
        unique, count = name, 0
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        parent = self.root
        *path, last = unique.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, module)
        return self.graph.call_module(unique, inputs)

    def _neuron(self, name: str, neuron: IFNode, value: Value, *, alone: bool) -> Value:
        threshold, initial = neuron.threshold.detach(), neuron.initial.detach()
        first = value.terms[0]
        raw = len(value.terms) == 1 and not first.integer and not first.factors and first.divisor == 1
        if raw and value.bias is None and neuron.dynamics.plain:
            if unit := alone and self._absorbs(first.node):  # the layer then counts in units of θ
                layer: Any = self.root.get_submodule(str(first.node.target))
                layer.absorb_(1.0 / threshold.reshape(-1), torch.zeros_like(threshold).reshape(-1), self.dtype)
            module: nn.Module = RealIF(threshold, initial, unit=unit, constant=neuron.constant_input)
            return Value((Term(self._call(name, module, first.node), spikes=True),))
        if neuron.constant_input:
            terms = tuple(replace(t, node=self._call(f"{name}_repeat", Repeat(), t.node)) for t in value.terms)
            value = replace(value, terms=terms)
        (first, *rest), bias = value.terms, self._bias(value)
        if neuron.dynamics.plain and first.integer and not rest and not threshold.dim():
            module = IntegerIF(stacked(first.factors), first.divisor, bias, threshold, initial, first.bound)
        else:
            currents = [stacked(term.factors) for term in value.terms], [term.divisor for term in value.terms], bias
            if neuron.dynamics.plain:
                module = CurrentIF(*currents, threshold, initial)
            else:
                module = DynamicIF(*currents, threshold, initial, neuron.dynamics, neuron.tau)
        return Value((Term(self._call(name, module, *(term.node for term in value.terms)), spikes=True),))

    def _absorbs(self, node: fx.Node) -> bool:
        """Whether a node of the new graph is a float layer that batch norm and θ can go into."""
        layer = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(layer, FloatLayer) and layer.bias is not None

    def _layer(self, name: str, layer: nn.Module, value: Value) -> Value:
        integers, scale = integer_weights(layer)
        bias = None if layer.bias is None else layer.bias.detach().double()  # type: ignore[union-attr,operator]
        real = integers.dtype == torch.float32
        if real or (value.spikes_by_channel and not value.spikes_only):
            weight, source = integers.double() * scale.double(), value.terms[0].node
            if value.spikes_by_channel:
                weight = weight * input_gains(layer, value.terms[0])
            else:
                source = self._current(value, f"{name}_input")
            kept = FloatLayer(weight, layer, weight_bits(layer), spikes=value.spikes_by_channel)
            if real:  # bias and batch norm go into the layer as well
                kept.absorb_(torch.ones(1).double(), torch.zeros(1).double() if bias is None else bias, self.dtype)
                bias = None
            return Value((Term(self._call(name, kept, source), integer=False, bound=float("inf")),), bias)
        if not value.spikes_only:
            weight = integers.double() * scale.double()
            call = self._call(
                name, FloatLayer(weight, layer, weight_bits(layer)), self._current(value, f"{name}_input")
            )
            return Value((Term(call, integer=False, bound=float("inf")),), bias)
        (term,) = value.terms
        stored = integers if integers.dtype == torch.int8 else (integers * 2.0**-24).half()
        module = IntegerLayer(stored, layer, term.bound, weight_bits(layer))
        factors = (*term.factors, scale.double().reshape(-1))
        return Value((Term(self._call(name, module, term.node), factors, term.divisor, True, module.bound),), bias)

    def _batch_norm(self, node: fx.Node, norm: Any, value: Value) -> Value:
        scale = 1.0 / torch.sqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale + (0.0 if norm.bias is None else norm.bias.double())
        inside = value.terms[0].node
        alone = len(value.terms) == 1 and inside.op == "call_module" and len(node.all_input_nodes[0].users) == 1
        layer = self.root.get_submodule(str(inside.target)) if alone else None
        if isinstance(layer, FloatLayer) and self._absorbs(inside) and value.bias is None:
            layer.absorb_(scale, shift, self.dtype)
            return value
        bias = self._bias(value) * scale + shift
        if bool((scale < 0).any()):
            if isinstance(layer, IntegerLayer):
                flip = torch.where(scale < 0, -1, 1).view(-1, *[1] * (layer.weight.dim() - 1))
                layer.weight.mul_(flip.to(layer.weight.dtype))
                scale = scale.abs()
        scaled = self._scaled(replace(value, bias=None), scale)
        return replace(scaled, bias=bias)

    def _average_pool(self, node: fx.Node, pool: Any, value: Value) -> Value:
        source = node.all_input_nodes[0].name
        kernel, stride, padding, uniform = pool_windows(pool, self.shapes.get(source, ())[2:], str(node.target))
        if not uniform and (value.bias is not None or any(term.integer for term in value.terms)):
            # windows of unequal size: no sum over one divisor, so the current itself is averaged
            value = Value((Term(self._current(value, f"{node.name}_input"), integer=False, bound=float("inf")),))
        size = math.prod(kernel)
        terms = []
        for term in value.terms:
            if term.integer:
                call = self._call(str(node.target), SumPool(kernel, stride, padding), term.node)
                terms.append(replace(term, node=call, divisor=term.divisor * size, bound=term.bound * size))
            else:
                terms.append(replace(term, node=self._call(str(node.target), copy.deepcopy(pool), term.node)))
        return Value(tuple(terms), value.bias)

    def _flattened(self, node: fx.Node, value: Value) -> Value:
        source = node.all_input_nodes[0]
        shape = self.shapes.get(source.name, ())
        module = module_of(self.old, node)
        ends: tuple[Any, ...]
        if isinstance(module, nn.Flatten):
            ends = (module.start_dim, module.end_dim)
        else:
            ends = tuple(
                node.args[i] if len(node.args) > i else node.kwargs.get(name, default)
                for i, name, default in ((1, "start_dim", 0), (2, "end_dim", -1))
            )
        if ends != (1, -1):
            raise ValueError(f"cannot fold {node.name}: only flatten(start_dim=1) has an integer form")
        pixels = 1
        for side in shape[2:]:
            pixels *= side
        if not shape and not (all(t.per_tensor for t in value.terms) and value.bias is None):
            raise ValueError(f"cannot fold {node.name}: the image shape is unknown; quantize with data records it")

        def spread(x: Tensor) -> Tensor:
            return x if x.numel() == 1 else x.repeat_interleave(pixels)

        terms = tuple(
            replace(
                term,
                node=self.graph.call_function(torch.flatten, (term.node, 1)),
                factors=tuple(map(spread, term.factors)),
            )
            for term in value.terms
        )
        return Value(terms, None if value.bias is None else spread(value.bias))

    def _added(self, first: Value, second: Value) -> Value:
        if first.spikes_only and second.spikes_only and worth(first) == worth(second):
            (a,), (b,) = first.terms, second.terms
            call = self.graph.call_function(operator.add, (a.node, b.node))
            return Value((replace(a, node=call, bound=a.bound + b.bound),))
        bias = None
        if first.bias is not None or second.bias is not None:
            bias = self._bias(first) + self._bias(second)
        return Value((*first.terms, *second.terms), bias)

    def _concatenated(self, node: fx.Node) -> Value:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim != 1:
            raise ValueError(f"cannot fold {node.name}: it concatenates along dimension {dim}; only channels (1) join")
        parts = [self.values[source] for source in node.all_input_nodes]
        units = [worth(part) for part in parts if part.spikes_only]
        if len(units) == len(parts) and len(set(units)) == 1:
            call = self.graph.call_function(torch.cat, ([p.terms[0].node for p in parts], 1))
            return Value((replace(parts[0].terms[0], node=call, bound=max(p.terms[0].bound for p in parts)),))
        divisors = {part.terms[0].divisor for part in parts}
        shapes = [self.shapes.get(source.name) for source in node.all_input_nodes]
        if all(part.spikes_by_channel for part in parts) and len(divisors) == 1 and all(shapes):
            gains = [
                stacked(part.terms[0].factors).prod(0).expand(shape[1])
                for part, shape in zip(parts, shapes, strict=True)
                if shape
            ]
            call = self.graph.call_function(torch.cat, ([p.terms[0].node for p in parts], 1))
            most = max(p.terms[0].bound for p in parts)
            return Value((Term(call, (torch.cat(gains),), divisors.pop(), True, most, True),))
        currents = [self._current(part, f"{node.name}_input") for part in parts]
        call = self.graph.call_function(torch.cat, (currents, 1))
        return Value((Term(call, integer=False, bound=float("inf")),))

    def _scaled(self, value: Value, factor: Tensor) -> Value:
        terms = tuple(replace(term, factors=(*term.factors, factor)) for term in value.terms)
        return Value(terms, None if value.bias is None else value.bias * factor)

    def _bias(self, value: Value) -> Tensor:
        return torch.zeros(1, dtype=torch.float64) if value.bias is None else value.bias

    def _current(self, value: Value, name: str) -> fx.Node:
        """A node that holds the value itself in float64."""
        (first, *rest) = value.terms
        if not rest and value.bias is None and not first.factors and first.divisor == 1:
            return first.node
        factors = [stacked(term.factors) for term in value.terms]
        module = Current(factors, [term.divisor for term in value.terms], self._bias(value))
        return self._call(name.replace(".", "_"), module, *(term.node for term in value.terms))
