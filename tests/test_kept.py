"""A training step keeps spikes as bytes: the same gradients to the last bit, in less memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qsnn
from qsnn.data.memory import LiveMemory
from qsnn.snn import network
from qsnn.snn.kept import known_spikes, spikes_as_bytes


class Net(nn.Module):
    """Two consumers of one value, a sum in place, slices over channels and a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        g = self.norm(self.second(h))
        g += h
        left, right = torch.relu(g).chunk(2, 1)
        return self.head(torch.cat([torch.relu(self.narrow(left)), torch.relu(self.narrow(right))], 1).mean((2, 3)))


@pytest.fixture(scope="module")
def qann(digits: qsnn.Data) -> nn.Module:
    torch.manual_seed(0)
    return qsnn.quantize(Net(), digits)


def student(qann: nn.Module, train: str = "layer", signed: bool = False) -> qsnn.SNN:
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=3, signed=signed))
    network.train_neurons_(snn, train, train, "")
    return snn.train()


def floats_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "spikes_as_bytes", nullcontext)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("train", ["layer", "channel"])
@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_bit_equal(
    signed: bool, train: str, precision: str, qann: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for _ in range(2):
        snn = student(qann, train, signed)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(snn.step_logits(images).flatten(0, 1), torch.arange(3 * len(images)) % 10)
        loss.backward()
        found.append({name: p.grad for name, p in snn.named_parameters() if p.requires_grad})
        floats_kept(monkeypatch)
    ours, plain = found
    assert len(ours) > 12 and all(torch.equal(gradient, plain[name]) for name, gradient in ours.items())


def test_a_step_keeps_less(qann: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    held, peaks = [], []
    for _ in range(2):
        with LiveMemory() as memory:
            z = student(qann).step_logits(images)
            held.append(memory.now)
            z.square().mean().backward()
        peaks.append(memory.peak)
        floats_kept(monkeypatch)
    assert held[0] < 0.75 * held[1] and peaks[0] < 0.9 * peaks[1]


def test_a_checkpoint_around_the_network_keeps_what_it_would(qann: nn.Module, images: Tensor) -> None:
    found = []
    for run in (
        lambda snn: snn.step_logits(images),
        lambda snn: checkpoint(snn.step_logits, images, use_reentrant=False),
    ):
        snn = student(qann)
        with LiveMemory() as memory:
            z = run(snn)
            held = memory.now
            z.square().mean().backward()
        found.append((held, [p.grad for p in snn.parameters() if p.requires_grad]))
    (held, gradients), (less, again) = found
    assert less < 0.3 * held and all(torch.equal(*pair) for pair in zip(gradients, again, strict=True))


def spikes(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """θ·s, its bytes and θ."""
    codes = torch.randint(0, 2, (2, 3, 4), generator=generator).to(torch.int8)
    theta = torch.tensor(0.7, dtype=torch.float64)
    return codes * theta.float(), codes, theta


def test_what_was_changed_in_place_is_no_spike() -> None:
    amplified, codes, theta = spikes(torch.Generator().manual_seed(0))
    weight = torch.ones(4, requires_grad=True)
    with spikes_as_bytes():
        known_spikes(amplified, codes, theta)
        before = (amplified * weight).sum()
        amplified += 1
        after = (amplified * weight).sum()
    (gradient,) = torch.autograd.grad(after, weight)
    assert torch.equal(gradient, amplified.sum((0, 1)))
    (gradient,) = torch.autograd.grad(before, weight)
    assert torch.allclose(gradient, (codes * 0.7).sum((0, 1)))


def test_the_address_of_spikes_that_are_gone_is_nobody_elses() -> None:
    weight = torch.ones(4, requires_grad=True)
    with spikes_as_bytes():
        for seed in range(50):
            amplified, codes, theta = spikes(torch.Generator().manual_seed(seed))
            known_spikes(amplified, codes, theta)
            del amplified
            other = torch.full((2, 3, 4), float(seed))  # where the allocator has just had room
            (gradient,) = torch.autograd.grad((other * weight).sum(), weight)
            assert torch.equal(gradient, torch.full((4,), 6.0 * seed))


def test_a_tensor_that_the_backward_needs_may_not_change() -> None:
    value, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    with spikes_as_bytes():
        loss = (value * weight).sum()
    value += 1
    with pytest.raises(RuntimeError, match=r"shape \(3,\).*changed in place"):
        loss.backward()
