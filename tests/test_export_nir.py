"""NIR: our file gives every integer logit in each simulator; files of others come in with their own spikes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import scramble
from test_export_c import Moved
from test_fold import NETS, plain_net
from torch import Tensor, nn

import qsnn
from qsnn.cli.main import main
from qsnn.folded.neurons import Current
from qsnn.snn.network import TimeLoop

nir = pytest.importorskip("nir", reason="the package nir is not installed (extra nir)")
pytest.importorskip("nirtorch", reason="the package nirtorch is not installed (extra nir)")

from qsnn.export.nir import load_into, write  # noqa: E402
from qsnn.export.nir_read import encoded  # noqa: E402
from qsnn.export.nir_spyx import chain_of  # noqa: E402
from qsnn.export.nir_student import from_nir  # noqa: E402

NAMES = {"plain": NETS["average pooling"], "residual": NETS["residual"], "moved": lambda data: Moved(views=False)}


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
        model = scramble(NAMES[request.param](digits))
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


def test_spyx_gives_every_integer_logit_of_a_chain(request, written, digits):
    pytest.importorskip("spyx", reason="spyx is not installed (extra spyx, which brings JAX)")
    folded, path, _ = written
    if "residual" in request.node.name or "moved" in request.node.name:
        pytest.skip("it branches, which is refused")
    images = next(qsnn.batches(digits.test, 100))[0]
    network = load_into("spyx", path)
    with torch.no_grad():
        for part in (images, images[:50], images[50:]):
            assert torch.equal(network.integer_logits(part), last_integers(folded, part))
        assert torch.equal(network(images), folded(images)), "and the answers to the last bit"
        write(folded, path.with_name("one.nir"), timesteps=1)
        found = load_into("spyx", path.with_name("one.nir")).integer_logits(images)
        assert torch.equal(found, last_integers(folded, images, 1))


def test_what_spyx_would_read_as_something_else_is_refused_by_name(request, written):
    graph = nir.read(written[1])
    if "residual" in request.node.name or "moved" in request.node.name:
        with pytest.raises(ValueError, match=r"Spyx cannot run this network: .*\(it goes to .*runs chains alone"):
            chain_of(graph)
        return
    chain = chain_of(graph)
    assert set(chain) == set(graph.nodes) and (chain[0], chain[-1]) == ("input", "output")
    first, second = [name for name in chain if isinstance(graph.nodes[name], nir.Conv2d)][:2]
    graph.nodes[first].dilation, graph.nodes[second].groups = (2, 2), 2
    graph.nodes[chain[-2]].weight = graph.nodes[chain[-2]].weight.astype(np.float64)
    said = rf"{first} \(.*its dilation\); {second} \(.*its groups\); {chain[-2]} \(.*float64.*use sinabs, norse or"
    with pytest.raises(ValueError, match=said):
        chain_of(graph)


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
    with pytest.raises(ValueError, match="expected a simulator of sinabs, norse, spikingjelly, spyx, got 'brian'"):
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


def test_our_own_file_comes_back_with_every_integer(written, digits):
    folded, path, found = written
    images = next(qsnn.batches(digits.test, 60))[0]
    loaded, student = load_into("spikingjelly", path), from_nir(path, written_by="qsnn")
    assert isinstance(student, qsnn.SNN)
    frames = encoded(images, loaded.input_step, loaded.levels, 2).transpose(0, 1)  # (B, T, C + 2, H, W)
    frames = frames.to(torch.float32 if found.dtype == "float32" else torch.float64)
    again = qsnn.fold(student)
    student = student.to(frames.dtype)
    with torch.no_grad():
        assert torch.equal(student.step_logits(frames, timesteps=2).double(), last_integers(folded, images))
        assert torch.equal(again.step_logits(frames, timesteps=2).double(), last_integers(folded, images))


def test_what_came_in_is_folded_saved_and_loaded(written, digits, tmp_path, capsys):
    _, path, _ = written
    student = from_nir(path, written_by="qsnn")
    folded, name = qsnn.fold(student), "qsnn.export.nir_student:from_nir"
    (side,) = {tuple(student.qsnn_recipe["input_shape"])}
    frames = torch.randint(-3, 4, (5, 2, *side), generator=torch.Generator().manual_seed(0)).float()
    for network, file in ((student, "student"), (folded, "folded")):
        qsnn.save(network, tmp_path / file)
        loaded = qsnn.load(tmp_path / file, model=from_nir)
        assert loaded.folded == network.folded and loaded.timesteps == network.timesteps
        with torch.no_grad():
            assert torch.equal(loaded.step_logits(frames, timesteps=2), network.step_logits(frames, timesteps=2))
        main(["info", str(tmp_path / file), "--model", name])
        said = capsys.readouterr().out
        assert "written by qsnn: reset soft, in the step of the spike; a neuron fires at v >= θ; dt = 0.0001 s" in said


def drive(timesteps: int = 6) -> Tensor:
    return torch.rand(timesteps, 40, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 0.3


def steps_of(student: TimeLoop, x: Tensor) -> Tensor:
    """Vectors in time, (T, B, F), step by step: a TimeLoop takes frames of images alone."""
    from spikingjelly.activation_based import functional

    functional.reset_net(student.network)
    return torch.stack([student.network(step) for step in x])


def same(student: TimeLoop, spikes: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        ours = student.step_logits(x.transpose(0, 1)) if x.dim() == 5 else steps_of(student, x)
    assert torch.equal(ours, spikes), f"{int((ours != spikes).sum())} of {spikes.numel()} differ"
    assert 0.01 < float(spikes.mean()) < 0.95


@pytest.mark.parametrize("make", ["if", "lif", "lif-whole-input"])
def test_a_file_of_spikingjelly_gives_its_own_spikes(make, tmp_path):
    from spikingjelly.activation_based import functional, layer, neuron
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    def node() -> nn.Module:
        kind = neuron.IFNode if make == "if" else neuron.LIFNode
        return kind(v_threshold=0.3, **({} if make == "if" else {"tau": 2.7, "decay_input": make == "lif"}))

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), node(), layer.AvgPool2d(2), layer.Conv2d(4, 6, 3, stride=2), node(),
        layer.Flatten(), layer.Linear(6, 10), node(),
    )  # fmt: skip
    x = drive()
    export_to_nir(net, x[0], tmp_path / "net.nir")
    functional.reset_net(net)
    with torch.no_grad():
        spikes = torch.stack([net(step) for step in x])
    student = from_nir(tmp_path / "net.nir", written_by="spikingjelly")
    same(student, spikes, x)
    assert student.qsnn_recipe["model"]["options"]["reset"] == "hard"


@pytest.mark.filterwarnings("ignore:nirtorch.extract_nir_graph:DeprecationWarning")
@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
def test_a_file_of_snntorch_gives_its_own_spikes(mechanism, tmp_path):
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    from snntorch.export_nir import export_to_nir

    def node(width: int) -> nn.Module:
        beta, threshold = torch.full((width,), 0.85), torch.linspace(0.2, 0.4, width)
        return snntorch.Leaky(beta, threshold, init_hidden=True, reset_mechanism=mechanism)

    torch.manual_seed(0)
    # with convolutions its exporter fails in nir 1.0.8 (infer_types wants two paddings)
    net = nn.Sequential(nn.Linear(64, 30), node(30), nn.Linear(30, 20), node(20), nn.Linear(20, 10), node(10))
    x = drive().flatten(2)
    graph = export_to_nir(net, x[0], ignore_dims=[0])
    nir.write(tmp_path / "net.nir", graph)
    for module in net:
        if isinstance(module, snntorch.Leaky):
            module.mem = torch.zeros(1)
    with torch.no_grad():
        spikes = torch.stack([net(step) for step in x])
    reset = "hard" if mechanism == "zero" else None  # the file does not say which
    student = from_nir(tmp_path / "net.nir", written_by="snntorch", reset=reset)
    same(student, spikes, x)


def test_a_student_from_a_file_is_benchmarked_and_saved(digits, tmp_path):
    weight = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    node = nir.IF(r=np.ones(10), v_threshold=np.full(10, 0.5), v_reset=np.zeros(10))
    graph = nir.NIRGraph(
        nodes={
            "input": nir.Input(input_type={"input": np.array([1, 8, 8])}),
            "flat": nir.Flatten(input_type={"input": np.array([1, 8, 8])}, start_dim=0),
            "layer": nir.Linear(weight=weight), "if": node,
            "output": nir.Output(output_type={"output": np.array([10])}),
        },
        edges=[("input", "flat"), ("flat", "layer"), ("layer", "if"), ("if", "output")],
    )  # fmt: skip
    nir.write(tmp_path / "net.nir", graph)
    student = from_nir(tmp_path / "net.nir", written_by="sinabs", timesteps=3)
    found = qsnn.benchmark(student, digits.test.head(50), timesteps=3)
    assert found.timesteps == (1, 2, 3)
    qsnn.save(student, tmp_path / "student.safetensors")
    again, images = qsnn.load(tmp_path / "student.safetensors", model=from_nir), next(qsnn.batches(digits.test, 20))[0]
    with torch.no_grad():
        assert torch.equal(again(images), student(images))


def test_what_from_nir_refuses(tmp_path):
    path = tmp_path / "net.nir"
    ones = np.ones(4)
    bad = nir.CubaLIF(tau_syn=ones, tau_mem=ones, r=ones, v_leak=0 * ones, v_threshold=ones)
    nodes = {
        "input": nir.Input(input_type={"input": np.array([4])}), "a": bad, "b": nir.Threshold(threshold=ones),
        "output": nir.Output(output_type={"output": np.array([4])}),
    }  # fmt: skip
    nir.write(path, nir.NIRGraph(nodes=nodes, edges=[("input", "a"), ("a", "b"), ("b", "output")]))
    with pytest.raises(ValueError, match=r"a \(CubaLIF has no form here\); b \(Threshold has no form here\)"):
        from_nir(path, written_by="snntorch")
    with pytest.raises(ValueError, match="expected written_by of qsnn, sinabs"):
        from_nir(path, written_by="brian")
    with pytest.raises(ValueError, match="reset must be 'soft' or 'hard'"):
        from_nir(path, written_by="norse", reset="half")
