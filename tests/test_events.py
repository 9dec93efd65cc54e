"""Event sets: no event is lost, a subset on the disk is used, the spiking network sees frames, the others their sum."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qsnn
from qsnn.cli.main import main
from qsnn.data.events import FrameSet, to_frames

pytestmark = pytest.mark.filterwarnings("ignore")  # of what tonic imports
SENSOR = (34, 34, 2)
KIND = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])
needs_tonic = pytest.mark.skipif(find_spec("tonic") is None, reason="tonic is missing: pip install 'qsnn[events]'")


def recording(n: int, seed: int = 0) -> np.ndarray:
    draw = np.random.RandomState(seed)
    events = np.zeros(n, dtype=KIND)
    events["x"], events["y"] = draw.randint(0, 34, (2, n))
    events["t"], events["p"] = np.sort(draw.randint(0, 300_000, n)), draw.randint(0, 2, n)
    return events


@given(n=st.integers(0, 300), timesteps=st.integers(1, 9), seed=st.integers(0, 9))
def test_no_event_is_left_out(n: int, timesteps: int, seed: int) -> None:
    events = recording(n, seed)
    frames = to_frames(events, timesteps=timesteps, sensor=SENSOR)
    assert frames.shape == (timesteps, 2, 34, 34) and frames.sum() == n
    assert (to_frames(events, timesteps=timesteps, sensor=SENSOR, shrink=2).sum((2, 3)) == frames.sum((2, 3))).all()


def test_bins_are_equal_in_time_and_places_right() -> None:
    events = np.array([(1, 2, 100, True), (1, 2, 149, True), (3, 0, 150, False), (3, 0, 199, False)], dtype=KIND)
    frames = to_frames(events, timesteps=2, sensor=SENSOR)
    assert frames[0, 1, 2, 1] == 2 and frames[1, 0, 0, 3] == 2 and frames.sum() == 4


def frame_set(n: int = 32, timesteps: int = 4) -> FrameSet:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 4, (n, timesteps, 2, 8, 8), generator=generator, dtype=torch.uint8)
    return FrameSet(counts, torch.arange(n) % 10, 2.0)


def data_of(frames: FrameSet) -> qsnn.Data:
    return qsnn.Data(
        name="frames", train=frames, val=frames, test=frames, mean=frames.mean, std=frames.std,
        classes=tuple("0123456789"), augment="shift",
    )  # fmt: skip


def test_frames_average_to_their_sum() -> None:
    frames = frame_set()
    item, label = frames[3]
    assert item.shape == (4, 2, 8, 8) and label == 3
    assert torch.allclose(item.mean(0), frames.images[3].float().sum(0) / 2.0)
    assert isinstance(frames.head(3), FrameSet) and len(frames.subset([1, 2])) == 2
    with pytest.raises(ValueError, match="uint8 counts of shape"):
        FrameSet(frames.images.float(), frames.labels, 1.0)


def test_all_frames_move_together() -> None:
    moved, _ = next(qsnn.batches(frame_set(), 8, generator=torch.Generator().manual_seed(0), augment="shift"))
    still, _ = next(qsnn.batches(frame_set(), 8, generator=torch.Generator().manual_seed(0)))
    assert moved.shape == still.shape and not torch.equal(moved, still)
    image = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    image[..., 4, 4] = 1
    same = FrameSet(image.repeat(16, 1, 1, 1, 1), torch.zeros(16, dtype=torch.int64), 1.0)
    frames, _ = next(qsnn.batches(same, 16, generator=torch.Generator().manual_seed(0), augment="shift"))
    assert torch.equal(frames, frames[:, :1].expand_as(frames))


def test_the_whole_flow_in_time(tmp_path: Path) -> None:
    data = data_of(frame_set(64))
    assert data.shape == (2, 8, 8) and data.frames == 4
    teacher = qsnn.create_model("study", data)
    qsnn.fit(teacher, data, qsnn.TrainConfig(epochs=1, batch_size=16))
    qann = qsnn.quantize(teacher, data)
    qsnn.fit(qann, data, qsnn.TrainConfig(epochs=1, batch_size=16), teacher=teacher)
    snn = qsnn.convert(qann)
    assert qsnn.certify(snn, qann, data.test).exact, "of the sum, which both see"
    student = qsnn.distill(snn, qann, data, qsnn.DistillConfig(timesteps=4, epochs=1, batch_size=16))
    frames = next(qsnn.batches(data.test, 8))[0]
    assert student(frames).shape == (4, 8, 10)
    folded = qsnn.fold(student)
    assert torch.allclose(folded(frames), student.double()(frames.double()), atol=1e-6)
    shuffled = frames[:, [2, 0, 3, 1]]
    assert not torch.equal(folded(shuffled), folded(frames)), "the order of the frames matters"
    result = qsnn.benchmark(folded, data.test, timesteps=4, reference=qann)
    assert result.timesteps == (1, 2, 3, 4) and result.synops > 0
    qsnn.save(student.float(), tmp_path / "student.safetensors")
    assert qsnn.read_recipe(tmp_path / "student.safetensors")["data"]["frames"] == 4
    with pytest.raises(ValueError, match="at least 5 frames"):
        student(frames, timesteps=5)


def test_a_static_image_is_frames_that_repeat() -> None:
    data = data_of(frame_set())
    snn = qsnn.convert(qsnn.quantize(qsnn.create_model("study", data), data))
    image = torch.rand(3, 2, 8, 8)
    for network in (snn.eval(), qsnn.fold(snn)):
        frames = image.unsqueeze(1).expand(-1, 3, -1, -1, -1)
        assert torch.allclose(network(frames), network(image, timesteps=3), atol=1e-6)


@needs_tonic
def test_dvs_gesture_in_its_own_format(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    for part, users in (("Train", ("user01", "user02")), ("Test", ("user24",))):
        for user in users:
            folder = tmp_path / "DVSGesture" / f"ibmGesture{part}" / f"{user}_led"
            folder.mkdir(parents=True)
            for label in range(11):
                x, y = draw.randint(0, 128, (2, 50))
                rows = np.stack([x, y, draw.randint(0, 2, 50), np.sort(draw.randint(0, 900, 50))], 1)  # x, y, p, t [ms]
                np.save(folder / f"{label}.npy", rows)
    data = qsnn.load_data("dvsgesture", root=tmp_path, timesteps=3)
    assert data.shape == (2, 32, 32) and data.frames == 3 and data.num_classes == 11
    assert len(data.train) + len(data.val) == 22 and len(data.test) == 11  # type: ignore[arg-type]
    assert (data.test.images.flatten(1).sum(1) == 50).all()  # type: ignore[attr-defined]
    assert sorted(data.test.labels.tolist()) == list(range(11))  # type: ignore[attr-defined]


@needs_tonic
def test_no_recordings_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tonic.datasets import NMNIST

    def download(*args: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(NMNIST, "download", download)
    with pytest.raises(SystemExit) as left:
        main(["train", "--data", "nmnist", "--data-root", str(tmp_path), "--out", str(tmp_path / "a")])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "NMNIST/Train/{0..9}/*.bin" in said and said.count("\n") == 1


def test_options_of_events_elsewhere() -> None:
    with pytest.raises(ValueError, match="timesteps with an event set only"):
        qsnn.load_data("digits", timesteps=3)
    with pytest.raises(ValueError, match="at least 1"):
        qsnn.load_data("nmnist", timesteps=0)


@needs_tonic
@pytest.mark.skipif("QSNN_DATA" not in os.environ, reason="the recordings are not here: set QSNN_DATA")
def test_the_real_recordings() -> None:
    data = qsnn.load_data("nmnist", timesteps=3)
    assert data.shape == (2, 34, 34) and data.frames == 3
    again = qsnn.load_data("nmnist", timesteps=3)
    assert torch.equal(data.train.images, again.train.images)  # type: ignore[attr-defined]
    counts = torch.bincount(data.test.labels, minlength=10)  # type: ignore[attr-defined]
    assert (counts > 0).all()
    assert isinstance(qsnn.create_model("study", data), nn.Module)


# ---- damaged recordings


def packed(count: int, seed: int) -> bytes:
    """A recording as N-MNIST stores it: 5 bytes an event, x, y, polarity and 23 bits of time."""
    events = recording(count, seed)
    raw = np.zeros((count, 5), dtype=np.uint8)
    raw[:, 0], raw[:, 1] = events["x"], events["y"]
    raw[:, 2] = (events["p"].astype(int) << 7) | (events["t"] >> 16)
    raw[:, 3], raw[:, 4] = (events["t"] >> 8) & 255, events["t"] & 255
    return raw.tobytes()


def nmnist(root: Path, damage: dict[str, bytes], classes: int = 10) -> Path:
    for part in ("Train", "Test"):
        for digit in range(classes):
            folder = root / "NMNIST" / part / str(digit)
            folder.mkdir(parents=True)
            for i in range(3):
                name = f"{part}/{digit}/{i:05d}.bin"
                (root / "NMNIST" / name).write_bytes(damage.get(name, packed(1000, 10 * digit + i)))
    return root


DAMAGES = {
    "cut": packed(1000, 0)[:2503],
    "empty": b"",
    "overwritten": np.random.RandomState(0).bytes(5000),
    "outside": b"\xc8\x01\x00\x00\x01" * 50,
}


@needs_tonic
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_recording_is_named_and_left_out(damage: str, tmp_path: Path) -> None:
    root = nmnist(tmp_path / "event data é", {"Train/3/00001.bin": DAMAGES[damage]})
    for _ in range(2):  # the second time from the kept frames
        with pytest.warns(qsnn.QsnnWarning, match=r"1 damaged recordings in .* out: .*Train.3.00001\.bin \(.*copy"):
            data = qsnn.load_data("nmnist", root=root, timesteps=3)
        labels = torch.cat([data.train.labels, data.val.labels])  # type: ignore[attr-defined]
        assert labels.bincount().tolist() == [3, 3, 3, 2, 3, 3, 3, 3, 3, 3] and len(data.test) == 30  # type: ignore[arg-type]
        for part in (data.train, data.val, data.test):
            assert (part.images.flatten(1).sum(1) == 1000).all()  # type: ignore[attr-defined]


@needs_tonic
def test_a_class_of_damaged_recordings_is_refused(tmp_path: Path) -> None:
    root = nmnist(tmp_path, {f"Test/7/{i:05d}.bin": b"" for i in range(3)})
    with pytest.raises(ValueError, match=r"every class of nmnist .*of class 7 are all damaged: .*00000\.bin \(it"):
        qsnn.load_data("nmnist", root=root, timesteps=3)


@needs_tonic
def test_damaged_gestures(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    for part in ("Train", "Test"):
        for user in ("user01", "user02"):
            folder = tmp_path / "DVSGesture" / f"ibmGesture{part}" / f"{user}_led"
            folder.mkdir(parents=True)
            for label in range(11):
                x, y = draw.randint(0, 128, (2, 50))
                rows = np.stack([x, y, draw.randint(0, 2, 50), np.sort(draw.randint(0, 900, 50))], 1)
                np.save(folder / f"{label}.npy", rows)
    cut = tmp_path / "DVSGesture" / "ibmGestureTrain" / "user01_led" / "4.npy"
    cut.write_bytes(cut.read_bytes()[:500])
    np.save(cut.with_name("5.npy"), np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    with pytest.warns(qsnn.QsnnWarning, match=r"2 damaged recordings.*user01_led.[45]\.npy.*user01_led.[45]\.npy"):
        data = qsnn.load_data("dvsgesture", root=tmp_path, timesteps=2)
    assert len(data.train) + len(data.val) == 20  # type: ignore[arg-type]
