"""fold(): the integer form of a spiking network. Batch norm, scales and biases go into integer thresholds."""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn.folded.builder import Builder
from qsnn.folded.compare import same_network
from qsnn.folded.integer import IntegerIF
from qsnn.folded.kinds import FOLD
from qsnn.folded.layers import IntegerInput
from qsnn.folded.neurons import CurrentIF, DynamicIF, RealIF
from qsnn.folded.prepared import PREPARED
from qsnn.folded.terms import Term, Value, bias_of, current_arguments, real, scaled, spread, stacked, steps_of
from qsnn.folded.whole import in_one_
from qsnn.graph.arrived import arrived
from qsnn.graph.call import Call
from qsnn.graph.kinds import does
from qsnn.graph.recipe import child_recipe, input_shape_of, recipe_of, set_recipe
from qsnn.graph.trace import device_of, module_of, value_shapes
from qsnn.quant.activations import level_quant
from qsnn.snn.network import SNN
from qsnn.snn.neurons import IFNode, PlusMinus, Repeat, amplified


def fold(snn: SNN, *, dtype: torch.dtype = torch.float64) -> SNN:
    r"""Return the integer form of a spiking network: integer weights, spikes 0/1, thresholds per channel.

    With integer weights W and spikes, a layer's input A is an integer. Scales, batch norm and bias go into what a unit
    of A is worth, :math:`g_c = \gamma'_c\, s_w\, \theta_{in}`, and a bias b_c; the neuron compares A with the integers
    of :class:`~qsnn.folded.integer.IntegerIF`. γ < 0 flips a channel's weights, average pooling sums spikes. Where
    currents meet (a residual sum before its neuron) they are added in float64. Spikes and argmax are those of the
    unfolded network in float64, the scales read once in the dtype it runs in: the two are compared layer by layer on
    seeded random spikes before one is returned (:func:`qsnn.folded.compare.same_network`).

    Args:
        snn: what :func:`qsnn.convert` or :func:`qsnn.distill` returned. It is not changed; training mode is left.
        dtype: what layers of float weights run in. float32 is faster, and a spike may then flip where a potential
            meets θ to the last bit; layers of low-precision weights are exact in either.
    Raises:
        TypeError: not an SNN.
        ValueError: already folded, an operation that has no integer form (it is named), or a layer that does not come
            out as it was (named too).

    >>> import qsnn
    >>> data = qsnn.load_data("digits")
    >>> snn = qsnn.convert(qsnn.quantize(qsnn.create_model("study", data), data))
    >>> sorted({type(layer).__name__ for layer in qsnn.fold(snn).network.children()})
    ['Current', 'Flatten', 'IntegerIF', 'IntegerInput', 'IntegerLayer', 'Repeat', 'SumPool']
    """
    model: Any = arrived(snn) if isinstance(snn, nn.Module) else snn
    if not isinstance(model, SNN):
        raise TypeError(f"expected an SNN from convert or distill, got {type(model).__name__}")
    folded, folder = _folded(model, dtype)
    call = Call(model.timesteps, model.firing, _frames(folded))
    same_network(folder.old, folded.network, folder.values, folder.shapes, call, dtype)
    in_one_(folded.network)  # not before: what is compared are the currents of every step
    for _, neuron in folded.neurons():
        if isinstance(neuron, DynamicIF):  # what was tried is not what a user ran
            neuron.overflows = 0
    return folded


def folded_structure(snn: SNN) -> SNN:
    """Return what :func:`fold` makes of a network whose numbers are still to be loaded, uncompared."""
    folded = _folded(snn, torch.float64)[0]
    in_one_(folded.network)
    return folded


def _folded(snn: SNN, dtype: torch.dtype) -> tuple[SNN, _Folder]:
    if snn.folded:
        raise ValueError("this network is folded already")
    shape = input_shape_of(snn)
    if shape is None:
        raise ValueError("cannot fold: the shape of an image is unknown; quantize or convert with data records it")
    network = copy.deepcopy(snn.network).eval()
    with torch.no_grad():
        folder = _Folder(network, value_shapes(network, shape), dtype)
        folded = SNN(folder.run(), snn.timesteps, snn.firing, folded=True, probes=snn.probes)
        for module in folded.modules():  # a view of one value for all channels cannot be loaded into
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else value.contiguous()
    folded.eval()
    set_recipe(folded, child_recipe(snn, "folded"))
    if snn.timesteps <= PREPARED:
        with torch.no_grad():  # a black image: every table is made now, in the dtype in which it is used
            folded(torch.zeros(1, *([snn.timesteps] if _frames(folded) else []), *shape, device=device_of(snn)))
    return folded, folder


