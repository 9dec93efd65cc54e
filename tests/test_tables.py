"""Arrays as data: vectors, signals and images, with classes or numbers; files of arrays; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import qsnn
from qsnn.data.tables import TableSet

ROWS = np.random.RandomState(0).randn(200, 6) * [1, 10, 0.1, 3, 1, 0] + [0, 5, 0, -2, 0, 7]
CLASSES = np.arange(200) % 4


def parts(data: qsnn.Data) -> tuple[Any, Any, Any]:
    return data.train, data.val, data.test


# ---- laws


def test_every_row_is_in_one_part_and_each_class_alike() -> None:
    data = qsnn.from_arrays(ROWS, CLASSES)
    assert repr(data) == "Data(arrays: 160 train, 20 val, 20 test vectors of 6, 4 classes)"
    assert data.shape == (6,) and data.frames is None and data.classes == ("0", "1", "2", "3")
    seen = torch.cat([part.images for part in parts(data)])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, torch.tensor(ROWS).float().tolist()))
    for part, count in zip(parts(data), (40, 5, 5), strict=True):
        assert torch.bincount(part.labels).tolist() == [count] * 4
    again, other = qsnn.from_arrays(ROWS, CLASSES), qsnn.from_arrays(ROWS, CLASSES, seed=1)
    assert torch.equal(again.val.images, data.val.images)  # type: ignore[attr-defined]
    assert torch.equal(other.test.images, data.test.images)  # type: ignore[attr-defined]
    assert not torch.equal(other.val.images, data.val.images)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(6,), (3, 10), (3, 5, 5)])
def test_features_and_channels_are_normalised_by_the_training_part(shape: tuple[int, ...]) -> None:
    random = np.random.RandomState(1)
    scale = np.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    data = qsnn.from_arrays(random.randn(200, *shape) * scale + scale, CLASSES)
    x, y = next(qsnn.batches(data.train, 1000))
    assert x.shape == (160, *shape) and x.dtype == torch.float32 and y.dtype == torch.int64
    flat = x.transpose(0, 1).flatten(1)
    assert flat.mean(1).abs().max() < 1e-5 and (flat.std(1, correction=0) - 1).abs().max() < 1e-5
    item, label = data.train[3]
    assert torch.equal(item, x[3]) and label == int(y[3]) and data.shape == shape


def test_every_way_of_giving_the_same_is_the_same() -> None:
    want = qsnn.from_arrays(ROWS, CLASSES)
    ways: list[Any] = [
        (torch.tensor(ROWS), torch.tensor(CLASSES)),
        (TensorDataset(torch.tensor(ROWS), torch.tensor(CLASSES)), None),
        (ROWS.astype(np.float32), CLASSES.astype(np.uint8)[:, None]),
        (ROWS.tolist(), CLASSES.tolist()),
    ]
    for x, y in ways:
        got = qsnn.from_arrays(x, y)
        for a, b in zip(parts(got), parts(want), strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_batches_of_numpy_arrays() -> None:
    ((x, y),) = qsnn.batches([(ROWS, CLASSES)])
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and torch.equal(x, torch.tensor(ROWS).float())
    whole = qsnn.batches(TensorDataset(torch.tensor(ROWS), torch.tensor(CLASSES)), 64)
    assert torch.equal(torch.cat([part for part, _ in whole]), x)


def test_numbers_to_predict_stay_numbers() -> None:
    data = qsnn.from_arrays(ROWS[:, :5], ROWS[:, 5:] + ROWS[:, :1])
    assert data.classes == () and repr(data).endswith("vectors of 5, numbers to predict)")
    _, y = next(qsnn.batches(data.train, 50))
    assert y.shape == (50, 1) and y.dtype == torch.float32 and isinstance(data.train, TableSet)
    assert data.train[0][1].shape == (1,)
    single = qsnn.from_arrays(ROWS, ROWS[:, 0])
    assert next(qsnn.batches(single.train, 50))[1].shape == (50,)


def test_bytes_are_images() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    data = qsnn.from_arrays(pixels, np.arange(40) % 2, classes=("cat", "dog"))
    assert data.shape == (3, 8, 8) and data.classes == ("cat", "dog")
    channels_first = qsnn.from_arrays(pixels.transpose(0, 3, 1, 2), np.arange(40) % 2)
    assert torch.equal(data.train[0][0], channels_first.train[0][0])
    assert qsnn.from_arrays(pixels[..., 0], np.arange(40) % 2).shape == (1, 8, 8)
    x, _ = next(qsnn.batches(data.train, 40))
    assert x.mean((0, 2, 3)).abs().max() < 1e-4


def test_a_network_on_vectors_goes_the_whole_way() -> None:
    random = np.random.RandomState(0)
    rows = random.randn(600, 12)
    data = qsnn.from_arrays(rows, (rows[:, :3].sum(1) > 0).astype(int))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))
    qsnn.fit(net, data, qsnn.TrainConfig(epochs=8, batch_size=32, lr=0.05))
    assert qsnn.accuracy(net, data.test) > 85
    qann = qsnn.quantize(net, data, qsnn.QuantizeConfig(weight_bits=4, levels=3))
    snn = qsnn.convert(qann, qsnn.ConvertConfig(timesteps=3, firing="deferred"))
    assert qsnn.certify(snn, qann, data.test).verdict.startswith("EXACT")
    assert qsnn.benchmark(qsnn.fold(snn), data.test, timesteps=3).n == len(data.test)  # type: ignore[arg-type]


# ---- files


def test_files_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=ROWS, y=CLASSES)
    assert qsnn.load_data(tmp_path / "a.npz").shape == (6,)
    assert len(qsnn.load_data(tmp_path / "a.npz", val_fraction=0.5).val) == 92  # type: ignore[arg-type]
    np.savez(tmp_path / "b.npz", x_train=ROWS, y_train=CLASSES, x_test=ROWS[:8], y_test=CLASSES[:8])
    data = qsnn.load_data(tmp_path / "b.npz")
    assert [len(part) for part in parts(data)] == [180, 20, 8]
    images = np.zeros((20, 28, 28, 3), np.uint8)
    named = {f"{p}_images": images for p in ("train", "val", "test")}
    labels = {f"{p}_labels": (np.arange(20) % 2).astype(np.uint8)[:, None] for p in ("train", "val", "test")}
    np.savez(tmp_path / "c.npz", **named, **labels)
    data = qsnn.load_data(tmp_path / "c.npz")
    assert [len(part) for part in parts(data)] == [20, 20, 20] and data.shape == (3, 28, 28)


class Touch:
    """Pickled, it would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([Touch(tmp_path / "touched")], dtype=object), y=CLASSES)
    with pytest.raises(ValueError, match=r"expected arrays in .*x\.npz, cannot read it"):
        qsnn.load_data(tmp_path / "x.npz")
    assert not (tmp_path / "touched").exists()
    np.savez(tmp_path / "x.npz", rows=ROWS, labels=CLASSES)
    with pytest.raises(ValueError, match=r"expected arrays x and y, .* got rows, labels"):
        qsnn.load_data(tmp_path / "x.npz")
    for content in (b"", b"PK\x03\x04 no zip", (tmp_path / "x.npz").read_bytes()[:300]):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"expected arrays in .*x\.npz, cannot read it"):
            qsnn.load_data(tmp_path / "x.npz")


