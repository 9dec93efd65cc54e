"""NIR: our file gives every integer logit in each simulator; files of others come in with their own spikes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import scramble
from test_fold import NETS, plain_net
from torch import Tensor

import qsnn
from qsnn.folded.neurons import Current

nir = pytest.importorskip("nir", reason="the package nir is not installed (extra nir)")
pytest.importorskip("nirtorch", reason="the package nirtorch is not installed (extra nir)")

from qsnn.export.nir import load_into, write  # noqa: E402

NAMES = {"plain": "average pooling", "residual": "residual"}


def last_integers(folded: qsnn.SNN, images: Tensor, timesteps: int = 2) -> Tensor:
    """What the last layer adds up at each step, (T, B, K)."""
    seen: list[Tensor] = []
    last = [m for m in folded.modules() if isinstance(m, Current)][-1]
    handle = last.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        folded(images, timesteps=timesteps, firing="online")
    handle.remove()
    return seen[0].double().unflatten(0, (timesteps, -1))


@pytest.fixture(scope="module", params=[*NAMES, "ties"])
def written(request, digits, tmp_path_factory):
    torch.manual_seed(1)
    if request.param == "ties":
        qann = plain_net(digits)
    else:
        model = scramble(NETS[NAMES[request.param]](digits))
        qann = qsnn.quantize(model, digits, qsnn.QuantizeConfig(weight_bits=4, levels=2)).eval()
    folded = qsnn.fold(qsnn.convert(qann))
    path = tmp_path_factory.mktemp("nir") / "net.nir"
    return folded, path, write(folded, path)


@pytest.mark.parametrize("simulator", ["sinabs", "norse", "spikingjelly"])
def test_a_simulator_gives_every_integer_logit(simulator, written, digits):
    pytest.importorskip({"spikingjelly": "nir"}.get(simulator, simulator), reason=f"{simulator} is not installed")
    folded, path, _ = written
    images = next(qsnn.batches(digits.test, 100))[0]
    network = load_into(simulator, path)
    assert torch.equal(network.integer_logits(images), last_integers(folded, images))
    with torch.no_grad():
        assert torch.equal(network(images), folded(images)), "and the answers to the last bit"


def test_what_a_file_holds(written):
    _, path, found = written
    graph = nir.read(path)
    assert sum(isinstance(node, nir.IF) for node in graph.nodes.values()) == found.nodes["IF"]
    assert all(getattr(n, "groups", 1) == 1 for n in graph.nodes.values()), "SpikingJelly reads no groups"
    thresholds = np.concatenate([n.v_threshold.reshape(-1) for n in graph.nodes.values() if isinstance(n, nir.IF)])
    assert (thresholds > 0).all() and thresholds.dtype == np.dtype(found.dtype)
    whole = thresholds[thresholds != np.float32(0.999)]
    assert (4 * whole == np.round(4 * whole))[np.abs(whole - 0.999) > 1e-6].all(), "integers, or a quarter"


def test_one_step(snn, digits, tmp_path):
    folded = qsnn.fold(snn)
    write(folded, tmp_path / "net.nir", timesteps=1)
    images = next(qsnn.batches(digits.test, 50))[0]
    assert torch.equal(
        load_into("spikingjelly", tmp_path / "net.nir").integer_logits(images), last_integers(folded, images, 1)
    )


def test_refusals(snn, digits, tmp_path):
    folded, path = qsnn.fold(snn), tmp_path / "net.nir"
    with pytest.raises(ValueError, match="timesteps of 1 or 2, got 3: NIR's IF has one threshold"):
        write(folded, path, timesteps=3)
    with pytest.raises(ValueError, match="not folded"):
        write(snn, path)
    config = qsnn.QuantizeConfig(weight_bits=16, levels=2)
    model = scramble(qsnn.create_model("vgg-small", digits, pooling="max"))
    pooled = qsnn.fold(qsnn.convert(qsnn.quantize(model, digits, config)))
    with pytest.raises(ValueError, match=r"cannot be written as NIR: .*16 bit.*MaxPool2d has no node in NIR"):
        write(pooled, path)
    assert not path.exists()
    with pytest.raises(ValueError, match="expected a simulator of sinabs, norse, spikingjelly, got 'brian'"):
        load_into("brian", path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_into("norse", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no NIR file"):
        load_into("norse", path)
    eye = nir.Linear(weight=np.eye(2, dtype=np.float32))
    nir.write(path, nir.NIRGraph.from_list(eye))
    with pytest.raises(ValueError, match=r"was not written by qsnn; read it with qsnn.from_nir"):
        load_into("norse", path)
