"""quantize(): a trained float model becomes a low-precision model of Brevitas layers, calibrated on data."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass, field
from typing import Any

import brevitas.nn as qnn
import torch
from torch import Tensor, fx, nn

from qsnn.data import batches
from qsnn.graph import (
    RELU_FUNCTIONS,
    RELU_METHODS,
    add_module,
    call_nodes,
    child_recipe,
    data_recipe,
    is_call,
    replace_module,
    trace,
    unshare,
)
from qsnn.quantizers import LevelActQuant, LevelQuant, integer_weights, level_quant, weight_quantizer

__all__ = ["QuantizeConfig", "integer_weights", "quantize"]

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Linear: qnn.QuantLinear,
}
_PASSED = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.Flatten,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """The precision of every part of a network, and how its activations are calibrated."""

    weight_bits: int = 4
    """Bits of the weights: 1 (XNOR), 2 to 8 (integers), 16 (fp16), 32 (float)."""
    act_bits: int | None = None
    """Bits of the activations: L = 2**act_bits - 1 levels. Give this or ``levels``."""
    levels: int | None = None
    """Nonzero activation levels L. Default: 2, or from ``act_bits``. The SNN equals the QANN at T = L."""
    input_bits: int | None = 8
    """Bits of the signed input quantizer; None leaves the input as it is."""
    first_last_bits: int | None = 8
    """Bits of the first and the last layer's weights; None treats them like the others."""
    overrides: dict[str, int] = field(default_factory=dict)
    """Weight bits by layer name pattern, e.g. {"head*": 8}; the last match wins."""
    calibration_images: int = 512
    """Training images that set the activation steps."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: bits or levels out of range, or act_bits and levels that contradict each other.
        """
        for bits in (self.weight_bits, *([] if self.first_last_bits is None else [self.first_last_bits])):
            weight_quantizer(bits)
        for bits in self.overrides.values():
            weight_quantizer(bits)
        if self.act_bits is not None and not 1 <= self.act_bits <= 8:
            raise ValueError(f"act_bits must be 1 to 8, got {self.act_bits}")
        if self.levels is not None and not 1 <= self.levels <= 255:
            raise ValueError(f"levels must be 1 to 255, got {self.levels}")
        if self.act_bits is not None and self.levels is not None and self.levels > 2**self.act_bits - 1:
            raise ValueError(f"{self.levels} levels do not fit into act_bits={self.act_bits}; give only one of the two")
        if self.input_bits is not None and not 2 <= self.input_bits <= 16:
            raise ValueError(f"input_bits must be 2 to 16, or None for a float input, got {self.input_bits}")
        if self.calibration_images < 1:
            raise ValueError(f"calibration_images must be at least 1, got {self.calibration_images}")

    @property
    def resolved_levels(self) -> int:
        """L: ``levels``, or 2**act_bits - 1, or 2."""
        if self.levels is not None:
            return self.levels
        return 2 if self.act_bits is None else 2**self.act_bits - 1


def quantize(model: nn.Module, data: Any = None, config: QuantizeConfig | None = None) -> fx.GraphModule:
    r"""Return a low-precision copy of a trained float model, its activation steps calibrated on data.

    Every ``nn.Conv``, ``nn.Linear`` and ReLU (module or function) becomes Brevitas' quantized layer, and the input
    gets a signed quantizer of its own. Activations follow :class:`~qsnn.quantizers.LevelQuant`,
    :math:`y = s\,\mathrm{clip}(\lfloor x/s + \tfrac12 \rfloor, 0, L)`; each step s is the one with the least
    mean-squared error on what really arrives there, given the quantized layers before it.

    Args:
        model: a trained model with ReLU activations that torch.fx can follow. It is not changed.
        data: a :class:`~qsnn.data.Data` (its training images are used), a Dataset, or an iterable of (images, labels).
        config: precision and calibration.
    Raises:
        ValueError: nothing to quantize, a layer that is not supported (all of them are named), or no data.
    """
    config = config or QuantizeConfig()
    if not isinstance(config, QuantizeConfig):
        raise TypeError(f"expected a QuantizeConfig, got {type(config).__name__}; call quantize(model, data, config)")
    if data is None:
        raise ValueError("quantize needs data to calibrate on: quantize(model, data, config)")
    images = _calibration_images(getattr(data, "train", data), config.calibration_images)
    qann = quantized_structure(model, config)
    qann.qsnn_recipe["input_shape"] = list(images.shape[1:])
    if data_recipe(data):
        qann.qsnn_recipe["data"] = data_recipe(data)
    calibrate_(qann, images)
    return qann


