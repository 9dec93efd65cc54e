"""What benchmark() measured of one model, as numbers for a table and a record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qsnn.measure.accuracy import interval
from qsnn.measure.energy import Estimate, LayerCost
from qsnn.measure.tally import Exit
from qsnn.snn.counts import ON_COUNTS


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What :func:`benchmark` measured of one model."""

    name: str
    n: int
    """Images."""
    timesteps: tuple[int, ...]
    """The T's measured; () for an ANN."""
    accuracy: tuple[float, ...]
    """Right answers [%], one number for each T; one for an ANN. Of another task what ``metric`` says, of several heads
    that of the first."""
    firing: str | None
    """"online" or "deferred"; None for an ANN."""
    made_for: int
    """The T at which all that follows was measured, unless it is given for each T; 0 for an ANN."""
    spike_rates: dict[str, float]
    """Spikes per neuron and step [1] by layer."""
    spike_rate: float | None
    """The same over all neurons."""
    spike_rate_by_t: tuple[float, ...]
    """The same for each T."""
    synops: float | None
    """Spike-driven accumulates per image."""
    synops_by_t: tuple[float, ...]
    """The same for each T."""
    layers: tuple[LayerCost, ...]
    """What each layer with weights does for one image."""
    macs: float
    """Multiply-accumulates per image; of a spiking network those of layers that do not see spikes: before its first
    neuron, and at every step behind a linear bottleneck."""
    weight_bytes: int
    """Weights at their precision, all else at 32 bit [byte]."""
    weight_bytes_by_bits: dict[str, int]
    """The same, by the bits of the weights; biases, batch norm and thresholds as "other"."""
    state_bytes: int
    """Membranes of one image [byte]."""
    peak_bytes: int
    """The most that tensors take at one time while one image is answered, without the parameters [byte]."""
    latency_ms: float
    """Median time to answer one image, another image each time [ms]."""
    throughput: float
    """Images a second, in batches."""
    energy: tuple[Estimate, ...]
    """Three estimates, which are only to be shown together."""
    exits: tuple[Exit, ...]
    """Early exit at several margins, the asked one first; () where it was not asked for."""
    confusion: list[list[int]] | None
    """Rows: label; columns: answer; at the T the model is made for."""
    agreement: tuple[float, ...] | None
    """Answers equal to the reference's [%], one number for each T."""
    overflows: int | None
    """Potentials that did not fit into the bits of a membrane, counted over every step that was run; None for float."""
    seconds: float
    """Time of the whole measurement [s]."""
    metric: str = "accuracy"
    """"accuracy" [%], "mean IoU" [%] or "mean squared error"."""
    on_counts: tuple[str, ...] = ()
    """Layers of a spiking network that are computed on counts, not on spikes; their MACs are among ``macs``."""
    heads: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Of several heads the score of each for each T, by name and metric ("1, mean squared error"); else empty."""

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """Both ends of the 95 % interval of each accuracy [%] (Wilson); () where the score is no share of images."""
        if self.metric != "accuracy":
            return ()
        return tuple((100 * low, 100 * high) for low, high in (interval(a / 100, self.n) for a in self.accuracy))

    @property
    def counts_said(self) -> str:
        """Which layers are computed on counts, for a report; empty where none is."""
        if not self.on_counts:
            return ""
        macs = sum(layer.macs for layer in self.layers if layer.name in self.on_counts)
        return f"{self.name}: {ON_COUNTS}: {', '.join(self.on_counts)} ({macs:,.0f} MACs an image)"

    def metrics(self) -> dict[str, Any]:
        """Return the numbers as plain types, for a record; the score stands under the name of its metric."""
        found = {key: value for key, value in asdict(self).items() if key not in ("name", "n", "metric", "heads")}
        score = {self.metric.replace(" ", "_"): found.pop("accuracy")}
        heads = {"heads": self.heads} if self.heads else {}
        return {**score, **found, "intervals": self.intervals, **heads}
