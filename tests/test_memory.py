"""data/memory.py: a batch takes no more than it may, and what is answered does not depend on its size."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qsnn
from qsnn.cli.main import main
from qsnn.data.memory import LiveMemory, batch_within, limit_memory, within
from qsnn.measure import accuracy as measure_accuracy
from qsnn.measure import benchmark as measure_benchmark
from qsnn.options import as_bytes

IMAGE = 64 * 4
"""Bytes of a digit as float32."""


def widened(images: torch.Tensor) -> torch.Tensor:
    """Takes 100 times the images, and 4,000 bytes besides."""
    held = torch.zeros(1000)
    return images.flatten(1).repeat(1, 100) + held[0]


def peak(call: object, images: torch.Tensor) -> int:
    with LiveMemory() as memory:
        call(images)  # type: ignore[operator]
    return memory.peak


@pytest.mark.parametrize("limit", [0, 4_000, 100_000, 1_000_000, 2**30])
def test_the_batch_fits_and_twice_the_batch_does_not(limit: int, digits: qsnn.Data) -> None:
    size = batch_within(widened, digits.test, 200, limit=limit)
    images = next(qsnn.batches(digits.test, 400))[0]
    assert size == 1 or peak(widened, images[:size]) <= limit
    assert size == 200 or peak(widened, images[: 2 * size]) > limit


def test_the_batch_by_hand(digits: qsnn.Data) -> None:
    # a sum holds both its terms: 200 times an image; one image of 51,200 bytes beside 4,000 that do not grow
    assert batch_within(widened, digits.test, 500, limit=10 * 200 * IMAGE) == 9
    assert batch_within(widened, digits.test, 3, limit=10 * 200 * IMAGE) == 3
    assert batch_within(widened, digits.test, 500, limit=0) == 1


def test_an_iterable_keeps_its_batches() -> None:
    once = iter([(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))])
    assert batch_within(widened, once, 77) == 77 and len(list(once)) == 1


def test_answers_do_not_depend_on_the_memory_there_is(
    snn: qsnn.SNN, qann: nn.Module, digits: qsnn.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def little(*args: object, **options: object) -> int:
        sizes.append(batch_within(*args, **options, limit=1_500_000))  # type: ignore[arg-type]
        return sizes[-1]

    whole = qsnn.accuracy(snn, digits.test), qsnn.benchmark(snn, digits.test, timesteps=4, reference=qann)
    monkeypatch.setattr(measure_accuracy, "batch_within", little)
    monkeypatch.setattr(measure_benchmark, "batch_within", little)
    parts = qsnn.accuracy(snn, digits.test), qsnn.benchmark(snn, digits.test, timesteps=4, reference=qann)
    assert all(1 <= size < 250 for size in sizes) and len(sizes) == 2
    assert parts[0] == whole[0]
    for name in ("accuracy", "agreement", "confusion", "synops_by_t", "spike_rate_by_t", "spike_rates", "layers", "n"):
        assert getattr(parts[1], name) == getattr(whole[1], name), name


@pytest.mark.parametrize(
    ("said", "meant"),
    [("1M", 2**20), ("512M", 2**29), ("1.5 GiB", 3 * 2**29), ("2gb", 2**31), ("1048576", 2**20), (2**30, 2**30)],
)
def test_sizes(said: object, meant: int) -> None:
    assert as_bytes(said) == meant


@pytest.mark.parametrize("said", ["", "M", "-1G", "0", "1K", "nan", "inf", "1e9", "2000T", 0, -5, True, 1.5, b"1G", []])
def test_no_sizes(said: object, snn: qsnn.SNN, digits: qsnn.Data) -> None:
    with pytest.raises(ValueError, match=r"^memory must be a size from 1M to 1024T, like '512M' or '2G', got "):
        qsnn.accuracy(snn, digits.test, memory=said)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wide(digits: qsnn.Data) -> dict[str, Any]:
    """64 channels on 8x8 pixels: with its certificate an image takes 2 MB."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 64, 10),
    ).eval()  # fmt: skip
    few = digits.train.head(16)  # type: ignore[attr-defined]
    qann = qsnn.quantize(model, few).eval()
    snn = qsnn.convert(qann)
    return {"model": model, "qann": qann, "snn": snn, "folded": qsnn.fold(snn)}


