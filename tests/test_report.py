"""The report: one page that needs nothing else, escapes what it is given, and shows the numbers it was given."""

import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qsnn.measure.energy import LayerCost, estimates
from qsnn.measure.tally import Exit
from qsnn.report.curve import _curve, draw_curve
from qsnn.report.page import headline, write_report
from qsnn.report.terminal import energy_table, table

COST = LayerCost(name="0", weight_bits=4, input_bits=8, macs=1e6, synops=0.0, dense_macs=1e6)
LAYERS = {"features.0": 0.21, "features.3": 0.12}
VOID = {"meta", "br", "link", "img"}


def ann(name, accuracy, **fields):
    """A benchmark of a model without time."""
    default = {
        "name": name, "n": 1000, "timesteps": (), "accuracy": (accuracy,), "metric": "accuracy", "heads": {},
        "counts_said": "", "firing": None, "spike_rates": {},
        "spike_rate": None, "synops": None, "macs": 4.6e6, "weight_bytes": 2048, "confusion": None, "agreement": None,
        "seconds": 1.0, "exits": (), "state_bytes": 1024, "peak_bytes": 9000, "latency_ms": 0.5, "throughput": 2000.0,
        "weight_bytes_by_bits": {"4": 1024, "other": 1024}, "energy": estimates([COST], spike_rate=fields.get("rate")),
    }  # fmt: skip
    return SimpleNamespace(**{**default, **fields})


def snn(name, accuracy, timesteps=(1, 2, 4, 8), **fields):
    """A benchmark of a spiking model."""
    spiking = {"timesteps": timesteps, "accuracy": accuracy, "firing": "online", "spike_rates": LAYERS}
    return SimpleNamespace(**{**vars(ann(name, 0.0)), **spiking, "spike_rate": 0.165, "synops": 1.23e6, **fields})


def flow(first=90.0):
    """What a whole run returns."""
    return [
        ann("teacher", 99.4), ann("QANN", 99.3),
        snn("SNN online", (first, 97.0, 98.5, 98.75), agreement=(91.0, 97.5, 98.0, 98.5)),
        snn("SNN deferred", (99.3,), timesteps=(2,), firing="deferred", agreement=(100.0,)),
        snn("student", (97.0, 99.1, 99.2, 99.2), confusion=[[500, 4], [5, 491]]),
        snn("student, folded", (97.0, 99.1, 99.2, 99.2)),
    ]  # fmt: skip


def page(path, **fields):
    """The text of a written report."""
    default = {
        "title": "vgg-small on digits", "results": flow(), "certificate": "EXACT on 360 images", "notes": ["One seed."],
        "config": {"quantize": {"weight_bits": 4, "levels": 2}, "seed": 0}, "environment": {"commit": None},
        "command": "qsnn run --data digits", "stages": [("teacher", 12.25)],
    }  # fmt: skip
    write_report(path, **{**default, **fields})
    return path.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks that every tag is closed in order, and keeps tags, links and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def terminal(results, width=80):
    """What ``table`` looks like in a terminal."""
    console = Console(width=width, file=io.StringIO())
    console.print(table(results))
    return console.file.getvalue()


def test_the_page_asks_the_network_for_nothing(tmp_path):
    text = page(tmp_path / "r.html")
    outline = Outline(text)
    assert all(link.startswith("#") for link in outline.links)
    assert not {"script", "iframe", "object", "img", "link"} & set(outline.tags)
    assert not re.search(r"""(src|href)\s*=\s*["']?https?:|@import|url\((?!#)""", text)


def test_the_figure_follows_the_theme(tmp_path):
    text = page(tmp_path / "r.html")
    figure = text[text.index("<svg") : text.index("</svg>")]
    assert set(re.findall(r"#[0-9a-f]{6}\b", figure)) == set()  # each colour is a variable of the page
    assert "var(--ink)" in figure and "prefers-color-scheme:dark" in text
    assert "SNN deferred" in figure and ">time steps T<" in figure  # text stays text


def test_the_page_shows_every_section_and_number(tmp_path):
    text = Outline(page(tmp_path / "r.html")).text
    for words in (
        "Student: 99.1 % in two steps, the 4-bit QANN it was made from 99.3 %, the float teacher 99.4 %.",
        "1,000 test images", "97.00 ±1.07", "98.75 ±0.71", "0.165", "1.23 M", "4.6 M", "2.0", "depth × T",
        "T = 2 97.50 % 100.00 %", "features.3 0.120", "0 500 4 1 5 491", "EXACT on 360 images", "One seed.",
        "teacher 12.2 s",
        "quantize.levels 2", "commit None", "qsnn run --data digits",
    ):  # fmt: skip
        assert words in text


def test_sections_without_content_are_left_out(tmp_path):
    only = [ann("teacher", 99.4)]
    text = Outline(page(tmp_path / "r.html", results=only, certificate=None, notes=[], stages=None)).text
    for head in ("Notes", "Certificate", "Time", "Spike rate by layer", "Confusion", "depth", "Same answer"):
        assert head not in text.replace("Spike rate:", "")
    assert "Teacher: 99.4 %." in text


@settings(deadline=None, derandomize=True, max_examples=8)
@given(text=st.text(st.characters(max_codepoint=0x17F, exclude_categories=["Cc"]), min_size=1))  # what the font has
def test_any_text_is_escaped(tmp_path_factory, text):
    evil = f"<b a='\">&{text}$x_$"
    outline = Outline(page(
        tmp_path_factory.mktemp("report") / "r.html", title=evil, certificate=evil, command=evil, notes=[evil],
        config={evil: {evil: evil}}, environment={evil: evil}, stages=[(evil, 1.0)],
        results=[snn(evil, (99.0,) * 4, spike_rates={evil: 0.1}, confusion=[[1]], agreement=(1.0,) * 4)],
    ))  # fmt: skip
    assert "b" not in outline.tags
    squeezed = " ".join(evil.replace("\u00a0", " ").split())
    assert outline.text.count(squeezed) >= 12


