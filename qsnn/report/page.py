"""The report: one HTML page that needs no other file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsnn.files import write_atomic
from qsnn.measure.accuracy import interval
from qsnn.report.curve import COLOURS, drawn
from qsnn.report.terminal import (
    COLUMNS,
    NARROW,
    NONE,
    accuracy_at,
    equal_logits,
    kib,
    shown,
    shown_steps,
    unit_of,
)

if TYPE_CHECKING:
    from qsnn.export.deployed import Deployed
    from qsnn.measure.result import Benchmark

_DEFERRED = """Deferred firing costs latency: a layer fires only after all T steps of its input have come, so on
pipelined hardware the answer takes depth \u00d7 T steps."""
_INTERVAL = "± half the 95 % Wilson interval."
_LEGEND = """Spike rate: spikes per neuron and step. Synops (spike-driven accumulates)
and MACs (multiply-accumulates; of a spiking model: those of layers that see no spikes) per image."""
_COSTS = """Membranes and peak for one image; the peak is what tensors take at one time, without the parameters.
Latency: one image, median. Of spiking models at the T they are made for."""

_DEPLOYED = """Timed in turns at T, one thread setting for all, another image each call, median. Accuracy after the last
step. Equal logits: test images of which every logit is the other network's to the last bit."""


def _headline_model(results: Sequence[Benchmark]) -> Benchmark:
    """The student; without one, the last spiking model; without that, the last model."""
    ranked = [r for r in results if r.timesteps] or results
    return next((r for r in ranked if r.name.startswith("student")), ranked[-1])


def headline(results: Sequence[Benchmark], config: dict[str, Any]) -> str:
    """Say the result in one sentence: the student at T = 2 (else at its last T), and the models it came from."""
    model = _headline_model(results)
    t = 2 if 2 in model.timesteps else shown_steps([model])[-1]
    when = {0: "", 1: " in one step", 2: " in two steps"}.get(t, f" in {t} steps")
    bits = next((value for key, value in _flat(config) if key.split(".")[-1] == "weight_bits"), None)
    words = {"QANN": f"the {f'{bits}-bit ' if bits else ''}QANN it was made from", "teacher": "the float teacher"}
    text = f"{model.name[:1].upper()}{model.name[1:]}: {_score(model, accuracy_at(model, t))}{when}"
    for name, what in words.items():
        for r in results:
            if r.name == name and r != model:
                text += f", {what} {_score(r, r.accuracy[0])}"
    text += "."
    return text.replace(" %", "\u00a0%")


def _score(result: Benchmark, value: float | None) -> str:
    """A score in the sentence: "92.1 %", "mean IoU 81.30 %", "mean squared error 0.0123"."""
    if result.metric == "accuracy":
        return f"{shown(value, 'short accuracy')} %"
    return f"{result.metric} {shown(value, result.metric)} {unit_of(result.metric)}".rstrip()


def _inline_curve(results: Sequence[Benchmark]) -> str:
    """The curve as SVG inside the page, in the page's fonts and colours."""
    text = re.sub(r"<metadata>.*?</metadata>", "", drawn(results, "svg", "none", 4.5, 3.2).decode(), flags=re.DOTALL)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    says = f"{results[0].metric} against time steps"
    return f'<figure role="img" aria-label="{says}">{text[text.index("<svg") :]}</figure>'


