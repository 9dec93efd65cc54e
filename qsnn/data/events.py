"""Recordings of event cameras as frames in time, read through tonic."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from qsnn.data.images import Data, ImageSet, hold_out
from qsnn.files import header, write_atomic
from qsnn.graph.arrived import QsnnWarning

_DAMAGED = "damaged"
"""Metadata of the kept frames: what was left out when they were made."""

# name: tonic's class, sensor (width, height, polarities), pixels each way that become one, classes, what lies where
EVENTS: dict[str, tuple[str, tuple[int, int, int], int, tuple[str, ...], str]] = {
    "nmnist": ("NMNIST", (34, 34, 2), 1, tuple("0123456789"), "NMNIST/Train/{0..9}/*.bin and NMNIST/Test/{0..9}/*.bin"),
    "dvsgesture": (
        "DVSGesture", (128, 128, 2), 4,
        (
            "hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter clockwise",
            "left arm clockwise", "left arm counter clockwise", "arm roll", "air drums", "air guitar", "other gestures",
        ),
        "DVSGesture/ibmGestureTrain/*/{0..10}.npy and DVSGesture/ibmGestureTest/*/{0..10}.npy",
    ),
}  # fmt: skip


class FrameSet(ImageSet):
    r"""Labelled recordings as counts of events, one byte a pixel; an item is :math:`(T\,n / u, y)`.

    The mean over time of an item is the summed frame :math:`\sum_t n_t / u`, which a network without time sees.

    Args:
        images: events in each pixel of each frame, uint8.
        labels: class of each recording, int64.
        unit: u, events that make 1.
    Shape:
        images: (N, T, 2, H, W); labels: (N,); an item: (T, 2, H, W) float32 and an int.
    """

    def __init__(self, images: Tensor, labels: Tensor, unit: float) -> None:
        """Check and keep; nothing is copied."""
        if images.dtype != torch.uint8 or images.ndim != 5 or not len(images) or len(labels) != len(images):
            raise ValueError(
                f"expected uint8 counts of shape (N, T, 2, H, W) and as many labels, got {images.dtype} "
                f"{tuple(images.shape)} and {len(labels)}"
            )
        self.images, self.labels, self.unit = images, labels, unit
        self.mean, self.std = (0.0,) * images.shape[2], (unit,) * images.shape[2]

    def normalise(self, images: Tensor) -> Tensor:
        """Counts as a spiking network sees them: (..., T, 2, H, W) uint8 to float32."""
        return images.float() * (images.shape[-4] / self.unit)

    def _like(self, images: Tensor, labels: Tensor) -> FrameSet:
        return FrameSet(images, labels, self.unit)


def to_frames(events: np.ndarray, *, timesteps: int, sensor: tuple[int, int, int], shrink: int = 1) -> np.ndarray:
    """Add up the events of a recording into T frames of equal time; no event is left out.

    Args:
        events: structured, fields x, y [pixel], t [µs], p {0, 1}.
        timesteps: T >= 1.
        sensor: (width, height, polarities).
        shrink: so many pixels each way become one.
    Shape:
        events: (N,); returns (T, 2, H, W) counts, at most 255, uint8.
    """
    width, height, polarities = sensor
    frames = np.zeros((timesteps, polarities, height // shrink, width // shrink), dtype=np.int64)
    if len(events):
        t = events["t"].astype(np.int64) - int(events["t"].min())
        at = np.minimum(t * timesteps // (int(t.max()) + 1), timesteps - 1)
        place = (at, events["p"].astype(np.int64), events["y"] // shrink, events["x"] // shrink)
        np.add.at(frames, tuple(np.asarray(i, dtype=np.int64) for i in place), 1)
    return frames.clip(0, 255).astype(np.uint8)


def check_events(events: np.ndarray, sensor: tuple[int, int, int]) -> None:
    """Refuse a recording that no sensor of this size can have made.

    Args:
        events: structured, fields x, y [pixel], t [µs], p {0, 1}.
        sensor: (width, height, polarities).
    Raises:
        ValueError: no events, or some outside the sensor or before the start of time.
    """
    if not len(events):
        raise ValueError("it holds no events")
    for field, most in zip(("x", "y", "p"), sensor, strict=True):
        low, high = int(events[field].min()), int(events[field].max())
        if low < 0 or high >= most:
            raise ValueError(f"expected {field} from 0 to {most - 1}, got {low} to {high}")
    if int(events["t"].min()) < 0:
        raise ValueError(f"expected times of at least 0 µs, got {int(events['t'].min())}")


def load_events(name: str, root: Path, timesteps: int, val_fraction: float | None, seed: int) -> Data:
    """Load an event set as T frames a recording; called by :func:`qsnn.load_data`.

    The frames are kept in ``root/frames``, or where that cannot be written in ~/.cache/qsnn/frames, under a name that
    follows from the files they were made of. A part of the recordings on the disk is used as it is; damaged ones are
    left out, and named in a warning each time.

    Raises:
        ValueError: timesteps < 1, or every recording of a class is damaged.
        ImportError: tonic is not installed.
        FileNotFoundError: no recordings there, and none can be downloaded.
    """
    if not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps must be a whole number of at least 1, got {timesteps!r}")
    class_name, sensor, shrink, classes, layout = EVENTS[name]
    parts = {}
    for train in (True, False):
        source = _source(class_name, root, train, name, layout)
        frames, labels = _cached(name, root, source, timesteps, sensor, shrink)
        parts[train] = frames, labels
    unit = float(parts[True][0].float().sum(1).std()) or 1.0
    everything, test = (FrameSet(*parts[train], unit) for train in (True, False))
    kept, out = hold_out(len(everything), round(len(everything) * (val_fraction or 0.1)), seed)
    return Data(
        name=name, train=everything.subset(kept), val=everything.subset(out), test=test,
        mean=everything.mean, std=everything.std, classes=classes, augment="shift",
    )  # fmt: skip


def _source(class_name: str, root: Path, train: bool, name: str, layout: str) -> Any:
    """tonic's data set; what is on the disk is taken as it is, and only where there is nothing it is downloaded."""
    try:
        import tonic.datasets
    except ImportError as error:
        raise ImportError(f"expected tonic, which reads {name}, to be installed: pip install 'qsnn[events]'") from error
    parent = getattr(tonic.datasets, class_name)
    folder = root / class_name
    pattern = {"NMNIST": ("Train" if train else "Test", "*/*.bin")}.get(
        class_name, (f"ibmGesture{'Train' if train else 'Test'}", "*/*.npy")
    )
    present = any((folder / pattern[0]).glob(pattern[1]))
    # tonic wants the archive and every file; its folder is the name of the class
    local = type(class_name, (parent,), {"_check_exists": lambda self: True}) if present else parent
    try:
        return local(str(root), train=train)
    except Exception as error:  # tonic, urllib and zipfile name no common class
        raise FileNotFoundError(
            f"expected {name} as {layout} in {root}, but nothing could be read there nor downloaded "
            f"({' '.join(str(error).split())[:200]}); put the files there, or set QSNN_DATA or --data-root"
        ) from error


