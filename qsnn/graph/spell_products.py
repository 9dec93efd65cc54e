"""How products are spelled: by numbers, by a gate, and of two quantized values, of elements or of matrices."""

from __future__ import annotations

import copy
import math
import operator
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.graph.gates import gives_counts, gives_gates
from qsnn.graph.kinds import ADVICE
from qsnn.graph.modules import Gating, Permute, Sum
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
    left = weight is None
    weight = call.constant(first) if left else weight
    assert weight is not None
    weight = weight[0] if weight.dim() == 3 and len(weight) == 1 else weight
    value = second if left else first
    rank = len(call.shape(value))
    if weight.dim() != 2 or (left and rank < 3):
        raise Refused(f"{call.name} by numbers is taken as x @ W or W @ x with a matrix W; write it as nn.Linear")
    if not left:
        return call.put(_matrix(weight.T), call.at(value))
    turned = Permute((*range(rank - 2), rank - 1, rank - 2))
    return call.put(copy.deepcopy(turned), call.put(_matrix(weight), call.put(turned, call.at(value))))


def _matrix(weight: Tensor) -> nn.Module:
    """The linear layer of a matrix (out, in)."""
    return with_values(nn.Linear(weight.shape[1], weight.shape[0], False), weight.detach(), None)


def _addmm(call: Call) -> fx.Node:
    added, weight = call.constant(call.get(0, "input")), call.constant(call.get(2, "mat2"))
    if added is None or weight is None or call.node.kwargs:
        raise Refused("addmm is taken of numbers, a value and a matrix; write it as nn.Linear")
    bias = added.detach().expand(weight.shape[1]) if added.dim() < 2 else added.detach()[0]
    return call.put(with_values(nn.Linear(*weight.shape), weight.detach().T, bias), call.at(call.get(1, "mat1")))


def _power(call: Call) -> fx.Node:
    exponent = 2 if call.name == "square" else call.get(1, "exponent")
    if exponent == 1:
        return call.at(call.x)
    if exponent != 2:
        raise Refused(f"{call.name} with the exponent {exponent}: {ADVICE['pow']}")
    letters = ascii_letters[: len(call.shape())]
    return _product(call, f"{letters},{letters}->{letters}", call.x, call.x)


def _einsum(call: Call) -> fx.Node:
    given = call.node.args[1:]
    values: Any = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    equation = str(call.get(0, "equation")).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    parts = [*inputs.split(","), out]
    if len(values) == 1 and parts[0].isalpha() and set(out) < set(parts[0]) and len(set(inputs)) == len(inputs):
        return _summed_out(call, inputs, out)
    plain = arrow and len(values) == 2 and all(part.isalpha() and len(set(part)) == len(part) for part in parts)
    constants = [call.constant(value) for value in values]
    if plain and any(constant is not None for constant in constants):
        at = int(constants[1] is None)
        return _einsum_by(call, equation, parts[at], parts[1 - at], out, values[at], constants[1 - at])
    if not plain or len({part[0] for part in parts}) > 1:
        raise Refused(
            f"einsum({equation!r}): takes two values whose first letter, and that of the result, is the batch, and no "
            f"letter twice in one, as in 'bnk,bkm->bnm'"
        )
    return _product(call, equation, values[0], values[1])


def _summed_out(call: Call, letters: str, out: str) -> fx.Node:
    """A sum of one value over the letters that the result does not have."""
    node = call.put(Sum(call.dims([letters.index(letter) for letter in letters if letter not in out])))
    kept = [letter for letter in letters if letter in out]
    order = tuple(kept.index(letter) for letter in out)
    return node if order == tuple(range(len(out))) else call.put(Permute(order), node)


def _einsum_by(
    call: Call, equation: str, mine: str, theirs: str, out: str, value: fx.Node, weight: Tensor | None
) -> fx.Node:
    """A sum over letters of a value (named ``mine``) times numbers: a linear layer on what is summed over."""
    summed = [letter for letter in mine if letter in theirs and letter not in out]
    kept = [letter for letter in mine if letter not in summed]
    new = [letter for letter in theirs if letter not in mine]
    fits = summed and kept[:1] == list(mine[:1]) == list(out[:1]) and mine[0] not in theirs
    if weight is None or not fits or sorted([*kept, *new]) != sorted(out) or len(summed) + len(new) != len(theirs):
        raise Refused(f"einsum({equation!r}) by numbers; write it as nn.Linear or a convolution")
    sides = dict(zip((*mine, *theirs), (*call.shape(value), *weight.shape), strict=True))
    node = call.put(Permute(tuple(mine.index(letter) for letter in (*kept, *summed))), call.at(value))
    node = call.view([sides[letter] for letter in kept] + [math.prod(sides[s] for s in summed)], node)
    matrix = weight.detach().permute([theirs.index(letter) for letter in (*new, *summed)])
    node = call.put(_matrix(matrix.reshape(math.prod(sides[n] for n in new), -1)), node)
    node = call.view([sides[letter] for letter in (*kept, *new)], node)
    order = tuple([*kept, *new].index(letter) for letter in out)
    return node if order == tuple(range(len(order))) else call.put(Permute(order), node)


PRODUCTS: dict[Any, Spelling] = {
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"), _mul),
    **dict.fromkeys((operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"), _matmul),
    torch.einsum: _einsum, torch.addmm: _addmm,
    **dict.fromkeys((operator.pow, torch.pow, torch.square, "pow", "square"), _power),
}  # fmt: skip
"""Functions and method names that multiply, each with how it is spelled."""
