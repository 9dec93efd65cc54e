"""Figures: accuracy against T of a run, and of a study lines, panels, a scatter or dots; qsnn's own curve style."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, quantiles, stdev
from types import SimpleNamespace
from typing import Any

import studies
from lookup import by_label, drawing, flow, networks, whole
from tables import FLOW, accuracies, count_of, spread

from qsnn.report.curve import COLOURS, draw_curve, saved
from qsnn.report.records import Record

By = Mapping[str, Sequence[Mapping[str, Any]]]
"""Label -> metrics of every seed."""
Draw = Callable[[Any, By], None]
CYCLE = [COLOURS[f"c{i}"][0] for i in range(5)]
WORDS = {
    "qann": "QANN", "ann": "without spikes", "teacher": "teacher", "T=1": "student, T = 1", "T=2": "student, T = 2",
    "scratch T=2": "from scratch, T = 2",
}  # fmt: skip
"""Metric -> how a legend names it, in figures of dots."""


# --- what a study may ask for -----------------------------------------------------------------------------------------


def lines(names: Mapping[str, str] | None = None) -> Draw:
    """Accuracy against T, a line a row; ``names``: label -> how the legend calls it."""
    words = names or {}
    return lambda figure, by: _lines(figure.subplots(), {words.get(n, n): by[n] for n in by}, "T=", "time steps T")


def panels(titles: Mapping[str, str], prefix: str = "strength ") -> Draw:
    """A panel for each kind, the part of a label before its comma; a line for what stands behind it."""

    def draw(figure: Any, by: By) -> None:
        places = figure.subplots(2, -(-len(titles) // 2)).flat
        for index, (axes, (kind, title)) in enumerate(zip(places, titles.items(), strict=False)):
            mine = {label.partition(", ")[2]: rows for label, rows in by.items() if label.startswith(f"{kind}, ")}
            _lines(axes, mine, prefix, title, legend=index == 0)

    return draw


def scatter(x: str, title: str, unit: float = 1e6) -> Draw:
    """Accuracy against another metric, in ``unit``; one colour for what stands before a label's comma."""

    def draw(figure: Any, by: By) -> None:
        axes = figure.subplots()
        groups = list(dict.fromkeys(label.partition(", ")[0] for label in by))
        for label, rows in by.items():
            group, _, rest = label.partition(", ")
            colour = CYCLE[groups.index(group) % len(CYCLE)]
            at, (y, error) = _spread(rows, x)[0] / unit, _spread(rows, "accuracy")
            named = None if group in {c.get_label() for c in axes.containers} else group
            axes.errorbar([at], [y], [error], color=colour, marker="o", capsize=2, label=named)
            axes.annotate(rest, (at, y), (6, 4), textcoords="offset points", fontsize=7, color=colour)
        axes.set(xlabel=title, ylabel="accuracy [%]")
        axes.legend(fontsize=7)

    return draw


def dots(*keys: str) -> Draw:
    """A line a row of the study, a dot for each of these metrics; one far below all others is a number at the edge."""

    def draw(figure: Any, by: By) -> None:
        axes = figure.subplots()
        found = {
            key: [(place, *_spread(rows, key)) for place, rows in enumerate(by.values()) if any(key in r for r in rows)]
            for key in keys
        }
        low = _least_shown([m for dots in found.values() for _, m, _ in dots])
        for index, (key, all_of) in enumerate(found.items()):
            shown = [(place + 0.12 * index, m, s) for place, m, s in all_of if m >= low]
            axes.errorbar([m for _, m, _ in shown], [y for y, _, _ in shown], xerr=[s for _, _, s in shown],
                          color=CYCLE[index], marker="osD^v"[index], linestyle="", capsize=2,
                          label=WORDS.get(key, key))  # fmt: skip
            for place, m, _ in all_of:
                if m < low:
                    axes.annotate(f"← {m:.1f}", (0.01 + 0.11 * index, place), xycoords=("axes fraction", "data"),
                                  va="center", fontsize=7, color=CYCLE[index])  # fmt: skip
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.set_yticks(range(len(by)), list(by))
        axes.invert_yaxis()
        axes.set_xlabel("accuracy [%]")
        axes.legend(fontsize=7)

    return draw


