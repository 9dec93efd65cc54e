"""Plain ReLU networks: thresholds from data, and corrections on the spikes that really arrive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_fold import NETS, recorded
from torch import Tensor, nn

import qsnn
from qsnn.graph.call import Call
from qsnn.graph.kinds import does
from qsnn.graph.spell import trace
from qsnn.snn.fits import Trial, fit_layer_, fit_line_
from qsnn.snn.neurons import IFNode
from qsnn.snn.pieces import Pieces, Reference, in_pieces


@pytest.fixture(scope="module")
def trained(digits: qsnn.Data) -> nn.Module:
    model = qsnn.create_model("vgg-small", digits)
    qsnn.fit(model, digits, qsnn.TrainConfig(epochs=6))
    return model


def convert(model: nn.Module, data: qsnn.Data, **options: object) -> qsnn.SNN:
    return qsnn.convert(model, data, qsnn.ConvertConfig(**options))


def test_corrections_help_where_steps_are_few(trained: nn.Module, digits: qsnn.Data) -> None:
    found = {kind: qsnn.accuracy(convert(trained, digits, timesteps=1, correction=kind, initial="half"), digits.test)
             for kind in ("none", "bias", "weights")}  # fmt: skip
    assert found["none"] < found["bias"] < found["weights"]
    assert found["weights"] > 93
    assert qsnn.accuracy(convert(trained, digits, timesteps=1), digits.test) > 93


@pytest.mark.parametrize("threshold", ["mse", "max", "percentile"])
def test_many_steps_are_the_network_itself(trained: nn.Module, digits: qsnn.Data, threshold: str) -> None:
    snn = convert(trained, digits, timesteps=64, threshold=threshold, calibration_images=64)
    few = digits.test.head(200)
    assert qsnn.accuracy(snn, few) >= qsnn.accuracy(trained, few) - 1.0


def test_the_argument_stays_and_images_have_no_order(trained: nn.Module, digits: qsnn.Data) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    images = torch.stack([digits.train[i][0] for i in range(64)])
    labels = torch.zeros(64, dtype=torch.int64)
    order = torch.randperm(64)
    first = convert(trained, [(images, labels)], calibration_images=64)
    second = convert(trained, [(images[order], labels)], calibration_images=64)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_every_family_folds_counts_and_loads(name: str, digits: qsnn.Data, images: Tensor, tmp_path: Path) -> None:
    model = NETS[name](digits).eval()
    snn = convert(model, digits, timesteps=3, calibration_images=64)
    folded = qsnn.fold(snn)
    spikes, logits = recorded(snn.double(), images.double())
    kept, answers = recorded(folded, images)
    assert all(torch.equal(train, kept[layer]) for layer, train in spikes.items())
    assert torch.equal(logits.argmax(-1), answers.argmax(-1))
    measured = qsnn.benchmark(folded, digits.test.head(50), timesteps=3)
    assert measured.synops and measured.synops > 0
    if name in ("mixed",):
        return  # not one of ours, so no file can say how it is built
    snn = snn.float()
    for made in (snn, qsnn.fold(snn)):
        qsnn.save(made, tmp_path / "a.safetensors")
        assert torch.equal(made.eval()(images), qsnn.load(tmp_path / "a.safetensors")(images))


def test_float32_folds_answer_alike(trained: nn.Module, digits: qsnn.Data) -> None:
    """A potential that meets θ to the last bit may flip a spike in float32; it is rare."""
    snn, few = convert(trained, digits, timesteps=4, calibration_images=64), digits.test.head(200)
    exact, fast = qsnn.fold(snn), qsnn.fold(snn, dtype=torch.float32)
    images, _ = next(qsnn.batches(few, 200))
    assert fast(images).dtype == torch.float32
    (a, _), (b, _) = recorded(exact, images, timesteps=4), recorded(fast, images, timesteps=4)
    same = [float((a[name] == b[name]).double().mean()) for name in a]
    assert min(same) > 0.9999
    assert qsnn.accuracy(exact, few) == pytest.approx(qsnn.accuracy(fast, few), abs=0.5)


def test_synops_by_hand() -> None:
    """One 2x2 image whose four neurons all fire once, into a layer of three outputs: 4 · 3 accumulates."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)).eval()
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    image = [(torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))]
    snn = qsnn.convert(model, image, qsnn.ConvertConfig(timesteps=1))
    measured = qsnn.benchmark(snn, image, timesteps=1)
    assert measured.synops == 12.0 and measured.macs == 4.0 and measured.spike_rate == 1.0


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "strided", "signal"])
def test_least_squares_finds_the_layer(kind: str) -> None:
    torch.manual_seed(1)  # the pull towards the old weights leaves about as much as is allowed here
    layer, shape = {
        "linear": lambda: (nn.Linear(6, 4), (400, 6)),
        "conv": lambda: (nn.Conv2d(3, 4, 3, padding=1), (40, 3, 7, 7)),
        "grouped": lambda: (nn.Conv2d(4, 8, 3, groups=2, dilation=2), (40, 4, 9, 9)),
        "strided": lambda: (nn.Conv2d(3, 4, (3, 1), stride=(2, 1)), (40, 3, 9, 5)),
        "signal": lambda: (nn.Conv1d(3, 4, 3, padding=1), (60, 3, 11)),
    }[kind]()
    x = torch.randn(shape)
    with torch.no_grad():
        wanted = layer(x)
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        fit_layer_(layer, x, wanted - layer(x), "weights")
        assert float((layer(x) - wanted).square().mean()) < 1e-4 * float(wanted.var())


