"""How what computes is spelled: activations, pools, dropout, layers, sums and numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qsnn.graph.kinds import ADVICE
from qsnn.graph.modules import Add, ClippedReLU, Mean, Scale, Shift, Sum
from qsnn.graph.spell_maxima import MAX_POOLS, MAXIMA, clipped
from qsnn.graph.step import Call, Refused, Shape, Spelling


def ends(node: fx.Node) -> bool:
    """Return whether nothing but the output sees a node."""
    return all(user.op == "output" for user in node.users)


def _ending(module: Callable[[Call], nn.Module]) -> Spelling:
    def spelling(call: Call) -> fx.Node:
        if not ends(call.node):
            raise Refused(f"{call.name}: {ADVICE[call.name]}" if call.name in ADVICE else f"{call.name} in between")
        call.speller.ending.append(module(call))
        return call.at(call.x)

    return spelling


def adaptive(sides: int) -> nn.Module:
    """The average over the whole of so many spatial dimensions."""
    return {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[sides](1)


def covers(pool: Any, shape: Shape) -> bool:
    """Whether an average pool has one window, which is the whole map."""
    sides = shape[2:]
    kernel = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * len(sides)
    padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,) * len(sides)
    plain = not any(padding) and not getattr(pool, "divisor_override", None)
    return plain and tuple(kernel) == sides


def _relu(call: Call) -> fx.Node:
    return call.put(nn.ReLU())


def _clamp(call: Call) -> fx.Node:
    return clipped(call, call.get(1, "min"), call.get(2, "max"))


def _hardtanh(call: Call) -> fx.Node:
    return clipped(call, call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0))


def _threshold(call: Call) -> fx.Node:
    level, value = call.get(1, "threshold"), call.get(2, "value")
    if level != 0 or value != 0:
        raise Refused(f"threshold({level}, {value}): only threshold(0, 0), a ReLU")
    return call.put(nn.ReLU())


def _hardtanh_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    if module.min_val != 0:
        return clipped(call, module.min_val, module.max_val)
    return _same_place(call, ClippedReLU(float(module.max_val)))


def _same_place(call: Call, module: nn.Module) -> fx.Node:
    """Put ``module`` under the very name of the module that it stands for."""
    name = str(call.node.target)
    parent, _, child = name.rpartition(".")
    setattr(call.speller.raw.get_submodule(parent), child, module)
    return call.speller.graph.call_module(name, (call.at(call.x),))


def _threshold_module(call: Call) -> fx.Node:
    module: Any = call.speller.raw.get_submodule(str(call.node.target))
    if module.threshold != 0 or module.value != 0:
        raise Refused(f"Threshold({module.threshold}, {module.value}): only Threshold(0, 0), a ReLU")
    return _same_place(call, nn.ReLU())


def _hardsigmoid(call: Call) -> fx.Node:
    """clip(x/6 + 1/2, 0, 1)."""
    line = call.put(Shift(torch.tensor(0.5)), scaled(call, call.at(call.x), torch.tensor(1 / 6)))
    return call.put(ClippedReLU(1.0), line)


def _sync_norm(call: Call) -> fx.Node:
    """Batch norm over several processes; at inference it is a batch norm of as many dimensions as its input."""
    old: Any = call.speller.raw.get_submodule(str(call.node.target))
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(call.shape())]
    new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    new.__dict__.update({name: value for name, value in old.__dict__.items() if name in ("_parameters", "_buffers")})
    return _same_place(call, new)


def _chosen(call: Call) -> fx.Node:
    """where(mask, x, y) and x.masked_fill(mask, y) with a mask that no image changes: x·mask + y·(1 - mask)."""
    masked = call.name in ("masked_fill", "masked_fill_")
    mask = call.constant(call.get(1, "mask") if masked else call.get(0, "condition"))
    if mask is None:
        raise Refused(f"{call.name}: {ADVICE['where']}")
    first, second = (0, 2) if masked else (1, 2)
    kept = mask == 0 if masked else mask != 0
    total: fx.Node | None = None
    for argument, part in ((call.node.args[first], kept), (call.get(second, "value" if masked else "other"), ~kept)):
        number = call.constant(argument)
        if number is None:
            value = scaled(call, call.at(argument), part.float())
            total = value if total is None else call.put(Add(), total, value)
        elif bool((number != 0).any()):
            shift = number.detach() * part
            if total is None:  # the numbers stand first: they are added to the value behind
                other = scaled(call, call.at(call.node.args[2]), (~part).float())
                return call.put(Shift(call.fits(shift)), other)
            total = call.put(Shift(call.fits(shift)), total)
    assert total is not None
    return total


def _dropout(call: Call) -> fx.Node:
    if call.get(2, "training", True) and call.get(1, "p", 0.5) > 0:
        raise Refused(
            f"{call.name} drops values at inference too: call {call.name}(x, p, training=self.training), or use "
            f"nn.Dropout"
        )
    return call.put(nn.Dropout(call.get(1, "p", 0.5)))


def _average_pool(call: Call) -> fx.Node:
    options: dict[str, Any] = {
        "kernel_size": call.get(1, "kernel_size"), "stride": call.get(2, "stride") or None,
        "padding": call.get(3, "padding", 0), "ceil_mode": call.get(4, "ceil_mode", False),
        "count_include_pad": call.get(5, "count_include_pad", True),
    }  # fmt: skip
    sides = len(call.shape()) - 2
    if sides > 1:
        options["divisor_override"] = call.get(6, "divisor_override")
    pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[sides](**_tuples(options))
    return call.put(adaptive(sides) if covers(pool, call.shape()) else pool)


def _max_pool(call: Call) -> fx.Node:
    if call.get(6, "return_indices", False):
        raise Refused("return_indices=True: spikes carry no indices")
    options = {
        "kernel_size": call.get(1, "kernel_size"), "stride": call.get(2, "stride") or None,
        "padding": call.get(3, "padding", 0), "dilation": call.get(4, "dilation", 1),
        "ceil_mode": bool(call.get(5, "ceil_mode", False)),
    }  # fmt: skip
    return call.put(MAX_POOLS[len(call.shape()) - 2](**_tuples(options)))


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _adaptive_pool(call: Call) -> fx.Node:
    size, sides = call.get(1, "output_size", 1), len(call.shape()) - 2
    kind = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[sides]
    return call.put(kind(tuple(size) if isinstance(size, list) else size))


def _mean(call: Call) -> fx.Node:
    dims, keep, shape = call.dims(call.get(1, "dim")), call.get(2, "keepdim", False), call.shape()
    if len(shape) > 2 and sorted(dims) == list(range(2, len(shape))):
        pooled = call.put(adaptive(len(shape) - 2))
        return pooled if keep else call.speller.put(call.node.name, nn.Flatten(), (pooled,))
    return call.put(Mean(dims, bool(keep)))


def _sum(call: Call) -> fx.Node:
    return call.put(Sum(call.dims(call.get(1, "dim")), bool(call.get(2, "keepdim", False))))


def scaled(call: Call, node: fx.Node, factor: Tensor) -> fx.Node:
    """Write a node's value times numbers."""
    return call.put(Scale(call.fits(factor)), node)


