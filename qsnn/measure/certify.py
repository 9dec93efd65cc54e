"""certify(): proof, layer by layer, that a spiking network computes what the quantized network computes."""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qsnn.data.batches import batches
from qsnn.data.memory import batch_within, keep_freed_memory, within
from qsnn.data.shown import batch_count, shown
from qsnn.folded.fold import fold
from qsnn.folded.prepared import Prepared
from qsnn.graph.arrived import arrived, evaluating
from qsnn.graph.call import full_precision
from qsnn.graph.hooks import recorded, watching
from qsnn.graph.kinds import does
from qsnn.graph.trace import takes_frames
from qsnn.measure.certificate import Certificate, LayerCheck
from qsnn.options import expect, seen
from qsnn.quant.activations import is_sign, level_quant
from qsnn.quant.weights import integer_weights
from qsnn.snn.counts import counted_layers
from qsnn.snn.network import SNN

TIE = 1e-9
"""Nearer to a half integer than this, the reference's own rounding in float64 decides [steps]; nearer to a gate's
level, or to where a sign changes, likewise [largest input of the layer]."""
ROUNDING = 1e-9
"""Logits that differ by less are equal but for the order of the reference's additions in float64 [largest logit of the
class in the batch]."""
CANCELLED = 1e-14
"""What a logit may differ by in any case: one that is nearly 0 is the sum of larger numbers [largest logit]."""


@torch.no_grad()
def certify(
    snn: SNN,
    qann: nn.Module,
    loader: Any,
    *,
    timesteps: int | None = None,
    firing: str = "deferred",
    images: int | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
) -> Certificate:
    """Compare every layer's spike counts with the quantized network's integers, and all logits, image by image.

    The reference is the QANN: Brevitas' own modules with hooks, in float64, with the integer weights and scales read
    once in the dtype it runs in. It never reads the thresholds of the spiking network, which runs in its integer form
    (folded here if it is not), from the numbers that it holds now. Where the reference lies within its own rounding of
    a tie, the verdict says so, and is not EXACT. Of a gate the last decision is compared. Labels are not used.

    Args:
        snn: from :func:`qsnn.convert` or :func:`qsnn.fold`.
        qann: the quantized network it was made from.
        loader: a Dataset or an iterable of (images, labels); of frames in time both see the sum.
        timesteps: T; default L, where deferred firing is the quantizer.
        firing: "deferred", or "online" (equal only at L = T = 1).
        images: at most so many images.
        batch_size: images a call; by default up to 250, as many as fit into ``memory``.
        memory: what a batch may take, bytes or "512M"; default 1 GiB.
    Raises:
        TypeError: ``snn`` is not an SNN.
        ValueError: ``qann`` has no quantized activations, the two have different layers, or there is no image.

    >>> import qsnn
    >>> data = qsnn.load_data("digits")
    >>> qann = qsnn.quantize(qsnn.create_model("study", data), data)
    >>> qsnn.certify(qsnn.convert(qann), qann, data.test, images=20).verdict
    'EXACT'
    """
    model: Any = arrived(snn) if isinstance(snn, nn.Module) else snn
    if not isinstance(model, SNN):
        raise TypeError(f"expected certify(snn, qann, loader) with an SNN first, got {type(model).__name__}")
    snn = model
    expect("certify(snn, qann, data.test)", "qann", qann, nn.Module)
    qann = arrived(qann)
    if images is not None and (isinstance(images, bool) or not isinstance(images, int) or images < 1):
        raise ValueError(f"expected images >= 1, or None for all, got {seen(images)}: nothing proves nothing")
    folded = snn if snn.folded else fold(snn)
    for module in folded.modules():  # what is certified is what the network answers from now on
        if isinstance(module, Prepared):
            module.forget()
    reference = _Reference(qann)
    counts = {name: folded.network.get_submodule(folded.probes.get(name, name)) for name, _ in folded.neurons()}
    if not reference.levels:
        raise ValueError("the second argument holds no quantized activation; call certify(snn, qann, loader)")
    if set(counts) != set(reference.levels):
        odd = sorted(set(counts) ^ set(reference.levels))
        raise ValueError(f"the two networks do not have the same spiking layers; only one of them has {odd}")
    if timesteps is None:
        timesteps = max(reference.levels.values())
    steps = timesteps
    found = _Comparison({name: LayerCheck(name) for name in reference.levels})
    keep_freed_memory()

    def run(batch: Tensor) -> tuple[Any, ...]:
        batch = batch.mean(1) if takes_frames(qann, batch) else batch
        with recorded(counts) as spikes:
            answers = folded(batch, timesteps=steps, firing=firing)
        stepped = {name: train.unflatten(0, (steps, -1)) for name, train in spikes.items()}
        fired = {name: (train[-1] if name in reference.gates else train.sum(0)) for name, train in stepped.items()}
        for name in reference.signs.intersection(folded.probes):  # behind a moved max pool a sign is ±1 already
            fired[name] = (fired[name] + 1) / 2
        with full_precision(batch.device):
            return answers, fired, *reference(batch, fired)

    def compare(batch: Tensor) -> None:  # a function: what a batch made is gone before the next one is run
        answers, fired, logits, integers, near, usual = run(batch)
        for name, check in found.checks.items():
            # what the quantizer would say after T steps: n of L levels, T spikes of full rate
            wanted = integers[name].clamp(max=timesteps)
            check.ties += reference.ties[name]
            check.float32 += int((usual[name] != integers[name]).sum())
            _compare(check, fired[name], wanted, near[name], found.seen)
        found.add([answer[-1] for answer in tree_leaves(answers)], logits, reference.usual_logits, len(batch))

    if batch_size is None:
        with within(memory):
            batch_size = batch_within(run, loader, 250, model=folded)
    parts = batches(loader, batch_size, model=folded)
    for batch, _ in shown(parts, "certificate", batch_count(loader, batch_size, images)):
        batch = batch if images is None else batch[: images - found.seen]
        if not len(batch):
            break
        compare(batch)
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
            if logits.shape != reference.shape:
                got = f"{tuple(logits.shape)} and {tuple(reference.shape)}"
                raise ValueError(f"expected two networks that answer alike, got logits {got}; certify(snn, its qann)")
            difference = (logits - reference).abs()
            size = reference.abs().nan_to_num(nan=0.0, posinf=0.0).clamp(min=1e-30)
            by_class = size.amax([d for d in range(size.dim()) if d != 1], keepdim=True)
            limit = ROUNDING * by_class + CANCELLED * size.max()
            self.same_logits += int((difference <= limit).sum())  # never where one is NaN or infinite
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


