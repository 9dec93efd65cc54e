"""Spikes from sums over time and the limits they must reach: the loop that all exact neurons of a folded net share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

COMPARED = 8
"""Largest T at which every limit is compared; looking one up costs as much as several comparisons [steps]."""


def in_time(x: Tensor, timesteps: int) -> Sequence[Tensor]:
    """What comes at each step: (T·B, *) -> T tensors (B, *), in the layout of x."""
    images = x.shape[0] // timesteps
    # a view (T, B, *) of one image would lose the layout: its stride over images becomes that of the channels
    return [x.narrow(0, t * images, images) for t in range(timesteps)]


def summed_up(steps: Sequence[Tensor]) -> list[Tensor]:
    """The sums up to each step, added one after the other; T tensors (B, *)."""
    return list(accumulate(steps, torch.add))


def total(x: Tensor, timesteps: int) -> Tensor:
    """The sum over all steps: (T·B, *) -> (B, *)."""
    return x if timesteps == 1 else summed_up(in_time(x, timesteps))[-1]


def deferred(total: Tensor, limits: Sequence[Tensor]) -> Tensor:
    """As many spikes as limits are reached, in the first steps: step t spikes where the t-th smallest limit is reached.

    Args:
        total: the sum over all T steps.
        limits: T of them, none below the one before.
    Shape:
        total: (B, *); limits: T, each broadcasts against it; returned: (T·B, *) float32.
    """
    return torch.cat([reached(total, limit) for limit in limits])


def online(totals: Sequence[Tensor], limits: Sequence[Sequence[Tensor]], *, signed: bool = False) -> Tensor:
    """After k spikes a neuron fires at step t where its sum reaches limit (t, k): where more than k are reached.

    A signed one takes a spike back, -1, where fewer than k are.

    Args:
        totals: the sums up to each step.
        limits: by t and k <= t; of one t none below the one before.
        signed: whether spikes are -1 too; k is then what is left of them.
    Shape:
        totals: T tensors (B, *); limits: each broadcasts against them; returned: (T·B, *) float32.
    """
    spikes = [reached(totals[0], limits[0][0])]
    fired = spikes[0]
    for total, (first, *others) in zip(totals[1:], limits[1:], strict=True):
        count = reached(total, first)
        for limit in others:
            count.add_(reached(total, limit))
        spikes.append(count.sub_(fired).clamp_(-1.0, 1.0) if signed else torch.gt(count, fired, out=count))
        if len(spikes) < len(totals):
            fired = fired + count
    return torch.cat(spikes)


def twice(totals: Sequence[Tensor], first: Tensor, later: Tensor, rise: Tensor, *, signed: bool = False) -> Tensor:
    """:func:`online` for two steps of integers: the second limit is ``later``, or ``later + rise`` behind a spike.

    Shape:
        totals: 2 tensors (B, *); first, later, rise: each broadcasts against them; returned: (2·B, *) float32.
    """
    spikes = reached(totals[0], first)
    second = reached(totals[1], torch.addcmul(later, spikes.to(later.dtype), rise))
    if signed:  # behind a spike, which is taken back below ``later``
        second.sub_(spikes * (1.0 - reached(totals[1], later)))
    return torch.cat([spikes, second])


def one_by_one(totals: Sequence[Tensor], limit: Callable[[int, Tensor], Tensor], *, signed: bool = False) -> Tensor:
    """The same where many steps would need too many comparisons: each neuron's next limit is looked up.

    Args:
        totals: the sums up to each step.
        limit: takes t and the spikes so far, and gives the limit of each neuron.
    Shape:
        totals: T tensors (B, *); of limit: (B, *) -> (B, *); returned: (T·B, *) float32.
    """
    fired, spikes = torch.zeros_like(totals[0]), list[Tensor]()
    for t, total in enumerate(totals):
        spike = reached(total, limit(t, fired))
        if signed and t:
            spike.sub_((fired > 0) * (1.0 - reached(total, limit(t, (fired - 1).clamp(min=0)))))
        spikes.append(spike)
        fired = fired + spike
    return torch.cat(spikes)


def reached(total: Tensor, limit: Tensor) -> Tensor:
    """[total >= limit] as float32; a comparison that writes floats is vectorised, one that writes bools is not.

    Shape:
        total and returned: (*); limit: broadcast against it.
    """
    return torch.ge(total, limit, out=torch.empty_like(total, dtype=torch.float32))
