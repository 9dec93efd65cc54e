"""What a network is asked: a class, yes or no, a class for each pixel, or numbers; and all that depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qsnn.data.images import IGNORED as IGNORED


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question: its loss, what a teacher adds, how an answer is decided, and how a score is added up.

    Shape:
        answers: (B, K), (B,) or a map (B, K, \\*), as ``takes`` says; labels likewise.
    """

    name: str
    """As a user writes it."""
    takes: str
    """Which answers and labels, in words."""
    metric: str
    """What is reported; :data:`qsnn.report.terminal.FORMATS` says how it is written."""
    unit: str
    """" %", or "" where the score has none of its own."""
    floats: bool
    """Whether labels are floats, where the task is to be found from them."""
    fits: Callable[[Tensor, Tensor], bool]
    """(answers, labels) -> whether their shapes, without the batch, belong to it."""
    loss: Callable[[Tensor, Tensor, float], Tensor]
    """(answers, labels, label smoothing) -> the mean loss."""
    taught: Callable[[Tensor, Tensor, float], Tensor]
    """(answers, the teacher's, temperature τ) -> the distance from the teacher."""
    decide: Callable[[Tensor], Tensor]
    """answers -> classes, or the numbers themselves."""
    count: Callable[[Tensor, Tensor], Tensor]
    """(answers, labels) -> sums, to be added over batches and processes; of one shape for a network."""
    read: Callable[[Tensor], float]
    """Sums -> the score."""
    lead: Callable[[Tensor], Tensor] | None = None
    """Answers (T, B, \\*) -> how far the class in front leads (T, B) [0, 1]; None: there is no early exit."""


