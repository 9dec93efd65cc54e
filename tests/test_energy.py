"""Energy: three estimates by hand, the break-even rate, and that no number stands alone."""

from __future__ import annotations

import pytest

import qsnn
from qsnn.measure.energy import LayerCost, accumulate_energy, estimates, mac_energy, read_energy

FIRST = LayerCost(name="0", weight_bits=8, input_bits=8, macs=1000.0, synops=0.0, dense_macs=1000.0)
SECOND = LayerCost(name="3", weight_bits=4, input_bits=1, macs=0.0, synops=300.0, dense_macs=2000.0)


def test_by_hand() -> None:
    convention, precise, ratio = estimates([FIRST, SECOND], spike_rate=0.2, neuron_updates=50, level_bits=2)
    assert convention.microjoules == pytest.approx((4.6 * 1000 + 0.9 * 300) * 1e-6)
    assert convention.ratio == pytest.approx((4.6 * 1000 + 0.9 * 300) / (4.6 * 3000))
    first = 1000 * (0.2 + 0.1 + 20 * 16 / 64)
    synops = 300 * (0.1 + 20 * (4 + 2 * 16) / 64)
    updates = 50 * (0.1 + 20 * 32 / 64)
    assert precise.microjoules == pytest.approx((first + synops + updates) * 1e-6)
    dense = first + 2000 * (0.2 * 4 * 2 / 64 + 0.1 + 20 * (4 + 2) / 64)
    assert ratio.ratio == pytest.approx((first + synops + updates) / dense)


def test_break_even_is_where_the_ratio_is_one() -> None:
    for which in (0, 2):
        found = estimates([FIRST, SECOND], spike_rate=0.2, neuron_updates=50)[which]
        scale = found.break_even / 0.2
        there = LayerCost(**{**vars(SECOND), "synops": 300.0 * scale})
        again = estimates([FIRST, there], spike_rate=found.break_even, neuron_updates=50)[which]
        assert again.ratio == pytest.approx(1)


def test_fewer_bits_cost_less() -> None:
    pairs = [(1, 1), (1, 2), (4, 2), (8, 8), (16, 16), (32, 32)]
    costs = [mac_energy(*pair) for pair in pairs]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)
    assert accumulate_energy(1) == accumulate_energy(8) < accumulate_energy(16)
    assert read_energy(64) == 20.0
    narrow = estimates([FIRST, SECOND], spike_rate=0.2, state_bits=8)[1].microjoules
    assert narrow < estimates([FIRST, SECOND], spike_rate=0.2)[1].microjoules


def test_of_a_whole_network(teacher: object, qann: object, snn: qsnn.SNN, digits: qsnn.Data) -> None:
    test = digits.test.head(64)  # type: ignore[attr-defined]
    ann, quantized, spiking = (qsnn.benchmark(model, test, timesteps=2) for model in (teacher, qann, snn))
    for result in (ann, quantized, spiking):
        assert all(e.source and e.assumes for e in result.energy)
    assert ann.energy[0].microjoules == pytest.approx(4.6e-6 * ann.macs)
    assert ann.energy[1].microjoules > quantized.energy[1].microjoules
    assert ann.energy[2].ratio is None
    # the ratio is that to the benchmark of the QANN itself
    assert spiking.energy[2].ratio == pytest.approx(spiking.energy[1].microjoules / quantized.energy[1].microjoules)
    assert spiking.state_bytes == 4 * sum((24 * 2 * 64, 48 * 2 * 16))
    assert spiking.peak_bytes > spiking.state_bytes and spiking.latency_ms > 0 and spiking.throughput > 0
    assert sum(spiking.weight_bytes_by_bits.values()) == pytest.approx(spiking.weight_bytes, abs=3)
    low, high = spiking.intervals[0]
    assert low < spiking.accuracy[0] < high and spiking.metrics()["intervals"][0] == (low, high)
