"""The C file: every spike of every layer and every answer are fold's; what computes in floats is refused by name."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import scramble
from test_fold import NETS, plain_net
from test_kinds import DATA, FORMS, Net
from torch import Tensor, nn

import qsnn
from qsnn.data.images import normalise
from qsnn.export.c import Sizes, write
from qsnn.export.gains import limits_of, scores_of
from qsnn.folded.layers import IntegerLayer
from qsnn.folded.neurons import CurrentIF
from qsnn.graph.call import Call, calling
from qsnn.graph.hooks import recorded
from qsnn.graph.recipe import recipe_of, set_recipe

CC = shutil.which("cc")
HARNESS = """
#include <stdio.h>
#include "net.c"
void qsnn_trace(int layer, const int8_t *spikes, int steps, int size)
{
    (void)layer;
    fwrite(spikes, 1, (size_t)steps * (size_t)size, stdout);
}
int main(void)
{
    static uint8_t pixels[SIZE];
    while (fread(pixels, 1, SIZE, stdin) == SIZE)
        putchar(qsnn_predict(pixels));
    return 0;
}
"""


def compiled(folder: Path, size: int, alone: bool = False) -> Path:
    (folder / "main.c").write_text(HARNESS)
    strict = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-Wpedantic"]
    more = ["net.c", "-c", "-o", "net.o"] if alone else ["main.c", f"-DSIZE={size}", "-DQSNN_TRACE", "-o", "net"]
    done = subprocess.run([CC, *strict, *more], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "net"


def in_c(folder: Path, images: Tensor, sizes: list[int]) -> tuple[list[Tensor], Tensor]:
    """Spikes of every layer, (B, bytes), and the answers (B,), of the compiled file."""
    program = compiled(folder, images[0].numel())
    done = subprocess.run([program], input=images.numpy().tobytes(), capture_output=True, check=True)
    rows = torch.from_numpy(np.frombuffer(done.stdout, np.int8).copy()).view(len(images), -1)
    assert rows.shape[1] == sum(sizes) + 1
    *spikes, answers = rows.split([*sizes, 1], 1)
    return spikes, answers[:, 0]


def assert_is_fold(folded: qsnn.SNN, images: Tensor, real: Tensor, folder: Path, **options: object) -> Sizes:
    """All spikes (deferred: counts) and answers of the compiled file against the folded network's."""
    found = write(folded, folder / "net.c", **options)
    if CC is None:
        pytest.skip("no C compiler (cc) here")
    firing, steps = options.get("firing", folded.firing), options.get("timesteps", folded.timesteps)
    with recorded(dict(folded.neurons())) as spikes, torch.no_grad():
        z = folded.step_logits(real, timesteps=steps, firing=firing)
    assert list(spikes) == list(found.layers)
    expected = []
    for name in found.layers:
        train = spikes[name].unflatten(0, (steps, -1)).to(torch.int8)
        train = train.sum(0, keepdim=True) if firing == "deferred" else train
        expected.append(train.transpose(0, 1).flatten(1))  # (B, T·C·H·W)
    ours, answers = in_c(folder, images, [e.shape[1] for e in expected])
    for name, mine, theirs in zip(found.layers, ours, expected, strict=True):
        assert torch.equal(mine, theirs.to(torch.int8)), f"{name}: {int((mine != theirs).sum())} differ"
    assert sum(int(e.sum()) for e in expected) > 0
    logits = z.mean(0)
    best = logits.gather(1, answers.long()[:, None])[:, 0]
    # where two logits are equal but for float64's rounding, the file takes the first one
    assert float((logits.max(1).values - best).max()) <= 1e-12 * float(logits.abs().max())
    assert int((answers != logits.argmax(1)).sum()) <= 0.01 * len(answers)
    return found


@pytest.fixture(scope="module")
def bytes_(digits: qsnn.Data) -> tuple[Tensor, Tensor]:
    part = digits.test.head(200)
    return part.images, part.normalise(part.images)


def made(model: nn.Module, digits: qsnn.Data, bits: int = 4, levels: int = 2, **more: object) -> qsnn.SNN:
    config = qsnn.QuantizeConfig(weight_bits=bits, levels=levels, **more)
    return qsnn.fold(qsnn.convert(qsnn.quantize(scramble(model), digits, config).eval()))


class Moved(nn.Module):
    """Concatenation, channel shuffle, a slice of channels, ±γ, grouped and strided convolutions, a sum with a layer."""

    def __init__(self, views: bool = True) -> None:
        super().__init__()
        self.views = views
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU())
        self.main = nn.Sequential(nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2), nn.BatchNorm2d(6))
        self.short = nn.Sequential(nn.Conv2d(8, 6, 1, stride=2), nn.BatchNorm2d(6))
        self.join = nn.ReLU()
        self.head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, self.left(b)], 1)
        if self.views:
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        else:
            x = F.channel_shuffle(x, 2)
        return self.head(self.join(self.main(x) + self.short(x)))