def _html(rows: Sequence[Sequence[str]], head: Sequence[str] = (), kind: str = "") -> str:
    """An HTML table in a box that scrolls; each row starts with its name, and a cell may bring a <td> of its own."""
    top = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead>" if head else ""
    body = ""
    for name, *cells in rows:
        body += f"<tr><th>{name}</th>{''.join(c if c.startswith('<td') else f'<td>{c}</td>' for c in cells)}</tr>\n"
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>' if rows else ""


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _results(results: Sequence[Benchmark]) -> str:
    steps, rows = shown_steps(results), []
    for r in results:
        cells = [escape(r.name), r.firing or "ANN", kib(r.weight_bytes)]
        for t in steps if r.timesteps else [0]:
            a = accuracy_at(r, t)
            text = shown(a, r.metric)
            if a is not None and r.metric == "accuracy":
                low, high = interval(a / 100, r.n)
                text += f" <small>±{shown(50 * (high - low), 'accuracy')}</small>"
            cells.append(text if r.timesteps else f'<td class="ann" colspan="{len(steps)}">{text}</td>')
        rows.append([*cells, *(cell(r, NARROW) for cell in COLUMNS.values())])
    metric = results[0].metric
    unit = f"[{unit_of(metric) or 1}]"
    accuracy = [f"T&nbsp;=&nbsp;{t}<br>{unit}" if t else f"{metric}<br>{unit}" for t in steps]
    measured = [name.replace(" ", "<br>") for name in COLUMNS]
    return _html(rows, ["model", "firing", "weights<br>[KiB]", *accuracy, *measured], "results")


def _heads(results: Sequence[Benchmark]) -> str:
    """Of networks of several heads the score of each, after the last step."""
    names = {name: name.rpartition(", ")[2] for r in results for name in r.heads}
    rows = [[escape(r.name), *(shown(r.heads[n][-1], m) if n in r.heads else NONE for n, m in names.items())]
            for r in results if r.heads]  # fmt: skip
    return _html(rows, ["model, last T", *(f"{escape(n)}<br>[{unit_of(m) or 1}]" for n, m in names.items())])


def _rates(results: Sequence[Benchmark]) -> str:
    """Spikes per neuron and step as bars, one row for each layer, one column for each model with the same layers."""
    layers = _headline_model(results).spike_rates
    alike = [r for r in results if layers and set(r.spike_rates) == set(layers)]
    full = max([rate for r in alike for rate in r.spike_rates.values()], default=0) or 1
    rows = []
    for layer in layers:
        rates = [r.spike_rates[layer] for r in alike]
        bars = [f'<i style="width:{65 * rate / full:.1f}%"></i>{shown(rate, "rate")}' for rate in rates]
        rows.append([escape(layer), *bars])
    return _html(rows, ["layer", *(escape(r.name) for r in alike)], "rates")


def _energy(results: Sequence[Benchmark]) -> str:
    """The three estimates of each model side by side; below them what each assumes, and where it comes from."""
    names = [estimate.name for estimate in results[0].energy]
    of = {name: "QANN" if name == names[-1] else "ANN" for name in names}
    if not names:
        return ""
    rows = []
    for r in results:
        cells = []
        for estimate in r.energy:
            lines = []
            if estimate.microjoules is not None:
                lines.append(f"{shown(estimate.microjoules, 'energy')}\u00a0µJ")
            if estimate.ratio is not None:
                lines.append(f"{shown(estimate.ratio, 'ratio')}\u00a0of\u00a0the\u00a0{of[estimate.name]}")
            if estimate.break_even is not None:
                lines.append(f"<small>even at rate {shown(estimate.break_even, 'rate')}</small>")
            cells.append("<br>".join(lines) or NONE)
        rows.append([escape(r.name), *cells])
    text = "".join(f"<li>{escape(e.name)}: {escape(e.assumes)} ({escape(e.source)}).</li>" for e in results[-1].energy)
    return f'{_html(rows, ["model", *map(escape, names)])}<ul class="muted">{text}</ul>'


def _costs(results: Sequence[Benchmark]) -> str:
    """Memory and time of each model."""
    rows = [
        [
            escape(r.name),
            ", ".join(f"{bits if bits == 'other' else f'{bits} bit'}: {kib(n)}"
                      for bits, n in r.weight_bytes_by_bits.items()),
            kib(r.state_bytes), kib(r.peak_bytes, "peak"), shown(r.latency_ms, "latency"),
            shown(r.throughput, "throughput"),
        ]
        for r in results
    ]  # fmt: skip
    head = ["model", "weights [KiB]", "membranes<br>[KiB]", "peak<br>[KiB]", "latency<br>[ms]", "images<br>a second"]
    return f'{_html(rows, head)}<p class="muted">{_COSTS}</p>'


