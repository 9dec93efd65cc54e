"""What becomes of 40 networks that people bring: ``python benchmarks/zoo.py [NAME ...]``.

Each network is built with random weights, its batch norms scrambled and set to what arrives; then it is quantized,
converted, folded and certified, and its float form is converted for T = 16. A row says EXACT or gives the refusal in
its own words. Every network has a process and a time limit of its own. A row that has a record of the same code (a
digest of qsnn's files) is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsnn
from qsnn.cli.one_line import GOES_ON, one_line
from qsnn.report.records import Record, append, environment, now

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from lookup import key, plain, stored

HERE = Path(__file__).resolve().parent
PACKAGE = Path(qsnn.__file__).resolve().parent
IMAGES = 4
"""Images that calibrate, certify and measure the float error."""
CLASSES = 10
QUANTIZE = qsnn.QuantizeConfig(weight_bits=4, levels=2, calibration_images=IMAGES)
# least squares of the weights, the default, would fit so few images whatever the thresholds are, and takes minutes
FLOAT = qsnn.ConvertConfig(timesteps=16, correction="bias", calibration_images=IMAGES)
STAGES = ("quantize", "convert", "fold", "certify", "float error")
DONE = "ok"

Shape = tuple[int, ...]
COLOUR: Shape = (3, 64, 64)

# --- networks of our own ----------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, dims: int = 2, **options: Any) -> nn.Sequential:
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dims - 1]
    options = {"kernel_size": 3, "padding": 1, "bias": False, **options}
    return nn.Sequential(conv(inputs, outputs, **options), norm(outputs), nn.ReLU())


class LeNet(nn.Module):
    """PyTorch's own MNIST example in form: functions, no batch norm, log_softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.drop, self.fc1, self.fc2 = nn.Dropout(0.25), nn.Linear(16 * 12 * 12, 32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(torch.flatten(self.drop(x), 1)))), dim=1)


class PadBlock(nn.Module):
    """A residual block whose shortcut takes every other pixel and pads channels (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, dims: int = 2) -> None:
        super().__init__()
        self.one, self.two = _conv(inputs, outputs, dims, stride=stride), _conv(outputs, outputs, dims)[:2]
        self.stride, self.more, self.dims = stride, outputs - inputs, dims

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride] if self.dims == 2 else x[:, :, :: self.stride]
        if self.more:
            x = F.pad(x, (0, 0) * self.dims + (self.more // 2, self.more - self.more // 2))
        return F.relu(y + x)


def resnet20(dims: int = 2) -> nn.Module:
    """CIFAR's ResNet-20 of 16, 32, 64 channels; with ``dims=1`` the same of signals, a block a stage."""
    blocks: list[nn.Module] = [_conv(3, 16, dims)]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        blocks.append(PadBlock(inputs, outputs, stride, dims))
        blocks += [PadBlock(outputs, outputs, 1, dims) for _ in range(2 if dims == 2 else 0)]
    pool = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.AdaptiveAvgPool1d(1)
    return nn.Sequential(*blocks, pool, nn.Flatten(), nn.Linear(64, CLASSES))


class UNet(nn.Module):
    """Two levels down by max pooling, up by transposed convolution, skips by concatenation; a label a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = _conv(3, 8), _conv(8, 16), _conv(16, 32)
        self.up1, self.up2 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.d, self.e, self.head = _conv(32, 16), _conv(16, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        d = self.d(torch.cat([self.up1(c), b], 1))
        return self.head(self.e(torch.cat([self.up2(d), a], 1)))


class FCN(nn.Module):
    """Scores of three depths, upsampled to the nearest pixel and added (Long et al. 2015); a label a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([_conv(3, 8, stride=2), _conv(8, 16, stride=2), _conv(16, 32, stride=2)])
        self.scores = nn.ModuleList([nn.Conv2d(width, 3, 1) for width in (8, 16, 32)])

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for stage, score in zip(self.stages, self.scores, strict=True):
            x = stage(x)
            found.append(score(x))
        y = F.interpolate(found[2], scale_factor=2, mode="nearest") + found[1]
        return F.interpolate(y, scale_factor=2, mode="nearest") + found[0]


