"""A NIR file that qsnn wrote, run by another simulator's own neurons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn.export.nir_spyx import SpyxNetwork
from qsnn.quant.activations import round_half_up
from qsnn.snn.network import running_mean

RELAYS = 2
"""Channels beside a layer's own: "start", 1 at the first step, and "clock", 1 at every step."""
SIMULATORS = ("sinabs", "norse", "spikingjelly", "spyx")


def import_nir() -> Any:
    """The package ``nir``.

    Raises:
        ImportError: it is missing.
    """
    try:
        import nir
    except ImportError:
        raise ImportError("NIR files need the package nir: pip install 'nir>=1.0.8'") from None
    return nir


def load_into(simulator: str, path: str | Path) -> Loaded:
    """Build the network of a NIR file from a simulator's own neurons, with the settings that make it exact.

    What each needs: sinabs one spike a step (``SingleSpike``) and no floor under the potential; Norse, whose IF resets
    to a value, a step that subtracts θ; SpikingJelly ``v_reset=None`` and a θ for each neuron. Their graph is wired by
    ``nirtorch.nir_to_torch``, which adds what meets in a node; it runs in float64. Spyx builds its own network, in
    float32: :class:`~qsnn.export.nir_spyx.SpyxNetwork` gives it the steps by which its neurons are late.

    Args:
        simulator: "sinabs", "norse", "spikingjelly" or "spyx".
        path: a file that ``qsnn export --format nir`` wrote.
    Raises:
        ValueError: another simulator, a file that qsnn did not write, or for Spyx what it has no form for, by name.
        ImportError: the simulator, nir or nirtorch is missing.
        FileNotFoundError: no such file.
    """
    if simulator not in SIMULATORS:
        raise ValueError(f"expected a simulator of {', '.join(SIMULATORS)}, got {simulator!r}")
    graph = read_graph(path)
    if graph.metadata.get("written_by") not in ("qsnn", b"qsnn"):
        raise ValueError(f"{path} was not written by qsnn; read it with qsnn.from_nir(path, written_by=...)")
    nir = import_nir()
    if simulator == "spyx":
        try:
            return Loaded(SpyxNetwork(graph), graph.metadata)
        except ImportError as error:
            raise ImportError(f"load_into('spyx') needs the package spyx: pip install 'spyx>=1.0' ({error})") from None
    try:
        import nirtorch

        cell = CELLS[simulator]()
    except ImportError as error:
        raise ImportError(f"load_into({simulator!r}) needs nirtorch and {simulator}: {error}") from None
    kinds = {nir.IF: cell, nir.Conv2d: convolution, nir.Linear: linear, nir.Flatten: lambda node: nn.Flatten(1)}
    network = nirtorch.nir_to_torch(graph, kinds, dtype=torch.float64)
    return Loaded(Stepped(network.double().eval()), graph.metadata)


