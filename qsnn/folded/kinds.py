"""What becomes of each kind of layer when a network is folded: one function a kind, found through the table below."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.folded.builder import Builder
from qsnn.folded.gates import CurrentGate, IntegerGate
from qsnn.folded.layers import EXACT_FLOAT64, CountPool, FloatLayer, IntegerLayer, layer_options, weighted_sum
from qsnn.folded.products import IntegerProduct
from qsnn.folded.terms import (
    Term,
    Value,
    bias_of,
    compressed,
    current_arguments,
    input_gains,
    moved,
    on_terms,
    real,
    regular,
    scaled,
    sides,
    spread,
    stacked,
    steps_of,
    summed_over,
    windows,
    worth,
)
from qsnn.graph.modules import Add, Concat, Gating, Mean, Sum
from qsnn.quant.weights import integer_weights, weight_bits
from qsnn.snn.counts import CountProduct

_STEPS = 2**6
"""Sums of so many steps stay whole numbers in float64."""


def weighs(folder: Builder, node: fx.Node, layer: Any, value: Value) -> Value:
    """A convolution or linear layer: integer sums where its input are integers of one gain, else float64."""
    name, shape = str(node.target), folder.shape(node)
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
    unquantized = weight_bits(layer) == 32
    gained = value.spikes_by_channel and (not linear or len(shape) == 1 or value.terms[0].per_tensor)
    if unquantized or (gained and not value.spikes_only):
        weight, source = integers.double() * scale.double(), value.terms[0].node
        if gained:
            weight = weight * input_gains(layer, value.terms[0])
        else:
            source = folder.current(value, f"{name}_input")
        kept = FloatLayer(weight, layer, weight_bits(layer), spikes=gained, by_channel=by_channel)
        if unquantized and by_channel:  # bias and batch norm go into the layer as well
            start = torch.zeros(1).double() if bias is None else bias.reshape(-1)
            kept.absorb_(torch.ones(1).double(), start, folder.dtype)
            bias = None
        return Value((Term(folder.call(name, kept, source), integer=False, bound=float("inf")),), bias)
    term = value.terms[0]
    stored = integers if integers.dtype == torch.int8 else (integers * 2.0**-24).half()
    module = IntegerLayer(stored, layer, term.bound, weight_bits(layer), term.steps)
    # of a product of counts too large sums are refused; fp16 weights right behind fp16 weights pass a current on
    held = term.steps > 0 or module.bound < EXACT_FLOAT64 / _STEPS
    if not (value.integer and term.per_tensor and held):
        weight = integers.double() * scale.double()
        kept = FloatLayer(weight, layer, weight_bits(layer), by_channel=by_channel)
        call = folder.call(name, kept, folder.current(value, f"{name}_input"))
        return Value((Term(call, integer=False, bound=float("inf")),), bias)
    if value.bias is not None:  # what was added to the input, seen through the weights: the same for every image
        (source,) = node.all_input_nodes
        added = value.bias.expand(folder.shape(source)).unsqueeze(0)
        seen = weighted_sum(added, integers.double() * scale.double(), layer_options(layer))[0]
        bias = compressed(seen if bias is None else seen + bias)
    factors = (*term.factors, over_outputs(scale))
    call, bound = folder.call(name, module, term.node), module.bound
    return Value((Term(call, factors, term.divisor, True, bound, steps=term.steps),), bias)


def normalises(folder: Builder, node: fx.Node, norm: Any, value: Value) -> Value:
    """A batch norm: a line by channel."""
    scale = 1.0 / torch.sqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale + (0.0 if norm.bias is None else norm.bias.double())
    inside = value.terms[0].node
    alone = len(value.terms) == 1 and inside.op == "call_module" and len(node.all_input_nodes[0].users) == 1
    layer = folder.root.get_submodule(str(inside.target)) if alone else None
    if isinstance(layer, FloatLayer) and folder.absorbs(inside) and value.bias is None:
        layer.absorb_(scale, shift, folder.dtype)
        return value
    if bool((scale < 0).any()) and isinstance(layer, IntegerLayer) and len(layer.weight) == len(scale):
        if "output_padding" not in layer.options:
            flip = torch.where(scale < 0, -1, 1).view(-1, *[1] * (layer.weight.dim() - 1))
            layer.weight.mul_(flip.to(layer.weight.dtype))
            scale, sign = scale.abs(), torch.where(scale < 0, -1.0, 1.0).double()
            value = replace(value, bias=None if value.bias is None else value.bias * folder.by_channel(sign, node))
    lines = folder.by_channel(scale, node), folder.by_channel(shift, node)
    bias = bias_of(value) * lines[0] + lines[1]
    return replace(scaled(replace(value, bias=None), lines[0]), bias=bias)


def takes_maxima(folder: Builder, node: fx.Node, pool: nn.Module, value: Value) -> Value:
    """A max pool, of spikes.

    Raises:
        ValueError: it sees something else.
    """
    term = value.terms[0]
    positive = all(bool((factor > 0).all()) for factor in term.factors)
    if not ((value.spikes_only or value.spikes_by_channel) and positive):
        raise ValueError(f"cannot fold the max pool {node.target}: it must follow spikes")
    return Value((replace(term, node=folder.call(str(node.target), copy.deepcopy(pool), term.node)),))


def averages(folder: Builder, node: fx.Node, pool: Any, value: Value) -> Value:
    """A mean or sum over windows or dimensions: sums of integers, the divisor counts for the gain."""
    (source,) = node.all_input_nodes
    name, shape = str(node.target), folder.shape(source)
    if folder.raw(value.terms[0].node):  # a mean of float32 numbers is taken in float64, as every current is
        value = real(folder.current(value, f"{node.name}_input", computes=True))
    if isinstance(pool, Mean):
        found = on_terms(value, lambda term: _over_dims(folder, name, pool, shape, term))
    else:
        found = on_terms(value, lambda term: _over_windows(folder, name, pool, shape, term))
    if found is None:
        return real(folder.call(name, copy.deepcopy(pool), folder.current(value, f"{node.name}_input")))
    bias = value.bias
    if bias is None or (not isinstance(pool, Mean) and regular(pool, shape) and bias.numel() in (1, shape[0])):
        return found  # the mean over windows of what is the same at all places of a channel
    return replace(found, bias=compressed(pool(bias.expand(shape).unsqueeze(0))[0]))


def _over_dims(folder: Builder, name: str, pool: Mean, shape: tuple[int, ...], term: Term) -> Term | None:
    factors = [summed_over(pool.dims, pool.keepdim, factor) for factor in term.factors]
    if any(factor is None for factor in factors):
        return None
    kept = tuple(factor for factor in factors if factor is not None)
    if not term.integer:
        return replace(term, node=folder.call(name, copy.deepcopy(pool), term.node), factors=kept)
    count = math.prod(shape[dim - 1] for dim in pool.dims)
    call = folder.call(name, Sum(pool.dims, pool.keepdim), term.node)
    divisor = term.divisor * (1 if isinstance(pool, Sum) else count)
    return replace(term, node=call, factors=kept, divisor=divisor, bound=term.bound * count)


def _over_windows(folder: Builder, name: str, pool: Any, shape: tuple[int, ...], term: Term) -> Term | None:
    if not term.per_channel:
        return None
    if not term.integer:
        return replace(term, node=folder.call(name, copy.deepcopy(pool), term.node))
    tiles = regular(pool, shape)
    if tiles is not None:
        size = math.prod(tiles.kernel)
        return replace(
            term, node=folder.call(name, tiles, term.node), divisor=term.divisor * size, bound=term.bound * size
        )
    multiple = windows(pool, shape)
    call = folder.call(name, CountPool(copy.deepcopy(pool), multiple), term.node)
    override = getattr(pool, "divisor_override", None)
    most = multiple if override is None else math.prod(sides(pool.kernel_size, len(shape) - 1))
    return replace(term, node=call, divisor=term.divisor * multiple, bound=term.bound * most)


def passes(folder: Builder, node: fx.Node, module: nn.Module, value: Value) -> Value:
    """Nothing happens at inference."""
    return value


def moves(folder: Builder, node: fx.Node, module: nn.Module, value: Value) -> Value:
    """Integers move as they are, and their gains and biases with them."""
    (source,) = node.all_input_nodes
    name, shape = str(node.target), folder.shapes[source.name]

    def change(term: Term) -> Term | None:
        factors = [moved(module, factor, shape, gain=True) for factor in term.factors]
        if any(factor is None for factor in factors):
            return None
        kept = tuple(factor for factor in factors if factor is not None)
        return replace(term, node=folder.call(name, copy.deepcopy(module), term.node), factors=kept)

    bias = None if value.bias is None else moved(module, value.bias, shape, gain=False)
    found = on_terms(value, change)
    if found is None or (bias is None and value.bias is not None):
        return real(folder.call(name, copy.deepcopy(module), folder.current(value, f"{node.name}_input")))
    return replace(found, bias=bias)


def decides(folder: Builder, node: fx.Node, gate: Any, value: Value) -> Value:
    """A gate: an integer level where it sees integers of one layer, else it compares in float64."""
    first, bias = value.terms[0], bias_of(value)
    if value.integer:
        shape, _ = spread(*first.factors, bias)
        factors, _ = stacked(first.factors, shape)
        flat = bias.expand(shape).reshape(-1) if bias.numel() > 1 else bias.reshape(1)
        module: nn.Module = IntegerGate(
            factors, first.divisor, flat, gate.level, shape, spikes=first.spikes, steps=first.steps
        )
    else:
        module = CurrentGate(*current_arguments(value), level=gate.level, steps=steps_of(value))
    return Value((Term(folder.call(str(node.target), module, *(term.node for term in value.terms)), spikes=True),))


def gates(folder: Builder, node: fx.Node, module: nn.Module, gate: Value, value: Value) -> Value:
    """0 or 1 times a value: each of its terms is gated, and keeps its gain; a bias makes it a current."""
    name, (opened,) = str(node.target), gate.terms
    if value.bias is not None:
        return real(folder.call(name, Gating(), opened.node, folder.current(value, f"{node.name}_input")))
    calls = [folder.call(name, Gating(spikes=term.spikes), opened.node, term.node) for term in value.terms]
    return Value(tuple(replace(term, node=call) for term, call in zip(value.terms, calls, strict=True)))


def multiplies(folder: Builder, node: fx.Node, module: Any, first: Value, second: Value) -> Value:
    """A product of counts: integers where both are integers of one gain, else the means are multiplied in float64."""
    name, (x, y) = str(node.target), [folder.shapes[a.name] for a in node.args if isinstance(a, fx.Node)]
    if not (first.spikes_only and second.spikes_only):
        currents = folder.current(first, f"{node.name}_first"), folder.current(second, f"{node.name}_second")
        return real(folder.call(name, CountProduct(module.equation, module.timed), *currents))
    (a,), (b,) = first.terms, second.terms
    summed = module.summed(x, y)
    steps = (a.steps + module.timed[0], b.steps + module.timed[1])
    whole = IntegerProduct(module, (a.bound, b.bound), steps, summed)
    call = folder.call(name, whole, a.node, b.node)
    return Value((Term(call, (*a.factors, *b.factors), a.divisor * b.divisor, True, whole.bound, steps=whole.steps),))


def adds(folder: Builder, node: fx.Node, module: nn.Module, first: Value, second: Value) -> Value:
    """Spikes of one worth are added as integers; else currents meet, in graph order."""
    if first.spikes_only and second.spikes_only and worth(first) == worth(second):
        (a,), (b,) = first.terms, second.terms
        call = folder.call(str(node.target), Add(), a.node, b.node)
        return Value((replace(a, node=call, bound=a.bound + b.bound),))
    bias = None
    if first.bias is not None or second.bias is not None:
        bias = bias_of(first) + bias_of(second)
    return Value((*first.terms, *second.terms), bias)


def joins(folder: Builder, node: fx.Node, module: Any, *parts: Value) -> Value:
    """Integers stand side by side, and so do their gains and biases."""
    name, sources = str(node.target), [a for a in node.args if isinstance(a, fx.Node)]
    shapes = [folder.shape(source) for source in sources]
    units = {(part.terms[0].divisor, part.terms[0].steps) for part in parts}
    if not all(part.integer for part in parts) or len(units) > 1:
        currents = [folder.current(part, f"{node.name}_input") for part in parts]
        return real(folder.call(name, Concat(module.dim), *currents))
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
        bias = side_by_side([bias_of(part) for part in parts])
    call = folder.call(name, Concat(module.dim), *(term.node for term in terms))
    most, spikes = max(term.bound for term in terms), all(term.spikes for term in terms)
    return Value((Term(call, factors, terms[0].divisor, True, most, spikes, terms[0].steps),), bias)


def scales(folder: Builder, node: fx.Node, module: Any, value: Value) -> Value:
    """The numbers go into the gain."""
    return scaled(value, folder.numbers(module.value, node))


def shifts(folder: Builder, node: fx.Node, module: Any, value: Value) -> Value:
    """The numbers go into the bias."""
    return replace(value, bias=bias_of(value) + folder.numbers(module.value, node))


FOLD: dict[str, Callable[..., Value]] = {
    "weighs": weighs, "normalises": normalises, "takes maxima": takes_maxima,
    "decides": decides, "gates": gates, "multiplies": multiplies, "averages": averages,
    "passes": passes, "moves": moves, "adds": adds,
    "joins": joins, "scales": scales, "shifts": shifts,
}  # fmt: skip
"""What becomes of each kind that does not fire; activations have become neurons by then."""
