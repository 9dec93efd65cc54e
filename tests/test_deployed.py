"""qsnn benchmark of exported files: what they answer and take, beside the checkpoint that they came from."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qsnn
from qsnn.cli.main import main
from qsnn.export import deployed
from qsnn.export.deployed import answered, beside_teacher, taken
from qsnn.export.float_onnx import float_side, write_float
from qsnn.export.runtime import OnnxNetwork
from qsnn.measure import benchmark as measured
from qsnn.measure.latency import DISCARDED, TURN, in_turns, rotating

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

GOLDEN = Path(__file__).parent / "golden"
FOLDED = GOLDEN / "folded.safetensors"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "SECONDS", 0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One network in files of each firing and each input."""
    place = tmp_path_factory.mktemp("deployed")
    for name in ("online-float", "online-uint8", "deferred-float", "deferred-uint8"):
        firing, entry = name.split("-")
        main(["export", str(FOLDED), "--out", str(place / f"{name}.onnx"), "--firing", firing, "--input", entry])
    return place


def changed(path: Path, to: Path, edit: Any) -> Path:
    """A copy of a file after ``edit`` of its model, or of its recipe."""
    model = onnx.load(path)
    props = {entry.key: entry.value for entry in model.metadata_props}
    recipe = json.loads(props["qsnn"])
    edit(model, recipe)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {**props, "qsnn": json.dumps(recipe)})
    onnx.save(model, to)
    return to


def test_files_stand_beside_their_checkpoint_in_one_table(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("online-float", "deferred-uint8")
    outputs = [tmp_path / name for name in ("all.json", "all.html", "all.jsonl")]
    main(["benchmark", str(FOLDED), *(str(files / f"{name}.onnx") for name in names), "--timesteps", "2",
          "--json", str(outputs[0]), "--html", str(outputs[1]), "--records", str(outputs[2])])  # fmt: skip
    shown = capsys.readouterr().out
    found = json.loads(outputs[0].read_text())
    assert list(found) == ["folded", *names] and all(each["n"] == 540 for each in found.values())
    assert re.search(r"^folded +online +2 .* –$", shown, re.M)
    last = qsnn.accuracy(qsnn.load(FOLDED), qsnn.load_data("digits").test, firing="deferred", timesteps=2)
    for name in names:
        each = found[name]
        assert each["equal"] == 540 and each["parent"] == "folded", "every logit"
        assert each["file_bytes"] == (files / f"{name}.onnx").stat().st_size
        assert 0 < each["latency_ms"] < each["batch_ms"] and each["batch"] == 64
        assert re.search(rf"^{name} +{each['firing']} +2 .* all$", shown, re.M)
        if each["firing"] == "online":
            assert each["timesteps"] == [1, 2] and each["accuracy"] == found["folded"]["accuracy"]
        else:
            assert each["timesteps"] == [2] and each["accuracy"] == [pytest.approx(last, abs=1e-3)]
    assert "all of folded" in outputs[1].read_text()
    assert [json.loads(line)["name"] for line in outputs[2].read_text().splitlines()][-1] == "benchmark/deferred-uint8"


def test_a_file_alone_is_measured_too(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["benchmark", str(files / "online-uint8.onnx"), "--json", str(tmp_path / "a.json")])
    found = json.loads((tmp_path / "a.json").read_text())["online-uint8"]
    assert found["equal"] is None and len(found["accuracy"]) == 2
    assert "spike" not in capsys.readouterr().out


def test_a_file_that_answers_otherwise_is_told(files: Path, tmp_path: Path, digits: qsnn.Data) -> None:
    def edit(model: Any, recipe: Any) -> None:
        thresholds = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.DOUBLE]
        values = onnx.numpy_helper.to_array(thresholds[-1]) * 1.5  # the gain of the readout
        thresholds[-1].CopyFrom(onnx.numpy_helper.from_array(values, thresholds[-1].name))

    broken = changed(files / "online-float.onnx", tmp_path / "broken.onnx", edit)
    folded = qsnn.load(FOLDED)
    for path, all_equal in (
        (broken, False), (files / "online-float.onnx", True), (files / "online-uint8.onnx", True),
        (files / "deferred-float.onnx", True),
    ):  # fmt: skip
        found = answered(OnnxNetwork(path), "net", digits.test.head(100), folded, "folded")  # type: ignore[attr-defined]
        assert (found["equal"] == 100) is all_equal


