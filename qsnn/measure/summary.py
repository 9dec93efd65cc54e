"""summary(): what a network weighs and computes, layer by layer and by precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, fx, nn

from qsnn.folded.gates import CurrentGate, IntegerGate
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import FloatLayer, IntegerInput, IntegerLayer
from qsnn.folded.neurons import Current
from qsnn.folded.products import IntegerProduct
from qsnn.graph.arrived import arrived, evaluating
from qsnn.graph.call import Call, calling
from qsnn.graph.hooks import watching
from qsnn.graph.kinds import CLASSES, does
from qsnn.graph.modules import Gating
from qsnn.graph.product import Product
from qsnn.graph.recipe import input_shape_of
from qsnn.graph.trace import call_nodes, device_of, module_of
from qsnn.options import expect
from qsnn.quant.activations import HalfQuant, act_quant_of, is_sign, level_quant
from qsnn.quant.weights import weight_bits
from qsnn.snn.counts import ON_COUNTS, CountProduct, on_counts, timed
from qsnn.snn.network import TimeLoop

_FLOAT_BITS = 32
PRODUCT = "product"
"""The kind of a layer that multiplies two quantized values; it has no weights, and multiply-accumulates."""
_WEIGHTED = (*CLASSES["weighs"], IntegerLayer, FloatLayer)


@dataclass(frozen=True)
class LayerSummary:
    """One layer: its output for one image, the bits of its weights and of its input, and what it costs."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """Of the output, without the batch."""
    weight_bits: int
    """0 of a gate, and of what a gate multiplies: they have no weights, and no multiply-accumulates. Of a product of
    two quantized values the bits of the second."""
    input_bits: int
    """32 where the input is not quantized, 1 for spikes."""
    parameters: int
    """Weights; bias and batch norm are in :attr:`Summary.other_parameters`."""
    macs: int
    """Multiply-accumulates for one image, or for one time step."""
    static: bool
    """In a spiking network: whether the layer runs once an image, before time begins or on counts."""
    on_counts: bool = False
    """In a spiking network: whether it is computed on counts, not on spikes."""

    @property
    def bytes(self) -> float:
        """Memory of the weights at their precision [byte]."""
        return self.parameters * self.weight_bits / 8


@dataclass(frozen=True)
class Summary:
    """The layers of a network and their totals; ``str()`` is a table."""

    layers: tuple[LayerSummary, ...]
    other_parameters: int
    """Biases, batch norm, steps and thresholds, 32 bit each."""

    @property
    def weight_bytes(self) -> int:
        """Memory of all parameters, weights at their precision and the others at 32 bit [byte]."""
        return round(sum(layer.bytes for layer in self.layers) + 4 * self.other_parameters)

    @property
    def weight_bytes_by_bits(self) -> dict[str, int]:
        """Memory by the bits of the weights; all other parameters as "other" [byte]."""
        bits = sorted({layer.weight_bits for layer in self.layers if layer.weight_bits and layer.kind != PRODUCT})
        found = {str(b): round(sum(layer.bytes for layer in self.layers if layer.weight_bits == b)) for b in bits}
        return {**found, "other": 4 * self.other_parameters}

    @property
    def float_bytes(self) -> int:
        """The same network's memory in float32 [byte]."""
        return 4 * (sum(layer.parameters for layer in self.layers) + self.other_parameters)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image (of one time step)."""
        return sum(layer.macs for layer in self.layers)

    @property
    def on_counts(self) -> tuple[str, ...]:
        """The layers of a spiking network that are computed on counts, not on spikes."""
        return tuple(layer.name for layer in self.layers if layer.on_counts)

    @property
    def macs_by_precision(self) -> dict[str, int]:
        """MACs by "W<weight bits>A<input bits>"; those of products of two quantized values by "A<bits>A<bits>"."""
        found: dict[str, int] = {}
        for layer in self.layers:
            if not layer.weight_bits:
                continue
            key = f"{'A' if layer.kind == PRODUCT else 'W'}{layer.weight_bits}A{layer.input_bits}"
            found[key] = found.get(key, 0) + layer.macs
        return found

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [
            f"{'layer':<{width}}  {'type':<8}  {'output':<12}  {'W bit':>5}  {'A bit':>5}  {'weights':>10}  {'KiB':>9}"
            f"  {'MACs':>13}"
        ]
        for layer in self.layers:
            lines.append(
                f"{layer.name:<{width}}  {layer.kind:<8}  {'x'.join(map(str, layer.shape)):<12}"
                f"  {layer.weight_bits or '-':>5}  {layer.input_bits:>5}  {layer.parameters:>10,}"
                f"  {layer.bytes / 1024:>9.2f}  {layer.macs:>13,}"
            )
        ratio = self.float_bytes / max(1, self.weight_bytes)
        precision = ", ".join(f"{key}: {macs:,}" for key, macs in self.macs_by_precision.items())
        lines.append(f"other parameters: {self.other_parameters:,} at 32 bit")
        lines.append(
            f"memory: {self.weight_bytes / 1024:.2f} KiB, float32 {self.float_bytes / 1024:.2f} KiB ({ratio:.1f} x)"
        )
        lines.append(f"MACs by precision: {precision}")
        if self.on_counts:
            macs = sum(layer.macs for layer in self.layers if layer.on_counts)
            lines.append(f"{ON_COUNTS}: {', '.join(self.on_counts)} ({macs:,} MACs)")
        return "\n".join(lines)


@torch.no_grad()
def summary(model: nn.Module, shape: tuple[int, ...] | None = None) -> Summary:
    """Return memory and operations of every layer with weights, and of every gate and product.

    Args:
        model: a float network, a QANN, an SNN or its folded form, or a :class:`~qsnn.snn.network.TimeLoop`. It is run
            once on a black image.
        shape: (C, H, W) of one image; by default the one the model was made for.
    Raises:
        ValueError: no shape is given and none is recorded.

    >>> import qsnn
    >>> found = qsnn.summary(qsnn.create_model("study", qsnn.load_data("digits")))
    >>> found.weight_bytes == found.float_bytes, found.macs_by_precision
    (True, {'W32A32': 452224})
    """
    expect("summary(model)", "model", model, nn.Module)
    model = arrived(model)
    shape = shape or input_shape_of(model)
    if shape is None:
        raise ValueError("summary needs the image shape: summary(model, (C, H, W))")
    network = getattr(model, "network", model)
    spiking, loop = network is not model, isinstance(model, TimeLoop)
    inputs = _input_bits(network, getattr(model, "timesteps", 1))
    calls = _calls(network) if spiking else {}
    rows: list[LayerSummary] = []
    started = False

    def record(name: str, module: Any, args: Any, output: Tensor) -> None:
        nonlocal started
        once, counted = calls[name].pop(0) if calls.get(name) else (False, False)
        started = started or hasattr(module, "threshold") or isinstance(module, BaseNode)
        started = started or (spiking and _gates(module))
        if _gates(module) and not loop:
            kind = "gating" if isinstance(module, Gating) else "gate"
            bits = inputs.get(name, _FLOAT_BITS)
            static = spiking and (not started or once)
            rows.append(LayerSummary(name, kind, tuple(output.shape[1:]), 0, bits, 0, 0, static, counted))
        if isinstance(module, Product):
            first, second = inputs.get(f"{name}, first", _FLOAT_BITS), inputs.get(name, _FLOAT_BITS)
            macs = module.macs(args[0].shape, args[1].shape)
            rows.append(LayerSummary(name, PRODUCT, tuple(output.shape[1:]), second, first, 0, macs, spiking, spiking))
        if not isinstance(module, _WEIGHTED) or (loop and any(row.name == name for row in rows)):
            return  # single steps call a layer at every step
        layer: Any = module
        output = output[0] if loop and output.dim() > layer.weight.dim() else output  # of one step
        found = _row(name, layer, args[0], output, inputs.get(name, _FLOAT_BITS))
        again = any(row.name == name for row in rows)  # a layer that is called twice has its weights once
        parameters = 0 if again else found.parameters
        static = spiking and (not started or once)
        rows.append(replace(found, static=static, parameters=parameters, on_counts=counted))

    image = torch.zeros(1, *shape, device=device_of(model))
    layers = {name: module for name, module in network.named_modules() if name}
    with evaluating(network), watching(layers, record), calling(Call()):
        _ = model(image, timesteps=1) if isinstance(model, TimeLoop) else network(image)
    return Summary(tuple(rows), _other_parameters(network))


def _calls(network: Any) -> dict[str, list[tuple[bool, bool]]]:
    """For each layer, call by call: whether it has one value for all steps, and whether it is computed on counts."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    if isinstance(network, fx.GraphModule):
        in_time, counted = timed(network), on_counts(network)
        for node, _ in call_nodes(network):
            found.setdefault(str(node.target), []).append((node not in in_time, node in counted))
    return found