def test_behind_a_batch_norm_what_is_missing_is_in_its_units() -> None:
    layer, norm, x = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), torch.randn(60, 3, 7, 7)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -2.0, 3.0, 0.0]))
        wanted, kept = norm(nn.Conv2d(3, 4, 3)(x)), layer.weight[3].clone()
        fit_layer_(layer, x, wanted - norm(layer(x)), "weights", norm.weight / (norm.running_var + norm.eps).sqrt())
        assert torch.allclose(norm(layer(x)), wanted, atol=0.02)
        assert torch.equal(layer.weight[3], kept)  # a channel that the batch norm takes away


def test_behind_a_relu_only_what_it_lets_through_is_fitted() -> None:
    """One input of two is lost: the rest gives the positive part better where it need not give the negative one."""
    x = torch.randn(4000, 2)
    wanted = x @ torch.tensor([[1.0], [0.5]]) - 0.3
    errors = []
    for rectified in (None, wanted):
        layer = nn.Linear(1, 1)
        with torch.no_grad():
            fit_layer_(layer, x[:, :1], wanted - layer(x[:, :1]), "weights", rectified=rectified)
            errors.append(float((layer(x[:, :1]).relu() - wanted.relu()).square().mean()))
    assert errors[1] < 0.98 * errors[0]