def test_bad_files_are_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = files / "deferred-float.onnx"

    def one(name: str, **fields: Any) -> Path:
        def edit(model: Any, recipe: Any) -> None:
            for key, value in fields.items():
                recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value

        return changed(good, tmp_path / f"{name}.onnx", edit)

    other = [*"123456789", "ten"]
    for words, said in (
        ((FOLDED, one("orphan", parent="0" * 64)), "orphan was written from the file of SHA-256 000000000000..."),
        ((FOLDED, one("unsaved", parent=None)), "from a network that was not saved, which none of folded is"),
        ((one("classes", data={"classes": other}),), "was trained for 10 classes"),
        ((FOLDED, one("mean", data={"mean": [0.5]})), "with the mean"),
        ((FOLDED, one("name", data={"name": "mnist"})), "one data set, got digits, mnist"),
        ((one("shape", input_shape=[1, 9, 9]),), "damaged metadata: they say images of (1, 9, 9)"),
        ((one("kind", export={"input": "uint8"}),), "damaged metadata: they say images of (1, 8, 8) as uint8"),
        ((one("firing", export={"firing": "later"}),), "damaged metadata"),
        ((one("steps", export={"timesteps": "2"}),), "damaged metadata"),
        ((good, "--html", tmp_path / "a.html"), "need a checkpoint"),
        ((tmp_path / "no.onnx",), "no such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["benchmark", *map(str, words)])
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and said in error[0], (words, error)


def test_pixels_are_found_again(files: Path, digits: qsnn.Data) -> None:
    network = OnnxNetwork(files / "deferred-uint8.onnx")
    everything = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    images = digits.test.normalise(everything)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(taken(network, images), everything.numpy())
    with pytest.raises(ValueError, match="pixels of 8 bit, and these images hold more"):
        taken(network, images + 1e-3)
    assert taken(OnnxNetwork(files / "deferred-float.onnx"), images) is not None


def test_no_call_sees_the_input_of_the_call_before() -> None:
    seen: list[int] = []
    found = in_turns({"a": rotating(seen.append, range(5)), "b": rotating(lambda x: None, [0])}, seconds=0.0)
    assert set(found) == {"a", "b"} and len(seen) == TURN > DISCARDED
    assert all(x != y for x, y in pairwise(seen)) and set(seen) == set(range(5))


def test_latency_is_that_of_the_firing(digits: qsnn.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str | None, Tensor]] = []
    original = measured._Run.call

    def call(run: Any, images: Tensor, steps: int, firing: str | None = None) -> Any:
        calls.append((firing, images))
        return original(run, images, steps, firing)

    monkeypatch.setattr(measured._Run, "call", call)
    qsnn.benchmark(qsnn.load(FOLDED), digits.test.head(20), timesteps=2, firing="deferred")  # type: ignore[attr-defined]
    assert {firing for firing, _ in calls} == {"deferred"}
    singles = [images for _, images in calls if len(images) == 1]
    assert len({images.data_ptr() for images in singles}) > 5, "another image each time"


def test_the_teacher_stands_beside_the_file(teacher: nn.Module, digits: qsnn.Data, tmp_path: Path) -> None:
    rows, notes = beside_teacher(qsnn.load(FOLDED), teacher, tmp_path / "net.onnx", digits.test)  # type: ignore[arg-type]
    assert not notes and [(row.name, row.equal) for row in rows] == [("net.onnx", 540), ("teacher.onnx", None)]
    assert rows[1].accuracy[0] == pytest.approx(qsnn.accuracy(teacher, digits.test), abs=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


class Branch(nn.Module):
    """What a trace writes wrongly: it keeps the branch that one image took."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(1))
        return y if len(x) == 1 else -y


def test_a_teacher_that_torch_writes_wrongly_is_not_compared(digits: qsnn.Data, tmp_path: Path) -> None:
    images = next(qsnn.batches(digits.test, 8))[0]
    with pytest.raises(ValueError, match="answers otherwise than torch"):
        write_float(Branch(), images, tmp_path / "a.onnx")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    write_float(plain, images, tmp_path / "a.onnx")
    (found,) = float_side(tmp_path / "a.onnx", 1)(images.numpy())
    np.testing.assert_allclose(found, plain(images).detach().numpy(), atol=1e-5)
    rows, notes = beside_teacher(qsnn.load(FOLDED), Branch(), tmp_path / "b.onnx", digits.test.head(64))  # type: ignore[arg-type, attr-defined]
    assert [row.name for row in rows] == ["b.onnx"] and "answers otherwise than torch" in notes[0]


def test_what_is_missing_is_one_line(
    teacher: nn.Module, digits: qsnn.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_text("of another network")
    folded: Any = qsnn.load(FOLDED)
    folded.network.add_module("strange", nn.Softsign())
    entry = next(node for node in folded.network.graph.nodes if node.op == "placeholder")
    with folded.network.graph.inserting_after(entry):
        folded.network.graph.call_module("strange", (entry,))
    assert beside_teacher(folded, teacher, tmp_path / "net.onnx", digits.test) == (
        [], ["net.onnx was not written: cannot write to ONNX: strange (Softsign)"]
    )  # fmt: skip
    find = deployed.importlib.util.find_spec
    monkeypatch.setattr(deployed.importlib.util, "find_spec", lambda x: None if x == "onnxruntime" else find(x))
    assert beside_teacher(qsnn.load(FOLDED), teacher, tmp_path / "net.onnx", digits.test) == (  # type: ignore[arg-type]
        [], ["net.onnx was not written: it needs onnxruntime; pip install qsnn[export]"]
    )  # fmt: skip
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("each", ["auto", "channel"])
def test_a_student_of_the_default_recipe_is_integers_in_every_layer(
    each: str, digits: qsnn.Data, tmp_path: Path
) -> None:
    qann = qsnn.quantize(qsnn.create_model("study", digits), digits)
    few = qsnn.DistillConfig(epochs=1, train_images=256, train_threshold=each)
    folded = qsnn.fold(qsnn.distill(qsnn.convert(qann), qann, digits, few))
    neurons = {type(module).__name__ for _, module in folded.neurons()}
    if each == "auto":
        assert neurons == {"IntegerIF"}
        qsnn.export(folded, tmp_path / "net.c", format="c")
    else:
        assert "CurrentIF" in neurons or "RealIF" in neurons
        with pytest.raises(ValueError, match="train_threshold='channel'; use 'layer'"):
            qsnn.export(folded, tmp_path / "net.c", format="c")
