"""benchmarks/study.py: every question has rows, a config of its own for each, and an answer."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import figures
import lookup
import pytest
import studies
import study
import tables
import torch
import trained_peer
import zoo
from setting import Setting

import qsnn
from qsnn.models.create import build_model
from qsnn.report.records import Record, read

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
blended, Blend, generalize, readout, smoothing, multitask = (
    getattr(importlib.import_module(f"studies.{name}"), part) if part else importlib.import_module(f"studies.{name}")
    for name, part in (
        ("hybrid", "blended"), ("hybrid", "Blend"), ("generalize", ""), ("readout", ""), ("smoothing", ""),
        ("multitask", ""),
    )
)  # fmt: skip


def _recorded(name: str) -> bool:
    """Whether the records of a study are published; of a new question they come with its first long run."""
    return (BENCHMARKS / f"records/study-{name}.jsonl").exists()


def _load(name: str) -> qsnn.Data:
    return qsnn.load_data("digits")


def _rows(name: str) -> list:
    return list(studies.find(name).rows(Setting("digits", "study", 4, 20_000, 0), _load))


@pytest.mark.parametrize("name", studies.names())
def test_a_file_holds_all_of_a_question(name):
    found = studies.find(name)
    assert found.name == name and found.question.endswith("?") and found.size
    if not _recorded(name):
        return
    records = read(BENCHMARKS / f"records/study-{name}.jsonl")
    assert set(found.titles or {}) <= {key for r in records for key in r.metrics}


@pytest.mark.parametrize("name", studies.names())
def test_rows_have_labels_and_configs_of_their_own(name):
    rows = _rows(name)
    assert len({label for label, _, _ in rows}) == len(rows) > 0
    assert len({json.dumps([label, config]) for label, config, _ in rows}) == len(rows)


@pytest.mark.parametrize("name", list(filter(_recorded, studies.names())))
def test_published_records_are_those_of_rows_of_today(name):
    """A row that is renamed, or whose config changes, loses its records: it would be trained again."""
    records = read(BENCHMARKS / f"records/study-{name}.jsonl")
    (data,) = {r.config["setting"]["data"] for r in records}
    model = "vgg-small" if name == "precision" else "study"  # of the study net precision was trained by an older recipe
    known = {lookup.key(r.name, r.data, r.config) for r in records}
    rows = study.selected(name, data, 0, False, None, model, ())
    found = [lookup.key(f"study-{name}/{label}", data, config) in known for _, label, config, _ in rows]
    assert any(found) if name in ("online", "distill") else all(found)


def test_a_file_without_rows_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bare.py").write_text('QUESTION = "?"\n')
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"studies/bare.py: expected SIZE, rows; studies/__init__.py says"):
        studies.find("bare")


def test_studies_named_as_modules_of_python_hide_none_of_them():
    program = (
        "import study, studies; [studies.find(name) for name in studies.names()];"
        "import code, time; print(code.interact, time.time)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_blend_ends_as_the_neuron_it_holds(qann, snn, images):
    wanted = snn(images, timesteps=2)
    mixed = blended(qsnn.convert(qann), "blend", 2, 10)
    blends = [m for m in mixed.modules() if isinstance(m, Blend)]
    assert blends
    # at α = 0 the network is the QANN at every step
    assert torch.allclose(mixed(images, timesteps=2)[0], qann(images), atol=1e-4)
    for blend in blends:
        blend.seen = 10
    assert torch.equal(mixed(images, timesteps=2), wanted)


@pytest.mark.parametrize("kind", generalize.STRENGTHS)
def test_worse_images_differ_from_strength_to_strength(kind):
    images = qsnn.load_data("digits").test.head(20)
    strengths = generalize.STRENGTHS[kind]
    found = [generalize.worsened(images, kind, strength).images for strength in strengths]
    assert torch.equal(found[0], images.images)
    far = [(f.float() - images.images.float()).abs().mean() for f in found[1:]]
    assert min(far) > 0 and far[-1] > far[0]
    assert torch.equal(generalize.worsened(images, kind, strengths[1]).images, found[1])


def test_readouts_by_hand():
    z = torch.tensor([[[3.0, 1.0]], [[0.0, 1.5]]])  # two steps, two classes, θ = 1, v₀ = ½
    assert readout.read_out(z, "mean", 1.0).tolist() == [[1.5, 1.25]]
    assert readout.read_out(z, "last step", 1.0).tolist() == [[0.0, 1.5]]
    assert readout.read_out(z, "spike count", 1.0).round().tolist() == [[2.0, 2.0]]  # the tie goes to the potential
    assert readout.read_out(z, "spike count", 1.0).argmax() == 0
    assert readout.read_out(z, "first spike", 1.0).round().tolist() == [[2.0, 2.0]]


def test_calibration_error_of_a_sure_net_that_errs_half_the_time():
    logits = torch.tensor([[100.0, 0.0]] * 4)
    assert smoothing.calibration_error(logits, torch.tensor([0, 0, 1, 1])) == pytest.approx(50.0)


def test_heads_of_several_tasks_stand_side_by_side():
    setting = Setting("all", "study", 1, 300, 0)
    data = multitask.together(_load, setting)
    assert data.num_classes == 30 and len(data.train) == 300
    assert data.shape == (1, multitask.SIDE, multitask.SIDE)
    assert sorted({int(label) // 10 for label in data.test.labels}) == [0, 1, 2]


@pytest.mark.parametrize("name", list(filter(_recorded, studies.names())))
def test_recorded_studies_end_with_a_sentence_a_table_and_a_figure(name):
    records, found = lookup.published(BENCHMARKS / "records"), studies.find(name)
    assert found.answer is not None
    assert re.match(r".*[.] [*][(].*seeds?[)][*]$", tables.answer_of(name, records))
    text = tables.study_table(name, records)
    assert bool(text) == bool(found.titles or found.table)
    for word in ("`python benchmarks/study.py", "seeds: ", f"{found.part} images", "commit "):
        assert not text or word in text
    drawn = figures.of_study(name, lookup.whole(name, records))
    assert drawn is None if found.figure is None else drawn.startswith(b"<?xml")


def test_a_study_measures_only_what_has_no_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the cache of networks
    (tmp_path / "records").mkdir()
    monkeypatch.setattr(study, "HERE", tmp_path)
    (first,) = study.run("readout", "digits", [0], only=["mean"])
    assert first.config["setting"]["train_images"] == 20_000 and first.metrics["T=8"] > 50
    every = study.run("readout", "digits", [0])
    path = tmp_path / "records" / "study-readout.jsonl"
    assert [r.name for r in every] == [f"study-readout/{label}" for label, _, _ in _rows("readout")]
    assert len(read(path)) == 4 and read(path)[0] == first
    study.run("readout", "digits", [0])
    assert len(read(path)) == 4


def test_a_row_that_no_study_has_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.py", "readout", "--data", "digits", "--only", "median"])
    with pytest.raises(SystemExit) as stopped:
        study.main()
    assert stopped.value.code == 2
    assert "readout has no row of median" in capsys.readouterr().err


def test_forms_of_attention_meet_at_equal_parameters_and_at_equal_operations():
    shape, attention = (1, 28, 28), importlib.import_module("studies.attention")
    for equal in ("parameters", "operations"):
        sizes = {}
        for form in attention.FORMS:
            options = {"widths": attention.WIDTHS, "hidden": attention.hidden_of(form, equal, shape, 10)}
            net = build_model("qkformer", shape, 10, attention=form, **options).eval()
            macs = qsnn.summary(net, shape).macs
            sizes[form] = macs if equal == "operations" else sum(p.numel() for p in net.parameters())
        assert max(sizes.values()) < 1.005 * min(sizes.values()), (equal, sizes)


@pytest.mark.parametrize("name", ["attention", "blocks"])
def test_an_answer_says_what_the_numbers_say(name):
    study = studies.find(name)
    numbers = {"qann": 90.0, "T=1": 80.0, "T=2": 89.0, "scratch T=2": 85.0, "exact": 100.0, "parameters": 5e4}

    def made(**more: dict) -> list[Record]:
        rows = [(label, {**numbers, **more.get(label.partition(",")[0], {})}) for label, _, _ in _rows(name)]
        return [Record(name=f"study-{name}/{label}", data="digits", seed=0, n=9, metrics=found, config={},
                       environment={}, time="") for label, found in rows]  # fmt: skip

    if name == "attention":
        assert "one is enough" in study.answer(made()) and "every network is EXACT" in study.answer(made())
        assert "two are enough" in study.answer(made(two={"qann": 91.0}))
        said = study.answer(made(three={"qann": 92.0, "exact": 99.9}))
        assert "three are better" in said and "not every network is EXACT" in said
    else:
        said = study.answer(made(basic={"T=2": 89.5}))
        assert "best block is basic (89.50 %, 50 k parameters) converted and distilled" in said
        assert "gain +4.00 points" in study.answer(made()) and "every network is EXACT" in study.answer(made())


# ---- zoo.py


def _tiny() -> torch.nn.Module:
    return torch.nn.Sequential(zoo._conv(1, 4), torch.nn.Flatten(), torch.nn.Linear(4 * 8 * 8, zoo.CLASSES))


def _sure() -> torch.nn.Module:
    conv, head = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(144, zoo.CLASSES)
    return torch.nn.Sequential(conv, torch.nn.Sigmoid(), torch.nn.Flatten(), head)


def test_the_zoo_says_exact_or_the_refusal_in_its_own_words(monkeypatch):
    monkeypatch.setitem(zoo.NETWORKS, "tiny", (_tiny, (1, 8, 8)))
    monkeypatch.setitem(zoo.NETWORKS, "sure", (_sure, (1, 8, 8)))
    told: list[dict] = []
    found = zoo.examine("tiny", tell=lambda so_far: told.append(dict(so_far)))
    assert [found[stage] for stage in zoo.STAGES[:4]] == ["ok", "ok", "ok", "EXACT"] and 0 <= found["float error"] < 0.5
    assert zoo.verdict(found) == "EXACT" and [len(t) for t in told] == [2, 4, 6, 8, 10]
    found = zoo.examine("sure")
    assert found["quantize"].startswith("refused: ") and "sigmoid" in found["quantize"].lower()
    assert "convert" not in found and found["float error"].startswith("refused: ")


def test_the_zoo_tells_a_crash_from_a_refusal():
    try:
        torch.zeros(2) + torch.zeros(3)
    except RuntimeError as error:
        assert zoo.said(error).startswith("crash: RuntimeError: The size of tensor")
    with pytest.raises(ValueError) as refused:
        qsnn.QuantizeConfig(weight_bits=99)
    assert zoo.said(refused.value).startswith("refused: ")


def test_a_network_of_the_zoo_ends_at_its_time_limit():
    assert zoo.apart("LeNet", 0, 0.05) == {"quantize": "not done in 0.05 s"}


def test_the_zoo_resumes_by_records_of_the_same_code(tmp_path, monkeypatch, capsys):
    path, asked = tmp_path / "zoo.jsonl", []
    monkeypatch.setattr(zoo, "apart", lambda name, *_: asked.append(name) or {"quantize": "refused: no | such"})
    for _ in range(2):
        zoo.run(["LeNet", "siamese"], [0], 1.0, path)
    assert asked == ["LeNet", "siamese"] and len(read(path)) == 2
    assert "LeNet: refused: no | such" in capsys.readouterr().out
    monkeypatch.setattr(zoo, "digest", lambda: "other code")
    zoo.run(["LeNet"], [0], 1.0, path)
    assert asked == ["LeNet", "siamese", "LeNet"]
    text = tables.zoo_table(read(path))
    assert "| LeNet | refused | – | – | – | – | no / such |" in text and "0 of 2 EXACT" in text


def test_the_zoo_has_forty_networks():
    assert len(zoo.NETWORKS) == 40


def test_the_peer_that_is_trained_starts_as_the_same_spiking_network(digits):
    """SpikingJelly's IFNode from θ/2 on Brevitas layers is the online network, before either is trained."""
    qann = qsnn.quantize(qsnn.create_model("resnet-small", digits), digits).eval()
    images, _ = next(qsnn.batches(digits.test, 100))
    with torch.no_grad():
        ours = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2, firing="online"))(images)
        theirs = trained_peer.peer(qann, "ATan, from θ/2", 2).eval()(images)
        other = trained_peer.peer(qann, "ATan, from 0", 2).eval()(images)
    same = (ours - theirs).abs().amax((0, 2)) < 1e-4  # an image with a potential at θ may go either way
    assert ours.shape == theirs.shape and same.float().mean() > 0.9
    assert ((ours - other).abs().amax((0, 2)) > 1e-4).float().mean() > 0.9


