"""What a network must be before neurons can take the place of its activations."""

from __future__ import annotations

import torch
from torch import fx, nn

from qsnn.graph import (
    ADD_FUNCTIONS,
    ADD_METHODS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    LAYERS,
    MAX_POOLS,
    MOVE_FUNCTIONS,
    PASSED,
    RELUS,
    VIEW_METHODS,
    call_nodes,
    is_call,
    module_of,
    modules_for_functions,
    shape_nodes,
    trace,
    unshare,
    zero_pads,
)
from qsnn.quantizers import HalfQuant, act_quant_of, is_sign, level_quant


def prepared(model: nn.Module, *, strict: bool, special: bool, signed: bool) -> tuple[fx.GraphModule, dict[str, str]]:
    """A copy of the model, ready for neurons: functions made modules, max pools moved; and where they were moved to."""
    network = trace(model)
    modules_for_functions(network)
    unshare(network)
    _refuse(network, strict, special, signed)
    if not any(is_activation(module) for _, module in call_nodes(network)):
        raise ValueError(
            f"nothing to convert in {type(model).__name__}: it holds no nn.ReLU and no quantized ReLU; put nn.ReLU in "
            f"the place of its activations and train again"
        )
    moved = _move_max_pools_(network)
    for _, layer in call_nodes(network):
        if type(layer) in LAYERS and layer.bias is None:  # a correction needs one; quantized layers keep theirs
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    return network, moved


def reroute(node: fx.Node, to: fx.Node) -> None:
    """Let every user of ``node`` but ``to`` itself take ``to`` instead."""
    node.replace_all_uses_with(to, delete_user_cb=lambda user: user is not to)


def is_activation(module: nn.Module | None) -> bool:
    """Whether a neuron takes this module's place."""
    quant = None if module is None else level_quant(module)
    return type(module) in RELUS or (module is not None and is_sign(module)) or (quant is not None and not quant.signed)


def _refuse(network: fx.GraphModule, strict: bool, special: bool, signed: bool) -> None:
    """Name everything that has no faithful spiking form, all at once."""
    sizes, bad = shape_nodes(network), []
    known = (*RELUS, *LAYERS, *BATCH_NORMS, *MAX_POOLS, *AVERAGE_POOLS, *PASSED, nn.Flatten)
    moving = (*MOVE_FUNCTIONS, torch.cat, getattr, *ADD_FUNCTIONS)
    for node in network.graph.nodes:
        module = module_of(network, node)
        if module is not None:
            kind = type(module).__name__
            if isinstance(act_quant_of(module), HalfQuant):
                bad.append(f"{node.target} ({kind} of fp16: no spiking form; quantize with levels or act_bits)")
            elif isinstance(module, BATCH_NORMS) and module.running_mean is None:
                bad.append(
                    f"{node.target} ({kind} of each batch's own statistics: train with track_running_stats=True)"
                )
            elif isinstance(module, MAX_POOLS) and signed:
                bad.append(f"{node.target} ({kind} of signed spikes: use average pooling)")
            elif is_sign(module) and special:
                bad.append(f"{node.target} (±1, which has one step: leave reset, tau, signed and state_bits alone)")
            elif isinstance(module, MAX_POOLS) and strict:
                bad.append(f"{node.target} ({kind} of online spikes: use average pooling, or firing='deferred')")
            elif not isinstance(module, known) and not hasattr(module, "act_quant"):
                bad.append(f"{node.target} ({kind})")
        elif node.op in ("call_function", "call_method") and node not in sizes:
            zero_pads(node)
            if not is_call(node, moving, (*VIEW_METHODS, *ADD_METHODS, "flatten")):
                bad.append(f"{node.name} ({getattr(node.target, '__name__', node.target)})")
    if bad:
        raise ValueError(
            f"cannot convert {', '.join(bad)}: ReLU, ReLU6, Conv, Linear, BatchNorm, pooling, Dropout, Flatten, "
            f"addition, concatenation and views have a spiking form; put nn.ReLU in the place of other activations "
            f"and BatchNorm in the place of other norms, and train again"
        )


def _move_max_pools_(network: fx.GraphModule) -> dict[str, str]:
    """Move each max pool that stands before its activation behind it; in between only a batch norm with γ >= 0.

    Returns the pool's name for each activation that it was moved behind: there the network holds what the activation
    held before.
    """
    moved: dict[str, str] = {}
    for pool, module in list(call_nodes(network)):
        if not isinstance(module, MAX_POOLS) or all(_quantized(network, node) for node in pool.all_input_nodes):
            continue
        path = [pool]
        while True:
            users = list(path[-1].users)
            after = module_of(network, users[0]) if len(users) == 1 else None
            if is_activation(after):
                break
            if not isinstance(after, BATCH_NORMS):
                raise ValueError(
                    f"the max pool {pool.target} sees a current, or averaged spikes, and is not followed by an "
                    f"activation it could be moved behind; use average pooling there"
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
        reroute(activation, behind)
        network.graph.erase_node(pool)
        moved[str(activation.target)] = str(pool.target)
    return moved


def _quantized(network: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a value comes from activations alone, through what moves, pools, joins or drops values."""
    module = module_of(network, node)
    if is_activation(module):
        return True
    joins = is_call(node, (torch.cat, *MOVE_FUNCTIONS, *ADD_FUNCTIONS), (*VIEW_METHODS, *ADD_METHODS))
    if not joins and not isinstance(module, (*MAX_POOLS, nn.Dropout, nn.Dropout2d, nn.Identity)):
        return False
    tensors = [source for source in node.all_input_nodes if source not in shape_nodes(network)]
    return bool(tensors) and all(_quantized(network, source) for source in tensors)