def read_graph(path: str | Path) -> Any:
    """Read a NIR file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no NIR file.
        ImportError: the package ``nir`` is missing.
    """
    nir = import_nir()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        graph = nir.read(path, type_check=False)
    except (OSError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is no NIR file ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(graph, nir.NIRGraph):
        raise ValueError(f"{path} holds one {type(graph).__name__}, expected a graph")
    return graph


class Stepped(nn.Module):
    """What ``nirtorch.nir_to_torch`` built, (input, state) -> (output, state), over all steps.

    Shape:
        frames: (T, B, *); returned: (T, B, K).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """Run from rest."""
        state, found = None, []
        for x in frames:
            out, state = self.network(x, state)
            found.append(out)
        return torch.stack(found)


class Loaded(nn.Module):
    """A network in another simulator, called like an :class:`~qsnn.SNN`.

    Args:
        network: (T, B, C + 2, H, W) -> (T, B, K), integers to integers, all steps from rest.
        metadata: of the graph: the input's quantizer, gains and biases of the logits, T.
    Shape:
        images: (B, C, H, W), normalised as for the network that was written; returned: the answer after each step,
        (T, B, K), float64.
    """

    def __init__(self, network: nn.Module, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.timesteps, self.levels = int(metadata["timesteps"]), int(metadata["input_levels"])
        for name in ("input_step", "gain", "bias"):
            self.register_buffer(name, torch.from_numpy(np.asarray(metadata[name], dtype=np.float64).copy()))

    @torch.no_grad()
    def integer_logits(self, images: Tensor) -> Tensor:
        """The last layer's integers at each step, (T, B, K)."""
        found: Tensor = self.network(encoded(images, self.input_step, self.levels, self.timesteps))  # type: ignore[arg-type]
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Return the answer after each step."""
        z: Tensor = self.gain * self.integer_logits(images) + self.bias  # type: ignore[operator]
        return running_mean(z)


def encoded(images: Tensor, step: Tensor, levels: int, timesteps: int) -> Tensor:
    """Images (B, C, H, W) as the graph's input, (T, B, C + 2, H, W): their integers, then "start" and "clock"."""
    x = round_half_up(images.double() / step.view(-1, 1, 1)).clamp_(-levels, levels)
    relays = x.new_ones(timesteps, len(x), RELAYS, *x.shape[2:])
    relays[1:, :, 0] = 0.0
    return torch.cat([x.expand(timesteps, *x.shape), relays], 2)


def convolution(node: Any) -> nn.Conv2d:
    """A NIR Conv2d as torch's."""
    out, inputs, *kernel = node.weight.shape
    sides = {
        name: side if isinstance(side, str) else tuple(int(s) for s in np.broadcast_to(side, (2,)))
        for name, side in (("stride", node.stride), ("padding", node.padding), ("dilation", node.dilation))
    }
    layer = nn.Conv2d(inputs * int(node.groups), out, tuple(kernel), groups=int(node.groups), **sides)  # type: ignore[arg-type]
    layer.weight.data = torch.as_tensor(np.asarray(node.weight))
    assert layer.bias is not None
    layer.bias.data = torch.as_tensor(np.asarray(node.bias))
    return layer


def linear(node: Any) -> nn.Linear:
    """A NIR Linear or Affine as torch's."""
    bias = getattr(node, "bias", None)
    layer = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias=bias is not None)
    layer.weight.data = torch.as_tensor(np.asarray(node.weight))
    if bias is not None:
        layer.bias.data = torch.as_tensor(np.asarray(bias))
    return layer


def _sinabs() -> Callable[[Any], nn.Module]:
    from sinabs.activation import SingleSpike
    from sinabs.layers import IAF

    class Cell(nn.Module):
        """One step of a sinabs IAF; without a state it starts from rest."""

        def __init__(self, node: Any) -> None:
            super().__init__()
            theta = torch.from_numpy(node.v_threshold).double()
            self.neuron = IAF(spike_threshold=theta, spike_fn=SingleSpike, min_v_mem=None)

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            if state is None:
                self.neuron.reset_states()
                self.neuron.init_state_with_shape(x.shape)
                self.neuron.v_mem = self.neuron.v_mem.double()
            return self.neuron(x.unsqueeze(1)).squeeze(1).to(x.dtype), True

    return Cell


def _norse() -> Callable[[Any], nn.Module]:
    from norse.torch.functional.iaf import IAFFeedForwardState, IAFParameters
    from norse.torch.functional.threshold import threshold
    from norse.torch.module.snn import SNNCell

    def soft_step(x: Tensor, state: Any, p: Any, dt: float = 0.001) -> tuple[Tensor, Any]:
        v = state.v + x
        z = threshold(v - p.v_th, p.method, p.alpha)
        return z, IAFFeedForwardState(v=v - z * p.v_th)

    class Cell(SNNCell):  # type: ignore[misc]
        """Norse's cell with a soft reset."""

        def __init__(self, node: Any) -> None:
            parameters = IAFParameters(v_th=torch.from_numpy(node.v_threshold).double())
            super().__init__(soft_step, lambda x: IAFFeedForwardState(v=torch.zeros_like(x)), parameters)

    return Cell


def _spikingjelly() -> Callable[[Any], nn.Module]:
    from spikingjelly.activation_based.neuron import IFNode

    class Cell(nn.Module):
        """One step of a SpikingJelly IFNode with soft reset and a threshold for each neuron."""

        def __init__(self, node: Any) -> None:
            super().__init__()
            self.neuron = IFNode(v_reset=None)
            self.neuron.v_threshold = torch.from_numpy(node.v_threshold).double()

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            state = (torch.zeros_like(x),) if state is None else state
            outputs, state = self.neuron.single_step_functional_forward((x,), state)
            return outputs[0], state

    return Cell


CELLS: dict[str, Callable[[], Callable[[Any], nn.Module]]] = {
    "sinabs": _sinabs,
    "norse": _norse,
    "spikingjelly": _spikingjelly,
}
"""What builds a simulator's neuron from a NIR IF."""