_NO_INTEGER = 2.0**31
"""Shown as the largest difference from NaN and infinity."""


def _compare(check: LayerCheck, count: Tensor, integers: Tensor, near: Tensor, offset: int) -> None:
    difference = (count.double() - integers).abs()
    rounding = near & (difference == 1)
    wrong = ~(difference == 0) & ~rounding  # a NaN is no integer
    check.elements += wrong.numel()
    check.equal += int((difference == 0).sum())
    check.rounding += int(rounding.sum())
    check.largest = max(check.largest, int(difference.nan_to_num(nan=_NO_INTEGER, posinf=_NO_INTEGER).max()))
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
        self.signs = {name for name, m in layers.items() if is_sign(m)}
        self.levels = dict.fromkeys(self.signs, 1) | dict.fromkeys(self.gates, 1)
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
        self, images: Tensor, fired: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Logits of every head, integers of every layer, where these lie at a tie, and the integers in float32.

        Args:
            fired: what the spiking network counted; of a tie that float64 cannot decide the layers behind see that.
        """
        integers: dict[str, Tensor] = {}
        near: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            integers[name], near[name] = self._read(name, args[0], output)
            count = fired[name].to(output.dtype)
            moved = near[name] & ((count - integers[name]).abs() == 1) & (count <= self.levels[name])
            if not bool(moved.any()):
                return None
            unit = self.steps.get(name)
            value = count * unit if unit is not None else count if name in self.gates else 2 * count - 1
            return torch.where(moved, value, output)

        activations = {name: self.model.get_submodule(name) for name in self.levels}
        weights = watching(self._weights, lambda name, module, args, output: self._values[name])
        with watching(activations, keep), weights:
            logits = tree_leaves(self.model(images.double()))
        watched = {name: self.usual.get_submodule(name) for name in self.levels}
        with evaluating(self.usual), recorded(watched) as usual:
            self.usual_logits = [leaf.double() for leaf in tree_leaves(self.usual(images))]
        moved = {name: self._integers(name, value.double()) for name, value in usual.items()}
        return logits, integers, near, moved

    def _integers(self, name: str, output: Tensor) -> Tensor:
        """What a layer's answer stands for: n of L levels, 1 or 0 of a gate or of a sign."""
        if name in self.steps:
            return torch.round(output / self.steps[name])
        return output if name in self.gates else (output > 0).double()

    def _read(self, name: str, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of a layer in float64 and where they lie at a tie, which are counted where they are met."""
        if name in self.steps:
            q = x / self.steps[name]
            inside = (q > 0) & (q < self.levels[name])
            self.ties[name] = int(((q - q.floor() == 0.5) & inside).sum())
            return self._integers(name, output), ((q - q.floor() - 0.5).abs() < TIE) & inside
        level = self.gates[name].level if name in self.gates else x.new_zeros(())
        distance = (x - level).abs()
        self.ties[name] = int((distance == 0).sum())
        largest = max(float(x.abs().nan_to_num(nan=0.0, posinf=0.0).max()), float(level.abs()))
        return self._integers(name, output), distance < TIE * largest
