"""What a network becomes when it spikes: a neuron for every activation, and what runs once repeated in time."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch
from torch import fx, nn

from qsnn.graph.kinds import does
from qsnn.graph.modules import Gate
from qsnn.graph.pools import moved_max_pools, reroute
from qsnn.graph.product import Product
from qsnn.graph.recipe import child_recipe, set_recipe
from qsnn.graph.spell import trace
from qsnn.graph.trace import (
    add_module,
    call_nodes,
    module_of,
    refuse,
    replace_module,
    unknown_layers,
)
from qsnn.quant.activations import HalfQuant, act_quant_of, is_sign, level_quant
from qsnn.snn.backward import AveragePool2d
from qsnn.snn.config import ConvertConfig
from qsnn.snn.counts import CountProduct, refuse_online
from qsnn.snn.equations import Dynamics
from qsnn.snn.network import SNN
from qsnn.snn.neurons import GateNode, IFNode, PlusMinus, Repeat, amplified


def is_activation(module: nn.Module) -> bool:
    """Return whether a neuron takes this module's place."""
    quant = level_quant(module)
    return does(module) == "fires" or is_sign(module) or (quant is not None and not quant.signed)


def prepared(network: Any, config: ConvertConfig) -> tuple[fx.GraphModule, dict[str, str]]:
    """The network ready for neurons, in place: what cannot spike refused, max pools behind activations, biases.

    Returns:
        The network; and for each activation behind which a max pool was moved, the name of that pool.
    Raises:
        ValueError: nothing to convert, or what has no faithful spiking form (all of it is named).
    """
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


def spiking_structure(model: nn.Module, config: ConvertConfig, shape: tuple[int, ...]) -> SNN:
    """Return the spiking network with thresholds and corrections still to be loaded, as ``load`` needs it."""
    network = trace(model, shape)
    network, moved = prepared(network, config)
    snn = spiking(network, moved, config)
    set_recipe(snn, child_recipe(model, "snn", convert=asdict(config)))
    return snn


def spiking(network: fx.GraphModule, moved: dict[str, str], config: ConvertConfig) -> SNN:
    """The spiking network of one that is :func:`prepared`, in place; float neurons have no thresholds yet.

    Raises:
        ValueError: another number of time constants than spiking layers, or a quantizer without a step.
    """
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
    repeat_static_(network)
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


def repeat_static_(network: fx.GraphModule) -> None:
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
