"""Every precision: ±1 arithmetic is XNOR and popcount, fp16 is IEEE half, calibration alone already answers."""

from __future__ import annotations

import brevitas
import numpy as np
import pytest
import torch
from conftest import scramble
from torch import Tensor, nn

import qsnn
from qsnn.quant.activations import is_sign
from qsnn.quant.quantize import activation_quants
from qsnn.quant.weights import weight_bits


def popcount(bits: np.ndarray) -> np.ndarray:
    return np.unpackbits(bits, axis=-1).sum(-1, dtype=np.int64)


def xnor_matmul(a: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(B, n) by (K, n) signs as packed bits: n - 2·popcount(a xor w)."""
    packed_a, packed_w = np.packbits(a > 0, axis=-1), np.packbits(w > 0, axis=-1)
    return a.shape[-1] - 2 * popcount(packed_a[:, None] ^ packed_w[None])


@pytest.mark.parametrize("form", ["xnor", "sign"])
def test_binary_layers_are_xnor_popcount(form: str, digits: qsnn.Data, images: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 37, bias=False), nn.BatchNorm1d(37), nn.ReLU(), nn.Linear(37, 21, bias=False),
        nn.BatchNorm1d(21), nn.ReLU(), nn.Linear(21, 10),
    )  # fmt: skip
    config = qsnn.QuantizeConfig(weight_bits=1, act_form="sign", weight_form=form, first_last_bits=8)
    qann = qsnn.quantize(scramble(model), digits, config).eval()
    assert sum(is_sign(m) for m in qann.modules()) == 2
    layer = qann.get_submodule("4")
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda m, args, y: seen.extend([args[0], y]))
    with torch.no_grad():
        qann(images)
    hook.remove()
    inputs, outputs = seen
    integers, scale = qsnn.integer_weights(layer)
    assert set(inputs.unique().tolist()) == {-1.0, 1.0} and set(integers.unique().tolist()) == {-1, 1}
    products = xnor_matmul(inputs.numpy(), integers.numpy())
    assert np.array_equal(products, (inputs @ integers.float().T).numpy())
    assert torch.allclose(torch.from_numpy(products).float() * scale.flatten(), outputs, atol=1e-5)


def test_plain_sign_weights_have_one_constant_scale(teacher: nn.Module, digits: qsnn.Data) -> None:
    config = qsnn.QuantizeConfig(weight_bits=1, weight_form="sign", first_last_bits=None)
    qann = qsnn.quantize(teacher, digits, config)
    scales = [qsnn.integer_weights(m)[1] for m in qann.modules() if hasattr(m, "weight_quant")]
    assert {round(float(s), 6) for s in scales} == {0.1} and all(s.numel() == 1 for s in scales)


def test_binary_nets_train_and_are_exact_at_one_step(digits: qsnn.Data) -> None:
    teacher = qsnn.create_model("study", digits)
    qsnn.fit(teacher, digits, qsnn.TrainConfig(epochs=6))
    config = qsnn.QuantizeConfig(weight_bits=1, act_form="sign")
    qann = qsnn.quantize(teacher, digits, config)
    qsnn.fit(qann, digits, qsnn.TrainConfig(epochs=4), teacher=teacher)
    assert qsnn.accuracy(qann, digits.val) > 60
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=1))
    for firing in ("online", "deferred"):
        certificate = qsnn.certify(snn, qann, digits.test, timesteps=1, firing=firing)
        assert certificate.exact, str(certificate)
    assert qsnn.accuracy(qsnn.fold(snn), digits.test) == qsnn.accuracy(qann, digits.test)
    with pytest.raises(ValueError, match="one step"):
        snn(torch.zeros(1, 1, 8, 8), timesteps=2)
    with pytest.raises(ValueError, match="one step"):
        qsnn.convert(qann)


def test_fp16_weights_and_activations_are_ieee_half(teacher: nn.Module, digits: qsnn.Data, images: Tensor) -> None:
    config = qsnn.QuantizeConfig(weight_bits=16, act_form="fp16", input_bits=None, first_last_bits=None)
    qann = qsnn.quantize(teacher, digits, config).eval()
    layer = qann.get_submodule("3")
    weight = layer.quant_weight()
    weight = getattr(weight, "value", weight)
    assert weight_bits(layer) == 16
    assert torch.equal(weight, teacher[3].weight.half().float())
    seen: list[Tensor] = []
    hook = qann.get_submodule("5").register_forward_hook(lambda m, args, y: seen.append(y))
    with torch.no_grad():
        logits = qann(images)
    hook.remove()
    assert torch.equal(seen[0], seen[0].half().float())
    with torch.no_grad():
        assert torch.allclose(logits, teacher(images), rtol=0.02, atol=0.05)
    assert [layer.input_bits for layer in qsnn.summary(qann).layers] == [32, 16, 16, 16, 16]
    with pytest.raises(ValueError, match="of fp16: no spiking form"):
        qsnn.convert(qann)


def test_eight_bits_after_calibration_follow_the_float_net(teacher: nn.Module, digits: qsnn.Data) -> None:
    qann = qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(weight_bits=8, act_bits=8)).eval()
    images = next(qsnn.batches(digits.test, 540))[0]
    with torch.no_grad():
        difference = (qann(images) - teacher(images)).abs().mean() / teacher(images).abs().mean()
    assert float(difference) < 0.03


def test_calibration_corrects_the_mean_of_every_channel(digits: qsnn.Data) -> None:
    """With two-bit weights the first layer's channel means move; behind the batch norm they must be the float's."""
    model = scramble(qsnn.create_model("vgg-small", digits))
    qann = qsnn.quantize(model, digits, qsnn.QuantizeConfig(weight_bits=2, first_last_bits=None)).eval()
    images = next(qsnn.batches(digits.train, 512))[0]
    with torch.no_grad():
        wanted = model[1](model[0](images))
        got = qann.get_submodule("1")(qann.get_submodule("0")(qann.get_submodule("input_quant")(images)))
    assert torch.allclose(got.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-3)


class Meeting(nn.Module):
    """Quantized outputs that meet three ways, in a chain: a with b, then b with c."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()) for _ in range(3))
        self.d = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU())
        self.e = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a(x), self.b(x), self.c(x)
        return self.head(self.pool(self.e(self.d(torch.cat([a, b], 1)) + (b + c))).flatten(1))


