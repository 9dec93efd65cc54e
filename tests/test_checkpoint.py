"""Checkpoints: what is loaded answers as what was saved; the metadata; a file that is no checkpoint of ours."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import scramble
from torch import Tensor, nn

import qsnn

CONFIGS = {
    "4 bit": ("vgg-small", {}, qsnn.QuantizeConfig()),
    "1 bit, residual": ("resnet-small", {}, qsnn.QuantizeConfig(weight_bits=1, first_last_bits=None, levels=1)),
    "fp16, max pool": ("vgg-small", {"pooling": "max"}, qsnn.QuantizeConfig(weight_bits=16, act_bits=2)),
    "float input": ("study", {}, qsnn.QuantizeConfig(input_bits=None, overrides={"*": 3})),
    "concatenation": (f"{__name__}:Concatenated", {}, qsnn.QuantizeConfig(levels=3)),
}


class Concatenated(nn.Module):
    """A model of one's own, whose two activations with different steps meet in a concatenation."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.relu1 = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()
        self.second, self.norm, self.relu2 = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.third, self.relu3, self.last = nn.Conv2d(10, 5, 3), nn.ReLU(), nn.Linear(180, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.first(x))
        x = torch.cat([x, self.relu2(self.norm(self.second(x)))], 1)
        return self.last(self.relu3(self.third(x)).flatten(1))


def ten_classes() -> nn.Module:
    return Concatenated(10)


