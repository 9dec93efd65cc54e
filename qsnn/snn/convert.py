"""convert(): every quantized ReLU becomes an IF neuron whose threshold is read from the quantizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, cast, overload

import torch
from torch import Tensor, fx, nn

from qsnn.data.memory import fewer, room, within
from qsnn.graph.arrived import arrived, refuse_state, set_training_flags_, training_flags
from qsnn.graph.compare import refuse_not_finite
from qsnn.graph.kinds import CLASSES, does
from qsnn.graph.modules import Gate
from qsnn.graph.pools import moved_max_pools, over_channels, reroute
from qsnn.graph.product import Product
from qsnn.graph.recipe import child_recipe, data_recipe, recipe_of, set_recipe
from qsnn.graph.spell import trace
from qsnn.graph.trace import (
    add_module,
    call_nodes,
    module_of,
    refuse,
    replace_module,
    spelled,
    takes_frames,
    unknown_layers,
    value_shapes,
)
from qsnn.options import expect
from qsnn.quant.activations import HalfQuant, act_quant_of, is_sign, level_quant
from qsnn.quant.calibrate import calibration_images
from qsnn.quant.quantize import spelled_copy
from qsnn.snn.backward import AveragePool2d
from qsnn.snn.calibrate import correct_
from qsnn.snn.config import ConvertConfig
from qsnn.snn.counts import CountProduct, refuse_online
from qsnn.snn.equations import Dynamics
from qsnn.snn.network import SNN
from qsnn.snn.neurons import GateNode, IFNode, PlusMinus, Repeat, amplified


@overload
def convert(
    model: nn.Module, data: Any = None, config: ConvertConfig | None = None, *, memory: int | str | None = None
) -> SNN: ...
@overload
def convert(
    model: nn.Module,
    data: Any = None,
    config: ConvertConfig | None = None,
    *,
    timesteps: Sequence[int],
    memory: int | str | None = None,
) -> dict[int, SNN]: ...
def convert(
    model: nn.Module,
    data: Any = None,
    config: ConvertConfig | None = None,
    *,
    timesteps: Sequence[int] | None = None,
    memory: int | str | None = None,
) -> SNN | dict[int, SNN]:
    r"""Return a spiking copy of a network; quantized weights stay Brevitas weights, and stay trainable.

    A quantized ReLU with step s and L levels becomes an :class:`~qsnn.IFNode` with :math:`\theta = s\,L` and
    :math:`v_0 = \theta/2`; its spikes carry the amplitude θ, so that every layer behind it sees on average what it saw
    before. A ±1 activation becomes a neuron with :math:`v_0 = \theta`, which fires at x >= 0, and 2·spike - 1 behind
    it; such a network runs one step. A gate becomes a :class:`~qsnn.snn.neurons.GateNode`. A max pool before its
    activation is moved behind it (both are monotone).

    A plain ReLU becomes a neuron with one θ a channel, calibrated on ``data``. Given data, the layers are then
    corrected one by one on the spikes that really arrive (:func:`qsnn.snn.calibrate.correct_`), also those of a
    quantized network: it answers better in few online steps, and no longer equals that network when it fires deferred.

    Args:
        model: what :func:`qsnn.quantize` returned, calibrated or trained; or a float network of ReLUs. Not changed.
        data: calibration images: a :class:`~qsnn.Data` (its training images are used), a Dataset, or an iterable
            of (images, labels); plain ReLUs need it.
        config: T and the way of firing of calls that name none, the neurons, the calibration. May stand second.
        timesteps: several T at once: a spiking network for each of them, calibrated for it, in a dict by T. They share
            one trace and one run of the network; ``config.timesteps`` is not used.
        memory: what calibration may take, bytes or "512M"; default 1 GiB. Where its images do not fit, fewer are used,
            with a warning.
    Raises:
        ValueError: nothing to convert, a quantizer without a step, plain ReLUs without data, or what has no faithful
            spiking form (all of it is named).
        TypeError: ``config`` is not a ConvertConfig.

    >>> import qsnn
    >>> data = qsnn.load_data("digits")
    >>> snn = qsnn.convert(qsnn.quantize(qsnn.create_model("study", data), data), qsnn.ConvertConfig(timesteps=2))
    >>> images, labels = next(qsnn.batches(data.test, 4))
    >>> snn(images).shape  # the answer after one step, and after two
    torch.Size([2, 4, 10])
    """
    if isinstance(data, ConvertConfig) and config is None:
        data, config = None, data
    expect("convert(qann), or convert(model, data)", "model", model, nn.Module)
    config = ConvertConfig() if config is None else config
    if not isinstance(config, ConvertConfig) or isinstance(data, nn.Module | dict):
        got = type(data if isinstance(config, ConvertConfig) else config).__name__
        raise TypeError(
            f"expected a ConvertConfig, got {got}; call convert(qann, ConvertConfig(...)), or "
            f"convert(model, data, ConvertConfig(...)) to calibrate"
        )
    steps = (config.timesteps,) if timesteps is None else tuple(timesteps)
    if not steps:
        raise ValueError("expected timesteps such as (1, 2, 4), got none")
    configs = [replace(config, timesteps=step) for step in dict.fromkeys(steps)]
    model = arrived(model)
    if isinstance(model, SNN) or recipe_of(model).get("kind") in ("snn", "student", "folded"):
        raise ValueError(f"expected a float or a quantized network, got {type(model).__name__}, which spikes already")
    refuse_state(model, "convert", numbers=not spelled(model))
    images = None
    if data is not None:
        images = calibration_images(getattr(data, "train", data), config.calibration_images)
        in_time = takes_frames(model, images)
        images = images.mean(1) if in_time else images
    elif not spelled(model):
        plain = sum(isinstance(module, CLASSES["fires"]) for module in model.modules())
        raise ValueError(
            f"{type(model).__name__} holds {plain} nn.ReLU that are not quantized; call quantize(model, data) "
            f"first, or convert(model, data) to calibrate them"
        )
    network = copy.deepcopy(model) if images is None or spelled(model) else _spelled(model, images)
    network, moved = _prepared(network, config)
    if images is not None:
        shapes = value_shapes(network, tuple(images.shape[1:]))
        bad = over_channels(network, shapes, lambda module: does(module) == "fires")
        several = "a maximum over channels, each of which gets a threshold of its own; quantize(model, data) first"
        refuse([f"{name} ({several})" for name in bad], "convert")
    plain = sum(does(module) == "fires" for _, module in call_nodes(network))
    if plain and images is None:
        raise ValueError(
            f"{type(model).__name__} holds {plain} nn.ReLU that are not quantized; call quantize(model, data) "
            f"first, or convert(model, data) to calibrate them"
        )
    snns = [_spiking(copy.deepcopy(network), moved, one).eval() for one in configs]
    if images is not None:
        largest = max(math.prod(shape) for shape in value_shapes(network, tuple(images.shape[1:])).values())
        with within(memory):
            groups = _side_by_side(snns, images, largest)
        for group, some in groups:
            correct_(
                group, network.eval(), some, threshold=config.threshold, percentile=config.percentile,
                correction=config.correction, initial=config.initial, targets=config.targets,
            )  # fmt: skip
    for snn, one in zip(snns, configs, strict=True):
        if images is not None:
            refuse_not_finite(snn, "convert", images)
        set_recipe(snn, child_recipe(model, "snn", convert=asdict(one)))
        if images is not None:
            corrected = config.correction != "none"
            recipe = {**recipe_of(snn), "input_shape": list(images.shape[1:]), "corrected": corrected}
            recorded = data_recipe(data, in_time=in_time)
            set_recipe(snn, {**recipe, "data": recorded} if recorded else recipe)
        snn.train(model.training)
        set_training_flags_(snn.network, training_flags(model))  # frozen batch norms stay frozen
    return snns[0] if timesteps is None else {snn.timesteps: snn for snn in snns}


def _side_by_side(snns: list[SNN], images: Tensor, largest: int) -> list[tuple[list[SNN], Tensor]]:
    """Which spiking networks are calibrated at one time, and the images: for each T as many as it would have alone."""

    def needed(group: list[SNN]) -> int:
        """A few values in float32 for the reference, and spikes in bytes for each T [byte an image]."""
        return largest * (16 + 4 * sum(snn.timesteps for snn in group))

    groups, waiting = [], list(snns)
    while waiting:
        group = [waiting.pop(0)]
        some = fewer(images, needed(group), "convert")
        for snn in list(waiting):
            as_many = min(len(images), room(needed([snn]))) == len(some)
            if as_many and len(some) <= room(needed([*group, snn])):
                group.append(snn)
                waiting.remove(snn)
        groups.append((group, some))
    return groups


def _spelled(model: nn.Module, images: Tensor) -> fx.GraphModule:
    return spelled_copy(model, images, lambda module: act_quant_of(module) is not None)


def is_activation(module: nn.Module) -> bool:
    """Return whether a neuron takes this module's place."""
    quant = level_quant(module)
    return does(module) == "fires" or is_sign(module) or (quant is not None and not quant.signed)


