"""The IF neuron, its two ways of firing, and the time loop of a spiking network. The equations live here."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from qsnn.graph.call import SHORT, Call, current, this_call
from qsnn.graph.modules import Gate, step_at
from qsnn.options import expect, seen
from qsnn.snn.backward import IFFunction, RateFunction
from qsnn.snn.equations import (
    Dynamics,
    deferred,
    firing_function,
    integrated,
    kept,
    later,
    offset_at,
    per_channel,
    pushed,
    simulate,
)
from qsnn.snn.kept import known_spikes


def numbers(name: str, value: Any) -> Tensor:
    """A number, or several, as a tensor of its own in float64.

    Shape:
        that of ``value``.
    Raises:
        TypeError: it is none.
    """
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"expected {name} as a number, or one a channel, got {seen(value)}") from None


class IFNode(BaseNode):
    r"""Integrate-and-fire neuron with soft reset, a SpikingJelly node.

    Online: :math:`v \leftarrow v + x_t;\; s_t = [v \ge \theta];\; v \leftarrow v - \theta s_t`, from
    :math:`v_0 = \theta/2`, which centres the rounding error: on a constant current the spike count after L steps is
    :math:`\mathrm{clip}(\lfloor x/s + \tfrac12\rfloor, 0, L)`, s = θ/L.

    Deferred: :math:`n = \mathrm{clip}(\lfloor(\sum_t x_t + v_0)/\theta\rfloor, 0, T)`, spikes in the first n steps. No
    spike comes too early or too late, at the cost of T steps of latency a layer.

    Args:
        threshold: θ > 0 [units of the current], a scalar or one a channel, (C,); a parameter of the module that is not
            trained unless you set ``requires_grad`` (a batch norm before the neuron can do the same).
        initial: v₀ / θ [1], a scalar or one a channel; or (S, C), a row for each of the first S steps of a call: what
            is added to the potential before it, the first row v₀ itself.
        dynamics: another reset, leak, signed spikes or a membrane of few bits; by default none of them.
        surrogate: what stands for the derivative of a spike at potential h: "box",
            :math:`\partial s/\partial h = [\,|h - \theta| < \theta/2\,]/\theta`; "rate", the gradient of the
            clipped ReLU that the rate follows,
            :math:`\partial s_t/\partial x_u = [0 < \bar x < \theta]/(T\theta)` for all steps t and u; or one of
            SpikingJelly by name.
    Shape:
        step_mode "m": x and spikes (T, B, *); "s": (B, *). While an :class:`SNN` calls it: (T·B, *).
    Raises:
        ValueError: θ is not positive and finite, or no scalar and no vector; v₀ likewise; or an unknown surrogate.
        TypeError: no numbers, or ``dynamics`` is none.
    Source:
        Bu et al., "Optimal ANN-SNN Conversion ...", ICLR 2022 (v₀); Rueckauer et al. 2017 (soft reset); Yu et al.,
        "Advancing Training Efficiency of Deep SNNs through Rate-based Backpropagation", NeurIPS 2024 ("rate").
    """

    threshold: nn.Parameter
    initial: Tensor
    tau: Tensor | None
    """Time constant of the leak [steps], a scalar or one a channel; None: no leak."""

    def __init__(
        self,
        threshold: float | Tensor = 1.0,
        *,
        initial: float | Tensor = 0.5,
        dynamics: Dynamics | None = None,
        surrogate: str = "box",
        step_mode: str = "m",
    ) -> None:
        # float64: θ = s·L of a float32 step is exact in it, and fold reads θ as a rational number
        value, start = numbers("threshold", threshold), numbers("initial", initial)
        if start.dim() > 2 or not start.numel() or not bool(start.isfinite().all()):
            raise ValueError(
                f"expected one finite initial potential, one a channel, or a row a step, got {seen(initial)}"
            )
        expect("IFNode(threshold, dynamics=Dynamics())", "dynamics", dynamics, (Dynamics, type(None)))
        firing_function(surrogate)
        if value.dim() > 1 or not value.numel() or not bool((value.isfinite() & (value > 0)).all()):
            raise ValueError(f"expected one positive, finite threshold, or one a channel, got {seen(threshold)}")
        super().__init__(v_threshold=float(value.max()), v_reset=None, step_mode=step_mode)
        self.dynamics = dynamics or Dynamics()
        self.overflows = 0
        """How many potentials did not fit into ``dynamics.state_bits`` since the node was made."""
        self.threshold = nn.Parameter(value, requires_grad=False)
        self.register_buffer("initial", start)
        leak = self.dynamics.tau
        self.register_buffer("tau", None if leak is None else torch.tensor(leak, dtype=torch.float64))
        self.surrogate = surrogate
        self.firing = "online"
        """Of the node by itself; inside an SNN the call says how it fires."""
        self.constant_input = False
        """True: inside an SNN the input is one step, (B, *), that stands for all T; set where it is static."""

    def materialize_states(self, inputs: tuple[Any, ...], states: tuple[Any, ...], step_mode: str) -> tuple[Any, ...]:
        """Give a potential that has not started yet (SpikingJelly's placeholder 0.0) the value v₀."""
        (v,) = states
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        if not torch.is_tensor(v) or v.shape != x.shape:
            v = per_channel((offset_at(self.initial, 1) * self.threshold).to(x.dtype), x.dim()).expand_as(x)
        return (v,)

    def _theta(self, x: Tensor) -> Tensor:
        """θ in the dtype of x (B, C, *), shaped to multiply it."""
        return per_channel(self.threshold.to(x.dtype), x.dim())

    def _pushes(self, x: Tensor) -> Tensor | None:
        """What is added before steps 2 to S, (S - 1, C, 1, ...), in the dtype of x (B, C, *); None where nothing is."""
        pushes = later(self.initial, per_channel(self.threshold, x.dim()), x.dim())
        return None if pushes is None else pushes.to(x.dtype)

    @property
    def _fused(self) -> bool:
        """Whether a step of training takes the one function that has its own backward."""
        return self.dynamics.fused and self.surrogate in ("box", "rate")

    @torch.compiler.disable  # a function with its own backward: a compiler gains nothing, and warns
    def _trained(self, x: Tensor, v: Tensor, repeats: int, short: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The fused step: spikes, the last potential, and where it comes with them θ·spikes."""
        theta = self._theta(v) if self.threshold.dim() else self.threshold
        pushes = self._pushes(v)
        if self.surrogate == "rate" and self.dynamics.plain:
            if repeats and pushes is not None:
                x, repeats = x.expand(repeats, *x.shape), 0
            return RateFunction.apply(pushed(x, pushes), theta, v, repeats)  # type: ignore[no-any-return]
        keep = None if self.tau is None else kept(per_channel(self.tau, v.dim()), x.dtype)
        spikes, v, y, codes = IFFunction.apply(x, theta, v, repeats, keep, short, self.dynamics.signed, pushes)
        known_spikes(y, codes, theta.detach())
        return spikes, v, y

    def _run(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """T steps online, (T, B, *)."""
        if not (self._fused and torch.is_grad_enabled()):
            x = pushed(x, self._pushes(x[0]))
        if self.dynamics.plain and not torch.is_grad_enabled():
            return integrated(x, self._theta(x[0]), v)
        if self._fused and torch.is_grad_enabled():
            spikes, v, *_ = self._trained(x, v, 0)
            return spikes, v
        tau = None if self.tau is None else per_channel(self.tau, v.dim())
        fire = firing_function(self.surrogate)
        spikes, v, overflows = simulate(x, self._theta(x[0]), v, self.dynamics, tau, fire)
        self.overflows += overflows
        return spikes, v

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step of the online equation, states in and out."""
        if self.initial.dim() == 2:
            raise ValueError("a neuron whose potential is pushed in several steps counts them: use step_mode='m'")
        spikes, v = self._run(inputs[0].unsqueeze(0), states[0])
        return (spikes.squeeze(0),), (v,)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """T steps of the equation that ``firing`` names, states in and out."""
        spikes, v = (self._defer if self.firing == "deferred" else self._run)(inputs[0], states[0])
        return (spikes,), (v,)

    def _defer(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return deferred(pushed(x, self._pushes(x[0])), per_channel(self.threshold, v.dim()), v)

    def fired(self, x: Tensor, firing: str) -> Tensor:
        """Spikes of T steps from rest, without keeping a state: (T, B, *) -> (T, B, *)."""
        (v,) = self.materialize_states((x,), (0.0,), "m")
        return (self._defer if firing == "deferred" else self._run)(x, v)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Spikes {0, 1} of the shape of x."""
        call = current()
        short = x.dtype if x.dtype in SHORT else None
        if short is not None:  # under autocast: currents may be short, sums of them not
            x = x.float()
        spikes: Tensor
        if call is None:
            spikes = super().forward(x)
        elif call.firing == "online" and self._fused and torch.is_grad_enabled():
            return self._in_training(x, call, short)
        elif not self.constant_input or call.frames:
            spikes = self.fired(x.unflatten(0, (call.timesteps, -1)), call.firing).flatten(0, 1)
        else:
            spikes = self.fired(x.expand(call.timesteps, *x.shape), call.firing).flatten(0, 1)
        return spikes if short is None else spikes.to(short)

    def _in_training(self, x: Tensor, call: Call, short: torch.dtype | None) -> Tensor:
        """Spikes of the fused step, which carry θ·spikes with them for :func:`amplified`."""
        once = self.constant_input and not call.frames
        x = x if once else x.unflatten(0, (call.timesteps, -1))
        (v,) = self.materialize_states((x,), (0.0,), "s" if once else "m")
        made, _, *ready = self._trained(x, v, call.timesteps * once, short)
        spikes = made.flatten(0, 1)
        if ready:
            spikes.amplified = ready[0].flatten(0, 1), spikes._version  # type: ignore[attr-defined]
        return spikes

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        theta = self.threshold.detach()
        shown = f"{float(theta.min()):.4g}" + (f"..{float(theta.max()):.4g}" if theta.dim() else "")
        special = "" if self.dynamics.plain else f", {self.dynamics}"
        started = self.initial.detach().mean()
        return f"threshold={shown}, initial={float(started):.4g}, step_mode={self.step_mode}{special}"

    def train_(self, what: str, channels: int | None = None, steps: int = 1) -> None:
        """Put "threshold", "initial" or "tau" into training, in place; with ``channels`` one value for each.

        With ``steps`` > 1 "initial" has a row for each step, those behind the first 0 at first.

        Raises:
            ValueError: "tau" of a neuron without leak.
        """
        value: Tensor | None = getattr(self, what).detach() if getattr(self, what) is not None else None
        if value is None:
            raise ValueError("a time constant is trained where there is one: convert with ConvertConfig(tau=(4.0,))")
        if channels is not None and value.numel() == 1:
            value = value.reshape(-1).expand(channels)
        if what == "initial" and steps > 1:
            value = value if value.dim() == 2 else value.reshape(1, -1)
            value = torch.cat([value, value.new_zeros(max(0, steps - len(value)), value.shape[1])])
        delattr(self, what)
        setattr(self, what, nn.Parameter(value.clone()))


def amplified(spikes: Tensor, threshold: Tensor) -> Tensor:
    """θ·spikes (T·B, *), what the layers behind a neuron see; in the dtype of the spikes (mixed types are slow).

    In training the neuron has made it along with its spikes, and both have one backward.
    """
    ready, version = getattr(spikes, "amplified", (None, -1))
    if ready is not None and version == spikes._version:
        return ready  # type: ignore[no-any-return]
    return spikes * per_channel(threshold.to(spikes.dtype), spikes.dim())


class Repeat(nn.Module):
    """Hand a value that is the same at every step to each of T steps: (B, *) -> (T·B, *).

    Convert puts it where the static front of the network (the input and all before the first neuron, computed once)
    meets the part that runs in time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Repeat x T times along a new first dimension that is folded into the batch."""
        call = current()
        if call is None or call.timesteps == 1 or call.frames:
            return x
        if x.requires_grad:
            return x.expand(call.timesteps, *x.shape).flatten(0, 1)
        return torch.cat([x] * call.timesteps)  # in the layout of x, which a view of one image that repeats would hide


class PlusMinus(nn.Module):
    """±1 from spikes: 2·spike - 1. A network that holds one runs one step only, for ±1 has no silence."""

    def forward(self, spikes: Tensor) -> Tensor:
        """{0, 1} -> {-1, 1}, (T·B, *)."""
        return spikes * 2 - 1


class GateNode(Gate):
    r"""The neuron of a :class:`~qsnn.graph.modules.Gate`: it compares the mean of what arrived with its level λ.

    Online it decides at every step, on the mean so far; deferred once, on all T inputs, and holds for all T steps:

    .. math::
        a_t = \Big[\sum_{i\le t} x_i \ge t\,\lambda\Big], \qquad
        a = \Big[\sum_{i\le T} x_i \ge T\,\lambda\Big]

    Law: a gate that is the same at every step times spikes in the first n steps are spikes in the first n steps, or
    none. So deferred at T = L the product with a neuron's spikes is the quantized network's product, integer for
    integer. Its gradient is that of the gate on the mean :math:`\frac1t\sum_{i\le t}x_i`.

    Args:
        gate: whose level and width are copied.
    Shape:
        While an :class:`~qsnn.SNN` calls it: x and a (T·B, \*); else (B, \*), one step.
    """

    is_spiking = True

    def __init__(self, gate: Gate) -> None:
        super().__init__(float(gate.level.detach()), gate.width)
        self.level = nn.Parameter(gate.level.detach().clone(), requires_grad=gate.level.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """0 or 1 of the shape of x."""
        call = this_call()
        short = x.dtype in SHORT  # under autocast: sums of short currents are not exact
        stepped = (x.float() if short else x).unflatten(0, (call.timesteps, -1))
        time = torch.arange(1, call.timesteps + 1, device=x.device, dtype=stepped.dtype)
        time = time.view(-1, *[1] * (stepped.dim() - 1))
        total = stepped.cumsum(0)
        if call.firing == "deferred":
            total, time = total[-1:], time[-1:]
        gain = (stepped[:1, :1].numel() or 1) ** -0.5
        found = step_at(total, time * self.level.to(total.dtype), time * self.width, gain)
        return found.expand_as(stepped).flatten(0, 1).to(x.dtype)
