"""certify(): proof, layer by layer, that a spiking network computes what the quantized network computes."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsnn.data.images import batches, summed
from qsnn.folded.fold import fold
from qsnn.graph.hooks import recorded
from qsnn.graph.trace import device_of
from qsnn.options import expect
from qsnn.quant.activations import is_sign, level_quant
from qsnn.quant.weights import integer_weights
from qsnn.snn.network import SNN


@dataclass
class LayerCheck:
    """One layer's comparison: elements seen, how many were equal, the largest difference of integers, ties met."""

    name: str
    elements: int = 0
    equal: int = 0
    largest: int = 0
    ties: int = 0
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
    """Images with the same argmax in both networks."""

    @property
    def exact(self) -> bool:
        """True when every integer of every layer is equal and every answer is."""
        return all(layer.equal == layer.elements for layer in self.layers) and self.same_answers == self.images

    @property
    def verdict(self) -> str:
        """``EXACT``, or how many differ and where the first one is."""
        if self.exact:
            return "EXACT"
        total = sum(layer.elements for layer in self.layers)
        wrong = total - sum(layer.equal for layer in self.layers)
        for layer in self.layers:
            if layer.first is not None:
                image, *index = layer.first
                return f"{wrong} of {total} differ (first: layer {layer.name}, image {image}, index {tuple(index)})"
        return f"{self.images - self.same_answers} of {self.images} answers differ"

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
        lines += [
            f"answers equal: {self.same_answers} of {self.images}",
            f"logits SHA-256: {self.logits_sha256}",
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
    """Compare the spike counts of every layer with the quantized network's integer activations, image by image.

    The reference is the QANN: Brevitas' own modules with hooks, in float64, with the integer weights and scales read
    once in the dtype it runs in. It never reads the thresholds of the spiking network, which runs in its integer form
    (folded here if it is not). Labels are not used.

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
        ValueError: ``qann`` has no quantized activations, or the two have different layers.
    """
    if not isinstance(snn, SNN):
        raise TypeError(f"expected certify(snn, qann, loader) with an SNN first, got {type(snn).__name__}")
    expect("certify(snn, qann, data.test)", "qann", qann, nn.Module)
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
    checks = {name: LayerCheck(name) for name in reference.levels}
    digest = hashlib.sha256()
    seen = same = 0
    for batch, _ in batches(loader, batch_size, device=device_of(folded)):
        batch = summed(batch)
        if images is not None:
            batch = batch[: images - seen]
            if not len(batch):
                break
        with recorded(counts) as spikes:
            answers = folded(batch, timesteps=timesteps, firing=firing)[-1]
        logits, integers, ties = reference(batch)
        for name, check in checks.items():
            count = spikes[name].unflatten(0, (timesteps, -1)).sum(0)
            # what the quantizer would say after T steps: n of L levels, T spikes of full rate
            _compare(check, count, integers[name].clamp(max=timesteps), ties[name], seen)
        same += int((answers.argmax(1) == logits.argmax(1)).sum())
        digest.update(answers.double().cpu().contiguous().numpy().tobytes())
        seen += len(batch)
    return Certificate(tuple(checks.values()), seen, timesteps, firing, digest.hexdigest(), same)


def _compare(check: LayerCheck, count: Tensor, integers: Tensor, ties: int, offset: int) -> None:
    difference = (count.double() - integers).abs()
    wrong = difference > 0
    check.elements += wrong.numel()
    check.equal += int((~wrong).sum())
    check.ties += ties
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
    """The QANN in float64: weights are W·s as read, activations go through Brevitas' own integer quantizer."""

    def __init__(self, qann: nn.Module) -> None:
        model = copy.deepcopy(qann).eval()
        self.levels: dict[str, int] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.steps: dict[str, Tensor] = {}
        read = {name: integer_weights(m) for name, m in model.named_modules() if hasattr(m, "weight_quant")}
        quants = {name: quant for name, m in model.named_modules() if (quant := level_quant(m)) is not None}
        steps = {name: quant.step.double() for name, quant in quants.items()}
        signs = [name for name, m in model.named_modules() if is_sign(m)]
        self.model = model.double()
        for name in signs:
            self.levels[name] = 1
            self.model.get_submodule(name).register_forward_hook(self._keep(name))
        for name, (integers, scale) in read.items():
            layer: Any = self.model.get_submodule(name)
            if layer.weight_quant.is_quant_enabled:
                layer.weight_quant.register_forward_hook(_replaced(integers.double() * scale.double()))
        for name, step in steps.items():
            layer = self.model.get_submodule(name)
            quant = level_quant(layer)
            assert quant is not None
            # Brevitas' chain of operations, not our fused one, with the step that was read
            quant.fused = False
            quant.scaling_impl = _Constant(step)
            quant.ready = True
            if not quant.signed:
                self.levels[name] = quant.levels
                self.steps[name] = step
                layer.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = args[0], output

        return hook

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
        logits = self.model(images.double())
        integers, ties = {}, {}
        for name in self.levels.keys() - self.steps.keys():
            integers[name] = (self.outputs[name] > 0).double()
            ties[name] = int((self.inputs[name] == 0).sum())
        for name, step in self.steps.items():
            integers[name] = torch.round(self.outputs[name] / step)
            q = self.inputs[name] / step
            tie = (q - q.floor() == 0.5) & (q > 0) & (q < self.levels[name])
            ties[name] = int(tie.sum())
        return logits, integers, ties


def _replaced(value: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        return value

    return hook