def _prepared(network: Any, config: ConvertConfig) -> tuple[fx.GraphModule, dict[str, str]]:
    """The network ready for neurons, in place: what cannot spike refused, max pools behind activations, biases."""
    refuse(_places(network, config), "convert")
    if config.firing == "online":
        refuse_online(network, "the spiking network")
    if not any(is_activation(module) for _, module in call_nodes(network)):
        raise ValueError(
            f"nothing to convert in {type(network).__name__}: it holds no nn.ReLU and no quantized ReLU; put nn.ReLU "
            f"in the place of its activations and train again"
        )
    moved = moved_max_pools(network, lambda module: is_activation(module) or does(module) == "decides")
    network.recompile()
    for _, layer in call_nodes(network):
        plain = does(layer) == "weighs" and not hasattr(layer, "weight_quant")
        if plain and layer.bias is None:  # a correction needs one; quantized layers keep theirs
            channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            zeros = layer.weight.new_zeros(cast(int, channels))
            layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    return network, moved


def _places(network: fx.GraphModule, config: ConvertConfig) -> list[str]:
    """Everything that has no faithful spiking form, with what to do about it."""
    strict = config.strict and config.firing == "online"
    bad = unknown_layers(network, lambda module: act_quant_of(module) is not None)
    for node, module in call_nodes(network):
        name = f"{node.target} ({type(module).__name__}"
        if isinstance(act_quant_of(module), HalfQuant):
            bad.append(f"{name} of fp16: no spiking form; quantize with levels or act_bits)")
        elif is_sign(module) and not config.dynamics(0).plain:
            bad.append(f"{node.target} (±1, which has one step: leave reset, tau, signed and state_bits alone)")
        elif does(module) == "takes maxima" and config.signed:
            bad.append(f"{name} of signed spikes: use average pooling)")
        elif does(module) == "takes maxima" and strict:
            bad.append(f"{name} of online spikes: use average pooling, or firing='deferred')")
    return bad


