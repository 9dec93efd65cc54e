"""The rooms of the package: who may import whom, where public names stand, and what a start of the program costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qsnn

PACKAGE = Path(qsnn.__file__).parent
ROOMS = (
    "files", "options", "graph", "data", "quant", "snn", "folded", "models", "contents", "checkpoint", "measure",
    "training", "distillation", "export", "report", "cli",
)  # fmt: skip
"""Along the flow; a room may import only from rooms above it."""


def _imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of the package in a file, also those inside functions; not for typing alone."""
    found: list[tuple[int, str]] = []
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qsnn":
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "qsnn"]
    return found


def _pointing_up(path: Path, room: str) -> list[str]:
    place = ROOMS.index(room)
    allowed = {*ROOMS[: place + 1], "__version__"}
    return [
        f"{path.name}:{line}: {room} imports {module}, which is not above it"
        for line, module in _imports(path)
        if module.split(".")[1] not in allowed
    ]


def test_no_import_points_up_the_rooms():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            wrong += _pointing_up(path, room)
    assert not wrong, "\n".join(wrong)


def test_the_check_of_the_rooms_names_the_line(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\n\ndef later():\n    from qsnn.cli.main import main\n")
    assert _pointing_up(bad, "graph") == ["bad.py:4: graph imports qsnn.cli.main.main, which is not above it"]


def test_every_file_stands_in_a_room():
    top = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert top <= {*ROOMS, "__init__", "__main__"}


@pytest.mark.parametrize("room", [path.parent.name for path in sorted(PACKAGE.glob("*/__init__.py"))])
def test_a_room_hands_nothing_on(room):
    body = ast.parse((PACKAGE / room / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and ast.get_docstring(ast.Module(body, []))


def test_public_names_are_all_there_and_no_others():
    assert sorted(qsnn.__all__) == sorted(set(qsnn.__all__))
    for name in qsnn.__all__:
        assert getattr(qsnn, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'; it has SNN"):
        _ = qsnn.nothing


def test_no_torch_before_it_is_needed():
    code = "import sys, qsnn; assert 'torch' not in sys.modules; qsnn.Record; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
