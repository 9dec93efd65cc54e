"""certify(): proof, layer by layer, that a spiking network computes what the quantized network computes."""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qsnn.data.images import batches
from qsnn.data.memory import keep_freed_memory
from qsnn.folded.fold import fold
from qsnn.graph.hooks import kept_modes, recorded, watching
from qsnn.graph.kinds import does
from qsnn.graph.trace import device_of, takes_frames
from qsnn.options import expect
from qsnn.quant.activations import is_sign, level_quant
from qsnn.quant.weights import integer_weights
from qsnn.snn.counts import ON_COUNTS, counted_layers
from qsnn.snn.network import SNN

TIE = 1e-9
"""Nearer to a half integer than this, the reference's own rounding in float64 decides [steps]; nearer to a gate's level
likewise [largest input of the gate]."""
ROUNDING = 1e-9
"""Logits that differ by less are equal but for the order of the reference's additions in float64 [largest logit]."""


@dataclass
class LayerCheck:
    """One layer's comparison: elements seen, how many were equal, the largest difference of integers, ties met."""

    name: str
    elements: int = 0
    equal: int = 0
    largest: int = 0
    ties: int = 0
    rounding: int = 0
    """Differences of 1 where the reference lies within its own rounding of a tie; they count as equal."""
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
        layers = all(layer.equal == layer.elements for layer in self.layers)
        return layers and self.same_answers == self.answers and self.same_logits == self.logits > 0

    @property
    def verdict(self) -> str:
        """``EXACT``, or how many differ and where the first one is."""
        if self.exact:
            near = sum(layer.rounding for layer in self.layers)
            return "EXACT" if not near else f"EXACT within rounding of the reference ({near} integers at a tie)"
        total = sum(layer.elements for layer in self.layers)
        wrong = total - sum(layer.equal for layer in self.layers)
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


@torch.no_grad()
def certify(
    snn: SNN,
    qann: nn.Module,
    loader: Any,
    *,
    timesteps: int | None = None,
    firing: str = "deferred",
    images: int | None = None,
    batch_size: int = 250,
) -> Certificate:
    """Compare every layer's spike counts with the quantized network's integers, and all logits, image by image.

    The reference is the QANN: Brevitas' own modules with hooks, in float64, with the integer weights and scales read
    once in the dtype it runs in. It never reads the thresholds of the spiking network, which runs in its integer form
    (folded here if it is not). Of a gate the last decision is compared. Labels are not used.

    Args:
        snn: from :func:`qsnn.convert` or :func:`qsnn.fold`.
        qann: the quantized network it was made from.
        loader: a Dataset or an iterable of (images, labels); of frames in time both see the sum.
        timesteps: T; default L, where deferred firing is the quantizer.
        firing: "deferred", or "online" (equal only at L = T = 1).
        images: at most so many images.
        batch_size: images a call.
    Raises:
        TypeError: ``snn`` is not an SNN.
        ValueError: ``qann`` has no quantized activations, the two have different layers, or there is no image.

    >>> import qsnn
    >>> data = qsnn.load_data("digits")
    >>> qann = qsnn.quantize(qsnn.create_model("study", data), data)
    >>> qsnn.certify(qsnn.convert(qann), qann, data.test, images=20).verdict
    'EXACT'
    """
    if not isinstance(snn, SNN):
        raise TypeError(f"expected certify(snn, qann, loader) with an SNN first, got {type(snn).__name__}")
    expect("certify(snn, qann, data.test)", "qann", qann, nn.Module)
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        raise ValueError(f"expected images >= 1, or None for all, got {images!r}: of nothing nothing can be certified")
    folded = snn if snn.folded else fold(snn)
    reference = _Reference(qann)
    counts = {name: folded.network.get_submodule(folded.probes.get(name, name)) for name, _ in folded.neurons()}
    if not reference.levels:
        raise ValueError("the second argument holds no quantized activation; call certify(snn, qann, loader)")
    if set(counts) != set(reference.levels):
        odd = sorted(set(counts) ^ set(reference.levels))
        raise ValueError(f"the two networks do not have the same spiking layers; only one of them has {odd}")
    if timesteps is None:
        timesteps = max(reference.levels.values())
    found = _Comparison({name: LayerCheck(name) for name in reference.levels})
    keep_freed_memory()
    for batch, _ in batches(loader, batch_size, device=device_of(folded)):
        batch = batch.mean(1) if takes_frames(qann, batch) else batch
        if images is not None:
            batch = batch[: images - found.seen]
            if not len(batch):
                break
        with recorded(counts) as spikes:
            answers = folded(batch, timesteps=timesteps, firing=firing)
        logits, integers, near, usual = reference(batch)
        for name, check in found.checks.items():
            stepped = spikes[name].unflatten(0, (timesteps, -1))
            count = stepped[-1] if name in reference.gates else stepped.sum(0)
            # what the quantizer would say after T steps: n of L levels, T spikes of full rate
            wanted = integers[name].clamp(max=timesteps)
            check.ties += reference.ties[name]
            check.float32 += int((usual[name] != integers[name]).sum())
            _compare(check, count, wanted, near[name], found.seen)
        found.add([answer[-1] for answer in tree_leaves(answers)], logits, reference.usual_logits, len(batch))
    if not found.seen:
        raise ValueError("expected at least one image, got none: of nothing nothing can be certified")
    return Certificate(
        tuple(found.checks.values()), found.seen, timesteps, firing, found.digest(), found.same_answers, found.answers,
        found.same_logits, found.logits, found.largest, found.float32_answers, tuple(counted_layers(folded.network)),
    )  # fmt: skip


