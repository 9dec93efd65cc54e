"""THE table: what each layer is, what it does to spikes, and what to write in the place of what is not in it.

A kind is what a layer or operation is, whatever its spelling. :mod:`qsnn.graph.trace` spells every function, method
and module of the user's as the one module of its kind (:mod:`qsnn.graph.spell` says which); every pass behind it
(quantize, convert, fold, counting, summary, certify) looks up what to do by :attr:`Kind.does`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from qsnn.graph.modules import (
    Add,
    ClippedReLU,
    Concat,
    Gate,
    Gating,
    Index,
    Mean,
    Pad,
    Permute,
    Scale,
    Shift,
    Slice,
    Sum,
    Upsample,
    View,
)
from qsnn.graph.product import Product

DOES = {
    "weighs": "sums its inputs with weights: they are quantized, and become integers",
    "normalises": "a line by channel: it goes into thresholds",
    "fires": "an activation: levels when quantized, a neuron when converted",
    "decides": "a step, 0 or 1: a neuron that compares the mean of what arrived with its level",
    "gates": "a 0 or 1 times a value: an AND with its spikes, in the value's own integers",
    "multiplies": "a product of two quantized values: final counts times final counts, not spikes; deferred alone",
    "takes maxima": "a maximum over windows: exact on spikes of neurons that fire deferred",
    "averages": "a mean or sum over windows: sums of spikes, the divisor goes into thresholds",
    "passes": "hands values on as they are at inference",
    "moves": "moves, repeats or drops values, or puts zeros between them",
    "adds": "adds two values: currents meet, or spikes of one step",
    "joins": "puts values side by side",
    "scales": "multiplies by numbers: they go into thresholds",
    "shifts": "adds numbers: they go into thresholds, as a bias does",
}
"""What a layer does to spikes, and what becomes of it."""


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    name: str
    does: str
    """One of :data:`DOES`."""
    modules: tuple[type[nn.Module], ...]
    """The classes of the kind; a class of the user's own that leaves ``forward`` as it is counts as its parent."""
    refuses: Callable[[Any], str | None] = lambda module: None
    """Why a module of the class is not of the kind after all, and what to write instead; None where it is."""


def _padded(layer: Any) -> str | None:
    mode = layer.padding_mode
    return None if mode == "zeros" else f"padding_mode={mode!r}; use zero padding, or F.pad before it"


def _statistics(norm: Any) -> str | None:
    if norm.running_mean is None:
        return "statistics of each batch's own; train with track_running_stats=True"
    return None


def _indices(pool: Any) -> str | None:
    return "return_indices=True; spikes carry no indices, use nn.Upsample behind" if pool.return_indices else None


