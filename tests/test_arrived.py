"""A model as it arrives: wrapped, pruned, parametrized, of another precision, with frozen batch norms."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import qsnn
from qsnn.graph.arrived import (
    QsnnWarning,
    arrived,
    evaluating,
    frozen_norms,
    set_training_flags_,
    to_float32_,
    training_flags,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4 * 64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return y


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(8, 1, 8, 8))  # statistics of its own
    return model.eval()


X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def pruned(model: Net) -> nn.Module:
    prune.l1_unstructured(model.classifier, "weight", 0.3)
    prune.random_unstructured(model.classifier, "weight", 0.2)  # twice: a container of both
    prune.ln_structured(model.features[0], "weight", 0.5, n=2, dim=0)
    return model


def weight_normed(model: Net) -> nn.Module:
    parametrizations.weight_norm(model.features[0])
    torch.nn.utils.weight_norm(model.classifier)
    return model


def spectral(model: Net) -> nn.Module:
    parametrizations.spectral_norm(model.features[0])
    torch.nn.utils.spectral_norm(model.classifier)
    model.train()(X)
    return model.eval()


def inner_wrapped(model: Net) -> nn.Module:
    model.features = nn.DataParallel(model.features)
    return nn.DataParallel(model)


def compiled(model: Net) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


def compiled_in_place(model: Net) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_inside(model: Net) -> nn.Module:
    model.features = torch.compile(model.features, backend="eager")  # type: ignore[assignment]
    return model


ARRIVALS = (
    nn.DataParallel, inner_wrapped, compiled, compiled_in_place, compiled_inside, pruned, weight_normed, spectral
)  # fmt: skip


@pytest.mark.parametrize("arrive", ARRIVALS)
def test_what_is_taken_answers_as_what_arrived(arrive: Callable[[Net], nn.Module]) -> None:
    model = arrive(net())
    before = copy.deepcopy(model.state_dict())
    taken = arrived(model)
    with torch.no_grad():
        torch.testing.assert_close(taken(X), model(X), rtol=0, atol=1e-6)
    assert set(dict(taken.named_parameters())) == set(dict(net().named_parameters()))
    assert all(p.is_leaf for p in taken.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    copy.deepcopy(taken)  # what every verb does next


DATA = [(torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(24) % 3)]


@pytest.mark.parametrize("arrive", ARRIVALS)
def test_the_verbs_take_it(arrive: Callable[[Net], nn.Module]) -> None:
    model, plain = arrive(net()), arrived(arrive(net()))
    assert qsnn.accuracy(model, DATA) == qsnn.accuracy(plain, DATA)
    qann, same = (qsnn.quantize(m, DATA, qsnn.QuantizeConfig(levels=2)).eval() for m in (model, plain))
    with torch.no_grad():
        assert torch.equal(qann(X), same(X))
    assert qsnn.certify(qsnn.convert(qann), qann, DATA).exact
    assert torch.equal(qsnn.convert(model, DATA)(X), qsnn.convert(plain, DATA)(X))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1), (torch.half, 0.05)])
def test_the_verbs_take_another_precision(dtype: torch.dtype, tolerance: float) -> None:
    config = qsnn.QuantizeConfig(levels=4)
    want = qsnn.convert(qsnn.quantize(net(), DATA, config).eval())(X, timesteps=4, firing="deferred")[-1]
    model, data = net().to(dtype), [(DATA[0][0].to(dtype), DATA[0][1])]
    with pytest.warns(QsnnWarning, match="runs in float32"):
        qann = qsnn.quantize(model, data, config).eval()
    got = qsnn.convert(qann)(X, timesteps=4, firing="deferred")[-1]
    assert {p.dtype for p in model.parameters()} == {dtype} and got.dtype == torch.float32
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_frozen_norms_stay_frozen_through_the_verbs() -> None:
    model = net().train()
    model.features[1].eval()
    flags = training_flags(model)
    qann = qsnn.quantize(model, DATA)
    snn = qsnn.convert(qann)
    norms = [m for m in snn.modules() if isinstance(m, nn.BatchNorm2d)]
    assert training_flags(model) == flags and not qann.get_submodule("features.1").training and qann.training
    assert snn.training and norms and not any(norm.training for norm in norms)


def test_ddp_is_taken_off(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net().train())
        model(X).sum().backward()
        taken = arrived(model)
        assert type(taken) is Net and taken.training and torch.equal(taken.eval()(X), model.module.eval()(X))
        assert arrived(nn.Sequential(model))[0].classifier.weight is not model.module.classifier.weight
    finally:
        torch.distributed.destroy_process_group()


def test_nothing_to_do_gives_the_model_itself(qann: nn.Module, snn: nn.Module) -> None:
    for model in (net(), qann, snn, nn.Sequential(nn.Flatten())):
        assert arrived(model) is model


def test_the_recipe_comes_along() -> None:
    model = net()
    model.qsnn_recipe = {"kind": "teacher"}  # type: ignore[assignment]
    assert arrived(nn.DataParallel(model)).qsnn_recipe == {"kind": "teacher"}
    assert arrived(torch.compile(model, backend="eager")).qsnn_recipe == {"kind": "teacher"}  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.half, 0.0), (torch.bfloat16, 0.0)])
def test_other_precisions_run_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    model = net().to(dtype)
    with pytest.warns(QsnnWarning, match=rf"a model of {str(dtype)[6:]} runs in float32"):
        taken = arrived(model)
    assert {p.dtype for p in taken.parameters()} == {torch.float32} and next(model.parameters()).dtype == dtype
    want = copy.deepcopy(model).float()
    with torch.no_grad():
        torch.testing.assert_close(taken(X), want(X), rtol=0, atol=tolerance)
    with pytest.warns(QsnnWarning):
        assert qsnn.accuracy(model, [(X, torch.zeros(5, dtype=torch.long))]) >= 0
    assert isinstance(qsnn.QsnnWarning("said"), UserWarning)


def test_in_place_it_is_the_same_module() -> None:
    model = net().double()
    weight = model.classifier.weight
    with pytest.warns(QsnnWarning, match="float64 runs in float32"):
        to_float32_(model)
    assert model.classifier.weight is weight and weight.dtype == torch.float32
    to_float32_(model)  # nothing to say


def test_it_is_said_once() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            qsnn.accuracy(net().double(), [(X, torch.zeros(5, dtype=torch.long))])
    assert len(said) == 1


def test_an_integer_network_keeps_its_precision(snn: qsnn.SNN) -> None:
    folded = qsnn.fold(snn)
    assert arrived(folded) is folded
    double = copy.deepcopy(snn).double()
    assert arrived(double) is double


class Freezes(nn.Sequential):
    """The usual way to keep a batch norm as it is while the rest trains."""

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("kind", [nn.Sequential, Freezes])
def test_each_module_keeps_its_own_flag(kind: type[nn.Sequential]) -> None:
    torch.manual_seed(0)
    model = kind(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3), nn.Dropout(0.1))
    model.train()
    model[1].eval()
    flags, state = training_flags(model), copy.deepcopy(model.state_dict())
    assert flags[""] and not flags["1"] and frozen_norms(model) == ["1"]
    data = [(X, torch.arange(5) % 3)]
    first = qsnn.accuracy(model, data)
    assert training_flags(model) == flags
    with pytest.raises(KeyError), evaluating(model, model[0]):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert training_flags(model) == flags and qsnn.accuracy(model, data) == first
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert frozen_norms(model.eval()) == []


def test_flags_go_over_to_a_copy_with_other_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    model[1].eval()
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU())).eval()
    set_training_flags_(other, training_flags(model))
    assert training_flags(other) == {"": True, "0": True, "1": False, "2": True, "2.0": True}


def test_what_cannot_be_taken_says_what_to_pass() -> None:
    scripted = torch.jit.script(net())
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(TypeError, match=r"compiled by torch\.jit.*pass the nn\.Module it was made from"):
            arrived(model)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got OrderedDict; build the network, then load"):
        arrived(net().state_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0\.weight holds no values yet; run the network once"):
        arrived(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="holds no values yet"):
        arrived(nn.Linear(2, 2, device="meta"))