class _Comparison:
    """What is added up over the batches."""

    def __init__(self, checks: dict[str, LayerCheck]) -> None:
        self.checks = checks
        self.seen = self.answers = self.same_answers = self.logits = self.same_logits = self.float32_answers = 0
        self.largest = 0.0
        self._digests: list[Any] = []

    def add(self, found: list[Tensor], wanted: list[Tensor], usual: list[Tensor], count: int) -> None:
        """Compare the heads of one batch; ``usual``: what the quantized network says in float32."""
        self._digests = self._digests or [hashlib.sha256() for _ in found]
        for digest, logits, reference, float32 in zip(self._digests, found, wanted, usual, strict=True):
            logits = logits.double()
            digest.update(logits.cpu().contiguous().numpy().tobytes())
            difference = (logits - reference).abs()
            limit = ROUNDING * float(reference.abs().max().clamp(min=1e-30))
            self.same_logits += int((difference <= limit).sum())  # never where one is NaN, or both are infinite
            self.logits += logits.numel()
            self.largest = max(self.largest, float(difference.nan_to_num(nan=math.inf).max()))
            same = decided(logits) == decided(reference)
            self.same_answers += int(same.sum())
            self.answers += same.numel()
            self.float32_answers += int((decided(float32) != decided(reference)).sum())
        self.seen += count

    def digest(self) -> str:
        """Of all logits in float64, image by image; of several heads that of their digests."""
        if len(self._digests) == 1:
            return str(self._digests[0].hexdigest())
        return hashlib.sha256("".join(d.hexdigest() for d in self._digests).encode()).hexdigest()


def decided(logits: Tensor) -> Tensor:
    """The answer: the class of the largest logit along dimension 1; of one logit whether it is above 0."""
    return logits.argmax(1) if logits.dim() > 1 and logits.shape[1] > 1 else logits > 0


def _compare(check: LayerCheck, count: Tensor, integers: Tensor, near: Tensor, offset: int) -> None:
    difference = (count.double() - integers).abs()
    rounding = near & (difference == 1)
    wrong = (difference > 0) & ~rounding
    check.elements += wrong.numel()
    check.equal += int((~wrong).sum())
    check.rounding += int(rounding.sum())
    check.largest = max(check.largest, int(difference.max()))
    if check.first is None and bool(wrong.any()):
        image, *index = (int(i) for i in wrong.nonzero()[0])
        check.first = (offset + image, *index)


class _Constant(nn.Module):
    """Stands in for a quantizer's scale: the number that was read once."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *_: Any) -> Tensor:
        return self.value


class _Reference:
    """The QANN in float64: weights are W·s as read, activations go through Brevitas' own integer quantizer.

    Beside it runs the QANN as it is.
    """

    def __init__(self, qann: nn.Module) -> None:
        self.usual = qann
        model = copy.deepcopy(qann).eval()
        layers = dict(model.named_modules())
        read = {name: integer_weights(m) for name, m in layers.items() if hasattr(m, "weight_quant")}
        quants = {name: quant for name, m in layers.items() if (quant := level_quant(m)) is not None}
        steps = {name: quant.step.double() for name, quant in quants.items()}
        self.model = model.double()
        self.gates: dict[str, Any] = {name: m for name, m in layers.items() if does(m) == "decides"}
        self.levels = {name: 1 for name, m in layers.items() if is_sign(m)} | dict.fromkeys(self.gates, 1)
        self.steps: dict[str, Tensor] = {}
        self.ties: dict[str, int] = {}
        self.usual_logits: list[Tensor] = []
        self._weights: dict[str, nn.Module] = {}
        self._values: dict[str, Tensor] = {}
        for name, (integers, scale) in read.items():
            layer: Any = self.model.get_submodule(name)
            if layer.weight_quant.is_quant_enabled:
                self._weights[name] = layer.weight_quant
                self._values[name] = integers.double() * scale.double()
        for name, step in steps.items():
            quant = level_quant(self.model.get_submodule(name))
            assert quant is not None
            quant.fix_step_(_Constant(step))
            if not quant.signed:
                self.levels[name], self.steps[name] = quant.levels, step

    def __call__(
        self, images: Tensor
    ) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Logits of every head, integers of every layer, where these lie at a tie, and the integers in float32."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[name], outputs[name] = args[0], output

        activations = {name: self.model.get_submodule(name) for name in self.levels}
        weights = watching(self._weights, lambda name, module, args, output: self._values[name])
        with watching(activations, keep), weights:
            logits = tree_leaves(self.model(images.double()))
        watched = {name: self.usual.get_submodule(name) for name in self.levels}
        with kept_modes(self.usual), recorded(watched) as usual:
            self.usual.eval()
            self.usual_logits = [leaf.double() for leaf in tree_leaves(self.usual(images))]
        integers, near, moved = {}, {}, {}
        for name, gate in self.gates.items():
            integers[name], moved[name] = outputs[name], usual[name].double()
            distance = (inputs[name] - gate.level).abs()
            near[name] = distance < TIE * max(float(inputs[name].abs().max()), float(gate.level.abs()))
            self.ties[name] = int((distance == 0).sum())
        for name in self.levels.keys() - self.steps.keys() - self.gates.keys():
            integers[name] = (outputs[name] > 0).double()
            near[name] = torch.zeros_like(outputs[name], dtype=torch.bool)
            moved[name] = (usual[name] > 0).double()
            self.ties[name] = int((inputs[name] == 0).sum())
        for name, step in self.steps.items():
            integers[name] = torch.round(outputs[name] / step)
            moved[name] = torch.round(usual[name].double() / step)
            q = inputs[name] / step
            inside = (q > 0) & (q < self.levels[name])
            near[name] = ((q - q.floor() - 0.5).abs() < TIE) & inside
            self.ties[name] = int(((q - q.floor() == 0.5) & inside).sum())
        return logits, integers, near, moved
