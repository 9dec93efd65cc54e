"""What an exported file answers and takes, beside the network it came from."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qsnn.data.batches import batches, summed
from qsnn.data.images import normalise
from qsnn.data.shown import batch_count, shown
from qsnn.export.float_onnx import float_side, write_float
from qsnn.export.runtime import OnnxNetwork
from qsnn.export.write import export
from qsnn.graph.recipe import recipe_of
from qsnn.graph.trace import device_of
from qsnn.measure.benchmark import as_measured
from qsnn.measure.heads import heads
from qsnn.measure.latency import in_turns, rotating
from qsnn.measure.result import Benchmark
from qsnn.measure.tally import Tally
from qsnn.snn.network import SNN

BATCH = 64
"""Images of the larger batch that is timed."""
SECONDS = 0.5
"""Time of each form at each size [s]."""
_DIFFERENT = 256
"""Images that the timed calls rotate over."""
Sides = dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Any]]]
"""By name, the call of a form, and what turns normalised images into its input."""


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What one form of a network costs where it runs."""

    name: str
    runtime: str
    """"ONNX Runtime" or "torch"."""
    firing: str | None
    """"online" or "deferred"; None for a network without steps."""
    made_for: int
    """The T that was timed; 0 for a network without steps."""
    file_bytes: int
    """Size of the file [byte]."""
    latency_ms: float
    """Median time of one image [ms]."""
    batch: int
    """Images of the batch that was timed."""
    batch_ms: float
    """Median time of that batch [ms]."""
    n: int | None = None
    """Images that were answered; None where only the time was measured."""
    timesteps: tuple[int, ...] = ()
    """The T's whose answers were measured; () for a network without steps."""
    accuracy: tuple[float, ...] = ()
    """Right answers [%], one number for each T, or what ``metric`` says."""
    metric: str = "accuracy"
    equal: int | None = None
    """Images of which every logit at every T is the parent's to the last bit; None where no parent was beside it."""
    parent: str | None = None
    """The network that was compared."""

    def metrics(self) -> dict[str, Any]:
        """Return the numbers as plain types, for a record."""
        found = {key: value for key, value in asdict(self).items() if key not in ("name", "n", "metric", "accuracy")}
        return {self.metric.replace(" ", "_"): self.accuracy, **found} if self.accuracy else found


@torch.no_grad()
def answered(
    network: OnnxNetwork, name: str, data: Any, parent: nn.Module | None = None, parent_name: str | None = None
) -> dict[str, Any]:
    """What a file answers: the fields of :class:`Deployed` that are no times.

    Args:
        network: the file.
        name: of the file, in messages.
        data: a Dataset of (image, label).
        parent: the folded network it was written from; its answers at the file's T and firing are compared.
        parent_name: what the parent is called.
    Raises:
        ValueError: no images, pixels that no byte holds where the file takes bytes, or heads that cannot be told apart.
    """
    told, tally, equal, steps = network.recipe["export"], None, 0, network.steps
    for images, labels in shown(batches(data, BATCH), name, batch_count(data, BATCH)):
        found = [torch.from_numpy(each) for each in network.answers(taken(network, images))]
        wanted = None
        if parent is not None:
            on_device = images.to(device_of(parent))
            wanted = heads(parent(on_device, timesteps=told["timesteps"], firing=told["firing"]))
            same = torch.stack([_rows_equal(a, b) for a, b in zip(found, wanted.values(), strict=True)]).all(0)
            equal += int(same.sum())
        by_head = dict(zip(_names(found, labels, wanted, name), found, strict=True))
        if tally is None:
            tally = Tally((), len(steps), len(steps) - 1)
        tally.add(by_head if [*by_head] != [""] else found[0], images, labels, None)
    if tally is None or tally.tasks is None:
        raise ValueError("the data is empty: expected at least one batch of (images, labels)")
    return {
        "name": name, "n": tally.seen, "timesteps": steps, "firing": told["firing"],
        "accuracy": next(iter(tally.scores().values())), "metric": tally.tasks.first.metric,
        "equal": None if parent is None else equal, "parent": parent_name,
    }  # fmt: skip


def _rows_equal(ours: Tensor, theirs: Tensor) -> Tensor:
    """Of each image whether all its numbers are the same, (B,); both (T, B, *)."""
    if ours.shape != theirs.shape:
        raise ValueError(f"expected answers of {tuple(theirs.shape)}, as its checkpoint gives, got {tuple(ours.shape)}")
    return (ours == theirs.float().cpu()).transpose(0, 1).flatten(1).all(1)


