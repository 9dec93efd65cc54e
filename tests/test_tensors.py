"""One rule for tensors, in data/images.py: what every verb takes and refuses, of ANN and SNN alike; and autocast."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import scramble
from test_fuzz import strange_tensors
from torch import Tensor
from torch.utils.data import Dataset

import qsnn
from qsnn.snn.network import running_mean

LIKE_FLOAT32 = ("float64", "half", "expanded", "not contiguous", "huge")
"""What is computed as float32; all else is refused."""
ONE = qsnn.TrainConfig(epochs=1, batch_size=4, warmup=0.0)


class Pairs(Dataset[Any]):
    """Whatever it is given, as a data set of four."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.labels[index]


def verbs(nets: dict[str, Any], data: qsnn.Data) -> dict[str, Callable[[list[Any], Dataset[Any]], Any]]:
    """Each public verb that sees images, on batches or on a data set; what it returns can be compared."""

    def whole(part: Dataset[Any]) -> qsnn.Data:
        return dataclasses.replace(data, train=part, val=part, test=part)

    def fitted(part: Dataset[Any]) -> Any:
        model = qsnn.create_model("study", data)
        qsnn.fit(model, whole(part), ONE)
        return [*model.state_dict().values()]

    def taught(part: Dataset[Any]) -> Any:
        config = qsnn.DistillConfig(epochs=1, batch_size=4)
        return [*qsnn.distill(nets["snn"], nets["qann"], whole(part), config).state_dict().values()]

    return {
        **{f"accuracy({name})": lambda some, _, net=net: qsnn.accuracy(net, some) for name, net in nets.items()},
        "benchmark(teacher)": lambda some, _: qsnn.benchmark(nets["teacher"], some).accuracy,
        "benchmark(snn)": lambda some, _: qsnn.benchmark(nets["snn"], some, timesteps=2).synops_by_t,
        "certify": lambda some, _: qsnn.certify(nets["folded"], nets["qann"], some).logits_sha256,
        "quantize": lambda some, _: [*qsnn.quantize(nets["teacher"], some).state_dict().values()],
        "convert": lambda some, _: [*qsnn.convert(nets["teacher"], some).state_dict().values()],
        "fit": lambda _, part: fitted(part), "distill": lambda _, part: taught(part),
    }  # fmt: skip


@pytest.fixture(scope="module")
def nets(digits: qsnn.Data) -> dict[str, Any]:
    teacher = scramble(qsnn.create_model("study", digits))
    qann = qsnn.quantize(teacher, digits).eval()
    snn = qsnn.convert(qann)
    return {"teacher": teacher, "qann": qann, "snn": snn, "folded": qsnn.fold(snn)}


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the one line with which it refuses."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return call()
    except (ValueError, TypeError, FloatingPointError) as error:
        assert str(error) and "\n" not in str(error), error
        return error


def same(one: Any, two: Any) -> bool:
    if isinstance(one, list):
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    return type(one) is type(two) and (isinstance(one, Exception) or one == two)


def test_every_verb_has_the_same_rule_for_images(nets: dict[str, Any], digits: qsnn.Data, images: Tensor) -> None:
    images, labels = images[:4], torch.tensor([0, 1, 2, 3])
    found = strange_tensors(images)
    for name, verb in verbs(nets, digits).items():
        for kind, tensor in found.items():
            if name in ("convert", "fit", "distill") and kind in ("float64", "expanded", "huge"):
                continue  # they take a while
            got = outcome(lambda: verb([(tensor, labels)], Pairs(tensor, labels)))  # noqa: B023
            if kind in LIKE_FLOAT32:
                plain = tensor.float().contiguous()
                wanted = outcome(lambda: verb([(plain, labels)], Pairs(plain, labels)))  # noqa: B023
                assert same(got, wanted), (name, kind, got, wanted)
            elif not (kind == "a list" and name in ("fit", "distill")):  # whose items are lists: no images
                assert isinstance(got, ValueError | TypeError) and "expected" in str(got), (name, kind, got)


