"""benchmarks/study.py: every question has rows, a config of its own for each, and an answer."""

from __future__ import annotations

import json
from pathlib import Path

import figures
import pytest
import questions
import questions_tasks
import questions_training
import study
import torch
from setting import Setting

import qsnn
from qsnn.report.records import Record, read

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def _load(name: str) -> qsnn.Data:
    return qsnn.load_data("digits")


def _rows(name: str) -> list:
    return list(study.STUDIES[name].rows(Setting("digits", "study", 4, 20_000, 0), _load))


@pytest.mark.parametrize("name", study.STUDIES)
def test_rows_have_labels_and_configs_of_their_own(name):
    rows = _rows(name)
    assert len({label for label, _, _ in rows}) == len(rows) > 0
    assert len({json.dumps([label, config]) for label, config, _ in rows}) == len(rows)


def test_a_blend_ends_as_the_neuron_it_holds(qann, snn, images):
    wanted = snn(images, timesteps=2)
    mixed = questions_training.blended(qsnn.convert(qann), "blend", 2, 10)
    blends = [m for m in mixed.modules() if isinstance(m, questions_training.Blend)]
    assert blends
    # at α = 0 the network is the QANN at every step
    assert torch.allclose(mixed(images, timesteps=2)[0], qann(images), atol=1e-4)
    for blend in blends:
        blend.seen = 10
    assert torch.equal(mixed(images, timesteps=2), wanted)


@pytest.mark.parametrize("kind", questions_tasks.STRENGTHS)
def test_worse_images_differ_from_strength_to_strength(kind):
    images = qsnn.load_data("digits").test.head(20)
    strengths = questions_tasks.STRENGTHS[kind]
    found = [questions_tasks.worsened(images, kind, strength).images for strength in strengths]
    assert torch.equal(found[0], images.images)
    far = [(f.float() - images.images.float()).abs().mean() for f in found[1:]]
    assert min(far) > 0 and far[-1] > far[0]
    assert torch.equal(questions_tasks.worsened(images, kind, strengths[1]).images, found[1])


def test_readouts_by_hand():
    z = torch.tensor([[[3.0, 1.0]], [[0.0, 1.5]]])  # two steps, two classes, θ = 1, v₀ = ½
    assert questions.read_out(z, "mean", 1.0).tolist() == [[1.5, 1.25]]
    assert questions.read_out(z, "last step", 1.0).tolist() == [[0.0, 1.5]]
    assert questions.read_out(z, "spike count", 1.0).round().tolist() == [[2.0, 2.0]]  # the tie goes to the potential
    assert questions.read_out(z, "spike count", 1.0).argmax() == 0
    assert questions.read_out(z, "first spike", 1.0).round().tolist() == [[2.0, 2.0]]


def test_calibration_error_of_a_sure_net_that_errs_half_the_time():
    logits = torch.tensor([[100.0, 0.0]] * 4)
    assert study.studies.calibration_error(logits, torch.tensor([0, 0, 1, 1])) == pytest.approx(50.0)


def test_heads_of_several_tasks_stand_side_by_side():
    setting = Setting("all", "study", 1, 300, 0)
    data = questions_tasks.together(_load, setting)
    assert data.num_classes == 30 and len(data.train) == 300
    assert data.shape == (1, questions_tasks.SIDE, questions_tasks.SIDE)
    assert sorted({int(label) // 10 for label in data.test.labels}) == [0, 1, 2]


@pytest.mark.parametrize("name", [name for name, found in study.STUDIES.items() if found.answer])
def test_recorded_studies_end_with_a_sentence_and_a_figure(name, tmp_path, monkeypatch):
    path = BENCHMARKS / "records" / f"study-{name}.jsonl"
    if not path.exists():
        pytest.skip(f"study {name} has no records yet")
    labels = {f"study-{name}/{label}" for label, _, _ in _rows(name)}
    rows: dict[tuple[str, int], Record] = {(r.name, r.seed): r for r in read(path)}
    if not labels <= {label for label, seed in rows if seed == 0}:
        pytest.skip(f"study {name} has not all of its rows yet")
    mine = [r for (label, seed), r in rows.items() if label in labels and seed == 0]
    monkeypatch.setattr(figures, "HERE", tmp_path)
    assert figures.draw(name, mine).read_text().startswith("<?xml")
    assert study.STUDIES[name].answer(mine).endswith(".")


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
