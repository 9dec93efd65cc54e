"""qsnn predict: image files to classes, with torch and without, and what `qsnn export` writes for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import qsnn
from qsnn.cli.main import main
from qsnn.data.folders import FolderSet
from qsnn.export.runtime import image_files, normalised, predict, read_pixels

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

GOLDEN = Path(__file__).parent / "golden"
FOLDED = str(GOLDEN / "folded.safetensors")
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "brevitas", "spikingjelly", "tyro", "rich", "safetensors", "onnx"}:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
import runpy
runpy.run_module("qsnn.export.runtime", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: qsnn.Data) -> Path:
    """Five test images as files, an exported network of each kind."""
    place = tmp_path_factory.mktemp("predict")
    (place / "images").mkdir()
    for index in range(5):
        Image.fromarray(digits.test.images[index, 0].numpy()).save(place / "images" / f"{index}.png")
    main(["export", FOLDED, "--out", str(place / "online.onnx")])
    main(["export", FOLDED, "--out", str(place / "deferred.onnx"), "--firing", "deferred", "--input", "uint8"])
    return place


def lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    capsys.readouterr()
    main(["predict", *words])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (13, 9), (5, 21)])
def test_pixels_are_those_of_training(channels: int, size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4 if size[0] == 5 else 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    ours = normalised(read_pixels(tmp_path / "a.png", (channels, 8, 8)), mean, std)
    assert ours.shape == (channels, 8, 8) and ours.dtype == np.float32
    theirs = FolderSet([(str(tmp_path / "a.png"), 0)], (8, 8), mean, std)[0][0]
    assert torch.equal(torch.from_numpy(ours), theirs)


def test_normalisation_is_trainings_for_every_pixel(digits: qsnn.Data) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    theirs = digits.test.normalise(every)
    assert torch.equal(torch.from_numpy(normalised(every.numpy(), digits.mean, digits.std)), theirs)


def test_file_and_checkpoint_say_the_same(folder: Path, capsys: pytest.CaptureFixture[str], digits: qsnn.Data) -> None:
    images, every = str(folder / "images"), ("--top", "10", "--json")
    ours = json.loads("".join(lines(capsys, str(folder / "online.onnx"), images, *every)))
    theirs = json.loads("".join(lines(capsys, FOLDED, images, *every)))
    model = qsnn.load(FOLDED)
    with torch.no_grad():
        shares = model(next(qsnn.batches(digits.test, 5))[0])[-1].softmax(-1)
    for mine, other, share in zip(ours, theirs, shares, strict=True):
        assert mine["file"] == other["file"] and mine["class"] == str(int(share.argmax())) and mine["timesteps"] == 2
        assert [entry["class"] for entry in mine["top"]] == [entry["class"] for entry in other["top"]]
        assert [entry["share"] for entry in mine["top"]] == pytest.approx(share.sort(descending=True).values.tolist())


def test_it_runs_with_onnxruntime_numpy_and_pillow_alone(folder: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, str(folder / "deferred.onnx"), str(folder / "images"), "--top", "2"]
    root = Path(qsnn.__file__).parents[1]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert found.returncode == 0, found.stderr
    model = qsnn.load(FOLDED)
    pixels = np.stack([read_pixels(folder / "images" / f"{i}.png", (1, 8, 8)) for i in range(5)])
    data = model.qsnn_recipe["data"]
    with torch.no_grad():
        answers = model(torch.from_numpy(normalised(pixels, data["mean"], data["std"])), firing="deferred")
    said = [line.partition(": ")[2].split()[0] for line in found.stdout.splitlines()]
    assert said == [str(k) for k in answers[0].argmax(-1).tolist()]


def test_early_exit_takes_the_first_sure_answer(folder: Path, digits: qsnn.Data) -> None:
    files = image_files([folder / "images"])
    recipe = {"input_shape": [1, 8, 8], "data": {"mean": [0.0], "std": [1.0], "classes": ["cat", "dog"]}}
    answers = np.array([[[0.0, 0.0], [9, 0], [0, 0], [0, 9], [0, 0.0]], [[0, 9], [0, 9], [9, 0], [9, 0], [0, 0.1]]])
    found = list(predict(lambda images: answers, files, recipe, exit_margin=0.9))
    assert [p.timesteps for p in found] == [2, 1, 2, 1, 2]
    assert [p.classes[0][0] for p in found] == ["dog", "cat", "cat", "dog", "dog"]
    assert str(found[1]).endswith("1.png: cat 100.0 %")


def test_golden_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logits = load_file(GOLDEN / "logits.safetensors")["folded"]
    (line,) = lines(capsys, str(folder / "online.onnx"), str(folder / "images" / "0.png"))
    share, best = logits[-1, 0].softmax(-1).max(-1)
    assert line.endswith(f"0.png: {int(best)} {100 * float(share):.1f} % (after 2 steps)")


def test_bad_input_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    online, deferred, images = (str(folder / name) for name in ("online.onnx", "deferred.onnx", "images"))
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bad.onnx").write_text("no network")
    (tmp_path / "empty").mkdir()
    for name, value in (("foreign", None), ("torn", "{"), ("list", "[1]"), ("odd", '{"data": {"mean": "x"}}')):
        model = onnx.load(online)
        del model.metadata_props[:]
        if value is not None:
            onnx.helper.set_model_props(model, {"qsnn": value})
        onnx.save(model, tmp_path / f"{name}.onnx")
    for words, said in (
        (["predict", online, str(tmp_path / "nothing.png")], "no such file"),
        (["predict", online, str(tmp_path / "empty")], "no image in"),
        (["predict", online, str(tmp_path / "text.png")], "cannot read it"),
        (["predict", online, str(tmp_path / "deep.png")], "8 bit a channel"),
        (["predict", str(tmp_path / "bad.onnx"), images], "as an ONNX file"),
        (["predict", str(tmp_path / "no.onnx"), images], "no such file"),
        (["predict", str(tmp_path / "foreign.onnx"), images], "not written by qsnn"),
        (["predict", str(tmp_path / "torn.onnx"), images], "damaged metadata"),
        (["predict", str(tmp_path / "list.onnx"), images], "damaged metadata"),
        (["predict", str(tmp_path / "odd.onnx"), images], "damaged metadata"),
        (["export", FOLDED, "--out", str(tmp_path / "a.onnx"), "--timesteps", "0"], "timesteps must be"),
        (["predict", online, images, "--top", "0"], "top to be at least 1"),
        (["predict", online, images, "--exit-margin", "2"], "exit_margin from 0 to 1"),
        (["predict", deferred, images, "--exit-margin", "0.5"], "an answer after every step"),
        (["export", str(GOLDEN / "snn.safetensors"), "--out", str(tmp_path / "a.onnx")], "qsnn fold"),
        (["export", FOLDED, "--out", str(tmp_path / "a.onnx"), "--format", "tf"], "expected format"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and said in error[0], (words, error)
    assert not (tmp_path / "a.onnx").exists()