STRANGE_LABELS: dict[str, Any] = {
    "too large": torch.tensor([0, 1, 10, 3]), "below 0": torch.tensor([0, 1, -1, 3]),
    "ignored elsewhere": torch.tensor([0, 1, -100, 3]), "far": torch.tensor([0, 1, 2**40, 3]),
    "halves": torch.tensor([0.0, 0.5, 1.0, 2.0]), "nan": torch.tensor([0.0, math.nan, 1.0, 2.0]),
    "complex": torch.tensor([0j, 1, 2, 3]), "too few": torch.tensor([0, 1, 2]), "of two": torch.zeros(4, 2).long(),
    "a scalar": torch.tensor(3), "none": None, "text": "0123", "a pair": (torch.zeros(4), torch.zeros(4)),
}  # fmt: skip


@pytest.mark.parametrize("place", [0, 1])
def test_every_verb_has_the_same_rule_for_labels(
    place: int, nets: dict[str, Any], digits: qsnn.Data, images: Tensor
) -> None:
    """In the first batch, which says what the task is, and in a later one."""
    images, plain = images[:4], torch.tensor([0, 1, 2, 3])
    for name, verb in verbs(nets, digits).items():
        if name not in ("accuracy(qann)", "accuracy(folded)", "benchmark(snn)"):  # others read none, or stand below
            continue
        for kind in (torch.int8, torch.int16, torch.int32, torch.uint8):
            given = [(images, plain), (images, plain.to(kind))]
            assert same(verb(given, Pairs(images, plain)), verb([(images, plain)] * 2, Pairs(images, plain)))
        for what, labels in STRANGE_LABELS.items():
            batches = [(images, plain), (images, plain)]
            batches[place] = (images, labels)
            got = outcome(lambda: verb(batches, Pairs(images, plain)))  # noqa: B023
            words = "expected" in str(got) or "belong to no task; pass labels that fit" in str(got)
            assert isinstance(got, ValueError | TypeError) and words, (name, what, got)


class Late(Pairs):
    """A hundred items, of which one has a label that the network cannot give."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Any:
        return self.images[index % 4], self.labels if index == 90 else index % 10


@pytest.mark.parametrize("label", [10, -1, -100])
@pytest.mark.parametrize("verb", ["fit", "distill"])
def test_a_late_label_out_of_range_stops_a_training(
    verb: str, label: int, nets: dict[str, Any], digits: qsnn.Data, images: Tensor
) -> None:
    part, good = Late(images[:4], label), Late(images[:4], 0)
    data = dataclasses.replace(digits, train=part, val=good, test=good)
    with pytest.raises(ValueError, match="expected labels from 0 to 9"), contextlib.redirect_stdout(io.StringIO()):
        if verb == "fit":
            qsnn.fit(qsnn.create_model("study", digits), data, ONE)
        else:
            qsnn.distill(nets["snn"], nets["qann"], data, qsnn.DistillConfig(epochs=1, batch_size=4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_of_a_folded_network(
    dtype: torch.dtype, nets: dict[str, Any], digits: qsnn.Data, images: Tensor
) -> None:
    folded = nets["folded"]
    with torch.no_grad():
        for firing in ("online", "deferred"):
            wanted = folded(images, timesteps=4, firing=firing)
            with torch.autocast("cpu", dtype):
                assert torch.equal(folded(images, timesteps=4, firing=firing), wanted)
                z = folded.step_logits(images, timesteps=4, firing=firing)
            assert z.dtype == wanted.dtype and torch.equal(running_mean(z)[-1], wanted[-1])
    few = digits.test.head(40)  # type: ignore[attr-defined]

    def measured() -> Any:
        result = qsnn.benchmark(folded, few, timesteps=2)
        return qsnn.certify(folded, nets["qann"], few), qsnn.accuracy(folded, few), result.synops_by_t

    plain = measured()
    with torch.autocast("cpu", dtype):
        assert measured() == plain
