"""from_nir(): a spiking network that another library wrote as a NIR graph, read in as a student."""

from __future__ import annotations

import keyword
from dataclasses import asdict, dataclass, fields, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, fx, nn

from qsnn.export.nir_read import convolution, import_nir, linear, read_graph
from qsnn.graph.modules import Add
from qsnn.graph.recipe import set_recipe
from qsnn.options import seen
from qsnn.snn.equations import per_channel
from qsnn.snn.network import SNN, TimeLoop
from qsnn.snn.neurons import IFNode
from qsnn.snn.structure import repeat_static_


@dataclass(frozen=True, kw_only=True)
class Semantics:
    r"""What NIR leaves open of a neuron; symbols: potential v, current x, decay d, threshold θ, spike s.

    .. math:: h = d\,v + x, \quad s = [h \ge \theta]
    """

    reset: str = "soft"
    """"soft" (θ is subtracted) or "hard" (back to the file's v_reset)."""
    strict: bool = False
    """A neuron fires at v > θ, not at v = θ."""
    late: bool = False
    """A soft reset comes with the next step, after the decay: v ← d·v + x - θ·s."""
    dt: float = 1e-4
    """Length of a step that time constants are read with [s]."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: which option, and what it may be.
        """
        if self.reset not in ("soft", "hard"):
            raise ValueError(f"reset must be 'soft' or 'hard', got {self.reset!r}")
        if not self.dt > 0:
            raise ValueError(f"dt must be above 0 s, got {self.dt}")


WRITERS = {
    "qsnn": Semantics(),
    "sinabs": Semantics(),
    "spikingjelly": Semantics(reset="hard"),  # its exporter refuses a soft reset
    # snn.Leaky's defaults; the file says neither. Its reset_delay=False, which compares a potential that is still above
    # θ after a reset with one θ less, is not modelled.
    "snntorch": Semantics(strict=True, late=True),
    "norse": Semantics(reset="hard", strict=True, dt=1e-3),
}
"""How a library's own neurons behave where its file does not say."""


def from_nir(
    path: str | Path,
    *,
    written_by: str,
    reset: str | None = None,
    strict: bool | None = None,
    late: bool | None = None,
    dt: float | None = None,
    timesteps: int = 2,
) -> SNN | TimeLoop:
    """Read a NIR graph of convolutions, linear layers, pooling, flatten and IF or LIF neurons as a spiking network.

    It can be benchmarked and distilled. Where all neurons are IF with soft reset that fire at v >= θ, it is an
    :class:`~qsnn.SNN` of :class:`~qsnn.IFNode`, which :func:`qsnn.fold` takes. Where currents meet they are added.

    Args:
        path: the file.
        written_by: "qsnn", "sinabs", "spikingjelly", "snntorch" or "norse": what NIR leaves open is then as there.
        reset, strict, late, dt: of :class:`Semantics`, in the place of that library's.
        timesteps: T of a call that names none.
    Raises:
        FileNotFoundError: no such file.
        ValueError: another writer, no NIR file, a cycle, or nodes that have no form here, all of them by name.
        ImportError: the package ``nir`` is missing.
    """
    if written_by not in WRITERS:
        raise ValueError(f"expected written_by of {', '.join(WRITERS)}, got {seen(written_by)}")
    given: dict[str, Any] = {"reset": reset, "strict": strict, "late": late, "dt": dt}
    meaning = replace(WRITERS[written_by], **{key: value for key, value in given.items() if value is not None})
    graph = read_graph(path)
    network = _network(graph, meaning, path)
    plain = all(isinstance(m, IFNode) for m in network.modules() if isinstance(m, neuron.BaseNode))
    if plain:
        repeat_static_(network)
        network.recompile()
        found: SNN | TimeLoop = SNN(network, timesteps)
    else:
        functional.set_step_mode(network, "s")
        found = TimeLoop(network, timesteps)
    options = {"path": str(path), "written_by": written_by, "timesteps": timesteps, **asdict(meaning)}
    recipe = {"kind": "student", "spiking": True, "model": {"name": f"{__name__}:from_nir", "options": options}}
    (entry,) = (node for node in graph.nodes.values() if isinstance(node, import_nir().Input))
    shape = entry.input_type.get("input")
    if shape is not None and len(shape) in (1, 3):
        recipe["input_shape"] = [int(side) for side in shape]
    set_recipe(found, recipe)
    return found.eval()


