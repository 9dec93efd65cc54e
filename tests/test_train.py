"""fit() and distill(): same seed, same weights; a stopped run ends where the other ends; only fit is in place."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import qsnn
from qsnn.distillation.losses import distillation_loss, smoothed_cross_entropy, step_divergence
from qsnn.measure.task import kl_divergence
from qsnn.training.averaging import WeightAverage, estimate_norms_

SHORT = qsnn.TrainConfig(epochs=3, lr=0.05, train_images=256)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def fresh(digits: qsnn.Data) -> nn.Module:
    return qsnn.create_model("study", digits, seed=3)


def test_the_same_seed_gives_the_same_weights(digits: qsnn.Data) -> None:
    first, second, other = fresh(digits), fresh(digits), fresh(digits)
    history = qsnn.fit(first, digits, SHORT)
    qsnn.fit(second, digits, SHORT)
    qsnn.fit(other, digits, qsnn.TrainConfig(epochs=3, lr=0.05, train_images=256, seed=1))
    assert equal(first, second) and not equal(first, other)
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert not first.training


def test_short_floats_that_a_cpu_emulates_are_said(digits: qsnn.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    few = qsnn.TrainConfig(epochs=1, train_images=64, precision="bf16")
    for there, said in ((False, 1), (True, 0)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", qsnn.QsnnWarning)
            qsnn.fit(fresh(digits), digits, few)
        assert ["emulates it: precision='bf16' takes many times as long" in str(one.message) for one in found] == [
            True
        ] * said
        assert all(one.filename == __file__ for one in found)


def test_the_average_of_weights_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.25)
    for step, value in ((1, 2.0), (2, 4.0)):  # decays min(1/4, 2/11) and min(1/4, 3/12)
        model.weight.data.fill_(value)
        average.update_(model, step)
    average.apply_(model)
    assert model.weight.item() == pytest.approx(0.25 * (2 / 11 * 1.0 + 9 / 11 * 2.0) + 0.75 * 4.0)
    with pytest.raises(ValueError, match="averages of other weights"):
        average.restore_({"weight": torch.zeros(2, 1)})


def test_norms_are_estimated_anew_but_for_frozen_ones() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    parts = [torch.randn(8, 2) + 3, torch.randn(8, 2) * 2]
    estimate_norms_(model, iter(parts), ["2"])
    norm = model[0]
    assert torch.allclose(norm.running_mean, (parts[0].mean(0) + parts[1].mean(0)) / 2, atol=1e-6)
    assert torch.allclose(norm.running_var, (parts[0].var(0) + parts[1].var(0)) / 2, atol=1e-5)
    assert norm.momentum == 0.1 and not any(module.training for module in model.modules())
    assert model[2].running_mean.eq(0).all() and model[2].num_batches_tracked == 0


def test_a_run_ends_with_its_average(digits: qsnn.Data) -> None:
    """The same steps, other weights at the end, and the last epoch's score is theirs."""
    last, averaged, again = fresh(digits), fresh(digits), fresh(digits)
    qsnn.fit(last, digits, SHORT)
    history = qsnn.fit(averaged, digits, replace(SHORT, ema=0.9))
    assert not equal(last, averaged)
    assert qsnn.accuracy(averaged, digits.val) == pytest.approx(history[-1].val_accuracy)
    qsnn.fit(again, digits, replace(SHORT, ema=0.9))
    assert equal(again, averaged)


def test_a_student_ends_with_its_average(digits: qsnn.Data) -> None:
    qann = qsnn.quantize(fresh(digits), digits)
    options = {"epochs": 2, "train_images": 256, "train_threshold": "channel", "optimizer": "adamw", "lr": 0.002}
    last, averaged = (
        qsnn.distill(qsnn.convert(qann), qann, digits, qsnn.DistillConfig(ema=ema, **options)) for ema in (0.0, 0.8)
    )
    assert not equal(last, averaged)
    images = torch.stack([digits.val[i][0] for i in range(20)])
    with torch.no_grad():
        wanted = averaged.double()(images.double()).argmax(-1)
        assert torch.equal(qsnn.fold(averaged)(images).argmax(-1), wanted)


def test_training_learns(digits: qsnn.Data) -> None:
    model = fresh(digits)
    history = qsnn.fit(model, digits, qsnn.TrainConfig(epochs=8))
    assert history[-1].loss < 0.3 * history[0].loss
    assert qsnn.accuracy(model, digits.val) > 90


def test_the_global_random_state_is_left_alone(digits: qsnn.Data) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    qsnn.fit(fresh(digits), digits, qsnn.TrainConfig(epochs=1, train_images=128))
    assert torch.equal(torch.rand(3), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["teacher", "qann", "student"])
def test_a_stopped_run_goes_on_to_the_same_weights(kind: str, digits: qsnn.Data, tmp_path: Path) -> None:
    teacher = fresh(digits).eval()
    qann = qsnn.quantize(teacher, digits)
    start: nn.Module = {"teacher": teacher, "qann": qann, "student": qsnn.convert(qann)}[kind]

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, left: list[int]) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        logits = model(images)
        return nn.functional.cross_entropy(logits if logits.dim() == 2 else logits[-1], labels)

    whole, cut = copy.deepcopy(start), copy.deepcopy(start)
    history = qsnn.fit(whole, digits, SHORT, loss=lambda *args: loss(*args, [99]))
    state = tmp_path / "state"
    for _ in range(3):  # each start gets through a little more than one epoch of two steps
        try:
            continued = qsnn.fit(cut, digits, SHORT, loss=lambda *args, left=[3]: loss(*args, left), resume=state)
        except Stop:
            cut = copy.deepcopy(start)  # the process is gone; only the file is left
    assert equal(whole, cut)
    assert continued == history


