"""check(): what becomes of a network, before any training; and a network that does not fit its data, in one line."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qsnn
from qsnn.cli.main import main
from qsnn.data.fitting import describe
from qsnn.graph.arrived import training_flags
from qsnn.measure.check import check


def test_a_network_is_seen_through_and_left_alone(teacher: nn.Module, digits: qsnn.Data) -> None:
    model = copy.deepcopy(teacher).train()
    model[1].eval()
    state, flags, random = copy.deepcopy(model.state_dict()), training_flags(model), torch.get_rng_state()
    found = check(model, digits, timesteps=2)
    assert found.ready and found.refused == () and found.certificate == "EXACT"
    assert found.images == 540 and found.accuracy == qsnn.accuracy(teacher, digits.test)
    kinds = [layer.kind for layer in found.layers]
    assert kinds.count("ReLU") == 4 and kinds.count("convolution") == 4
    assert kinds[0] == "input" and kinds[-1] == "linear"
    assert found.layers[1].shape == (24, 8, 8) and "8 bits" in found.layers[1].becomes
    assert found.qat_seconds and found.distill_seconds and found.distill_seconds > 0
    page = str(found)
    assert "accuracy of the float network as loaded" in page and "an epoch of distillation at T = 2 about" in page
    assert training_flags(model) == flags and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_is_refused_is_said_beside_all_else(digits: qsnn.Data) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10))
    found = check(model, digits, seconds=0.0)
    assert not found.ready and found.accuracy is not None and found.images == 50
    assert re.search(r"1 \(GELU: put nn\.ReLU in .*train again", found.refused[0])
    assert found.qat_seconds is None and found.certificate is None
    page = str(found)
    assert "refused: cannot " in page and re.search(r"1 +GELU +refused", page) and "neuron when converted" in page


def test_what_is_no_model_or_data(digits: qsnn.Data, teacher: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"expected a Data, got list; call check\(model, load_data"):
        check(teacher, [1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        check({}, digits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)), "takes 3 channels, the data has 1"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), r"gives 5 outputs, digits has 10 classes \(0, 1, 2, \.\.\.\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(100, 10)), r"does not take the images of digits, 1x8x8; .*mat1 "),
    ],
)
def test_a_network_that_does_not_fit(model: nn.Module, message: str, digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check(model, digits)
    assert "\n" not in str(caught.value)


def test_a_data_set_is_described(digits: qsnn.Data) -> None:
    assert describe(digits).splitlines()[1:] == [
        "normalised with mean 0.3057 and std 0.376",
        "classes are balanced: each has 110 to 115 train, 12 to 13 val, 52 to 55 test items",
    ]


# ---- the command line

OWN = """
from torch import nn
def net(num_classes):
    return nn.Sequential(nn.Conv2d({channels}, 4, 3), nn.{act}(), nn.Flatten(), nn.Linear(144, {outputs}))
"""


@pytest.mark.parametrize(
    ("channels", "outputs", "act", "command", "message"),
    [
        (3, "num_classes", "ReLU", "train", "does not take the images of digits, 1x8x8; its first convolution takes 3"),
        (1, 5, "ReLU", "train", "gives 5 outputs, digits has 10 classes"),
        (3, "num_classes", "ReLU", "run", "does not take the images of digits"),
        (1, 5, "ReLU", "check", "gives 5 outputs"),
        (1, "num_classes", "GELU", "check", "cannot be converted as it is"),
    ],
)
def test_one_line_on_the_command_line(
    channels: int, outputs: object, act: str, command: str, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name = f"own_{channels}_{outputs}_{act}_{command}"
    (tmp_path / f"{name}.py").write_text(OWN.format(channels=channels, outputs=outputs, act=act))
    monkeypatch.syspath_prepend(tmp_path)
    out = [] if command == "check" else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as left:
        main([command, "--data", "digits", "--model", f"{name}:net", "--device", "cpu", *out])
    said = capsys.readouterr().err
    assert left.value.code == 2 and message in said and said.count("\n") == 1


def test_check_and_info_of_a_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--model", "vgg-small", "--data", "digits", "--device", "cpu", "--mean", "0.3", "--std", "0.4"])
    said = capsys.readouterr().out
    assert "normalised with mean 0.3 and std 0.4" in said and "certificate before training" in said and "EXACT" in said
    main(["info", "digits"])
    assert "classes are balanced: each has 110 to 115 train" in capsys.readouterr().out


def test_mean_and_std_follow_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, qann = str(tmp_path / "t.safetensors"), str(tmp_path / "q.safetensors")
    options = ["--epochs", "0", "--device", "cpu"]
    main(["train", "--data", "digits", "--out", teacher, "--mean", "0.5", "--std", "0.25", *options])
    main(["quantize", teacher, "--out", qann, *options])
    for file in (teacher, qann):
        recorded = qsnn.read_recipe(file)["data"]
        assert recorded["mean"] == [0.5] and recorded["std"] == [0.25]


@pytest.mark.slow
@pytest.mark.skipif("QSNN_DATA" not in os.environ, reason="set QSNN_DATA to a folder of the real sets")
def test_a_strangers_resnet_20(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(os.environ["QSNN_DATA"]).expanduser() / "resnet20-cifar10" / "resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip("the public ResNet-20 is not here")
    numbers = ["--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"]
    try:
        main(["check", "--model", "resnet20", "--weights", str(path), "--data", "cifar10", "--seconds", "3", *numbers])
    except SystemExit as left:
        assert left.code == 2
    found = re.search(r"as loaded: ([\d.]+) % of ([\d,]+) test", capsys.readouterr().out)
    assert found and abs(float(found[1]) - 91.7) < 3
