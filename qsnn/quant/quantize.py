"""quantize(): a trained float model becomes a low-precision model of Brevitas layers, calibrated on data."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import brevitas.nn as qnn
import torch
from torch import Tensor, fx, nn

from qsnn.data.memory import fewer, peak_of, within
from qsnn.graph.arrived import arrived, evaluating, refuse_state
from qsnn.graph.compare import refuse_not_finite, same_answers
from qsnn.graph.kinds import does
from qsnn.graph.pools import moved_max_pools
from qsnn.graph.recipe import child_recipe, data_recipe, recipe_of, set_recipe
from qsnn.graph.spell import trace
from qsnn.graph.trace import add_module, call_nodes, replace_module, takes_frames
from qsnn.options import ActBits, Factor, Images, InputBits, Levels, WeightBits, check_options, expect
from qsnn.quant.activations import HalfActQuant, LevelActQuant, LevelQuant, SignActQuant, level_quant
from qsnn.quant.calibrate import calibrate_, calibration_images
from qsnn.quant.weights import IntegerWeightQuant, XnorWeightQuant, weight_quantizer

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.Conv3d: qnn.QuantConv3d,
    nn.ConvTranspose1d: qnn.QuantConvTranspose1d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
    nn.Linear: qnn.QuantLinear,
}
_KEEP_STEPS = ("moves", "passes", "takes maxima", "averages")
"""What a quantized value passes through and stays a multiple of its step (or a mean of multiples)."""
ACT_FORMS = ("levels", "sign", "fp16", "float")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """The precision of every part of a network, and how its activations are calibrated."""

    weight_bits: WeightBits = 4
    """Bits of the weights: 1 (XNOR), 2 to 8 (integers), 16 (fp16), 32 (float)."""
    act_bits: ActBits | None = None
    """Bits of the activations: L = 2**act_bits - 1 levels. Give this or ``levels``."""
    levels: Levels | None = None
    """Nonzero activation levels L. Default: 2, or from ``act_bits``. The SNN equals the QANN at T = L."""
    act_form: str = "levels"
    """"levels" (integers from 0 to L), "sign" (±1), "fp16" or "float"; only the first two have a spiking form."""
    weight_form: str = "xnor"
    """1-bit weights: "xnor" (scale mean|w| per output channel) or "sign" (one constant scale)."""
    input_bits: InputBits | None = 8
    """Bits of the signed input quantizer; None leaves the input as it is."""
    first_last_bits: WeightBits | None = 8
    """Bits of the first and the last layer's weights; None treats them like the others."""
    overrides: dict[str, WeightBits] = field(default_factory=dict)
    """Weight bits by layer name pattern, e.g. {"head*": 8}; the last match wins."""
    threshold_scale: Factor = 1.0
    """Factor on the activations' calibrated thresholds [1]: below 1 more of them saturate, the spikes of a converted
    network come more evenly in time, and few online steps lose less; the quantized network itself loses a little."""
    signed: bool = False
    """Take LeakyReLU and PReLU, slope α: as relu(x) - α·relu(-x), so that their negative side has levels of its own."""
    calibration_images: Images = 512
    """Training images that set the activation steps."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: a type or a range that is not the field's, or two options that contradict each other.
        """
        check_options(self)
        given = {"weight_bits": self.weight_bits, "first_last_bits": self.first_last_bits, **self.overrides}
        for name, bits in given.items():
            if bits is not None:
                try:
                    weight_quantizer(bits)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        if self.act_form not in ACT_FORMS:
            raise ValueError(f"act_form must be one of {', '.join(ACT_FORMS)}, got {self.act_form!r}")
        if self.weight_form not in ("xnor", "sign"):
            raise ValueError(f"weight_form must be 'xnor' or 'sign', got {self.weight_form!r}")
        if self.act_bits is not None and self.levels is not None and self.levels > 2**self.act_bits - 1:
            raise ValueError(f"{self.levels} levels do not fit into act_bits={self.act_bits}; give only one of the two")

    @property
    def resolved_levels(self) -> int:
        """L: ``levels``, or 2**act_bits - 1, or 2."""
        if self.levels is not None:
            return self.levels
        return 2 if self.act_bits is None else 2**self.act_bits - 1