def test_a_foreign_or_broken_state_is_refused(digits: qsnn.Data, tmp_path: Path) -> None:
    state = tmp_path / "state"
    qsnn.fit(fresh(digits), digits, qsnn.TrainConfig(epochs=1, train_images=128), resume=state)
    with pytest.raises(ValueError, match="other options"):
        qsnn.fit(fresh(digits), digits, qsnn.TrainConfig(epochs=2, train_images=128), resume=state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no state of a training run"):
        qsnn.fit(fresh(digits), digits, qsnn.TrainConfig(epochs=1, train_images=128), resume=state)


def test_divergence_is_an_error_that_says_what_to_try(digits: qsnn.Data) -> None:
    model = fresh(digits)
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="epoch 1 of 'train'; try a lower lr"):
        qsnn.fit(model, digits, SHORT)


def test_scales_and_norms_are_not_decayed(digits: qsnn.Data) -> None:
    qann = qsnn.quantize(fresh(digits).eval(), digits)
    from qsnn.training.fit import _optimizer

    optimizer, _ = _optimizer(qann, SHORT, 2)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in qann.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() > 1), name


def test_distill_returns_a_new_model_of_the_same_precision(digits: qsnn.Data) -> None:
    teacher = fresh(digits).eval()
    qann = qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(weight_bits=1))
    snn = qsnn.convert(qann)
    before, before_teacher = copy.deepcopy(snn.state_dict()), copy.deepcopy(qann.state_dict())
    student = qsnn.distill(snn, qann, digits, qsnn.DistillConfig(epochs=1, timesteps=3, train_images=256))
    assert all(torch.equal(value, before[name]) for name, value in snn.state_dict().items())
    assert all(torch.equal(value, before_teacher[name]) for name, value in qann.state_dict().items())
    assert not equal(snn, student) and student.timesteps == 3
    assert qsnn.integer_weights(student.network.get_submodule("3"))[0].unique().tolist() == [-1, 1]


def test_batch_norm_of_a_student_sees_time_and_batch_together(digits: qsnn.Data) -> None:
    qann = qsnn.quantize(fresh(digits).eval(), digits)
    snn = qsnn.convert(qann).train()
    norm = snn.network.get_submodule("4")
    norm.reset_running_stats()
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    snn(next(qsnn.batches(digits.train, 16))[0], timesteps=3)
    hook.remove()
    assert len(seen) == 1 and len(seen[0]) == 3 * 16
    assert torch.allclose(norm.running_mean, 0.1 * seen[0].mean((0, 2, 3)), atol=1e-5)


def test_losses_by_hand() -> None:
    z = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])  # T = 2, B = 1: the mean is (1, 1)
    labels, target = torch.tensor([0]), torch.tensor([[1.0, 1.0]])
    log2 = torch.tensor(2.0).log()
    assert torch.allclose(smoothed_cross_entropy(z, labels, 0.1), log2)
    assert torch.allclose(kl_divergence(z.mean(0), target, 4.0), torch.zeros(()))
    p = torch.softmax(torch.tensor([2.0, 0.0]), 0)
    by_hand = (0.5 * (0.5 / p).log()).sum()
    assert torch.allclose(step_divergence(z, target, 1.0), by_hand)
    config = qsnn.DistillConfig(ce_weight=0.5, step_ce_weight=0, kd_weight=2.0, step_weight=3.0, kd_temperature=1.0)
    terms = distillation_loss(z, [target], labels, config)
    assert torch.allclose(sum(terms.values()), 0.5 * log2 + 3.0 * by_hand)
    assert list(terms) == ["ce", "kd", "step"]


def test_kl_is_zero_only_at_the_teacher() -> None:
    z = torch.randn(8, 5)
    assert float(kl_divergence(z, z, 3.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(kl_divergence(z, z.roll(1, 0), 3.0)) > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"timesteps": 0}, "timesteps must be a whole number from 1"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"ce_weight": 0, "step_ce_weight": 0}, "every loss term"),
        ({"kd_weight": -1.0}, "kd_weight must be a number from 0"),
        ({"epochs": -1}, "epochs"),
    ],
)
def test_impossible_distillations(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        qsnn.DistillConfig(**options)


def test_wrong_students_are_refused(qann: nn.Module, snn: qsnn.SNN, digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match="holds no SpikingJelly node"):
        qsnn.distill(qann, qann, digits)
    with pytest.raises(ValueError, match="folded network cannot be trained"):
        qsnn.distill(qsnn.fold(snn), qann, digits)
    with pytest.raises(TypeError, match="TrainConfig"):
        qsnn.fit(qann, digits, {"epochs": 1})


@pytest.mark.parametrize("options", [{"epochs": -1}, {"batch_size": 0}, {"optimizer": "lion"}, {"kd_temperature": 0}])
def test_impossible_training(options: dict) -> None:
    with pytest.raises(ValueError, match=r"epochs|batch_size|optimizer|kd_temperature"):
        qsnn.TrainConfig(**options)


def test_frozen_batch_norms_stay_frozen(digits: qsnn.Data) -> None:
    model = qsnn.create_model("study", digits).train()
    model[1].eval()
    before = model[1].running_mean.clone(), model[4].running_mean.clone()
    qsnn.fit(model, digits, qsnn.TrainConfig(epochs=1, train_images=128))
    assert torch.equal(model[1].running_mean, before[0]) and not torch.equal(model[4].running_mean, before[1])
