"""Ratios of time, measured side by side in one run: ``python benchmarks/throughput.py``.

The two sides of a ratio take turns, step by step, so that a machine that slows down slows both. The ratio is that of
the medians.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from peer_network import peer_network
from spikingjelly.activation_based import ann2snn, functional, neuron
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader

import qsnn
from qsnn.cli.one_line import one_line
from qsnn.data.memory import keep_freed_memory, laid_out, lay_out_
from qsnn.models.create import build_model
from qsnn.report.records import Record, append, environment, now

HERE = Path(__file__).resolve().parent
SHAPES = {"study": (1, 28, 28), "vgg-small": (1, 28, 28), "resnet20": (3, 32, 32)}
"""Networks whose training steps are timed, and the images they get."""


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, *, channels_last: bool = True
) -> Callable[[], None]:
    """Forward, loss, backward and update of one batch, as ``fit`` does it."""
    model.train()
    if channels_last:
        lay_out_(model, torch.channels_last)
        images = laid_out(images, torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(images)
        F.cross_entropy(logits[-1] if logits.dim() == 3 else logits, labels).backward()
        optimizer.step()

    return step


def side_by_side(sides: dict[str, Callable[[], None]], repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each side, taking turns."""
    for _ in range(warmup):
        for step in sides.values():
            step()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, step in sides.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in seconds.items()}


def _networks(model_name: str) -> tuple[nn.Module, Any, Tensor, Tensor]:
    """The float network, its W4/L2 quantized form, and 128 images with labels."""
    torch.manual_seed(0)
    shape = SHAPES[model_name]
    images, labels = torch.randn(128, *shape), torch.randint(0, 10, (128,))
    model = build_model(model_name, shape, 10)
    return model, qsnn.quantize(model, [(images, labels)]), images, labels


def quantization_aware_training(model_name: str, repeats: int) -> dict[str, Any]:
    """Seconds of a training step of the float net and of its W4/L2 quantized form, and their ratio."""
    keep_freed_memory()
    model, qann, images, labels = _networks(model_name)
    sides = {"float": training_step(model, images, labels), "qat": training_step(qann, images, labels)}
    seconds = side_by_side(sides, repeats)
    return {**seconds, "qat / float": seconds["qat"] / seconds["float"]}


class PeerStudent(nn.Module):
    """The mean answer of :func:`peer_network.peer_network`."""

    def __init__(self, qann: fx.GraphModule, timesteps: int) -> None:
        super().__init__()
        self.timesteps, self.network = timesteps, peer_network(qann)

    def forward(self, images: Tensor) -> Tensor:
        functional.reset_net(self)
        answers: Tensor = self.network(images.expand(self.timesteps, *images.shape))
        return answers.mean(0)


def _students(model_name: str, channels_last: bool = True) -> dict[str, Callable[[], None]]:
    _, qann, images, labels = _networks(model_name)
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=2))
    rates = copy.deepcopy(snn)
    for _, node in rates.neurons():
        node.surrogate = "rate"
    return {
        "qsnn": training_step(snn, images, labels),
        "qsnn, rate": training_step(rates, images, labels),
        "spikingjelly": training_step(PeerStudent(qann, 2), images, labels, channels_last=channels_last),
    }


def distillation(model_name: str, repeats: int) -> dict[str, Any]:
    """Seconds and peak memory of a training step at T = 2, ours by the gradient of each spike and by that of the rate,
    and with SpikingJelly's IFNode.

    SpikingJelly takes the layout that is faster for it. Memory: what a process of its own needs beyond what it held
    before its first step.
    """
    keep_freed_memory()
    sides = _students(model_name)
    sides["spikingjelly, contiguous"] = _students(model_name, channels_last=False)["spikingjelly"]
    seconds = side_by_side(sides, repeats)
    best = min(value for name, value in seconds.items() if not name.startswith("qsnn"))
    memory = {name: _peak(model_name, name) for name in ("qsnn", "qsnn, rate", "spikingjelly")}
    return {
        **seconds, "qsnn / spikingjelly": seconds["qsnn"] / best,
        **{f"{name} MiB": value for name, value in memory.items()},
        "memory qsnn / spikingjelly": memory["qsnn"] / memory["spikingjelly"],
    }  # fmt: skip


def _peak(model_name: str, side: str) -> float:
    """Peak memory of a few steps beyond that of the idle process [MiB], measured in a process of its own (Linux).

    There the C library gives every tensor back when it is freed, so that the peak is of what lives at once, and not of
    the holes between.
    """
    command = [sys.executable, __file__, "--peak", model_name, side]
    world = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=world).stdout.split()[-1])


