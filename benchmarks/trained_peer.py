"""SpikingJelly's own training beside a student of qsnn: ``python benchmarks/trained_peer.py FOLDER``.

FOLDER is what ``scripts/reproduce_cifar10.py`` or ``qsnn run`` wrote. The quantized network in it is made to spike by
SpikingJelly's IFNode in multi-step mode, and trained on the answer after T steps with the student's data, augmentation,
optimizer, learning rate, batch size and precision, for as many epochs as take the time of the student's, measured here.
Which surrogate gradient, and whether potentials start at 0 or at θ/2, is chosen on validation images, each after one
epoch of the first 10,000 training images. Its record has the name and the configuration of the student's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from peer_network import peer_network
from spikingjelly.activation_based import surrogate

import qsnn
from qsnn.cli.one_line import GOES_ON, one_line
from qsnn.graph.recipe import recipe_of
from qsnn.report.records import Record, append, environment, now, read
from qsnn.snn.network import TimeLoop
from qsnn.training.budget import seconds_in_turns

TRIED: dict[str, tuple[type, bool]] = {
    "ATan, from θ/2": (surrogate.ATan, True),
    "ATan, from 0": (surrogate.ATan, False),
    "Sigmoid, from θ/2": (surrogate.Sigmoid, True),
}
"""SpikingJelly's usual gradients, its default last."""
TRIED_IMAGES = 10_000


def student_record(folder: Path) -> Record:
    """The newest record of the student in a folder.

    Raises:
        ValueError: there is none.
    """
    path = folder / "records.jsonl"
    found = [r for r in (read(path) if path.exists() else []) if r.name.endswith("/student")]
    if not found:
        raise ValueError(f"expected {path} with the record of a student; the whole flow must have run there")
    return found[-1]


def peer(qann: Any, tried: str, timesteps: int) -> TimeLoop:
    """SpikingJelly's network of a quantized one."""
    kind, half = TRIED[tried]
    return TimeLoop(peer_network(qann, half=half, surrogate_function=kind(), detach_reset=True), timesteps)


def chosen(qann: Any, data: qsnn.Data, config: qsnn.TrainConfig, timesteps: int) -> str:
    """Of :data:`TRIED` the best on validation images, each after a short training."""
    short = replace(config, epochs=1, train_images=min(TRIED_IMAGES, config.train_images or TRIED_IMAGES))
    found = {}
    for tried in TRIED:
        network = peer(qann, tried, timesteps)
        found[tried] = qsnn.fit(network, data, short, label=tried)[-1].val_accuracy or 0.0
        print(f"{tried}: {found[tried]:.2f} % of the validation images", flush=True)
    return max(found, key=found.__getitem__)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=None, help="by default as many as take the student's time")
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--records", type=Path, default=None, help="append the record here too")
    args = parser.parse_args()
    with one_line("trained_peer.py", f"{GOES_ON} from the last epoch"):
        compared(args)


def compared(args: argparse.Namespace) -> None:
    """Choose, train, test once, append the record."""
    record = student_record(args.folder)
    qann: Any = qsnn.load(args.folder / "qann.safetensors")
    told, distill = recipe_of(qann)["data"], qsnn.DistillConfig(**record.config["distill"])
    data = qsnn.load_data(told["name"], root=args.data_root, mean=tuple(told["mean"]), std=tuple(told["std"]))
    config = replace(distill.training(), kd_weight=0.0)
    best = chosen(qann, data, config, distill.timesteps)
    if args.epochs is None:
        one = replace(config, epochs=1)
        took = seconds_in_turns({
            "qsnn": lambda part: qsnn.distill(qsnn.convert(qann), qann, part, replace(distill, epochs=1)),
            "SpikingJelly": lambda part: qsnn.fit(peer(qann, best, distill.timesteps), part, one),
        }, data, batch_size=config.batch_size, images=config.train_images)  # fmt: skip
        args.epochs = max(1, round(distill.epochs * took["qsnn"] / took["SpikingJelly"]))
        print(f"seconds of an epoch: {', '.join(f'{name} {s:.1f}' for name, s in took.items())}", flush=True)
    epochs = args.epochs
    network = peer(qann, best, distill.timesteps)
    state = args.folder / "spikingjelly.state"
    qsnn.fit(network, data, replace(config, epochs=epochs), resume=state, label="SpikingJelly")
    result = qsnn.benchmark(network, data.test, timesteps=4, name="SpikingJelly", reference=qann)
    steps = ", ".join(f"{value:.2f} % at T = {t}" for t, value in zip(result.timesteps, result.accuracy, strict=True))
    print(f"SpikingJelly, {best}, {epochs} epochs: {steps}, {result.n:,} test images")
    made = Record(
        name=f"{record.name.removesuffix('student')}SpikingJelly", data=record.data, seed=record.seed, n=result.n,
        metrics={
            **result.metrics(), "certificate": record.metrics["certificate"], "peer": best, "peer_epochs": epochs,
        },
        config=record.config, environment=environment("cpu"), time=now(),
    )  # fmt: skip
    for path in filter(None, (args.folder / "records.jsonl", args.records)):
        append(path, made)
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