def _sum_of(call: Call, sign: int, first: Any, second: Any, alpha: Any = 1) -> fx.Node:
    """first + sign·alpha·second."""
    a, b = call.constant(first), call.constant(second)
    factor = float(sign) * float(alpha)
    if b is not None:
        kept = b if factor == 1 else b.detach() * factor
        nothing = not isinstance(kept, nn.Parameter) and not bool((kept != 0).any())
        return call.at(first) if nothing else call.put(Shift(call.fits(kept)), call.at(first))
    other = call.at(second) if factor == 1 else scaled(call, call.at(second), torch.tensor(factor))
    if a is not None:
        return call.put(Shift(call.fits(a)), other)
    if len(call.shape(first)) != len(call.shape(second)):
        raise Refused(f"adds values of {len(call.shape(first))} and {len(call.shape(second))} dimensions")
    return call.put(Add(), call.at(first), other)


def _add(call: Call) -> fx.Node:
    return _sum_of(call, 1, call.get(0, "input"), call.get(1, "other"), call.node.kwargs.get("alpha", 1))


def _sub(call: Call) -> fx.Node:
    return _sum_of(call, -1, call.get(0, "input"), call.get(1, "other"), call.node.kwargs.get("alpha", 1))


def _rsub(call: Call) -> fx.Node:
    return _sum_of(call, -1, call.get(1, "other"), call.get(0, "input"), call.node.kwargs.get("alpha", 1))


def _div(call: Call) -> fx.Node:
    factor = call.constant(call.get(1, "other"))
    if factor is None or call.node.kwargs.get("rounding_mode"):
        raise Refused("divides by a value that depends on the image, or rounds")
    return scaled(call, call.at(call.get(0, "input")), 1.0 / factor.detach())