def quantized_structure(model: nn.Module, config: QuantizeConfig) -> fx.GraphModule:
    """Return the quantized copy with its activation steps still unset (NaN), as ``load`` needs it."""
    training = model.training
    network = trace(model)
    _relu_modules_(network)
    unshare(network)
    _refuse_unsupported(network)
    levels = config.resolved_levels
    act_bits = max(1, levels.bit_length())
    weighted = [str(node.target) for node, module in call_nodes(network) if type(module) in _LAYERS]
    relus = 0
    for node, module in list(call_nodes(network)):
        name = str(node.target)
        if type(module) in _LAYERS:
            replace_module(network, name, _quantized_layer(module, _bits_of(name, weighted, config)))
        elif isinstance(module, nn.ReLU):
            replace_module(network, name, _activation(levels, act_bits))
            relus += 1
    if not relus or not weighted:
        raise ValueError(
            f"nothing to quantize in {type(model).__name__}: it holds {len(weighted)} convolution or linear layers "
            f"and {relus} ReLUs, and needs both"
        )
    if config.input_bits is not None:
        _quantize_input_(network, config.input_bits)
    network.graph.lint()
    network.recompile()
    network.train(training)
    network.qsnn_recipe = child_recipe(model, "qann", quantize=asdict(config))
    return network


@torch.no_grad()
def calibrate_(qann: nn.Module, images: Tensor) -> None:
    """Set every activation step from one pass of ``images``, layer by layer in graph order, in place."""
    quants = [quant for module in qann.modules() if (quant := level_quant(module)) is not None]
    training = qann.training
    qann.eval()
    for quant in quants:
        quant.collecting = True
    try:
        qann(images)
    finally:
        for quant in quants:
            quant.collecting = False
        qann.train(training)


def _calibration_images(source: Any, count: int) -> Tensor:
    found: list[Tensor] = []
    for images, _ in batches(source, min(count, 512)):
        found.append(images)
        if sum(len(part) for part in found) >= count:
            break
    return torch.cat(found)[:count]


def _relu_modules_(network: fx.GraphModule) -> None:
    """Turn every functional relu into a module, named by its place in the graph."""
    for node in list(network.graph.nodes):
        if is_call(node, RELU_FUNCTIONS, RELU_METHODS):
            name = add_module(network, node.name, nn.ReLU())
            with network.graph.inserting_after(node):
                new = network.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
            node.replace_all_uses_with(new)
            network.graph.erase_node(node)
    network.recompile()


def _refuse_unsupported(network: fx.GraphModule) -> None:
    known = (*_LAYERS, nn.ReLU, *_PASSED)
    bad = [f"{node.target} ({type(module).__name__})" for node, module in call_nodes(network) if type(module) not in known]
    if bad:
        raise ValueError(
            f"cannot quantize {', '.join(bad)}: only Conv, Linear, ReLU, BatchNorm, pooling, Dropout and Flatten are "
            f"supported; put nn.ReLU in the place of other activations and train again"
        )


def _bits_of(name: str, weighted: list[str], config: QuantizeConfig) -> int:
    bits = config.weight_bits
    if config.first_last_bits is not None and name in (weighted[0], weighted[-1]):
        bits = max(bits, config.first_last_bits)
    for pattern, value in config.overrides.items():
        if fnmatch.fnmatch(name, pattern):
            bits = value
    return bits


def _quantized_layer(layer: nn.Module, bits: int) -> nn.Module:
    """Return the Brevitas layer of the same shape that shares no memory with ``layer``."""
    options = {"bias": layer.bias is not None, **weight_quantizer(bits)}
    if isinstance(layer, nn.Linear):
        new = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        if layer.padding_mode != "zeros":
            raise ValueError(f"padding_mode={layer.padding_mode!r} cannot be quantized; use zero padding")
        new = _LAYERS[type(layer)](
            layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
            dilation=layer.dilation, groups=layer.groups, **options,
        )  # fmt: skip
    with torch.no_grad():
        new.weight.copy_(layer.weight)
        if layer.bias is not None:
            new.bias.copy_(layer.bias)
    return new.to(layer.weight.device)


def _activation(levels: int, bits: int) -> nn.Module:
    return qnn.QuantReLU(act_quant=LevelActQuant, levels=levels, bit_width=bits)


def _quantize_input_(network: fx.GraphModule, bits: int) -> None:
    (placeholder,) = [node for node in network.graph.nodes if node.op == "placeholder"]
    levels = 2 ** (bits - 1) - 1
    name = add_module(
        network, "input_quant", qnn.QuantIdentity(act_quant=LevelActQuant, levels=levels, bit_width=bits, signed=True)
    )
    with network.graph.inserting_after(placeholder):
        node = network.graph.call_module(name, (placeholder,))
    placeholder.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def activation_quants(qann: nn.Module) -> dict[str, LevelQuant]:
    """Return the unsigned activation quantizers by the name of the layer that holds them, in module order."""
    found = {name: level_quant(module) for name, module in qann.named_modules()}
    return {name: quant for name, quant in found.items() if quant is not None and not quant.signed}
