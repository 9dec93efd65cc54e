"""How products are spelled: by numbers, by a gate, and of two quantized values, of elements or of matrices."""

from __future__ import annotations

import operator
from string import ascii_letters
from typing import Any

import torch
from torch import fx, nn

from qsnn.graph.gates import gives_counts, gives_gates
from qsnn.graph.kinds import ADVICE
from qsnn.graph.modules import Gating
from qsnn.graph.product import Product
from qsnn.graph.spell_layers import scaled, with_values
from qsnn.graph.step import Call, Refused, Spelling


def _mul(call: Call) -> fx.Node:
    first, second = call.get(0, "input"), call.get(1, "other")
    a, b = call.constant(first), call.constant(second)
    if a is None and b is None:
        letters = ascii_letters[: len(call.shape(first))]
        gated = _gated(call, first, second)
        return _product(call, f"{letters},{letters}->{letters}", first, second) if gated is None else gated
    node, factor = (first, b) if b is not None else (second, a)
    assert factor is not None
    return scaled(call, call.at(node), factor)


def _gated(call: Call, first: fx.Node, second: fx.Node) -> fx.Node | None:
    """A product of two values of which one is 0 or 1; None where neither is."""
    gates = [gives_gates(call.speller.raw, call.at(node)) for node in (first, second)]
    if not any(gates):
        return None
    shapes = call.shape(first), call.shape(second)
    if len(shapes[0]) != len(shapes[1]) or shapes[0][0] != shapes[1][0]:
        raise Refused(f"multiplies a gate and a value of shapes {shapes[0]} and {shapes[1]}: give both all dimensions")
    gate, value = (first, second) if gates[0] else (second, first)
    return call.put(Gating(), call.at(gate), call.at(value))


def _product(call: Call, equation: str, first: fx.Node, second: fx.Node) -> fx.Node:
    """A product of two quantized values, image by image."""
    shapes = call.shape(first), call.shape(second)
    letters = equation.partition("->")[0].split(",")
    if [len(part) for part in letters] != [len(shape) for shape in shapes] or shapes[0][0] != shapes[1][0]:
        raise Refused(f"{call.name} of shapes {shapes[0]} and {shapes[1]}: give both all dimensions, the batch first")
    if not all(gives_counts(call.speller.raw, call.at(node), call.speller.known) for node in (first, second)):
        raise Refused(f"{call.name}: {ADVICE['mul']}")
    return call.put(Product(equation), call.at(first), call.at(second))


def _matmul(call: Call) -> fx.Node:
    first, second = call.get(0, "input"), call.get(1, "mat2" if call.name == "bmm" else "other")
    weight = call.constant(second)
    if weight is None and call.constant(first) is None:
        rank = len(call.shape(first))
        if rank < 3:
            raise Refused(f"{call.name} of two values of {rank} dimensions mixes the images of a batch")
        front, (row, inner, column) = ascii_letters[: rank - 2], tuple(ascii_letters[rank - 2 : rank + 1])
        return _product(call, f"{front}{row}{inner},{front}{inner}{column}->{front}{row}{column}", first, second)
    if weight is None or weight.dim() != 2:
        raise Refused(f"{call.name} by numbers is taken as x @ W with a matrix W; write it as nn.Linear")
    return call.put(with_values(nn.Linear(weight.shape[0], weight.shape[1], False), weight.detach().T, None))


def _einsum(call: Call) -> fx.Node:
    given = call.node.args[1:]
    values: Any = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    equation = str(call.get(0, "equation")).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    parts = [*inputs.split(","), out]
    plain = arrow and len(values) == 2 and all(part.isalpha() and len(set(part)) == len(part) for part in parts)
    if not plain or len({part[0] for part in parts}) > 1:
        raise Refused(
            f"einsum({equation!r}): takes two values whose first letter, and that of the result, is the batch, and no "
            f"letter twice in one, as in 'bnk,bkm->bnm'"
        )
    if any(call.constant(value) is not None for value in values):
        raise Refused(f"einsum({equation!r}) by numbers; write it as nn.Linear or a convolution")
    return _product(call, equation, values[0], values[1])


PRODUCTS: dict[Any, Spelling] = {
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"), _mul),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), _matmul),
    torch.einsum: _einsum,
}  # fmt: skip
"""Functions and method names that multiply, each with how it is spelled."""
