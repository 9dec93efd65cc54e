"""What every verb leaves as it was: frozen parameters, each module's training flag, running statistics; wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsnn
from qsnn.data.images import Data, ImageSet
from qsnn.graph.arrived import frozen_norms, training_flags
from qsnn.measure.check import check

ONE = qsnn.TrainConfig(epochs=1, batch_size=16, train_images=32, lr=0.05)
SHORT = qsnn.DistillConfig(epochs=1, batch_size=16, train_images=32, lr=0.05)


@pytest.fixture(scope="module")
def few() -> Data:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, 1, 6, 6), generator=random, dtype=torch.uint8)
    parts = {
        name: ImageSet(images[at], torch.arange(80)[at] % 3, (0.5,), (0.29,))
        for name, at in (("train", slice(0, 48)), ("val", slice(48, 64)), ("test", slice(64, 80)))
    }
    return Data(name="few", **parts, mean=(0.5,), std=(0.29,), classes=tuple("abc"))


def net() -> nn.Sequential:
    """A stem that is frozen, weights and batch norm; dropout whose owner had switched it off; then what is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Dropout(0.5), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3),
    )  # fmt: skip
    model.train()(torch.randn(16, 1, 6, 6))
    model[0].requires_grad_(False)
    model[0][1].eval()
    model[1].eval()
    return model


