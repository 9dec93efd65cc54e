"""training/stages.py: a stage that is done is loaded, one whose options or parent changed is made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qsnn
from qsnn.training.stages import Stages


class Flow:
    """Two stages, the second made of the first; notes which were made, and what was said."""

    def __init__(self, folder: Path, digits: qsnn.Data) -> None:
        self.folder, self.digits, self.made, self.said = folder, digits, [], []

    def run(self, seed: int = 0, levels: int = 2, **options: bool) -> tuple[nn.Module, nn.Module]:
        self.made.clear()
        self.said.clear()
        stages = Stages(self.folder, say=self.said.append, **options)

        def teacher(state: Path) -> nn.Module:
            self.made.append("teacher")
            state.write_bytes(b"of a training that is over")
            return qsnn.create_model("study", self.digits, seed=seed)

        def qann(state: Path) -> nn.Module:
            self.made.append("qann")
            return qsnn.quantize(first, self.digits, qsnn.QuantizeConfig(levels=levels))

        first = stages.run("teacher", teacher, seed=seed)
        second = stages.run("qann", qann, parent=first, levels=levels, shape=(1, 8, 8))
        assert sorted(stages.seconds) == sorted(self.made)
        return first, second


@pytest.fixture
def flow(tmp_path: Path, digits: qsnn.Data) -> Flow:
    return Flow(tmp_path / "flow", digits)


def test_no_stage_is_made_twice(flow: Flow, images: torch.Tensor) -> None:
    first = flow.run()
    assert flow.made == ["teacher", "qann"]
    assert sorted(path.name for path in flow.folder.iterdir()) == ["qann.safetensors", "teacher.safetensors"]
    again = flow.run()
    assert flow.made == []
    assert flow.said == [f"{n}: done before, loaded {flow.folder / n}.safetensors" for n in ("teacher", "qann")]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one(images), other(images))


def test_what_depends_on_a_change_is_made_again(flow: Flow) -> None:
    flow.run()
    flow.run(levels=3)
    assert flow.made == ["qann"]
    flow.run(seed=1, levels=3)
    assert flow.made == ["teacher", "qann"]  # the options of the second are the same, its parent is another
    flow.run(seed=1, levels=3, fresh=True)
    assert flow.made == ["teacher", "qann"]


def test_a_file_says_of_which_stage_it_is(flow: Flow) -> None:
    flow.run()
    teacher, qann = (qsnn.read_recipe(flow.folder / f"{name}.safetensors") for name in ("teacher", "qann"))
    assert teacher["stage"] == {"parent": None, "seed": 0}
    assert qann["stage"] == {"parent": teacher["sha256"], "levels": 2, "shape": [1, 8, 8]}


def test_a_stage_that_cannot_be_written_is_not_made(flow: Flow) -> None:
    (flow.folder / "teacher.safetensors").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        flow.run()
    assert flow.made == []


def test_a_new_option_that_is_off_makes_nothing_again(tmp_path: Path, digits: qsnn.Data) -> None:
    made = []

    def run(**options: object) -> None:
        stages = Stages(tmp_path, say=lambda line: None)
        stages.run("teacher", lambda state: made.append(1) or qsnn.create_model("study", digits), train=options)

    run(epochs=2)
    run(epochs=2, ema=0.0, signed=False, layers=[], root=None)  # as a later version has it
    run(epochs=2)
    assert len(made) == 1
    run(epochs=2, ema=0.9)
    run(epochs=2)  # and without an option that was on
    run(ema=0.0)
    assert len(made) == 4
