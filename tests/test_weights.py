"""A stranger's checkpoint: every wrapping is undone, nothing in it runs, and what does not fit shows both sides."""

from __future__ import annotations

import argparse
import copy
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import qsnn
from qsnn.graph.arrived import arrived

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
]


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4 * 64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return y


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    model(torch.randn(8, 1, 8, 8))
    return model.eval()


X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
PLAIN = net().state_dict()


def under(prefix: str, tensors: Any = PLAIN) -> dict[str, Any]:
    return {prefix + name: value for name, value in tensors.items()}


def partly() -> Any:
    model = net()
    model.features = nn.DataParallel(model.features)
    return model.state_dict()


def averaged() -> Any:
    model = AveragedModel(net())
    model.update_parameters(net())
    return model.state_dict()


FILES: dict[str, Any] = {
    "plain": PLAIN,
    "parameter objects": {name: nn.Parameter(v) if v.is_floating_point() else v for name, v in PLAIN.items()},
    **{f"under {key}": {key: PLAIN, "epoch": 3} for key in ("state_dict", "model", "net", "ema", "anything", "params")},
    "two deep": {"checkpoint": {"model": OrderedDict(PLAIN)}, "optimizer": {"state": {}, "param_groups": []}},
    "beside an optimizer": {
        "model": PLAIN, "optimizer": torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9).state_dict()
    },
    **{p: under(p) for p in ("module.", "_orig_mod.", "_orig_mod.module.", "backbone.", "encoder.net.", "model.")},
    "partly": partly(),
    "module in state_dict": {"state_dict": under("module."), "best_acc": 91.0},
    "averaged": averaged(),
    "old batch norm": {name: v for name, v in PLAIN.items() if "num_batches" not in name},
    "profiled": {**PLAIN, "total_ops": torch.zeros(1), "features.0.total_params": torch.zeros(1)},
    "options and numbers": {"net": PLAIN, "args": argparse.Namespace(lr=0.1), "acc": np.float64(91.2)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "ending"), [*((name, "pt") for name in FILES), *(("module.", e) for e in ("pth", "th", "pth.tar", "bin"))]
)
def test_every_wrapping_is_undone(name: str, ending: str, tmp_path: Path) -> None:
    torch.save(FILES[name], tmp_path / f"w.{ending}", _use_new_zipfile_serialization=ending != "th")
    target = net(1)
    qsnn.load_weights(target, tmp_path / f"w.{ending}")
    with torch.no_grad():
        assert torch.equal(target(X), net()(X))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_safetensors(prefix: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(under(prefix), tmp_path / "w.safetensors")
    target = net(1)
    qsnn.load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target(X), net()(X))


def test_our_own_checkpoint_is_weights_too(teacher: nn.Module, digits: qsnn.Data, tmp_path: Path) -> None:
    qsnn.save(teacher, tmp_path / "t.safetensors")
    target = qsnn.create_model("vgg-small", digits, seed=7).eval()
    qsnn.load_weights(target, tmp_path / "t.safetensors")
    assert torch.equal(target(X), teacher(X))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), nn.Sequential])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_model_may_be_the_wrapped_one(wrap: Any, prefix: str, tmp_path: Path) -> None:
    torch.save(under(prefix), tmp_path / "w.pt")
    target = wrap(net(1))
    qsnn.load_weights(target, tmp_path / "w.pt")
    assert torch.equal(arrived(target)(X), net()(X))


def test_saved_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # the place that torch.save writes beside each storage
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save({"state_dict": under("module.")}, tmp_path / "w.pt")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "w.pt", weights_only=True)
    target = net(1)
    qsnn.load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target(X), net()(X)) and next(target.parameters()).device.type == "cpu"


def pruned(model: Net) -> nn.Module:
    prune.l1_unstructured(model.classifier, "weight", 0.3)
    prune.ln_structured(model.features[0], "weight", 0.5, n=2, dim=0)
    return model


def weight_normed(model: Net) -> nn.Module:
    parametrizations.weight_norm(model.features[0])
    torch.nn.utils.weight_norm(model.classifier)
    return model


def spectral(model: Net) -> nn.Module:
    parametrizations.spectral_norm(model.features[0])
    torch.nn.utils.spectral_norm(model.classifier)
    return model.train()