def _print_peak(model_name: str, side: str) -> None:
    step = _students(model_name)[side]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is measured anew
    for _ in range(3):
        step()
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print((int(peak.split()[1]) * 1024 - pages * 4096) / 2**20)


@torch.no_grad()
def accuracy_curve(images: int, timesteps: int = 32, data_root: Path | None = None) -> dict[str, Any]:
    """Seconds for the accuracy after every T = 1..32 on Fashion-MNIST's test images, three ways, taking turns.

    The study net, float, is converted by SpikingJelly (channel-wise RateCoding, half threshold) and run in its
    single-step loop, and by qsnn and run in one pass. "convolutions": the layers with weights alone, on inputs of the
    same shapes, which nothing can beat. Every side uses the batch size that is fastest for it.
    """
    keep_freed_memory()
    data = qsnn.load_data("fashion-mnist", root=data_root)
    model = qsnn.create_model("study", data).eval()
    loader = DataLoader(data.train.head(256), batch_size=64)  # type: ignore[attr-defined]
    recipe = ann2snn.RateCodingRecipe(loader, mode="99%", channel_wise=True, half_threshold=True)
    theirs = ann2snn.Converter(recipe=recipe).convert(model).eval()
    snn = qsnn.convert(model, data, qsnn.ConvertConfig(timesteps=timesteps, calibration_images=64))
    ours = qsnn.fold(snn, dtype=torch.float32)

    def single_steps(x: Tensor, labels: Tensor) -> None:
        functional.reset_net(theirs)
        total: Tensor | float = 0.0
        for _ in range(timesteps):
            total = total + theirs(x)
            (total.argmax(1) == labels).sum().item()

    def one_pass(x: Tensor, labels: Tensor) -> None:
        (ours(x, timesteps=timesteps).argmax(-1) == labels).sum(1).tolist()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shapes: dict[nn.Module, torch.Size] = {}
    hooks = [m.register_forward_hook(lambda m, a, y: shapes.update({m: a[0].shape[1:]})) for m in layers]
    model(torch.zeros(1, *data.shape))
    for hook in hooks:
        hook.remove()

    def convolutions(x: Tensor, labels: Tensor) -> None:
        for place, layer in enumerate(layers):
            count = len(x) * (timesteps if place else 1)  # the first sees the image, which is the same at every step
            layer(inputs[len(x), place][:count])

    sides: dict[str, Callable[[Tensor, Tensor], None]] = {
        "qsnn": one_pass, "spikingjelly": single_steps, "convolutions": convolutions
    }  # fmt: skip
    test = data.test.head(images)  # type: ignore[attr-defined]
    sizes, inputs = (8, 32, 128), {}
    best: dict[str, int] = {}
    for size in sizes:
        for place, layer in enumerate(layers):
            inputs[size, place] = (torch.rand(size * timesteps, *shapes[layer]) < 0.2).float()
    for name, side in sides.items():
        seconds = {}
        for size in sizes:
            parts = list(qsnn.batches(test.head(256), size))
            side(*parts[0])
            started = time.perf_counter()
            for part in parts:
                side(*part)
            seconds[size] = time.perf_counter() - started
        best[name] = min(seconds, key=seconds.__getitem__)
    total = dict.fromkeys(sides, 0.0)
    for x, labels in qsnn.batches(test, 1024):
        for name, side in sides.items():
            size = best[name]
            parts = [(x[i : i + size], labels[i : i + size]) for i in range(0, len(x) // size * size, size)]
            started = time.perf_counter()
            for part in parts:
                side(*part)
            total[name] += time.perf_counter() - started
    return {
        **total,
        "qsnn / spikingjelly": total["qsnn"] / total["spikingjelly"],
        "convolutions / spikingjelly": total["convolutions"] / total["spikingjelly"],
        **{f"batch {name}": size for name, size in best.items()},
    }


class _InTime(nn.Module):
    """SpikingJelly's IFNode in multi-step mode in the place of a ReLU, in a network whose batch holds all steps."""

    def __init__(self, timesteps: int, threshold: float) -> None:
        super().__init__()
        self.node = neuron.IFNode(v_threshold=threshold, v_reset=None, step_mode="m")
        self.timesteps, self.threshold = timesteps, threshold

    def forward(self, x: Tensor) -> Tensor:
        spikes: Tensor = self.node(x.unflatten(0, (self.timesteps, -1))).flatten(0, 1)
        return spikes * self.threshold


@torch.no_grad()
def evaluation(images: int, repeats: int, timesteps: int = 8) -> dict[str, Any]:
    """Seconds for the accuracy of a converted ResNet-20 on random images of 3x32x32, ours and SpikingJelly's, in turns.

    SpikingJelly's is the same float network with its IFNode in multi-step mode in the place of every ReLU, as its
    converter leaves it, in the batch that is fastest for it, contiguous and channels-last; all keep freed memory.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    model = build_model("resnet20", (3, 32, 32), 10).eval()
    part, labels = torch.randn(images, 3, 32, 32), torch.randint(0, 10, (images,))
    data = torch.utils.data.TensorDataset(part, labels)
    few = [(part[:64], labels[:64])]
    snn = qsnn.convert(model, few, qsnn.ConvertConfig(timesteps=timesteps, threshold="max", correction="none"))
    theirs = copy.deepcopy(model)
    for name, module in list(theirs.named_modules()):
        if isinstance(module, nn.ReLU):
            theirs.set_submodule(name, _InTime(timesteps, 1.0))
    contiguous, last = copy.deepcopy(theirs), copy.deepcopy(theirs)
    lay_out_(last, torch.channels_last)

    def multi_step(network: nn.Module, size: int, layout: torch.memory_format) -> Callable[[], None]:
        def run() -> None:
            right = 0
            for first in range(0, images, size):
                x = laid_out(part[first : first + size], layout)
                functional.reset_net(network)
                answers = network(torch.cat([x] * timesteps)).unflatten(0, (timesteps, -1)).mean(0)
                right += int((answers.argmax(1) == labels[first : first + size]).sum())

        return run

    sides: dict[str, Callable[[], None]] = {"qsnn": lambda: qsnn.accuracy(snn, data)}
    forms = (contiguous, torch.contiguous_format, ", contiguous"), (last, torch.channels_last, "")
    for network, layout, words in forms:
        sizes = {str(size): multi_step(network, size, layout) for size in (8, 32, 128)}
        sides[f"spikingjelly{words}"] = sizes[min(sizes, key=side_by_side(sizes, 1, 1).__getitem__)]
    seconds = side_by_side(sides, repeats, 1)
    ratios = {f"qsnn / {name}": seconds["qsnn"] / seconds[name] for name in seconds if name != "qsnn"}
    return {**seconds, **ratios}


def _images_of(model_name: str) -> str:
    return "random " + "x".join(map(str, SHAPES[model_name]))


def main() -> None:
    """Measure, print, append records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", choices=("qat", "curve", "distill", "evaluation"), default=None)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=None, help="of the training steps")
    parser.add_argument("--images", type=int, default=10_000, help="test images of the accuracy curve")
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--records", type=Path, default=HERE / "records" / "throughput.jsonl")
    parser.add_argument("--peak", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return _print_peak(*args.peak)
    chosen = args.models or list(SHAPES)
    for model_name in chosen if args.only in (None, "distill") else ():
        metrics = distillation(model_name, args.repeats)
        print(f"{model_name}, T = 2, 128 images: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        append(args.records, Record(
            name=f"throughput/distill/{model_name}", data=_images_of(model_name), seed=0, n=128, metrics=metrics,
            config={"model": model_name, "repeats": args.repeats, "batch": 128, "T": 2, "weight_bits": 4, "levels": 2},
            environment=environment("cpu"), time=now(),
        ))  # fmt: skip
    if args.only in (None, "curve"):
        metrics = accuracy_curve(args.images, data_root=args.data_root)
        print("accuracy for T = 1..32 on Fashion-MNIST: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        append(args.records, Record(
            name="throughput/curve/study", data="fashion-mnist", seed=0, n=args.images, metrics=metrics,
            config={"model": "study", "timesteps": 32, "peer": "RateCoding channel-wise 99 %, half threshold"},
            environment=environment("cpu"), time=now(),
        ))  # fmt: skip
    if args.only in (None, "evaluation"):
        metrics = evaluation(128, args.repeats)
        print("accuracy of a ResNet-20 at T = 8, 128 images: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        append(args.records, Record(
            name="throughput/evaluation/resnet20", data="random 3x32x32", seed=0, n=128, metrics=metrics,
            config={"model": "resnet20", "timesteps": 8, "repeats": args.repeats, "peer": "IFNode, multi-step"},
            environment=environment("cpu"), time=now(),
        ))  # fmt: skip
    for model_name in chosen if args.only in (None, "qat") else ():
        metrics = quantization_aware_training(model_name, args.repeats)
        print(
            f"{model_name}, one training step of 128 images: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        )
        append(args.records, Record(
            name=f"throughput/qat/{model_name}", data=_images_of(model_name), seed=0, n=128, metrics=metrics,
            config={"model": model_name, "repeats": args.repeats, "batch": 128, "weight_bits": 4, "levels": 2},
            environment=environment("cpu"), time=now(),
        ))  # fmt: skip


if __name__ == "__main__":
    with one_line("throughput.py"):
        main()
