"""What an inference costs in energy: three estimates side by side, each with its source and what it assumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# 45 nm, 0.9 V, pJ an operation: Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014
_ADD_INT32, _ADD_FP32 = 0.1, 0.9
_MULTIPLY_INT8, _MULTIPLY_FP16, _MULTIPLY_FP32 = 0.2, 1.1, 3.7
_SRAM_64_BITS = 20.0
"""Reading 64 bits from a 32 KB memory on the chip [pJ]."""
_STATE_BITS = 16
"""Of a membrane, where its bits are not set [bit]."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer does for one image."""

    name: str
    weight_bits: int
    """[bit]; 16 is fp16, 32 float."""
    input_bits: int
    """Of what it multiplies [bit]; 1 for spikes."""
    macs: float
    """Multiply-accumulates."""
    synops: float
    """Accumulates that spikes drive."""
    dense_macs: float
    """Multiply-accumulates of the layer in the network that is not spiking."""


@dataclass(frozen=True)
class Estimate:
    """One estimate of the energy of an image, never to be given without its name, source and assumptions."""

    name: str
    microjoules: float | None
    """[µJ] an image; None for what is a ratio."""
    ratio: float | None
    """To the same network that is not spiking, with the same levels and weights [1]; None where nothing spikes."""
    break_even: float | None
    """Spike rate at which the ratio would be 1 [spikes a neuron and step]; None where there is none."""
    source: str
    assumes: str


def mac_energy(weight_bits: int, input_bits: int) -> float:
    """Energy of one multiply-accumulate [pJ]: integers by the area of their multiplier, accumulated in 32 bit.

    >>> round(mac_energy(32, 32), 3), round(mac_energy(8, 8), 3), mac_energy(1, 1) < mac_energy(4, 2)
    (4.6, 0.3, True)
    """
    wide = max(weight_bits, input_bits)
    if wide > 16:
        return _MULTIPLY_FP32 + _ADD_FP32
    if wide == 16:
        return _MULTIPLY_FP16 + _ADD_FP32
    return _MULTIPLY_INT8 * weight_bits * input_bits / 64 + _ADD_INT32


def accumulate_energy(weight_bits: int) -> float:
    """Energy of one accumulate of a weight [pJ]: integers in 32 bit, else fp32."""
    return _ADD_INT32 if weight_bits <= 8 else _ADD_FP32


def read_energy(bits: float) -> float:
    """Energy of reading or writing so many bits on the chip [pJ]."""
    return _SRAM_64_BITS * bits / 64


def estimates(
    layers: Sequence[LayerCost],
    *,
    spike_rate: float | None = None,
    neuron_updates: float = 0.0,
    state_bits: int | None = None,
    level_bits: int = 2,
) -> tuple[Estimate, ...]:
    """Return the estimates of one image.

    Args:
        layers: what each layer does.
        spike_rate: spikes a neuron and step; None: nothing spikes.
        neuron_updates: neurons times steps.
        state_bits: of a membrane [bit]; default 16.
        level_bits: of an activation of the same network that is not spiking [bit].
    """
    state = state_bits or _STATE_BITS
    macs, synops = sum(layer.macs for layer in layers), sum(layer.synops for layer in layers)
    convention = (4.6 * macs + 0.9 * synops) * 1e-6
    dense_convention = 4.6 * sum(layer.dense_macs for layer in layers) * 1e-6
    static = driven = dense = 0.0
    for layer in layers:
        inputs = layer.input_bits
        one = mac_energy(layer.weight_bits, inputs) + read_energy(layer.weight_bits + inputs)
        static += layer.macs * one
        spike = accumulate_energy(layer.weight_bits) + read_energy(layer.weight_bits + 2 * state)
        driven += layer.synops * spike
        bits = level_bits if inputs == 1 and spike_rate is not None else inputs
        dense += layer.dense_macs * (mac_energy(layer.weight_bits, bits) + read_energy(layer.weight_bits + bits))
    updates = neuron_updates * (_ADD_INT32 + read_energy(2 * state))
    precise = (static + driven + updates) * 1e-6
    spiking = spike_rate is not None

    def even(fixed: float, moving: float, target: float) -> float | None:
        return spike_rate * (target - fixed) / moving if spike_rate and moving and target > fixed else None

    horowitz = "Horowitz, ISSCC 2014, 45 nm"
    return (
        Estimate(
            "convention", convention, convention / dense_convention if spiking else None,
            even(4.6 * macs * 1e-6, 0.9 * synops * 1e-6, dense_convention), horowitz,
            "4.6 pJ a MAC, 0.9 pJ a synop, as if all were fp32; no memory, no neuron",
        ),
        Estimate(
            "precision and memory", precise, None, None,
            f"{horowitz}; counting as Dampfhoffer et al., IEEE TETCI 2022",
            "operations at their bits; every operation reads its weight and input, a synop also reads and writes a "
            f"membrane of {state} bit, from 32 KB on the chip; every neuron is updated at every step",
        ),
        Estimate(
            "ratio to the QANN", None, precise / (dense * 1e-6) if spiking and dense else None,
            even(static + updates, driven, dense) if spiking else None, f"{horowitz}; Dampfhoffer et al. 2022",
            f"as before, against the same layers with activations of {level_bits} bit and no reuse of what is read",
        ),
    )  # fmt: skip
