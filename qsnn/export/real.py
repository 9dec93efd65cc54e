"""What stays real in a folded network, and why: formats of integers refuse it in these words."""

from __future__ import annotations

_REAL = "it computes in floats: "
REAL = {
    "FloatLayer": _REAL
    + "fp16 or float weights, spikes of several sizes in front (train_threshold='channel'; use 'layer'), a linear "
    "bottleneck, or an input without quantizer",
    "RealIF": _REAL + "its current is real",
    "DynamicIF": _REAL + "a leak, another reset or a membrane of few bits",
    "Current": _REAL + "a current between layers (a linear bottleneck)",
    "AvgPool1d": _REAL + "it averages a current",
    "AvgPool2d": _REAL + "it averages a current",
}
"""Why a module of a folded network is real, by the name of its class."""