def quantize(
    model: nn.Module, data: Any = None, config: QuantizeConfig | None = None, *, memory: int | str | None = None
) -> fx.GraphModule:
    r"""Return a low-precision copy of a trained float model, its activation steps calibrated on data.

    Every ``nn.Conv``, ``nn.Linear`` and ReLU (module or function) becomes Brevitas' quantized layer, and the input
    gets a signed quantizer of its own. Activations follow :class:`~qsnn.quant.activations.LevelQuant`,
    :math:`y = s\,\mathrm{clip}(\lfloor x/s + \tfrac12 \rfloor, 0, L)`; each step s is the one with the least
    mean-squared error on what really arrives there, given the quantized layers before it. A gate
    (:class:`qsnn.Gate`) is 0 or 1 already; its level is moved so that it passes as often as before.

    Args:
        model: a trained model with ReLU activations that torch.fx can follow. It is not changed.
        data: a :class:`~qsnn.Data` (its training images are used), a Dataset, or an iterable of (images, labels).
        config: precision and calibration.
        memory: what calibration may take, bytes or "512M"; default 1 GiB. Where its images do not fit, fewer are used,
            with a warning.
    Raises:
        ValueError: nothing to quantize, a layer that is not supported (all of them are named), a copy that does not
            answer as the model does, or no data.

    >>> import qsnn
    >>> data = qsnn.load_data("digits")
    >>> qann = qsnn.quantize(qsnn.create_model("study", data), data, qsnn.QuantizeConfig(weight_bits=1, levels=2))
    >>> qsnn.integer_weights(qann.get_submodule("3"))[0].unique()
    tensor([-1,  1], dtype=torch.int8)
    """
    expect("quantize(model, data)", "model", model, nn.Module)
    config = QuantizeConfig() if config is None else config
    if not isinstance(config, QuantizeConfig):
        raise TypeError(f"expected a QuantizeConfig, got {type(config).__name__}; call quantize(model, data, config)")
    if data is None:
        raise ValueError("quantize needs data to calibrate on: quantize(model, data, config)")
    model = arrived(model)
    kind = recipe_of(model).get("kind", "teacher")
    if kind != "teacher":
        raise ValueError(f"expected a float network, got one of kind {kind!r}; quantize the one that it was made from")
    refuse_state(model, "quantize")
    frames = calibration_images(getattr(data, "train", data), config.calibration_images)
    in_time = takes_frames(model, frames)
    images = frames.mean(1) if in_time else frames
    network = spelled_copy(model, images, signed=config.signed)
    with within(memory), torch.no_grad(), evaluating(network):
        # the quantized network holds what the float one does, and at each quantizer a quotient and an answer besides
        images = fewer(images, 2 * peak_of(network, images[:1]), "quantize")
    qann = _quantized(network, config)
    recipe = {**child_recipe(model, "qann", quantize=asdict(config)), "input_shape": list(images.shape[1:])}
    recorded = data_recipe(data, in_time=in_time)
    if recorded:
        recipe["data"] = recorded
    set_recipe(qann, recipe)
    calibrate_(qann, images, network)
    if in_time:  # the spiking network will see single frames, which reach further than their mean
        for module in qann.modules():
            quant = level_quant(module)
            if quant is not None and quant.signed:
                quant.calibrate_(frames)
    refuse_not_finite(qann, "quantize", frames)
    return qann


def spelled_copy(
    model: nn.Module, images: Tensor, known: Callable[[nn.Module], bool] = lambda module: False, *, signed: bool = False
) -> fx.GraphModule:
    """Return the graph of a user's network, checked: it answers these images as the network itself does.

    Args:
        model: not changed.
        images: (B, \\*).
        known: whether a layer is taken that no row of the table names.
        signed: take LeakyReLU and PReLU, each as two activations.
    Raises:
        ValueError: it cannot be followed, holds layers without a spiking form, or answers otherwise.
    """
    network = trace(model, tuple(images.shape[1:]), known, signed=signed)
    same_answers(model, network, images[:8])
    return network


def quantized_structure(model: nn.Module, config: QuantizeConfig, shape: tuple[int, ...]) -> fx.GraphModule:
    """Return the quantized copy with its activation steps still unset (NaN), as ``load`` needs it."""
    network = trace(model, shape, signed=config.signed)
    qann = _quantized(network, config)
    set_recipe(qann, child_recipe(model, "qann", quantize=asdict(config)))
    return qann


def _quantized(network: fx.GraphModule, config: QuantizeConfig) -> fx.GraphModule:
    """A copy of a spelled network with quantized layers in the place of its own."""
    model, network = type(network).__name__, copy.deepcopy(network)
    names: dict[str, list[str]] = {"weighs": [], "fires": []}  # a gate stays: its one level is all its precision
    for node, module in call_nodes(network):
        found = names.get(does(module) or "")
        if found is not None and str(node.target) not in found:
            found.append(str(node.target))
    weighted, relus = names["weighs"], names["fires"]
    if not relus or not weighted:
        raise ValueError(
            f"nothing to quantize in {model}: it holds {len(weighted)} convolution or linear layers and {len(relus)} "
            f"ReLUs, and needs both; put nn.ReLU between its layers and train again"
        )
    idle = [pattern for pattern in config.overrides if not fnmatch.filter(weighted, pattern)]
    if idle:
        raise ValueError(f"overrides: {', '.join(map(repr, idle))} match no layer; there are {', '.join(weighted)}")
    moved_max_pools(copy.deepcopy(network))  # refuses what convert would refuse after the training
    with torch.random.fork_rng():  # a new layer draws weights, which are then overwritten
        for name in weighted:
            old = network.get_submodule(name)
            replace_module(network, name, _quantized_layer(old, name, weighted, config).train(old.training))
    for name in relus if config.act_form != "float" else ():
        old = network.get_submodule(name)
        replace_module(network, name, _activation(config, old).train(old.training))
    if config.input_bits is not None:
        _quantize_input_(network, config.input_bits)
    _share_steps_(network)
    network.graph.lint()
    network.recompile()
    return network