def _deployed(rows: Sequence[Deployed]) -> str:
    """Size and time of exported files and of what stands beside them, and whether their logits are the same."""
    body = []
    for row in rows:
        t, last = str(row.made_for) if row.firing else NONE, row.accuracy[-1] if row.accuracy else None
        body.append([
            escape(row.name), escape(row.runtime), row.firing or "ANN", t, kib(row.file_bytes),
            shown(last, row.metric), shown(row.latency_ms, "deployed"), shown(row.batch_ms, "deployed"),
            equal_logits(row) + (f" of {escape(row.parent)}" if row.parent else ""),
        ])  # fmt: skip
    if not body:
        return ""
    metric = next((row.metric for row in rows if row.accuracy), "accuracy")
    head = ["file", "runs in", "firing", "T", "size<br>[KiB]", f"{metric}<br>[{unit_of(metric) or 1}]",
            "batch 1<br>[ms]", f"batch {rows[0].batch}<br>[ms]", "equal logits"]  # fmt: skip
    return f'{_html(body, head)}<p class="muted">{_DEPLOYED}</p>'


def _agreement(results: Sequence[Benchmark]) -> str:
    """Answers equal to the QANN's: a row for each T, a column for each model (narrow screens have room below)."""
    columns = {r.name: dict(zip(r.timesteps, r.agreement, strict=True)) for r in results if r.timesteps and r.agreement}
    steps = sorted({t for found in columns.values() for t in found})
    rows = [[f"T = {t}", *(f"{shown(c[t], 'accuracy')} %" if t in c else "" for c in columns.values())] for t in steps]
    return _html(rows, ["", *map(escape, columns)])


def _early(results: Sequence[Benchmark]) -> str:
    """A row for each margin; in it the accuracy and the mean T of each model."""
    leaving = [{e.margin: e for e in r.exits} for r in results if r.exits]
    margins = sorted({margin for exits in leaving for margin in exits})
    rows = []
    for margin in margins:
        ends = [exits[margin] for exits in leaving]
        rows.append([shown(margin, "margin"), *(
            f"{shown(end.accuracy, 'accuracy')}\u00a0% <small>T\u00a0=\u00a0{shown(end.timesteps, 'timesteps')}</small>"
            for end in ends
        )])  # fmt: skip
    return _html(rows, ["lead", *(escape(r.name) for r in results if r.exits)])


def _confusion(matrix: list[list[int]]) -> str:
    """The matrix, or where it is too large to be read (K > 20) the most frequent mistakes."""
    if len(matrix) > 20:
        wrong = [(n, i, k) for i, row in enumerate(matrix) for k, n in enumerate(row) if n and i != k]
        return _html([[f"{i} → {k}", f"{n} images"] for n, i, k in sorted(wrong, reverse=True)[:12]])
    rows = []
    for i, row in enumerate(matrix):
        # the square root of the share: in proportion, a single mistake would be too pale to see beside the diagonal
        shade = [f"var(--c{int(i != k)}) {60 * (n / max(1, sum(row))) ** 0.5:.0f}%" for k, n in enumerate(row)]
        cell = '<td style="background:color-mix(in srgb,{},transparent)">{}</td>'
        rows.append([str(i), *(cell.format(s, n or "") for s, n in zip(shade, row, strict=True))])
    return _html(rows, ["", *(str(k) for k in range(len(matrix)))], "confusion")


