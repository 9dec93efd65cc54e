"""What fold made is run beside what it was made from, layer by layer, before anybody gets it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from qsnn.folded.layers import EXACT_FLOAT64
from qsnn.folded.neurons import RealIF
from qsnn.folded.terms import Term, Value, bias_of
from qsnn.graph.call import Call, calling, full_precision
from qsnn.graph.hooks import watching
from qsnn.graph.trace import module_of
from qsnn.quant.activations import level_quant
from qsnn.quant.weights import integer_weights
from qsnn.snn.equations import offset_at, per_channel
from qsnn.snn.neurons import GateNode, IFNode

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""What two sums that should be equal may differ by, by the dtype of layers of float weights [largest value on the way
from the neurons before]."""
_READ = 1e-5
"""What integers times a scale may differ by from the weights in float32 [largest weight]."""
_CLOSE = 1e-3
"""Standard deviation of currents from where they meet the threshold [θ; of a quantizer steps]."""
_MOST = 8
"""Networks of more steps are compared in 2 [steps]."""
_VALUES = 2**13
"""Where a layer gives more for an image, one image is run, else two [values]."""


@torch.no_grad()
def same_network(
    network: fx.GraphModule,
    folded: fx.GraphModule,
    values: dict[fx.Node, Value],
    shapes: dict[str, tuple[int, ...]],
    call: Call,
    dtype: torch.dtype,
) -> None:
    r"""Refuse a folded network that does not compute what the unfolded one computes in float64, scales read once.

    Behind every neuron both see the same random spikes, so that each layer is compared for its own sake, also where
    images would leave it silent. Equal must be

    * the current of every neuron, gate and quantizer, and the readout, but for :data:`ROUNDING`;
    * what each of these answers to random currents around its threshold. Where the unfolded one
      answers x - δ, x and x + δ (δ: rounding) differently, a tie is near, and either answer is right.

    What is tried is a seeded sample: one or two images, at most 8 steps (of more, 2). Layers that are
    no neuron are not looked at one by one, but by what reaches the next one.

    Args:
        network: the unfolded graph in eval mode.
        folded: the graph that was made of it.
        values: what each node of ``network`` stands for in ``folded``.
        shapes: of every node's value for one image, by name.
        call: T, the way of firing, frames.
        dtype: of layers of float weights.
    Raises:
        ValueError: they differ; says in which layers first.
    """
    if call.timesteps > _MOST:
        call = replace(call, timesteps=2)
    (placeholder,) = (node for node in network.graph.nodes if node.op == "placeholder")
    some = 2 if max(map(math.prod, shapes.values())) <= _VALUES else 1
    device = next((t.device for t in (*network.parameters(), *folded.buffers())), torch.device("cpu"))
    draw = _Draw(device)
    images = draw.normal((some * (call.timesteps if call.frames else 1), *shapes[placeholder.name][1:]))
    with calling(call), full_precision(device):
        ours = _Folded(folded, network, values, call, draw)
        answers = ours.run(images.float())
        _Unfolded(network, ours, answers, dtype).run(images.float().double())


