"""A NIR file that qsnn wrote, run by Spyx (JAX)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class SpyxNetwork(nn.Module):
    """A NIR graph of qsnn as Spyx builds it, on the CPU in float32.

    Spyx compares a potential with θ before it adds the current, so every neuron spikes one step late: a chain of D
    neurons runs for T + D steps, the last D on zeros, and its last T answers are those of steps 1 to T; what a neuron
    fires after its own step T reaches none of them. Spyx flattens (H, W, C), so the columns of a Linear behind a
    Flatten are put in that order.

    Args:
        graph: a graph that ``qsnn export --format nir`` wrote.
    Shape:
        frames: (T, B, C + 2, H, W); returned: integers of the last layer, (T, B, K), float64.
    Raises:
        ValueError: what Spyx would read as something else, by name: branches (it follows one edge of a node), dilation
            and groups (it passes over them), numbers that need float64.
        ImportError: Spyx is missing.
    """

    def __init__(self, graph: Any) -> None:
        super().__init__()
        from flax import nnx
        from spyx.nir import from_nir
        from spyx.nn import IF, run

        graph = channels_last(graph, chain_of(graph))
        c, h, w = (int(side) for side in graph.nodes["input"].input_type["input"])
        with exact_floats():
            self.model, _ = from_nir(graph, np.zeros((1, 1, h, w, c), np.float32))  # it builds only what it also runs
        self.depth = sum(isinstance(layer, IF) for layer in self.model.layers)
        self.compiled = nnx.jit(lambda model, x: run(model, x)[0])

    def forward(self, frames: Tensor) -> Tensor:
        """Return the last layer's integers at each step."""
        late = frames.new_zeros(self.depth, *frames.shape[1:])
        x = torch.cat([frames, late]).movedim(2, -1).float().contiguous().numpy()
        with exact_floats():
            found = self.compiled(self.model, x)
        return torch.from_numpy(np.array(found, dtype=np.float64)[self.depth :])


@contextmanager
def exact_floats() -> Iterator[None]:
    """JAX on the CPU, without the short floats and the transforms that convolutions on other devices may use."""
    import jax

    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        yield


def chain_of(graph: Any) -> list[str]:
    """The names of a graph's nodes, from input to output.

    Raises:
        ValueError: nodes that Spyx would read as something else, all of them by name.
    """
    after: dict[str, list[str]] = {name: [] for name in graph.nodes}
    before: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        after[source].append(target)
        before[target].append(source)
    wrong = []
    for name, node in graph.nodes.items():
        if len(after[name]) > 1:
            wrong.append(f"{name} (it goes to {' and '.join(after[name])}; Spyx runs chains alone)")
        if len(before[name]) > 1:
            wrong.append(f"{name} (it sums {' and '.join(before[name])}; Spyx runs chains alone)")
        if np.any(np.asarray(getattr(node, "dilation", 1)) != 1):
            wrong.append(f"{name} (Spyx passes over its dilation)")
        if getattr(node, "groups", 1) != 1:
            wrong.append(f"{name} (Spyx passes over its groups)")
        if any(getattr(getattr(node, field, None), "dtype", None) == np.float64 for field in ("weight", "v_threshold")):
            wrong.append(f"{name} (its numbers need float64, and Spyx computes in float32)")
    if wrong:
        raise ValueError(f"Spyx cannot run this network: {'; '.join(wrong)}; use sinabs, norse or spikingjelly")
    chain = ["input"]
    while after[chain[-1]]:
        chain += after[chain[-1]]
    return chain


def channels_last(graph: Any, chain: list[str]) -> Any:
    """The graph with the columns of a Linear behind a Flatten in Spyx' order, (H, W, C)."""
    nodes = dict(graph.nodes)
    for name, behind in pairwise(chain):
        if type(nodes[name]).__name__ == "Flatten":
            c, h, w = (int(side) for side in nodes[name].input_type["input"])
            order = np.arange(c * h * w).reshape(c, h, w).transpose(1, 2, 0).reshape(-1)
            nodes[behind] = replace(nodes[behind], weight=nodes[behind].weight[:, order])
    return type(graph)(nodes=nodes, edges=list(graph.edges), metadata=graph.metadata, type_check=False)
