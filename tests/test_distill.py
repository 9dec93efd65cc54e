"""distill(): loss terms by hand, what can be trained, pruned and proved, several processes, TensorBoard."""

from __future__ import annotations

import copy
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import qsnn
from qsnn.data.batches import batch_sizes, batches
from qsnn.distillation import losses
from qsnn.distillation.prune import sparsity_at, zero_weights

CONFIG = qsnn.DistillConfig(epochs=1, train_images=256, batch_size=64)


def config(**options: object) -> qsnn.DistillConfig:
    return qsnn.DistillConfig(**{"epochs": 1, "train_images": 256, "batch_size": 64, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def nets(digits: qsnn.Data) -> tuple[nn.Module, nn.Module, qsnn.SNN]:
    teacher = qsnn.create_model("study", digits)
    qsnn.fit(teacher, digits, qsnn.TrainConfig(epochs=3, batch_size=32))
    qann = qsnn.quantize(teacher, digits)
    return teacher, qann, qsnn.convert(qann)


def softmax_kl(target: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    p, q = torch.softmax(target, -1), torch.softmax(z, -1)
    return (p * (p / q).log()).sum(-1).mean()


def test_every_term_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 5, generator=generator)
    target, labels = torch.randn(4, 5, generator=generator), torch.tensor([0, 4, 2, 2])
    mean, answers = z.mean(0), torch.stack([z[:t].mean(0) for t in (1, 2, 3)])
    picked = -torch.log_softmax(z, -1)[:, range(4), labels].mean()
    by_hand = {
        losses.step_cross_entropy(z, labels): picked,
        losses.step_divergence(z, target): torch.stack([softmax_kl(target, step) for step in z]).mean(),
        losses.ensemble_divergence(z): torch.stack([softmax_kl(mean, step) for step in z]).mean(),
        losses.answer_divergence(z, target): torch.stack([softmax_kl(target, answer) for answer in answers]).mean(),
        losses.step_regulariser(z): (z - 1).square().mean(),
    }
    for found, expected in by_hand.items():
        assert torch.allclose(found, expected, atol=1e-6)


def test_the_ensemble_is_a_constant_to_the_gradient() -> None:
    z = torch.randn(1, 4, 5, requires_grad=True)  # of one step the ensemble is the step: no divergence, no gradient
    losses.ensemble_divergence(z).backward()
    assert float(z.grad.abs().max()) < 1e-6  # type: ignore[union-attr]


def test_steps_that_answer_rightly_teach_the_others() -> None:
    z = torch.tensor([
        [[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]],  # right, wrong, wrong
        [[1.0, 0.0], [4.0, 1.0], [1.0, 2.0]],  # right, right, wrong
    ])  # fmt: skip
    labels = torch.tensor([0, 0, 0])
    first, second = torch.tensor([1.5, 0.0]), z[1, 1]  # the mean of both, the one; no target for the third
    each = [softmax_kl(first, z[t, 0]) + softmax_kl(second, z[t, 1]) for t in (0, 1)]
    assert torch.allclose(losses.correct_divergence(z, labels), sum(each) / 6, atol=1e-6)  # 2 steps of 3 images
    nobody = torch.tensor([[[0.0, 1.0]], [[0.0, 2.0]]], requires_grad=True)
    losses.correct_divergence(nobody, torch.tensor([0])).backward()
    assert not nobody.grad.any()  # type: ignore[union-attr]


def test_rates_that_match_cost_nothing() -> None:
    y, theta = torch.rand(2, 3, 4, 4), torch.full((3, 1, 1), 0.5)
    assert float(losses.rate_matching({"a": y}, {"a": y}, {"a": theta})) == 0
    assert float(losses.rate_matching({"a": y + 0.5}, {"a": y}, {"a": theta})) == pytest.approx(1.0, abs=1e-5)


def test_all_terms_at_once_from_two_teachers(nets: tuple, digits: qsnn.Data) -> None:
    teacher, qann, snn = nets
    options = dict.fromkeys(
        (
            "answer_weight",
            "step_ce_weight",
            "step_weight",
            "ensemble_weight",
            "regulariser_weight",
            "rate_weight",
            "current_weight",
        ),
        0.1,
    )
    student = qsnn.distill(snn, [teacher, qann], digits, config(epochs=4, batch_size=16, **options))
    assert qsnn.accuracy(student, digits.val) > 30


def moved(snn: qsnn.SNN) -> qsnn.SNN:
    """A copy whose weights fit the teacher no more."""
    snn = copy.deepcopy(snn)
    for parameter in snn.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
    return snn


def test_rate_matching_pulls_rates_to_the_activations(nets: tuple, digits: qsnn.Data) -> None:
    _, qann, snn = nets
    snn = moved(snn)
    images = next(batches(digits.train, 256))[0]

    def distance(student: qsnn.SNN) -> float:
        from qsnn.graph.hooks import recorded

        names = [name for name, _ in student.neurons()]
        with torch.no_grad(), recorded({name: qann.get_submodule(name) for name in names}) as activations:
            qann(images)
        with torch.no_grad(), recorded(dict(student.neurons())) as spikes:
            student(images)
        thetas = {name: node.threshold.detach() for name, node in student.neurons()}
        rates = {name: spikes[name].unflatten(0, (2, -1)).mean(0) * theta for name, theta in thetas.items()}
        return float(losses.rate_matching(rates, activations, thetas))

    rates_alone = {"ce_weight": 0.0, "step_ce_weight": 0.0, "kd_weight": 0.0, "rate_weight": 1.0}
    options = {"epochs": 4, "batch_size": 16, "optimizer": "sgd", "lr": 0.01, "train_threshold": "", **rates_alone}
    student = qsnn.distill(snn, qann, digits, config(**options))
    assert distance(student) < 0.8 * distance(snn)


def test_current_matching_pulls_currents_to_the_pre_activations(nets: tuple, digits: qsnn.Data) -> None:
    from qsnn.distillation.rates import current_distance, matches
    from qsnn.graph.hooks import recorded_inputs

    _, qann, snn = nets
    images = next(batches(digits.train, 256))[0]

    def distance(student: qsnn.SNN) -> dict[str, float]:
        found = matches(student, ())
        with torch.no_grad(), recorded_inputs({name: qann.get_submodule(name) for name in found}) as inputs:
            qann(images)
        with torch.no_grad(), recorded_inputs({name: match.neuron for name, match in found.items()}) as currents:
            student(images)
        return {
            name: float(current_distance({name: match}, currents, inputs, student.timesteps))
            for name, match in found.items()
            if match.seen is match.neuron
        }

    first = next(iter(distance(snn)))
    assert distance(snn)[first] < 1e-10  # in front of the first neuron stands the same convolution of the same images
    alone = {"ce_weight": 0.0, "step_ce_weight": 0.0, "current_weight": 1.0, "optimizer": "sgd", "lr": 0.01}
    student = qsnn.distill(moved(snn), qann, digits, config(epochs=4, batch_size=16, train_threshold="", **alone))
    assert sum(distance(student).values()) < 0.8 * sum(distance(moved(snn)).values())


def test_layers_to_match_are_named(nets: tuple, digits: qsnn.Data) -> None:
    teacher, _, snn = nets
    name = next(name for name, _ in snn.neurons())
    qsnn.distill(snn, teacher, digits, config(rate_weight=1.0, rate_layers=(f"{name}:{name}",)))
    with pytest.raises(ValueError, match="student's neurons are"):
        qsnn.distill(snn, teacher, digits, config(rate_weight=1.0, rate_layers=("nowhere",)))
    with pytest.raises(ValueError, match="teacher has no layer 'nowhere'"):
        qsnn.distill(snn, teacher, digits, config(rate_weight=1.0, rate_layers=(f"{name}:nowhere",)))


@pytest.mark.parametrize("each", ["layer", "channel"])
def test_trained_neurons_fold_save_and_load(each: str, nets: tuple, digits: qsnn.Data, tmp_path: Path) -> None:
    _, qann, _ = nets
    snn = qsnn.convert(qann, qsnn.ConvertConfig(tau=(4.0,), tau_slope=1.0))
    assert [float(node.tau) for _, node in snn.neurons()] == [4.0, 5.0, 6.0, 7.0, 8.0]
    before = {name: float(node.threshold) for name, node in snn.neurons()}
    student = qsnn.distill(
        snn, qann, digits, config(lr=0.1, train_threshold=each, train_initial=each, train_tau=each)
    )  # fmt: skip
    for name, node in student.neurons():
        assert node.threshold.dim() == (each == "channel")
        assert float((node.threshold - before[name]).abs().max()) > 1e-4
        assert float((node.initial - 0.5).abs().max()) > 1e-5
    images = next(batches(digits.test, 64))[0]
    folded = qsnn.fold(student)
    assert torch.allclose(folded(images), student.double()(images.double()), atol=1e-6)
    qsnn.save(student.float(), tmp_path / "a.safetensors", model_name=None)
    again = qsnn.load(tmp_path / "a.safetensors")
    assert torch.equal(again(images), student(images))
    qsnn.save(folded, tmp_path / "b.safetensors")
    assert torch.equal(qsnn.load(tmp_path / "b.safetensors")(images), folded(images))


def test_a_trained_start_keeps_the_integer_form(nets: tuple, digits: qsnn.Data) -> None:
    _, qann, snn = nets
    student = qsnn.distill(snn, qann, digits, config(lr=0.1, train_threshold="layer", train_initial="layer"))
    folded = qsnn.fold(student)
    assert any(type(module).__name__ == "IntegerIF" for module in folded.modules())
    images = next(batches(digits.test, 64))[0]
    assert torch.allclose(folded(images), student.double()(images.double()), atol=1e-6)


def test_surrogates_of_spikingjelly(nets: tuple, digits: qsnn.Data) -> None:
    _, qann, snn = nets
    images = next(batches(digits.test, 64))[0]
    student = qsnn.distill(snn, qann, digits, config(surrogate="ATan"))
    box = qsnn.distill(snn, qann, digits, config())
    assert not torch.equal(student(images), box(images))
    with pytest.raises(ValueError, match="such as 'ATan'"):
        config(surrogate="atan")


def test_mutual_learning_trains_both(nets: tuple, digits: qsnn.Data) -> None:
    _, qann, snn = nets
    before = {name: value.clone() for name, value in qann.state_dict().items()}
    student, teacher = qsnn.distill_together(snn, qann, digits, config(mutual=True, kd_weight=0.5))
    assert all(torch.equal(value, before[name]) for name, value in qann.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert isinstance(student, qsnn.SNN) and qsnn.distill_together(snn, qann, digits, CONFIG)[1] is qann
    with pytest.raises(ValueError, match="one teacher"):
        qsnn.distill(snn, [qann, qann], digits, config(mutual=True, kd_weight=0.5))
    with pytest.raises(ValueError, match="learn from the student by kd_weight, which is 0"):
        config(mutual=True)


def test_a_pruned_student_folds_and_certifies(nets: tuple, digits: qsnn.Data) -> None:
    _, qann, snn = nets
    student = qsnn.distill(snn, qann, digits, config(sparsity=0.8, epochs=2, train_threshold="", train_initial=""))
    assert zero_weights(snn) < 0.5
    assert zero_weights(student) == pytest.approx(0.8, abs=0.01) == zero_weights(qsnn.fold(student))
    assert qsnn.certify(student, qsnn.as_qann(student, qann), digits.test).exact
    assert not qsnn.certify(student, qann, digits.test).exact
    assert [sparsity_at(part / 4, 0.8) for part in range(5)] == pytest.approx([0.0, 0.563, 0.770, 0.8, 0.8], abs=1e-3)


def test_one_bit_weights_have_no_zero(nets: tuple, digits: qsnn.Data) -> None:
    teacher, _, _ = nets
    binary = qsnn.convert(qsnn.quantize(teacher, digits, qsnn.QuantizeConfig(weight_bits=1)))
    with pytest.raises(ValueError, match="no zero and cannot be pruned"):
        qsnn.distill(binary, teacher, digits, config(sparsity=0.5))


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_student_of_spikingjelly(step_mode: str, nets: tuple, digits: qsnn.Data) -> None:
    teacher, _, _ = nets
    parts = layer if step_mode == "m" else nn
    options = {"step_mode": "m"} if step_mode == "m" else {}
    student = nn.Sequential(
        parts.Conv2d(1, 8, 3, padding=1, **options), neuron.IFNode(step_mode=step_mode),
        parts.AdaptiveAvgPool2d(4, **options), parts.Flatten(**options), parts.Linear(128, 10, **options),
    )  # fmt: skip
    trained = qsnn.distill(student, teacher, digits, config(epochs=3, lr=0.1, timesteps=4))
    assert type(trained) is nn.Sequential
    assert not torch.equal(trained[0].weight, student[0].weight)
    with pytest.raises(ValueError, match="for an SNN"):
        qsnn.distill(student, teacher, digits, config(train_threshold="layer"))


def test_every_image_once_an_epoch(digits: qsnn.Data) -> None:
    for n in (100, 129, 256):
        part = digits.train.head(n)  # type: ignore[attr-defined]
        seen = []
        for rank in range(2):
            generator = torch.Generator().manual_seed(3)
            shares = list(batches(part, 64, generator=generator, share=(rank, 2)))
            assert len(shares) == len(batch_sizes(n, 64, 2))
            assert min(len(labels) for _, labels in shares) >= 2
            seen += [image.flatten() for images, _ in shares for image in images]
        found = torch.stack(seen).sort(0).values
        expected = torch.stack([part[i][0].flatten() for i in range(n)]).sort(0).values
        assert torch.equal(found, expected)


def test_both_ways_to_distill_take_the_same_arguments(nets: tuple, digits: qsnn.Data) -> None:
    one, both = inspect.signature(qsnn.distill), inspect.signature(qsnn.distill_together)
    assert one.parameters == both.parameters
    with pytest.raises(TypeError, match="resum"):
        qsnn.distill(nets[2], nets[1], digits, CONFIG, resum="state")


@pytest.mark.slow
def test_two_processes_end_with_equal_weights(nets: tuple, tmp_path: Path, digits: qsnn.Data) -> None:
    _, qann, snn = nets
    qsnn.save(qann, tmp_path / "qann.safetensors")
    qsnn.save(snn, tmp_path / "snn.safetensors")
    program = tmp_path / "program.py"
    program.write_text(f"""
import hashlib, torch, qsnn
from qsnn.training import processes as parallel
parallel.start("cpu")
folder = {str(tmp_path)!r}
qann, snn = (qsnn.load(f"{{folder}}/{{name}}.safetensors") for name in ("qann", "snn"))
config = qsnn.DistillConfig(epochs=6, batch_size=100)
student = qsnn.distill(snn, qann, qsnn.load_data("digits"), config, resume=f"{{folder}}/state")
digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in student.state_dict().values())).hexdigest()
open(f"{{folder}}/rank{{parallel.rank_and_world()[0]}}", "w").write(digest)
if parallel.is_main():
    qsnn.save(student, f"{{folder}}/student.safetensors")
parallel.wait()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    alone = qsnn.distill(snn, qann, digits, qsnn.DistillConfig(epochs=6, batch_size=100))
    together = qsnn.load(tmp_path / "student.safetensors")
    assert abs(qsnn.accuracy(together, digits.val) - qsnn.accuracy(alone, digits.val)) < 3
    assert (tmp_path / "state").exists()


def test_tensorboard_has_terms_curve_and_rates(nets: tuple, digits: qsnn.Data, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, qann, snn = nets
    qsnn.distill(snn, qann, digits, config(batch_size=8, kd_weight=0.5), tensorboard=tmp_path)
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"loss/ce", "loss/kd", "lr", "epoch/validation accuracy", "accuracy by T/1", "accuracy by T/2"} <= set(tags)
    rates = [events.Scalars(tag)[0].value for tag in tags if tag.startswith("firing rate/")]
    assert len(rates) == 5 and all(0 < rate < 1 for rate in rates)


def test_a_student_in_eval_mode_trains_its_batch_norms(qann: nn.Module, snn: qsnn.SNN, digits: qsnn.Data) -> None:
    config = qsnn.DistillConfig(epochs=1, train_images=128)
    student = qsnn.distill(snn.eval(), qann, digits, config)
    norms = [name for name, module in snn.named_modules() if isinstance(module, nn.BatchNorm2d)]
    moved = [not torch.equal(student.get_submodule(n).running_mean, snn.get_submodule(n).running_mean) for n in norms]
    assert norms and all(moved)


def test_the_strongest_step_teaches_the_weakest() -> None:
    z = torch.tensor([
        [[3.0, 0.0], [0.0, 1.0]],
        [[1.0, 0.0], [0.0, 2.0]],
        [[0.0, 1.0], [1.0, 0.0]],
    ], requires_grad=True)  # fmt: skip
    found = losses.strong_divergence(z, torch.tensor([0, 1]))  # of image 0: step 0 teaches 2; of image 1: 1 teaches 2
    expected = (softmax_kl(z[0, 0], z[2, 0]) + softmax_kl(z[1, 1], z[2, 1])) / 2
    assert torch.allclose(found, expected, atol=1e-6)
    found.backward()
    assert z.grad is not None and not z.grad[:2].any() and z.grad[2].all()
    assert float(losses.strong_divergence(z[:1].detach(), torch.tensor([0, 1]))) == pytest.approx(0, abs=1e-7)


def test_entropy_by_hand() -> None:
    even, sure = torch.zeros(1, 1, 4), torch.tensor([[[100.0, 0.0, 0.0, 0.0]]])
    assert float(losses.negative_entropy(even)) == pytest.approx(-math.log(4))
    assert float(losses.negative_entropy(sure)) == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[[0.0, math.log(3.0)]]])  # probabilities 1/4 and 3/4
    assert float(losses.negative_entropy(torch.cat([half, half]))) == pytest.approx(
        0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    )
