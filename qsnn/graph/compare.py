"""What is accepted is right: a copy of a network is run beside the network before anything is built on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qsnn.graph.arrived import evaluating
from qsnn.graph.follow import named
from qsnn.graph.hooks import recorded
from qsnn.graph.trace import SPELLED, call_nodes

TOLERANCE = 1e-5
"""Largest difference of two answers that count as equal [the larger of the answers' spread and size]."""


@torch.no_grad()
def same_answers(model: nn.Module, network: fx.GraphModule, images: Tensor) -> None:
    """Refuse a spelled copy that does not answer as the network it was made from, both in eval mode.

    Args:
        model: the user's.
        network: from :func:`qsnn.graph.spell.trace`.
        images: (B, \\*) that the model takes.
    Raises:
        ValueError: the answers differ; says where they begin to differ.
    """
    with evaluating(model, network):
        again = _answers(model, images)
        wanted = _answers(model, images)
        if any(not torch.equal(a, b) for a, b in zip(again, wanted, strict=True)):
            raise ValueError(
                f"{type(model).__name__} answers the same images differently from call to call in eval mode; what is "
                f"drawn at random must stop there (pass training=self.training to functional dropout)"
            )
        found = _answers(network, images)
        if len(found) == len(wanted) and all(map(_equal, found, wanted)):
            return
        place = _first_difference(model, network, images)
    raise ValueError(
        f"the graph of {type(model).__name__} does not answer as the network itself: they differ {place}; something "
        f"there depends on more than its input (a hook, the batch, a tensor that is changed in place); write it as a "
        f"layer of its own"
    )


def _answers(model: nn.Module, images: Tensor) -> list[Tensor]:
    found: Any = model(images)
    for module in getattr(model, "meta", {}).get(SPELLED, ()):
        found = module(found)
    return _leaves(found)


def _leaves(found: Any) -> list[Tensor]:
    """The tensors of an answer, whatever holds them."""
    leaves: list[Tensor] = []
    for leaf in tree_leaves(found):
        fields = named(leaf)
        leaves += [leaf] if isinstance(leaf, Tensor) else [] if fields is None else _leaves(fields)
    return leaves


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    b = b.to(a.dtype)
    spread = float(b.std()) if b.numel() > 1 else 0.0
    limit = TOLERANCE * max(spread, float(b.abs().max()) if b.numel() else 0.0)
    return bool(((a - b).abs() <= limit).all())


def _first_difference(model: nn.Module, network: fx.GraphModule, images: Tensor) -> str:
    """The first layer of the graph, of those that both networks have, whose outputs differ."""
    theirs = dict(model.named_modules())
    names = [str(node.target) for node, _ in call_nodes(network) if str(node.target) in theirs]
    with recorded({name: theirs[name] for name in names}) as wanted:
        model(images)
    with recorded({name: network.get_submodule(name) for name in names}) as found:
        network(images)
    for name in names:
        ours, own = found.get(name), wanted.get(name)
        if isinstance(ours, Tensor) and isinstance(own, Tensor) and not _equal(ours, own):
            return f"from layer {name} on"
    return "behind the last layer"


def refuse_not_finite(model: nn.Module, verb: str, images: Tensor) -> None:
    """Refuse a network that a verb has just made of images, where a number of it is NaN or infinite.

    Args:
        model: what was made.
        verb: its name.
        images: what it was calibrated on.
    Raises:
        ValueError: which tensor, and what the images reach.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{verb} left NaN or infinity in {name}: expected a finite network and normalised images, got images "
                f"from {float(images.min()):.3g} to {float(images.max()):.3g}; look at both"
            )