# ---- refusals


def test_what_does_not_fit_together() -> None:
    holed = ROWS.copy()
    holed[17, 2] = np.nan
    refused: list[tuple[Any, str]] = [
        ((ROWS, CLASSES[:-1]), r"a class, a map or numbers for each in arrays, got \(200, 6\) and \(199,\)"),
        ((ROWS[0], CLASSES), r"got \(6,\) and \(200,\)"),
        ((ROWS, np.eye(4, dtype=int)[CLASSES]), r"got \(200, 6\) and \(200, 4\)"),
        ((holed, CLASSES), r"expected finite inputs in arrays, got NaN or inf, first in row 17"),
        ((ROWS, holed[:, 2]), r"expected finite targets in arrays, got NaN or inf, first in row 17"),
        ((ROWS, CLASSES - 1), r"expected classes 0 and up in arrays, got -1 to 2"),
        ((ROWS[:4], CLASSES[:4]), r"cannot hold out a test part of arrays: .*4 of 4 classes; pass test=\(inputs, targ"),
        ((ROWS, [str(c) for c in CLASSES]), r"expected arrays of numbers in arrays"),
        ((ROWS, None), r"expected inputs and targets in arrays, got ndarray"),
    ]
    for (x, y), message in refused:
        with pytest.raises(ValueError, match=message) as caught:
            qsnn.from_arrays(x, y)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"expected classes 0 to 1 in arrays, got 0 to 3"):
        qsnn.from_arrays(ROWS, CLASSES, classes=("a", "b"))
    with pytest.raises(ValueError, match=r"one shape and kind in every part of arrays"):
        qsnn.from_arrays(ROWS, CLASSES, test=(ROWS[:, :5], CLASSES))
    with pytest.raises(ValueError, match=r"0 < val_fraction < 1, got 0"):
        qsnn.from_arrays(ROWS, CLASSES, val_fraction=0)
    with pytest.raises(ValueError, match=r"mean and std of each feature or channel, got \(160, 6\), 160 .* 1 and 6"):
        qsnn.from_arrays(ROWS, CLASSES, mean=(0.0,))
