"""Data: laws of batches, augmentation and splits; the sizes of each set; every refusal."""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from qsnn.data.batches import AUGMENTS, batches, check_images
from qsnn.data.folders import FolderSet
from qsnn.data.images import Data, ImageSet
from qsnn.data.sources import load_data

law = settings(deadline=None, derandomize=True, max_examples=25)
real_data = pytest.mark.skipif("QSNN_DATA" not in os.environ, reason="set QSNN_DATA to a folder of the real sets")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(n: int, channels: int = 1, size: int = 8) -> ImageSet:
    """Random images whose label is their number."""
    images = torch.randint(0, 256, (n, channels, size, size), generator=rng(n), dtype=torch.uint8)
    mean, std = (0.3, 0.4, 0.5)[:channels], (0.2, 0.25, 0.3)[:channels]
    return ImageSet(images, torch.arange(n), mean, std)


class Items(Dataset[Any]):
    """The same items as an ImageSet, one at a time."""

    def __init__(self, data: ImageSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.data[i]


def image_tree(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog"), size: int = 6) -> Path:
    """PNGs of one grey each: parts maps a folder to its number of images a class."""
    for part, count in parts.items():
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (size, size), (100 * label + i,) * 3).save(root / part / name / f"{i}.png")
    return root


# ---- laws


@law
@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9), shuffled=st.booleans())
def test_every_image_comes_once_an_epoch(n: int, batch_size: int, seed: int, shuffled: bool) -> None:
    data = numbered(n)
    got = list(batches(data, batch_size, generator=rng(seed) if shuffled else None))
    labels = torch.cat([y for _, y in got])
    assert sorted(labels.tolist()) == list(range(n))
    assert shuffled or labels.tolist() == list(range(n))
    joined = shuffled and n % batch_size == 1 and 1 < batch_size < n  # batch norm needs two images
    assert len(got) == math.ceil(n / batch_size) - joined
    assert torch.equal(torch.cat([x for x, _ in got]), data.normalise(data.images[labels]))


@law
@given(augment=st.sampled_from(AUGMENTS), seed=st.integers(0, 99), channels=st.sampled_from([1, 3]))
def test_one_seed_gives_one_sequence_of_batches(augment: str, seed: int, channels: int) -> None:
    data, a, b = numbered(20, channels), rng(seed), rng(seed)
    for _ in range(2):  # two epochs of one generator
        for (x, y), (x2, y2) in zip(
            batches(data, 7, generator=a, augment=augment), batches(data, 7, generator=b, augment=augment), strict=True
        ):
            assert torch.equal(x, x2) and torch.equal(y, y2)
    first, second = (torch.cat([y for _, y in batches(data, 7, generator=a)]) for _ in range(2))
    assert not torch.equal(first, second)


