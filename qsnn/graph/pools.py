"""Max pools stand behind activations: there they see spikes, whose maximum is exact when they come sorted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from qsnn.graph.kinds import does
from qsnn.graph.trace import call_nodes, module_of

Fires = Callable[[nn.Module], bool]


def reroute(node: fx.Node, to: fx.Node) -> None:
    """Let every user of ``node`` but ``to`` itself take ``to`` instead."""
    node.replace_all_uses_with(to, delete_user_cb=lambda user: user is not to)


def _activates(module: nn.Module) -> bool:
    return does(module) in ("fires", "decides")


def moved_max_pools(network: fx.GraphModule, fires: Fires = _activates) -> dict[str, str]:
    """Move each max pool that stands before its activation behind it, in place; in between only a batch norm, γ >= 0.

    Both are monotone, so the order does not matter. A maximum of sums of spikes, or of means, is not what spikes can
    carry.

    Args:
        network: spelled.
        fires: whether a module is an activation, or a gate.
    Returns:
        For each activation behind which a max pool was moved: the name of that pool, whose output now takes the
        activation's place in comparisons.
    Raises:
        ValueError: a max pool that sees something else and cannot be moved.
    """
    moved: dict[str, str] = {}
    for pool, module in list(call_nodes(network)):
        if does(module) != "takes maxima" or all(_spikes(network, node, fires) for node in pool.all_input_nodes):
            continue
        path = [pool]
        while True:
            users = list(path[-1].users)
            after = module_of(network, users[0]) if len(users) == 1 else None
            if after is not None and fires(after):
                break
            if does(after) != "normalises":
                raise ValueError(
                    f"the max pool {pool.target} sees a current, or sums or means of spikes, and is not followed by an "
                    f"activation it could be moved behind; use average pooling there"
                )
            weight = getattr(after, "weight", None)
            if weight is not None and bool((weight < 0).any()):
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


def _spikes(network: fx.GraphModule, node: fx.Node, fires: Fires) -> bool:
    """Return whether a value holds spikes of activations alone, through what moves, joins, drops or pools them."""
    module = module_of(network, node)
    if module is None:
        return False
    if fires(module):
        return True
    through = does(module) in ("takes maxima", "moves", "passes", "joins", "gates")
    return through and all(_spikes(network, source, fires) for source in node.all_input_nodes)


def over_channels(network: fx.GraphModule, shapes: dict[str, tuple[int, ...]], fires: Fires) -> list[str]:
    """Return the max pools whose windows hold several channels of one activation, moved there by what is in between.

    Args:
        network: spelled.
        shapes: of every node's value for one image, by name.
        fires: whether a module is an activation that gets a threshold a channel.
    """
    found = []
    for pool, module in call_nodes(network):
        if does(module) != "takes maxima":
            continue
        path: list[nn.Module] = []
        node = pool.all_input_nodes[0]
        while (step := module_of(network, node)) is not None and does(step) in ("moves", "passes", "takes maxima"):
            path.append(step)
            node = node.all_input_nodes[0]
        if step is None or not fires(step) or node.name not in shapes or len(shapes[node.name]) < 2:
            continue
        shape = shapes[node.name]
        channels = torch.arange(float(shape[1])).view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
        least = most = channels + 1
        for move in (*reversed(path), module):
            if does(move) == "takes maxima":  # the zeros of a padding belong to every channel
                least, most = -move(-least.masked_fill(least == 0, torch.inf)), move(most)
                least = least.masked_fill(least.isinf(), 0.0)
            else:
                least, most = move(least), move(most)
        if not torch.equal(least, most):
            found.append(str(pool.target))
    return found
