"""Folders of images as they come: every kind of file, small folders, layouts, and what is refused in one line."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import qsnn
from qsnn.data.fitting import describe, fitted
from qsnn.data.folders import GREY_MEAN, MEAN, FolderSet
from qsnn.data.images import split_by_class
from qsnn.data.pixels import full_scale, read_header, read_pixels
from qsnn.data.sources import load_recorded
from qsnn.graph.recipe import data_recipe

RAMP = np.linspace(0, 1, 24 * 24).reshape(24, 24)


def write(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


def tree(root: Path, pixels: dict[str, np.ndarray], count: int = 6, ending: str = "png") -> Path:
    for name, array in pixels.items():
        for i in range(count):
            write(root / name / f"{i}.{ending}", array)
    return root


def grey(count: int = 6, root: Path | None = None, **options: object) -> Path:
    assert root is not None
    random = np.random.RandomState(0)
    return tree(root, {name: random.randint(0, 256, (8, 8)).astype(np.uint8) for name in ("a", "b")}, count)


# ---- laws


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), fraction=st.floats(0.02, 0.9), seed=st.integers(0, 5)
)
def test_every_class_is_split_alike(counts: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    if max(counts) == 1:
        with pytest.raises(ValueError, match="more items than classes"):
            split_by_class(labels, fraction, seed)
        return
    keep, out = split_by_class(labels, fraction, seed)
    assert sorted([*keep, *out]) == list(range(len(labels))) and len(out)
    kept, held = (np.bincount(labels[part], minlength=len(counts)) for part in (keep, out))
    assert (kept >= 1).all()
    for count, h in zip(counts, held, strict=True):
        assert abs(h - count * fraction) <= 1 or (h == 1 and count * fraction < 1), (count, h)
        assert h >= 1 or count < 3


@pytest.mark.parametrize("top", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_every_value(top: int, ending: str, tmp_path: Path) -> None:
    ramp = np.round(RAMP * top).astype(np.uint16)
    path = write(tmp_path / f"x.{ending}", ramp)
    assert read_header(str(path)).deep and full_scale([str(path)]) == top
    pixels = read_pixels(str(path), channels=3, full_scale=top)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 24, 24)
    assert torch.equal((pixels[1] * (top / 255)).round(), torch.from_numpy(ramp.astype(np.float32)))
    scaled = read_pixels(str(path), channels=1, size=(12, 12), full_scale=top)
    assert scaled.min() >= 0 and scaled.max() <= 255 and len(scaled.unique()) > 100


def test_floats_from_0_to_1(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tif", RAMP.astype(np.float32))
    torch.testing.assert_close(read_pixels(str(path), channels=1)[0], torch.from_numpy(RAMP * 255).float())
    for bad in (RAMP * 2, RAMP - 1, np.where(RAMP > 0.5, np.nan, RAMP)):
        write(path, bad.astype(np.float32))
        with pytest.raises(ValueError, match=r"x\.tif, cannot read it \(expected floats from 0 to 1, got "):
            read_pixels(str(path), channels=1)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[0] = (10, 20, 30, 255)
    rgba[1] = (0, 0, 0, 128)
    expected = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    expected[:, 0] = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None]
    expected[:, 1] = 127
    assert torch.equal(read_pixels(str(write(tmp_path / "a.png", rgba)), channels=3), expected)
    la = write(tmp_path / "la.png", rgba[..., [0, 3]])
    assert read_header(str(la)).grey and read_header(str(la)).alpha
    assert read_pixels(str(la), channels=1)[0, :, 0].tolist() == [10, 127, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_pixels(str(tmp_path / "p.png"), channels=3).flatten(1).T.tolist() == [[255] * 3, [200, 100, 50]]
    Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    assert (read_pixels(str(tmp_path / "key.png"), channels=3) == 255).all()


def test_cmyk_palettes_bits_and_animations(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    red = read_pixels(str(tmp_path / "c.jpg"), channels=3).float().mean((1, 2))
    assert red[0] > 240 and red[1] < 20 and red[2] < 20
    Image.new("1", (4, 4), 1).save(tmp_path / "b.png")
    assert read_header(str(tmp_path / "b.png")).grey
    assert (read_pixels(str(tmp_path / "b.png"), channels=1) == 255).all()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for name in ("x.gif", "x.png", "x.webp", "x.tif"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert read_header(str(tmp_path / name)).animated, name
        assert read_pixels(str(tmp_path / name), channels=3)[:, 0, 0].tolist() == [200, 0, 0], name
    shades = Image.new("P", (4, 4))
    shades.putpalette([i for i in range(256) for _ in range(3)])
    shades.save(tmp_path / "s.png")
    assert read_header(str(tmp_path / "s.png")).grey


def test_what_is_taken_otherwise_is_said_once(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a": np.round(RAMP * 4095).astype(np.uint16), "b": np.zeros((24, 24, 4), np.uint8)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = qsnn.load_data(root)
        list(qsnn.batches(data.train))
    assert [w.category for w in said] == [qsnn.QsnnWarning]
    text = str(said[0].message)
    assert "6 of 12 images are of 16 or 32 bits: 4095 is white; 6 of 12 images are with transparency" in text


def test_colours_of_16_bits_are_halved_and_it_is_said(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    values = np.linspace(0, 65535, 16 * 16 * 3).reshape(16, 48).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.warns(qsnn.QsnnWarning, match="6 of 6 images are of 16 bits a colour: the upper 8 are kept"):
        qsnn.load_data(tmp_path)
    pixels = read_pixels(str(path), channels=3).permute(1, 2, 0).reshape(16, 48)
    assert torch.equal(pixels, torch.from_numpy((values >> 8).astype(np.uint8)))


def test_the_same_image_gives_the_same_bytes_as_before(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (6, 7, 3)).astype(np.uint8)
    path = write(tmp_path / "x.png", pixels)
    assert torch.equal(read_pixels(str(path), channels=3), torch.from_numpy(pixels).permute(2, 0, 1))


# ---- channels


def test_a_grey_folder_has_one_channel_or_what_the_network_takes(tmp_path: Path) -> None:
    data = qsnn.load_data(grey(root=tmp_path))
    assert data.shape == (1, 8, 8) and data.mean == GREY_MEAN and data.train.black.shape == (1, 1, 1)  # type: ignore[attr-defined]
    three = qsnn.load_data(tmp_path, channels=3)
    assert three.shape == (3, 8, 8) and three.mean == MEAN
    for channels in (1, 3):
        net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(144, 2))
        for found in (data, three):
            assert fitted(found, net).shape == (channels, 8, 8)
    for found in (data, three):
        again = load_recorded(data_recipe(found), found.shape)
        assert again.shape == found.shape and again.mean == found.mean
        assert torch.equal(again.train[0][0], found.train[0][0])
    own = qsnn.load_data(tmp_path, mean=(0.5,), std=(0.25,))
    assert own.mean == (0.5,) and load_recorded(data_recipe(own), own.shape).mean == (0.5,)
    assert qsnn.load_data(tmp_path, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)).shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"does not take the images .* takes 3 channels, the data has 1"):
        fitted(own, nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_colours_are_not_thrown_away(tmp_path: Path) -> None:
    tree(tmp_path, {name: np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8) for name in "ab"})
    data = qsnn.load_data(tmp_path)
    assert data.shape == (3, 8, 8)
    with pytest.raises(ValueError, match=r"does not take .*first convolution takes 1 channels, the data has 3"):
        fitted(data, nn.Sequential(nn.Conv2d(1, 4, 3)))
    assert fitted(qsnn.load_data(tmp_path, channels=1), nn.Sequential(nn.Conv2d(1, 4, 3))).shape == (1, 8, 8)
    with pytest.raises(ValueError, match=r"gives 1 outputs, .* has 3 classes \(a, b, c, .*give its last layer 3"):
        fitted(
            qsnn.load_data(tree(tmp_path / "c", {n: np.zeros((8, 8, 3), np.uint8) for n in "abc"})),
            nn.Sequential(nn.Flatten(), nn.Linear(192, 1)),
        )


# ---- layouts


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation"), ("TRAIN", "valid", "testing")])
def test_parts_in_other_spellings(names: tuple[str, ...], tmp_path: Path) -> None:
    for part in names:
        grey(3, tmp_path / part)
    data = qsnn.load_data(tmp_path)
    assert data.classes == ("a", "b") and len(data.train) + len(data.val) + len(data.test) == 6 * len(names)  # type: ignore[arg-type]


def test_hidden_folders_and_files_are_no_class(tmp_path: Path) -> None:
    grey(4, tmp_path)
    hidden = (".git/x.png", "__MACOSX/a/._0.png", ".ipynb_checkpoints/0.png", "a/._1.png", "a/Thumbs.db", "a/.x/1.png")
    for odd in hidden:
        (tmp_path / odd).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / odd).write_bytes(b"no image")
    data = qsnn.load_data(tmp_path)
    assert data.classes == ("a", "b") and len(data.train) + len(data.val) + len(data.test) == 8  # type: ignore[arg-type]


def test_links_are_followed_once(tmp_path: Path) -> None:
    grey(4, tmp_path / "set")
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "set" / "b")
    data = qsnn.load_data(tmp_path / "set")
    assert data.classes == ("a", "b", "c") and len(data.train) + len(data.val) + len(data.test) == 12  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classes", "count", "sizes"), [(2, 2, (2, 1, 1)), (5, 2, (8, 1, 1)), (5, 3, (9, 1, 5)), (2, 10, (16, 2, 2))]
)
def test_small_folders(classes: int, count: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    names = [f"class {c}" for c in range(classes)]
    tree(tmp_path, {n: np.full((8, 8, 3), i, np.uint8) for i, n in enumerate(names)}, count)
    data = qsnn.load_data(tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == sizes  # type: ignore[arg-type]
    assert {label for _, label in data.train} == set(range(classes))


def test_rare_classes_are_in_every_part(tmp_path: Path) -> None:
    tree(tmp_path, {"many": np.zeros((8, 8), np.uint8)}, 60)
    tree(tmp_path, {"few": np.zeros((8, 8), np.uint8)}, 4)
    data = qsnn.load_data(tmp_path)
    for part in (data.train, data.val, data.test):
        assert isinstance(part, FolderSet) and set(part.labels.tolist()) == {0, 1}
    text = describe(data)
    assert "classes are imbalanced: many has 24.0 times the items of few; always answering many would be right" in text


# ---- refusals


def test_too_few_images_are_counted(tmp_path: Path) -> None:
    for classes, count in ((2, 1), (3, 1), (1, 2)):
        root = tmp_path / f"{classes}x{count}"
        tree(root, {f"{c}": np.zeros((8, 8), np.uint8) for c in range(classes)}, count)
        with pytest.raises(ValueError, match=r"expected an image of each class to train on and more to .*add images"):
            qsnn.load_data(root)


def test_folders_that_are_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for folder in (Path("/"), tmp_path):
        with pytest.raises(ValueError, match="is a whole disk or home; give the images' own"):
            qsnn.load_data(folder)
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat" / "0.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"expected CLASS/\*\.png in .*flat, got: 1 images without a class"):
        qsnn.load_data(tmp_path / "flat")
    (tmp_path / "flat" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"got: no image in empty/"):
        qsnn.load_data(tmp_path / "flat")
    monkeypatch.setattr("qsnn.data.folders._OTHER_FILES", 20)
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    for i in range(30):
        (tmp_path / "usr" / "lib" / f"{i}.so").touch()
    with pytest.raises(ValueError, match=r"lib holds 30 other files and 0 images so far; give the folder"):
        qsnn.load_data(tmp_path / "usr")


def test_bombs_and_single_pixels(tmp_path: Path) -> None:
    grey(4, tmp_path)
    for size in ((20_000, 20_000), (12_000, 8_000)):  # Pillow refuses the first and warns of the second
        Image.new("1", size).save(tmp_path / "a" / "bomb.png")
        with pytest.raises(ValueError, match=r"expected an image in .*bomb\.png, cannot read it \(.*pixels") as caught:
            qsnn.load_data(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "a" / "bomb.png").unlink()
    write(tmp_path / "b" / "dot.png", np.zeros((1, 1), np.uint8))
    with pytest.raises(ValueError, match=r"dot\.png, cannot read it \(it is a single pixel\)"):
        qsnn.load_data(tmp_path)


def test_a_file_that_is_cut_is_named(tmp_path: Path) -> None:
    grey(4, tmp_path)
    path = write(tmp_path / "a" / "9.png", np.random.RandomState(0).randint(0, 65536, (64, 64)).astype(np.uint16))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"expected an image in .*9\.png, cannot read it"):
        list(qsnn.batches(qsnn.load_data(tmp_path).train))


def test_options_that_fit_nothing(tmp_path: Path) -> None:
    grey(4, tmp_path)
    for options, message in (
        ({"mean": (0.5, 0.5), "std": (0.5, 0.5)}, "mean and std of 1 channel"),
        ({"mean": (0.5,), "std": (0.5, 0.5, 0.5)}, "mean and std of 1 channel"),
        ({"std": (0.0,)}, "finite mean and std > 0"),
        ({"mean": (float("nan"),)}, "finite mean and std > 0"),
        ({"channels": 2}, "channels=1 or 3"),
        ({"image_size": (4, 4, 4)}, "image_size >= 1 pixel"),
    ):
        with pytest.raises(ValueError, match=message):
            qsnn.load_data(tmp_path, **options)  # type: ignore[arg-type]
    assert qsnn.load_data(tmp_path, image_size=(4, 6)).shape == (1, 4, 6)
    with pytest.raises(ValueError, match="counts of events"):
        qsnn.load_data("nmnist", mean=(0.5,))
    named = qsnn.load_data("digits", mean=(0.5,), std=(0.25,))
    assert named.mean == (0.5,)
