"""quantize(): a trained float model becomes a low-precision model of Brevitas layers, calibrated on data."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass, field
from typing import Any

import brevitas.nn as qnn
import torch
from torch import fx, nn

from qsnn.calibrate import calibrate_, calibration_images
from qsnn.graph import (
    ADD_FUNCTIONS,
    ADD_METHODS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    MAX_POOLS,
    MOVE_FUNCTIONS,
    PASSED,
    RELUS,
    VIEW_METHODS,
    add_module,
    call_nodes,
    child_recipe,
    data_recipe,
    is_call,
    module_of,
    modules_for_functions,
    recipe_of,
    replace_module,
    set_recipe,
    shape_nodes,
    trace,
    unshare,
    zero_pads,
)
from qsnn.neurons import summed
from qsnn.quantizers import (
    HalfActQuant,
    LevelActQuant,
    LevelQuant,
    SignActQuant,
    level_quant,
)
from qsnn.weights import weight_quantizer

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Linear: qnn.QuantLinear,
}
_MOVES = (*MAX_POOLS, *AVERAGE_POOLS, *PASSED, nn.Flatten)
"""What a quantized value passes through and stays a multiple of its step (or a mean of multiples)."""
_MOVING_METHODS = (*VIEW_METHODS, "flatten")
ACT_FORMS = ("levels", "sign", "fp16", "float")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """The precision of every part of a network, and how its activations are calibrated."""

    weight_bits: int = 4
    """Bits of the weights: 1 (XNOR), 2 to 8 (integers), 16 (fp16), 32 (float)."""
    act_bits: int | None = None
    """Bits of the activations: L = 2**act_bits - 1 levels. Give this or ``levels``."""
    levels: int | None = None
    """Nonzero activation levels L. Default: 2, or from ``act_bits``. The SNN equals the QANN at T = L."""
    act_form: str = "levels"
    """"levels" (integers from 0 to L), "sign" (±1), "fp16" or "float"; only the first two have a spiking form."""
    weight_form: str = "xnor"
    """1-bit weights: "xnor" (scale mean|w| per output channel) or "sign" (one constant scale)."""
    input_bits: int | None = 8
    """Bits of the signed input quantizer; None leaves the input as it is."""
    first_last_bits: int | None = 8
    """Bits of the first and the last layer's weights; None treats them like the others."""
    overrides: dict[str, int] = field(default_factory=dict)
    """Weight bits by layer name pattern, e.g. {"head*": 8}; the last match wins."""
    threshold_scale: float = 1.0
    """Factor on the activations' calibrated thresholds [1]: below 1 more of them saturate, the spikes of a converted
    network come more evenly in time, and few online steps lose less; the quantized network itself loses a little."""
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
        if self.act_form not in ACT_FORMS:
            raise ValueError(f"act_form must be one of {', '.join(ACT_FORMS)}, got {self.act_form!r}")
        if self.weight_form not in ("xnor", "sign"):
            raise ValueError(f"weight_form must be 'xnor' or 'sign', got {self.weight_form!r}")
        if self.act_bits is not None and not 1 <= self.act_bits <= 8:
            raise ValueError(f"act_bits must be 1 to 8, got {self.act_bits}")
        if self.levels is not None and not 1 <= self.levels <= 255:
            raise ValueError(f"levels must be 1 to 255, got {self.levels}")
        if self.act_bits is not None and self.levels is not None and self.levels > 2**self.act_bits - 1:
            raise ValueError(f"{self.levels} levels do not fit into act_bits={self.act_bits}; give only one of the two")
        if self.input_bits is not None and not 2 <= self.input_bits <= 16:
            raise ValueError(f"input_bits must be 2 to 16, or None for a float input, got {self.input_bits}")
        if not 0 < self.threshold_scale < float("inf"):
            raise ValueError(f"threshold_scale must be above 0, got {self.threshold_scale}")
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
    frames = calibration_images(getattr(data, "train", data), config.calibration_images)
    images = summed(frames)
    qann = quantized_structure(model, config)
    recipe = {**recipe_of(qann), "input_shape": list(images.shape[1:])}
    if data_recipe(data):
        recipe["data"] = data_recipe(data)
    set_recipe(qann, recipe)
    calibrate_(qann, images, model)
    if frames.dim() == 5:  # the spiking network will see single frames, which reach further than their mean
        for module in qann.modules():
            quant = level_quant(module)
            if quant is not None and quant.signed:
                quant.calibrate_(frames)
    return qann


