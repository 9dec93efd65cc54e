"""A folded network in torch: torch.export writes it bit for bit, and no table is older than what it was made of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import scramble
from test_fold import NETS
from torch import Tensor

import qsnn
from qsnn.folded.integer import IntegerIF
from qsnn.folded.layers import IntegerInput, IntegerLayer
from qsnn.folded.neurons import Current, CurrentIF
from qsnn.folded.prepared import Prepared

DYNAMIC = {"images": {0: torch.export.Dim.DYNAMIC}}


def folded_net(name: str, digits: qsnn.Data) -> qsnn.SNN:
    torch.manual_seed(1)
    config = qsnn.QuantizeConfig(weight_bits=4, levels=2, calibration_images=64)
    return qsnn.fold(qsnn.convert(qsnn.quantize(scramble(NETS[name](digits)), digits, config).eval()))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_an_exported_program_gives_the_same_bits(name: str, digits: qsnn.Data, images: Tensor) -> None:
    folded = folded_net(name, digits)
    for firing in ("online", "deferred"):
        folded.firing = firing
        expected = folded(images)
        program = torch.export.export(folded, (images[:5],), dynamic_shapes=DYNAMIC)
        assert torch.equal(program.module()(images), expected), "also of another batch"


@torch.no_grad()
def test_it_exports_as_fold_and_load_hand_it_out(snn: qsnn.SNN, images: Tensor, tmp_path: Path) -> None:
    folded = qsnn.fold(snn)
    first = torch.export.export(folded, (images,)).module()(images)
    qsnn.save(folded, tmp_path / "folded.safetensors")
    loaded = qsnn.load(tmp_path / "folded.safetensors")
    assert torch.equal(torch.export.export(loaded, (images,)).module()(images), first)
    assert torch.equal(folded(images), first)


@torch.no_grad()
def test_what_is_not_prepared_is_not_exported(snn: qsnn.SNN, images: Tensor) -> None:
    folded = qsnn.fold(snn)
    four = {"timesteps": 4, "firing": "online"}
    with pytest.raises(RuntimeError, match="call the network once as it is to be exported"):
        torch.export.export(folded, (images,), four)
    expected = folded(images, **four)
    assert torch.equal(torch.export.export(folded, (images,), four).module()(images, **four), expected)
    layer = next(m for m in folded.modules() if isinstance(m, IntegerLayer))
    layer.weight.neg_()
    with pytest.raises(RuntimeError, match="changed since"):
        torch.export.export(folded, (images,), four)
    changed = folded(images, **four)
    assert not torch.equal(changed, expected)
    assert torch.equal(torch.export.export(folded, (images,), four).module()(images, **four), changed)


CHANGES: dict[type[Prepared], tuple[str, ...]] = {
    IntegerInput: ("step",),
    IntegerLayer: ("weight",),
    IntegerIF: ("factors", "bias", "threshold", "initial"),
    CurrentIF: ("factors_0", "bias", "threshold", "initial"),
    Current: ("factors_0", "bias"),
}


@pytest.mark.parametrize("how", ["in place", "in its place", "its memory", "through numpy"])
@torch.no_grad()
def test_every_change_of_a_buffer_is_seen_by_the_next_call(how: str, digits: qsnn.Data, images: Tensor) -> None:
    """The network is called, changed, called again; a copy that was never called before the change must agree."""
    changed, folded, images = 0, folded_net("mixed", digits), images[:8]
    for name, module in list(folded.network.named_modules()):
        for buffer in CHANGES.get(type(module), ()):  # type: ignore[call-overload]
            late = copy.deepcopy(folded)
            late(images)
            layer: Any = late.network.get_submodule(name)
            value = getattr(layer, buffer)
            other = value * 2 + 1 if value.dtype == torch.int8 else value * 0.6 + 0.01
            if how == "in place":
                value.copy_(other)
            elif how == "in its place":
                setattr(layer, buffer, other)
            elif how == "its memory":
                value.data = other
            else:
                value.numpy()[...] = other.numpy()
            for module_ in (fresh := copy.deepcopy(late)).modules():
                if isinstance(module_, Prepared):
                    assert not module_._prepared, "a copy prepares for itself"
            for firing in ("online", "deferred"):
                assert torch.equal(late(images, firing=firing), fresh(images, firing=firing)), (name, buffer)
            changed += not torch.equal(late(images), folded(images))
    assert changed >= 5
