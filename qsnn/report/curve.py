"""The figure: accuracy against T."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsnn.files import write_atomic
from qsnn.measure.accuracy import interval
from qsnn.measure.result import Benchmark
from qsnn.report.terminal import shown, shown_steps, unit_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name -> (light, dark); c0 to c4 after Okabe and Ito, told apart by colour-blind readers. Figures are drawn in the
# light colours; in the page each of them becomes a CSS variable, so that one drawing serves both themes.
COLOURS = {
    "paper": ("#ffffff", "#14171c"), "ink": ("#1c2127", "#e6e9ed"), "muted": ("#5d6671", "#9aa4b0"),
    "line": ("#d9dee4", "#333a43"), "box": ("#f5f7f9", "#1c2128"),
    "c0": ("#0072b2", "#56a8e8"), "c1": ("#d55e00", "#ff8f4a"), "c2": ("#009e73", "#2fc89a"),
    "c3": ("#b8588e", "#e08fbd"), "c4": ("#8a6d00", "#e0bd3c"),
}  # fmt: skip
_INK, _MUTED, _LINE, _PAPER = (COLOURS[name][0] for name in ("ink", "muted", "line", "paper"))

STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "qsnn", "font.size": 9.0, "text.parse_math": False,  # "$" is no formula
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _MUTED, "axes.labelcolor": _INK,
    "axes.titlecolor": _INK, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11.0,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": _LINE, "xtick.color": _MUTED, "xtick.labelcolor": _INK,
    "ytick.color": _MUTED, "ytick.labelcolor": _INK, "legend.frameon": False, "legend.labelcolor": _INK,
}  # fmt: skip
"""matplotlib's settings for every figure of the project, those of the benchmarks too."""


Spread = Mapping[str, Sequence[float]]


def _curve(
    results: Sequence[Benchmark], width: float, height: float, title: str = "", spread: Spread | None = None
) -> Figure:
    """Accuracy against T: a line with a band for each spiking model, a level line for each ANN; sizes in inches."""
    from matplotlib.figure import Figure  # pyplot would keep every figure, and ask for a display

    spiking, anns = [r for r in results if r.timesteps], [r for r in results if not r.timesteps]
    steps = shown_steps(spiking)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot(facecolor="none")
    for r, dashes in zip(anns, ["--", ":", "-."] * len(anns), strict=False):
        axes.axhline(r.accuracy[0], color=_MUTED, linestyle=dashes, linewidth=1.3, label=r.name)
    for i, r in enumerate(spiking):
        colour = COLOURS[f"c{i % 5}"][0]
        if spread is not None or r.metric == "accuracy":
            low, high = _band(r, None if spread is None else spread[r.name])
            axes.fill_between(r.timesteps, low, high, color=colour, alpha=0.12, lw=0)
        # each line is thinner than the one before, and hollow: where two are equal (a folded student) both are seen
        axes.plot(
            r.timesteps, r.accuracy, color=colour, marker="osD^v"[i % 5], label=r.name, zorder=3 + i,
            markersize=max(3.5, 7 - i), linewidth=max(1.0, 2.4 - 0.4 * i), markerfacecolor=_PAPER if i else colour,
        )  # fmt: skip
        if r.exits:
            ends = sorted((e.timesteps, e.accuracy) for e in r.exits)
            label = f"{r.name}, early exit"
            axes.plot(*zip(*ends, strict=True), color=colour, linestyle=":", lw=1.4, label=label, zorder=9)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks(steps, [str(t) for t in steps])
    axes.set_xlim(steps[0] * 0.9, max(steps[-1], 2 * steps[0]) * 1.1)
    metric = results[0].metric
    axes.set(xlabel="time steps T", ylabel=f"{metric} [%]" if unit_of(metric) else metric, title=title)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    if metric == "accuracy":
        _zoom(axes, spiking, anns, steps)
    return figure


def _zoom(axes: Any, spiking: Sequence[Benchmark], anns: Sequence[Benchmark], steps: Sequence[int]) -> None:
    """Show the accuracies that differ; one that is far below is written."""
    everything = [a for r in (*spiking, *anns) for a in r.accuracy]
    later = [a for r in spiking for t, a in zip(r.timesteps, r.accuracy, strict=True) if t > steps[0]]
    top = max(everything)
    # where accuracy at the first step is so low that the axis would squeeze the rest, it is written, not drawn
    span = top - min([*later, *(r.accuracy[0] for r in anns)]) if later else top
    low_end = min(a for a in everything if a >= top - 4 * max(span, 1.0))
    margin = 0.2 * max(top - low_end, 1.0)
    floor = max(0.0, low_end - margin)
    axes.set_ylim(floor, min(100.0, top + margin) + margin / 6)
    below = [
        f"↓ {r.name}, T = {steps[0]}: {shown(a, 'short accuracy')} %" for r in spiking for a in r.accuracy if a < floor
    ]
    box = {"facecolor": _PAPER, "edgecolor": "none", "pad": 2}
    axes.text(0.02, 0.03, "\n".join(below), transform=axes.transAxes, size=8, color=_MUTED, bbox=box, zorder=20)


def _band(result: Benchmark, spread: Sequence[float] | None) -> tuple[list[float], list[float]]:
    """Both ends of the band [%] at every T: accuracy ± spread, by default the 95 % Wilson interval."""
    if spread is None:
        ends = [interval(a / 100, result.n) for a in result.accuracy]
        return [100 * low for low, _ in ends], [100 * high for _, high in ends]
    pairs = list(zip(result.accuracy, spread, strict=True))
    return [a - s for a, s in pairs], [min(100.0, a + s) for a, s in pairs]


def draw_curve(results: Sequence[Benchmark], path: str | Path, *, title: str, spread: Spread | None = None) -> None:
    """Draw accuracy [%] against T, with 95 % Wilson bands; the ANNs are level lines.

    Args:
        results: at least one with timesteps.
        path: ends in .png (150 dpi) or .svg; written whole or not at all.
        title: stands above the axes.
        spread: half the width of the band [%] by model name, one number for each T, in place of the Wilson interval;
            for accuracies that are means over seeds, their standard deviation.
    Raises:
        ValueError: another suffix, or nothing that spikes.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"expected a file that ends in .png or .svg, came {Path(path).name!r}; rename it")
    if not any(r.timesteps for r in results):
        raise ValueError(f"expected a result with timesteps, came {[r.name for r in results]}; benchmark the SNN too")
    write_atomic(path, drawn(results, kind, _PAPER, 7, 4.4, title, spread))


def drawn(results: Sequence[Benchmark], kind: str, paper: str, *options: Any) -> bytes:
    """The curve as a file, without a date: equal results make equal bytes."""
    return saved(lambda: _curve(results, *options), kind, paper)


def saved(make: Callable[[], Figure], kind: str = "svg", paper: str = _PAPER) -> bytes:
    """A figure that is made in :data:`STYLE`, as a file without a date: equal figures make equal bytes.

    Args:
        make: draws the figure.
        kind: "svg" or "png" (150 dpi).
        paper: colour of the background.
    """
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        make().savefig(data, format=kind, facecolor=paper, dpi=150, metadata={"Date": None})
    return data.getvalue()