def _least_shown(values: Sequence[float]) -> float:
    """The least value that is no outlier: not more than three interquartile ranges below the lower quartile."""
    if len(values) < 8:
        return min(values)
    lower, _, upper = quantiles(values, n=4)
    return min(v for v in values if v >= lower - 3 * (upper - lower))


def _spread(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    values = [float(row[key]) for row in rows if key in row]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _lines(axes: Any, by: By, prefix: str, title: str, legend: bool = True) -> None:
    for index, (label, rows) in enumerate(by.items()):
        keys = [key for key in rows[0] if key.startswith(prefix)]
        found = [_spread(rows, key) for key in keys]
        axes.errorbar([float(key.removeprefix(prefix)) for key in keys], [m for m, _ in found], [s for _, s in found],
                      color=CYCLE[index % 5], linestyle="--" if index >= 5 else "-", marker="osD^v"[index % 5],
                      markersize=4, capsize=2, linewidth=1.3, label=label)  # fmt: skip
    if prefix == "T=":
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
        steps = sorted({float(k.removeprefix(prefix)) for rows in by.values() for k in rows[0] if k.startswith(prefix)})
        axes.set_xticks(steps, [f"{t:g}" for t in steps])
    axes.set(xlabel=title, ylabel="accuracy [%]")
    if legend:
        axes.legend(fontsize=7, ncols=2 if len(by) > 5 else 1)


# --- files ------------------------------------------------------------------------------------------------------------


def of_study(name: str, records: Sequence[Record]) -> bytes | None:
    """What a study measured as SVG, mean ± standard deviation over the seeds; None where it has no figure."""
    from matplotlib.figure import Figure

    draw = studies.find(name).figure
    if draw is None or not records:
        return None

    def made() -> Figure:
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        draw(figure, {label: [r.metrics for r in found] for label, found in by_label(records).items()})
        data = "several data sets" if records[0].data == "all" else records[0].data
        figure.suptitle(f"{name}, {data}, {count_of(len({r.seed for r in records}), 'seed')}")
        return figure

    return saved(made, "svg")


def of_run(chosen: dict[str, list[Record]]) -> bytes:
    """The accuracy curve of a flow as SVG."""
    results, bands = [], {}
    for model, rows in chosen.items():
        steps = tuple(rows[0].metrics["timesteps"])
        values = [accuracies(rows, t) or [] for t in steps or (1,)]
        mean_of = tuple(fmean(v) for v in values)
        shape = {"name": model, "n": rows[0].n, "timesteps": steps, "accuracy": mean_of}
        results.append(SimpleNamespace(**shape, metric="accuracy", exits=()))
        bands[model] = [spread(v, rows[0].n) for v in values]
    first, seeds = chosen["student"][0], len(chosen["student"])
    band = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed, 95 % Wilson interval"
    title = f"{first.config['run']['model']} on {first.data}: {band}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.svg"
        draw_curve(results, path, title=title, spread=bands if seeds > 1 else None)  # type: ignore[arg-type]
        return path.read_bytes()


def published(records: Sequence[Record]) -> dict[str, bytes]:
    """Every figure that the records give, by its file's name."""
    found: dict[str, bytes] = {}
    for data in dict.fromkeys(r.data for r in records if r.name.startswith("run/")):
        for command, mine in networks(records, data).items():
            if chosen := flow(mine, "run", FLOW, data):
                found[f"{drawing(command)}.svg"] = of_run(chosen)
    for name in studies.names():
        if drawn := of_study(name, whole(name, records)):
            found[f"study-{name}.svg"] = drawn
    return found
