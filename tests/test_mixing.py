"""mixup and cutout: what images and labels become, and that students and teachers see the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsnn
from qsnn.data.batches import batches
from qsnn.data.images import ImageSet
from qsnn.data.mixing import Mixed, mixed, over_both


def test_every_image_is_a_part_of_two() -> None:
    torch.manual_seed(0)
    x, labels = torch.rand(8, 3, 4, 4), {"class": torch.arange(8), "box": torch.rand(8, 2)}
    images, both = mixed(x, labels, 0.4)
    order = both.other["class"]
    assert sorted(order.tolist()) == list(range(8)) and torch.equal(both.one["class"], torch.arange(8))
    assert torch.equal(both.other["box"], labels["box"][order])
    assert 0 < both.share < 1 and torch.allclose(images, both.share * x + (1 - both.share) * x[order], atol=1e-6)


def test_a_loss_is_asked_for_both() -> None:
    z, labels = torch.randn(6, 5), Mixed(torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 1, 0, 2, 3, 4]), 0.3)
    found = over_both(lambda y: {"ce": nn.functional.cross_entropy(z, y)}, labels)["ce"]
    target = 0.3 * nn.functional.one_hot(labels.one, 5) + 0.7 * nn.functional.one_hot(labels.other, 5)
    assert torch.allclose(found, nn.functional.cross_entropy(z, target.float()))
    assert over_both(lambda y: y + 1, 2) == 3


@pytest.mark.parametrize("side", [8, 28, 32])
def test_cutout_turns_half_a_side_black(side: int) -> None:
    images = torch.full((400, 3, side, side), 200, dtype=torch.uint8)
    data = ImageSet(images, torch.arange(400), (0.5,) * 3, (0.25,) * 3)
    draw = torch.Generator().manual_seed(0)
    found = torch.cat([x for x, _ in batches(data, 100, generator=draw, augment="cutout")])
    black, white = (data.normalise(torch.full((1, 3, 1, 1), value, dtype=torch.uint8)) for value in (0, 200))
    cut = (found == black).all(1)
    assert bool((cut | (found == white).all(1)).all())
    counts = cut.flatten(1).sum(1)
    assert int(counts.max()) == (side // 2) ** 2 and int(counts.min()) >= (side // 4) ** 2
    assert len(set(cut.flatten(1).float().argmax(1).tolist())) > 5, "anywhere"


@pytest.mark.parametrize(
    "options", [{"mixup": 0.3}, {"augment": "shift+cutout"}, {"mixup": 1.0, "label_smoothing": 0.1}]
)
def test_training_takes_both_and_goes_on_where_it_was_stopped(
    options: dict[str, Any], digits: qsnn.Data, tmp_path: Any
) -> None:
    config = qsnn.TrainConfig(epochs=2, train_images=256, lr=0.05, **options)
    nets = [qsnn.create_model("mlp", digits) for _ in range(3)]
    whole = qsnn.fit(nets[0], digits, config)
    assert qsnn.fit(nets[1], digits, config)[-1].loss == whole[-1].loss

    class Stop(Exception):
        pass

    def stop(step: int, steps: int) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        qsnn.fit(nets[2], digits, config, resume=tmp_path / "a.resume", after_step=stop)
    again = qsnn.create_model("mlp", digits)
    assert qsnn.fit(again, digits, config, resume=tmp_path / "a.resume")[-1].loss == whole[-1].loss
    plain = qsnn.create_model("mlp", digits)
    assert qsnn.fit(plain, digits, qsnn.TrainConfig(epochs=2, train_images=256, lr=0.05))[-1].loss != whole[-1].loss


class Watched(nn.Module):
    """A network that keeps what it sees."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.net(x)


def test_a_teacher_sees_the_students_images(qann: nn.Module, digits: qsnn.Data) -> None:
    teacher, student = Watched(qann), list[Tensor]()
    snn = qsnn.convert(qann)
    terms = {"kd_weight": 0.5, "ce_weight": 0.5, "step_ce_weight": 0.2, "correct_weight": 0.1, "rate_weight": 0.0}
    config = qsnn.DistillConfig(
        epochs=1, train_images=96, batch_size=32, mixup=0.4, augment="shift+cutout", **terms
    )  # fmt: skip

    def watch(model: nn.Module, images: Any) -> None:
        if model.training:
            student.append(images[0].detach().clone())

    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: watch(module, args) if isinstance(module, torch.fx.GraphModule) else None
    )
    try:
        made = qsnn.distill(snn, teacher, digits, config)
    finally:
        handle.remove()
    assert len(student) == 3 and all(torch.equal(a, b) for a, b in zip(student, teacher.seen, strict=False))
    assert made.qsnn_recipe["distill"]["mixup"] == 0.4


def test_a_loss_of_ones_own_is_not_given_two_labels(digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match="mix in your own loss"):
        config = qsnn.TrainConfig(epochs=1, mixup=0.2)
        qsnn.fit(qsnn.create_model("mlp", digits), digits, config, loss=lambda m, x, y: m(x).mean())
    with pytest.raises(ValueError, match="mixup"):
        qsnn.TrainConfig(mixup=-1.0)
    with pytest.raises(ValueError, match=r"augment must be one of 'none', 'flip', 'flip\+cutout', .*got 'cut'"):
        qsnn.TrainConfig(augment="cut")
