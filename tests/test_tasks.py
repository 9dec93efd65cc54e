"""Tasks: losses and scores by hand, what is found from labels and answers, and each kind from float to an EXACT SNN."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import qsnn
from qsnn.distillation.losses import distillation_loss
from qsnn.measure.heads import find_tasks, heads
from qsnn.measure.task import BINARY, REGRESSION, SEGMENTATION, TASKS, told
from qsnn.report.curve import draw_curve
from qsnn.report.page import write_report
from qsnn.report.terminal import table


class Answers(nn.Module):
    """Gives its images back as answers: what is scored is written down."""

    def __init__(self, shape: tuple[int, ...] = (), names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.shape, self.names = shape, names

    def forward(self, x: Tensor) -> Any:
        x = x.flatten(1) if not self.shape else x.reshape(len(x), *self.shape)
        return {name: x[:, i : i + 1] for i, name in enumerate(self.names)} if self.names else x


def set_of(x: Tensor, y: Any, n: int = 20) -> qsnn.Data:
    """Three parts: the last n for validation, and for the test."""
    part = [TensorDataset(x[at], y[at]) for at in (slice(-2 * n), slice(-2 * n, -n), slice(-n, None))]
    return qsnn.Data(name="made", train=part[0], val=part[1], test=part[2], mean=(0.0,), std=(1.0,), classes=())


# one logit


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1))
def test_of_one_logit_the_sign_decides(pairs: list[tuple[int, bool]]) -> None:
    z, y = torch.tensor([float(a) for a, _ in pairs]), torch.tensor([b for _, b in pairs])
    by_hand = 100.0 * sum((a > 0) == b for a, b in pairs) / len(pairs)
    batch = [(z.view(-1, 1, 1, 1), y)]
    assert qsnn.accuracy(Answers(), batch, task="binary") == by_hand
    result = qsnn.benchmark(Answers(), batch, task="binary")
    assert result.accuracy == (round(by_hand, 4),) and result.metric == "accuracy"
    assert sum(map(sum, result.confusion or [])) == len(pairs)


def test_a_bernoulli_is_a_softmax_over_two() -> None:
    z, t = torch.randn(2, 6, 1, generator=torch.Generator().manual_seed(0)).unbind(0)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    two = [torch.cat([torch.zeros_like(a), a], 1) for a in (z, t)]
    for smoothing in (0.0, 0.1):
        assert torch.allclose(BINARY.loss(z, y, smoothing), TASKS["classification"].loss(two[0], y, smoothing))
    assert torch.allclose(BINARY.taught(z, t, 3.0), TASKS["classification"].taught(two[0], two[1], 3.0))
    assert float(BINARY.taught(z, z, 2.0)) == pytest.approx(0.0, abs=1e-6)
    lead = BINARY.lead(z.unsqueeze(0))  # type: ignore[misc]
    assert torch.allclose(lead, TASKS["classification"].lead(two[0].unsqueeze(0)), atol=1e-6)  # type: ignore[misc]


# maps


def test_mean_iou_by_hand() -> None:
    # answers 0 0 1 1, labels 0 1 1 255: classes 0 and 1 share 1 of 2 pixels each, 2 is nowhere, 255 is left out
    maps = F.one_hot(torch.tensor([[[0, 0], [1, 1]]]), 3).movedim(-1, 1).float()
    labels = torch.tensor([[[0, 1], [1, 255]]])
    assert qsnn.accuracy(Answers((3, 2, 2)), [(maps, labels)]) == pytest.approx(100 * (1 / 2 + 1 / 2) / 2)
    whole = torch.tensor([[[0, 1], [1, 1]]])  # 1 of 2, and 2 of 3
    assert SEGMENTATION.read(SEGMENTATION.count(maps, whole)) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    halves = SEGMENTATION.count(maps[:, :, :1], whole[:, :1]) + SEGMENTATION.count(maps[:, :, 1:], whole[:, 1:])
    assert torch.equal(halves, SEGMENTATION.count(maps, whole)), "sums over batches are the sum over all"
    one = torch.tensor([[[[-1.0, 2.0], [3.0, -4.0]]]])  # one map: the sign
    assert SEGMENTATION.read(SEGMENTATION.count(one, torch.tensor([[[0, 1], [1, 0]]]))) == 100.0


def test_the_loss_of_maps_is_the_mean_over_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 2, 3, 4, 5, generator=generator).unbind(0)
    y = torch.randint(3, (2, 4, 5), generator=generator)
    by_pixel = [a.movedim(1, -1).reshape(-1, 3) for a in (z, t)]
    assert torch.allclose(SEGMENTATION.loss(z, y, 0.1), F.cross_entropy(by_pixel[0], y.flatten(), label_smoothing=0.1))
    assert torch.allclose(SEGMENTATION.taught(z, t, 2.0), TASKS["classification"].taught(*by_pixel, 2.0))
    kept = y.clone()
    kept[1] = 255
    assert torch.allclose(SEGMENTATION.loss(z, kept, 0.0), F.cross_entropy(z[:1], y[:1]))
    assert float(SEGMENTATION.loss(z, torch.full_like(y, 255), 0.0)) == 0.0, "nothing to learn is no NaN"
    one = SEGMENTATION.loss(z[:, :1], (y > 0).long(), 0.0)
    assert torch.allclose(one, F.binary_cross_entropy_with_logits(z[:, 0], (y > 0).float()))


# numbers


def test_squares_by_hand_whatever_the_shape() -> None:
    z, y = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 3.5])
    for shape in ((), (1,)):
        for labels in (y, y.unsqueeze(1)):  # (B, 1) beside (B,) would broadcast to (B, B)
            batch = [(z.view(3, 1, 1, 1), labels)]
            answers = z.view(3, *shape)
            assert float(REGRESSION.loss(answers, labels, 0.1)) == pytest.approx(4.25 / 3)
            assert qsnn.accuracy(Answers(), batch) == pytest.approx(4.25 / 3)
    result = qsnn.benchmark(Answers(), batch, reference=Answers())
    assert result.metric == "mean squared error" and result.accuracy == (pytest.approx(4.25 / 3),)
    assert result.agreement == (100.0,) and result.intervals == () and result.confusion is None
    assert "accuracy" not in result.metrics() and result.metrics()["mean_squared_error"] == result.accuracy


@pytest.mark.parametrize("name", TASKS)
def test_a_student_that_answers_like_its_teacher_costs_nothing(name: str) -> None:
    shapes = {"classification": (4, 3), "binary": (4, 1), "segmentation": (4, 3, 2, 2), "regression": (4,)}
    labels = {
        "classification": torch.tensor([0, 2, 1, 1]), "binary": torch.tensor([0, 1, 1, 0]),
        "segmentation": torch.zeros(4, 2, 2, dtype=torch.long), "regression": torch.rand(4),
    }  # fmt: skip
    z = torch.randn(shapes[name], generator=torch.Generator().manual_seed(0)).expand(3, *shapes[name])
    weights = {key: 1.0 for key in ("kd_weight", "answer_weight", "step_weight", "ensemble_weight", "step_ce_weight")}
    terms = distillation_loss(z, [z[0]], labels[name], qsnn.DistillConfig(**weights, ce_weight=1.0), TASKS[name])
    for term in ("kd", "answer", "step", "ensemble"):
        assert float(terms[term]) == pytest.approx(0.0, abs=1e-5)
    assert float(terms["ce"]) == pytest.approx(float(terms["step_ce"])), "every step answers alike"


# what is found, and what is refused

CLASSES, FLOATS = torch.tensor([0, 1, 1, 0]), torch.tensor([0.2, 1.5, -3.0, 0.0])


@pytest.mark.parametrize(
    ("answers", "labels", "name"),
    [
        (torch.zeros(4, 3), CLASSES, "classification"),
        (torch.zeros(4, 1), CLASSES, "binary"),
        (torch.zeros(4), CLASSES, "binary"),
        (torch.zeros(4, 5), torch.ones(4, 5, dtype=torch.long), "binary"),
        (torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.long), "segmentation"),
        (torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2, dtype=torch.long), "segmentation"),
        (torch.zeros(4, 3, 7), torch.full((4, 7), 255), "segmentation"),
        (torch.zeros(4, 1), FLOATS, "regression"),
        (torch.zeros(4), FLOATS.unsqueeze(1), "regression"),
        (torch.zeros(4, 1, 2, 2), torch.full((4, 2, 2), 0.5), "regression"),
    ],
)  # fmt: skip
def test_the_task_follows_from_labels_and_answers(answers: Tensor, labels: Tensor, name: str) -> None:
    assert find_tasks(answers, labels).first.name == name
    pair = find_tasks({"a": answers, "b": [answers]}, {"b": (labels,), "a": labels})
    assert {head: task.name for head, task in pair.by_head.items()} == {"a": name, "b.0": name}


@pytest.mark.parametrize(
    ("answers", "labels", "task", "message"),
    [
        (torch.zeros(4, 1), CLASSES.float(), None, "all 0 or 1, may be numbers or decisions; pass task='regr"),
        (torch.zeros(4, 3), CLASSES + 2, None, r"labels from 0 to 2 \(task='classification'\), got 2 to 3"),
        (torch.zeros(4, 1), CLASSES + 4, None, r"labels from 0 to 1 .* pass task='regression'"),
        (torch.zeros(4, 3), FLOATS, None, r"answers \(B, 3\) and float32 labels \(B,\) belong to no task; .*'regr"),
        (torch.zeros(4, 3), CLASSES, "segmentation", r"expected maps \(B, K, H, W\), integer labels \(B, H, W\) for"),
        (torch.zeros(4, 1), FLOATS, "binary", "labels from 0 to 1"),
        (torch.zeros(4, 3), CLASSES, "classes", "expected task to be one of classification, segmentation, binary, re"),
        ((torch.zeros(4, 1),) * 2, CLASSES, None, r"answers \('0', '1'\), got one tensor; let the data give"),
        ({"a": torch.zeros(4, 1)}, {"b": CLASSES}, None, r"answers \('a'\), got 'b'"),
        ({"a": torch.zeros(4, 1)}, {"a": FLOATS.bool().float()}, None, "answers of head 'a'"),
        ({"a": torch.zeros(4, 1)}, {"a": CLASSES}, {"b": "binary"}, "or one for each head, got"),
    ],
)  # fmt: skip
def test_what_belongs_to_no_task_is_refused_in_one_line(answers: Any, labels: Any, task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        find_tasks(answers, labels, task)
    assert "\n" not in str(error.value)


def test_what_is_said_goes_before_what_is_found() -> None:
    assert find_tasks(torch.zeros(4, 1), CLASSES, "regression").first is REGRESSION
    assert find_tasks(torch.zeros(4, 1), CLASSES.float(), "binary").first is BINARY
    assert find_tasks((torch.zeros(4, 1),) * 2, (CLASSES, FLOATS), (None, "regression")).by_head["0"] is BINARY


def test_batches_take_labels_of_every_shape() -> None:
    images = torch.zeros(4, 1, 2, 2)
    label = {"box": torch.zeros(4, 4, dtype=torch.float64), "class": (torch.ones(4, dtype=torch.bool),)}
    found = heads(next(qsnn.batches([(images, label)]))[1])
    assert {name: leaf.dtype for name, leaf in found.items()} == {"box": torch.float32, "class.0": torch.int64}
    for wrong in (torch.zeros(3), torch.tensor(1), "dog", [1, 2, 3, 4], {"a": torch.zeros(4), "b": torch.zeros(2)}):
        with pytest.raises(ValueError, match=r"expected labels of shape \(4,\) or \(4, ...\), got"):
            next(qsnn.batches([(images, wrong)]))
    with pytest.raises(ValueError, match="expected finite labels"):
        next(qsnn.batches([(images, torch.tensor([0.0, math.nan, 0.0, 0.0]))]))
    with pytest.raises(ValueError, match="moves images, not these maps"):
        maps = TensorDataset(images, torch.zeros(4, 2, 2))  # numbers: nothing says what the border is
        next(qsnn.batches(maps, augment="flip", generator=torch.Generator()))


# from float to an exact spiking network

FLOAT = qsnn.TrainConfig(batch_size=16, optimizer="adamw", lr=0.01)
SHORT = replace(FLOAT, epochs=2)
QAT = qsnn.TrainConfig(epochs=2, batch_size=16, optimizer="adamw", lr=0.003)
STUDENT = qsnn.DistillConfig(epochs=1, batch_size=16, optimizer="adamw", lr=0.003)


def flow(model: nn.Module, data: qsnn.Data, levels: int = 2, epochs: int = 3) -> tuple[nn.Module, qsnn.SNN, qsnn.SNN]:
    """Train, quantize, train with the teacher, convert, certify, distill; what is measured is the folded student."""
    qsnn.fit(model, data, replace(FLOAT, epochs=epochs))
    qann = qsnn.quantize(model, data, qsnn.QuantizeConfig(levels=levels))
    qsnn.fit(qann, data, QAT, teacher=model)
    snn = qsnn.convert(qann)
    certificate = qsnn.certify(snn, qann, data.test)
    assert certificate.verdict.startswith("EXACT"), str(certificate)
    return qann, snn, qsnn.distill(snn, qann, data, STUDENT)


class UNet(nn.Module):
    """One level down, one up, with a skip; 2 classes a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = self._block(1, 6), self._block(6, 10)
        self.three, self.out = self._block(16, 6), nn.Conv2d(6, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        high = self.one(x)
        low = self.two(F.max_pool2d(high, 2))
        return self.out(self.three(torch.cat([F.interpolate(low, scale_factor=2, mode="nearest"), high], 1)))


def test_a_unet_to_an_exact_spiking_segmentation(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(120, 16, 16, dtype=torch.long)
    for mask, (y, x) in zip(masks, torch.randint(1, 8, (120, 2), generator=generator).tolist(), strict=True):
        mask[y : y + 7, x : x + 7] = 1  # a bright square
    noisy = masks + 0.5 * torch.randn(120, 16, 16, generator=generator)
    images = (64 * noisy + 96).clamp(0, 255).to(torch.uint8)
    torch.manual_seed(0)
    data, model = qsnn.from_arrays(images, masks, val_fraction=0.2, test_fraction=0.2), UNet()
    assert data.classes == ("0", "1") and data.train[0][1].shape == (16, 16)
    qann, snn, student = flow(model, data, epochs=6)
    found = [qsnn.accuracy(network, data.test) for network in (model, qann, student)]
    assert min(found) > 80, found
    front_door = qsnn.check(model, data)
    assert front_door.ready and front_door.metric == "mean IoU" and front_door.accuracy == pytest.approx(found[0])
    assert front_door.distill_seconds is not None and "mean IoU" in str(front_door)
    results = [
        qsnn.benchmark(qann, data.test, name="QANN"),
        qsnn.benchmark(snn, data.test, timesteps=2, firing="deferred", reference=qann),
        qsnn.benchmark(student, data.test, timesteps=2, name="student"),
    ]
    assert results[1].agreement[1] == 100.0, "deferred at T = L it is the QANN, pixel by pixel"  # type: ignore[index]
    assert results[1].accuracy[1] == results[0].accuracy[0] == pytest.approx(found[1], abs=1e-3)
    assert results[2].metric == "mean IoU" and results[2].metrics()["mean_IoU"] == results[2].accuracy
    draw_curve(results, tmp_path / "curve.svg", title="squares")
    write_report(
        tmp_path / "r.html", title="squares", results=results, certificate=None, config={}, environment={},
        command="", notes=[], stages=None,
    )  # fmt: skip
    page = (tmp_path / "r.html").read_text()
    assert f"Student: mean IoU {results[2].accuracy[1]:.2f}" in page and "Wilson" not in page and "accuracy" not in page
    assert table(results).title == "mean IoU"
    with pytest.raises(ValueError, match="early exit needs one class an image"):
        qsnn.benchmark(student, data.test, timesteps=2, exit_margin=0.5)


def test_a_regression_to_a_student_that_keeps_its_values(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator).numpy()
    y = x[:, :4].sum(1) - abs(x[:, 4:]).sum(1) * 0.5
    torch.manual_seed(0)
    data, model = qsnn.from_arrays(x, y), nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
    qann, snn, student = flow(model, data, levels=4)
    guess = float(y.var())  # of always answering the mean
    for network in (model, qann, student):
        assert qsnn.accuracy(network, data.test) < 0.5 * guess
    result = qsnn.benchmark(snn, data.test, timesteps=4, firing="deferred", reference=qann)
    assert result.accuracy[-1] == pytest.approx(qsnn.accuracy(qann, data.test), rel=1e-4)
    with pytest.raises(ValueError, match="which is for logits, not for numbers"):
        qsnn.distill(snn, qann, data, qsnn.DistillConfig(epochs=1, regulariser_weight=0.1))
    config, state = replace(SHORT, epochs=1), tmp_path / "state"
    history = qsnn.fit(copy.deepcopy(model), data, config, resume=state)
    assert qsnn.fit(model, data, config, resume=state) == history, "read back from the file"
    assert history[0].metric == "mean squared error" and told(history[0].metric, 0.5) == "mean squared error 0.5"


class TwoHeads(nn.Module):
    """A yes or no, and a number, from one stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.sign, self.size = nn.Linear(8, 48), nn.Linear(48, 1), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(x.flatten(1)))
        return {"sign": self.sign(x), "size": self.size(x)}


class Pairs(torch.utils.data.Dataset[Any]):
    """Labels in the structure of the answers."""

    def __init__(self, x: Tensor, at: slice) -> None:
        self.x = x[at]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        total = float(self.x[i].sum())
        return self.x[i], {"sign": int(total > 0), "size": abs(total)}


def test_two_heads_with_a_task_each() -> None:
    x = torch.randn(500, 1, 8, generator=torch.Generator().manual_seed(0))
    parts = [Pairs(x, at) for at in (slice(400), slice(400, 450), slice(450, 500))]
    data = qsnn.Data(name="two", train=parts[0], val=parts[1], test=parts[2], mean=(0.0,), std=(1.0,), classes=())
    torch.manual_seed(0)
    model = TwoHeads()
    _, snn, student = flow(model, data)
    found = qsnn.accuracy(student, data.test)
    assert [*found] == ["sign", "size"] and found["sign"] > 75
    result = qsnn.benchmark(student, data.test, timesteps=2)
    assert [*result.heads] == ["sign, accuracy", "size, mean squared error"]
    assert result.metric == "accuracy" and result.accuracy == result.heads["sign, accuracy"]
    assert result.accuracy[1] == pytest.approx(found["sign"]), "the first head is what is reported"
    with pytest.raises(ValueError, match=r"expected a teacher that answers .* in head 'sign'"):
        qsnn.distill(snn, nn.Sequential(nn.Flatten(), nn.Linear(8, 1)), data, STUDENT)


def test_one_logit_from_float_to_student(digits: qsnn.Data) -> None:
    x = torch.stack([digits.test[i][0] for i in range(300)])
    y = torch.tensor([digits.test[i][1] % 2 for i in range(300)])  # odd digits
    torch.manual_seed(0)
    data, model = set_of(x, y), nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 1))
    _, _, student = flow(model, data)
    assert qsnn.accuracy(student, data.test) > 80
    result = qsnn.benchmark(student, data.test, timesteps=4, exit_margin=0.0)
    assert result.accuracy[1] == qsnn.accuracy(student, data.test) and result.exits[0].timesteps == 1.0
    assert result.exits[0].accuracy == result.accuracy[0], "who leaves at once answers after one step"


def test_a_loss_of_ones_own_goes_with_labels_of_no_task(tmp_path: Any) -> None:
    x = torch.rand(80, 1, 4, 4)
    data, model = set_of(x, torch.zeros(80, 7, 3), 8), nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    state, untrained = tmp_path / "state", copy.deepcopy(model)

    def loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return net(images).square().mean()

    history = qsnn.fit(model, data, SHORT, loss=loss, resume=state)
    assert history[-1].metric == "" and history[-1].val_accuracy is None and history[-1].loss < history[0].loss
    assert qsnn.fit(untrained, data, SHORT, loss=loss, resume=state) == history, "read back from the file"
    with pytest.raises(ValueError, match="belong to no task"):
        qsnn.fit(model, data, SHORT)


def test_one_hot_labels_are_no_decisions() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    images, classes = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match=r"look like one class an image, as one-hot; pass labels.argmax\(1\)"):
        qsnn.accuracy(net, [(images, torch.nn.functional.one_hot(classes, 3))])
    assert 0 <= qsnn.accuracy(net, [(images, torch.nn.functional.one_hot(classes, 3))], task="binary") <= 100