def _neg(call: Call) -> fx.Node:
    return scaled(call, call.at(call.x), torch.tensor(-1.0))


def _convolution(call: Call) -> fx.Node:
    weight, bias = call.constant(call.get(1, "weight")), call.constant(call.get(2, "bias"))
    if weight is None:
        raise Refused("weights that depend on the image")
    dims, transposed = weight.dim() - 2, "transpose" in call.name
    names = ("stride", "padding", *(("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")))
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
    options = _tuples({name: call.get(place, name, defaults[name]) for place, name in enumerate(names, 3)})
    kinds: dict[Any, Any] = {
        (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
        (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d,
    }  # fmt: skip
    width = weight.shape[1] * options["groups"]
    channels = (weight.shape[0], width) if transposed else (width, weight.shape[0])
    layer = kinds[dims, transposed](*channels, tuple(weight.shape[2:]), bias=bias is not None, **options)
    return call.put(with_values(layer, weight, bias))


def _linear(call: Call) -> fx.Node:
    weight, bias = call.constant(call.get(1, "weight")), call.constant(call.get(2, "bias"))
    if weight is None:
        raise Refused("weights that depend on the image")
    return call.put(with_values(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight, bias))


def with_values(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer with these weights and bias, on their device."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    found: nn.Module = layer.to(weight.device)
    return found


def _batch_norm(call: Call) -> fx.Node:
    values = [call.constant(call.get(place, name)) for place, name in enumerate(
        ("running_mean", "running_var", "weight", "bias"), 1)]  # fmt: skip
    mean, var, weight, bias = values
    if mean is None or var is None or call.get(5, "training", False):
        raise Refused("statistics of each batch's own; pass running statistics and training=self.training")
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(call.shape())]
    norm: Any = kind(len(mean), eps=call.get(7, "eps", 1e-5), affine=weight is not None)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    return call.put(norm if weight is None else with_values(norm, weight, bias))


COMPUTES: dict[Any, Spelling] = {
    **MAXIMA,
    **dict.fromkeys((F.relu, torch.relu, F.relu_, "relu", "relu_"), _relu),
    F.relu6: lambda call: call.put(ClippedReLU(6.0)),
    nn.ReLU6: lambda call: _same_place(call, ClippedReLU(6.0)),
    nn.Hardtanh: _hardtanh_module, nn.Threshold: _threshold_module,
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"), _clamp),
    **dict.fromkeys((torch.clamp_min, "clamp_min", "clamp_min_"), lambda call: clipped(call, call.get(1, "min"), None)),
    **dict.fromkeys((torch.clamp_max, "clamp_max", "clamp_max_"), lambda call: clipped(call, None, call.get(1, "max"))),
    **dict.fromkeys((F.hardtanh, F.hardtanh_, "hardtanh", "hardtanh_"), _hardtanh),
    **dict.fromkeys((F.threshold, torch.threshold, torch.threshold_), _threshold),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
                    _dropout),
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _ending(lambda call: nn.Softmax(call.get(1, "dim")))),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, "log_softmax"),
                    _ending(lambda call: nn.LogSoftmax(call.get(1, "dim")))),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), _ending(lambda call: nn.Sigmoid())),
    F.logsigmoid: _ending(lambda call: nn.LogSigmoid()),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d), _average_pool),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
                    _max_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d),
                    _adaptive_pool),
    **dict.fromkeys((torch.mean, "mean"), _mean), **dict.fromkeys((torch.sum, "sum"), _sum),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, torch.subtract, "sub", "sub_", "subtract"), _sub),
    **dict.fromkeys((torch.rsub, "rsub"), _rsub),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide, "div", "div_",
                     "divide", "true_divide"), _div),
    **dict.fromkeys((operator.neg, torch.neg, torch.negative, "neg", "neg_", "negative"), _neg),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d), _convolution),
    F.linear: _linear, F.batch_norm: _batch_norm, nn.SyncBatchNorm: _sync_norm,
    **dict.fromkeys((F.hardsigmoid, nn.Hardsigmoid), _hardsigmoid),
    **dict.fromkeys((torch.where, torch.masked_fill, "where", "masked_fill"), _chosen),
}  # fmt: skip
"""Functions, method names and modules of torch.nn that compute, each with how it is spelled."""