@torch.no_grad()
def as_qann(student: SNN, qann: nn.Module) -> nn.Module:
    """Return a copy of a quantized network with the weights, batch norms and thresholds of a student made from it.

    Fired deferred at T = L the student equals this network, which :func:`qsnn.certify` proves.

    Args:
        student: from :func:`qsnn.distill`.
        qann: the network that :func:`convert` was given.
    Raises:
        TypeError: they are not an SNN and a network.
        ValueError: the student has no such twin: another neuron than the IF of one θ and v₀ = θ/2, or other layers.
    """
    call = "as_qann(student, qann)"
    expect(call, "student", student, SNN)
    expect(call, "qann", qann, nn.Module)
    twin = copy.deepcopy(qann)
    for name, module in student.network.named_modules():
        if isinstance(module, IFNode):
            try:
                quant = level_quant(twin.get_submodule(name))
            except AttributeError:
                raise ValueError(f"the two networks have different layers; look at {name}") from None
            if not module.dynamics.plain or module.threshold.dim() or bool((module.initial != 0.5).any()):
                raise ValueError(
                    f"{name} is no IF neuron of one threshold and half of it at the start, which the quantized network "
                    f"has; distill with train_threshold and train_initial of '' (or the threshold by 'layer')"
                )
            if quant is not None and float(quant.step.double() * quant.levels) != float(module.threshold):
                quant.set_threshold_(module.threshold)
        elif does(module) in ("weighs", "normalises", "decides", "scales", "shifts") or level_quant(module) is not None:
            try:
                twin.get_submodule(name).load_state_dict(module.state_dict())
            except (AttributeError, RuntimeError) as error:
                raise ValueError(f"the two networks have different layers; look at {name}") from error
    return twin