def test_a_large_confusion_matrix_becomes_its_worst_mistakes(tmp_path):
    matrix = [[90 if i == k else 0 for k in range(30)] for i in range(30)]
    matrix[7][3] = 10
    text = Outline(page(tmp_path / "r.html", results=[snn("student", (9.0,) * 4, confusion=matrix)])).text
    assert "student 7 → 3 10 images Certificate" in text


@pytest.mark.parametrize(("results", "config", "sentence"), [
    (flow()[:4], {}, "SNN deferred: 99.3 % in two steps, the QANN it was made from 99.3 %, the float teacher 99.4 %."),
    ([snn("student", (80.0,), timesteps=(1,))], {}, "Student: 80.0 % in one step."),
    ([snn("student", (80.0, 81.0), timesteps=(1, 4))], {"weight_bits": 1}, "Student: 81.0 % in 4 steps."),
    ([ann("QANN", 98.0)], {"weight_bits": 1}, "QANN: 98.0 %."),
])  # fmt: skip
def test_headline(results, config, sentence):
    assert headline(results, config).replace("\u00a0", " ") == sentence


def test_the_terminal_table_fits_80_columns_and_cuts_nothing():
    perfect = snn("student, folded", (100.0,) * 4, firing="deferred", synops=999_500.0, weight_bytes=9999 * 1024)
    text = terminal([*flow(), ann("QANN", 100.0), perfect])
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert re.search(r"teacher +ANN +2\.0 +99\.40 +99\.40 +99\.40 +99\.40 +– +–", text)
    assert re.search(r"SNN deferred +deferred +2\.0 +– +99\.30 +– +– +0\.165 +1\.23M", text)
    assert re.search(r"student, folded +deferred +9999\.0( +100\.0){4} +0\.165 +1M", text)
    assert "T=8" in text


def test_table_without_spiking_models():
    assert re.search(r"QANN +ANN +2\.0 +99\.30 ", terminal([ann("QANN", 99.3)]))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("results", [flow(), flow(first=10.0), flow()[2:], [snn("student", (50.0,), timesteps=(1,))]])
def test_equal_results_draw_equal_bytes(tmp_path, suffix, results):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        draw_curve(results, path, title="digits, cost $5 and $6_")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml"}[suffix])


@pytest.mark.parametrize(("results", "low", "high"), [
    (flow(), 85, 90),  # every point is drawn, not the empty space down to 0
    (flow(first=10.0), 90, 97),  # one point that would flatten the rest is written
    ([ann("QANN", 99.0), snn("SNN", (10.0, 10.0, 60.0, 98.0))], 0, 0),
    ([ann("QANN", 99.0), snn("SNN", (50.0,), timesteps=(2,))], 0, 50),
])  # fmt: skip
def test_the_accuracy_axis_shows_the_differences(results, low, high):
    axes = _curve(results, 5, 3).axes[0]
    bottom, top = axes.get_ylim()
    assert low <= bottom <= high and top >= 99
    written = axes.texts[0].get_text()
    assert written == ("↓ SNN online, T = 1: 10.0 %" if low == 90 else "")
    steps = sorted({t for r in results for t in r.timesteps})
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(t) for t in steps]


def test_drawing_leaves_the_global_state_alone(tmp_path):
    import matplotlib
    from matplotlib._pylab_helpers import Gcf  # pyplot's list of figures

    before = dict(matplotlib.rcParams)
    draw_curve(flow(), tmp_path / "a.png", title="x")
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs


@pytest.mark.parametrize(("results", "name", "message"), [
    (flow(), "curve.jpg", r"\.png or \.svg, came 'curve\.jpg'; rename it"),
    ([ann("QANN", 99.0)], "curve.png", r"came \['QANN'\]; benchmark the SNN too"),
    ([], "curve.png", r"came \[\]"),
])  # fmt: skip
def test_draw_curve_refuses(tmp_path, results, name, message):
    with pytest.raises(ValueError, match=message):
        draw_curve(results, tmp_path / name, title="x")
    assert list(tmp_path.iterdir()) == []


def test_write_report_refuses_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one result, came none"):
        page(tmp_path / "r.html", results=[])


def test_energy_stands_with_its_assumptions(tmp_path):
    text = Outline(page(tmp_path / "a.html")).text
    for words in ("4.6 pJ a MAC", "Horowitz", "Dampfhoffer", "ratio to the QANN", "membrane of 16 bit"):
        assert words in text
    console = Console(width=200, file=io.StringIO())
    console.print(energy_table(flow()))
    printed = console.file.getvalue()
    assert "4.6 pJ a MAC" in printed and "Horowitz" in printed and printed.count("student") == 2


def test_early_exit_is_drawn_and_listed(tmp_path):
    exits = (Exit(margin=0.5, timesteps=1.5, accuracy=98.0), Exit(margin=0.9, timesteps=3.0, accuracy=99.1))
    results = [snn("student", (97.0, 99.1, 99.2, 99.2), exits=exits)]
    text = page(tmp_path / "a.html", results=results)
    assert "student, early exit" in text and "98.00 %" in Outline(text).text
    lines = _curve(results, 5, 3).axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines if line.get_label().endswith("early exit")] == [[1.5, 3.0]]