def _share_steps_(network: fx.GraphModule) -> None:
    """Let quantized outputs that meet (concatenation, addition of spikes) share one step, in place.

    Only then is what the next layer sees an integer times one scale. Found by union over the graph, through all that
    moves values without changing them.
    """
    sources: dict[fx.Node, list[LevelQuant]] = {}
    groups: dict[LevelQuant, list[LevelQuant]] = {}
    for node, module in call_nodes(network):
        quant, what = level_quant(module), does(module)
        inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
        if quant is not None and not quant.signed:
            sources[node], groups[quant] = [quant], [quant]
        elif what in _KEEP_STEPS:
            if inputs and inputs[0] in sources:
                sources[node] = sources[inputs[0]]
        elif what == "gates":  # 0 or 1 times a value keeps the value's step
            if inputs[-1] in sources:
                sources[node] = sources[inputs[-1]]
        elif what in ("adds", "joins") and inputs and all(i in sources for i in inputs):
            sources[node] = list(dict.fromkeys(quant for source in inputs for quant in sources[source]))
            merged = list(dict.fromkeys(member for quant in sources[node] for member in groups[quant]))
            for member in merged:
                groups[member] = merged
    for first, *others in groups.values():
        for other in others:
            other.share_step_(first)


def _bits_of(name: str, weighted: list[str], config: QuantizeConfig) -> int:
    bits = config.weight_bits
    if config.first_last_bits is not None and name in (weighted[0], weighted[-1]):
        bits = max(bits, config.first_last_bits)
    for pattern, value in config.overrides.items():
        if fnmatch.fnmatch(name, pattern):
            bits = value
    return bits


def _quantized_layer(layer: Any, name: str, weighted: list[str], config: QuantizeConfig) -> nn.Module:
    """Return the Brevitas layer of the same shape that shares no memory with ``layer``."""
    options = {"bias": layer.bias is not None, **weight_quantizer(_bits_of(name, weighted, config), config.weight_form)}
    make: Any = next(new for old, new in _LAYERS.items() if isinstance(layer, old))
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
    if isinstance(layer, nn.Linear):
        new = make(layer.in_features, layer.out_features, **options)
    else:
        places = ("stride", "padding", "dilation", "groups", *(("output_padding",) if transposed else ()))
        options |= {place: getattr(layer, place) for place in places}
        if transposed and options.get("weight_quant") is IntegerWeightQuant:
            options["weight_channel_dim"] = 1
        elif transposed and options.get("weight_quant") is XnorWeightQuant:
            options["weight_out_channels"] = layer.out_channels // layer.groups  # as many scales as its weights have
        new = make(layer.in_channels, layer.out_channels, layer.kernel_size, **options)
    for mine, given in ((new.weight, layer.weight), (new.bias, layer.bias)):
        if given is not None:
            mine.requires_grad_(given.requires_grad).data.copy_(given)  # what was frozen stays frozen
    quantized: nn.Module = new.to(layer.weight.device)
    return quantized


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
    quant.cap = getattr(relu, "cap", math.inf)
    return module


def _quantize_input_(network: fx.GraphModule, bits: int) -> None:
    (placeholder,) = [node for node in network.graph.nodes if node.op == "placeholder"]
    levels = 2 ** (bits - 1) - 1
    name = add_module(
        network, "input_quant", qnn.QuantIdentity(act_quant=LevelActQuant, levels=levels, bit_width=bits, signed=True)
    )
    network.get_submodule(name).train(network.training)
    with network.graph.inserting_after(placeholder):
        node = network.graph.call_module(name, (placeholder,))
    placeholder.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def activation_quants(qann: nn.Module) -> dict[str, LevelQuant]:
    """Return the unsigned activation quantizers by the name of the layer that holds them, in module order."""
    found = {name: level_quant(module) for name, module in qann.named_modules()}
    return {name: quant for name, quant in found.items() if quant is not None and not quant.signed}