_RULES = """
body{margin:0 auto;max-width:1000px;padding:2rem 1rem 4rem;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.1rem;font-weight:600;color:var(--muted);margin:0} h2{font-size:1.15rem;margin:2.4rem 0 .7rem}
.lead{font-size:1.5rem;line-height:1.35;font-weight:600;margin:.3rem 0 .5rem;max-width:none;text-wrap:balance}
p,li{max-width:46rem} small,.muted{color:var(--muted)} .muted{font-size:.875rem} .scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:500;vertical-align:bottom;line-height:1.25} tbody th{font-weight:600}
th:first-child,.settings td,.rates :is(th,td),.results :is(th,td):nth-child(2){text-align:left}
.results,.rates{width:100%} .results .ann{text-align:center} tbody th{position:sticky;left:0;background:var(--paper)}
.settings th{font-weight:400;color:var(--muted)} .settings td{white-space:normal;overflow-wrap:anywhere}
.confusion :is(td,th){padding:.25rem .1rem;min-width:1.95rem;text-align:center;border:1px solid var(--paper)}
.rates td{min-width:8rem} i{display:inline-block;height:.6rem;margin-right:.4rem;background:var(--c0)}
figure{margin:0;max-width:600px} svg{display:block;width:100%;height:auto} svg text{font-family:inherit!important}
pre{background:var(--box);border-radius:6px;padding:.8rem 1rem;overflow-x:auto;font:.8125rem/1.5 monospace}"""


def _style() -> str:
    """The style sheet: the colours as variables, light and dark, and the rules that use them."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    return (
        f"*{{box-sizing:border-box}}:root{{color-scheme:light dark;{light}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"
    )


def write_report(
    path: str | Path, *, title: str, results: Sequence[Benchmark], certificate: str | None, config: dict[str, Any],
    environment: dict[str, Any], command: str, notes: Sequence[str], stages: Sequence[tuple[str, float]] | None,
    deployed: Sequence[Deployed] = (),
) -> None:  # fmt: skip
    """Write one HTML page, light and dark, that asks the network for nothing.

    Args:
        path: the file, written whole or not at all.
        title: what was run, e.g. "vgg-small on digits".
        results: one for each model, in the order of the flow; at least one.
        certificate: the text of ``certify``; like ``stages``, None leaves the section out.
        config: every setting; nested dicts are flattened.
        environment: ``records.environment()``.
        command: what to type to get the same again.
        notes: sentences for the reader, plain text.
        stages: (name, seconds) of what was run.
        deployed: exported files, and what they are compared with.
    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("expected at least one result, came none; call benchmark(model, data.test) first")
    model = _headline_model(results)
    if any(r.firing == "deferred" for r in results):
        notes = [*notes, _DEFERRED]
    notes = [*notes, *(f"{r.counts_said}." for r in results if r.counts_said)]
    metric = results[0].metric
    settings = [[[escape(k), escape(str(v))] for k, v in _flat(values)] for values in (config, environment)]
    confused = next((r for r in [model, *reversed(results)] if r.confusion), model)
    sections = [
        ("Results", f'{_results(results)}<p class="muted">{_INTERVAL if metric == "accuracy" else ""} {_LEGEND}</p>'),
        ("Heads", _heads(results)),
        ("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""),
        (f"{metric} against time steps".capitalize(), _inline_curve(results) if shown_steps(results) != [0] else ""),
        ("Same answer as the QANN", _agreement(results)),
        ("Early exit: accuracy and mean T where an image stops once a class leads", _early(results)),
        ("Spike rate by layer", _rates(results)),
        ("Energy of an image, three estimates", _energy(results)),
        ("Memory and time", _costs(results)),
        ("Exported", _deployed(deployed)),
        (f"Confusion (row: label, column: answer): {escape(confused.name)}", _confusion(confused.confusion or [])),
        ("Certificate", f"<pre>{escape(certificate)}</pre>" if certificate else ""),
        ("Time", _html([[escape(name), f"{shown(seconds, 'seconds')} s"] for name, seconds in stages or []])),
        ("Configuration", _html(settings[0], kind="settings")),
        ("Environment", _html(settings[1], kind="settings")),
        ("How to get the same again", f"<pre>{escape(command)}</pre>"),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections if content)
    write_atomic(
        path,
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_style()}</style></head>
<body><h1>{escape(title)}</h1><p class="lead">{escape(headline(results, config))}</p>
<p class="muted">{model.n:,} test images.</p>{body}</body></html>\n""",
    )