def test_every_verb_stays_within_its_memory(wide: dict[str, Any], digits: qsnn.Data) -> None:
    """Beside what it takes for one image."""
    test, limit = digits.test.head(48), 2**22  # type: ignore[attr-defined]
    verbs: dict[str, Any] = {
        "accuracy": lambda part, **o: qsnn.accuracy(wide["folded"], part, timesteps=4, **o),
        "benchmark": lambda part, **o: qsnn.benchmark(wide["folded"], part, timesteps=4, **o).synops_by_t,
        "certify": lambda part, **o: qsnn.certify(wide["folded"], wide["qann"], part, **o).logits_sha256,
    }
    for name, verb in verbs.items():
        with LiveMemory() as one:
            verb(test.head(1))
        with LiveMemory() as bounded:
            found = verb(test, memory=limit)
        with LiveMemory() as free:
            wanted = verb(test)
        assert bounded.peak <= limit + one.peak < free.peak, (name, bounded.peak, one.peak, free.peak)
        assert found == wanted, name


def test_calibration_says_when_it_takes_fewer_images(digits: qsnn.Data) -> None:
    model = qsnn.create_model("study", digits)
    with pytest.warns(qsnn.QsnnWarning, match=r"quantize calibrates on \d\d of 512 images: each takes .* memory is"):
        with LiveMemory() as memory:
            qsnn.quantize(model, digits, memory="1M")
    assert memory.peak < 2**22
    with pytest.warns(qsnn.QsnnWarning, match=r"convert calibrates on \d\d of \d+ images"):
        qsnn.convert(model, digits, memory="1M")


@pytest.mark.filterwarnings("ignore:convert calibrates on")
@pytest.mark.parametrize("limit", ["24M", "2G"])
def test_what_is_converted_beside_a_t_changes_nothing_of_it(limit: str, digits: qsnn.Data) -> None:
    model = qsnn.create_model("study", digits).eval()
    together = qsnn.convert(model, digits, timesteps=(1, 2, 4, 16), memory=limit)
    for steps, snn in together.items():
        alone = qsnn.convert(model, digits, qsnn.ConvertConfig(timesteps=steps), memory=limit)
        for (name, value), wanted in zip(snn.state_dict().items(), alone.state_dict().values(), strict=True):
            assert torch.equal(value, wanted), (steps, name)


def test_the_command_line_bounds_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(__file__).parent / "golden" / "folded.safetensors")
    with pytest.raises(SystemExit):
        main(["benchmark", file, "--memory", "lots"])
    assert capsys.readouterr().err == "qsnn: memory must be a size from 1M to 1024T, like '512M' or '2G', got 'lots'\n"
    for name in ("train", "quantize", "convert", "distill", "benchmark", "check", "predict", "run"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert "--memory" in capsys.readouterr().out, name
    limit_memory(None)
    before = batch_within(widened, torch.zeros(500, 1, 8, 8), 500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a file of the version before
        main(["benchmark", file, "--memory", "1M", "--timesteps", "2"])
    assert batch_within(widened, torch.zeros(500, 1, 8, 8), 500) == before == 500
    with within("1M"):
        assert batch_within(widened, torch.zeros(500, 1, 8, 8), 500) < 50


def test_wide_networks_choose_small_batches() -> None:
    """256 channels on 32x32 pixels took 10 GB for a benchmark at T = 8; fp16 weights and L = 255 as much."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 256, 3, padding=1), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(256 * 16, 10)
    ).eval()
    images = torch.randn(1, 3, 32, 32)
    part = [(images, torch.zeros(1, dtype=torch.int64))]
    for config, steps in ((qsnn.QuantizeConfig(), 8), (qsnn.QuantizeConfig(weight_bits=16, levels=255), 4)):
        folded = qsnn.fold(qsnn.convert(qsnn.quantize(model, part, config)))
        size = batch_within(lambda x: folded(x, timesteps=steps), images.repeat(250, 1, 1, 1), 250, limit=2**27)  # noqa: B023
        assert 1 <= size < 32 and peak(lambda x: folded(x, timesteps=steps), images[:1]) * size <= 2**27  # noqa: B023
