"""What certify() found: layer by layer, and in one verdict."""

from __future__ import annotations

from dataclasses import dataclass

from qsnn.snn.counts import ON_COUNTS


@dataclass
class LayerCheck:
    """One layer's comparison: elements seen, how many were equal, the largest difference of integers, ties met."""

    name: str
    elements: int = 0
    equal: int = 0
    largest: int = 0
    ties: int = 0
    rounding: int = 0
    """Differences of 1 where the reference lies within its own rounding of a tie. The reference goes on with what the
    spiking network decided there, so that what comes behind is compared for its own sake."""
    float32: int = 0
    """Integers that the quantized network gives otherwise when it runs in float32, as it usually does."""
    first: tuple[int, ...] | None = None
    """(image, index...) of the first difference."""


@dataclass(frozen=True)
class Certificate:
    """What :func:`certify` found. ``str()`` is a table and one verdict."""

    layers: tuple[LayerCheck, ...]
    images: int
    timesteps: int
    firing: str
    logits_sha256: str
    same_answers: int
    """Answers (the largest logit; of one logit its sign) that are the same in both networks."""
    answers: int
    """All answers: one an image and head, or one a pixel of a map."""
    same_logits: int
    """Logits that are equal but for rounding; NaN and infinity never are."""
    logits: int
    """All logits."""
    largest_logit_difference: float
    """Largest difference of two logits [units of the logits]."""
    float32_answers: int
    """Answers that the quantized network gives otherwise in float32."""
    on_counts: tuple[str, ...] = ()
    """Layers that the spiking network computes on counts, not on spikes."""

    @property
    def exact(self) -> bool:
        """True when every integer of every layer, every logit and every answer is equal."""
        return self.within_rounding and not self._rounding

    @property
    def within_rounding(self) -> bool:
        """True when nothing differs but integers at a tie, where the reference's float64 can't tell which is right."""
        layers = all(layer.equal + layer.rounding == layer.elements for layer in self.layers)
        return layers and self.same_answers == self.answers and self.same_logits == self.logits > 0

    @property
    def _rounding(self) -> int:
        return sum(layer.rounding for layer in self.layers)

    @property
    def verdict(self) -> str:
        """``EXACT``, or that all is equal within rounding of the reference, or how many differ and where the first
        one is."""
        if self.exact:
            return "EXACT"
        if self.within_rounding:
            return (
                f"equal within rounding of the reference: {self._rounding} integers lie at a tie, where float64 cannot "
                f"tell which is right; everything else is equal"
            )
        total = sum(layer.elements for layer in self.layers)
        wrong = total - self._rounding - sum(layer.equal for layer in self.layers)
        for layer in self.layers:
            if layer.first is not None:
                image, *index = layer.first
                return f"{wrong} of {total} differ (first: layer {layer.name}, image {image}, index {tuple(index)})"
        if self.same_answers < self.answers:
            return f"{self.answers - self.same_answers} of {self.answers} answers differ"
        return (
            f"{self.logits - self.same_logits} of {self.logits} logits differ, by up to "
            f"{self.largest_logit_difference:.3g}; every integer before them is equal, so look at the readout"
        )

    def __str__(self) -> str:
        width = max(5, *(len(layer.name) for layer in self.layers))
        lines = [
            f"{self.firing} firing, T = {self.timesteps}, {self.images} images",
            f"{'layer':<{width}}  {'elements':>12}  {'equal':>12}  {'largest diff':>12}  {'ties':>8}",
        ]
        lines += [
            f"{layer.name:<{width}}  {layer.elements:>12,}  {layer.equal:>12,}  {layer.largest:>12}  {layer.ties:>8,}"
            for layer in self.layers
        ]
        if self.on_counts:
            lines.append(f"{ON_COUNTS}: {', '.join(self.on_counts)}")
        elements = sum(layer.elements for layer in self.layers)
        moved = sum(layer.float32 for layer in self.layers)
        lines += [
            f"answers equal: {self.same_answers} of {self.answers}",
            f"logits equal: {self.same_logits} of {self.logits} (at most {self.largest_logit_difference:.2g} apart)",
            f"logits SHA-256: {self.logits_sha256}",
            f"compared with the quantized network in float64, its scales read once; as it runs in float32 it gives "
            f"{self.float32_answers} answers and {100 * moved / max(1, elements):.2g} % of the integers otherwise",
            self.verdict,
        ]
        return "\n".join(lines)
