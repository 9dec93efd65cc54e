"""Figures of the studies: lines against T or strength, accuracy against synops, a dot a task."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qsnn.files import write_atomic
from qsnn.report.records import Record

HERE = Path(__file__).resolve().parent
COLOURS = ("#2a6f97", "#c1121f", "#6a994e", "#bc6c25", "#7b2cbf", "#495057", "#0f8b8d", "#e09f3e")
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "svg.hashsalt": "qsnn", "svg.fonttype": "none", "legend.frameon": False,
}  # fmt: skip
KEYS = {"qann": "QANN", "T=1": "student, T = 1", "T=2": "student, T = 2"}
AXES = {
    "noise": "noise: σ, pixels on [0, 1]", "blur": "blur: σ [pixel]", "occlusion": "occlusion: part of the area",
    "shift": "shift: up to so many pixels each way",
}  # fmt: skip


def draw(name: str, records: Sequence[Record]) -> Path:
    """Draw what a study measured, mean ± standard deviation over the seeds; return the SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    by: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        by.setdefault(r.name.partition("/")[2], []).append(r.metrics)
    keys = list(dict.fromkeys(key for rows in by.values() for row in rows for key in row))
    seeds = len({r.seed for r in records})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        if any(key.startswith("strength ") for key in keys):
            _panels(figure, by)
        elif "synops" in keys and "accuracy" in keys:
            _scatter(figure.subplots(), by)
        elif any(key.startswith("T=") for key in keys) and name not in ("tasks", "smoothing"):
            _lines(figure.subplots(), by, "T=", "time steps T")
        else:
            left_out = ("weight_bytes", "synops", "ece", "spike rate", "n")
            _dots(figure.subplots(), by, [key for key in keys if key not in left_out])
        data_name = "several data sets" if records[0].data == "all" else records[0].data
        figure.suptitle(f"{name}, {data_name}, {seeds} seed{'s' if seeds > 1 else ''}")
        data = io.BytesIO()
        figure.savefig(data, format="svg", facecolor="white", metadata={"Date": None})
    path = HERE / "figures" / f"study-{name}.svg"
    write_atomic(path, data.getvalue())
    return path


def _spread(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    values = [float(row[key]) for row in rows if key in row]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _lines(axes: Any, by: dict[str, list[dict[str, Any]]], prefix: str, title: str, legend: bool = True) -> None:
    for index, (label, rows) in enumerate(by.items()):
        keys = [key for key in rows[0] if key.startswith(prefix)]
        x = [float(key.removeprefix(prefix)) for key in keys]
        found = [_spread(rows, key) for key in keys]
        colour = COLOURS[index % len(COLOURS)]
        style = "--" if index >= len(COLOURS) else "-"
        axes.errorbar(x, [m for m, _ in found], [s for _, s in found], color=colour, linestyle=style, marker="o",
                      markersize=3, capsize=2, linewidth=1.2, label=label)  # fmt: skip
    if prefix == "T=":
        axes.set_xscale("log", base=2)
        steps = sorted({float(k[2:]) for rows in by.values() for k in rows[0] if k.startswith("T=")})
        axes.set_xticks(steps, [f"{t:g}" for t in steps])
    axes.set_xlabel(title)
    axes.set_ylabel("accuracy [%]")
    if legend:
        axes.legend(fontsize=7, ncols=2 if len(by) > 5 else 1)


def _panels(figure: Any, by: dict[str, list[dict[str, Any]]]) -> None:
    kinds = list(dict.fromkeys(label.partition(", ")[0] for label in by))
    for index, (axes, kind) in enumerate(zip(figure.subplots(2, -(-len(kinds) // 2)).flat, kinds, strict=False)):
        mine = {label.partition(", ")[2]: rows for label, rows in by.items() if label.startswith(f"{kind}, ")}
        _lines(axes, mine, "strength ", AXES.get(kind, kind), legend=index == 0)


def _scatter(axes: Any, by: dict[str, list[dict[str, Any]]]) -> None:
    groups = list(dict.fromkeys(label.partition(", ")[0] for label in by))
    for label, rows in by.items():
        group, _, width = label.partition(", ")
        colour = COLOURS[groups.index(group) % len(COLOURS)]
        x, (y, error) = _spread(rows, "synops")[0] / 1e6, _spread(rows, "accuracy")
        known = {text.get_label() for text in axes.containers}
        axes.errorbar([x], [y], [error], color=colour, marker="o", capsize=2, label=None if group in known else group)
        axes.annotate(width, (x, y), (6, 4), textcoords="offset points", fontsize=7, color=colour)
    axes.set_xlabel("operations on 1-bit weights per image [million]")
    axes.set_ylabel("accuracy [%]")
    axes.legend(fontsize=7)


def _dots(axes: Any, by: dict[str, list[dict[str, Any]]], keys: Sequence[str]) -> None:
    for index, key in enumerate(keys):
        labels = [label for label, rows in by.items() if any(key in row for row in rows)]
        found = [_spread(by[label], key) for label in labels]
        axes.errorbar([m for m, _ in found], [list(by).index(label) + 0.12 * index for label in labels],
                      xerr=[s for _, s in found], color=COLOURS[index % len(COLOURS)], marker="o", linestyle="",
                      capsize=2, label=KEYS.get(key, key))  # fmt: skip
    axes.set_yticks(range(len(by)), list(by))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy [%]")
    axes.legend(fontsize=7)