def _frames(folded: SNN) -> bool:
    """Whether every step has an image of its own."""
    return recipe_of(folded).get("data", {}).get("frames") is not None


class _Folder(Builder):
    """Walks the old graph in order and builds the new one."""

    def run(self) -> fx.GraphModule:
        for node in self.old.graph.nodes:
            value = self._fold_node(node)
            if value is not None:
                self.values[node] = value
        return fx.GraphModule(self.root, self.graph, "Folded")

    def _fold_node(self, node: fx.Node) -> Value | None:
        if node.op == "placeholder":
            return real(self.graph.placeholder(node.name))
        if node.op == "get_attr":
            return None
        if node.op == "output":
            self.graph.output(fx.node.map_arg(node.args[0], lambda n: self.current(self.values[n], "readout")))
            return None
        if node.target is amplified:
            spikes, threshold = node.all_input_nodes
            theta: Tensor = operator.attrgetter(str(threshold.target))(self.old)
            return scaled(self.values[spikes], self.by_channel(theta.detach().double(), node))
        module = module_of(self.old, node)
        if module is None:
            raise ValueError(f"cannot fold {node.name} ({node.target}): it is no layer; convert writes layers alone")
        return self._module(node, module, [self.values[a] for a in node.args if isinstance(a, fx.Node)])

    def _module(self, node: fx.Node, module: nn.Module, values: list[Value]) -> Value:
        """What a layer gives: by its kind, or of the layers that convert and quantize put in."""
        name = str(node.target)
        if isinstance(module, IFNode):
            return self._neuron(node, module, values[0], alone=len(node.all_input_nodes[0].users) == 1)
        if isinstance(module, PlusMinus | Repeat):
            fresh = type(module)
            terms = tuple(replace(t, node=self.call(name, fresh(), t.node)) for t in values[0].terms)
            return Value(terms, values[0].bias)
        quant = level_quant(module)
        if quant is not None:
            call = self.call(name, IntegerInput(quant.step, quant.levels), self.current(values[0], f"{name}_input"))
            return Value((Term(call, (quant.step.double().reshape(()),), bound=quant.levels),))
        fold_kind = FOLD.get(does(module) or "")
        if fold_kind is None:
            raise ValueError(f"cannot fold {name} ({type(module).__name__}): it has no integer form")
        return fold_kind(self, node, module, *values)

    def _neuron(self, node: fx.Node, neuron: IFNode, value: Value, *, alone: bool) -> Value:
        name = str(node.target)
        threshold, initial = neuron.threshold.detach().double(), neuron.initial.detach().double()
        first = value.terms[0]
        raw = len(value.terms) == 1 and not (first.integer or first.factors or first.steps) and first.divisor == 1
        if raw and value.bias is None and neuron.dynamics.plain:
            if unit := alone and self.absorbs(first.node):  # the layer then counts in units of θ
                layer: Any = self.root.get_submodule(str(first.node.target))
                layer.absorb_(1.0 / threshold.reshape(-1), torch.zeros_like(threshold).reshape(-1), self.dtype)
            module: nn.Module = RealIF(threshold, initial, unit=unit, constant=neuron.constant_input)
            return Value((Term(self.call(name, module, first.node), spikes=True),))
        if neuron.constant_input:
            terms = tuple(replace(t, node=self.call(f"{name}_repeat", Repeat(), t.node)) for t in value.terms)
            value = replace(value, terms=terms)
        (first, *rest), bias = value.terms, bias_of(value)
        signed = neuron.dynamics.signed
        if neuron.dynamics.by_sums and first.integer and not rest and not threshold.dim():
            started = [self.by_channel(row, node) for row in (initial if initial.dim() == 2 else initial[None])]
            shape, _ = spread(*first.factors, bias, *started)
            factors, _ = stacked(first.factors, shape)
            flat = bias.expand(shape).reshape(-1) if bias.numel() > 1 else bias.reshape(1)
            if started[0].numel() > 1 and math.prod(shape) != started[0].numel():
                spreads = [row.expand(shape).reshape(-1) for row in started]
                initial = torch.stack(spreads) if initial.dim() == 2 else spreads[0]
            module = IntegerIF(
                factors, first.divisor, flat, threshold, initial, first.bound, shape, steps=first.steps, signed=signed
            )
        else:
            currents, powers = current_arguments(value), steps_of(value)
            if neuron.dynamics.by_sums:
                module = CurrentIF(*currents, threshold=threshold, initial=initial, steps=powers, signed=signed)
            else:
                other: dict[str, Any] = {"dynamics": neuron.dynamics, "tau": neuron.tau, "steps": powers}
                module = DynamicIF(*currents, threshold=threshold, initial=initial, **other)
        return Value((Term(self.call(name, module, *(term.node for term in value.terms)), spikes=True),))
