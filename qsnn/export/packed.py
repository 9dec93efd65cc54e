"""Weights of few bits, several to a byte, and the table that reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTHS = (1, 2, 4)
"""Bits of one code: whole codes share a byte."""
NODES = 160
"""What a packed tensor needs beside its codes: three nodes, a shape and names, at most [byte]."""


def packed(weight: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[Any]] | None:
    r"""Codes of 1, 2 or 4 bits, :math:`8/b` to a byte, and the table T with w = T[byte, place].

    The values that b bits can say are those of b-bit weights, z + d·{-2^(b-1), ..., 2^(b-1) - 1} with d > 0 and z = 0,
    or 128 for unsigned ones, so that layers of one precision share a table; where a weight is none of these, they are
    the values that there are, if no more than 2^b.

    Args:
        weight: int8 or uint8.
    Shape:
        weight: (*), n values; codes: (n·b/8,); table: (256, 8/b), as ``weight``.
    Returns:
        The shortest codes, or None where none of them are shorter, or n·b is no whole number of bytes.
    """
    zero = 128 if weight.dtype == np.uint8 else 0
    flat = weight.reshape(-1).astype(np.int64) - zero
    found = np.unique(flat)
    for bits in WIDTHS:
        if flat.size * bits % 8 or not flat.size:
            continue
        step = int(np.gcd.reduce(found)) or 1
        values = step * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        if not np.isin(found, values).all():
            if len(found) > 2**bits:
                continue
            values = np.concatenate([found, np.repeat(found[-1:], 2**bits - len(found))])
        codes = np.searchsorted(values, flat).astype(np.uint8).reshape(-1, 8 // bits)
        places = bits * np.arange(8 // bits)
        shown = np.arange(256)[:, None] >> places & (2**bits - 1)
        return (codes << places).sum(1).astype(np.uint8), (values[shown] + zero).astype(weight.dtype)
    return None