def _cached(
    name: str, root: Path, source: Any, timesteps: int, sensor: tuple[int, int, int], shrink: int
) -> tuple[Tensor, Tensor]:
    files = [(str(Path(file).relative_to(root)), Path(file).stat().st_size) for file in source.data]
    key = hashlib.sha256(repr((name, timesteps, sensor, shrink, sorted(files))).encode()).hexdigest()[:16]
    places = [folder / "frames" / f"{name}-{timesteps}-{key}.safetensors" for folder in (root, _cache())]
    for path in places:
        try:
            raw = path.read_bytes()
            found = load_tensors(raw)
            frames_and_labels = found["frames"], found["labels"]
        except (OSError, SafetensorError, KeyError):
            continue
        _say_damaged(root, json.loads(((header(raw) or {}).get("__metadata__") or {}).get(_DAMAGED, "{}")))
        return frames_and_labels
    frames, labels, damaged = [], [], {}
    for i, (file, _) in enumerate(files):
        try:
            events, label = source[i]
            check_events(events, sensor)
        except Exception as error:  # NumPy and tonic name no common class for a file that is cut or overwritten
            damaged[file] = " ".join(str(error).split())[:100]
            continue
        frames.append(to_frames(events, timesteps=timesteps, sensor=sensor, shrink=shrink))
        labels.append(int(label))
    _refuse_what_is_lost(name, root, damaged, labels, [int(label) for label in source.targets])
    tensors = {"frames": torch.from_numpy(np.stack(frames)), "labels": torch.tensor(labels)}
    for path in places:
        try:
            write_atomic(path, save_tensors(tensors, {_DAMAGED: json.dumps(damaged)}))
            break
        except OSError:
            continue
    _say_damaged(root, damaged)
    return tensors["frames"], tensors["labels"]


def _refuse_what_is_lost(name: str, root: Path, damaged: dict[str, str], kept: list[int], all_: list[int]) -> None:
    """A class of which every recording is damaged cannot be left out in silence."""
    lost = sorted(set(all_) - set(kept))
    if lost:
        raise ValueError(
            f"expected recordings of every class of {name} in {root}, those of class {', '.join(map(str, lost))} are "
            f"all damaged: {_named(damaged)}; copy them again"
        )


def _say_damaged(root: Path, damaged: dict[str, str]) -> None:
    if damaged:
        text = f"{len(damaged)} damaged recordings in {root} are left out: {_named(damaged)}; copy them again"
        warnings.warn(text, QsnnWarning, stacklevel=5)


def _named(damaged: dict[str, str]) -> str:
    first = [f"{file} ({why})" for file, why in list(damaged.items())[:3]]
    return ", ".join(first) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")


def _cache() -> Path:
    return Path("~/.cache/qsnn").expanduser()