class Mixer(nn.Module):
    """A mixer of patches with ReLU and batch norm: Linear over tokens, then over channels."""

    def __init__(self, width: int = 32, tokens: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.norm1, self.norm2 = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.token = nn.Sequential(nn.Linear(tokens, 32), nn.ReLU(), nn.Linear(32, tokens))
        self.channel = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2)  # (B, C, N)
        x = x + self.token(self.norm1(x))
        x = x.transpose(1, 2)
        x = x + self.channel(self.norm2(x.transpose(1, 2)).transpose(1, 2))
        return self.head(F.relu(x).mean(1))


def autoencoder() -> nn.Module:
    """An image comes back: down by strides, up by transposed convolution."""
    return nn.Sequential(
        _conv(1, 8, stride=2), _conv(8, 16, stride=2), nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 2, 2),
    )  # fmt: skip


class Siamese(nn.Module):
    """Two grey images as two channels; one branch sees both, the answer is the difference of what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(1, 8, stride=2), _conv(8, 16, stride=2), nn.AvgPool2d(4), nn.Flatten())
        self.head = nn.Linear(16 * 2 * 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, dim=1)
        return self.head(self.branch(one)) - self.head(self.branch(two))


# --- the zoo ----------------------------------------------------------------------------------------------------------


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)

    return make


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES)

    return make


_PLAIN = (
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_x_400mf",
    "regnet_y_400mf", "efficientnet_b0",
)  # fmt: skip
_TIMM = (
    "resnet18", "resnet26d", "regnetx_002", "vgg11_bn", "densenet121", "repvgg_a0", "ghostnet_050", "mobilenetv1_100",
    "mobilenetv2_050", "efficientnet_lite0", "hardcorenas_a", "convnext_atto", "dla34", "hrnet_w18_small",
)  # fmt: skip
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    **{f"torchvision {name}": (_torchvision(name), COLOUR) for name in _PLAIN},
    "torchvision googlenet": (_torchvision("googlenet", aux_logits=False, init_weights=False), COLOUR),
    "torchvision inception_v3": (_torchvision("inception_v3", aux_logits=False, init_weights=False), (3, 96, 96)),
    **{f"timm {name}": (_timm(name), COLOUR) for name in _TIMM},
    "LeNet": (LeNet, (1, 28, 28)),
    "ResNet-20": (resnet20, (3, 32, 32)),
    "1-d ResNet": (lambda: resnet20(dims=1), (3, 64)),
    "U-Net": (UNet, (3, 32, 32)),
    "FCN": (FCN, (3, 32, 32)),
    "ReLU mixer": (Mixer, COLOUR),
    "autoencoder": (autoencoder, (1, 28, 28)),
    "siamese": (Siamese, (2, 32, 32)),
}


@torch.no_grad()
def scrambled(model: nn.Module, shape: Shape, seed: int = 0) -> nn.Module:
    """Random gains and biases of batch norms, and statistics of what arrives there, so that no layer falls silent.

    Source of the random weights: the library's own initialisation, under the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.affine:
            norm.weight.copy_(1 + 0.2 * torch.randn(norm.weight.shape, generator=generator))
            norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=generator))
        norm.momentum = None  # a mean over all that was seen
        norm.reset_running_stats()
    if norms:
        model.train()(torch.randn(16, *shape, generator=generator))
    return model.eval()


