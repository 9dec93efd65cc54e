"""README.md: its code runs, its commands parse, its tables and figures are what the records give."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tables

import qsnn
from qsnn.cli import main as cli
from qsnn.cli.config import RunConfig, command_of
from qsnn.report.records import Record, append

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
update: Callable[..., list[str]] = runpy.run_path(str(ROOT / "scripts/readme"))["update"]
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("qsnn ")
]
PAGE = "benchmarks/RESULTS.md"
EMPTY = "# own\n\n<!-- table:run-digits -->\nno records yet\n<!-- /table -->\n\nlast\n"
CONFIG = {
    "run": {"model": "vgg-small", "weight_bits": 4, "levels": 2, "out": "a", "epochs": None, "seed": 0},
    "teacher": {"epochs": 20, "seed": 0},
    "distill": {"epochs": 12, "seed": 0},
}
WORLD = {
    "commit": "0123456789abcdef", "dirty": False, "device": "a CPU", "torch": "2.1", "brevitas": "0.1",
    "spikingjelly": "2.0",
}  # fmt: skip


def add(root: Path, seed: int = 0, gain: float = 0.0, *, minute: int = 0, models: tuple[str, ...] = tables.FLOW,
        epochs: int = 20, options: dict[str, Any] | None = None, **world: Any) -> None:  # fmt: skip
    """Append what a run writes: accuracies of 90 + gain, a step more for every T."""
    config = copy.deepcopy(CONFIG)
    config["run"].update(out=f"folder-{seed}", seed=seed, **(options or {}))
    config["teacher"].update(seed=seed, epochs=epochs)
    for model in models:
        ann = model in ("teacher", "QANN")
        steps = [] if ann else [1, 2, 4, 8]
        metrics = {
            "timesteps": steps, "accuracy": [90.0 + gain + i for i in range(len(steps) or 1)], "weight_bytes": 2048,
            "spike_rate": None if ann else 0.25, "synops": None if ann else 448_384.0, "macs": 13_824,
            "certificate": "EXACT", "made_for": 2, "equal": 539, "peer": "ATan, from 0", "peer_epochs": 9,
        }  # fmt: skip
        append(root / "benchmarks/records/run.jsonl", Record(
            name=f"run/{model}", data="digits", seed=seed, n=540, metrics=metrics, config=config,
            environment={**WORLD, **world}, time=f"2026-01-01T00:{minute:02}:00+00:00",
        ))  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / PAGE).write_text(EMPTY, encoding="utf-8")
    return tmp_path


def page(root: Path) -> str:
    update(root)
    return (root / PAGE).read_text(encoding="utf-8")


def cells(text: str, model: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {model} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# ---- this README


def test_the_first_python_block_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE).group(1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    assert "EXACT" in capsys.readouterr().out.splitlines()
    assert names["result"].accuracy[1] > 90  # at T = 2
    images, labels = next(qsnn.batches(names["data"].test, 8))
    answers = qsnn.load("digits.safetensors")(images)
    assert answers.shape == (2, 8, 10)
    assert names["folded"](images, firing="deferred").shape == (1, 8, 10)
    assert (answers[-1].argmax(1) == labels).sum() >= 6


def test_commands_are_shown():
    assert {shlex.split(line)[1] for line in COMMANDS} == set(cli.COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line, monkeypatch):
    called = []
    for name, (module, _) in cli.COMMANDS.items():
        command = getattr(importlib.import_module(module), name)
        stub = functools.wraps(command)(lambda *args, name=name, **options: called.append(name))
        monkeypatch.setattr(f"{module}.{name}", stub)
    _, *args = shlex.split(line, comments=True)
    cli.main(args)
    assert called == [args[0]]


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", PAGE])
def test_links_and_scripts_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / path).exists(), path
    for path in re.findall(r"\bscripts/[\w.]+\w", text):
        assert (ROOT / path).exists(), path


def test_the_readme_is_a_page():
    assert len(README.splitlines()) <= 170
    assert max(map(len, README.split("<!-- table:")[0].splitlines())) <= 120


def test_every_table_of_results_says_what_made_it():
    tables_and_lines = re.findall(r"(?:^\|.*\n)+\n(.*)$(?:\n\n(Trained with .*|.*`python .*)$)?", RESULTS, re.MULTILINE)
    assert len(tables_and_lines) > 20
    for line in map(" ".join, tables_and_lines):
        for word in (r"`(python|qsnn) ", r"; commit [0-9a-f]{7}", r"seeds: \d", r"Processor|EPYC|GPU|NVIDIA"):
            assert re.search(word, line), line


def test_tables_and_figures_are_what_the_records_give():
    command = [sys.executable, ROOT / "scripts/readme", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_is_the_public_surface():
    def order(name: str) -> tuple[int, str]:  # constants, classes, functions, as ruff sorts
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert qsnn.__all__ == sorted(qsnn.__all__, key=order)
    public = {name for name in qsnn.__all__ if not isinstance(getattr(qsnn, name), types.ModuleType)}
    found = {name for name, value in vars(qsnn).items() if not isinstance(value, types.ModuleType)}
    found |= {"export"}  # a room too, so the verb stands in the class of the package
    assert {name for name in found if not name.startswith("_")} == public  # each is loaded by now
    for name in qsnn.__all__:
        assert (getattr(qsnn, name).__doc__ or "").strip(), name


# ---- the script


def test_mean_and_standard_deviation_over_seeds(root):
    for seed, gain in enumerate((0.0, 1.0, 5.0)):
        add(root, seed, gain)
    text = page(root)
    # by hand: (0 + 1 + 5)/3 = 2; sqrt((4 + 1 + 9)/2) = 2.6458
    accuracy = ["92.00 ± 2.65", "93.00 ± 2.65", "94.00 ± 2.65", "95.00 ± 2.65"]
    assert cells(text, "student") == ["2.0", *accuracy, "0.250", "448 k", "13.8 k"]
    assert cells(text, "teacher") == ["2.0", *["*92.00 ± 2.65*"] * 4, "–", "–", "13.8 k"]
    for words in (
        "540 test images; seeds: 0, 1, 2; vgg-small, 4-bit weights, L = 2; certificates that say EXACT: 3 of 3",
        "a CPU; commit 0123456; torch 2.1; brevitas 0.1; spikingjelly 2.0; ±: standard deviation over the seeds.",
        "(figures/run-digits.svg)",
    ):
        assert words in text
    figure = (root / "benchmarks/figures/run-digits.svg").read_text(encoding="utf-8")
    assert "vgg-small on digits: mean ± standard deviation of 3 seeds" in figure and str(root) not in figure


def test_one_seed_has_an_interval_and_says_so(root):
    add(root)
    text = page(root)
    # Wilson, p = 0.9, n = 540: 1.96·sqrt(0.09/540 + 1.96²/(4·540²))/(1 + 1.96²/540) = 0.0254
    assert cells(text, "SNN online")[1] == "90.00 ± 2.54 †"
    assert "† one seed: half the 95 % Wilson interval over the test images." in text
    assert "one seed, 95 % Wilson interval" in (root / "benchmarks/figures/run-digits.svg").read_text(encoding="utf-8")


def test_the_newest_record_counts_wherever_it_stands(root):
    add(root, gain=3.0, minute=2)
    add(root, gain=1.0, minute=1)
    assert cells(page(root), "student")[1] == "93.00 ± 2.17 †"


def test_configs_are_not_mixed_and_the_newest_one_is_taken(root):
    for seed in (0, 1):
        add(root, seed, minute=5, epochs=20)
    add(root, 2, gain=5.0, minute=6, epochs=1)
    assert cells(page(root), "student")[1].startswith("95.00") and "seeds: 2;" in page(root)
    add(root, 0, minute=7, epochs=20)
    assert "seeds: 0, 1;" in page(root)


def test_every_network_has_its_table_and_the_usual_one_comes_first(root):
    add(root, options={"model": "qkformer", "weight_bits": 1, "signed": True, "epochs": [5, 5, 4]}, gain=4.0)
    add(root, options={"model": "qkformer", "model_options": ["attention=channel", "widths=[16,32]"]}, gain=5.0)
    add(root, minute=1)
    text = page(root)
    assert [line for line in text.splitlines() if line.startswith("| student |")][1].count("94.00") == 1
    usual, other = (text.index(f"`{command}`") for command in (
        "qsnn run --data digits", "qsnn run --data digits --model qkformer --weight-bits 1 --signed --epochs 5 5 4"
    ))  # fmt: skip
    assert usual < other
    drawn = sorted(path.name for path in (root / "benchmarks/figures").iterdir())
    assert drawn == [
        "run-digits-qkformer-attention-channel-widths-16-32.svg", "run-digits-qkformer-w1-signed.svg", "run-digits.svg"
    ]  # fmt: skip
    assert all(f"(figures/{name})" in text for name in drawn)


def test_a_command_is_told_with_every_option_that_was_typed(monkeypatch):
    said = {"data": "digits", "out": "a", "signed": True, "epochs": [1, 2, 3], "seed": 4, "fresh": True}
    assert command_of(said) == "qsnn run --data digits --out a --signed --epochs 1 2 3 --seed 4"
    assert command_of(vars(RunConfig()), without=("seed",)) == "qsnn run --data digits"
    stored = json.loads(json.dumps(vars(RunConfig()), default=str))  # tuples came back as lists
    assert command_of(stored, without=("out",)) == "qsnn run --data digits"
    parsed: list[RunConfig] = []
    command = importlib.import_module("qsnn.cli.commands").run
    stub = functools.wraps(command)(lambda config: parsed.append(config))
    monkeypatch.setattr("qsnn.cli.commands.run", stub)
    cli.main(shlex.split(command_of(said))[1:])
    assert parsed[0].signed and parsed[0].epochs == (1, 2, 3) and parsed[0].seed == 4


def test_the_exported_file_of_the_same_configuration_is_told(root):
    add(root)
    add(root, minute=1, models=("net.onnx",), epochs=1)
    assert "ONNX" not in page(root)
    add(root, minute=2, models=("net.onnx",))
    assert "; images of which the ONNX file (T = 2) has every logit: 539 of 540; a CPU" in page(root)


def test_the_network_that_spikingjelly_trained_stands_below_where_every_seed_has_it(root):
    add(root)
    add(root, 1, minute=1)
    add(root, 1, minute=2, models=("SpikingJelly",))
    assert "SpikingJelly," not in page(root) and "seeds: 0, 1;" in page(root)
    add(root, minute=3, models=("SpikingJelly",))
    assert cells(page(root), "SpikingJelly, trained")[0] == "2.0"
    assert (
        "IFNode (ATan, from 0: 9 epochs) trained by `trained_peer.py` in the time that the student's 12 epochs"
        in page(root)
    )


def test_a_seed_counts_only_where_every_model_has_it(root):
    add(root, 0)
    add(root, 1, models=("teacher", "QANN"), minute=1)
    assert "seeds: 0;" in page(root)


@pytest.mark.parametrize("world", [{"dirty": True}, {"commit": None, "dirty": None}])
def test_code_that_is_no_clean_commit_is_left_out(root, world, capsys):
    add(root, 0, **world)
    assert page(root) == EMPTY
    assert "left out 5 records of code that is not a clean commit" in capsys.readouterr().err


def test_a_second_call_changes_nothing_and_text_outside_is_kept(root):
    assert update(root) == []  # without records
    add(root, 0)
    add(root, 1, gain=1.0)
    assert update(root, check=True) == [PAGE, "benchmarks/figures/run-digits.svg"]
    assert not (root / "benchmarks/figures").exists()  # a check writes nothing
    assert update(root) == [PAGE, "benchmarks/figures/run-digits.svg"]
    text = (root / PAGE).read_text(encoding="utf-8")
    assert update(root, check=True) == update(root) == []
    assert text.startswith("# own\n\n<!-- table:run-digits -->\n| model |")
    assert text.endswith("<!-- /table -->\n\nlast\n")
    (root / "benchmarks/records/run.jsonl").unlink()
    assert update(root) == [PAGE, "benchmarks/figures/run-digits.svg"]  # the figure has gone
    assert (root / PAGE).read_text(encoding="utf-8") == EMPTY
    assert list((root / "benchmarks/figures").iterdir()) == []


def test_check_sees_a_figure_of_other_bytes_unless_another_matplotlib_drew_it(root, monkeypatch):
    add(root)
    update(root)
    path = root / "benchmarks/figures/run-digits.svg"
    path.write_bytes(path.read_bytes() + b"\n")
    monkeypatch.setitem(update.__globals__, "same_matplotlib", lambda: True)
    assert update(root, check=True) == ["benchmarks/figures/run-digits.svg"]
    monkeypatch.setitem(update.__globals__, "same_matplotlib", lambda: False)
    assert update(root, check=True) == []
    path.unlink()
    assert update(root, check=True) == ["benchmarks/figures/run-digits.svg"]


@pytest.mark.parametrize(("text", "message"), [
    ("<!-- table:run-digits -->\n", "each ended by"),
    ("<!-- table:run-digits -->\n<!-- table:run-mnist -->\n<!-- /table -->\n", "each ended by"),
    (EMPTY + EMPTY, "RESULTS.md: expected every .* once"),
    ("<!-- table:other -->\n<!-- /table -->\n", "RESULTS.md: expected a block named run-DATA, .* got other"),
])  # fmt: skip
def test_wrong_markers_are_refused_and_nothing_is_written(root, text, message):
    (root / PAGE).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        update(root)
    assert (root / PAGE).read_text(encoding="utf-8") == text


def line(name: str, minute: int, seed: int = 0, version: int = 0, **metrics: Any) -> Record:
    setting = {"data": "fashion-mnist", "model": "study", "epochs": 4, "train_images": 20_000, "seed": seed}
    return Record(
        name=name, data="fashion-mnist", seed=seed, n=10_000, metrics=metrics, environment=WORLD,
        config={"setting": setting, "version": version}, time=f"2026-01-01T00:{minute:02}:00+00:00",
    )  # fmt: skip


def test_the_first_paragraph_is_made_from_the_records():
    ours = {"qann": 88.0, "qann on": 89.0}
    ratios = {"spikingjelly, contiguous": 2.0, "qsnn MiB": 10.0, "spikingjelly MiB": 20.0}
    records = [
        line("study-distill/W4", 1, 0, **ours, **{"T=2": 89.0}),
        line("study-distill/W4", 2, 1, **ours, **{"T=2": 90.0}),
        line("study-distill/SpikingJelly, best recipe at T = 2", 3, **{"T=2": 68.0}),
        line("throughput/distill/study", 9, version=1, qsnn=1.2, **ratios),
        line("throughput/distill/study", 4, version=2, qsnn=1.8, **ratios),  # older, though it comes later
        line("throughput/distill/vgg-small", 5, qsnn=1.3, **ratios),
    ]
    text = tables.headline(records)
    for words in ("2 seeds", "**89.5 %**", "68.0 %", "0.60 to 0.65 of the time", ", and 0.50 of the memory"):
        assert words in text
    assert tables.headline(records[:3]) == tables.headline([]) == tables.EMPTY


def test_the_table_of_exported_files_names_what_is_missed():
    def made(minute: int, batch: int, threads: int, deferred: float, bytes: int) -> Record:
        metrics = {
            "qsnn deferred int8": deferred, "qsnn online int8": 0.6, "torch float": 1.0, "torch float, contiguous": 1.5,
            "ONNX Runtime int8": 0.5, "qsnn deferred folded torch": 2.0, "qsnn online folded torch": 3.0,
            "deferred int8 bytes": 1100, "online int8 bytes": bytes, "weights": 1000,
        }  # fmt: skip
        config = {"model": "study", "batch": batch, "threads": threads, "onnxruntime": f"1.{minute}"}
        found = line("deploy/study", minute, **metrics)
        return replace(found, config=config)

    records = [made(1, 1, 1, 0.9, 1100), made(2, 1, 1, 0.36, 1100), made(3, 64, 2, 0.55, 1300)]
    text = tables.make("deploy", records)
    assert "| study | 1 | 1 | deferred | 0.360 | 0.36 | 0.72 | 0.18 | 1.10 |" in text and "0.900" not in text
    assert text.count("\n| study |") == 4 and "ONNX Runtime 1.2, 1.3 int8" in text
    said = next(words for words in text.splitlines() if words.startswith("Asked and missed"))
    assert said == (
        "Asked and missed: deferred, batch 1, of torch float (asked 0.35): study on 1 thread 0.36; deferred, batch 64, "
        "of ONNX Runtime int8 (asked 1): study on 2 threads 1.10; online, file, of the weights at 8 bit (asked 1.15): "
        "study 1.30."
    )
    assert "No figure that was asked is missed." in tables.make("deploy", [made(1, 1, 1, 0.3, 1100)])


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_block_without_records_says_so(name):
    assert name == "study-list" or tables.EMPTY in tables.make(name, [])


def test_contents_link_to_the_headings():
    text = tables.contents("# no\n\n## Time and memory\n\n### fashion-mnist, T = 2\n")
    assert text == "- [Time and memory](#time-and-memory)\n  - [fashion-mnist, T = 2](#fashion-mnist-t--2)"


def test_mean_and_deviation_are_written_once():
    assert tables.plus_minus([1.0, 3.0]) == "2.00 ± 1.41" and tables.plus_minus([2.0], 1) == "2.0"