KINDS = (
    Kind("convolution", "weighs", (nn.Conv1d, nn.Conv2d, nn.Conv3d), _padded),
    Kind("transposed convolution", "weighs", (nn.ConvTranspose1d, nn.ConvTranspose2d), _padded),
    Kind("linear", "weighs", (nn.Linear,)),
    Kind("batch norm", "normalises", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _statistics),
    Kind("ReLU", "fires", (nn.ReLU,)),
    Kind("clipped ReLU", "fires", (ClippedReLU, nn.ReLU6)),
    Kind("gate", "decides", (Gate,)),
    Kind("gating", "gates", (Gating,)),
    Kind("product", "multiplies", (Product,)),
    Kind("max pool", "takes maxima", (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _indices),
    Kind("average pool", "averages", (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)),
    Kind("adaptive average pool", "averages",
         (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)),
    Kind("mean", "averages", (Mean,)),
    Kind("sum", "averages", (Sum,)),
    Kind("dropout", "passes", (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
                               nn.FeatureAlphaDropout)),
    Kind("identity", "passes", (nn.Identity,)),
    Kind("flatten", "moves", (nn.Flatten,)),
    Kind("view", "moves", (View,)),
    Kind("permutation", "moves", (Permute,)),
    Kind("slice", "moves", (Slice,)),
    Kind("choice of places", "moves", (Index,)),
    Kind("zero padding", "moves", (Pad,)),
    Kind("nearest upsampling", "moves", (Upsample,)),
    Kind("channel shuffle", "moves", (nn.ChannelShuffle,)),
    Kind("pixel shuffle", "moves", (nn.PixelShuffle, nn.PixelUnshuffle)),
    Kind("addition", "adds", (Add,)),
    Kind("concatenation", "joins", (Concat,)),
    Kind("scaling", "scales", (Scale,)),
    Kind("shift", "shifts", (Shift,)),
)  # fmt: skip
_BY_CLASS = {module: kind for kind in KINDS for module in kind.modules}
CLASSES = {name: tuple(c for kind in KINDS if kind.does == name for c in kind.modules) for name in DOES}
"""The classes of all kinds that do the same, for ``isinstance``."""

_RELU = "put nn.ReLU in its place and train again"
_NORM = "put nn.BatchNorm in its place and train again"
ADVICE = {
    **dict.fromkeys(
        ("GELU", "SiLU", "Mish", "ELU", "CELU", "SELU", "Softplus", "Hardswish", "Sigmoid", "LogSigmoid",
         "Softsign", "Tanhshrink", "Hardshrink", "Softshrink", "gelu", "silu", "mish", "elu", "celu", "selu", "sigmoid",
         "hardswish", "softplus", "softsign", "hardshrink", "softshrink", "tanhshrink", "exp"), _RELU,
    ),
    **dict.fromkeys(
        ("Tanh", "tanh"), "put nn.Hardtanh (a clip) in its place and train again; behind the last layer leave it away "
        "and apply it to the answers",
    ),
    **dict.fromkeys(("Softmin", "Softmax2d"), "leave it away and apply it to the answers"),
    **dict.fromkeys(
        ("GLU", "glu"), "it multiplies by a sigmoid; let a step decide, qsnn.Gate(level)(a) * b of the two halves, or "
        "put nn.ReLU in its place, and train again",
    ),
    **dict.fromkeys(
        ("argmax", "argmin", "topk", "sort", "argsort", "kthvalue", "median", "mode", "cummax", "unique", "nonzero"),
        "a network gives its scores; leave it away and apply it to the answers",
    ),
    **dict.fromkeys(
        ("std", "var", "norm", "logsumexp", "sqrt", "rsqrt", "log", "log1p", "reciprocal", "cosine_similarity",
         "pairwise_distance", "cdist", "prod"), "compute it of the answers, behind the network",
    ),
    **dict.fromkeys(
        ("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_unpool1d",
         "max_unpool2d", "max_unpool3d", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d"),
        "spikes carry no indices; use nearest upsampling, or a transposed convolution, and train again",
    ),
    **dict.fromkeys(("randn_like", "rand_like", "bernoulli", "normal_", "uniform_", "empty_like"),
                    "what is drawn at random, or not set, is for training alone: put it under `if self.training:`"),
    **dict.fromkeys(("long", "int", "round", "floor", "ceil", "trunc", "bool"),
                    "numbers are rounded by the quantizers of qsnn; leave it away, or do it before the network"),
    **dict.fromkeys(("pow", "float_power"), "the square alone, of a quantized value"),
    **dict.fromkeys(("cumsum", "lerp", "addcmul", "addcdiv", "bilinear", "Bilinear", "fold", "Fold"),
                    "write it as products, additions, slices and torch.cat"),
    **dict.fromkeys(("masked_fill", "masked_select", "clamp_", "scatter", "index_add", "index_fill"),
                    "a choice by values of the image is a ReLU, a clamp, or qsnn.Gate(level)(x) * y"),
    **dict.fromkeys(("ConvTranspose3d",), "use nearest upsampling and nn.Conv3d, and train again"),
    **dict.fromkeys(
        ("LeakyReLU", "PReLU", "RReLU", "leaky_relu", "prelu"),
        "its negative side needs signed levels, of a second neuron (not RReLU): quantize(model, data, "
        "QuantizeConfig(signed=True)); or " + _RELU,
    ),
    **dict.fromkeys(
        ("LayerNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "RMSNorm", "LocalResponseNorm", "layer_norm",
         "group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize"), _NORM,
    ),
    **dict.fromkeys(
        ("Softmax", "LogSoftmax", "softmax", "log_softmax", "MultiheadAttention", "scaled_dot_product_attention",
         "Transformer", "TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoderLayer"),
        "a softmax inside a network has no spiking form (one right before the output is taken off by itself); for "
        "attention let a step decide: qsnn.Gate(level)(q.sum(...)) * k, as the network 'qkformer' does; or leave the "
        "softmax away: relu(q) @ (relu(k).mT @ relu(v)) / N, exact on counts, deferred",
    ),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"),
                    "a recurrent layer has its own time; use convolutions over time"),
    **dict.fromkeys(("Embedding", "embedding"), "feed the network with what the embedding gives"),
    **dict.fromkeys(
        ("LPPool1d", "LPPool2d", "lp_pool2d", "FractionalMaxPool2d"), "use average pooling and train again"
    ),
    **dict.fromkeys(
        ("AdaptiveMaxPool1d", "AdaptiveMaxPool2d", "AdaptiveMaxPool3d"),
        "write it as nn.MaxPool2d with kernel and stride, behind the ReLU",
    ),
    **dict.fromkeys(("mul", "imul", "matmul", "bmm", "einsum"),
                    "a product of two values that depend on the image is taken of quantized values alone: put nn.ReLU "
                    "behind what it multiplies, or let one of the two be 0 or 1: qsnn.Gate(level)(x) * y"),
    **dict.fromkeys(("baddbmm", "addbmm", "tensordot", "outer", "cross"), "write it as products x @ y and additions"),
    **dict.fromkeys(("sign", "heaviside", "gt", "ge", "lt", "le"),
                    "use qsnn.Gate(level), a step from 0 to 1 that can be trained"),
    **dict.fromkeys(("maximum", "minimum", "max", "min", "amax", "amin"),
                    "use nn.MaxPool2d for maxima over windows, or add"),
    "where": "a choice by values of the image is a ReLU, a clamp, or qsnn.Gate(level)(x) * y",
    **dict.fromkeys(("interpolate", "Upsample", "UpsamplingBilinear2d", "grid_sample"),
                    "use nearest upsampling by a whole factor, or a transposed convolution, and train again"),
}  # fmt: skip
"""What to write in the place of a layer or function that no row of the table names."""
UNKNOWN = (
    "no spiking form is known; write it with convolutions, Linear, ReLU, pools, sums, slices and torch.cat, or apply "
    "it to the answers, behind the network"
)
"""The same where nothing nearer is known."""


def kind_of(module: nn.Module | None) -> Kind | None:
    """Return the row of the table that a module belongs to, or None.

    A subclass counts where it computes what its parent does: its ``forward`` is inherited, or it is ours, or Brevitas'
    layer with quantized weights.
    """
    if module is None:
        return None
    for parent in type(module).__mro__:
        kind = _BY_CLASS.get(parent)
        if kind is not None:
            ours = type(module).__module__.startswith("qsnn.") or hasattr(module, "weight_quant")
            inherited: Any = parent
            return kind if ours or type(module).forward is inherited.forward else None
    return None


def does(module: nn.Module | None) -> str | None:
    """Return what a module does to spikes, one of :data:`DOES`, or None where no row of the table names it."""
    kind = kind_of(module)
    return None if kind is None else kind.does


def refused(module: nn.Module) -> str | None:
    """Return why a module is not taken, as a user should read it, or None where it is."""
    name, kind = type(module).__name__, kind_of(module)
    if kind is not None:
        reason = kind.refuses(module)
        return None if reason is None else f"{name} with {reason}"
    return f"{name}: {ADVICE.get(name, UNKNOWN)}"