@law
@given(shuffled=st.booleans(), augment=st.sampled_from(["none", "flip"]))
def test_a_dataset_of_items_gives_the_batches_of_its_image_set(shuffled: bool, augment: str) -> None:
    data = numbered(23, 3)
    options: list[dict[str, Any]] = [
        {"generator": rng(3) if shuffled or augment != "none" else None, "augment": augment} for _ in range(2)
    ]
    for (x, y), (x2, y2) in zip(batches(data, 5, **options[0]), batches(Items(data), 5, **options[1]), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert x.dtype == torch.float32 and y.dtype == torch.int64


def test_a_folder_is_shifted_like_its_image_set(tmp_path: Path) -> None:
    folder = load_data(image_tree(tmp_path, {"train": 5, "test": 1}, size=8)).train
    assert isinstance(folder, FolderSet)
    items = [folder[i] for i in range(len(folder))]
    mean, std = (torch.tensor(a).view(3, 1, 1) for a in (folder.mean, folder.std))
    pixels = torch.stack([((x * std + mean) * 255).round().to(torch.uint8) for x, _ in items])
    memory = ImageSet(pixels, torch.tensor([y for _, y in items]), folder.mean, folder.std)
    (x, y), (x2, y2) = (next(batches(d, 8, generator=rng(), augment="flip+shift")) for d in (folder, memory))
    assert torch.equal(x, x2) and torch.equal(y, y2)


@law
@given(st.lists(st.integers(0, 255), min_size=12, max_size=12))
def test_normalise_has_an_inverse(pixels: list[int]) -> None:
    data = numbered(1, 3)
    x = torch.tensor(pixels, dtype=torch.uint8).view(1, 3, 2, 2)
    mean, std = (torch.tensor(a).view(3, 1, 1) for a in (data.mean, data.std))
    assert torch.equal(((data.normalise(x) * std + mean) * 255).round().to(torch.uint8), x)


@pytest.mark.parametrize(("size", "shift"), [(8, 1), (28, 2), (32, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_images_are_flips_and_shifts_over_black(size: int, shift: int, channels: int) -> None:
    data = numbered(300, channels, size)
    black = data.normalise(torch.zeros(channels, 1, 1, dtype=torch.uint8))
    x, y = next(batches(data, 300, generator=rng(), augment="flip+shift"))
    seen = set()
    for image, label in zip(x, y, strict=True):
        source, found = data[int(label)][0], []
        for flipped in (False, True):
            canvas = black.expand(channels, size + 2 * shift, size + 2 * shift).clone()
            canvas[:, shift : shift + size, shift : shift + size] = source.flip(-1) if flipped else source
            for dy in range(2 * shift + 1):
                for dx in range(2 * shift + 1):
                    if torch.equal(image, canvas[:, dy : dy + size, dx : dx + size]):
                        found.append((flipped, dy, dx))
        assert len(found) == 1
        seen.add(found[0])
    if size < 32:  # of 162 variants at 32x32 300 images do not show every one
        assert len(seen) == 2 * (2 * shift + 1) ** 2


def test_no_augmentation_is_the_image_itself() -> None:
    data = numbered(9)
    for augment in (None, "none"):
        x, y = next(batches(data, 9, generator=rng(), augment=augment))
        assert torch.equal(x, data.normalise(data.images[y]))


def test_batches_leave_the_data_and_the_global_generator_alone() -> None:
    data, before = numbered(9), torch.get_rng_state()
    images = data.images.clone()
    for source in (data, Items(data)):
        list(batches(source, 4, generator=rng(), augment="flip+shift"))
    assert torch.equal(data.images, images) and torch.equal(torch.get_rng_state(), before)


def test_an_iterable_of_batches_passes_through() -> None:
    data = numbered(10)
    loader: DataLoader[Any] = DataLoader(data, batch_size=4)
    pairs = [(x, y.to(torch.uint8)) for x, y in loader]
    for source in (loader, pairs, iter(pairs)):
        got = list(batches(source))
        assert [len(x) for x, _ in got] == [4, 4, 2]
        assert torch.equal(torch.cat([x for x, _ in got]), data.normalise(data.images))
        assert all(y.dtype == torch.int64 for _, y in got)
    (x, _), *_ = batches(pairs, generator=rng(), augment="flip")
    assert not torch.equal(x, pairs[0][0]) and torch.equal(x.sort(-1).values, pairs[0][0].sort(-1).values)


def test_subset_and_head_choose_images() -> None:
    data = numbered(10)
    assert data.subset([7, 2, 2]).labels.tolist() == [7, 2, 2]
    assert data.subset(torch.tensor([5])).labels.tolist() == [5]
    assert data.subset(slice(8, None)).labels.tolist() == [8, 9]
    assert data.head(3).labels.tolist() == [0, 1, 2]
    assert len(data.head(99)) == 10
    image, label = data.subset([7])[0]
    assert label == 7 and torch.equal(image, data[7][0])


def test_the_seed_moves_the_validation_images_only() -> None:
    a, b, c = (load_data("digits", seed=seed) for seed in (0, 0, 1))
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(a, part).images, getattr(b, part).images)
    assert torch.equal(a.test.images, c.test.images)  # type: ignore[attr-defined]
    assert not torch.equal(a.val.images, c.val.images)  # type: ignore[attr-defined]


def test_a_folder_of_classes_is_split_without_overlap(tmp_path: Path) -> None:
    data, again = (load_data(image_tree(tmp_path / "set", {".": 20}) if i == 0 else tmp_path / "set") for i in range(2))
    parts = [{path for path, _ in getattr(data, part).samples} for part in ("train", "val", "test")]
    assert [len(p) for p in parts] == [32, 4, 4] and len(set.union(*parts)) == 40
    assert data.train.samples == again.train.samples  # type: ignore[attr-defined]
    moved = load_data(tmp_path / "set", seed=1, val_fraction=0.5)
    assert moved.test.samples == data.test.samples and len(moved.val) == 18  # type: ignore[attr-defined, arg-type]


# ---- golden numbers


def test_digits() -> None:
    data = load_data("digits")
    assert repr(data) == "Data(digits: 1,131 train, 126 val, 540 test images of 1x8x8, 10 classes)"
    assert (data.shape, data.num_classes, data.augment) == ((1, 8, 8), 10, "none")
    train, val, test = data.train, data.val, data.test
    assert isinstance(train, ImageSet) and isinstance(val, ImageSet) and isinstance(test, ImageSet)
    assert train.labels.bincount().tolist() == [112, 114, 112, 115, 114, 114, 114, 113, 110, 113]
    assert val.labels.bincount().tolist() == [12, 13, 12, 13, 13, 13, 13, 12, 12, 13]
    assert test.labels.bincount().tolist() == [54, 55, 53, 55, 54, 55, 54, 54, 52, 54]
    assert train.labels[:10].tolist() == [1, 8, 4, 2, 8, 8, 4, 4, 2, 9]
    assert train.images.min() == 0 and train.images.max() == 255 and len(train.images.unique()) == 17
    x = train.normalise(train.images)
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3
    assert len(load_data("digits", val_fraction=0.2).val) == 252  # type: ignore[arg-type]


@real_data
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "first", "augment"),
    [
        ("mnist", (55_000, 5_000, 10_000), (1, 28, 28), [3, 6, 6, 6, 0], "shift"),
        ("fashion-mnist", (55_000, 5_000, 10_000), (1, 28, 28), [0, 2, 6, 5, 2], "flip+shift"),
        ("cifar10", (45_000, 5_000, 10_000), (3, 32, 32), [7, 5, 5, 6, 5], "flip+shift"),
    ],
)
def test_real_sets(name: str, sizes: tuple[int, ...], shape: tuple[int, ...], first: list[int], augment: str) -> None:
    data = load_data(name)
    parts = (data.train, data.val, data.test)
    assert tuple(len(p) for p in parts) == sizes  # type: ignore[arg-type]
    assert (data.shape, data.num_classes, data.augment) == (shape, 10, augment)
    assert isinstance(data.train, ImageSet) and data.train.labels[:5].tolist() == first
    assert isinstance(data.test, ImageSet)
    assert name == "mnist" or data.test.labels.bincount().tolist() == [1000] * 10
    x = data.train.normalise(data.train.images)
    assert x.mean((0, 2, 3)).abs().max() < 3e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 3e-3


def test_folder_with_parts(tmp_path: Path) -> None:
    data = load_data(image_tree(tmp_path / "three", {"train": 4, "val": 2, "test": 3}))
    assert repr(data).endswith("8 train, 4 val, 6 test images of 3x6x6, 2 classes)")
    assert data.classes == ("cat", "dog") and data.augment == "flip"
    images, labels = next(batches(data.test, 6))
    assert images.shape == (6, 3, 6, 6) and sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    image, label = data.test[0]
    path = data.test.samples[0][0]  # type: ignore[attr-defined]
    grey = 100 * label + int(Path(path).stem)
    expected = (torch.full((3,), grey / 255) - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(image[:, 2, 3], expected)

    few = data.train.head(3)  # type: ignore[attr-defined]
    assert isinstance(few, FolderSet) and few.samples == data.train.samples[:3]  # type: ignore[attr-defined]
    assert torch.equal(few[2][0], data.train[2][0]) and len(few.head(99)) == 3

    two = load_data(image_tree(tmp_path / "two", {"train": 10, "val": 3}))  # val/ without test/ is the test set
    assert [len(p) for p in (two.train, two.val, two.test)] == [18, 2, 6]  # type: ignore[arg-type]
    assert {Path(path).parts[-3] for path, _ in two.val.samples} == {"train"}  # type: ignore[attr-defined]


def test_folder_images_get_one_size(tmp_path: Path) -> None:
    image_tree(tmp_path, {"train": 2, "test": 1})
    Image.new("L", (20, 10), 50).save(tmp_path / "test" / "dog" / "wide.png")
    assert {x.shape for x, _ in (load_data(tmp_path).test[i] for i in range(3))} == {(3, 6, 6)}
    assert load_data(tmp_path, image_size=5).shape == (3, 5, 5)


def test_a_known_name_is_not_taken_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_tree(tmp_path / "digits", {"train": 2, "test": 1})
    monkeypatch.chdir(tmp_path)
    assert load_data("digits").shape == (1, 8, 8)
    assert load_data("./digits").shape == (3, 6, 6)


# ---- refusals


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'imagenet'.*cifar10, nmnist, dvsgesture, or the"):
        load_data("imagenet")
    with pytest.raises(ValueError, match=r"expected 0 < val_fraction < 1, got 1\.5"):
        load_data("digits", val_fraction=1.5)
    with pytest.raises(ValueError, match=r"image_size >= 1 pixel with a folder only, got 8 for digits"):
        load_data("digits", image_size=8)


@pytest.mark.parametrize("error", [URLError("no route"), RuntimeError("Error downloading:\nTried"), OSError("full")])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", r"put train-images-idx3-ubyte, .* into .*MNIST.raw \(or the same with \.gz .*that holds MNIST/"),
        ("fashion-mnist", r"put train-images-idx3-ubyte, .* into .*FashionMNIST.raw.*that holds FashionMNIST/"),
        ("cifar10", r"put data_batch_1, .* into .*cifar-10-batches-py \(or cifar-10-python\.tar\.gz into .*QSNN_DATA"),
    ],
)
def test_offline_says_which_files_go_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str, error: Exception
) -> None:
    from torchvision import datasets

    def download(self: object) -> None:
        raise error

    for source in (datasets.MNIST, datasets.CIFAR10):
        monkeypatch.setattr(source, "download", download)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load_data(name, root=tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("QSNN_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_data(name)


@real_data
@pytest.mark.parametrize(
    ("name", "folder"), [("fashion-mnist", "FashionMNIST/raw"), ("cifar10", "cifar-10-batches-py")]
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, folder: str) -> None:
    source = Path(os.environ["QSNN_DATA"]) / folder
    (tmp_path / folder).mkdir(parents=True)
    *intact, last = sorted(file for file in source.iterdir() if file.suffix != ".gz")
    for file in intact:
        (tmp_path / folder / file.name).symlink_to(file)
    shutil.copy(last, tmp_path / folder / last.name)
    os.truncate(tmp_path / folder / last.name, 100)
    with pytest.raises(ValueError, match=rf"but \S*{last.name} has another md5 sum.*delete it"):
        load_data(name, root=tmp_path)


def test_a_torchvision_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install --upgrade torch torchvision"):
        load_data("mnist", root=tmp_path)
    (tmp_path / "torchvision").mkdir()
    failing = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(failing)
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"fits torch .*operator torchvision::nms does not exist; install both"):
        load_data("mnist", root=tmp_path)
    assert load_data("digits").shape == (1, 8, 8)  # which needs no torchvision


def test_folders_that_are_not_laid_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected CLASS/\*\.png in"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match=r"expected train/ beside test/ or val/ in .*, got only train/;"):
        load_data(image_tree(tmp_path / "a", {"train": 1}))
    with pytest.raises(ValueError, match=r"got only val/, test/;"):
        load_data(image_tree(tmp_path / "b", {"val": 1, "test": 1}))
    image_tree(tmp_path / "c", {"train": 1})
    image_tree(tmp_path / "c", {"test": 1}, classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"same class folders in every part of .*'dog'.*'cow'.*make them agree"):
        load_data(tmp_path / "c")


@pytest.mark.parametrize("content", [b"not an image", None])
def test_a_damaged_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    image_tree(tmp_path, {"train": 2, "test": 1}, size=64)
    file = tmp_path / "test" / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    with pytest.raises(ValueError, match=r"expected an image in .*0\.png, cannot read it"):
        list(batches(load_data(tmp_path).test))


def test_image_set_refuses_what_it_cannot_hold() -> None:
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected uint8 images .* got torch\.float32 \(2, 1, 4, 4\)"):
        ImageSet(images.float(), labels, (0.5,), (0.5,))
    with pytest.raises(ValueError, match=r"N >= 1, got torch\.uint8 \(0, 1, 4, 4\)"):
        ImageSet(images[:0], labels[:0], (0.5,), (0.5,))
    with pytest.raises(ValueError, match=r"expected int64 labels of shape \(2,\), got torch\.int64 \(1,\)"):
        ImageSet(images, labels[:1], (0.5,), (0.5,))
    with pytest.raises(ValueError, match=r"mean and std > 0 of 1 channels, got mean=\(0\.5, 0\.5\)"):
        ImageSet(images, labels, (0.5, 0.5), (0.5,))
    with pytest.raises(ValueError, match=r"std=\(0\.0,\)"):
        ImageSet(images, labels, (0.5,), (0.0,))


def test_check_images() -> None:
    x = torch.zeros(4, 1, 28, 28)
    check_images(x)
    check_images(x.half(), (1, 28, 28))
    check_images(torch.full((2, 1, 2, 2), 3e38))  # finite, though its sum is not
    with pytest.raises(ValueError, match=r"expected a float tensor of normalised images, got torch\.uint8"):
        check_images(x.to(torch.uint8))
    with pytest.raises(ValueError, match="got list"):
        check_images([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 1, 28, 28\), got \(64, 3, 32, 32\)"):
        check_images(torch.zeros(64, 3, 32, 32), (1, 28, 28))
    with pytest.raises(ValueError, match=r"shape \(B, 1, 28, 28\), got \(1, 28, 28\); add .* images\.unsqueeze\(0\)"):
        check_images(x[0], (1, 28, 28))
    with pytest.raises(ValueError, match=r"got \(0, 1, 28, 28\)"):
        check_images(x[:0])
    x[2, 0, 3, 3], x[3] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"expected finite pixels, got 785 that are NaN or inf, first in image 2 of"):
        check_images(x)


def test_batches_refuse_what_they_cannot_read() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    data, x, y = numbered(4), torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    whole = Data(name="d", train=data, val=data, test=data, mean=data.mean, std=data.std, classes=("0",))
    used = iter([(x, y)])
    list(batches(used))
    refused: list[tuple[type[Exception], str, Any]] = [
        (TypeError, r"got Data; pass a part: data\.train", whole),
        (TypeError, r"got Tensor; pass \[\(images, labels\)\]", x),
        (TypeError, r"a Dataset with a length .*, got Stream", Stream()),
        (TypeError, "got int", 3),
        (ValueError, "at least one batch, got none from list_iterator; an iterator is used up", used),
        (ValueError, "got none from list", []),
        (ValueError, r"expected a batch \(images, labels\), got Tensor", [x]),
        (ValueError, r"got torch\.uint8", [(x.to(torch.uint8), y)]),
        (ValueError, "1 that are NaN or inf", [(x.index_fill(0, torch.tensor(1), math.nan)[:, :, :1, :1], y)]),
        (ValueError, r"labels of shape \(4,\) or \(4, \.\.\.\), got torch\.int64 \(3,\)", [(x, y[:3])]),
        (ValueError, "expected finite labels, got NaN", [(x, torch.full((4, 10), math.nan))]),
        (ValueError, r"labels of shape \(4,\) or .*, got int", [(x, [0, 1, 2, 3])]),
    ]
    for error, message, source in refused:
        with pytest.raises(error, match=message):
            list(batches(source))
    with pytest.raises(ValueError, match=r"batch_size must be a whole number from 1 to .*, got 0"):
        batches(data, 0)  # refused at the call, not at the first batch
    with pytest.raises(ValueError, match=r"augment to be one of none, flip, .*flip\+shift\+cutout, cutout, got 'crop'"):
        batches(data, augment="crop")
    with pytest.raises(ValueError, match=r"expected a generator to draw augment='flip' from.*manual_seed\(0\)"):
        batches(data, augment="flip")
