"""The programs in scripts/ and benchmarks/: wrong input is one line and exit status 2, and leaves nothing behind."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted(
    path
    for folder in ("scripts", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_ends_in_one_line(path):
    assert f'with one_line("{path.name}"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("scripts/reproduce_cifar10.py", "--quick --weight-bits 99", "weight_bits must be a whole number from 1 to"),
        ("scripts/reproduce_cifar10.py", "--quick --batch-size 0", "batch_size must be a whole number from 1"),
        ("scripts/reproduce_cifar10.py", "--quick --budget 5x", "expected a time like 90s"),
        ("scripts/reproduce_cifar10.py", "--epochs 1 -1 1", "epochs must be a whole number from 0"),
        ("scripts/reproduce_cifar10.py", "--model resnet20 --weights none.th", "no such file: none.th"),
        ("benchmarks/trained_peer.py", "none", "with the record of a student"),
        ("benchmarks/study.py", "distill --only none --data digits", "none"),
        ("benchmarks/zoo.py", "none", "--list prints their names"),
    ],
)
def test_wrong_input_of_a_program_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, program, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *words.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    assert error.startswith(f"{Path(program).name}: ") and said in error
    assert not list(tmp_path.iterdir())
