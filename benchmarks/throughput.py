"""Ratios of time, measured side by side in one run: ``python benchmarks/throughput.py``.

The two sides of a ratio take turns, step by step, so that a machine that slows down slows both. The ratio is that of
the medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qsnn
from qsnn.records import Record, append, environment, now
from qsnn.train import keep_freed_memory, laid_out, lay_out_

HERE = Path(__file__).resolve().parent


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, loss, backward and update of one batch, as ``fit`` does it."""
    lay_out_(model.train(), torch.channels_last)
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


def quantization_aware_training(model_name: str, repeats: int) -> dict[str, Any]:
    """Seconds of a training step of the float net and of its W4/L2 quantized form, and their ratio."""
    keep_freed_memory()
    torch.manual_seed(0)
    images, labels = torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))
    model = qsnn.models.build_model(model_name, (1, 28, 28), 10)
    qann = qsnn.quantize(model, [(images, labels)])
    sides = {"float": training_step(model, images, labels), "qat": training_step(qann, images, labels)}
    seconds = side_by_side(sides, repeats)
    return {**seconds, "qat / float": seconds["qat"] / seconds["float"]}


def main() -> None:
    """Measure, print, append records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--records", type=Path, default=HERE / "records" / "throughput.jsonl")
    args = parser.parse_args()
    for model_name in ("study", "vgg-small"):
        metrics = quantization_aware_training(model_name, args.repeats)
        print(
            f"{model_name}, one training step of 128 images: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items())
        )
        append(args.records, Record(
            name=f"throughput/qat/{model_name}", data="random 1x28x28", seed=0, n=128, metrics=metrics,
            config={"model": model_name, "repeats": args.repeats, "batch": 128, "weight_bits": 4, "levels": 2},
            environment=environment("cpu"), time=now(),
        ))  # fmt: skip


if __name__ == "__main__":
    main()
