"""How a student learns: the weights of the loss terms and the options of the training."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qsnn.options import (
    BatchSize,
    Epochs,
    Factor,
    Images,
    LearningRate,
    Part,
    Seed,
    Timesteps,
    Weight,
    check_options,
)
from qsnn.snn.equations import firing_function
from qsnn.snn.network import TRAINED
from qsnn.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student learns. The weights of the loss terms have no unit; 0 leaves a term out.

    The defaults are the recipe that was best on held-out images: the label teaches the answer after T steps and every
    single step, a threshold a layer and an initial potential a channel learn too, AdamW.
    """

    timesteps: Timesteps = 2
    """Simulation steps T of the student."""
    epochs: Epochs = 10
    """Passes over the training images."""
    lr: LearningRate = 0.01
    """Peak learning rate [1] (AdamW; of a deep network rather 0.001; about 0.02 for SGD)."""
    optimizer: str = "adamw"
    """"sgd" (Nesterov, momentum 0.9) or "adamw"."""
    batch_size: BatchSize = 64
    """Images a step."""
    weight_decay: Weight = 0.0
    """L2 penalty [1]; never on biases, batch norm and thresholds."""
    label_smoothing: Part = 0.0
    """Mass moved from the label to the other classes in the student's cross entropy [1], in [0, 1)."""
    ce_weight: Weight = 0.5
    """Weight of the cross entropy of the answer after T steps."""
    kd_weight: Weight = 0.0
    """Weight of the KL divergence from the teacher to the answer after T steps. The student starts as the teacher; on
    all data that were measured its labels then teach it more. Without labels: 1, and the terms of cross entropy 0."""
    answer_weight: Weight = 0.0
    """Weight of the KL divergence from the teacher to the answers after 1 to T steps: one student for every T."""
    step_ce_weight: Weight = 0.5
    """Weight of the cross entropy of every single step (TET)."""
    step_weight: Weight = 0.0
    """Weight of the KL divergence from the teacher to the logits of every single step."""
    ensemble_weight: Weight = 0.0
    """Weight of the KL divergence from the student's mean over time to its single steps."""
    correct_weight: Weight = 0.0
    """Weight of the KL divergence from the mean of the steps that answer rightly to every single step."""
    strong_weight: Weight = 0.0
    """Weight of the KL divergence from an image's strongest step to its weakest (Strong2Weak)."""
    entropy_weight: Weight = 0.0
    """Reward [1] of the entropy of every step's answer; beside a KL term of the teacher."""
    regulariser_weight: Weight = 0.0
    """Weight of the squared distance of every step's logits from 1 (TET)."""
    rate_weight: Weight = 0.0
    """Weight of the distance of the student's firing rates from the teacher's activations [1]."""
    current_weight: Weight = 0.0
    """Weight of the distance of the mean currents of the student's neurons from the teacher's pre-activations [1]."""
    rate_layers: tuple[str, ...] = ()
    """Layers whose rates or currents are matched, "name" or "student name:teacher name"; by default all neurons."""
    kd_temperature: Factor = 1.0
    """Temperature τ of the KL terms [1]."""
    train_threshold: str = "auto"
    """Train the thresholds: one a "layer", which is what "auto" means, or one a "channel": spikes of several sizes, so
    that the folded layers behind compute in floats; "" leaves them as they are."""
    train_initial: str = "auto"
    """Train the initial potentials, likewise; "auto": one a channel, of an SNN that knows the shape of its images;
    "step": one a channel and time step, so that each step has a threshold of its own."""
    train_tau: str = ""
    """Train the time constants of the leak, likewise; "auto" where there is a leak."""
    surrogate: str = "box"
    """Derivative of a spike: "box", "rate" (see :class:`qsnn.IFNode`), or one of SpikingJelly by name ("ATan")."""
    mutual: bool = False
    """Train the teacher too, which learns from the student; see :func:`distill_together`."""
    sparsity: Part = 0.0
    """Part of the weights that is pruned, by magnitude in every layer, growing during the training [1], in [0, 1)."""
    ema: Part = 0.0
    """Decay of the running mean of the weights that the student ends with [1]; see :class:`qsnn.TrainConfig`."""
    augment: str | None = None
    """"none", or of "flip", "shift" and "cutout" some, like "flip+shift"; None takes the data set's default."""
    mixup: Weight = 0.0
    """α with which images are mixed in pairs, for student and teacher alike [1]; see :class:`qsnn.TrainConfig`."""
    train_images: Images | None = None
    """Use only the first so many training images."""
    precision: str = "fp32"
    """"fp32", or "bf16" (autocast; see :class:`qsnn.TrainConfig`)."""
    compile: bool = False
    """Compile the step with torch.compile."""
    seed: Seed = 0
    """Of the order of the images, augmentation and dropout."""

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            ValueError: which option, and what it may be.
        """
        check_options(self)
        weights = {name: value for name, value in asdict(self).items() if name.endswith("_weight")}
        if not any(weights.values()):
            raise ValueError(f"every loss term has weight 0; give at least one of {', '.join(weights)}")
        for name in ("train_threshold", "train_initial", "train_tau"):
            known = (*TRAINED, "step") if name == "train_initial" else TRAINED
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if self.mutual and not self.kd_weight:
            raise ValueError("mutual=True lets the teacher learn from the student by kd_weight, which is 0; give one")
        if self.rate_layers and not self.compares_layers:
            raise ValueError(
                f"rate_layers={self.rate_layers} names layers to match, with rate_weight={self.rate_weight}; give a "
                f"rate_weight or current_weight above 0, or leave rate_layers away"
            )
        firing_function(self.surrogate)
        self.training()

    @property
    def compares_layers(self) -> bool:
        """Whether layers of the student are compared with the teacher's."""
        return bool(self.rate_weight or self.current_weight)

    def training(self) -> TrainConfig:
        """Return the options of :func:`qsnn.fit` that are the same."""
        return TrainConfig(
            epochs=self.epochs, lr=self.lr, optimizer=self.optimizer, batch_size=self.batch_size,
            weight_decay=self.weight_decay, label_smoothing=self.label_smoothing, augment=self.augment,
            mixup=self.mixup, kd_temperature=self.kd_temperature, ema=self.ema, train_images=self.train_images,
            precision=self.precision, compile=self.compile, seed=self.seed,
        )  # fmt: skip