def told_semantics(recipe: dict[str, Any]) -> str | None:
    """Return what is taken of a network that came in by :func:`from_nir`, in one line; None for any other.

    >>> told_semantics(dict(model=dict(name=f"{__name__}:from_nir", options=dict(path="a.nir", written_by="snntorch"))))
    'read from a.nir, written by snntorch: reset soft, with the next step; a neuron fires at v > θ; dt = 0.0001 s'

    Args:
        recipe: of the network.
    """
    model = recipe.get("model", {})
    if model.get("name") != f"{__name__}:from_nir":
        return None
    options = model.get("options", {})
    names = [field.name for field in fields(Semantics)]
    own = WRITERS.get(options.get("written_by"), Semantics())
    meaning = replace(own, **{name: options[name] for name in names if name in options})
    when = "with the next step" if meaning.late and meaning.reset == "soft" else "in the step of the spike"
    return (
        f"read from {options.get('path')}, written by {options.get('written_by')}: reset {meaning.reset}, {when}; a "
        f"neuron fires at v {'>' if meaning.strict else '>='} θ; dt = {meaning.dt:g} s"
    )


def _network(graph: Any, meaning: Semantics, path: str | Path) -> fx.GraphModule:
    """The graph with torch's layers and SpikingJelly's or our neurons."""
    nir = import_nir()
    before: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        before[target].append(source)
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise ValueError(
            f"{path} holds a cycle ({' -> '.join(error.args[1])}); only feed-forward graphs are read"
        ) from None
    root, out, values, refused = nn.Module(), fx.Graph(), {}, []
    ends = {kind: [n for n, node in graph.nodes.items() if isinstance(node, kind)] for kind in (nir.Input, nir.Output)}
    if any(len(names) != 1 for names in ends.values()):
        raise ValueError(f"expected one input and one output in {path}, got {[len(n) for n in ends.values()]}")
    for name in order:
        node = graph.nodes[name]
        if isinstance(node, nir.Input):
            values[name] = out.placeholder("images")
            continue
        if not before[name]:
            refused.append(f"{name} (nothing reaches it)")
            continue
        try:
            module = None if isinstance(node, nir.Output) else _module(nir, node, meaning)
        except ValueError as error:
            refused.append(f"{name} ({error})")
            continue
        if any(source not in values for source in before[name]):
            continue
        value = values[before[name][0]]
        for source in before[name][1:]:
            root.add_module(plus := f"add_{len(values)}_{source}".replace(".", "_"), Add())
            value = out.call_module(plus, (value, values[source]))
        if module is None:
            out.output(value)
            continue
        clean = "".join(c if c.isalnum() else "_" for c in name)
        while hasattr(root, clean) or keyword.iskeyword(clean):
            clean += "_"
        root.add_module(clean, module)
        values[name] = out.call_module(clean, (value,))
    if refused:
        raise ValueError(f"cannot read {path}: " + "; ".join(refused))
    found = fx.GraphModule(root, out, "FromNIR")
    found.graph.lint()
    return found


def _module(nir: Any, node: Any, meaning: Semantics) -> nn.Module:
    if isinstance(node, nir.Conv2d):
        return convolution(node).float()
    if isinstance(node, nir.Linear | nir.Affine):
        return linear(node).float()
    if isinstance(node, nir.AvgPool2d):
        return nn.AvgPool2d(*_sides(node))
    if isinstance(node, nir.SumPool2d):
        shape = node.input_type.get("input") if node.input_type else None
        if shape is None:
            raise ValueError("a SumPool2d whose number of channels the file does not say")
        return _sum_pool(node, int(shape[0]))
    if isinstance(node, nir.Flatten):
        if int(node.start_dim) not in (0, -3) or int(node.end_dim) not in (-1, 2):
            raise ValueError(f"only all of an image is flattened, not {int(node.start_dim)} to {int(node.end_dim)}")
        return nn.Flatten(1)
    if isinstance(node, nir.IF | nir.LIF):
        return _neuron(nir, node, meaning)
    raise ValueError(f"{type(node).__name__} has no form here")


def _sum_pool(node: Any, channels: int) -> nn.Conv2d:
    kernel, stride, padding = _sides(node)
    layer = nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False)
    nn.init.ones_(layer.weight)
    return layer.requires_grad_(False)