def test_a_folder_without_a_student_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trained_peer.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        trained_peer.main()
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(("teacher", "precisions", "said"), [
    ({"train": {"epochs": 6}}, ("fp32", "fp32"), ["--epochs 6 5 4"]),
    ({"sha256": "0"}, ("fp32", "bf16"), ["--weights FILE", "--epochs 0 5 4", "--precision fp32 bf16"]),
    ({"sha256": "0"}, ("bf16", "bf16"), ["--weights FILE", "--epochs 0 5 4", "--precision bf16"]),
])  # fmt: skip
def test_a_command_on_cifar10_says_how_its_stages_were_trained(
    teacher: dict, precisions: tuple[str, str], said: list[str]
) -> None:
    stages = zip(("train", "distill"), (5, 4), precisions, strict=True)
    config = {name: {"epochs": epochs, "precision": precision} for name, epochs, precision in stages}
    assert tables._cifar10_stages({"teacher": teacher, **config}) == said


def test_a_row_far_below_all_others_is_a_number_at_the_edge_of_the_figure():
    from matplotlib.figure import Figure

    figure, by = Figure(), {f"row {i}": [{"T=1": 80.0 + i / 10, "T=2": 81.0 + i / 10}] for i in range(6)}
    figures.dots("T=1", "T=2")(figure, {**by, "poor": [{"T=1": 80.2, "T=2": 30.0}]})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["← 30.0"]
    assert axes.get_xlim()[0] > 79 and [tick.get_text() for tick in axes.get_yticklabels()] == [*by, "poor"]
    assert figures._least_shown([5.0, 80.0]) == 5.0  # of few rows none is far from all others