def _gates(module: Any) -> bool:
    """Whether a module is a gate, or multiplies by one."""
    return does(module) in ("decides", "gates") or isinstance(module, IntegerGate | CurrentGate)


def _row(name: str, module: Any, x: Tensor, output: Tensor, input_bits: int) -> LayerSummary:
    """A layer with weights: each of its outputs sums over a kernel; of a transposed one each input spreads over one."""
    weight, options = module.weight, getattr(module, "options", {})
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d) or "output_padding" in options
    kind = "linear" if weight.dim() == 2 else f"{'deconv' if transposed else 'conv'}{weight.dim() - 2}d"
    return LayerSummary(
        name=name,
        kind=kind,
        shape=tuple(output.shape[1:]),
        weight_bits=weight_bits(module),
        input_bits=input_bits,
        parameters=weight.numel(),
        macs=(x if transposed else output)[0].numel() * weight[0].numel(),
        static=False,
    )


def _input_bits(network: nn.Module, timesteps: int) -> dict[str, int]:
    """The bits of what each layer with weights sees, by its name: found by walking back from it along the graph.

    Through what moves or pools values the bits stay; a current (behind a layer, a batch norm, a sum) is float. What
    multiplies counts of T steps sees more bits than its spikes have; of a product the second value stands under its
    name, the first one under "name, first".
    """
    if not isinstance(network, fx.GraphModule):
        return {}
    bits: dict[fx.Node, int] = {}
    found: dict[str, int] = {}
    for node in network.graph.nodes:
        module: Any = module_of(network, node)
        before = [bits.get(source, _FLOAT_BITS) for source in node.all_input_nodes if source.op != "get_attr"]
        quant = None if module is None else level_quant(module)
        if quant is not None:
            bits[node] = quant.levels.bit_length() + quant.signed
        elif module is not None and isinstance(act_quant_of(module), HalfQuant):
            bits[node] = 16
        elif isinstance(module, IntegerInput):
            bits[node] = module.levels.bit_length() + 1
        elif module is not None and (hasattr(module, "threshold") or is_sign(module)):
            bits[node] = 1
        elif _gates(module):  # of a product the bits of the value; the gate stands first
            found[str(node.target)] = before[-1]
            bits[node] = before[-1] if isinstance(module, Gating) else 1
        elif isinstance(module, Product):
            first, second = _count_bits(module, before[0], before[-1], timesteps)
            found[f"{node.target}, first"], found[str(node.target)] = first, second
        elif isinstance(module, IntegerLayer) and module.steps:
            found[str(node.target)] = int(module.input_bound * timesteps**module.steps).bit_length()
        elif isinstance(module, _WEIGHTED):
            found[str(node.target)] = before[0]
        elif before and not (does(module) in ("normalises", "adds", "scales", "shifts") or isinstance(module, Current)):
            bits[node] = max(before)
    return found


def _count_bits(product: Product, first: int, second: int, timesteps: int) -> tuple[int, int]:
    """The bits of the two values that a product multiplies; spikes are counted over T steps first."""
    if isinstance(product, IntegerProduct):
        return product.bits(timesteps)
    spans = timesteps.bit_length() if isinstance(product, CountProduct) else 1
    return (spans if first == 1 else first), (spans if second == 1 else second)


def _other_parameters(network: nn.Module) -> int:
    """Biases, steps and thresholds; batch norm counts as the two numbers a channel that it is at inference."""
    weighted: list[Any] = [m for m in network.modules() if isinstance(m, CLASSES["weighs"])]
    count = sum(p.numel() for p in network.parameters()) - sum(m.weight.numel() for m in weighted)
    for module in network.modules():
        if isinstance(module, IntegerIF | Current):
            count += 2 * module.bias.numel()
    return count