def test_outputs_that_meet_share_one_step(digits: qsnn.Data) -> None:
    torch.manual_seed(0)
    qann = qsnn.quantize(Meeting(), digits).eval()
    quants = activation_quants(qann)
    assert len({id(quants[name].scaling_impl) for name in ("a.1", "b.1", "c.1", "d.1")}) == 1
    assert quants["e.1"].scaling_impl is not quants["a.1"].scaling_impl
    certificate = qsnn.certify(qsnn.convert(qann), qann, digits.test, images=100)
    assert certificate.exact, str(certificate)
    qann.load_state_dict(qann.state_dict())
    assert quants["a.1"].scaling_impl is quants["c.1"].scaling_impl, "loading must not untie them"
    qsnn.fit(qann, digits, qsnn.TrainConfig(epochs=1, train_images=256))
    assert torch.equal(quants["a.1"].step, quants["c.1"].step)


def test_relu6_clips_at_six(digits: qsnn.Data) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 10))
    with torch.no_grad():
        model[0].weight.mul_(100)
    qann = qsnn.quantize(model, digits, qsnn.QuantizeConfig(act_bits=8))
    (quant,) = activation_quants(qann).values()
    assert 5.0 < float(quant.step.detach()) * quant.levels <= 6.0 + 1e-5


def test_a_float_state_dict_loads_into_a_quantized_model(teacher: nn.Module, digits: qsnn.Data) -> None:
    other = scramble(qsnn.create_model("vgg-small", digits, seed=7), seed=7)
    qann = qsnn.quantize(other, digits)
    brevitas.config.IGNORE_MISSING_KEYS = True
    try:
        qann.load_state_dict(teacher.state_dict())
    finally:
        brevitas.config.IGNORE_MISSING_KEYS = False
    assert torch.equal(qann.get_submodule("3").weight, teacher[3].weight)


def test_conv1d(digits: qsnn.Data) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 6, 3, groups=3),
        nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(18, 5),
    )  # fmt: skip
    signals = [(torch.randn(64, 2, 16), torch.zeros(64, dtype=torch.int64))]
    qann = qsnn.quantize(scramble(model), signals).eval()
    certificate = qsnn.certify(qsnn.convert(qann), qann, signals)
    assert certificate.exact, str(certificate)
    assert "conv1d" in str(qsnn.summary(qann))