def quantized_structure(model: nn.Module, config: QuantizeConfig) -> fx.GraphModule:
    """Return the quantized copy with its activation steps still unset (NaN), as ``load`` needs it."""
    training = model.training
    network = trace(model)
    modules_for_functions(network)
    unshare(network)
    _refuse_unsupported(network)
    weighted = [str(node.target) for node, module in call_nodes(network) if type(module) in _LAYERS]
    relus = [str(node.target) for node, module in call_nodes(network) if type(module) in RELUS]
    if not relus or not weighted:
        raise ValueError(
            f"nothing to quantize in {type(model).__name__}: it holds {len(weighted)} convolution or linear layers "
            f"and {len(relus)} ReLUs, and needs both"
        )
    with torch.random.fork_rng():  # a new layer draws weights, which are then overwritten
        for name in weighted:
            replace_module(network, name, _quantized_layer(network.get_submodule(name), name, weighted, config))
    if config.act_form != "float":
        for name in relus:
            replace_module(network, name, _activation(config, network.get_submodule(name)))
    if config.input_bits is not None:
        _quantize_input_(network, config.input_bits)
    _share_steps_(network)
    network.graph.lint()
    network.recompile()
    network.train(training)
    set_recipe(network, child_recipe(model, "qann", quantize=asdict(config)))
    return network


def _refuse_unsupported(network: fx.GraphModule) -> None:
    """Name everything that has no quantized form, all at once."""
    known = (*_LAYERS, *RELUS, *BATCH_NORMS, *_MOVES)
    sizes = shape_nodes(network)
    bad = []
    for node in network.graph.nodes:
        module = module_of(network, node)
        if module is not None and type(module) not in known:
            bad.append(f"{node.target} ({type(module).__name__})")
        elif node.op in ("call_function", "call_method") and node not in sizes:
            zero_pads(node)
            moves = is_call(node, (*MOVE_FUNCTIONS, getattr), (*VIEW_METHODS, "flatten"))
            if not moves and not is_call(node, (*ADD_FUNCTIONS, torch.cat), ADD_METHODS):
                bad.append(f"{node.name} ({getattr(node.target, '__name__', node.target)})")
    if bad:
        raise ValueError(
            f"cannot quantize {', '.join(bad)}: only Conv, Linear, ReLU, ReLU6, BatchNorm, pooling, Dropout, Flatten, "
            f"addition, concatenation and views are supported; put nn.ReLU in the place of other activations and "
            f"train again"
        )


def _share_steps_(network: fx.GraphModule) -> None:
    """Let quantized outputs that meet (concatenation, addition of spikes) share one step, in place.

    Only then is what the next layer sees an integer times one scale. Found by union over the graph, through all that
    moves values without changing them.
    """
    sources: dict[fx.Node, list[LevelQuant]] = {}
    groups: dict[LevelQuant, list[LevelQuant]] = {}
    for node in network.graph.nodes:
        module = module_of(network, node)
        quant = None if module is None else level_quant(module)
        inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if quant is not None and not quant.signed:
            sources[node], groups[quant] = [quant], [quant]
        elif isinstance(module, _MOVES) or is_call(node, MOVE_FUNCTIONS, _MOVING_METHODS):
            if inputs and inputs[0] in sources:
                sources[node] = sources[inputs[0]]
        elif is_call(node, (*ADD_FUNCTIONS, torch.cat), ADD_METHODS) and inputs and all(i in sources for i in inputs):
            sources[node] = list(dict.fromkeys(quant for source in inputs for quant in sources[source]))
            merged = list(dict.fromkeys(member for quant in sources[node] for member in groups[quant]))
            for member in merged:
                groups[member] = merged
    for first, *others in groups.values():
        for other in others:
            other.scaling_impl, other.samples = first.scaling_impl, first.samples


def _bits_of(name: str, weighted: list[str], config: QuantizeConfig) -> int:
    bits = config.weight_bits
    if config.first_last_bits is not None and name in (weighted[0], weighted[-1]):
        bits = max(bits, config.first_last_bits)
    for pattern, value in config.overrides.items():
        if fnmatch.fnmatch(name, pattern):
            bits = value
    return bits


def _quantized_layer(layer: nn.Module, name: str, weighted: list[str], config: QuantizeConfig) -> nn.Module:
    """Return the Brevitas layer of the same shape that shares no memory with ``layer``."""
    bits = _bits_of(name, weighted, config)
    options = {"bias": layer.bias is not None, **weight_quantizer(bits, config.weight_form)}
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


def _activation(config: QuantizeConfig, relu: nn.Module) -> nn.Module:
    if config.act_form == "sign":
        return qnn.QuantIdentity(act_quant=SignActQuant)
    if config.act_form == "fp16":
        return qnn.QuantReLU(act_quant=HalfActQuant)
    levels = config.resolved_levels
    module = qnn.QuantReLU(act_quant=LevelActQuant, levels=levels, bit_width=max(1, levels.bit_length()))
    quant = level_quant(module)
    assert quant is not None
    quant.threshold_scale = config.threshold_scale
    if isinstance(relu, nn.ReLU6):
        quant.cap = 6.0
    return module


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
