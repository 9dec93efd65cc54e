"""ConvertConfig: how a spiking network is made and runs."""

from __future__ import annotations

from dataclasses import dataclass

from qsnn.options import Factor, Images, Percent, Slope, Steps, Timesteps, check_options
from qsnn.snn.calibrate import CORRECTIONS, INITIALS, TARGETS, THRESHOLDS
from qsnn.snn.equations import Dynamics
from qsnn.snn.network import FIRINGS


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How the spiking network runs where a call does not say otherwise, and what its neurons are."""

    timesteps: Timesteps = 2
    """Simulation steps T; also what a calibration is made for."""
    firing: str = "online"
    """"online": a neuron fires while its input arrives; "deferred": it integrates all T inputs, then fires."""
    threshold: str = "mse"
    """Thresholds of plain ReLUs: "mse" (least error after T steps), "max" or "percentile" of each channel."""
    percentile: Percent = 99.9
    """Of "percentile" [%]."""
    initial: str = "mse"
    """Of threshold "mse": "mse" (v₀ and a change of the bias in front are chosen with θ) or "half" (v₀ = θ/2)."""
    correction: str = "weights"
    """With data, on the spikes that arrive: "weights" (least squares; only float ones), "bias", "none"."""
    targets: str = "sums"
    """A layer in front of an addition is corrected to what the sum should be ("sums"), or for itself ("layers")."""
    calibration_images: Images = 256
    """Training images of a calibration; 1,024 answer better where steps are few, and take four times as long."""
    reset: str = "soft"
    """After a spike: "soft" (θ is subtracted), "hard" (back to 0), "decay" (falls towards 0)."""
    reset_tau: Steps = 1.0
    """Time constant of reset "decay" [steps]."""
    tau: tuple[Steps, ...] = ()
    """Time constant of the leak [steps]: none, one for all neurons, or one for each spiking layer in order."""
    tau_growth: Factor = 1.0
    """Factor on the time constant from each spiking layer to the next [1]."""
    tau_slope: Slope = 0.0
    """Added to the time constant from each spiking layer to the next [steps]; before the factor."""
    signed: bool = False
    """Spikes of -1 take back spikes that came too early (ST-BIF): better in few online steps, exact in integers too."""
    state_bits: str | None = None
    """What holds the membrane: "int8", "int16", "fp16"; None: float."""
    strict: bool = False
    """Refuse max pools of online spikes, whose error does not vanish with T."""

    def __post_init__(self) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: which option, and what it may be.
        """
        check_options(self)
        if self.firing not in FIRINGS:
            raise ValueError(f"firing must be 'online' or 'deferred', got {self.firing!r}")
        if self.threshold not in THRESHOLDS:
            raise ValueError(f"threshold must be one of {', '.join(THRESHOLDS)}, got {self.threshold!r}")
        for name, known in (("correction", CORRECTIONS), ("initial", INITIALS), ("targets", TARGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.tau and (self.tau_growth != 1.0 or self.tau_slope != 0.0):
            raise ValueError(
                f"tau_growth={self.tau_growth} and tau_slope={self.tau_slope} change a time constant, got tau=(); "
                f"give tau too, or leave both away"
            )
        if self.firing == "deferred" and not self.dynamics(0).plain:
            raise ValueError(
                "deferred firing is defined for the soft reset without leak, signed spikes or a membrane of few bits; "
                "use firing='online'"
            )

    def dynamics(self, place: int) -> Dynamics:
        """The equation of the spiking layer that stands ``place`` layers behind the first."""
        tau = None
        if self.tau:
            tau = (self.tau[min(place, len(self.tau) - 1)] + place * self.tau_slope) * self.tau_growth**place
        return Dynamics(
            reset=self.reset, reset_tau=self.reset_tau, tau=tau, signed=self.signed, state_bits=self.state_bits
        )