def trained(model: nn.Module, seed: int) -> nn.Module:
    """Move every parameter a little, in place, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def family(request: pytest.FixtureRequest, digits: qsnn.Data) -> dict[str, nn.Module]:
    name, options, config = CONFIGS[request.param]
    teacher = scramble(qsnn.create_model(name, digits, seed=3, **options))
    qann = trained(qsnn.quantize(teacher, digits, config), 1)
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=5, firing="deferred"))
    student = qsnn.distill(snn, qann, digits, qsnn.DistillConfig(timesteps=3, epochs=0))
    trained(student, 2)
    return {"teacher": teacher, "qann": qann, "snn": snn, "student": student, "folded": qsnn.fold(student)}


# ---- laws


@pytest.mark.parametrize("kind", ["teacher", "qann", "snn", "student", "folded"])
def test_what_is_loaded_answers_bit_for_bit(
    family: dict[str, nn.Module], kind: str, images: Tensor, tmp_path: Path
) -> None:
    model = family[kind]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qsnn.save(model, tmp_path / "model.safetensors")
    random = torch.get_rng_state()
    loaded = qsnn.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), random) and not loaded.training
    assert loaded.qsnn_recipe["kind"] == kind  # type: ignore[index]
    assert torch.equal(loaded(images), model(images))
    if isinstance(model, qsnn.SNN):
        assert isinstance(loaded, qsnn.SNN)
        assert (loaded.timesteps, loaded.firing, loaded.folded) == (model.timesteps, model.firing, model.folded)
        for timesteps in (1, 4):
            for firing in ("online", "deferred"):
                options: dict[str, Any] = {"timesteps": timesteps, "firing": firing}
                assert torch.equal(loaded(images, **options), model(images, **options))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    again = qsnn.save(loaded, tmp_path / "again.safetensors")
    assert again == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_what_is_made_from_a_loaded_model_is_what_is_made_from_the_saved_one(
    family: dict[str, nn.Module], images: Tensor, tmp_path: Path
) -> None:
    qsnn.save(family["student"], tmp_path / "student.safetensors")
    student = qsnn.load(tmp_path / "student.safetensors")
    assert isinstance(student, qsnn.SNN)
    assert torch.equal(qsnn.fold(student)(images), family["folded"](images))


def test_every_file_names_the_file_it_was_made_from(digits: qsnn.Data, teacher: nn.Module, tmp_path: Path) -> None:
    def parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
        digest = qsnn.save(model, tmp_path / name)
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        loaded = qsnn.load(tmp_path / name)
        assert qsnn.read_recipe(tmp_path / name) == loaded.qsnn_recipe
        assert loaded.qsnn_recipe["sha256"] == digest  # type: ignore[index]
        return loaded, digest

    first, teacher_hash = parent(teacher, "teacher")
    precision = qsnn.QuantizeConfig(weight_bits=2, overrides={"0": 5})
    qann, qann_hash = parent(qsnn.quantize(first, digits, precision), "qann")
    snn, snn_hash = parent(qsnn.convert(qann), "snn")
    assert isinstance(snn, qsnn.SNN)
    config = qsnn.DistillConfig(timesteps=1, epochs=0, label_smoothing=0.25)
    student, student_hash = parent(qsnn.distill(snn, qann, digits, config), "student")
    assert isinstance(student, qsnn.SNN)
    parent(qsnn.fold(student), "folded")
    recipes = {name: qsnn.read_recipe(tmp_path / name) for name in ("teacher", "qann", "snn", "student", "folded")}
    assert "parent" not in recipes["teacher"]
    parents = {name: recipe["parent"] for name, recipe in recipes.items() if name != "teacher"}
    assert parents == {"qann": teacher_hash, "snn": qann_hash, "student": snn_hash, "folded": student_hash}
    assert recipes["student"]["teacher"] == qann_hash
    for name, recipe in recipes.items():
        assert recipe["kind"] == name
        assert recipe["model"] == {"name": "vgg-small", "options": {}}
        assert (recipe["input_shape"], recipe["num_classes"]) == ([1, 8, 8], 10)
        assert recipe["data"] == {
            "name": "digits", "mean": [0.3057], "std": [0.3760], "classes": list("0123456789")
        }  # fmt: skip
    folded = recipes["folded"]
    assert (folded["quantize"]["weight_bits"], folded["quantize"]["overrides"]) == (2, {"0": 5})
    assert (folded["distill"]["label_smoothing"], folded["convert"]["timesteps"]) == (0.25, 1)
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(
    teacher: nn.Module, qann: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    qsnn.save(teacher, path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, full)
            qsnn.save(qann, path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    qsnn.save(qann, path)
    assert qsnn.read_recipe(path)["kind"] == "qann"


def test_a_model_of_ones_own_is_built_by_its_function(digits: qsnn.Data, images: Tensor, tmp_path: Path) -> None:
    model = ten_classes()
    qann = qsnn.quantize(model, digits)
    for function in ("ten_classes", "Concatenated"):  # with and without the number of classes
        for saved in (model, qann):
            qsnn.save(saved, tmp_path / "own", model_name=f"{__name__}:{function}")
            if saved is qann or function == "ten_classes":
                assert torch.equal(qsnn.load(tmp_path / "own")(images), saved.eval()(images))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_float_weights_of_other_programs_are_read(form: str, wrapped: bool, tmp_path: Path) -> None:
    source, target = ten_classes(), ten_classes()
    if form == "torch":
        torch.save({"state_dict": source.state_dict()} if wrapped else source.state_dict(), tmp_path / "weights")
    else:
        safetensors.torch.save_file(source.state_dict(), tmp_path / "weights", {"format": "pt"} if wrapped else None)
    qsnn.load_weights(target, tmp_path / "weights")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_names_of_parallel_training_are_read(tmp_path: Path) -> None:
    source, target = ten_classes(), ten_classes()
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "weights")
    qsnn.load_weights(target, tmp_path / "weights")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


# ---- refusals


def test_a_missing_file_and_a_folder(teacher: nn.Module, tmp_path: Path) -> None:
    for read in (qsnn.load, qsnn.read_recipe, lambda path: qsnn.load_weights(teacher, path)):
        with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing"):
            read(tmp_path / "nothing")
        with pytest.raises(ValueError, match=r"cannot read .*: Is a directory"):
            read(tmp_path)


def test_a_truncated_file_at_any_place(qann: nn.Module, teacher: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "qann.safetensors"
    qsnn.save(qann, path)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for size in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"qann\.safetensors is .*truncated"):
            qsnn.load(path)
        with pytest.raises(ValueError, match=r"cannot load .*qann\.safetensors into VggSmall"):
            qsnn.load_weights(teacher, path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        qsnn.load(path)


class Touch:
    """Pickled, it would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_of_other_programs(teacher: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "other"
    safetensors.torch.save_file(teacher.state_dict(), path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"other was not written by qsnn; .* qsnn train --model \.\.\. --weights"):
        qsnn.load(path)
    random = torch.randint(256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for content in (teacher.state_dict(), Touch(tmp_path / "touched"), None):
        if content is None:
            path.write_bytes(random.numpy().tobytes())
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match="other is no safetensors file"):
            qsnn.load(path)
        if not isinstance(content, dict):
            with pytest.raises(ValueError, match=r"cannot load .*other into VggSmall"):
                qsnn.load_weights(teacher, path)
    assert not (tmp_path / "touched").exists()


def test_weights_that_do_not_fit(teacher: nn.Module, tmp_path: Path) -> None:
    torch.save(ten_classes().state_dict(), tmp_path / "names")
    torch.save({**teacher.state_dict(), "0.weight": torch.zeros(2, 1, 3, 3)}, tmp_path / "shapes")
    torch.save(torch.zeros(3), tmp_path / "tensor")
    target = copy.deepcopy(teacher)
    for name, message in (("names", "Missing key"), ("shapes", "size mismatch for 0.weight"), ("tensor", "state_dict")):
        with pytest.raises(ValueError, match=rf"cannot load .*{name} into VggSmall: .*{message}") as caught:
            qsnn.load_weights(target, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_built_again(teacher: nn.Module, digits: qsnn.Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"do not know how to build this Linear again; .*model_name='package"):
        qsnn.save(nn.Linear(2, 2), tmp_path / "own")
    assert not list(tmp_path.iterdir())
    qsnn.save(ten_classes(), tmp_path / "own", model_name="no_such_module:make")
    with pytest.raises(ValueError, match=r"cannot find 'no_such_module:make' \(No module named"):
        qsnn.load(tmp_path / "own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "alexnet"}}, r"unknown model 'alexnet'; known: vgg-small, "),
        ({"model": {"name": "study"}}, r"does not fit the model 'study' it names:.*Missing key"),
        ({"num_classes": 7}, r"does not fit the model 'vgg-small' it names:.*size mismatch for"),
        ({"kind": "hologram"}, r"holds a 'hologram', which this version does not know; expected \('teacher'"),
    ],
)
def test_a_recipe_that_does_not_fit(change: dict[str, Any], message: str, teacher: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model"
    recipe = {**teacher.qsnn_recipe, **change}  # type: ignore[dict-item]
    safetensors.torch.save_file(teacher.state_dict(), path, {"qsnn": json.dumps(recipe)})
    with pytest.raises(ValueError, match=message) as caught:
        qsnn.load(path)
    assert "\n" not in str(caught.value)
