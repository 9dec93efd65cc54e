"""The time loop of networks that are made of SpikingJelly modules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from qsnn.neurons import running_mean


class TimeLoop(nn.Module):
    """The time loop of a network of SpikingJelly modules, so that it is called like an :class:`SNN`.

    Args:
        network: multi-step (its nodes have step_mode "m"; it maps (T, B, C, H, W) to (T, B, K)) or single-step (it
            maps (B, C, H, W) to (B, K), and is called T times). It is reset before and after every call.
        timesteps: T of a call that names none.
    Shape:
        images: (B, C, H, W), the same at every step; returned: the answer after each step, (T, B, K).
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
        steps = timesteps or self.timesteps
        functional.reset_net(self.network)
        if self.multi_step:
            z = self.network(images.expand(steps, *images.shape))
        else:
            z = torch.stack([self.network(images) for _ in range(steps)])
        functional.reset_net(self.network)
        return z

    def forward(self, images: Tensor, *, timesteps: int | None = None) -> Tensor:
        """Return the answer after each step."""
        return running_mean(self.step_logits(images, timesteps=timesteps))