def _sides(node: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Kernel, stride and padding of a pooling, a number for each dimension."""
    a, b, c = (np.broadcast_to(x, (2,)).tolist() for x in (node.kernel_size, node.stride, node.padding))
    return (int(a[0]), int(a[1])), (int(b[0]), int(b[1])), (int(c[0]), int(c[1]))


def _by_channel(x: Any, what: str) -> Tensor:
    """A value a neuron as one a layer, () or a channel, (C,).

    Raises:
        ValueError: it differs within a channel.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.size == 1 or (x == x.reshape(-1)[0]).all():
        return torch.tensor(float(x.reshape(-1)[0]), dtype=torch.float64)
    first = x.reshape(len(x), -1)
    if not (first == first[:, :1]).all():
        raise ValueError(f"{what} differs within a channel")
    return torch.from_numpy(first[:, 0].copy())


def _neuron(nir: Any, node: Any, meaning: Semantics) -> nn.Module:
    theta, back = _by_channel(node.v_threshold, "v_threshold"), _by_channel(node.v_reset, "v_reset")
    if not bool((theta > 0).all()):
        raise ValueError("thresholds must be above 0")
    r = _by_channel(node.r, "r")
    if isinstance(node, nir.IF):
        # one step adds r·dt·x; all writers mean x, and spell r as 1 or as 1/dt
        if not any(torch.allclose(r * step, torch.ones_like(r)) for step in (1.0, meaning.dt)):
            raise ValueError(f"r must be 1 or 1/dt, got {r.flatten()[:3].tolist()} at dt = {meaning.dt} s")
        if meaning.reset == "soft" and not meaning.strict and not meaning.late:
            return IFNode(theta, initial=0.0)
        if meaning.reset == "hard" and not meaning.strict and not theta.dim() and not back.dim():
            return neuron.IFNode(v_threshold=float(theta), v_reset=float(back))
        return ReadNode(theta, torch.ones(()), back, meaning)
    tau = _by_channel(node.tau, "tau") / meaning.dt
    if bool((_by_channel(node.v_leak, "v_leak") != (back if meaning.reset == "hard" else 0)).any()):
        raise ValueError("v_leak must be v_reset, and 0 where the reset is soft")
    if not bool((tau > 1).all()):
        raise ValueError(f"tau must be above dt = {meaning.dt} s")
    decays = bool(torch.allclose(r, torch.ones_like(r)))  # v += (x - v)/τ; else v += x - v/τ
    if not decays and not torch.allclose(r, tau.expand_as(r) if not tau.dim() else tau):
        raise ValueError(f"r must be 1 or tau/dt, got {r.flatten()[:3].tolist()} for {tau.flatten()[:3].tolist()}")
    if meaning.reset == "hard" and not meaning.strict and not theta.dim() and not tau.dim() and not back.dim():
        return neuron.LIFNode(float(tau), decay_input=decays, v_threshold=float(theta), v_reset=float(back))
    # v·τ instead of v where the input decays: the same spikes, at θ·τ
    factor = tau if decays else torch.ones(())
    return ReadNode(theta * factor, 1.0 - 1.0 / tau, back * factor, meaning)


class ReadNode(neuron.BaseNode):
    r"""IF or LIF neuron with the reset, comparison and delay of :class:`Semantics`; a SpikingJelly node.

    :math:`h = d\,v + x,\; s = [h \ge \theta]` (or >), then :math:`v = h - \theta s` (soft), :math:`v_{reset}` where
    s = 1 (hard); late: :math:`h_t = d\,h_{t-1} + x_t - \theta s_{t-1}`. The derivative of a spike is SpikingJelly's
    default surrogate.

    Args:
        threshold: θ, () or (C,) [units of the current].
        keep: d [1], () or (C,).
        back: v_reset, () or (C,).
        meaning: reset, comparison, delay.
    Shape:
        x and spikes: (B, C, *) in step mode "s", (T, B, C, *) in "m".
    """

    threshold: Tensor
    keep: Tensor
    back: Tensor

    def __init__(self, threshold: Tensor, keep: Tensor, back: Tensor, meaning: Semantics) -> None:
        super().__init__(v_threshold=float(threshold.max()), v_reset=None)
        for name, value in (("threshold", threshold), ("keep", keep), ("back", back)):
            self.register_buffer(name, value.double().clone())
        self.meaning = meaning

    def materialize_states(self, inputs: tuple[Any, ...], states: tuple[Any, ...], step_mode: str) -> tuple[Any, ...]:
        """Give a potential that has not started yet the value 0, or v_reset where the reset is hard."""
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        if torch.is_tensor(states[0]) and states[0].shape == x.shape:
            return states
        start = self._shaped(self.back, x) if self.meaning.reset == "hard" else x.new_zeros(())
        return (start.expand_as(x),)

    def _shaped(self, value: Tensor, x: Tensor) -> Tensor:
        return per_channel(value.to(x.dtype), x.dim())

    def _fire(self, h: Tensor, theta: Tensor) -> Tensor:
        smooth: Tensor = self.surrogate_function(h - theta)
        return smooth - smooth.detach() + (h > theta if self.meaning.strict else h >= theta).to(h.dtype)

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step, states in and out."""
        x, v = inputs[0], states[0]
        theta, keep, back = (self._shaped(value, x) for value in (self.threshold, self.keep, self.back))
        if self.meaning.reset == "soft" and self.meaning.late:
            h = keep * v + x - self._fire(v, theta) * theta
            return (self._fire(h, theta),), (h,)
        h = (keep * (v - back) + back if self.meaning.reset == "hard" else keep * v) + x
        spikes = self._fire(h, theta)
        return (spikes,), (h - theta * spikes if self.meaning.reset == "soft" else h + spikes * (back - h),)
