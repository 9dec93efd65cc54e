"""convert(): every quantized ReLU becomes an IF neuron whose threshold is read from the quantizer."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from qsnn.graph import (
    ADD_FUNCTIONS,
    ADD_METHODS,
    VIEW_FUNCTIONS,
    VIEW_METHODS,
    add_module,
    call_nodes,
    child_recipe,
    is_call,
    module_of,
    replace_module,
    set_recipe,
    shape_nodes,
    trace,
)
from qsnn.neurons import FIRINGS, SNN, IFNode, PlusMinus, Repeat, amplified
from qsnn.quantizers import HalfQuant, act_quant_of, is_sign, level_quant

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How the spiking network runs where a call does not say otherwise."""

    timesteps: int = 2
    """Simulation steps T."""
    firing: str = "online"
    """"online": a neuron fires while its input arrives; "deferred": it integrates all T inputs, then fires."""

    def __post_init__(self) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: T < 1 or an unknown way of firing.
        """
        if not isinstance(self.timesteps, int) or self.timesteps < 1:
            raise ValueError(f"timesteps must be a whole number of at least 1, got {self.timesteps!r}")
        if self.firing not in FIRINGS:
            raise ValueError(f"firing must be 'online' or 'deferred', got {self.firing!r}")


def convert(model: nn.Module, config: ConvertConfig | None = None) -> SNN:
    r"""Return a spiking copy of a quantized network; the Brevitas weights stay, and stay trainable.

    A quantized ReLU with step s and L levels becomes an :class:`~qsnn.neurons.IFNode` with :math:`\theta = s\,L` and
    :math:`v_0 = \theta/2`; its spikes carry the amplitude θ, so that every layer behind it sees on average what it saw
    before. A ±1 activation becomes a neuron with :math:`v_0 = \theta`, which fires at x >= 0, and 2·spike - 1 behind
    it; such a network runs one step. A max pool before its activation is moved behind it (both are monotone).

    Args:
        model: what :func:`qsnn.quantize` returned, calibrated or trained. It is not changed.
        config: T and the way of firing of calls that name none.
    Raises:
        ValueError: nothing to convert, a quantizer without a step, or a max pool that cannot be moved.
        TypeError: ``config`` is not a ConvertConfig.
    """
    config = config or ConvertConfig()
    if not isinstance(config, ConvertConfig):
        raise TypeError(
            f"expected a ConvertConfig, got {type(config).__name__}; call convert(qann, ConvertConfig(...))"
        )
    network = trace(model)
    spiking = _activations(network)
    if not spiking:
        relus = sum(isinstance(module, nn.ReLU) for module in network.modules())
        raise ValueError(
            f"nothing to convert in {type(model).__name__}: it holds {relus} nn.ReLU and no quantized ReLU; "
            f"call quantize(model, data) first"
        )
    moved = _move_max_pools_(network)
    for node in spiking:
        _to_neuron_(network, node)
    _repeat_static_(network)
    network.graph.lint()
    network.recompile()
    snn = SNN(network, config.timesteps, config.firing, probes=moved)
    snn.train(model.training)
    set_recipe(snn, child_recipe(model, "snn", convert=asdict(config)))
    return snn


def _activations(network: fx.GraphModule) -> list[fx.Node]:
    found, bad = [], []
    for node, module in call_nodes(network):
        quant = level_quant(module)
        if is_sign(module) or (quant is not None and not quant.signed):
            found.append(node)
        elif isinstance(act_quant_of(module), HalfQuant):
            bad.append(str(node.target))
    if bad:
        raise ValueError(f"fp16 activations have no spiking form: {', '.join(bad)}; quantize with levels or act_bits")
    return found


def _to_neuron_(network: fx.GraphModule, node: fx.Node) -> None:
    """Put an IF neuron in the place of a quantized ReLU, and multiply its spikes by θ."""
    name = str(node.target)
    module = network.get_submodule(name)
    quant = level_quant(module)
    if quant is None:  # ±1: from v0 = θ the neuron fires at x >= 0
        replace_module(network, name, IFNode(1.0, initial=1.0))
        with network.graph.inserting_after(node):
            signs = network.graph.call_module(add_module(network, f"{name}_sign", PlusMinus()), (node,))
        _reroute(node, signs)
        return
    with torch.no_grad():
        threshold = quant.step.double() * quant.levels
    if not bool(threshold.isfinite()):
        raise ValueError(f"the quantizer of {name} has no step yet; calibrate it with quantize(model, data)")
    neuron = IFNode(threshold)
    replace_module(network, name, neuron.to(threshold.device))
    with network.graph.inserting_after(node):
        amplitude = network.graph.get_attr(f"{name}.threshold")
    with network.graph.inserting_after(amplitude):
        scaled = network.graph.call_function(amplified, (node, amplitude))
    _reroute(node, scaled)


def _reroute(node: fx.Node, to: fx.Node) -> None:
    """Let every user of ``node`` but ``to`` itself take ``to`` instead."""
    node.replace_all_uses_with(to, delete_user_cb=lambda user: user is not to)


def _move_max_pools_(network: fx.GraphModule) -> dict[str, str]:
    """Move each max pool that stands before its activation behind it; in between only a batch norm with γ >= 0.

    Returns the pool's name for each activation that it was moved behind: there the network holds what the activation
    held before.
    """
    moved: dict[str, str] = {}
    for pool, module in list(call_nodes(network)):
        if not isinstance(module, _MAX_POOLS) or all(_quantized(network, node) for node in pool.all_input_nodes):
            continue
        path = [pool]
        while True:
            users = list(path[-1].users)
            after = module_of(network, users[0]) if len(users) == 1 else None
            if after is not None and (level_quant(after) is not None or is_sign(after)):
                break
            if not isinstance(after, _BATCH_NORMS):
                raise ValueError(
                    f"the max pool {pool.target} is not followed by an activation it could be moved behind"
                )
            if after.weight is not None and bool((after.weight < 0).any()):
                raise ValueError(
                    f"the max pool {pool.target} cannot be moved behind its activation: the batch norm "
                    f"{users[0].target} in between has negative γ; put the pool behind the ReLU, or use average pooling"
                )
            path.append(users[0])
        activation = users[0]
        pool.replace_all_uses_with(pool.all_input_nodes[0])
        with network.graph.inserting_after(activation):
            behind = network.graph.call_module(str(pool.target), (activation,))
        _reroute(activation, behind)
        network.graph.erase_node(pool)
        moved[str(activation.target)] = str(pool.target)
    return moved


def _quantized(network: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a value comes from activations alone, through what moves, pools, joins or drops values."""
    module = module_of(network, node)
    if module is not None and (level_quant(module) is not None or is_sign(module)):
        return True
    joins = is_call(node, (torch.cat, *VIEW_FUNCTIONS, operator.getitem, *ADD_FUNCTIONS), (*VIEW_METHODS, *ADD_METHODS))
    if not joins and not isinstance(module, (*_MAX_POOLS, nn.Dropout, nn.Dropout2d, nn.Identity)):
        return False
    tensors = [source for source in node.all_input_nodes if source not in shape_nodes(network)]
    return bool(tensors) and all(_quantized(network, source) for source in tensors)


def _repeat_static_(network: fx.GraphModule) -> None:
    """Insert a :class:`Repeat` wherever a value computed once meets the part that runs in time.

    A neuron takes such a value as it is, and knows that it stands for every step.
    """
    dynamic: set[fx.Node] = set()
    for node in network.graph.nodes:
        module = module_of(network, node)
        if isinstance(module, IFNode) or any(source in dynamic for source in node.all_input_nodes):
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
        elif node in dynamic:
            node.args = fx.node.map_arg(node.args, in_time)
            node.kwargs = fx.node.map_arg(node.kwargs, in_time)
