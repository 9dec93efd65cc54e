"""How a network is trained: one configuration for argument, command line, file and record."""

from __future__ import annotations

from dataclasses import dataclass

from qsnn.data.batches import AUGMENTS
from qsnn.options import (
    BatchSize,
    Epochs,
    Factor,
    Images,
    LearningRate,
    Part,
    Seed,
    Share,
    Weight,
    check_options,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained: SGD with Nesterov momentum or AdamW, linear warm-up, cosine decay to zero."""

    epochs: Epochs = 20
    """Passes over the training images."""
    batch_size: BatchSize = 128
    """Images a step."""
    lr: LearningRate = 0.1
    """Peak learning rate [1] (SGD; about 0.002 for AdamW)."""
    optimizer: str = "sgd"
    """"sgd" (Nesterov, momentum 0.9) or "adamw"."""
    weight_decay: Weight = 5e-4
    """L2 penalty [1]; never on biases, batch norm, quantizer steps and thresholds."""
    warmup: Share = 0.1
    """Part of all steps in which the learning rate rises [1]."""
    label_smoothing: Part = 0.0
    """Mass moved from the label to the other classes in the cross entropy [1], in [0, 1); of no use to numbers."""
    kd_weight: Share = 0.5
    """Where a teacher is given: weight of the KL term; the cross entropy has 1 - kd_weight [0, 1]."""
    kd_temperature: Factor = 1.0
    """Temperature τ of the KL term [1]."""
    ema: Part = 0.0
    """Decay of the running mean of the weights that the run ends with, by step, such as 0.999; 0: the last weights.
    Batch norms are then estimated anew [1], in [0, 1)."""
    augment: str | None = None
    """"none", or of "flip", "shift" and "cutout" some, like "flip+shift"; None takes the data set's default."""
    mixup: Weight = 0.0
    """α of the Beta distribution by which images are mixed in pairs, such as 0.2; the loss asks for both labels [1]."""
    train_images: Images | None = None
    """Use only the first so many training images."""
    precision: str = "fp32"
    """"fp32", or "bf16": layers compute in bfloat16 where that is safe (autocast); for GPUs, and for
    CPUs with instructions for it (AVX-512 BF16, AMX)."""
    compile: bool = False
    """Compile the step with torch.compile; takes a minute first, and needs a C++ compiler."""
    seed: Seed = 0
    """Of the order of the images, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            ValueError: which option, and what it may be.
        """
        check_options(self)
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if self.augment not in (*AUGMENTS, None):
            known = ", ".join(map(repr, (*AUGMENTS, None)))
            raise ValueError(f"augment must be one of {known}, got {self.augment!r}")