def spiking_structure(model: nn.Module, config: ConvertConfig, shape: tuple[int, ...]) -> SNN:
    """Return the spiking network with thresholds and corrections still to be loaded, as ``load`` needs it."""
    network = trace(model, shape)
    network, moved = _prepared(network, config)
    snn = _spiking(network, moved, config)
    set_recipe(snn, child_recipe(model, "snn", convert=asdict(config)))
    return snn


def _spiking(network: fx.GraphModule, moved: dict[str, str], config: ConvertConfig) -> SNN:
    place = 0
    for node, module in list(call_nodes(network)):
        if type(module) is nn.AvgPool2d:
            replace_module(network, str(node.target), _lean(module))
        if is_activation(module):
            _to_neuron_(network, node, config.dynamics(place))
            place += 1
        elif isinstance(module, Gate):
            replace_module(network, str(node.target), GateNode(module).to(module.level.device))
        elif isinstance(module, Product):
            replace_module(network, str(node.target), CountProduct(module.equation))
    if len(config.tau) not in (0, 1, place):
        raise ValueError(f"expected one time constant, or one for each of {place} spiking layers, got {config.tau}")
    _repeat_static_(network)
    network.graph.lint()
    network.recompile()
    return SNN(network, config.timesteps, config.firing, probes=moved)


def _lean(pool: nn.AvgPool2d) -> AveragePool2d:
    return AveragePool2d(
        pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad, pool.divisor_override
    )


def _to_neuron_(network: fx.GraphModule, node: fx.Node, dynamics: Dynamics) -> None:
    """Put an IF neuron in the place of an activation, and multiply its spikes by θ."""
    name = str(node.target)
    module = network.get_submodule(name)
    quant = level_quant(module)
    if quant is None and does(module) != "fires":  # ±1: from v0 = θ the neuron fires at x >= 0
        replace_module(network, name, IFNode(1.0, initial=1.0))
        with network.graph.inserting_after(node):
            signs = network.graph.call_module(add_module(network, f"{name}_sign", PlusMinus()), (node,))
        reroute(node, signs)
        return
    if quant is None:
        threshold = torch.ones(1, dtype=torch.float64)  # one a channel, once the calibration has seen them
    else:
        with torch.no_grad():
            threshold = quant.step.double() * quant.levels
        if not bool(threshold.isfinite()):
            raise ValueError(f"the quantizer of {name} has no step yet; calibrate it with quantize(model, data)")
    neuron = IFNode(threshold, dynamics=dynamics)
    replace_module(network, name, neuron.to(threshold.device))
    with network.graph.inserting_after(node):
        amplitude = network.graph.get_attr(f"{name}.threshold")
    with network.graph.inserting_after(amplitude):
        scaled = network.graph.call_function(amplified, (node, amplitude))
    reroute(node, scaled)


def _repeat_static_(network: fx.GraphModule) -> None:
    """Insert a :class:`Repeat` wherever a value computed once meets the part that runs in time.

    A neuron takes such a value as it is, and knows that it stands for every step. So does a product of counts where it
    comes of other products alone.
    """
    dynamic: set[fx.Node] = set()
    counted: set[fx.Node] = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        sources = [source for source in node.all_input_nodes if source.op != "get_attr"]
        begins = isinstance(module, IFNode | GateNode) or node.op == "output"
        if isinstance(module, CountProduct) or (sources and not begins and counted.issuperset(sources)):
            counted.add(node)  # once an image, like the front of the network
        elif begins or any(source in dynamic or source in counted for source in sources):
            dynamic.add(node)
    repeated: dict[fx.Node, fx.Node] = {}

    def in_time(source: Any) -> Any:
        if not isinstance(source, fx.Node) or source in dynamic or source.op == "get_attr":
            return source
        if source not in repeated:
            with network.graph.inserting_after(source):
                repeated[source] = network.graph.call_module(add_module(network, "repeat", Repeat()), (source,))
        return repeated[source]

    for node in list(network.graph.nodes):
        module = module_of(network, node)
        if isinstance(module, IFNode) and node.all_input_nodes[0] not in dynamic:
            module.constant_input = True
        elif isinstance(module, CountProduct):
            module.timed = (node.args[0] not in counted, node.args[1] not in counted)
            node.args = tuple(in_time(a) if timed else a for a, timed in zip(node.args, module.timed, strict=True))
        elif node in dynamic:
            node.args = fx.node.map_arg(node.args, in_time)
            node.kwargs = fx.node.map_arg(node.kwargs, in_time)
