"""Folders of images with masks: every kind of mask, layouts, what is refused, and the way to an exact network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qsnn
from qsnn.cli.main import main
from qsnn.data.batches import batches
from qsnn.data.fitting import describe, fitted
from qsnn.data.images import IGNORED
from qsnn.data.masks import read_mask

RANDOM = np.random.RandomState(0)


def pair(root: Path, name: str, mask: np.ndarray, *, images: str = "images", masks: str = "masks") -> Path:
    picture = Image.fromarray(mask)
    width, height = picture.size
    for folder, content, ending in (
        (root / images, Image.fromarray(RANDOM.randint(0, 256, (height, width, 3)).astype(np.uint8)), "jpg"),
        (root / masks, picture, "png"),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        content.save(folder / f"{name}.{ending}")
    return root


def numbers(values: list[int], size: int = 8) -> np.ndarray:
    return np.resize(np.array(values, dtype=np.uint8), (size, size))


def squares(root: Path, count: int, size: int = 16) -> Path:
    """A bright square on noise; its mask is 0 and 255."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        mask = np.zeros((size, size), dtype=np.uint8)
        y, x = RANDOM.randint(1, size // 2, 2)
        mask[y : y + size // 2 - 1, x : x + size // 2 - 1] = 255
        image = np.clip(96 + 64 * (mask / 255 + 0.5 * RANDOM.randn(size, size)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    return root


# ---- laws


def test_every_way_to_store_the_same_numbers_reads_the_same(tmp_path: Path) -> None:
    values = numbers([0, 1, 2, 3])
    palette = Image.fromarray(values)
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    two_bits = palette.copy()
    forms = {
        "grey": (Image.fromarray(values), {}), "palette": (palette, {}), "short palette": (two_bits, {"bits": 2}),
        "16 bits": (Image.fromarray(values.astype(np.uint16)), {}),
        "three equal channels": (Image.fromarray(np.stack([values] * 3, -1)), {}),
    }  # fmt: skip
    for name, (image, options) in forms.items():
        assert image.mode != "P" or name.endswith("palette")
        image.save(tmp_path / f"{name}.png", **options)
        assert (read_mask(str(tmp_path / f"{name}.png")) == values).all(), name
    for name, image in {"bits": Image.fromarray(values > 1), "bytes": Image.fromarray(values // 2 * 255)}.items():
        image.convert("1" if name == "bits" else "L").save(tmp_path / f"{name}.png")
        assert (read_mask(str(tmp_path / f"{name}.png")) == 255 * (values > 1)).all(), name


def test_a_mask_is_scaled_and_cut_as_its_image_is(tmp_path: Path) -> None:
    mask = np.kron(RANDOM.randint(0, 2, (5, 8)), np.ones((8, 8))).astype(np.uint8) * 255  # 40 x 64, blocks of 8
    for i in range(10):
        Image.fromarray(mask).save((tmp_path / "masks").mkdir(exist_ok=True) or tmp_path / "masks" / f"{i}.png")
        Image.fromarray(mask).save((tmp_path / "images").mkdir(exist_ok=True) or tmp_path / "images" / f"{i}.png")
    data = qsnn.load_data(tmp_path, image_size=(20, 20), mean=(0.0,), std=(1.0,))
    image, label = data.train[0]
    assert image.shape == (1, 20, 20) and label.shape == (20, 20) and label.dtype == torch.int64
    assert ((image[0] > 0.5) == (label == 1)).float().mean() > 0.85, "but for the pixels between two blocks"


@pytest.mark.parametrize("augment", ["flip", "shift", "flip+shift"])
def test_a_map_moves_with_its_image(augment: str) -> None:
    labels = torch.from_numpy(RANDOM.randint(0, 5, (6, 8, 8)))
    source = torch.utils.data.TensorDataset(labels[:, None].float() + 1, labels)
    for seed in range(3):
        images, maps = next(batches(source, 6, augment=augment, generator=torch.Generator().manual_seed(seed)))
        border = images[:, 0] == 0  # an image has 1 to 5
        assert torch.equal(maps == IGNORED, border) and torch.equal(images[:, 0][~border], maps[~border].float() + 1)
        assert "shift" in augment or not border.any()


@pytest.mark.parametrize("layout", ["{}", "{}/{}", "{1}/{0}"])
def test_layouts(layout: str, tmp_path: Path) -> None:
    for part in ("train", "test") if layout != "{}" else ("",):
        for i in range(10):
            images, masks = (layout.format(part or kind, kind) for kind in ("imgs", "Masks"))
            pair(tmp_path, f"{part}{i}", numbers([0, i % 3, 255]), images=images, masks=masks)
    data = qsnn.load_data(tmp_path)
    sizes = [len(part) for part in (data.train, data.val, data.test)]  # type: ignore[arg-type]
    assert sizes == ([8, 1, 1] if layout == "{}" else [9, 1, 10]) and data.classes == ("0", "1", "2")
    image, label = data.train[0]
    assert image.shape == (3, 8, 8) and set(label.unique().tolist()) <= {0, 1, 2, IGNORED}
    assert len({path for part in (data.train, data.val, data.test) for path, _ in part.samples}) == sum(sizes)  # type: ignore[attr-defined]


def test_what_is_in_a_folder_is_said_in_one_line(tmp_path: Path) -> None:
    for i in range(4):
        pair(tmp_path / "a", str(i), numbers([0, 0, 0, 255]))
        pair(tmp_path / "b", f"{i}", numbers([0, 1, 2, 255]))
        (tmp_path / "b/masks" / f"{i}.png").rename(tmp_path / "b/masks" / f"{i}_mask.png")
    white = describe(qsnn.load_data(tmp_path / "a"))
    assert "2 train, 1 val, 1 test images with masks of 3x8x8, 2 classes" in white
    assert "masks: share of each class in the pixels: 0 75.0 %, 1 25.0 %; 0 is class 0, and 255 is class 1" in white
    assert "0 25.0 %, 1 25.0 %, 2 25.0 %; 25.0 % are 255 and count nowhere" in describe(qsnn.load_data(tmp_path / "b"))


# ---- what is refused


def test_what_does_not_fit_together_is_named(tmp_path: Path) -> None:
    def refused(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            qsnn.load_data(tmp_path)

    for i in range(5):
        pair(tmp_path, str(i), numbers([0, 1]))
    mask, image = tmp_path / "masks/3.png", tmp_path / "images/3.jpg"
    kept = mask.read_bytes()
    mask.unlink()
    refused(r"expected a mask of the same name in .*masks for .*images/3\.jpg, got none", FileNotFoundError)
    mask.write_bytes(kept)
    image.rename(tmp_path / "images/new.jpg")
    refused(r"a mask of the same name .*images/new\.jpg, got none", FileNotFoundError)
    (tmp_path / "images/new.jpg").unlink()
    refused(r"expected a image of the same name in .*images for .*masks/3\.png", FileNotFoundError)
    Image.new("RGB", (9, 8)).save(image)
    refused(r"of its image's size, 8x9 of .*images/3\.jpg, got 8x8 in .*masks/3\.png; scale it")
    pair(tmp_path, "3", numbers([0, 1]))
    Image.fromarray(np.stack([numbers([0, 9]), numbers([1, 2]), numbers([3])], -1)).save(mask)
    refused(r"class numbers in .*3\.png, got colours; save the class numbers as a grey or palette PNG")
    for values, shown in (
        ([0, 38, 75, 113], "0, 38, 75, 113"),
        ([0], "0"),
        (list(range(255)), "0, 1, 2, 3, 4, 5, ..."),
    ):
        for i in range(5):
            pair(tmp_path, str(i), numbers(values, 16))
        refused(rf"expected masks of class numbers .*got the values {shown}; write each class as its number")
    (tmp_path / "cats").mkdir()
    image.with_name("0.jpg").rename(tmp_path / "cats/0.jpg")
    refused(r"holds images with masks and also cats/ with images; if all are classes, rename images/")
    (tmp_path / "masks").rename(tmp_path / ".masks")
    (tmp_path / "cats").rename(tmp_path / ".cats")
    refused(r"expected masks/ beside images/ in ", FileNotFoundError)


def test_a_number_that_was_not_seen_and_a_jpeg_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(9):
        pair(tmp_path, str(i), numbers([0, 1] if i else [0, 7]))
    monkeypatch.setattr("qsnn.data.masks._SCANNED", 3)
    pair(tmp_path, "1", numbers([0, 9]))
    data = qsnn.load_data(tmp_path)
    assert data.num_classes == 8
    with pytest.raises(
        ValueError, match=r"expected a mask of 0 to 7, and 255 .*masks/1\.png, as the others are, got 9"
    ):
        for part in (data.train, data.val, data.test):
            list(batches(part, 4))
    Image.fromarray(numbers([0, 1])).save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg, got a JPEG, which changes numbers; save masks as PNG"):
        read_mask(str(tmp_path / "x.jpg"))


def test_a_network_that_does_not_answer_for_each_pixel_is_refused(tmp_path: Path) -> None:
    data = qsnn.load_data(squares(tmp_path, 10))
    with pytest.raises(ValueError, match=r"answers B x 2, the labels of .* want B x K x 16 x 16; build a network with"):
        fitted(data, qsnn.create_model("vgg-small", data))
    with pytest.raises(ValueError, match="sides are multiples of 4"):
        qsnn.create_model("unet", qsnn.load_data(tmp_path, image_size=10))


# ---- from a folder to an exact spiking segmentation


def test_a_folder_to_an_exact_folded_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = squares(tmp_path / "pairs", 30, 8), tmp_path / "teacher.safetensors"
    short = ["--epochs", "1", "--batch-size", "8", "--task", "segmentation"]
    main(["train", "--data", str(folder), "--model", "unet", "--out", str(file), *short])
    main(["info", str(folder)])
    said = capsys.readouterr().out
    assert "(validation mean IoU" in said and "images with masks of 1x8x8, 2 classes" in said
    assert qsnn.read_recipe(file)["task"] == "segmentation"
    data = qsnn.load_data(folder)
    qann = qsnn.quantize(qsnn.load(file), data)
    snn = qsnn.convert(qann)
    assert qsnn.certify(snn, qann, data.test).verdict == "EXACT"
    folded = qsnn.fold(qsnn.distill(snn, qann, data, qsnn.DistillConfig(epochs=1, batch_size=8)))
    qsnn.save(folded, tmp_path / "folded.safetensors")
    images = next(batches(data.test, 4))[0]
    assert torch.equal(qsnn.load(tmp_path / "folded.safetensors")(images), folded(images))
    assert 0 <= qsnn.accuracy(folded, data.test) <= 100
