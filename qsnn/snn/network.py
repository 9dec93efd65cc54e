"""The time loop of networks that are made of SpikingJelly modules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from qsnn.neurons import SNN, in_order, running_mean


class TimeLoop(nn.Module):
    """The time loop of a network of SpikingJelly modules, so that it is called like an :class:`SNN`.

    Args:
        network: multi-step (its nodes have step_mode "m"; it maps (T, B, C, H, W) to (T, B, K)) or single-step (it
            maps (B, C, H, W) to (B, K), and is called T times). It is reset before and after every call.
        timesteps: T of a call that names none.
    Shape:
        images: (B, C, H, W), the same at every step, or frames (B, T, C, H, W); returned: the answer after each
        step, (T, B, K).
    Raises:
        ValueError: the network holds no module with a state.
    """

    def __init__(self, network: nn.Module, timesteps: int = 2) -> None:
        super().__init__()
        modes = {module.step_mode for module in network.modules() if isinstance(module, base.MemoryModule)}
        if not modes:
            raise ValueError(f"{type(network).__name__} holds no SpikingJelly node; call convert first")
        self.network, self.timesteps, self.firing = network, timesteps, "online"
        self.multi_step = "m" in modes

    def neurons(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the name and module of every node."""
        yield from ((name, m) for name, m in self.network.named_modules() if isinstance(m, BaseNode))

    def step_logits(self, images: Tensor, *, timesteps: int | None = None) -> Tensor:
        """Return the logits of every step, (T, B, K)."""
        steps = timesteps or (images.shape[1] if images.dim() == 5 else self.timesteps)
        if images.dim() == 5:
            images = in_order(images, steps).unflatten(0, (steps, -1))
        else:
            images = images.expand(steps, *images.shape)
        functional.reset_net(self.network)
        z = self.network(images) if self.multi_step else torch.stack([self.network(image) for image in images])
        functional.reset_net(self.network)
        return z

    def forward(self, images: Tensor, *, timesteps: int | None = None) -> Tensor:
        """Return the answer after each step."""
        return running_mean(self.step_logits(images, timesteps=timesteps))


def time_loop(model: nn.Module) -> SNN | TimeLoop | None:
    """What runs a model in time: itself, the loop of a student in training, or None where it has no steps."""
    loop = getattr(model, "loop", model)
    return loop if isinstance(loop, SNN | TimeLoop) else None