def said(error: BaseException) -> str:
    """A refusal in its own words; anything that did not come from qsnn on purpose is a crash."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    words = " ".join(str(error).split())
    meant = isinstance(error, ValueError | TypeError | NotImplementedError) and PACKAGE in Path(place).parents
    return f"refused: {words}" if meant else f"crash: {type(error).__name__}: {words}"


def examine(name: str, seed: int = 0, tell: Callable[[dict[str, Any]], None] = lambda found: None) -> dict[str, Any]:
    """What every stage says of a network: "ok", "EXACT", how many integers differ, a refusal or a crash.

    A stage that the one before did not reach has no entry. "float error" is the root mean square of the difference
    between the float network and its spiking form at T = 16, of the standard deviation of its answers [1].

    Args:
        name: of :data:`NETWORKS`.
        seed: of the weights and the images.
        tell: is called after every stage with what was found so far.
    """
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    model = scrambled(make(), shape, seed)
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(seed + 1))
    data = [(images, torch.zeros(IMAGES, dtype=torch.long))]
    found: dict[str, Any] = {}

    def stage(which: str, work: Callable[[], Any], shown: Callable[[Any], Any] = lambda made: DONE) -> Any:
        started, made = time.perf_counter(), None
        try:
            made = work()
            found[which] = shown(made)
        except Exception as error:  # every failure of a network is a result here
            found[which] = said(error)
        found[f"{which} s"] = round(time.perf_counter() - started, 2)
        tell(found)
        return made

    with torch.no_grad():
        wanted = model(images)
    qann = stage("quantize", lambda: qsnn.quantize(model, data, QUANTIZE))
    snn = None if qann is None else stage("convert", lambda: qsnn.convert(qann))
    folded = None if snn is None else stage("fold", lambda: qsnn.fold(snn))
    if folded is not None:
        stage("certify", lambda: qsnn.certify(folded, qann, data), lambda certificate: certificate.verdict)

    def error() -> float:
        snn = qsnn.convert(model, data, FLOAT)
        with torch.no_grad():
            answers = snn(images)[-1]
            if bool((wanted.exp().sum(1) - 1).abs().max() < 1e-5):  # of a log_softmax, which convert takes off
                answers = answers.log_softmax(1)
            return float((answers - wanted).square().mean().sqrt() / wanted.std())

    stage("float error", error, lambda value: value)
    return found


def apart(name: str, seed: int, limit_s: float) -> dict[str, Any]:
    """:func:`examine` in a process of its own, which is ended after ``limit_s`` seconds."""
    command = [sys.executable, __file__, "--one", name, "--seeds", str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit_s, check=False)
        lines, why = done.stdout, f"crash: exit status {done.returncode}: {_last(done.stderr)}"
        finished = done.returncode == 0
    except subprocess.TimeoutExpired as slow:
        lines, why, finished = slow.stdout or b"", f"not done in {limit_s:g} s", False
    whole = lines.rpartition(b"\n")[0].decode().splitlines()
    found: dict[str, Any] = json.loads(whole[-1]) if whole else {}
    if not finished:
        found[next((stage for stage in STAGES if stage not in found), "float error")] = why
    return found


def _last(output: bytes) -> str:
    return (output.decode(errors="replace").strip().splitlines() or ["no word"])[-1]


def digest() -> str:
    """Of qsnn's files: a row is of the code that made it."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def run(names: list[str], seeds: list[int], limit_s: float, path: Path) -> None:
    """Examine what has no record of this code yet."""
    code, world = digest(), environment("cpu")
    for seed in seeds:
        for name in names:
            library = name.split()[0] if name.split()[0] in ("torchvision", "timm") else "torch"
            config = plain({
                "code": code, library: version(library), "input": NETWORKS[name][1], "quantize": asdict(QUANTIZE),
                "convert float": asdict(FLOAT), "seed": seed,
            })  # fmt: skip
            known = stored(path).get(key(f"zoo/{name}", "random", config))
            metrics = apart(name, seed, limit_s) if known is None else known.metrics
            if known is None:
                append(path, Record(
                    name=f"zoo/{name}", data="random", seed=seed, n=IMAGES, metrics=metrics, config=config,
                    environment=world, time=now(),
                ))  # fmt: skip
            print(f"{name}: {verdict(metrics)}", flush=True)


def verdict(metrics: dict[str, Any]) -> str:
    """What the last stage that was reached says."""
    return next((str(metrics[stage]) for stage in reversed(STAGES[:-1]) if stage in metrics), "not built")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; by default all 40")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a network may take")
    parser.add_argument("--records", type=Path, default=HERE / "records" / "zoo.jsonl")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(NETWORKS))
        return
    if args.one:
        examine(args.one, args.seeds[0], lambda found: print(json.dumps(found), flush=True))
        return
    with one_line("zoo.py", f"{GOES_ON} with the networks that are missing"):
        if unknown := [name for name in args.names if name not in NETWORKS]:
            raise ValueError(f"no network {', '.join(unknown)}; --list prints their names")
        run(args.names or list(NETWORKS), args.seeds, args.limit, args.records)


if __name__ == "__main__":
    main()