def _names(found: list[Tensor], labels: Any, parent: Mapping[str, Any] | None, name: str) -> list[str]:
    """Which head each answer of the file belongs to, in the parent's structure, else in that of the labels."""
    names = [*heads(labels)] if parent is None else [*parent]
    if parent is None and len(found) > 1 and any(not part.isdecimal() for part in names):
        raise ValueError(f"{name} has {len(found)} heads without names; give the checkpoint it came from beside it")
    if len(names) != len(found):
        raise ValueError(f"{name} answers {len(found)} heads, and the data has labels for {len(names)}")
    return names


def taken(network: OnnxNetwork, images: Tensor) -> NDArray[Any]:
    """Normalised images as a file takes them.

    Shape:
        images: (B, C, H, W), or frames (B, T, C, H, W); returned: the same in float32, or pixels in uint8.
    Raises:
        ValueError: the file takes bytes, and these images were not made of bytes.
    """
    if images.dim() == len(network.recipe["input_shape"]) + 2:
        images = images[:, : network.recipe["export"]["timesteps"]]
    if not network.raw:
        return images.contiguous().numpy()
    data, pixels = network.recipe["data"], torch.arange(256, dtype=torch.uint8)
    table = normalise(pixels.expand(images.shape[1], 256)[..., None], data["mean"], data["std"])[..., 0]
    x = images.transpose(0, 1).flatten(1).contiguous()
    found = torch.searchsorted(table, x).clamp_(max=255)
    if not torch.equal(table.gather(1, found), x):
        raise ValueError("the file takes pixels of 8 bit, and these images hold more; export it with input='float'")
    return found.to(torch.uint8).view(images.shape[1], len(images), *images.shape[2:]).transpose(0, 1).numpy().copy()


def in_torch(model: nn.Module, timesteps: int, firing: str | None) -> Callable[[Tensor], Any]:
    """A call of a network in torch, to the end of its work, in the form that is measured; T = 0 without steps."""
    device = device_of(model)
    network = as_measured(model, max(1, timesteps))
    options: dict[str, Any] = {"timesteps": timesteps} if timesteps else {}
    if isinstance(network, SNN):
        options["firing"] = firing

    @torch.no_grad()
    def run(images: Tensor) -> Any:
        images = images.to(device)
        return tree_map(Tensor.cpu, network(images if timesteps else summed(images, network), **options))

    return run


def timed(sides: Sides, data: Any) -> dict[str, dict[str, Any]]:
    """The times of several forms, in turns, one image a call and then a batch: fields of :class:`Deployed`.

    Args:
        sides: the forms.
        data: a Dataset or an iterable of (images, labels).
    """
    images = next(iter(batches(data, _DIFFERENT)))[0].cpu()[:_DIFFERENT]
    batch = min(BATCH, len(images))
    took = []
    for size in (1, batch):
        parts = [part for part in images.split(size) if len(part) == size]
        took.append(in_turns(
            {name: rotating(run, [prepare(part) for part in parts]) for name, (run, prepare) in sides.items()},
            seconds=SECONDS,
        ))  # fmt: skip
    return {name: {"latency_ms": took[0][name], "batch": batch, "batch_ms": took[1][name]} for name in sides}


def side_by_side(
    files: Mapping[str, tuple[Path, OnnxNetwork]],
    checkpoints: Mapping[str, tuple[Path, nn.Module, Benchmark]],
    data: Any,
) -> list[Deployed]:
    """Exported files beside checkpoints: accuracy, time, size, and in how many images every logit is the parent's.

    A checkpoint is timed at the T and firing that it was benchmarked at.

    Args:
        files: by name, the path and the file.
        checkpoints: by name, the path, the network and what :func:`qsnn.benchmark` measured of it.
        data: a Dataset of (image, label).
    Raises:
        ValueError: see :func:`parents_of` and :func:`answered`.
    """
    parents = parents_of(
        {name: network for name, (_, network) in files.items()},
        {name: model for name, (_, model, _) in checkpoints.items()},
    )
    found, sides = {}, Sides()
    for name, (_, model, result) in checkpoints.items():
        sides[name] = (in_torch(model, result.made_for, result.firing), lambda images: images)
    for name, (_, network) in files.items():
        parent = parents[name]
        found[name] = answered(network, name, data, None if parent is None else checkpoints[parent][1], parent)
        sides[name] = (network.answers, partial(taken, network))
    times = timed(sides, data)
    rows = [
        Deployed(
            name=name, runtime="torch", firing=result.firing, made_for=result.made_for,
            file_bytes=os.path.getsize(path), n=result.n, timesteps=result.timesteps, accuracy=result.accuracy,
            metric=result.metric, **times[name],
        )
        for name, (path, _, result) in checkpoints.items()
    ]  # fmt: skip
    return rows + [
        Deployed(
            runtime="ONNX Runtime", made_for=network.recipe["export"]["timesteps"], file_bytes=os.path.getsize(path),
            **found[name], **times[name],
        )
        for name, (path, network) in files.items()
    ]  # fmt: skip


