"""Conversion without training, beside SpikingJelly's recipes, snnTorch and Norse: ``python benchmarks/peers.py``.

The same float networks, the same calibration images, the same test images, in one run. Each recipe of SpikingJelly is
run through its own single-step loop; a cell of the table is compared with the best of them for that cell, network
and data set. qsnn is calibrated for each T. Rows that have a record are not run again.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from spikingjelly.activation_based import ann2snn, functional, neuron
from torch import Tensor, nn
from torch.utils.data import DataLoader

import qsnn
from qsnn.cli.one_line import one_line
from qsnn.report.records import Record, append, environment, now
from qsnn.report.terminal import number

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from lookup import key, plain, stored
from setting import cached
from tables import plus_minus

HERE = Path(__file__).resolve().parent
TIMESTEPS = (1, 2, 4, 8, 16)
CALIBRATION = 1024
LTB_PASSES = 25
OURS: dict[str, dict[str, Any]] = {"qsnn": {}, "qsnn, signed spikes": {"signed": True}}
"""Options of qsnn's conversions: binary spikes, as every peer's, or spikes of -1 too, which take back early ones."""
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("study", {}),
    "max-pool": ("study", {"pooling": "max"}),
    "residual": ("resnet-small", {}),
}
# epochs, training images
IMAGES = 2_000
"""Test images, the first of the data sets of three networks and three seeds: SpikingJelly's single steps take long."""
TRAINING: dict[str, tuple[int, int | None]] = {"digits": (20, None), "fashion-mnist": (4, 20_000)}
STRANGER = ("cifar10", "resnet20", "resnet20-cifar10/resnet20-12fca82f.th")
"""Data set, network and weights that somebody else trained: https://github.com/akamaster/pytorch_resnet_cifar10."""
STRANGER_PIXELS: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What they were trained on."""


def nets_of(data_name: str) -> list[str]:
    """The networks of a data set."""
    return [STRANGER[1]] if data_name == STRANGER[0] else list(NETS)


def _half(scale: float) -> nn.Module:
    return neuron.HalfThresholdIFNode()


def recipes() -> dict[str, Callable[[DataLoader], Any]]:
    """SpikingJelly's conversions that need no training, in the forms that do well at few steps."""
    rate = ann2snn.RateCodingRecipe
    return {
        "SJ RateCoding max (default)": lambda loader: rate(loader, mode="Max"),
        "SJ RateCoding 99 % half": lambda loader: rate(loader, mode="99%", neuron_factory=_half),
        "SJ RateCoding 99.9 % half": lambda loader: rate(loader, mode="99.9%", neuron_factory=_half),
        "SJ channel-wise 95 % half": lambda loader: rate(loader, mode="95%", channel_wise=True, half_threshold=True),
        "SJ channel-wise 99 % half": lambda loader: rate(loader, mode="99%", channel_wise=True, half_threshold=True),
        "SJ channel-wise 99.9 % half": lambda loader: rate(
            loader, mode="99.9%", channel_wise=True, half_threshold=True
        ),
        # its thresholds move a little with every batch: it needs many
        "SJ LTB": lambda loader: ann2snn.LocalThresholdBalancingRecipe(list(loader) * LTB_PASSES),
    }


class _Swapped(nn.Module):
    """A ReLU as snnTorch and Norse have it: an integrate-and-fire neuron of one θ, from half of it, worth θ a spike."""

    def __init__(self, library: str, threshold: float) -> None:
        super().__init__()
        self.threshold, self.v = threshold, None
        if library == "snnTorch":
            import snntorch

            self.node = snntorch.Leaky(beta=1.0, threshold=threshold, reset_mechanism="subtract", reset_delay=False)
        else:
            from norse.torch import IAFCell, IAFFeedForwardState, IAFParameters

            self.state = IAFFeedForwardState
            self.node = IAFCell(IAFParameters(v_th=torch.tensor(threshold)))

    def forward(self, x: Tensor) -> Tensor:
        v = torch.full_like(x, self.threshold / 2) if self.v is None else self.v
        if hasattr(self, "state"):
            spikes, state = self.node(x, self.state(v=v))
            self.v = state.v
        else:
            spikes, self.v = self.node(x, v)
        return spikes * self.threshold

    def reset(self) -> None:
        self.v = None