def kl_divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`\tau^2\,KL(\mathrm{softmax}(t/\tau)\,\|\,\mathrm{softmax}(z/\tau))`, mean over the batch.

    Shape:
        logits z and target t: (B, K).
    Source:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    log_p, log_q = F.log_softmax(logits / temperature, -1), F.log_softmax(target / temperature, -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def bernoulli_divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`\tau^2\,KL(\sigma(t/\tau)\,\|\,\sigma(z/\tau))` of two Bernoulli variables, mean over all logits.

    Shape:
        logits z and target t: (B, \*), one logit a decision.
    Source:
        Hinton et al. 2015; of one logit the softmax over (z, 0).
    """
    z, t = logits / temperature, target / temperature
    p = t.sigmoid()
    cross, entropy = (F.binary_cross_entropy_with_logits(x, p) for x in (z, t))
    return (cross - entropy) * temperature**2


def pixel_divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """:func:`kl_divergence` of each pixel's classes, mean over the pixels; of one map :func:`bernoulli_divergence`.

    Shape:
        logits and target: (B, K, \\*).
    """
    if logits.shape[1] == 1:
        return bernoulli_divergence(logits, target, temperature)
    z, t = (maps.movedim(1, -1).flatten(0, -2) for maps in (logits, target))
    return kl_divergence(z, t, temperature)


def _numbers(shape: torch.Size) -> list[int]:
    """Sizes of one image's answers without those of 1: (B,) and (B, 1) are the same."""
    return [size for size in shape[1:] if size != 1]


def _as(labels: Tensor, answers: Tensor) -> Tensor:
    """Labels in the shape and dtype of the answers; a loss would broadcast (B,) against (B, 1) to (B, B)."""
    return labels.reshape(answers.shape).to(answers.dtype)


def _yes_or_no(answers: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(answers, _as(labels, answers) * (1 - smoothing) + smoothing / 2)


def _pixels(answers: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Answers (pixels, K) and labels (pixels,) of all pixels that count."""
    labels = labels.flatten().long()
    kept = (labels >= 0) & (labels != IGNORED)
    return answers.movedim(1, -1).flatten(0, -2)[kept], labels[kept]


def _pixel_loss(answers: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    labels = labels.reshape(answers.shape[:1] + answers.shape[2:]).long()
    kept = (labels >= 0) & (labels != IGNORED)
    if answers.shape[1] == 1:
        wanted = labels.to(answers.dtype) * (1 - smoothing) + smoothing / 2
        each = F.binary_cross_entropy_with_logits(answers[:, 0], wanted, reduction="none")
    else:
        labels = labels.where(kept, 0)
        each = F.cross_entropy(answers, labels, label_smoothing=smoothing, reduction="none")
    return each.where(kept, 0).sum() / kept.sum().clamp(min=1)


def _decided(answers: Tensor) -> Tensor:
    """The class of the largest logit along dimension 1; of one logit whether it is above 0."""
    return (answers[:, 0] > 0).long() if answers.shape[1] == 1 else answers.argmax(1)


def _signs(answers: Tensor) -> Tensor:
    return (answers > 0).long()


def _right(decided: Tensor, labels: Tensor) -> Tensor:
    right = (decided == labels.reshape(decided.shape)).sum()
    return torch.stack([right, torch.full_like(right, labels.numel())])


def _percent(sums: Tensor) -> float:
    right, seen = sums.tolist()
    return float(100.0 * right / max(1, seen))


def _overlaps(answers: Tensor, labels: Tensor) -> Tensor:
    """Pixels of each class that answer and label share, that have it as the answer, and as the label, (3, K)."""
    answers, labels = _pixels(answers, labels)
    decided, classes = _decided(answers), max(2, answers.shape[1])
    parts = (labels[decided == labels], decided, labels)
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


def _mean_iou(sums: Tensor) -> float:
    shared, answered, labelled = sums.double()
    union = answered + labelled - shared
    seen = union > 0
    return 100.0 * float((shared[seen] / union[seen]).mean()) if bool(seen.any()) else 0.0


def _squares(answers: Tensor, labels: Tensor) -> Tensor:
    errors = (answers.double() - labels.reshape(answers.shape).double()).square()
    return torch.stack([errors.sum(), torch.full_like(errors.sum(), errors.numel())])


def _lead(answers: Tensor) -> Tensor:
    first, second = answers.softmax(-1).topk(2, -1).values.unbind(-1)
    return first - second


def _lead_of_sign(answers: Tensor) -> Tensor:
    """|2σ(z) - 1| of one decision an image."""
    return (answers / 2).tanh().abs().reshape(answers.shape[:2])


CLASSIFICATION = Task(
    name="classification", takes="answers (B, K), integer labels (B,)", metric="accuracy", unit=" %", floats=False,
    fits=lambda answers, labels: answers.dim() == 2 and answers.shape[1] > 1 and labels.dim() == 1,
    loss=lambda answers, labels, smoothing: F.cross_entropy(answers, labels.long(), label_smoothing=smoothing),
    taught=kl_divergence, decide=_decided,
    count=lambda answers, labels: _right(_decided(answers), labels), read=_percent, lead=_lead,
)  # fmt: skip
BINARY = Task(
    name="binary", takes="one logit a decision, answers (B, 1) or (B,), labels 0 or 1 (B,)", metric="accuracy",
    unit=" %", floats=False, fits=lambda answers, labels: _numbers(answers.shape) == _numbers(labels.shape),
    loss=_yes_or_no, taught=bernoulli_divergence, decide=_signs,
    count=lambda answers, labels: _right(_signs(answers), labels), read=_percent, lead=_lead_of_sign,
)  # fmt: skip
SEGMENTATION = Task(
    name="segmentation", takes="maps (B, K, H, W), integer labels (B, H, W)", metric="mean IoU", unit=" %",
    floats=False, fits=lambda answers, labels: (
        answers.dim() > 2 and labels.dim() > 1
        and answers.shape[2:] == (labels.shape[2:] if labels.dim() == answers.dim() else labels.shape[1:])
        and (labels.dim() < answers.dim() or labels.shape[1] == 1)
    ),
    loss=_pixel_loss, taught=pixel_divergence, decide=_decided, count=_overlaps, read=_mean_iou,
)  # fmt: skip
REGRESSION = Task(
    name="regression", takes="answers (B,), (B, 1) or (B, *), float labels of the same shape",
    metric="mean squared error", unit="", floats=True,
    fits=lambda answers, labels: _numbers(answers.shape) == _numbers(labels.shape),
    loss=lambda answers, labels, smoothing: F.mse_loss(answers, _as(labels, answers)),
    taught=lambda answers, target, temperature: F.mse_loss(answers, target),
    decide=lambda answers: answers, count=_squares,
    read=lambda sums: float(sums[0] / sums[1].clamp(min=1)),
)  # fmt: skip
TASKS = {task.name: task for task in (CLASSIFICATION, SEGMENTATION, BINARY, REGRESSION)}
"""By name, in the order in which they are looked for: maps of one logit are a segmentation, not a row of decisions."""


def told(metric: str, score: float) -> str:
    """A score in words.

    >>> told("accuracy", 91.234), told("mean squared error", 0.012345)
    ('accuracy 91.23 %', 'mean squared error 0.0123')
    """
    percent = any(task.metric == metric and task.unit for task in TASKS.values())
    return f"{metric} {score:.2f} %" if percent else f"{metric} {score:.3g}"