class _Draw:
    """Random numbers that are always the same."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def uniform(self, shape: Any) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def normal(self, shape: Any) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def bits(self, shape: Any) -> Tensor:
        return torch.randint(0, 2, shape, generator=self.generator).to(self.device)


class _Folded(fx.Interpreter):
    """Runs the folded graph with random answers in the place of what decides, and keeps what it was asked."""

    def __init__(
        self,
        folded: fx.GraphModule,
        network: fx.GraphModule,
        values: dict[fx.Node, Value],
        call: Call,
        draw: _Draw,
    ) -> None:
        super().__init__(folded)
        self.extra_traceback = False  # torch's, which says nothing to a user
        self.network, self.folded, self.values, self.call, self.draw = network, folded, values, call, draw
        self.answered: dict[fx.Node, Tensor] = {}
        """By node of the new graph what it answers in both networks."""
        self.inputs: dict[fx.Node, tuple[Tensor, ...]] = {}
        self.seen: dict[fx.Node, Tensor] = {}
        """What nodes gave that a value of the old graph is made of."""
        self.old: dict[fx.Node, Any] = {}
        needed: list[Value] = []
        for node in network.graph.nodes:
            module = module_of(network, node)
            if module is not None and decides(module):
                self.old[values[node].terms[0].node] = module
                needed.append(values[node.all_input_nodes[0]])
        self.needed = {term.node for value in needed for term in value.terms}

    def run_node(self, n: fx.Node) -> Any:
        module = self.old.get(n)
        if module is None:
            result = super().run_node(n)
        else:
            args = self.inputs[n] = self.fetch_args_kwargs_from_env(n)[0]
            result = self.answered[n] = self._answer(n, module, args[0])
        if n in self.needed:
            self.seen[n] = result
        return result

    def _answer(self, n: fx.Node, module: Any, x: Tensor) -> Tensor:
        quant = level_quant(module)
        if quant is not None:
            return ((self.draw.uniform(x.shape) * 2 - 1) * quant.levels).round().float()
        steps = self.call.timesteps if self.once(self.folded.get_submodule(str(n.target))) else 1
        shape = (len(x) * steps, *x.shape[1:])
        signed = isinstance(module, IFNode) and module.dynamics.signed
        return (self.draw.bits(shape) - self.draw.bits(shape) if signed else self.draw.bits(shape)).float()

    def once(self, neuron: nn.Module) -> bool:
        """Whether one current, (B, *), stands for all steps of a neuron."""
        return getattr(neuron, "constant", False) and not self.call.frames

    def unit(self, term: Term) -> Tensor:
        """What a unit of a term is worth."""
        return (term.gain / self.call.timesteps**term.steps).to(self.draw.device)

    def current(self, value: Value, inputs: list[Tensor]) -> Tensor:
        """What a value of the old graph is, from those of the new graph that its terms name."""
        total = bias_of(value).to(self.draw.device)
        for term, x in zip(value.terms, inputs, strict=True):
            total = total + self.unit(term) * x.double()
        return total


def decides(module: nn.Module) -> bool:
    """Whether it answers in integers: a neuron, a gate, a quantizer of levels."""
    return isinstance(module, IFNode | GateNode) or level_quant(module) is not None


class _Unfolded(fx.Interpreter):
    """Runs the unfolded graph in float64, and compares at everything that decides."""

    def __init__(self, network: fx.GraphModule, ours: _Folded, answers: Any, dtype: torch.dtype) -> None:
        super().__init__(network)
        self.extra_traceback = False
        self.network, self.ours, self.answers, self.rounding = network, ours, answers, ROUNDING[dtype]
        self.sizes: dict[fx.Node, float] = {}
        """The largest value on the way to a node from what decided before it."""

    def run_node(self, n: fx.Node) -> Any:
        module = module_of(self.network, n)
        if module is not None and decides(module):
            result = self._decide(n, module, self.env[n.all_input_nodes[0]])
            self.sizes[n] = float(result.abs().max())
            return result
        result = super().run_node(n)
        if n.op == "output":
            found = zip(tree_leaves(n.args[0]), tree_leaves(self.answers), tree_leaves(result), strict=True)
            for source, ours, theirs in found:
                self._equal(source, ours, theirs, "")
        elif isinstance(result, Tensor) and n.op != "get_attr":
            before = (self.sizes[source] for source in n.all_input_nodes if source in self.sizes)
            self.sizes[n] = max(_size(result), *before, 0.0)
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer: Any = self.network.get_submodule(target)
        values = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        doubled = {name: value.double() for name, value in values.items() if value.is_floating_point()}
        quant = getattr(layer, "weight_quant", None)
        if quant is None or not quant.is_quant_enabled:
            return functional_call(layer, doubled, args, kwargs)
        integers, scale = integer_weights(layer)

        def read_once(name: str, module: nn.Module, inputs: Any, used: Any) -> Tensor:
            """The integers times their scale in float64, in the place of the weights that the layer runs with."""
            weight, used = integers.double() * scale.double(), getattr(used, "value", used)
            if not bool(((weight - used).abs() <= _READ * used.abs().max()).all()):
                raise _differs(f"{name}: its integers times their scale are not its weights")
            return weight

        with watching({target: quant}, read_once):
            others = {name: value for name, value in doubled.items() if not name.startswith("weight")}
            return functional_call(layer, others, args, kwargs)

    def _decide(self, node: fx.Node, module: Any, x: Tensor) -> Tensor:
        """Compare the current x that reaches what decides, and how it decides; return its random answer."""
        (source,) = (a for a in node.args if isinstance(a, fx.Node))
        ours, value = self.ours, self.ours.values[source]
        (term,) = ours.values[node].terms
        neuron: Any = ours.folded.get_submodule(str(term.node.target))
        theta = _theta(module, x)
        unit = theta if isinstance(neuron, RealIF) and neuron.unit else torch.ones_like(theta)
        found = ours.current(value, [ours.seen[t.node] for t in value.terms])
        self._equal(source, found * unit, x, f", in front of {node.target}")
        self._decides_alike(node, module, neuron, value, theta, unit, x)
        answer = ours.answered[term.node].double()
        quant = level_quant(module)
        return answer if quant is None else answer * quant.step.double()

    def _decides_alike(
        self, node: fx.Node, module: Any, neuron: Any, value: Value, theta: Tensor, unit: Tensor, x: Tensor
    ) -> None:
        """Compare the answers to currents around the threshold."""
        ours, inputs = self.ours, self.ours.inputs[self.ours.values[node].terms[0].node]
        first, given = value.terms[0], inputs[0]
        others = bias_of(value).to(x.device)
        for term, other in zip(value.terms[1:], inputs[1:], strict=True):
            others = others + ours.unit(term) * other.double()
        gain = ours.unit(first)
        once = ours.once(neuron)
        wanted = _around(module, theta, given, x, ours, 1 if once else ours.call.timesteps)
        tried = torch.where(gain.abs() > 0, (wanted - others) / gain, given.double())
        if first.integer and not level_quant(module):
            most = min(first.bound * ours.call.timesteps**first.steps, EXACT_FLOAT64 / (2 * ours.call.timesteps))
            tried = tried.round().clamp(-most, most)
        tried = (tried / unit).to(given.dtype)
        current = gain * tried.double() * unit + others
        rounding = self.rounding if isinstance(neuron, RealIF) else ROUNDING[torch.float64]
        slack = rounding * (current.abs() + (others.abs()) + theta.abs())
        answers = neuron(tried, *inputs[1:])
        low, mid, high = (_answer(module, current + shift * slack, ours.call, once) for shift in (-1, 0, 1))
        if answers.shape != mid.shape:
            raise _differs(f"{node.target}, whose answer is {tuple(answers.shape)} and was {tuple(mid.shape)}")
        sure = (low == mid) & (mid == high)
        if level_quant(module) is None:  # what came before a tie is sure, what comes behind it is not
            sure = sure.unflatten(0, (ours.call.timesteps, -1)).int().cumprod(0).flatten(0, 1) == 1
        if bool(((answers != mid) & sure).any()):
            raise _differs(f"{node.target}, which decides otherwise")

    def _equal(self, node: fx.Node, ours: Tensor, theirs: Tensor, where: str) -> None:
        """Refuse a value of ``node`` that differs by more than rounding."""
        limit = self.rounding * max(self.sizes.get(node, 0.0), _size(theirs))
        try:
            wrong = ~((ours.double() - theirs).abs() <= limit) & theirs.isfinite()
        except RuntimeError:  # shapes that do not meet
            wrong = torch.ones(1, dtype=torch.bool)
        if bool(wrong.any()) or torch.broadcast_shapes(ours.shape, theirs.shape) != theirs.shape:
            raise _differs(f"{', '.join(self._between(node)) or node.name}{where}")

    def _between(self, node: fx.Node) -> list[str]:
        """The layers from what decided before up to a node."""
        names: dict[str, None] = {}
        waiting = [node]
        while waiting:
            one = waiting.pop()
            module = module_of(self.network, one)
            if module is not None and not decides(module):
                names[str(one.target)] = None
                waiting += one.all_input_nodes
            elif one.op == "call_function":
                waiting += one.all_input_nodes
        return list(names)[::-1]


def _size(x: Tensor) -> float:
    return float(x.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if x.numel() else 0.0


def _theta(module: Any, x: Tensor) -> Tensor:
    """θ, the level of a gate, or the largest value of a quantizer, shaped to multiply a current."""
    quant = level_quant(module)
    if quant is not None:
        return (quant.step.double() * quant.levels).to(x.device)
    if isinstance(module, GateNode):
        return module.level.detach().double()
    theta: Tensor = module._theta(x)
    return theta


def _around(module: Any, theta: Tensor, given: Tensor, x: Tensor, ours: _Folded, steps: int) -> Tensor:
    """Currents of every step: half of them are drawn around the threshold, half let the potential come close to it."""
    draw = ours.draw
    near, close = draw.bits(given.shape), draw.normal(given.shape) * _CLOSE
    quant = level_quant(module)
    if quant is not None:
        there = (draw.uniform(given.shape) * 2 * quant.levels).floor() + 0.5 - quant.levels
        return theta * torch.where(near == 1, (there + close) / quant.levels, 2.6 * draw.uniform(given.shape) - 1.3)
    if isinstance(module, GateNode):
        spread = x.std() if x.numel() > 1 and x.std() > 0 else 1.0
        return theta + spread * torch.where(near == 1, close, draw.normal(given.shape))
    multiples = draw.bits(given.shape).double()
    first = len(given) // steps  # v0 + x meets θ at once, and multiples of it from then on
    near = near[:first].repeat(steps, *[1] * (near.dim() - 1))
    multiples[:first] = 1.0
    close[:first] -= per_channel(offset_at(module.initial, 1), x.dim()).double()
    return theta * torch.where(near == 1, multiples + close, 2 * draw.uniform(given.shape) - 0.5)


def _answer(module: Any, x: Tensor, call: Call, once: bool) -> Tensor:
    """What decides in the unfolded network, on currents in float64; ``once``: of one step, that stands for all."""
    quant = level_quant(module)
    if quant is not None:
        return (x / quant.step.double() + 0.5).floor().clamp(-quant.levels, quant.levels)
    if isinstance(module, GateNode):
        gate: Tensor = functional_call(module, {"level": module.level.detach().double()}, (x,))
        return gate
    x = x.expand(call.timesteps, *x.shape) if once else x.unflatten(0, (call.timesteps, -1))
    spikes: Tensor = module.fired(x, call.firing)
    return spikes.flatten(0, 1)


def _differs(where: str) -> ValueError:
    return ValueError(
        f"fold did not make the network that it was given: they differ from {where}; expected the same spikes in the "
        f"same layers. Run the unfolded network, and report this with it: nothing is wrong with your call"
    )
