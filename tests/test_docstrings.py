"""What every public function and config owes its reader: shapes, units, errors, formulas and sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import qsnn

PACKAGE = Path(qsnn.__file__).parent
ROOMS = ("quant", "snn", "folded", "distillation")
"""Rooms whose every public definition is read; of the others those that ``qsnn`` hands out."""
UNIT = re.compile(r"\[[^\]]+\]|\b(bits?|images|steps?|epochs|passes|levels|timesteps|layers|processes)\b", re.I)
SHAPE = re.compile(r"Shape:|\([A-Z]['A-Z_]*(·[A-Z])?(, [^)]*)?\)|\(\*\)|\(\)")
FORMULA = re.compile(r":math:|\.\. math::")
OWES_SOURCE = re.compile(r"Quant$|IFNode$|^Dynamics$|divergence$|cross_entropy$|matching$|regulariser$|^estimates$")
"""Quantizers, neurons, losses and energies: what somebody has published before."""


def _definitions() -> list[tuple[str, ast.AST, ast.AST | None]]:
    """(place, node, class that holds it) of every public class, function and method that is read."""
    found: list[tuple[str, ast.AST, ast.AST | None]] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            home = "qsnn." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            if room not in ROOMS and qsnn._HOMES.get(node.name) != home:
                continue
            place = f"{path.relative_to(PACKAGE)}:{node.name}"
            found.append((place, node, None))
            if isinstance(node, ast.ClassDef):
                found += [
                    (f"{place}.{inner.name}", inner, node) for inner in node.body
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_")
                ]  # fmt: skip
    return found


DEFINITIONS = _definitions()


def _doc(node: ast.AST, holder: ast.AST | None) -> str:
    own = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    return own + (f"\n{ast.get_docstring(holder) or ''}" if holder is not None else "")  # type: ignore[arg-type]


def _tensor(annotation: ast.AST | None) -> bool:
    return annotation is not None and re.search(r"\bTensor\b", ast.unparse(annotation)) is not None


def _raises(node: ast.AST) -> bool:
    """Whether a body raises by itself; what a nested function raises is its own, and a bare raise hands on."""
    todo, found = list(ast.iter_child_nodes(node)), False
    while todo:
        inner = todo.pop()
        if isinstance(inner, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        found = found or (isinstance(inner, ast.Raise) and inner.exc is not None)
        todo += ast.iter_child_nodes(inner)
    return found


def missing_shapes() -> list[str]:
    return [
        place for place, node, holder in DEFINITIONS
        if isinstance(node, ast.FunctionDef)
        and (any(_tensor(arg.annotation) for arg in node.args.args) or _tensor(node.returns))
        and not any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
        and not SHAPE.search(_doc(node, holder))
    ]  # fmt: skip


def missing_raises() -> list[str]:
    found = []
    for place, node, holder in DEFINITIONS:
        if isinstance(node, ast.FunctionDef) and _raises(node) and "Raises:" not in _doc(node, holder):
            found.append(place)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                special = isinstance(inner, ast.FunctionDef) and inner.name in ("__init__", "__post_init__")
                if special and _raises(inner) and "Raises:" not in _doc(inner, node):
                    found.append(f"{place}.{inner.name}")
    return found


def missing_units() -> list[str]:
    """Numbers of the configs without a unit in their line."""
    found = []
    for place, node, _ in DEFINITIONS:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not re.search(r"\b(int|float)\b", ast.unparse(field.annotation)):
                continue
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            if not UNIT.search(str(text)):
                found.append(f"{place}.{ast.unparse(field.target)}")
    return found


def missing_formulas() -> list[str]:
    return [
        f"{place} ({'formula' if not FORMULA.search(_doc(node, None)) else 'Source'})"
        for place, node, holder in DEFINITIONS
        if holder is None and OWES_SOURCE.search(getattr(node, "name", ""))
        and (not FORMULA.search(_doc(node, None)) or not re.search(r"Source:|Source", _doc(node, None)))
    ]  # fmt: skip


@pytest.mark.parametrize("law", [missing_shapes, missing_raises, missing_units, missing_formulas])
def test_public_docstrings_say_what_they_owe(law):
    missing = law()
    assert not missing, f"{law.__name__}: " + "\n".join(missing)


def test_these_laws_can_fail():
    node = ast.parse("def f(x: Tensor) -> Tensor:\n    'Do it.'\n    raise ValueError('no')").body[0]
    assert _raises(node) and not SHAPE.search(_doc(node, None)) and SHAPE.search("(B, C, *) -> (B, K)")
    assert not UNIT.search("Peak learning rate.") and UNIT.search("Time constant [steps]")


VERBS = (
    "quantize", "convert", "distill", "fold", "certify", "benchmark", "fit", "save", "load", "load_data", "summary",
    "accuracy", "create_model", "batches", "export",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example(verb):
    assert ">>>" in (getattr(qsnn, verb).__doc__ or ""), f"{verb} has no doctest"
