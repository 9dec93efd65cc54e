"""convert(): every quantized ReLU becomes an IF neuron whose threshold is read from the quantizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, overload

from torch import Tensor, fx, nn

from qsnn.data.memory import fewer, room, within
from qsnn.graph.arrived import arrived, refuse_state, set_training_flags_, training_flags
from qsnn.graph.compare import refuse_not_finite
from qsnn.graph.kinds import CLASSES, does
from qsnn.graph.pools import over_channels
from qsnn.graph.recipe import child_recipe, data_recipe, recipe_of, set_recipe
from qsnn.graph.trace import (
    call_nodes,
    refuse,
    spelled,
    takes_frames,
    value_shapes,
)
from qsnn.options import expect
from qsnn.quant.activations import act_quant_of
from qsnn.quant.calibrate import calibration_images
from qsnn.quant.quantize import spelled_copy
from qsnn.snn.calibrate import correct_
from qsnn.snn.config import ConvertConfig
from qsnn.snn.network import SNN
from qsnn.snn.structure import prepared, spiking


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
    expect("convert(qann), or convert(model, data)", "model", model, nn.Module)
    data, config = _given(data, config)
    steps = (config.timesteps,) if timesteps is None else tuple(timesteps)
    if not steps:
        raise ValueError("expected timesteps such as (1, 2, 4), got none")
    configs = [replace(config, timesteps=step) for step in dict.fromkeys(steps)]
    model = arrived(model)
    if isinstance(model, SNN) or recipe_of(model).get("kind") in ("snn", "student", "folded"):
        raise ValueError(f"expected a float or a quantized network, got {type(model).__name__}, which spikes already")
    refuse_state(model, "convert", numbers=not spelled(model))
    images, in_time = None, False
    if data is not None:
        images = calibration_images(getattr(data, "train", data), config.calibration_images)
        in_time = takes_frames(model, images)
        images = images.mean(1) if in_time else images
    network, moved = prepared(_copied(model, images), config)
    _refuse_uncalibrated(model, network, images)
    snns = [spiking(copy.deepcopy(network), moved, one).eval() for one in configs]
    if images is not None:
        _calibrate_(snns, network, images, config, memory)
    for snn, one in zip(snns, configs, strict=True):
        recipe = child_recipe(model, "snn", convert=asdict(one))
        if images is not None:
            recipe.update(input_shape=list(images.shape[1:]), corrected=config.correction != "none")
            recipe.update({"data": recorded} if (recorded := data_recipe(data, in_time=in_time)) else {})
        set_recipe(snn, recipe)
        snn.train(model.training)
        set_training_flags_(snn.network, training_flags(model))  # frozen batch norms stay frozen
    return snns[0] if timesteps is None else {snn.timesteps: snn for snn in snns}


def _given(data: Any, config: ConvertConfig | None) -> tuple[Any, ConvertConfig]:
    """Data and config, each in its place: the config may stand second."""
    if isinstance(data, ConvertConfig) and config is None:
        data, config = None, data
    config = ConvertConfig() if config is None else config
    if not isinstance(config, ConvertConfig) or isinstance(data, nn.Module | dict):
        got = type(data if isinstance(config, ConvertConfig) else config).__name__
        raise TypeError(
            f"expected a ConvertConfig, got {got}; call convert(qann, ConvertConfig(...)), or "
            f"convert(model, data, ConvertConfig(...)) to calibrate"
        )
    return data, config


def _copied(model: nn.Module, images: Tensor | None) -> nn.Module:
    """A copy of the model, traced: a quantized network is already, a float one is by the images that calibrate it."""
    if spelled(model):
        return copy.deepcopy(model)
    if images is None:
        raise _not_quantized(model, sum(isinstance(module, CLASSES["fires"]) for module in model.modules()))
    return spelled_copy(model, images, lambda module: act_quant_of(module) is not None)


def _not_quantized(model: nn.Module, plain: int) -> ValueError:
    """What to do with a float network; ``plain``: how many ReLU modules it holds."""
    holds = f"holds {plain} nn.ReLU that are not quantized" if plain else "is not quantized"
    return ValueError(
        f"{type(model).__name__} {holds}; call quantize(model, data) first, or convert(model, data) to calibrate it"
    )


def _refuse_uncalibrated(model: nn.Module, network: fx.GraphModule, images: Tensor | None) -> None:
    """Refuse plain ReLUs that no image calibrates, and maxima over channels, each of which has a θ of its own then."""
    if images is None:
        if plain := sum(does(module) == "fires" for _, module in call_nodes(network)):
            raise _not_quantized(model, plain)
        return
    shapes = value_shapes(network, tuple(images.shape[1:]))
    bad = over_channels(network, shapes, lambda module: does(module) == "fires")
    several = "a maximum over channels, each of which gets a threshold of its own; quantize(model, data) first"
    refuse([f"{name} ({several})" for name in bad], "convert")


def _calibrate_(
    snns: list[SNN], network: fx.GraphModule, images: Tensor, config: ConvertConfig, memory: int | str | None
) -> None:
    """Set thresholds and correct the layers, of the spiking networks for every T, in place."""
    largest = max(math.prod(shape) for shape in value_shapes(network, tuple(images.shape[1:])).values())
    with within(memory):
        groups = _side_by_side(snns, images, largest)
    for group, some in groups:
        correct_(
            group, network.eval(), some, threshold=config.threshold, percentile=config.percentile,
            correction=config.correction, initial=config.initial, targets=config.targets,
        )  # fmt: skip
    for snn in snns:
        refuse_not_finite(snn, "convert", images)


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
