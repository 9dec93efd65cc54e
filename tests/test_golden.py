"""Checkpoints written before the house was rebuilt load, and answer as they did then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qsnn

GOLDEN = Path(__file__).parent / "golden"
LOGITS = load_file(GOLDEN / "logits.safetensors")


@pytest.mark.parametrize("kind", ["teacher", "qann", "snn", "student", "folded"])
def test_a_file_of_the_version_before_answers_as_it_did(kind):
    model = qsnn.load(GOLDEN / f"{kind}.safetensors")
    with torch.no_grad():
        # a folded network is the same on every machine; floats may round differently on another processor
        tolerance = {"rtol": 0.0, "atol": 0.0 if kind == "folded" else 1e-5}
        torch.testing.assert_close(model(LOGITS["images"]), LOGITS[kind], **tolerance)
        if kind == "snn":
            torch.testing.assert_close(model(LOGITS["images"], firing="deferred"), LOGITS["snn-deferred"], **tolerance)
