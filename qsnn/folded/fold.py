"""fold(): the integer form of a spiking network. Batch norm, scales and biases go into integer thresholds."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.folded.layers import CountPool, FloatLayer, IntegerInput, IntegerLayer, layer_options, weighted_sum
from qsnn.folded.neurons import Current, CurrentIF, DynamicIF, IntegerIF, RealIF
from qsnn.folded.terms import (
    Term,
    Value,
    compressed,
    input_gains,
    moved,
    on_terms,
    regular,
    sides,
    spread,
    stacked,
    summed_over,
    windows,
    worth,
)
from qsnn.graph.kinds import does
from qsnn.graph.modules import Add, Concat, Mean, Sum
from qsnn.graph.recipe import child_recipe, input_shape_of, set_recipe
from qsnn.graph.trace import module_of, value_shapes
from qsnn.quant.activations import level_quant
from qsnn.quant.weights import integer_weights, weight_bits
from qsnn.snn.network import SNN
from qsnn.snn.neurons import IFNode, PlusMinus, Repeat, amplified


def fold(snn: SNN, *, dtype: torch.dtype = torch.float64) -> SNN:
    r"""Return the integer form of a spiking network: integer weights, spikes 0/1, thresholds per channel.

    With integer weights W and spikes, a layer's input A is an integer. Scales, batch norm and bias go into what a unit
    of A is worth, :math:`g_c = \gamma'_c\, s_w\, \theta_{in}`, and a bias b_c; the neuron compares A with the integers
    of :class:`~qsnn.folded.neurons.IntegerIF`. γ < 0 flips a channel's weights, average pooling sums spikes. Where
    currents meet (a residual sum before its neuron) they are added in float64. Spikes and argmax are those of the
    unfolded network in float64, the scales read once in the dtype it runs in.

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
    shape = input_shape_of(snn)
    if shape is None:
        raise ValueError("cannot fold: the shape of an image is unknown; quantize or convert with data records it")
    network = copy.deepcopy(snn.network).eval()
    with torch.no_grad():
        folder = _Folder(network, value_shapes(network, shape), dtype)
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

    def run(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            value = self._fold_node(node)
            if value is not None:
                self.values[node] = value
        return fx.GraphModule(self.root, self.graph, "Folded")

    def _fold_node(self, node: fx.Node) -> Value | None:
        if node.op == "placeholder":
            return _real(self.graph.placeholder(node.name))
        if node.op == "get_attr":
            return None
        if node.op == "output":
            self.graph.output(fx.node.map_arg(node.args[0], lambda n: self._current(self.values[n], "readout")))
            return None
        if node.target is amplified:
            spikes, threshold = node.all_input_nodes
            theta: Tensor = operator.attrgetter(str(threshold.target))(self.old)
            return _scaled(self.values[spikes], self._by_channel(theta.detach().double(), node))
        module = module_of(self.old, node)
        if module is None:
            raise ValueError(f"cannot fold {node.name} ({node.target}): it is no layer; convert writes layers alone")
        return self._module(node, module, [self.values[a] for a in node.args if isinstance(a, fx.Node)])

    def _module(self, node: fx.Node, module: nn.Module, values: list[Value]) -> Value:
        """What a layer gives: by its kind, or of the layers that convert and quantize put in."""
        name = str(node.target)
        if isinstance(module, IFNode):
            return self._neuron(node, module, values[0], alone=len(node.all_input_nodes[0].users) == 1)
        if isinstance(module, PlusMinus | Repeat):
            fresh = type(module)
            terms = tuple(replace(t, node=self._call(name, fresh(), t.node)) for t in values[0].terms)
            return Value(terms, values[0].bias)
        quant = level_quant(module)
        if quant is not None:
            call = self._call(name, IntegerInput(quant.step, quant.levels), self._current(values[0], f"{name}_input"))
            return Value((Term(call, (quant.step.double().reshape(()),), bound=quant.levels),))
        fold_kind = FOLD.get(does(module) or "")
        if fold_kind is None:
            raise ValueError(f"cannot fold {name} ({type(module).__name__}): it has no integer form")
        return fold_kind(self, node, module, *values)

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

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of one image of a node's value."""
        return self.shapes[node.name][1:]

    def _by_channel(self, x: Tensor, node: fx.Node) -> Tensor:
        """A number, or one a channel (dimension 1), shaped for the value of ``node``."""
        return x.reshape(-1, *[1] * (len(self._shape(node)) - 1)) if x.numel() > 1 else x.reshape(())

    # ---- neurons

    def _neuron(self, node: fx.Node, neuron: IFNode, value: Value, *, alone: bool) -> Value:
        name = str(node.target)
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
        (first, *rest), bias = value.terms, _bias(value)
        if neuron.dynamics.plain and first.integer and not rest and not threshold.dim():
            started = self._by_channel(initial, node)
            shape, _ = spread(*first.factors, bias, started)
            factors, _ = stacked(first.factors, shape)
            flat = bias.expand(shape).reshape(-1) if bias.numel() > 1 else bias.reshape(1)
            if started.numel() > 1 and math.prod(shape) != started.numel():
                initial = started.expand(shape).reshape(-1)
            module = IntegerIF(factors, first.divisor, flat, threshold, initial, first.bound, shape)
        else:
            currents = _current_arguments(value)
            if neuron.dynamics.plain:
                module = CurrentIF(*currents, threshold, initial)
            else:
                module = DynamicIF(*currents, threshold, initial, neuron.dynamics, neuron.tau)
        return Value((Term(self._call(name, module, *(term.node for term in value.terms)), spikes=True),))

    def _absorbs(self, node: fx.Node) -> bool:
        """Whether a node of the new graph is a float layer that batch norm and θ can go into."""
        layer = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(layer, FloatLayer) and layer.bias is not None and layer.by_channel

    # ---- one function a kind

    def weighs(self, node: fx.Node, layer: Any, value: Value) -> Value:
        """A convolution or linear layer: integer sums where its input are integers of one gain, else float64."""
        name, shape = str(node.target), self._shape(node)
        integers, scale = integer_weights(layer)
        transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
        linear = isinstance(layer, nn.Linear)
        by_channel = not transposed and (not linear or len(shape) == 1)

        def over_outputs(x: Tensor) -> Tensor:
            x = x.double().reshape(-1)
            if x.numel() == 1:
                return x.reshape(())
            x = x.repeat(layer.groups) if transposed and len(x) < layer.out_channels else x
            return x.view(*[1] * (len(shape) - 1), -1) if linear else x.view(-1, *[1] * (len(shape) - 1))

        bias = None if layer.bias is None else over_outputs(layer.bias.detach())
        real = integers.dtype == torch.float32
        gained = value.spikes_by_channel and (not linear or len(shape) == 1 or value.terms[0].per_tensor)
        if real or (gained and not value.spikes_only):
            weight, source = integers.double() * scale.double(), value.terms[0].node
            if gained:
                weight = weight * input_gains(layer, value.terms[0])
            else:
                source = self._current(value, f"{name}_input")
            kept = FloatLayer(weight, layer, weight_bits(layer), spikes=gained, by_channel=by_channel)
            if real and by_channel:  # bias and batch norm go into the layer as well
                start = torch.zeros(1).double() if bias is None else bias.reshape(-1)
                kept.absorb_(torch.ones(1).double(), start, self.dtype)
                bias = None
            return Value((Term(self._call(name, kept, source), integer=False, bound=float("inf")),), bias)
        term = value.terms[0]
        if not (value.integer and term.per_tensor):
            weight = integers.double() * scale.double()
            kept = FloatLayer(weight, layer, weight_bits(layer), by_channel=by_channel)
            call = self._call(name, kept, self._current(value, f"{name}_input"))
            return Value((Term(call, integer=False, bound=float("inf")),), bias)
        if value.bias is not None:  # what was added to the input, seen through the weights: the same for every image
            (source,) = node.all_input_nodes
            added = value.bias.expand(self._shape(source)).unsqueeze(0)
            seen = weighted_sum(added, integers.double() * scale.double(), layer_options(layer))[0]
            bias = compressed(seen if bias is None else seen + bias)
        stored = integers if integers.dtype == torch.int8 else (integers * 2.0**-24).half()
        module = IntegerLayer(stored, layer, term.bound, weight_bits(layer))
        factors = (*term.factors, over_outputs(scale))
        return Value((Term(self._call(name, module, term.node), factors, term.divisor, True, module.bound),), bias)

    def normalises(self, node: fx.Node, norm: Any, value: Value) -> Value:
        """A batch norm: a line by channel."""
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
        if bool((scale < 0).any()) and isinstance(layer, IntegerLayer) and len(layer.weight) == len(scale):
            if "output_padding" not in layer.options:
                flip = torch.where(scale < 0, -1, 1).view(-1, *[1] * (layer.weight.dim() - 1))
                layer.weight.mul_(flip.to(layer.weight.dtype))
                scale, sign = scale.abs(), torch.where(scale < 0, -1.0, 1.0).double()
                value = replace(value, bias=None if value.bias is None else value.bias * self._by_channel(sign, node))
        lines = self._by_channel(scale, node), self._by_channel(shift, node)
        bias = _bias(value) * lines[0] + lines[1]
        return replace(_scaled(replace(value, bias=None), lines[0]), bias=bias)

    def takes_maxima(self, node: fx.Node, pool: nn.Module, value: Value) -> Value:
        """A max pool, of spikes."""
        term = value.terms[0]
        positive = all(bool((factor > 0).all()) for factor in term.factors)
        if not ((value.spikes_only or value.spikes_by_channel) and positive):
            raise ValueError(f"cannot fold the max pool {node.target}: it must follow spikes")
        return Value((replace(term, node=self._call(str(node.target), copy.deepcopy(pool), term.node)),))

    def averages(self, node: fx.Node, pool: Any, value: Value) -> Value:
        """A mean or sum over windows or dimensions: sums of integers, the divisor counts for the gain."""
        (source,) = node.all_input_nodes
        name, shape = str(node.target), self._shape(source)
        if isinstance(pool, Mean):
            found = on_terms(value, lambda term: self._over_dims(name, pool, shape, term))
        else:
            found = on_terms(value, lambda term: self._over_windows(name, pool, shape, term))
        if found is None:
            return _real(self._call(name, copy.deepcopy(pool), self._current(value, f"{node.name}_input")))
        bias = value.bias
        if bias is None or (not isinstance(pool, Mean) and regular(pool, shape) and bias.numel() in (1, shape[0])):
            return found  # the mean over windows of what is the same at all places of a channel
        return replace(found, bias=compressed(pool(bias.expand(shape).unsqueeze(0))[0]))

    def _over_dims(self, name: str, pool: Mean, shape: tuple[int, ...], term: Term) -> Term | None:
        factors = [summed_over(pool.dims, pool.keepdim, factor) for factor in term.factors]
        if any(factor is None for factor in factors):
            return None
        kept = tuple(factor for factor in factors if factor is not None)
        if not term.integer:
            return replace(term, node=self._call(name, copy.deepcopy(pool), term.node), factors=kept)
        count = math.prod(shape[dim - 1] for dim in pool.dims)
        call = self._call(name, Sum(pool.dims, pool.keepdim), term.node)
        divisor = term.divisor * (1 if isinstance(pool, Sum) else count)
        return replace(term, node=call, factors=kept, divisor=divisor, bound=term.bound * count)

    def _over_windows(self, name: str, pool: Any, shape: tuple[int, ...], term: Term) -> Term | None:
        if not term.per_channel:
            return None
        if not term.integer:
            return replace(term, node=self._call(name, copy.deepcopy(pool), term.node))
        tiles = regular(pool, shape)
        if tiles is not None:
            size = math.prod(tiles.kernel)
            return replace(
                term, node=self._call(name, tiles, term.node), divisor=term.divisor * size, bound=term.bound * size
            )
        multiple = windows(pool, shape)
        call = self._call(name, CountPool(copy.deepcopy(pool), multiple), term.node)
        override = getattr(pool, "divisor_override", None)
        most = multiple if override is None else math.prod(sides(pool.kernel_size, len(shape) - 1))
        return replace(term, node=call, divisor=term.divisor * multiple, bound=term.bound * most)

    def passes(self, node: fx.Node, module: nn.Module, value: Value) -> Value:
        """Nothing happens at inference."""
        return value

    def moves(self, node: fx.Node, module: nn.Module, value: Value) -> Value:
        """Integers move as they are, and their gains and biases with them."""
        (source,) = node.all_input_nodes
        name, shape = str(node.target), self.shapes[source.name]

        def change(term: Term) -> Term | None:
            factors = [moved(module, factor, shape, gain=True) for factor in term.factors]
            if any(factor is None for factor in factors):
                return None
            kept = tuple(factor for factor in factors if factor is not None)
            return replace(term, node=self._call(name, copy.deepcopy(module), term.node), factors=kept)

        bias = None if value.bias is None else moved(module, value.bias, shape, gain=False)
        found = on_terms(value, change)
        if found is None or (bias is None and value.bias is not None):
            return _real(self._call(name, copy.deepcopy(module), self._current(value, f"{node.name}_input")))
        return replace(found, bias=bias)

    def adds(self, node: fx.Node, module: nn.Module, first: Value, second: Value) -> Value:
        """Spikes of one worth are added as integers; else currents meet, in graph order."""
        if first.spikes_only and second.spikes_only and worth(first) == worth(second):
            (a,), (b,) = first.terms, second.terms
            call = self._call(str(node.target), Add(), a.node, b.node)
            return Value((replace(a, node=call, bound=a.bound + b.bound),))
        bias = None
        if first.bias is not None or second.bias is not None:
            bias = _bias(first) + _bias(second)
        return Value((*first.terms, *second.terms), bias)

    def joins(self, node: fx.Node, module: Any, *parts: Value) -> Value:
        """Integers stand side by side, and so do their gains and biases."""
        name, sources = str(node.target), [a for a in node.args if isinstance(a, fx.Node)]
        shapes = [self._shape(source) for source in sources]
        if not all(part.integer for part in parts) or len({part.terms[0].divisor for part in parts}) > 1:
            currents = [self._current(part, f"{node.name}_input") for part in parts]
            return _real(self._call(name, Concat(module.dim), *currents))
        terms = [part.terms[0] for part in parts]

        def side_by_side(tensors: list[Tensor]) -> Tensor:
            whole = [t.double().expand(shape) for t, shape in zip(tensors, shapes, strict=True)]
            return compressed(torch.cat(whole, module.dim - 1))

        count = max(len(term.factors) for term in terms)
        one = torch.ones((), dtype=torch.float64)
        columns = [[*term.factors, *[one] * (count - len(term.factors))] for term in terms]
        if all(term.per_tensor for term in terms) and len({worth(part)[0] for part in parts}) == 1:
            factors = terms[0].factors
        else:
            factors = tuple(side_by_side(list(column)) for column in zip(*columns, strict=True))
        bias = None
        if any(part.bias is not None for part in parts):
            bias = side_by_side([_bias(part) for part in parts])
        call = self._call(name, Concat(module.dim), *(term.node for term in terms))
        most, spikes = max(term.bound for term in terms), all(term.spikes for term in terms)
        return Value((Term(call, factors, terms[0].divisor, True, most, spikes),), bias)

    def scales(self, node: fx.Node, module: Any, value: Value) -> Value:
        """The numbers go into the gain."""
        return _scaled(value, self._numbers(module.value, node))

    def shifts(self, node: fx.Node, module: Any, value: Value) -> Value:
        """The numbers go into the bias."""
        return replace(value, bias=_bias(value) + self._numbers(module.value, node))

    def _numbers(self, x: Tensor, node: fx.Node) -> Tensor:
        """Numbers that a layer holds, shaped for one image of the value of ``node``."""
        rank = len(self._shape(node))
        x = x.detach().double()
        x = x[0] if x.dim() > rank else x.reshape(*[1] * (rank - x.dim()), *x.shape)
        return x.reshape(()) if x.numel() == 1 else x

    # ---- currents

    def _current(self, value: Value, name: str) -> fx.Node:
        """A node that holds the value itself in float64."""
        (first, *rest) = value.terms
        if not rest and value.bias is None and not first.factors and first.divisor == 1:
            return first.node
        module = Current(*_current_arguments(value))
        return self._call(name.replace(".", "_"), module, *(term.node for term in value.terms))


FOLD: dict[str, Callable[..., Value]] = {
    "weighs": _Folder.weighs, "normalises": _Folder.normalises, "takes maxima": _Folder.takes_maxima,
    "averages": _Folder.averages, "passes": _Folder.passes, "moves": _Folder.moves, "adds": _Folder.adds,
    "joins": _Folder.joins, "scales": _Folder.scales, "shifts": _Folder.shifts,
}  # fmt: skip
"""What becomes of each kind that does not fire; activations have become neurons by then."""


def _real(node: fx.Node) -> Value:
    return Value((Term(node, integer=False, bound=float("inf")),))


def _bias(value: Value) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if value.bias is None else value.bias


def _scaled(value: Value, factor: Tensor) -> Value:
    terms = tuple(replace(term, factors=(*term.factors, factor)) for term in value.terms)
    return Value(terms, None if value.bias is None else value.bias * factor)


def _current_arguments(value: Value) -> tuple[list[Tensor], list[int], Tensor, list[tuple[int, ...]]]:
    factors, shapes = zip(*(stacked(term.factors) for term in value.terms), strict=True)
    bias = _bias(value)
    flat = bias.reshape(-1)
    return list(factors), [term.divisor for term in value.terms], flat, [*shapes, tuple(bias.shape)]
