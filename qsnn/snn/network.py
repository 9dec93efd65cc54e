"""The time loop of networks that are made of SpikingJelly modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from spikingjelly.activation_based import base, functional
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from qsnn.data.batches import check_images
from qsnn.graph.call import Call, calling, full_precision
from qsnn.graph.recipe import input_shape_of
from qsnn.graph.trace import takes_frames, value_shapes
from qsnn.options import Timesteps, check_option, expect, seen
from qsnn.snn.counts import refuse_online
from qsnn.snn.equations import Dynamics
from qsnn.snn.kept import spikes_as_bytes
from qsnn.snn.mean_backward import MeanWalk, unsupported
from qsnn.snn.neurons import IFNode, PlusMinus


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


FIRINGS = ("online", "deferred")
TRAINED = ("", "layer", "channel", "auto")
"""What may be trained of a neuron's threshold, initial potential and time constant: how many values a layer has."""


class SNN(nn.Module):
    r"""A spiking network and its time loop: every call starts from rest and runs T steps.

    Stateless layers see time folded into the batch, (T·B, *); what comes before the first neuron is computed once.
    Nobody needs to call reset, and the state of one call never reaches the next.

    Args:
        network: an fx graph with :class:`IFNode`s, as :func:`qsnn.convert` makes it.
        timesteps: T of a call that names none.
        firing: "online" or "deferred" (see :class:`IFNode`), of a call that names none.
        folded: whether ``network`` is the integer form that :func:`qsnn.fold` makes.
        probes: for a neuron that a max pool was moved behind, the pool: its output is what the activation gave.
    Shape:
        images: (B, C, H, W), the same at every step, or frames in time (B, T, C, H, W); step logits z: (T, B, K);
        returned: the running means
        :math:`m_t = \tfrac1t\sum_{i\le t} z_i`, (T, B, K), online; their last one, (1, B, K), deferred.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        timesteps: int = 2,
        firing: str = "online",
        *,
        folded: bool = False,
        probes: dict[str, str] | None = None,
    ) -> None:
        expect("SNN(network)", "network", network, nn.Module)
        super().__init__()
        self.network = network
        self.folded = folded
        self.probes = dict(probes or {})
        self._passed: dict[Any, set[tuple[int, str]]] = {}
        self.timesteps, self.firing = self._checked(timesteps, firing)

    def _checked(self, timesteps: int, firing: str) -> tuple[int, str]:
        check_option("timesteps", timesteps, Timesteps)
        if firing not in FIRINGS:
            raise ValueError(f"firing must be 'online' or 'deferred', got {seen(firing)}")
        if timesteps > 1 and any(isinstance(module, PlusMinus) for module in self.network.modules()):
            raise ValueError(f"a network of ±1 activations runs one step, got timesteps={timesteps}; use timesteps=1")
        if firing == "online":
            refuse_online(self.network, "the call")
        special = [name for name, node in self.neurons() if not getattr(node, "dynamics", Dynamics()).plain]
        if firing == "deferred" and special:
            raise ValueError(
                f"deferred firing is defined for the soft reset without leak, signed spikes or a membrane of few bits; "
                f"{special[0]} has another equation; use firing='online'"
            )
        return timesteps, firing

    def _agreed(self, timesteps: int, firing: str) -> tuple[int, str]:
        """What :meth:`_checked` says, asked once for each T and firing of a folded network, which nobody rebuilds."""
        passed = self._passed.setdefault(getattr(self.network, "_code", None), set())
        known = type(timesteps) is int and type(firing) is str and (timesteps, firing) in passed
        if not self.folded or not known:
            passed.add(self._checked(timesteps, firing))
        return timesteps, firing

    def neurons(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the name and module of every spiking layer, named as the layer it replaced."""
        for name, module in self.network.named_modules():
            if getattr(module, "is_spiking", False) or isinstance(module, IFNode):
                yield name, module

    def step_logits(self, images: Tensor, *, timesteps: int | None = None, firing: str | None = None) -> Any:
        """Return the logits z of every step, (T, B, K); losses see these. Several heads come as the model gives them.

        Raises:
            ValueError: images of a wrong shape or dtype, with NaN, T < 1, or an unknown way of firing.
        """
        shape = getattr(self, "qsnn_recipe", {}).get("input_shape")
        frames = isinstance(images, Tensor) and takes_frames(self, images)
        if timesteps is None:
            timesteps = images.shape[1] if frames else self.timesteps
        steps, firing = self._agreed(timesteps, self.firing if firing is None else firing)
        images = in_order(images, steps) if frames else images
        if not torch.compiler.is_exporting():  # an exported program sees shapes; values are its caller's to check
            dtypes = (value.dtype for value in self.network.parameters() if value.dim() > 1)
            check_images(images, None if shape is None else tuple(shape), None if self.folded else next(dtypes, None))
        if images.dim() == 4 and not (self.folded or torch.is_grad_enabled() or torch.compiler.is_exporting()):
            # every layer behind takes the layout over, and convolutions of it are a sixth faster
            images = images.contiguous(memory_format=torch.channels_last)
        exact = full_precision(images.device) if self.folded else nullcontext()
        run = MeanWalk(self.network, steps).run if self._goes_through_means(firing, frames) else self.network
        bytes_kept = torch.is_grad_enabled() and not (self.folded or torch.compiler.is_compiling())
        with calling(Call(steps, firing, frames)), exact, spikes_as_bytes() if bytes_kept else nullcontext():
            return _each(lambda z: z.unflatten(0, (steps, -1)), run(images))

    def _goes_through_means(self, firing: str, frames: bool) -> bool:
        """Whether one backward serves all steps: in training by the gradient of the rate, where nobody watches."""
        if not (self.training and torch.is_grad_enabled()) or self.folded or frames or firing != "online":
            return False
        if any(getattr(neuron, "surrogate", "rate") != "rate" for _, neuron in self.neurons()):
            return False  # the usual case, before the graph is looked through
        if torch.compiler.is_compiling() or any(module._forward_hooks for module in self.network.modules()):
            return False
        return unsupported(self.network) is None

    def forward(self, images: Tensor, *, timesteps: int | None = None, firing: str | None = None) -> Any:
        """Return the answer after each step (online), or the final one (deferred)."""
        firing = self.firing if firing is None else firing
        z = self.step_logits(images, timesteps=timesteps, firing=firing)
        return _each(final_mean if firing == "deferred" else running_mean, z)