def test_what_comes_over_the_other_way_loses_its_error_in_the_sum(digits: qsnn.Data) -> None:
    """Behind the first addition the ReLU sees less error than where each layer is fitted for itself."""
    model = qsnn.create_model("resnet-small", digits)
    qsnn.fit(model, digits, qsnn.TrainConfig(epochs=1))
    pieces = in_pieces(torch.stack([digits.train[i][0] for i in range(128)]), 2**14)
    errors = []
    for targets in ("layers", "sums"):
        snn = convert(model, digits, timesteps=2, targets=targets, initial="half", calibration_images=128).eval()
        walk = Pieces(snn.network, pieces, Call(2, "online"))
        with torch.no_grad():
            for node in walk.order:
                if does(walk.layer(node)) == "adds":
                    break
                walk.keep(node)
            exact = Reference(trace(model.eval(), digits.shape), torch.cat(pieces), {node.name})
            errors.append(float((walk.mean(node).relu() - exact.value(node.name).relu()).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_several_timesteps_at_once_are_each_as_alone(trained: nn.Module, digits: qsnn.Data) -> None:
    config = qsnn.ConvertConfig(calibration_images=48)
    together = qsnn.convert(trained, digits, config, timesteps=(1, 3))
    assert {t: snn.timesteps for t, snn in together.items()} == {1: 1, 3: 3}
    alone = convert(trained, digits, calibration_images=48, timesteps=3).state_dict()
    assert all(torch.equal(value, alone[name]) for name, value in together[3].state_dict().items())
    with pytest.raises(ValueError, match=r"timesteps such as \(1, 2, 4\)"):
        qsnn.convert(trained, digits, config, timesteps=())
    with pytest.raises(ValueError, match="from 1 to 4,096, got 0"):
        qsnn.convert(trained, digits, config, timesteps=(2, 0))


def test_values_in_pieces_are_the_networks_and_only_spikes_are_kept(trained: nn.Module, digits: qsnn.Data) -> None:
    snn = convert(trained, digits, timesteps=3, calibration_images=32).eval()
    images = torch.stack([digits.val[i][0] for i in range(20)])
    pieces = in_pieces(images, 2**15)
    assert [len(part) for part in pieces] == [4] * 5
    walk = Pieces(snn.network, pieces, Call(3, "online"))
    with torch.no_grad():
        for node in walk.order[:-1]:
            walk.keep(node)
            held = [value for one, values in walk.values.items() for value in values if one.op != "placeholder"]
            assert all(value.dtype == torch.int8 for value in held)
        assert torch.allclose(walk.mean(walk.order[-2]), snn(torch.cat(pieces))[-1], atol=1e-5)


def test_start_and_bias_help_a_neuron_whose_current_is_shifted() -> None:
    """A current that lacks a quarter of θ: θ alone cannot give the rate, v₀ and the bias can."""
    wanted = torch.rand(4000, 2)
    current = (wanted - 0.25).expand(4, -1, -1)
    trial = Trial(IFNode(torch.ones(2)), current, wanted, torch.ones(2), "online")
    with torch.no_grad():
        trial.thresholds()
        alone = trial.least.clone()
        trial.starts(shifts=True)
    assert bool((trial.least < 0.3 * alone).all()) and bool((trial.shift > 0).all())


def test_a_line_by_channel_is_the_best_one() -> None:
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(20, 3, 4, 4)
    wanted = x * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1) + 0.3
    with torch.no_grad():
        fit_line_(norm, x, wanted)
    assert torch.allclose(norm(x), wanted, atol=1e-4)


def test_a_quantized_network_answers_better_in_two_online_steps(trained: nn.Module, digits: qsnn.Data) -> None:
    qann = qsnn.quantize(trained, digits)
    plain, corrected = qsnn.convert(qann), qsnn.convert(qann, digits)
    assert qsnn.accuracy(corrected, digits.test) > qsnn.accuracy(plain, digits.test)
    assert not qsnn.certify(corrected, qann, digits.test.head(20)).exact  # it is no longer the same network
    assert qsnn.certify(plain, qann, digits.test.head(20)).exact


class Awkward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU()
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)
        self.relu, self.pool, self.last = nn.ReLU(), nn.MaxPool2d(2), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.act(self.norm(self.conv(x))))))
        return torch.sigmoid(self.last(x.flatten(1))).softmax(1)


def test_everything_without_a_spiking_form_is_named_at_once(digits: qsnn.Data) -> None:
    with pytest.raises(ValueError) as caught:
        qsnn.convert(Awkward(), digits)
    message = str(caught.value)
    for place in ("norm (GroupNorm", "act (GELU", "bn (BatchNorm2d with statistics of each batch's own",
                  "sigmoid (sigmoid", "put nn.ReLU in its place"):  # fmt: skip
        assert place in message, (place, message)
    assert "\n" not in message


def test_strict_refuses_a_max_pool_of_online_spikes(digits: qsnn.Data) -> None:
    model = qsnn.create_model("vgg-small", digits, pooling="max")
    with pytest.raises(ValueError, match=r"MaxPool2d of online spikes: use average pooling, or firing='deferred'"):
        qsnn.convert(model, digits, qsnn.ConvertConfig(strict=True, calibration_images=8))


def test_signed_spikes_do_not_meet_a_max_pool(digits: qsnn.Data) -> None:
    model = qsnn.create_model("vgg-small", digits, pooling="max")
    with pytest.raises(ValueError, match="signed spikes: use average pooling"):
        qsnn.convert(model, digits, qsnn.ConvertConfig(signed=True))


@pytest.mark.parametrize(
    "options", [{"threshold": "mean"}, {"correction": "all"}, {"percentile": 0.0}, {"initial": "0"}, {"targets": ""}]
)
def test_impossible_calibrations(options: dict) -> None:
    with pytest.raises(ValueError, match=r"mse, max|weights, bias|percentile|mse, half|sums, layers"):
        qsnn.ConvertConfig(**options)
