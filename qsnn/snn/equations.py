"""What a neuron may do besides the soft-reset IF: other resets, leak, signed spikes, a membrane of few bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import surrogate as surrogates
from torch import Tensor

from qsnn.options import Steps, check_options, seen

RESETS = ("soft", "hard", "decay")
STATE_BITS = ("int8", "int16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    r"""How the membrane potential moves. The default is the IF neuron of :class:`qsnn.IFNode`.

    One step, from potential v and current x, with :math:`d = e^{-1/\tau}` (1 without leak):

    .. math::
        h = Q(d\,v + x), \quad s = [h \ge \theta], \quad
        v \leftarrow \begin{cases}
            Q(h - \theta s) & \text{soft} \\
            h\,(1 - s) & \text{hard} \\
            Q(h\,(1 - s\,(1 - e^{-1/\tau_r}))) & \text{decay}
        \end{cases}

    Q rounds to what ``state_bits`` can hold, and saturates there: int8 and int16 hold multiples of
    :math:`u = \theta\,2^{2-b}` from :math:`-2^{b-1}u = -2\theta` to :math:`(2^{b-1} - 1)\,u`; fp16 holds v/θ in
    IEEE half. Signed: :math:`s = 1` where :math:`h \ge \theta`, :math:`s = -1` where :math:`h < 0` and the spikes so
    far add up to more than 0, so that a spike that came too early is taken back.

    Source:
        Rueckauer et al. 2017 (soft against hard reset); Gerstner & Kistler, "Spiking Neuron Models", 2002 (leak);
        You et al., "SpikeZIP-TF", ICML 2024 (ST-BIF: signed spikes).
    """

    reset: str = "soft"
    """"soft" (θ is subtracted), "hard" (back to 0), "decay" (falls towards rest, 0)."""
    reset_tau: Steps = 1.0
    """τ_r of reset "decay" [steps]."""
    tau: Steps | None = None
    """Time constant τ of the leak [steps]; None: no leak."""
    signed: bool = False
    """Spikes of -1 take back spikes of 1 that came too early."""
    state_bits: str | None = None
    """What holds the potential: "int8", "int16", "fp16"; None: the float of the current."""

    def __post_init__(self) -> None:
        """Refuse what has no equation.

        Raises:
            ValueError: which option, and what it may be.
        """
        check_options(self)
        if self.reset not in RESETS:
            raise ValueError(f"reset must be one of {', '.join(RESETS)}, got {self.reset!r}")
        if self.state_bits is not None and self.state_bits not in STATE_BITS:
            raise ValueError(f"state_bits must be one of {', '.join(STATE_BITS)} or None, got {self.state_bits!r}")
        if self.signed and self.reset != "soft":
            raise ValueError(f"signed spikes need the soft reset, got reset={self.reset!r}")

    @property
    def plain(self) -> bool:
        """Whether this is the soft-reset IF neuron, which alone fires deferred."""
        return self.by_sums and not self.signed

    @property
    def by_sums(self) -> bool:
        """Whether spikes follow from the sum of the current and the spikes before alone; these have an integer form."""
        return self.tau is None and self.fused

    @property
    def fused(self) -> bool:
        """Whether a step of training is one function: of the soft reset, also with leak or signed spikes."""
        return self.reset == "soft" and self.state_bits is None


class _Fire(torch.autograd.Function):
    """[h >= θ]; in the place of its derivative a box of area 1 and width θ around θ (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(h, threshold)
        return (h >= threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        h, threshold = ctx.saved_tensors
        direct = grad * ((h - threshold).abs() < 0.5 * threshold) / threshold
        return direct, (-direct).sum_to_size(threshold.shape) if ctx.needs_input_grad[1] else None


def firing_function(surrogate: str) -> Callable[[Tensor, Tensor], Tensor]:
    r"""Return :math:`s = [h \ge \theta]` with a derivative in the place of its own.

    "box": :math:`\partial s/\partial h = [\,|h - \theta| < \theta/2\,]/\theta`; else a surrogate of SpikingJelly by its
    name, of :math:`h/\theta - 1`.

    Shape:
        The function takes h (*) and θ that broadcasts against it, and gives spikes (*).

    Raises:
        ValueError: SpikingJelly has no surrogate of this name.
    """
    surrogate = surrogate if isinstance(surrogate, str) else seen(surrogate)
    if surrogate in ("box", "rate"):  # where there is no rate to go through, in other dynamics, the box
        return _Fire.apply
    found = getattr(surrogates, surrogate, None)
    if not isinstance(found, type) or not issubclass(found, surrogates.SurrogateFunctionBase):
        raise ValueError(
            f"expected surrogate 'box', 'rate' or a class of spikingjelly.activation_based.surrogate such as 'ATan' or "
            f"'Sigmoid', got {seen(surrogate)}"
        )
    smooth = found()
    return lambda h, threshold: smooth(h / threshold - 1.0)


def simulate(
    x: Tensor,
    threshold: Tensor,
    v: Tensor,
    dynamics: Dynamics,
    tau: Tensor | None = None,
    fire: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Run the equation of ``dynamics`` over time.

    Args:
        x: current of each step.
        threshold: θ, broadcast against x[0].
        v: potential before the first step.
        dynamics: the equation.
        tau: takes the place of ``dynamics.tau`` [steps]; broadcast against x[0].
        fire: see :func:`firing_function`; default "box".
    Shape:
        x: (T, *); v: (*); returned: spikes (T, *), the last potential (*), and how often ``state_bits`` overflowed.
    """
    fire = fire or _Fire.apply
    if tau is None and dynamics.tau is not None:
        tau = x.new_tensor(dynamics.tau, dtype=torch.float64)
    keep = None if tau is None else kept(tau, x.dtype)
    fall = 1.0 - math.exp(-1.0 / dynamics.reset_tau)
    overflows, spikes = 0, []
    fired = torch.zeros_like(v)
    for current in x:
        h, lost = _stored(v + current if keep is None else v * keep + current, threshold, dynamics.state_bits)
        s = fire(h, threshold)
        if dynamics.signed:
            s = s - _taken_back(h, threshold, fire) * (fired > 0)
            fired = fired + s.detach()
        if dynamics.reset == "soft":
            v = h - threshold * s
        else:
            v = h * (1 - s) if dynamics.reset == "hard" else h * (1 - fall * s)
        v, more = _stored(v, threshold, dynamics.state_bits)
        overflows += lost + more
        spikes.append(s)
    return torch.stack(spikes), v, overflows


def _taken_back(h: Tensor, threshold: Tensor, fire: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[h < 0], with the derivative that ``fire`` has at θ moved to 0."""
    below = (h < 0).to(h.dtype)
    if not h.requires_grad:
        return below
    smooth = fire(h + threshold, threshold)
    return below - (smooth - smooth.detach())


def kept(tau: Tensor, dtype: torch.dtype) -> Tensor:
    r"""What the leak leaves of a potential in one step, :math:`d = e^{-1/\tau}`; τ in steps, () or (C, 1, ...)."""
    return torch.exp(-1.0 / tau).to(dtype)


def per_channel(x: Tensor, dims: int) -> Tensor:
    """One value a channel, (C,), shaped to multiply a tensor (B, C, *) of ``dims`` dimensions; a scalar as it is."""
    return x.view(-1, *[1] * (dims - 2)) if x.dim() else x


def offset_at(initial: Tensor, step: int) -> Tensor:
    """What has been put into a potential up to a step [θ]: v₀ before the first one, and more before later ones.

    Shape:
        initial: (), (C,), or (S, C), a row for each of the first S steps; returned: () or (C,).
    """
    return initial[:step].sum(0) if initial.dim() == 2 else initial


def later(initial: Tensor, theta: Tensor, dims: int) -> Tensor | None:
    """What is added to a potential before steps 2 to S, in units of θ; None where nothing is.

    Shape:
        initial: (), (C,), or (S, C); returned: (S - 1, C, 1, ...), to meet a step of ``dims`` dimensions.
    """
    if initial.dim() < 2 or len(initial) < 2:
        return None
    return torch.stack([per_channel(row.to(theta.dtype), dims) * theta for row in initial[1:]])


def pushed(x: Tensor, pushes: Tensor | None) -> Tensor:
    """Currents with what the potential gets before step 2, 3, ...

    Shape:
        x and returned: (T, B, *); pushes: (S - 1, C, 1, ...), or None where there are none.
    """
    steps = 0 if pushes is None else min(len(pushes), len(x) - 1)
    if not steps or pushes is None:
        return x
    return torch.stack([each + pushes[t - 1] if 0 < t <= steps else each for t, each in enumerate(x)])


def integrated(x: Tensor, threshold: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """T steps of the soft-reset IF neuron where nothing is kept for a backward: spikes and the last potential.

    Shape:
        x and spikes: (T, *); threshold and v: broadcast against x[0].
    """
    spikes, v = empty_steps(x), v.to(x.dtype) + torch.zeros_like(x[0])
    for current, fired in zip(x, spikes, strict=True):
        torch.ge(v.add_(current), threshold, out=fired)
        subtract_(v, fired, threshold if threshold.dim() else float(threshold))
    return spikes, v


def subtract_(v: Tensor, spikes: Tensor, theta: Any) -> Tensor:
    """v - θ·spikes in place, in one pass; v and spikes (B, *), θ a number, or shaped to multiply v."""
    return v.addcmul_(spikes, theta, value=-1) if torch.is_tensor(theta) else v.sub_(spikes, alpha=theta)


def deferred(x: Tensor, threshold: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As many spikes as all T currents together are worth, in the first steps; and what is left of the potential.

    Shape:
        x and spikes: (T, *); threshold and v: broadcast against x[0].
    """
    total = x.sum(0) + v
    count = (total / threshold).floor().clamp_(0, x.shape[0])
    order = torch.arange(x.shape[0], device=x.device, dtype=x.dtype).view(-1, *[1] * count.dim())
    return (order < count).to(x.dtype), total - count * threshold


def empty_steps(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty (T, B, *) in which each step has the layout of x[0], also where x repeats one step."""
    step, dtype = x[0], dtype or x.dtype
    if step.is_contiguous() or (step.dim() == 4 and step.is_contiguous(memory_format=torch.channels_last)):
        strides = (step.numel(), *step.stride())
        return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _stored(v: Tensor, threshold: Tensor, state: str | None) -> tuple[Tensor, int]:
    """The potential as its storage holds it, and how many values did not fit; the gradient passes straight through."""
    if state is None:
        return v, 0
    with torch.no_grad():
        if state == "fp16":
            q = v / threshold
            held = q.half()
            overflows = int(held.isinf().sum())
            held = held.to(v.dtype).clamp(-65504.0, 65504.0) * threshold
        else:
            bits = 8 if state == "int8" else 16
            unit = threshold * 2.0 ** (2 - bits)
            n = torch.round(v / unit)
            low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
            overflows = int(((n < low) | (n > high)).sum())
            held = n.clamp(low, high) * unit
    return v + (held - v).detach() if v.requires_grad else held, overflows