def _each(change: Callable[[Tensor], Tensor], answers: Any) -> Any:
    """The answer of every head, changed."""
    return change(answers) if isinstance(answers, Tensor) else tree_map(change, answers)


def in_order(frames: Tensor, timesteps: int) -> Tensor:
    """The first T frames, (B, T, C, H, W), time first and folded into the batch: (T·B, C, H, W).

    Raises:
        ValueError: fewer frames than T.
    """
    if timesteps > frames.shape[1]:
        raise ValueError(
            f"expected at least {timesteps} frames, one for each time step, got {frames.shape[1]}; load the data with "
            f"timesteps={timesteps}"
        )
    return frames[:, :timesteps].transpose(0, 1).flatten(0, 1)


def running_mean(z: Tensor) -> Tensor:
    r"""The answer after each step, :math:`m_t = \tfrac1t\sum_{i\le t} z_i`; z and m: (T, B, *)."""
    counts = torch.arange(1, len(z) + 1, device=z.device, dtype=z.dtype).view(-1, *[1] * (z.dim() - 1))
    return z.cumsum(0) / counts


def final_mean(z: Tensor) -> Tensor:
    """The last of the running means: (T, B, *) -> (1, B, *); added step by step, in one order for every batch size."""
    return running_mean(z)[-1:]


def train_neurons_(
    snn: SNN, threshold: str, initial: str, tau: str, timesteps: int = 2
) -> list[tuple[nn.Parameter, Tensor | float]]:
    """Put threshold, initial potential and time constant into training, in place: "layer", "channel" or "" for not.

    The initial potential may be one a channel and "step", of ``timesteps``.

    "auto" is one a layer of the threshold, for spikes of one size keep the layer behind in integers; of the others one
    a channel where the number of channels is known, of a time constant where there is a leak. Return these parameters,
    () or (C,), with the least value that each may take.

    Raises:
        ValueError: a time constant where there is no leak, or channels of an unknown number.
    """
    neurons = [(name, neuron) for name, neuron in snn.neurons() if isinstance(neuron, IFNode)]
    shapes = value_shapes(snn.network, input_shape_of(snn))
    nodes = {str(node.target): node.name for node in snn.network.graph.nodes if node.op == "call_module"}
    limits: list[tuple[nn.Parameter, Tensor | float]] = []
    for name, neuron in neurons:
        for what, each in (("threshold", threshold), ("initial", initial), ("tau", tau)):
            if not each or (each == "auto" and getattr(neuron, what) is None):
                continue
            channels = None
            if each in ("channel", "step") or (each == "auto" and what != "threshold" and nodes[name] in shapes):
                if nodes[name] not in shapes:
                    raise ValueError("a value a channel needs the image shape; convert a network that has seen data")
                channels = shapes[nodes[name]][1]
            neuron.train_(what, channels, timesteps if each == "step" else 1)
            value = getattr(neuron, what)
            # a threshold and a time constant stay above 0
            low: Tensor | float = 0.01 * value.detach().clone() if what == "threshold" else 0.05
            limits.append((value, low if what != "initial" else -1.0))
    return limits