def parents_of(files: Mapping[str, OnnxNetwork], checkpoints: Mapping[str, nn.Module]) -> dict[str, str | None]:
    """Which checkpoint each file was written from, by names; None where there is no checkpoint.

    Raises:
        ValueError: there are checkpoints, and none is a file's parent.
    """
    found: dict[str, str | None] = {}
    hashes = {label: recipe_of(model).get("sha256") for label, model in checkpoints.items()}
    for name, network in files.items():
        wanted = network.recipe.get("parent")
        same = [label for label, sha in hashes.items() if wanted is not None and sha == wanted]
        if checkpoints and not same:
            which = "a network that was not saved" if wanted is None else f"the file of SHA-256 {str(wanted)[:12]}..."
            raise ValueError(
                f"{name} was written from {which}, which none of {', '.join(checkpoints)} is; give the folded "
                f"checkpoint that it was exported from, or the exported file alone"
            )
        found[name] = same[0] if same else None
    return found


@torch.no_grad()
def beside_teacher(folded: SNN, teacher: nn.Module, path: Path, data: Any) -> tuple[list[Deployed], list[str]]:
    """Export a folded network to ``path``, and measure the file beside its float teacher in the same runtime.

    Args:
        folded: the network.
        teacher: the float network.
        path: the file to write.
        data: a Dataset of (image, label).
    Returns:
        The file's row and the teacher's, and a sentence for each that is missing.
    """
    path.unlink(missing_ok=True)  # of another network, should this one not be written
    lacking = [library for library in ("onnx", "onnxruntime") if importlib.util.find_spec(library) is None]
    if lacking:
        return [], [f"{path.name} was not written: it needs {' and '.join(lacking)}; pip install qsnn[export]"]
    threads = torch.get_num_threads()
    try:
        network = OnnxNetwork(export(folded, path), threads=threads)
    except (ValueError, ImportError) as error:
        return [], [f"{path.name} was not written: {error}"]
    found = {path.name: answered(network, path.name, data, folded, "the folded network")}
    sides: Sides = {path.name: (network.answers, partial(taken, network))}
    sizes, notes = {path.name: path.stat().st_size}, list[str]()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "teacher.onnx"
        images = next(iter(batches(data, BATCH)))[0]
        try:
            write_float(teacher, summed(images, teacher), plain)
        except ValueError as error:
            notes.append(f"{path.name} stands alone: of the teacher {error}")
        else:
            run = float_side(plain, threads)
            sides[plain.name] = (run, lambda images: summed(images, teacher).numpy())
            sizes[plain.name] = plain.stat().st_size
            found[plain.name] = _scored(run, teacher, data)
    times = timed(sides, data)
    steps = network.recipe["export"]["timesteps"]
    return [
        Deployed(
            **{"name": name, "runtime": "ONNX Runtime", "firing": None, **found[name]},
            made_for=steps if name == path.name else 0, file_bytes=sizes[name], **times[name],
        )
        for name in sides
    ], notes  # fmt: skip


def _scored(run: Callable[[Any], list[Any]], model: nn.Module, data: Any) -> dict[str, Any]:
    """The score of a float file."""
    tally = Tally((), 0, 0)
    for images, labels in batches(data, BATCH):
        found = [torch.from_numpy(each)[None] for each in run(summed(images, model).numpy())]
        names = [*heads(model(summed(images[:1], model).to(device_of(model))))]
        tally.add(dict(zip(names, found, strict=True)) if names != [""] else found[0], images, labels, None)
    assert tally.tasks is not None
    return {"n": tally.seen, "accuracy": next(iter(tally.scores().values())), "metric": tally.tasks.first.metric}
