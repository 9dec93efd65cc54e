"""What a person looks at in the terminal: the results, and the energy estimates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from qsnn.export.deployed import Deployed
    from qsnn.measure.result import Benchmark

NONE = "\u2013"
"""What a table shows where there is no number."""
FORMATS = {
    "accuracy": ".2f",  # [%]
    "mean IoU": ".2f",  # [%]
    "mean squared error": ".3g",
    "short accuracy": ".1f",  # [%], in a sentence
    "rate": ".3f",  # spikes a neuron and step [1]
    "timesteps": ".2f",  # mean over images
    "ratio": ".2f",  # [1]
    "energy": ".3g",  # [µJ]
    "memory": ".1f",  # [KiB]
    "peak": ".0f",  # [KiB]
    "latency": ".2f",  # [ms]
    "deployed": ".3g",  # [ms]
    "throughput": ".0f",  # images a second
    "seconds": ".1f",
    "margin": "g",  # [1]
}
"""How a number of each quantity is written, in the terminal, the page, the figure, README and studies."""


def shown(value: float | None, quantity: str) -> str:
    """A number as its quantity is written, or a dash for None.

    >>> shown(91.2345, "accuracy"), shown(0.25, "rate"), shown(None, "energy")
    ('91.23', '0.250', '–')

    Args:
        value: in the unit of the quantity.
        quantity: a key of :data:`FORMATS`.
    """
    return NONE if value is None else format(value, FORMATS[quantity])


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many digits behind the point, or a dash for None: where no quantity of the table fits."""
    return NONE if value is None else f"{value:.{digits}f}"


def unit_of(metric: str) -> str:
    """What stands behind a score: a percent sign, or nothing."""
    return "" if metric == "mean squared error" else "%"


def kib(size: float, quantity: str = "memory") -> str:
    """A number of bytes in KiB."""
    return shown(size / 1024, quantity)


def accuracy_at(result: Benchmark | Deployed, t: int) -> float | None:
    """Accuracy after ``t`` steps [%], or what the metric says; an ANN's for every t; None where it was not measured."""
    return dict(zip(result.timesteps or (t,), result.accuracy, strict=True)).get(t)


def shown_steps(results: Sequence[Benchmark | Deployed]) -> list[int]:
    """The T's shown: the powers of two among the measured ones, and the last; [0] where nothing spikes."""
    measured = sorted({t for result in results for t in result.timesteps}) or [0]
    return [t for t in measured if t & (t - 1) == 0 or t == measured[-1]]


NARROW = "\u00a0"
"""A space at which no line breaks."""


def si(value: float | None, gap: str = NARROW) -> str:
    """A count in three digits, or a dash for None.

    >>> si(1234, " "), si(999_600, " "), si(7, " ")
    ('1.23 k', '1 M', '7')

    Args:
        value: the count.
        gap: stands between the number and k, M or G.
    """
    if value is None:
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # what three digits round up to the next unit
            return f"{value / size:.3g}{gap}{unit}"
    return f"{value:.3g}"


COLUMNS: dict[str, Callable[[Benchmark, str], str]] = {
    "spike rate": lambda r, gap: shown(r.spike_rate, "rate"),
    "synops": lambda r, gap: si(r.synops, gap),
    "MACs": lambda r, gap: si(r.macs, gap),
}
"""What a table of results shows behind the accuracy; the terminal, 80 columns wide, the first two."""


def table(results: Sequence[Benchmark]) -> Table:
    """Return the results as a table for the terminal, 80 columns wide; an ANN's accuracy stands dimmed at every T.

    Where the score is another than accuracy, its name stands above the columns; below them what is computed on counts.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    steps = shown_steps(results)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    metric = results[0].metric
    unit = f"[{unit_of(metric) or 1}]"
    accuracy = (f"T={t}\n{unit}" if t else unit for t in steps)
    if metric != "accuracy":
        out.title, out.title_justify, out.title_style = metric, "left", ""
    narrow = [(name.replace(" ", "\n"), cell) for name, cell in COLUMNS.items()][:2]
    for i, head in enumerate(("model", "firing", "weights\n[KiB]", *accuracy, *(name for name, _ in narrow))):
        out.add_column(head, justify="left" if i < 2 else "right", vertical="bottom", no_wrap=True)
    counted = [r.counts_said for r in results if r.counts_said]
    if counted:
        out.caption, out.caption_justify = "\n".join(counted), "left"
    for r in results:
        dim = "" if r.timesteps else "dim"
        cells = [Text(shown(accuracy_at(r, t), metric), style=dim) for t in steps]
        if metric == "accuracy":
            cells = [Text(str(cell)[:5], style=dim) for cell in cells]  # 100.0, else 99.99
        cells += [Text(cell(r, "")) for _, cell in narrow]
        out.add_row(Text(r.name), r.firing or "ANN", kib(r.weight_bytes), *cells)
    return out


def energy_table(results: Sequence[Benchmark]) -> Table:
    """Return the energy estimates as a table for the terminal; the assumptions stand below it."""
    from rich import box
    from rich.table import Table

    assumes = [f"{e.name}: {e.assumes} ({e.source})" for e in results[-1].energy]
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    out.caption, out.caption_justify = "\n".join(assumes), "left"
    ratios = ("of the\nANN", "precision,\nmemory [µJ]", "of the\nQANN", "even at\nspike rate")
    columns = ("model", "convention\n[µJ]", *ratios)
    for i, head in enumerate(columns):
        out.add_column(head, justify="right" if i else "left", vertical="bottom")
    for r in results:
        convention, precise, ratio = r.energy
        out.add_row(
            r.name, shown(convention.microjoules, "energy"), shown(convention.ratio, "ratio"),
            shown(precise.microjoules, "energy"), shown(ratio.ratio, "ratio"), shown(ratio.break_even, "rate"),
        )  # fmt: skip
    return out


def deployed_table(rows: Sequence[Deployed]) -> Table:
    """Return exported files beside their checkpoints as a table for the terminal: accuracy, size, time, equality."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    answered = [row for row in rows if row.accuracy]
    steps = shown_steps(answered) if answered else []
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    metric = answered[0].metric if answered else "accuracy"
    unit, batch = f"[{unit_of(metric) or 1}]", rows[0].batch
    heads = ("model", "firing", "T", "file\n[KiB]", *(f"T={t}\n{unit}" if t else unit for t in steps),
             "batch 1\n[ms]", f"batch {batch}\n[ms]", "equal\nlogits")  # fmt: skip
    for i, head in enumerate(heads):
        out.add_column(head, justify="left" if i < 2 else "right", vertical="bottom", no_wrap=True)
    for row in rows:
        cells = [shown(accuracy_at(row, t) if row.accuracy else None, metric) for t in steps]
        out.add_row(
            Text(row.name), row.firing or "ANN", str(row.made_for) if row.firing else NONE, kib(row.file_bytes),
            *(cell[:5] if metric == "accuracy" else cell for cell in cells), shown(row.latency_ms, "deployed"),
            shown(row.batch_ms, "deployed"), equal_logits(row),
        )  # fmt: skip
    out.caption, out.caption_justify = DEPLOYED, "left"
    return out


DEPLOYED = """Timed in turns at T, another image each call; .onnx files by ONNX Runtime, checkpoints by torch.
Equal logits: images of which every logit is the checkpoint's to the last bit."""
"""What stands below such a table."""


def equal_logits(row: Deployed) -> str:
    """Of how many images every logit is the parent's: "all", "539/540", a dash where none was compared."""
    if row.equal is None:
        return NONE
    return "all" if row.equal == row.n else f"{row.equal}/{row.n}"