@pytest.mark.parametrize("how", [pruned, weight_normed, spectral])
def test_computed_weights_are_computed(how: Any, tmp_path: Path) -> None:
    model = how(net())
    model(X)
    model.eval()
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "w.pt")
    target = net(1)
    qsnn.load_weights(target, tmp_path / "w.pt")
    with torch.no_grad():
        torch.testing.assert_close(target(X), model(X), rtol=0, atol=2e-6)
    same = how(net(1))  # a network with the same computation takes what is stored
    qsnn.load_weights(same, tmp_path / "w.pt")
    with torch.no_grad():
        torch.testing.assert_close(same.eval()(X), model(X), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save({n: v.to(dtype) if v.is_floating_point() else v for n, v in PLAIN.items()}, tmp_path / "w.pt")
    target = net(1)
    qsnn.load_weights(target, tmp_path / "w.pt")
    assert {p.dtype for p in target.parameters()} == {torch.float32}
    torch.testing.assert_close(target(X), net()(X), rtol=0, atol=0.05)


def test_of_two_sets_the_averaged_one_has_to_be_asked_for(tmp_path: Path) -> None:
    torch.save({"ema": net(2).state_dict(), "model": PLAIN}, tmp_path / "w.pt")
    target = net(1)
    with pytest.warns(qsnn.QsnnWarning, match=r"under 'model', which are taken, and averaged .*'ema'.*key='ema'"):
        qsnn.load_weights(target, tmp_path / "w.pt")
    assert torch.equal(target(X), net()(X))
    qsnn.load_weights(target, tmp_path / "w.pt", key="ema")
    assert torch.equal(target(X), net(2)(X))
    torch.save({**under("encoder_q."), **under("encoder_k.", net(2).state_dict())}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"2 sets of weights in it fit, 'encoder_q', 'encoder_k'; .*key='enc"):
        qsnn.load_weights(target, tmp_path / "w.pt")
    qsnn.load_weights(target, tmp_path / "w.pt", key="encoder_k")
    assert torch.equal(target(X), net(2)(X))
    with pytest.raises(ValueError, match=r"nothing under key='nothing' fits"):
        qsnn.load_weights(target, tmp_path / "w.pt", key="nothing")


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    torch.save({"state_dict": {**under("backbone."), "loss.centre": torch.zeros(3)}}, tmp_path / "w.pt")
    with pytest.warns(qsnn.QsnnWarning, match=r"only what .* 'state_dict\.backbone' .*1 tensors \(loss\.centre"):
        qsnn.load_weights(net(1), tmp_path / "w.pt")


# ---- the public file


@pytest.mark.skipif("QSNN_DATA" not in os.environ, reason="set QSNN_DATA to a folder of the real sets")
def test_a_strangers_resnet_20(tmp_path: Path) -> None:
    path = Path(os.environ["QSNN_DATA"]).expanduser() / "resnet20-cifar10" / "resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip("the public ResNet-20 is not here")
    data = qsnn.load_data("cifar10", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    model = qsnn.create_model("resnet20", data).eval()
    qsnn.load_weights(model, path)
    assert qsnn.accuracy(model, data.test.head(1000)) == pytest.approx(91.3, abs=1.5)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"97 tensors \(module\.conv1.* has 157 .*file: 60 .*layer1\.3\.conv1"):
        qsnn.load_weights(qsnn.create_model("resnet32", data), path)


# ---- refusals


def test_what_does_not_fit_shows_both_sides_and_touches_nothing(tmp_path: Path) -> None:
    target, before = net(1), net(1).state_dict()
    long = {f"a_layer_with_a_rather_long_name_that_goes_on_{i}.weight": torch.zeros(3) for i in range(200)}
    cases: list[tuple[Any, str]] = [
        (long, r"holds 200 tensors \(a_layer\S+_0\.weight, a_layer\S+_1\.weight, a_layer\S+_2\.weight, \.\.\.\); the "
               r"network has 8 tensors \(features\.0\.weight, features\.0\.bias, features\.1\.weight, \.\.\.\); none"),
        ({n: v for n, v in PLAIN.items() if "bias" not in n}, r"not in the file: 3 tensors \(features\.0\.bias, feat"),
        ({**PLAIN, "extra.weight": torch.zeros(1)}, r"not in the network: 1 tensors \(extra\.weight\)"),
        ({"model": Net(10).state_dict()}, r"classifier\.weight is \(10, 256\) in the file and \(3, 256\) in"),
        ({"epoch": 3}, r"expected a state_dict, the file holds no tensors under names"),
        ([PLAIN], r"expected a state_dict, got list"),
        ({**PLAIN, "classifier.bias": torch.tensor([0.0, np.nan, 1.0])}, r"classifier\.bias holds 1 values that"),
        ({**PLAIN, "classifier.bias": torch.zeros(3, dtype=torch.int8)}, r"classifier\.bias holds int8, expected"),
    ]  # fmt: skip
    for content, message in cases:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=rf"cannot load .*w\.pt into Net: .*{message}") as caught:
            qsnn.load_weights(target, tmp_path / "w.pt")
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


class Opens:
    """Pickled, it would run something when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_is_ever_run(tmp_path: Path) -> None:
    for content in ({"model": PLAIN, "extra": Opens(tmp_path / "touched")}, net()):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"Python objects \(\S+\) beside tensors, which are never run; .*save\("):
            qsnn.load_weights(net(1), tmp_path / "w.pt")
    assert not (tmp_path / "touched").exists()
    torch.jit.script(net()).save(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"TorchScript archive, which is a program; in the program that wrote it"):
        qsnn.load_weights(net(1), tmp_path / "w.pt")


def test_files_that_are_none(tmp_path: Path) -> None:
    torch.save(PLAIN, tmp_path / "w.pt")
    raw = (tmp_path / "w.pt").read_bytes()
    for content in (b"", b"x", raw[: len(raw) // 2], raw[:-10], os.urandom(1000), b"version https://git-lfs..."):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot load .*w\.pt into Net: .*torch\.save\(model\.state_dict\(\)"):
            qsnn.load_weights(net(1), tmp_path / "w.pt")
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "is a pipe; expected"), (tmp_path, "is a folder; expected")):
        with pytest.raises(ValueError, match=message):
            qsnn.load_weights(net(1), path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        qsnn.load_weights(net(1), tmp_path / "nothing")


def test_a_smaller_network_of_the_same_names_is_not_cut_out(tmp_path: Path) -> None:
    big, small = (nn.Sequential(*[nn.Linear(4, 4) for _ in range(n)]) for n in (5, 3))
    torch.save(big.state_dict(), tmp_path / "w.pt")
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match=r"not in the network: 4 tensors \(3\.weight, 3\.bias, 4\.weight, \.\.\.\)"):
        qsnn.load_weights(small, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
