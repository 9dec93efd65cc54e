"""What an inference costs in energy: three estimates side by side, each with its source and what it assumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# 45 nm, 0.9 V, pJ an operation: Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014
ADD_INT32, ADD_FP32 = 0.1, 0.9
MULTIPLY_INT8, MULTIPLY_FP16, MULTIPLY_FP32 = 0.2, 1.1, 3.7
CONVENTION_MAC, CONVENTION_SYNOP = 4.6, 0.9
"""What papers on spiking networks take for a MAC and a synop, as if all were fp32 [pJ]."""
SRAM_WORD = 20.0
"""Reading one word from a 32 KB memory on the chip [pJ]."""
SRAM_WORD_BITS = 64
"""Of that word [bit]."""
STATE_BITS = 16
"""Of a membrane, where its bits are not set [bit]."""
MICRO = 1e-6
"""From pJ to µJ [1]."""


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
    """Multiply-accumulates of the layer in the same network without spikes."""


@dataclass(frozen=True)
class Estimate:
    """One estimate of the energy of an image, never to be given without its name, source and assumptions."""

    name: str
    microjoules: float | None
    """[µJ] an image; None for what is a ratio."""
    ratio: float | None
    """Of this energy to that of the same network without spikes, same levels and weights [1]; None for an ANN."""
    break_even: float | None
    """Spike rate at which the ratio would be 1 [spikes a neuron and step]; None where there is none."""
    source: str
    assumes: str


def mac_energy(weight_bits: int, input_bits: int) -> float:
    r"""Energy of one multiply-accumulate [pJ]: of integers of w and i bits :math:`0.2 \cdot wi/64 + 0.1`.

    The area of a multiplier grows with the product of the bits of its inputs; 8 bits by 8 take 0.2 pJ. Products of
    integers are accumulated in 32 bit. From 16 bits on it is a float multiplication and an addition in fp32.

    >>> round(mac_energy(32, 32), 3), round(mac_energy(8, 8), 3), mac_energy(1, 1) < mac_energy(4, 2)
    (4.6, 0.3, True)

    Args:
        weight_bits, input_bits: w and i [bit]; 16 is fp16, 32 float.
    Source:
        Horowitz, ISSCC 2014.
    """
    wide = max(weight_bits, input_bits)
    if wide > 16:
        return MULTIPLY_FP32 + ADD_FP32
    if wide == 16:
        return MULTIPLY_FP16 + ADD_FP32
    return MULTIPLY_INT8 * weight_bits * input_bits / 64 + ADD_INT32


def accumulate_energy(weight_bits: int) -> float:
    """Energy of one accumulate of a weight [pJ]: of integers 0.1, in 32 bit; else 0.9, in fp32.

    Args:
        weight_bits: [bit]; 16 is fp16, 32 float.
    Source:
        Horowitz, ISSCC 2014.
    """
    return ADD_INT32 if weight_bits <= 8 else ADD_FP32


def read_energy(bits: float) -> float:
    """Energy of reading or writing so many bits on the chip [pJ]: 20 for 64.

    Args:
        bits: [bit]
    Source:
        Horowitz, ISSCC 2014 (a memory of 32 KB).
    """
    return SRAM_WORD * bits / SRAM_WORD_BITS


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
        spike_rate: spikes per neuron and step [1]; None for an ANN.
        neuron_updates: neurons times steps.
        state_bits: of a membrane [bit]; default 16.
        level_bits: of an activation in the same network without spikes [bit].
    Source:
        Horowitz, ISSCC 2014; counting as Dampfhoffer et al., "Are SNNs Really More Energy-Efficient Than ANNs? ...",
        IEEE TETCI 2022.
    """
    spiking, state = spike_rate is not None, state_bits or STATE_BITS
    macs = CONVENTION_MAC * sum(layer.macs for layer in layers)
    synops = CONVENTION_SYNOP * sum(layer.synops for layer in layers)
    dense = CONVENTION_MAC * sum(layer.dense_macs for layer in layers)
    convention = (macs + synops) * MICRO
    static, driven, precise_dense = _by_precision(layers, state, level_bits if spiking else None)
    updates = neuron_updates * (ADD_INT32 + read_energy(2 * state))
    precise = (static + driven + updates) * MICRO
    horowitz = "Horowitz, ISSCC 2014, 45 nm"
    return (
        Estimate(
            "convention", convention, convention / (dense * MICRO) if spiking else None,
            _break_even(spike_rate, macs * MICRO, synops * MICRO, dense * MICRO), horowitz,
            f"{CONVENTION_MAC} pJ a MAC, {CONVENTION_SYNOP} pJ a synop, as if all were fp32; no memory, no neuron",
        ),
        Estimate(
            "precision and memory", precise, None, None,
            f"{horowitz}; counting as Dampfhoffer et al., IEEE TETCI 2022",
            "operations at their bits; every operation reads its weight and input, a synop also reads and writes a "
            f"membrane of {state} bit, from 32 KB on the chip; every neuron is updated at every step",
        ),
        Estimate(
            "ratio to the QANN", None, precise / (precise_dense * MICRO) if spiking and precise_dense else None,
            _break_even(spike_rate, static + updates, driven, precise_dense), f"{horowitz}; Dampfhoffer et al. 2022",
            f"as before, against the same layers with activations of {level_bits} bit and no reuse of what is read",
        ),
    )  # fmt: skip


def _by_precision(layers: Sequence[LayerCost], state: int, levels: int | None) -> tuple[float, float, float]:
    """MACs, synops, and the MACs of the same network without spikes, at their bits, with the memory they read [pJ].

    Args:
        layers: what each layer does.
        state: of a membrane [bit].
        levels: of an activation there, where this network has a spike [bit]; None for an ANN.
    """
    static = driven = dense = 0.0
    for layer in layers:
        weight, inputs = layer.weight_bits, layer.input_bits
        bits = levels if levels is not None and inputs == 1 else inputs
        static += layer.macs * (mac_energy(weight, inputs) + read_energy(weight + inputs))
        driven += layer.synops * (accumulate_energy(weight) + read_energy(weight + 2 * state))
        dense += layer.dense_macs * (mac_energy(weight, bits) + read_energy(weight + bits))
    return static, driven, dense


def _break_even(spike_rate: float | None, fixed: float, moving: float, target: float) -> float | None:
    """The spike rate at which the energy would be ``target``: ``fixed`` stays, ``moving`` grows with the rate."""
    return spike_rate * (target - fixed) / moving if spike_rate and moving and target > fixed else None