STEM = ("0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "0.1.running_mean", "0.1.running_var")


def state(model: nn.Module) -> dict[str, Any]:
    """All that a verb must not touch in its arguments."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return {"tensors": tensors, "flags": training_flags(model), "frozen": frozen(model)}


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = a["tensors"].keys() == b["tensors"].keys() and all(
        torch.equal(value, b["tensors"][name]) for name, value in a["tensors"].items()
    )
    return tensors and a["flags"] == b["flags"] and a["frozen"] == b["frozen"]


VERBS: dict[str, tuple[str, Callable[..., Any]]] = {
    "quantize": ("teacher", lambda m, data: qsnn.quantize(m["teacher"], data)),
    "convert": ("qann", lambda m, data: qsnn.convert(m["qann"])),
    "convert a float network": ("teacher", lambda m, data: qsnn.convert(m["teacher"], data)),
    "fit, its teacher": (
        "teacher",
        lambda m, data: qsnn.fit(copy.deepcopy(m["qann"]), data, ONE, teacher=m["teacher"]),
    ),
    "distill": ("snn qann teacher", lambda m, data: qsnn.distill(m["snn"], [m["qann"], m["teacher"]], data, SHORT)),
    "fold": ("snn", lambda m, data: qsnn.fold(m["snn"])),
    "certify": ("snn qann", lambda m, data: qsnn.certify(m["snn"], m["qann"], data.test)),
    "benchmark, a float network": ("teacher", lambda m, data: qsnn.benchmark(m["teacher"], data.test)),
    "benchmark": ("snn qann", lambda m, data: qsnn.benchmark(m["snn"], data.test, timesteps=2, reference=m["qann"])),
    "accuracy": ("snn qann teacher", lambda m, data: [qsnn.accuracy(each, data.test) for each in m.values()]),
    "summary": ("snn qann teacher", lambda m, data: [qsnn.summary(each, (1, 6, 6)) for each in m.values()]),
    "check": ("teacher", lambda m, data: check(m["teacher"], data, seconds=0.1)),
}


@pytest.fixture(scope="module")
def models(few: Data) -> dict[str, nn.Module]:
    teacher = net()
    qann = qsnn.quantize(teacher, few)
    return {"teacher": teacher, "qann": qann, "snn": qsnn.convert(qann)}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("mode", ["as they came", "training"])
def test_a_verb_leaves_its_arguments_as_they_were(
    verb: str, mode: str, models: dict[str, nn.Module], few: Data
) -> None:
    names, call = VERBS[verb]
    given = {name: copy.deepcopy(model) for name, model in models.items() if name in names.split()}
    for model in given.values():
        model.train() if mode == "training" else None
    before = {name: state(model) for name, model in given.items()}
    call({**models, **given} if verb not in ("accuracy", "summary") else given, few)
    for name, model in given.items():
        assert same(before[name], state(model)), (verb, name)


def test_what_is_frozen_stays_frozen_from_the_float_network_to_the_student(few: Data) -> None:
    """Through two trainings of the float network, calibration, QAT and distillation the stem is what it was."""
    teacher = net()
    begun = {name: teacher.state_dict()[name].clone() for name in STEM}

    def stem_is_kept(model: nn.Module, front: str = "") -> None:
        found, parameters = model.state_dict(), dict(model.named_parameters())
        for name in STEM:
            assert torch.equal(found[f"{front}{name}"], begun[name]), name
            assert "running" in name or not parameters[f"{front}{name}"].requires_grad, name
        assert frozen_norms(model) == [f"{front}0.1"]
        assert sum(parameter.requires_grad for parameter in parameters.values()) >= 4, "the rest is trained"

    for _ in range(2):  # the second time it comes in eval mode as a whole
        head = teacher[-1].weight.clone()
        qsnn.fit(teacher, few, ONE)
        stem_is_kept(teacher)
        assert not torch.equal(teacher[-1].weight, head)
    qann = qsnn.quantize(teacher, few)
    for name in ("0.0.bias", "0.1.running_mean", "0.1.running_var"):  # calibration corrects what quantizing moved
        begun[name] = qann.state_dict()[name].clone()
    qsnn.fit(qann, few, ONE, teacher=teacher)
    stem_is_kept(qann)
    student = qsnn.distill(qsnn.convert(qann), qann, few, SHORT)
    stem_is_kept(student, "network.")
    teacher.train()  # their owner wakes them
    qsnn.fit(teacher, few, ONE)
    assert not torch.equal(teacher[0][1].running_mean, begun["0.1.running_mean"]) and frozen_norms(teacher) == []


def test_a_stopped_training_keeps_what_is_frozen(few: Data, tmp_path: Any) -> None:
    qann = qsnn.quantize(net(), few)
    whole, resumed = copy.deepcopy(qann), copy.deepcopy(qann)
    two = qsnn.TrainConfig(epochs=2, batch_size=16, train_images=32, lr=0.05)
    qsnn.fit(whole, few, two)

    def stop(step: int, steps: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qsnn.fit(copy.deepcopy(qann), few, two, after_step=stop, resume=tmp_path / "state")
    qsnn.fit(resumed, few, two, resume=tmp_path / "state")
    assert frozen(resumed) == frozen(whole) == frozen(qann) != set()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def frozen_function(num_classes: int = 3) -> nn.Module:
    return net()


def test_a_file_keeps_what_the_function_froze(few: Data, tmp_path: Any) -> None:
    teacher = net()
    for model, name in ((teacher, "teacher"), (qsnn.quantize(teacher, few), "qann")):
        qsnn.save(model, tmp_path / name, model_name=f"{__name__}:frozen_function")
        loaded = qsnn.load(tmp_path / name, model=frozen_function)
        assert frozen(loaded) == frozen(model) and frozen_norms(loaded) == ["0.1"] and not loaded.training


def test_where_all_is_frozen_there_is_nothing_to_train(few: Data) -> None:
    with pytest.raises(ValueError, match="every parameter of Sequential is frozen; let one have requires_grad=True"):
        qsnn.fit(net().requires_grad_(False), few, ONE)


def weight_normed(model: nn.Sequential) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model[0][0])
    nn.utils.parametrizations.weight_norm(model[2])
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model


def test_a_weight_that_was_computed_of_frozen_ones_is_frozen(few: Data) -> None:
    qann = qsnn.quantize(weight_normed(net()), few)
    assert {"0.0.weight", "0.0.bias", "0.1.weight", "2.weight"} <= frozen(qann)


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled])
def test_every_verb_takes_a_wrapped_network(
    wrap: Callable[[nn.Module], Any], models: dict[str, nn.Module], few: Data, tmp_path: Any
) -> None:
    given = {name: wrap(copy.deepcopy(model)) for name, model in models.items()}
    images = few.test[0][0][None]

    def answers(model: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(images)
        return found

    plain, wrapped = (qsnn.fold(some["snn"]) for some in (models, given))
    assert torch.equal(answers(plain), answers(wrapped))
    for name in models:
        assert qsnn.accuracy(models[name], few.test) == qsnn.accuracy(given[name], few.test)
        assert qsnn.summary(models[name], (1, 6, 6)) == qsnn.summary(given[name], (1, 6, 6))
    results = [qsnn.benchmark(some["snn"], few.test, timesteps=2, reference=some["qann"]) for some in (models, given)]
    assert results[0].accuracy == results[1].accuracy and results[0].synops == results[1].synops
    assert results[0].agreement == results[1].agreement and results[0].name == results[1].name == "snn"
    assert qsnn.certify(given["snn"], given["qann"], few.test).exact
    students = [qsnn.distill(some["snn"], [some["qann"], some["teacher"]], few, SHORT) for some in (models, given)]
    assert torch.equal(answers(students[0].eval()), answers(students[1].eval()))
    assert check(given["teacher"], few, seconds=0.1).ready
    qsnn.fit(copy.deepcopy(models["qann"]), few, ONE, teacher=given["teacher"])
    for some, path in ((models, "a"), (given, "b")):
        qsnn.save(some["snn"], tmp_path / path, model_name=f"{__name__}:frozen_function")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (
        qsnn.export(wrap(plain), tmp_path / "c.onnx").read_bytes()
        == qsnn.export(plain, tmp_path / "d.onnx").read_bytes()
    )