MODELS = {**{name: make for name, make in NETS.items() if name != "mixed"}, "moved": lambda data: Moved()}


@pytest.fixture(scope="module")
def nets(digits: qsnn.Data) -> Callable[[str], qsnn.SNN]:
    @functools.cache
    def net(name: str) -> qsnn.SNN:
        torch.manual_seed(1)
        return made(MODELS[name](digits), digits)

    return net


CASES = [
    ("average pooling", "online", 2, 200), ("residual", "online", 2, 200), ("max pooling", "online", 2, 40),
    ("moved", "online", 2, 200), ("max pooling", "deferred", 2, 60), ("residual", "deferred", 2, 60),
    ("residual", "online", 5, 30), ("moved", "deferred", 5, 30),
]  # fmt: skip


@pytest.mark.parametrize(("name", "firing", "timesteps", "images"), CASES)
def test_every_spike_and_answer_is_folds(name, firing, timesteps, images, nets, bytes_, tmp_path):
    folded = nets(name)
    some = (part[:images] for part in bytes_)
    found = assert_is_fold(folded, *some, tmp_path, firing=firing, timesteps=timesteps)
    packed = sum(m.weight.numel() * m.weight_bits / 8 for m in folded.modules() if isinstance(m, IntegerLayer))
    assert packed - 8 <= found.weights <= packed + 8
    if timesteps == 2:
        assert found.flash < 1.1 * packed + 2560, "weights, thresholds and a table for the input"


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_every_packing_is_folds(bits, teacher, digits, bytes_, tmp_path):
    found = assert_is_fold(made(teacher, digits, bits, 3), *(part[:40] for part in bytes_), tmp_path, timesteps=3)
    first, *middle, last = (m.weight.numel() for m in teacher.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert found.weights == first + last + sum(middle) * bits // 8


@pytest.mark.parametrize("form", ["avg_pool2d, padded", "pixel shuffle", "transposed convolution", "Linear on tokens",
                                  "a position map", "alpha"])  # fmt: skip
def test_what_moves_and_meets_is_folds(form, tmp_path):
    qann = qsnn.quantize(Net(FORMS[form]), DATA, qsnn.QuantizeConfig(weight_bits=4, levels=2)).eval()
    raw = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    mean, std = (0.5,) * 3, (0.25,) * 3
    assert_is_fold(qsnn.fold(qsnn.convert(qann)), raw, normalise(raw, mean, std), tmp_path, mean=mean, std=std)


@pytest.mark.parametrize(("name", "timesteps"), [("average pooling", 2), ("residual", 2), ("residual", 5)])
def test_signed_spikes_are_folds(name, timesteps, digits, bytes_, tmp_path):
    images, real = bytes_
    qann = qsnn.quantize(scramble(NETS[name](digits)), digits, qsnn.QuantizeConfig(weight_bits=4, levels=2)).eval()
    folded = qsnn.fold(qsnn.convert(qann, qsnn.ConvertConfig(timesteps=timesteps, signed=True)))
    with torch.no_grad(), recorded(dict(folded.neurons())) as spikes:
        folded(real[:50])
    assert any(bool((train < 0).any()) for train in spikes.values())
    assert_is_fold(folded, images[:100], real[:100], tmp_path, firing="online")


def test_plus_minus_one(digits, bytes_, tmp_path):
    model = qsnn.create_model("vgg-small", digits, pooling="max")
    qann = qsnn.quantize(scramble(model), digits, qsnn.QuantizeConfig(weight_bits=1, act_form="sign")).eval()
    folded = qsnn.fold(qsnn.convert(qann, qsnn.ConvertConfig(timesteps=1)))
    assert_is_fold(folded, *(part[:60] for part in bytes_), tmp_path)


def test_ties_are_decided_as_fold_does(digits, bytes_, tmp_path):
    assert_is_fold(qsnn.fold(qsnn.convert(plain_net(digits))), *bytes_, tmp_path, timesteps=4)


def test_the_compiled_size_is_the_reported_one(snn, digits, tmp_path):
    found = write(qsnn.fold(snn), tmp_path / "net.c")
    if CC is None or shutil.which("size") is None:
        pytest.skip("no C compiler (cc) or no binutils (size) here")
    compiled(tmp_path, 64, alone=True)
    table = subprocess.check_output(["size", tmp_path / "net.o"], text=True)
    text, data, bss = map(int, table.split("\n")[1].split()[:3])
    assert 0 <= bss - found.ram <= 64
    assert 0 <= text + data - found.flash <= 8192, "tables and a few kB of code"
    assert str(found).startswith(f"flash {found.flash:,} bytes (weights ")
    assert "float" not in (tmp_path / "net.c").read_text().replace("no floating point", "")


def neuron(gains: list[float], theta: float, bias: float) -> CurrentIF:
    factors = [torch.tensor([[g]], dtype=torch.float64) for g in gains]
    shapes: list[tuple[int, ...]] = [()] * (len(gains) + 1)
    given = factors, [1] * len(gains), torch.tensor([bias]).double(), shapes
    return CurrentIF(*given, threshold=torch.tensor(theta), initial=0.5)


@pytest.mark.parametrize("firing", ["online", "deferred"])
@pytest.mark.parametrize("gains", [[0.1, -0.037], [0.3, 0.1], [0.25, 0.5], [-0.7, 0.0123], [0.0, 0.2]])
def test_integer_gains_decide_as_float64_does_for_every_input(gains, firing):
    node = neuron(gains, 0.9, -0.013)
    low, high = (np.array([-9]), np.array([-2])), (np.array([9]), np.array([4]))
    steps = 1 if firing == "online" else 2
    ranges = [(steps * low[j], steps * high[j]) for j in range(2)]
    found = limits_of(node, ranges, 2, firing, (1,))
    first = torch.cartesian_prod(torch.arange(-9, 10), torch.arange(-2, 5)).double()
    for second in first[::7]:
        a, b = first, second.expand_as(first)
        x = torch.stack([a, b], 0)  # (2, B, 2)
        with calling(Call(2, firing)):
            spikes = node(*(x[..., j : j + 1].flatten(0, 1) for j in range(2))).view(2, -1)
        g, limits = torch.from_numpy(found.gains[:, 0]).double(), found.limits[:, 0]
        if firing == "deferred":
            total = (a + b) @ g
            assert torch.equal(spikes.sum(0), sum((total >= m).float() for m in limits))
        else:
            one = (a @ g >= limits[0]).float()
            two = torch.where(one == 1, (a + b) @ g >= limits[2], (a + b) @ g >= limits[1]).float()
            assert torch.equal(spikes, torch.stack([one, two]))


def test_golden_gains():
    ranges = [(np.array([-3]), np.array([3])), (np.array([0]), np.array([1]))]
    found = limits_of(neuron([0.5, 0.75], 1.0, 0.0), ranges, 1, "online", (1,))
    assert found.gains[:, 0].tolist() == [4, 6], "3 bits suffice: both times 8"
    fires = {(a, b) for a in range(-3, 4) for b in (0, 1) if found.gains[:, 0] @ np.array([a, b]) >= found.limits[0, 0]}
    assert fires == {(a, b) for a in range(-3, 4) for b in (0, 1) if 0.5 * a + 0.75 * b >= 0.5}


def test_the_logits_are_the_exact_ones():
    from qsnn.folded.neurons import Current

    gains, bias = torch.tensor([[0.1, 1e-3, 0.7]], dtype=torch.float64), torch.tensor([0.2, -3.0, 1e-5]).double()
    found = scores_of(Current([gains], [3], bias, [(3,), (3,)]), [(np.array([-50]), np.array([50]))], 2, "online", 3)
    assert found.exact
    scale = None
    for k in range(3):
        exact = Fraction(float(gains[0, k] / 3)) * 17 + 2 * Fraction(float(bias[k]))
        ratio = (found.gains[0][k] * 17 + found.bias[k]) / exact
        scale = ratio if scale is None else scale
        assert ratio == scale


def test_refusals_name_every_part(snn, digits, tmp_path):
    with pytest.raises(ValueError, match=r"not folded; call qsnn.fold"):
        write(snn, tmp_path / "net.c")
    with pytest.raises(TypeError, match="expected a folded SNN"):
        write(nn.Linear(1, 1), tmp_path / "net.c")
    torch.manual_seed(1)
    mixed = made(NETS["mixed"](digits), digits)
    with pytest.raises(ValueError, match=r"cannot be written in integers: squeeze_input|expand") as error:
        write(mixed, tmp_path / "net.c")
    assert "linear bottleneck" in str(error.value)
    small = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10)
    )
    half = made(small, digits, bits=16)
    with pytest.raises(ValueError, match="weights of 16 bit; at most 8 are packed") as error:
        write(half, tmp_path / "net.c")
    assert str(error.value).count("16 bit") >= 3
    open_input = made(small, digits, input_bits=None)
    with pytest.raises(ValueError, match="an input without quantizer"):
        write(open_input, tmp_path / "net.c")
    assert not (tmp_path / "net.c").exists()


@pytest.mark.parametrize("firing", ["online", "deferred"])
def test_frames_of_a_recording(firing, nets, digits, bytes_, tmp_path):
    folded = copy.deepcopy(nets("max pooling"))
    recipe = recipe_of(folded)
    set_recipe(folded, {**recipe, "data": {**recipe["data"], "mean": [0.0], "std": [90.0], "frames": 2}})
    raw = torch.stack([bytes_[0][:20], bytes_[0][20:40]], 1)  # (B, T, C, H, W)
    assert_is_fold(folded, raw, raw.float() * (2 / 90.0), tmp_path, firing=firing)