@torch.no_grad()
def swapped(library: str, percent: float, teacher: nn.Module, loader: DataLoader) -> nn.Module:
    """The float network with neurons of another library in the place of its ReLUs: they have no converter.

    θ is a percentile of each layer's activations on the calibration images, as SpikingJelly's RateCoding takes it.
    """
    model, seen = copy.deepcopy(teacher).eval(), {}
    relus = {name: module for name, module in model.named_modules() if isinstance(module, nn.ReLU)}

    def look(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.setdefault(name, []).append(output.flatten().numpy())

    hooks = [module.register_forward_hook(look(name)) for name, module in relus.items()]
    for images, _ in loader:
        model(images)
    for hook in hooks:
        hook.remove()
    for name in relus:
        parent, _, child = name.rpartition(".")
        threshold = float(np.percentile(np.concatenate(seen[name]), percent))
        setattr(model.get_submodule(parent), child, _Swapped(library, threshold))
    return model


OTHERS: dict[str, tuple[str, float]] = {
    f"{library} {percent:g} % half": (library, percent) for library in ("snnTorch", "Norse") for percent in (99.0, 99.9)
}

METHODS = (*OURS, *recipes(), *OTHERS)


def teacher_of(data: qsnn.Data, net: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """The float network of one cell, trained once or somebody else's, and how."""
    if net == STRANGER[1]:
        root = Path(os.environ.get("QSNN_DATA", "~/.cache/qsnn")).expanduser()
        stranger = qsnn.create_model(net, data)
        qsnn.load_weights(stranger, root / STRANGER[2])
        return stranger, {"model": net, "weights": Path(STRANGER[2]).name, "data": data.name, **STRANGER_PIXELS}
    name, options = NETS[net]
    epochs, images = TRAINING[data.name]
    training = qsnn.TrainConfig(epochs=epochs, lr=0.1, train_images=images, seed=seed)
    config = {"model": name, "options": options, "data": data.name, "train": asdict(training)}

    def make() -> nn.Module:
        model = qsnn.create_model(name, data, seed=seed, **options)
        qsnn.fit(model, data, training, label=net)
        return model

    return cached("peers", config, make), config


class _Traceable(nn.Module):
    """A block of the stranger's network in what SpikingJelly can trace: no slice and no pad.

    To drop every second pixel and to pad channels of zeros is a convolution of 1x1 with ones and zeros, number for
    number.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        layers = (block.conv1, block.bn1, block.relu1, block.conv2, block.bn2)
        self.body, self.shortcut, self.relu2 = nn.Sequential(*layers), nn.Identity(), block.relu2
        if block.missing:
            half, inputs = block.missing // 2, block.conv1.in_channels
            ones = F.pad(torch.eye(inputs), (0, 0, half, block.missing - half))
            self.shortcut = nn.Conv2d(inputs, len(ones), 1, stride=block.stride, bias=False)
            self.shortcut.weight.data = ones[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.body(x) + self.shortcut(x))  # type: ignore[no-any-return]


def for_peers(teacher: nn.Module) -> nn.Module:
    """The same float network, which SpikingJelly can trace."""
    network = copy.deepcopy(teacher).eval()
    for stage in (getattr(network, name) for name in ("layer1", "layer2", "layer3") if hasattr(network, name)):
        for name, block in stage.named_children():
            setattr(stage, name, _Traceable(block))
    return network


@torch.no_grad()
def spikingjelly_curve(model: nn.Module, test: Any) -> dict[int, float]:
    """Accuracy [%] after each T: single steps, the outputs added up, states reset between batches."""
    model.eval()
    right, seen = dict.fromkeys(TIMESTEPS, 0), 0
    for images, labels in qsnn.batches(test, 500):
        functional.reset_net(model)
        for module in model.modules():
            if isinstance(module, _Swapped):
                module.reset()
        total: Tensor | float = 0.0
        for t in range(1, max(TIMESTEPS) + 1):
            total = total + model(images)
            if t in right:
                right[t] += int((total.argmax(1) == labels).sum())
        seen += len(labels)
    return {t: 100.0 * count / seen for t, count in right.items()}


def tested(data: qsnn.Data) -> Any:
    """The test images that every method answers."""
    return data.test if data.name == STRANGER[0] else data.test.head(IMAGES)  # type: ignore[attr-defined]


def measure(method: str, teacher: nn.Module, data: qsnn.Data) -> dict[str, float]:
    """Accuracy [%] of one method at every T, and of the float network."""
    test, started = tested(data), time.perf_counter()
    if method in OURS:
        config = qsnn.ConvertConfig(calibration_images=CALIBRATION, **OURS[method])
        spiking = qsnn.convert(teacher, data, config, timesteps=TIMESTEPS)
        curve = {t: qsnn.accuracy(snn, test) for t, snn in spiking.items()}
    else:
        loader = DataLoader(data.train.head(CALIBRATION), batch_size=64)  # type: ignore[attr-defined]
        plain_net = for_peers(teacher)
        if method in OTHERS:
            model = swapped(*OTHERS[method], plain_net, loader)
        else:
            model = ann2snn.Converter(recipe=recipes()[method](loader)).convert(plain_net)
        curve = spikingjelly_curve(model, test)
    found = {"ann": qsnn.accuracy(teacher, test), **{f"T={t}": value for t, value in curve.items()}}
    return {**found, "seconds": time.perf_counter() - started}


def best_of_spikingjelly(teacher: nn.Module, data: qsnn.Data, timesteps: int) -> dict[str, float]:
    """Accuracy [%] at T on all test images of the recipe that is best at it on the validation images."""
    loader = DataLoader(data.train.head(CALIBRATION), batch_size=64)  # type: ignore[attr-defined]
    plain_net = for_peers(teacher)
    converted = {name: ann2snn.Converter(recipe=make(loader)).convert(plain_net) for name, make in recipes().items()}
    on_val = {name: spikingjelly_curve(snn, data.val)[timesteps] for name, snn in converted.items()}
    curve = spikingjelly_curve(converted[max(on_val, key=on_val.__getitem__)], data.test)
    return {f"T={t}": curve[t] for t in (1, 2, 4)}


def run(
    names: list[str], seeds: list[int], path: Path, data_root: Path | None, methods: tuple[str, ...] = METHODS
) -> list[Record]:
    """Measure what has no record yet; return the newest record of every row."""
    console, wanted = Console(), []
    for seed in seeds:
        for data_name in names:
            stranger = data_name == STRANGER[0]
            if stranger and seed != seeds[0]:
                continue  # nothing is random about somebody else's weights
            data = qsnn.load_data(data_name, root=data_root, **(STRANGER_PIXELS if stranger else {}))
            for net in nets_of(data_name):
                teacher: nn.Module | None = None
                for method in methods:
                    if teacher is None:
                        teacher, config = teacher_of(data, net, seed)
                    row = plain({**config, "calibration_images": CALIBRATION, **OURS.get(method, {})})
                    if stranger:
                        row["test_images"] = len(tested(data))
                    name = f"peers/{net}/{method}"
                    wanted.append(key(name, data_name, row))
                    if wanted[-1] in stored(path):
                        continue
                    world = environment("cpu")
                    metrics = measure(method, teacher, data)
                    append(path, Record(
                        name=name, data=data_name, seed=seed, n=len(tested(data)), metrics=metrics,
                        config=row, environment=world, time=now(),
                    ))  # fmt: skip
                    shown = "  ".join(f"{what} {number(value)}" for what, value in metrics.items())
                    console.print(f"{data_name} {net} {method}, seed {seed}: {shown}", highlight=False)
    known = stored(path)
    return [known[row] for row in wanted]


def print_table(records: list[Record], methods: tuple[str, ...] = METHODS) -> None:
    """Ours, the best peer of each cell, and the difference with the standard deviations."""
    for data_name in dict.fromkeys(r.data for r in records):
        table = Table(title=f"conversion without training, {data_name}")
        for column in ("network", "method", *(f"T = {t}" for t in TIMESTEPS)):
            table.add_column(column, justify="left" if column in ("network", "method") else "right")
        for net in nets_of(data_name):
            rows = [r for r in records if r.data == data_name and r.name.split("/")[1] == net]
            for method in methods:
                mine = [r.metrics for r in rows if r.name.split("/", 2)[2] == method]
                table.add_row(net, method, *(plus_minus([m[f"T={t}"] for m in mine]) for t in TIMESTEPS))
        Console().print(table)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [*TRAINING, STRANGER[0]]
    parser.add_argument("--data", nargs="+", choices=known, default=known)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--records", type=Path, default=HERE / "records" / "peers.jsonl")
    parser.add_argument("--data-root", type=Path, default=None)
    args = parser.parse_args()
    methods = tuple(args.methods)
    print_table(run(args.data, args.seeds, args.records, args.data_root, methods), methods)


if __name__ == "__main__":
    with one_line("peers.py"):
        main()
