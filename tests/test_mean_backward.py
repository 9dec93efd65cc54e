"""One backward for all steps: the loop's answers and statistics, the loop's gradient, and what goes the usual way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsnn
from qsnn.graph.hooks import recorded
from qsnn.models.create import build_model
from qsnn.snn.mean_backward import unsupported
from qsnn.snn.network import SNN, train_neurons_


class Mixed(nn.Module):
    """What stands between neurons: groups, a shortcut from the input, padding, a slice, a concatenation, both pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shortcut = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 8, 1)
        self.norm, self.deep = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.head = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Linear(12, 10)
        self.pool, self.last = nn.MaxPool2d(2), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        y = F.relu(self.deep(y) + self.shortcut(x))
        y = self.up(F.avg_pool2d(self.pool(y), 2))
        y = torch.cat([F.relu(y), F.pad(F.relu(y[:, :2]), (0, 0, 0, 0, 0, 2))], 1).mean((2, 3))
        return self.last(F.relu(self.head(y)))


def spiking(name: str) -> tuple[SNN, Tensor, Tensor]:
    shape = (3, 32, 32) if name == "resnet20" else (1, 16, 16)
    torch.manual_seed(0)
    images, labels = torch.rand(16, *shape), torch.randint(0, 10, (16,))
    options: dict[str, Any] = {"pooling": "max"} if name == "max" else {}
    network = Mixed() if name == "mixed" else build_model("study" if name == "max" else name, shape, 10, **options)
    qann = qsnn.quantize(network, [(images, labels)])
    snn: SNN = qsnn.convert(qann)
    train_neurons_(snn, "channel", "channel", "")
    for _, node in snn.neurons():
        node.surrogate = "rate"
    return snn, images, labels


def trained_step(
    snn: SNN, images: Tensor, labels: Tensor, timesteps: int, frozen: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits, gradients and buffers after one step; ``frozen``: batch norms in eval mode."""
    snn = copy.deepcopy(snn).train()
    for module in snn.modules():
        if isinstance(module, nn.BatchNorm2d) and frozen:
            module.eval()
    z = snn.step_logits(images, timesteps=timesteps)
    (F.cross_entropy(z.mean(0), labels) + F.cross_entropy(z[0], labels)).backward()
    return z.detach(), {n: p.grad for n, p in snn.named_parameters() if p.grad is not None}, dict(snn.named_buffers())


@pytest.mark.parametrize("timesteps", [1, 2, 3])
@pytest.mark.parametrize("name", ["study", "max", "mixed"])
def test_it_is_the_loop(name: str, timesteps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    snn, images, labels = spiking(name)
    assert unsupported(snn.network) is None
    through_means = (
        trained_step(snn, images, labels, timesteps, frozen=True),
        trained_step(snn, images, labels, timesteps, frozen=False),
    )
    monkeypatch.setattr(SNN, "_goes_through_means", lambda *args: False)
    looped = (
        trained_step(snn, images, labels, timesteps, frozen=True),
        trained_step(snn, images, labels, timesteps, frozen=False),
    )
    for (z, grads, buffers), (wanted, wanted_grads, wanted_buffers) in zip(through_means, looped, strict=True):
        assert torch.equal(z, wanted)
        assert grads.keys() == wanted_grads.keys()
        for buffer, value in wanted_buffers.items():
            assert torch.equal(buffers[buffer], value), buffer
    if timesteps == 1 or name == "study":  # a maximum of means is not the mean of maxima
        assert len(through_means[0][1]) > 10
        for parameter, grad in looped[0][1].items():
            error = (through_means[0][1][parameter] - grad).norm() / (grad.norm() + 1e-6)
            assert error < 2e-3, (parameter, float(error))


def test_a_norm_in_training_costs_little_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    snn, images, labels = spiking("resnet20")
    grads = trained_step(snn, images, labels, 2, frozen=False)[1]
    monkeypatch.setattr(SNN, "_goes_through_means", lambda *args: False)
    wanted = trained_step(snn, images, labels, 2, frozen=False)[1]
    for name in (name for name, grad in wanted.items() if grad.dim() == 4):
        assert F.cosine_similarity(grads[name].flatten(), wanted[name].flatten(), 0) > 0.99, name


def test_what_it_cannot_do_goes_the_usual_way() -> None:
    snn, images, labels = spiking("study")
    name, node = next(iter(snn.neurons()))
    snn.train()
    with recorded({name: node}) as seen:  # who watches a layer sees all steps of it
        snn.step_logits(images)
    assert len(seen[name]) == 2 * len(images)
    node.surrogate = "box"
    assert "another surrogate" in str(unsupported(snn.network))
    gated = qsnn.convert(qsnn.quantize(build_model("qkformer", (1, 16, 16), 10), [(images, labels)]))
    for _, node in gated.neurons():
        node.surrogate = "rate"
    assert "no backward" in str(unsupported(gated.network))
    gated.train().step_logits(images).sum().backward()
    assert all(p.grad is not None for p in gated.parameters() if p.requires_grad and p.dim() > 1)
