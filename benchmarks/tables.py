"""Records to Markdown: every generated block of README.md, RESULTS.md and benchmarks/README.md, by its name."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import studies
from lookup import by_label, by_time, drawing, experiment, flow, networks, newest, of_study, timed, whole

from qsnn.cli.config import command_of
from qsnn.measure.accuracy import interval
from qsnn.report.records import Record
from qsnn.report.terminal import NONE, number, si

HERE = Path(__file__).resolve().parent
FLOW = ("teacher", "QANN", "SNN online", "SNN deferred", "student")
PEER = "SpikingJelly"
"""The row of trained_peer.py."""
STEPS = (1, 2, 4, 8)
EMPTY = "no records yet"
LIBRARIES = {"SpikingJelly": "SJ", "snnTorch": "snnTorch", "Norse": "Norse"}
"""Library -> how its recipes' names begin."""


# --- Markdown ---------------------------------------------------------------------------------------------------------


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; the first ``left`` columns are flush left, the others flush right."""
    rule = f"|{':---|' * left}{'---:|' * (len(head) - left)}"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; of one value the value."""
    spread = f" ± {number(stdev(values), digits)}" if len(values) > 1 else ""
    return number(fmean(values), digits) + spread


def by_steps(*steps: int) -> dict[str, str]:
    """Heads of the accuracies at these T."""
    return {f"T={t}": f"T = {t} [%]" for t in steps}


def distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def count_of(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def images_of(records: Iterable[Record], part: str = "test") -> str:
    """How many images of a part of the data; of several data sets each with its number."""
    sizes = dict.fromkeys((r.data, r.n) for r in records)
    if len({n for _, n in sizes}) == 1:
        return f"{next(iter(sizes))[1]:,} {part} images"
    return f"{', '.join(dict.fromkeys(f'{n:,}' for _, n in sizes))} {part} images"


def world(records: Iterable[Record]) -> str:
    """Device, commit and versions of some records."""
    worlds = [r.environment for r in records]
    versions = [f"{name} {distinct(w[name] for w in worlds)}" for name in ("torch", "brevitas", "spikingjelly")]
    commits = f"commit {distinct(w['commit'][:7] for w in worlds)}"
    return "; ".join([distinct(w["device"] for w in worlds), commits, *versions])


def seeds_of(records: Iterable[Record]) -> str:
    return f"seeds: {distinct(sorted({r.seed for r in records}))}"


# --- the whole flow: qsnn run, reproduce_cifar10.py -------------------------------------------------------------------


def accuracies(rows: Sequence[Record], t: int) -> list[float] | None:
    """Accuracy at T = t of every seed [%]; an ANN has one for every t."""
    metrics = [r.metrics for r in rows]
    values = [dict(zip(m["timesteps"] or [t], m["accuracy"], strict=True)).get(t) for m in metrics]
    return None if None in values else values


def spread(values: Sequence[float], n: int) -> float:
    """Sample standard deviation over the seeds [%]; of one seed half the 95 % Wilson interval over the images."""
    if len(values) > 1:
        return stdev(values)
    low, high = interval(values[0] / 100, n)
    return 50 * (high - low)


def _flow_row(model: str, rows: Sequence[Record]) -> list[str]:
    def mean(key: str) -> float | None:
        values = [r.metrics[key] for r in rows]
        return None if None in values else fmean(values)

    cells = [f"{PEER}, trained" if model == PEER else model, number((mean("weight_bytes") or 0) / 1024, 1)]
    for t in STEPS:
        values = accuracies(rows, t)
        if values is None:
            cells.append(NONE)
            continue
        text = f"{number(fmean(values))} ± {number(spread(values, rows[0].n))}{'' if len(rows) > 1 else ' †'}"
        cells.append(text if rows[0].metrics["timesteps"] else f"*{text}*")
    return [*cells, number(mean("spike_rate"), 3), *(si(mean(key), gap=" ") for key in ("synops", "macs"))]


def flow_table(chosen: dict[str, list[Record]], command: str, figure: str = "", files: Sequence[Record] = ()) -> str:
    """Accuracy against T, spikes, operations and memory of every model of a flow; ``files``: of its exported files."""
    if not chosen:
        return EMPTY
    every = [r for rows in chosen.values() for r in rows]
    first, seeds = every[0], distinct(r.seed for r in chosen["student"])
    if len({r.n for r in every}) > 1:
        raise ValueError(f"expected one number of test images for {first.data}, got {distinct(r.n for r in every)}")
    config = first.config.get("run") or {**first.config["quantize"], "model": first.config["model"]}
    verdicts = [r.metrics["certificate"] for r in (chosen.get("SNN deferred") or chosen["student"])]
    one, several = (
        "† one seed: half the 95 % Wilson interval over the test images",
        "±: standard deviation over the seeds",
    )
    words = [
        f"`{command}`",
        f"{first.n:,} test images",
        f"seeds: {seeds}",
        f"{config['model']}, {config['weight_bits']}-bit weights, L = {config['levels']}",
        f"certificates that say EXACT: {sum(v == 'EXACT' for v in verdicts)} of {len(verdicts)}",
        *_of_files([r for r in files if any(experiment(r.config) == experiment(one.config) for one in every)]),
        *(_of_peer(chosen[PEER]) if PEER in chosen else []),
        world(every),
        one if len(chosen["student"]) == 1 else several,
    ]
    head = ["model", "weights [KiB]", *(f"T = {t} [%]" for t in STEPS), "spike rate", "synops", "MACs"]
    text = f"{grid(head, [_flow_row(*item) for item in chosen.items()])}\n\n{'; '.join(words)}."
    return f"{text}\n\n![accuracy against time steps, {first.data}](figures/{figure}.svg)" if figure else text


def _of_peer(records: Sequence[Record]) -> list[str]:
    """How SpikingJelly's network was trained beside the student."""
    hows = (f"{r.metrics['peer']}: {count_of(r.metrics['peer_epochs'], 'epoch')}" for r in records)
    how = " | ".join(dict.fromkeys(hows))
    ours = count_of(records[0].config["distill"]["epochs"], "epoch")
    return [f"{PEER}'s IFNode ({how}) trained by `trained_peer.py` in the time that the student's {ours} take"]


def with_peer(records: Sequence[Record], prefix: str, models: Sequence[str], data: str) -> dict[str, list[Record]]:
    """A flow, and SpikingJelly's row where every seed has it."""
    alone, both = (flow(records, prefix, found, data) for found in (models, [*models, PEER]))
    return both if both and len(both["student"]) == len(alone.get("student", ())) else alone


def _of_files(records: Sequence[Record]) -> list[str]:
    """In how many images an exported file has every logit of its network; [] where there is none."""
    if not (last := newest(records)):
        return []
    equal, n = sum(r.metrics["equal"] for r in last), sum(r.n for r in last)
    return [f"images of which the ONNX file (T = {last[0].metrics['made_for']}) has every logit: {equal:,} of {n:,}"]


def run_tables(data: str, records: Sequence[Record]) -> str:
    """A table and a figure for every network that ``qsnn run`` was run with on a data set."""
    texts = []
    for network, mine in networks(records, data).items():
        chosen = with_peer(mine, "run", FLOW, data)
        typed = chosen["student"][-1].config["run"] if chosen else {}
        command = command_of({**typed, "data": data}, without=("out", "seed"))
        files = [r for r in mine if r.name == "run/net.onnx"]
        texts.append(flow_table(chosen, command, drawing(network), files))
    return "\n\n".join(texts) or EMPTY


def _cifar10_flow(records: Sequence[Record], net: str) -> dict[str, list[Record]]:
    names = {r.name for r in records}
    models = ("teacher", "QANN", "QANN on", "SNN online", "student")
    found = [model for model in models if f"cifar10/{net}/{model}" in names]
    return with_peer(records, f"cifar10/{net}", found, "cifar10") if found else {}


def _cifar10_stages(config: dict[str, Any]) -> list[str]:
    """What says how the stages of scripts/reproduce_cifar10.py were trained, as it is typed."""
    own = config["teacher"].get("train")
    epochs = (own["epochs"] if own else 0, config["train"]["epochs"], config["distill"]["epochs"])
    precisions = dict.fromkeys(config[part].get("precision", "fp32") for part in ("train", "distill"))
    said = ([] if own else ["--weights FILE"]) + [f"--epochs {' '.join(map(str, epochs))}"]
    return said + ([] if list(precisions) == ["fp32"] else [f"--precision {' '.join(precisions)}"])


def cifar10_tables(records: Sequence[Record]) -> str:
    """A table for every network that scripts/reproduce_cifar10.py was run on."""
    texts = []
    for net in dict.fromkeys(r.name.split("/")[1] for r in records if r.name.startswith("cifar10/")):
        model, bits, *more = re.fullmatch(r"(.+?)(?:-w(\d+))?(-signed)?(-quick)?", net).groups()  # type: ignore[union-attr]
        said = [f"--weight-bits {bits}"] if bits else []
        said += [f"-{option}" for option in more if option]
        chosen = _cifar10_flow(records, net)
        trained = _cifar10_stages(chosen["student"][-1].config) if chosen else []
        option = " ".join(said if "--quick" in said else [f"--model {model}", *said, *trained])
        files = [r for r in records if r.name == f"cifar10/{net}/net.onnx"]
        texts.append(flow_table(chosen, f"python scripts/reproduce_cifar10.py {option}", files=files))
    return "\n\n".join(texts) or EMPTY


# --- the studies ------------------------------------------------------------------------------------------------------

_SHOWN: dict[str, Callable[[list[float]], str]] = {
    "synops": lambda values: si(fmean(values), gap=" "),
    "weight_bytes": lambda values: number(fmean(values) / 1024, 1),
    "parameters": lambda values: f"{fmean(values):,.0f}",
    "macs": lambda values: si(fmean(values), gap=" "),
    "macs on counts": lambda values: si(fmean(values), gap=" "),
    "exact": lambda values: "100" if min(values) == 100 else plus_minus(values),
}


def metrics_table(titles: dict[str, str], records: Sequence[Record]) -> str:
    """Mean ± standard deviation over the seeds of some metrics, a row a label."""
    keys = [key for key in titles if any(key in r.metrics for r in records)]
    rows = []
    for label, found in by_label(records).items():
        values = {key: [r.metrics[key] for r in found if r.metrics.get(key) is not None] for key in keys}
        cells = (_SHOWN.get(key, plus_minus)(values[key]) if values[key] else NONE for key in keys)
        rows.append([label, *cells, str(len(found))])
    return grid(["setting", *(titles[key] for key in keys), "seeds"], rows)


def study_table(name: str, records: Sequence[Record], model: str = "study") -> str:
    """A study's table and the line below it; "" where it has none."""
    study, rows = studies.find(name), of_study(name, records, model)
    made = study.table(rows) if study.table and rows else ""
    text = made or (metrics_table(dict(study.titles), rows) if study.titles and rows else "")
    if not text:
        return ""
    return f"{text}\n\n{f'{study.note} '.lstrip()}{study_line(study, rows, model)}"


def study_line(study: studies.Study, rows: Sequence[Record], model: str) -> str:
    """The line below a study's table or above its figure: command, setting, images, seeds, device, commit."""
    setting = rows[0].config["setting"]
    images = "all" if setting["train_images"] is None else f"{setting['train_images']:,}"
    data = "several data sets" if setting["data"] == "all" else setting["data"]
    command = " ".join(["python benchmarks/study.py", study.name, *study.options.split()])
    words = [
        f"`{command}{'' if model == 'study' else f' --model {model}'}`",
        f"{data}, {study.net or setting['model'] + ' net'}, {images} training images, "
        f"{setting['epochs']} epochs a stage",
        images_of(rows, study.part), seeds_of(rows),
        *(["± standard deviation"] if len({r.seed for r in rows}) > 1 else []), world(rows),
    ]  # fmt: skip
    return f"{'; '.join(words)}."


def answer_of(name: str, records: Sequence[Record]) -> str:
    """The sentence that a study ends with, and on how much it stands; "" without the records of a whole seed."""
    rows, study = whole(name, records), studies.find(name)
    if not rows or study.answer is None:
        return ""
    data, images = rows[0].config["setting"]["data"], {r.n for r in rows}
    where = "several data sets" if data == "all" else data
    where += f", {images.pop():,} {study.part} images" if len(images) == 1 else ""
    return f"{study.answer(rows)} *({where}, {count_of(len({r.seed for r in rows}), 'seed')})*"


def all_studies(records: Sequence[Record]) -> str:
    """Every study: the question, the answer, the tables of every network it was asked on, the figure."""
    parts = []
    for name in studies.names():
        study, said = studies.find(name), answer_of(name, records)
        mine = [r for r in records if r.name.startswith(f"study-{name}/")]
        models = dict.fromkeys(r.config["setting"]["model"] for r in mine)
        tables = [study_table(name, records, model) for model in models]
        parts += [f"### {name}", f"**{study.question}** {said or EMPTY}", *filter(None, tables)]
        if said and not any(tables):
            parts.append(study_line(study, whole(name, records), "study"))
        if said and study.figure:
            parts.append(f"![{name}](figures/study-{name}.svg)")
    return "\n\n".join(parts)


def study_list(records: Sequence[Record]) -> str:
    """Command, question and size of every study."""
    found = [studies.find(name) for name in studies.names()]
    rows = [[f"`study.py {' '.join([s.name, *s.options.split()])}`", s.question, s.size] for s in found]
    return grid(["command", "question", "size"], rows, left=3)


# --- peers.py, throughput.py, zoo.py ----------------------------------------------------------------------------------


def peer_records(records: Sequence[Record]) -> list[Record]:
    """Of peers.py the newest experiment of every row."""
    rows = newest(r for r in records if r.name.startswith("peers/"))
    last = {(r.name, r.data): experiment(r.config) for r in rows}
    return [r for r in rows if experiment(r.config) == last[r.name, r.data]]


def by_method(records: Sequence[Record], data: str, net: str) -> dict[str, list[Record]]:
    """The records of every method on one network of a data set."""
    found = by_label(r for r in peer_records(records) if (r.data, r.name.split("/")[1]) == (data, net))
    return {label.partition("/")[2]: rows for label, rows in found.items()}


def best_of(library: str, by: dict[str, list[Record]], keys: Sequence[str], digits: int = 2) -> list[str]:
    """For each metric the best mean among a library's recipes, ± its standard deviation; [] without records."""
    found = [rows for name, rows in by.items() if name.startswith(f"{LIBRARIES[library]} ")]

    def best(key: str) -> str:
        values = max(([r.metrics[key] for r in rows] for rows in found), key=fmean)
        return plus_minus(values, digits)

    return [best(key) for key in keys] if found else []


def peers_table(records: Sequence[Record]) -> str:
    """Conversion without training: qsnn and, cell by cell, the best of each library's recipes."""
    rows = peer_records(records)
    if not rows:
        return EMPTY
    steps = [key for key in rows[0].metrics if key.startswith("T=")]

    def seconds(found: Iterable[Record]) -> str:
        values = [r.metrics["seconds"] for r in found if "seconds" in r.metrics]
        return number(fmean(values), 0) if values else NONE

    lines = []
    for data, net in dict.fromkeys((r.data, r.name.split("/")[1]) for r in rows):
        by = by_method(rows, data, net)
        mine, cell = [name for name in by if name.partition(",")[0] == "qsnn"], f"{data}, {net}"
        for method in sorted(mine):
            ours = [plus_minus([r.metrics[key] for r in by[method]]) for key in ("ann", *steps)]
            lines.append([cell if method == "qsnn" else "", method, *ours, seconds(by[method])])
        for library, short in LIBRARIES.items():
            if best := best_of(library, by, steps):
                every = (r for name, found in by.items() if name.startswith(f"{short} ") for r in found)
                lines.append(["", f"best of {library}", "", *best, seconds(every)])
    recipes = len({r.name.split("/", 2)[2] for r in rows if r.name.split("/", 2)[2].startswith("SJ ")})
    head = ["data, network", "method", "ANN [%]", *(f"T = {t[2:]} [%]" for t in steps), "time [s]"]
    sizes = ", ".join(f"{n:,} images of {data}" for data, n in dict.fromkeys((r.data, r.n) for r in rows))
    words = (
        f"`python benchmarks/peers.py`; test accuracy, mean ± standard deviation over {seeds_of(rows)}; {sizes}; the "
        f"best of a library's recipes (SpikingJelly {recipes}; snnTorch and Norse, which have no converter, their "
        f"neurons at two percentiles; Norse's resets to 0) is taken anew in every cell; spikes are 0 or 1, signed "
        f"ones -1 too; time to calibrate and to answer up to T = {steps[-1][2:]}, qsnn once for each T, of a library "
        f"the mean of its recipes; {world(rows)}."
    )
    return f"{grid(head, lines, left=2)}\n\n{words}"


def throughput_table(records: Sequence[Record]) -> str:
    """Ratios of time measured side by side."""
    qat, steps, curves, runs = (timed(kind, records) for kind in ("qat", "distill", "curve", "evaluation"))
    parts = []
    if qat:
        rows = [
            [r.config["model"], *(number(1e3 * r.metrics[k], 1) for k in ("float", "qat")),
             number(r.metrics["qat / float"])] for r in qat
        ]  # fmt: skip
        head = ["one training step of 128 images", "float [ms]", "W4/L2 [ms]", "ratio"]
        words = "`python benchmarks/throughput.py --only qat`; medians of steps taken in turns"
        parts += [grid(head, rows), f"{words}; {seeds_of(qat)}; {world(qat)}."]
    if steps:
        rows = []
        sides = {"qsnn": "", "qsnn, rate": ", gradient of the rate"}
        for r, (side, words) in itertools.product(steps, sides.items()):
            m = r.metrics
            if side not in m:
                continue
            ours, plain, last = (m[key] for key in (side, "spikingjelly, contiguous", "spikingjelly"))
            held = m[f"{side} MiB"], m["spikingjelly MiB"]
            rows.append([
                f"{r.config['model']}{words}", number(1e3 * ours, 1), number(1e3 * plain, 1), number(ours / plain),
                number(ours / last), *(number(value, 0) for value in held), number(held[0] / held[1]),
            ])  # fmt: skip
        head = [
            "one step of a student, T = 2, 128 images", "qsnn [ms]", "SpikingJelly [ms]", "ratio",
            "ratio, both channels-last", "memory [MiB]", "SpikingJelly [MiB]", "ratio",
        ]  # fmt: skip
        words = (
            "`python benchmarks/throughput.py --only distill`; the same Brevitas weights; memory beyond that of the "
            "idle process, both channels-last"
        )
        parts += [grid(head, rows), f"{words}; {seeds_of(steps)}; {world(steps)}."]
    for r in curves:
        m = r.metrics
        rows = [
            ["SpikingJelly, single steps", number(m["spikingjelly"], 1), "1"],
            ["qsnn, one pass", number(m["qsnn"], 1), number(m["qsnn / spikingjelly"])],
            ["the convolutions alone", number(m["convolutions"], 1), number(m["convolutions / spikingjelly"])],
        ]
        words = f"{r.n:,} images of {r.data}, {r.config['model']} net, float weights, in turns; {seeds_of([r])}"
        parts.append(grid(["accuracy for every T = 1..32", "time [s]", "of SpikingJelly's loop"], rows))
        parts.append(f"`python benchmarks/throughput.py --only curve`; {words}; {world([r])}.")
    for r in runs:
        m, per = r.metrics, 1e6 / (r.n * r.config["timesteps"])
        sides = {"qsnn.accuracy": "qsnn", "SpikingJelly": "spikingjelly, contiguous",
                 "SpikingJelly, channels-last": "spikingjelly"}  # fmt: skip
        rows = [[name, number(per * m[key], 0), number(m["qsnn"] / m[key])] for name, key in sides.items()]
        head = [
            f"accuracy of a {r.config['model']}, T = {r.config['timesteps']}",
            "per image and step [us]",
            "qsnn's of that time",
        ]
        words = f"{r.n:,} images of {r.data}, float weights, multi-step IF nodes, in turns; {seeds_of([r])}"
        parts.append(grid(head, rows))
        parts.append(f"`python benchmarks/throughput.py --only evaluation`; {words}; {world([r])}.")
    return "\n\n".join(parts) or EMPTY


ASKED = {
    ("deferred", 1): {"of torch float": 0.35, "of ONNX Runtime int8": 1.0, "file, of the weights at 8 bit": 1.15},
    ("deferred", 64): {"of torch float": 0.6, "of ONNX Runtime int8": 1.0, "file, of the weights at 8 bit": 1.15},
    ("online", 1): {"of torch float": 0.7, "file, of the weights at 8 bit": 1.15},
    ("online", 64): {"of torch float": 1.6, "file, of the weights at 8 bit": 1.15},
}
"""What an exported file should cost at most, by firing and batch."""


def deploy_table(records: Sequence[Record]) -> str:
    """What an exported file costs beside the float network: by network, batch, threads and firing."""
    of_deploy = by_time(r for r in records if r.name.startswith("deploy/"))
    mine = list({(r.name, r.config["batch"], r.config["threads"]): r for r in of_deploy}.values())
    if not mine:
        return EMPTY
    rows, missed = list[list[str]](), dict[str, list[str]]()
    for m, batch, threads, net in ((r.metrics, *map(r.config.get, ("batch", "threads", "model"))) for r in mine):
        for firing in ("deferred", "online"):
            ours = m[f"qsnn {firing} int8"]
            ratios = {
                "of torch float": ours / min(m["torch float"], m["torch float, contiguous"]),
                "of ONNX Runtime int8": ours / m["ONNX Runtime int8"],
                "of the folded network in torch": ours / m[f"qsnn {firing} folded torch"],
                "file, of the weights at 8 bit": m[f"{firing} int8 bytes"] / m["weights"],
            }
            rows.append([net, str(batch), str(threads), firing, number(ours, 3), *map(number, ratios.values())])
            for what, asked in ASKED.get((firing, batch), {}).items():
                if ratios[what] > asked:
                    file = what.startswith("file")
                    where = f"{firing}, {what if file else f'batch {batch}, {what}'} (asked {asked:g})"
                    case = net if file else f"{net} on {count_of(threads, 'thread')}"
                    missed.setdefault(where, []).append(f"{case} {number(ratios[what])}")
    said = "; ".join(f"{where}: {', '.join(dict.fromkeys(cases))}" for where, cases in missed.items())
    words = (
        f"`python benchmarks/deploy.py`; W4/L2, T = 2; medians of calls in turns, another image each; torch float: the "
        f"faster of channels-last and contiguous, batch norm folded, frozen; ONNX Runtime "
        f"{distinct(r.config['onnxruntime'] for r in mine)} int8: its own static quantization (QDQ) of the float "
        f"network; {seeds_of(mine)}; {world(mine)}.\n\n"
        f"{f'Asked and missed: {said}.' if said else 'No figure that was asked is missed.'}"
    )
    head = ["network", "batch", "threads", "firing", "our file [ms]", *ratios]
    return f"{grid(head, rows)}\n\n{words}"


def zoo_table(records: Sequence[Record]) -> str:
    """What becomes of networks that people bring: what each stage says, the refusal in its own words, cut if long."""
    rows = list({r.name: r for r in by_time(records) if r.name.startswith("zoo/")}.values())
    if not rows:
        return EMPTY
    stages = ("quantize", "convert", "fold", "certify", "float error")
    lines, exact = [], 0
    for r in rows:
        cells, words = [], ""
        for value in (r.metrics.get(stage) for stage in stages):
            short, _, rest = str(value).partition(": ")
            words = words or rest
            cells.append(number(value) if value is None or isinstance(value, float) else short)
        exact += cells[3] == "EXACT"
        words = f"{words[:240]}{'…' * (len(words) > 240)}".replace("|", "/")
        lines.append([r.name.removeprefix("zoo/"), *cells, words])
    head = ["network", "quantize", "convert", "fold", "certify", "float, T = 16 [1]", "in its own words"]
    made = next(iter(rows)).config["quantize"]
    text = (
        f"{exact} of {len(rows)} EXACT. `python benchmarks/zoo.py`; random weights, scrambled batch norms; "
        f"{made['weight_bits']}-bit weights, L = {made['levels']}, deferred at T = L; float: root mean square of what "
        f"the float network's spiking form is off, of the standard deviation of the answers; "
        f"{rows[0].n} images; {seeds_of(rows)}; {world(rows)}."
    )
    return f"{grid(head, lines, left=5)}\n\n{text}"


# --- README.md --------------------------------------------------------------------------------------------------------


def _headline_records(records: Sequence[Record]) -> tuple[dict[str, list[Record]], str] | None:
    """The rows of study distill, and which of them is the peer; None where they are not there yet."""
    by = by_label(of_study("distill", records))
    peer = next((label for label in by if label.startswith("SpikingJelly")), None)
    return None if "W4" not in by or peer is None else (by, peer)


def step_ratios(records: Sequence[Record]) -> tuple[str, str] | None:
    """Time and memory of a student's step, of SpikingJelly's: "0.61 to 0.62"."""
    steps = timed("distill", records)

    def ratio(of: str, to: str) -> str:
        values = sorted(r.metrics[of] / r.metrics[to] for r in steps)
        return " to ".join(dict.fromkeys(number(value) for value in (values[0], values[-1])))

    pairs = ("qsnn", "spikingjelly, contiguous"), ("qsnn MiB", "spikingjelly MiB")
    return (ratio(*pairs[0]), ratio(*pairs[1])) if steps else None


def headline(records: Sequence[Record]) -> str:
    """What a newcomer should know of the results, in a paragraph."""
    found, ratios = _headline_records(records), step_ratios(records)
    if found is None or ratios is None:
        return EMPTY
    by, peer = found

    def mean(label: str, key: str) -> str:
        return f"{number(fmean(r.metrics[key] for r in by[label]), 1)} %"

    first = by["W4"][0]
    return (
        f"Measured on {first.data} ({first.config['setting']['train_images']:,} training images, "
        f"{count_of(len(by['W4']), 'seed')}): with 4-bit weights and two time steps **{mean('W4', 'T=2')}**; the "
        f"quantized network it learned from has {mean('W4', 'qann')}, trained on for as long "
        f"{mean('W4', 'qann on')}; SpikingJelly's best conversion recipe, which trains nothing, has "
        f"{mean(peer, 'T=2')}. {_on_cifar10(records)}A training step takes {ratios[0]} of the time, and {ratios[1]} of "
        f"the memory, of the same networks in SpikingJelly."
    )


def _on_cifar10(records: Sequence[Record]) -> str:
    """The sentence on the ResNet-20 of 0.27 M weights; "" where it has no records."""
    chosen = _cifar10_flow(records, "resnet20")
    if "student" not in chosen:
        return ""

    def at(model: str, t: int) -> str:
        return number(fmean(accuracies(chosen[model], t) or [math.nan]), 1)

    student, config = chosen["student"], chosen["student"][0].config
    longer = f", trained on {at('QANN on', 1)} %" if "QANN on" in chosen else ""
    return (
        f"On cifar10, a ResNet-20 of 0.27 M {config['quantize']['weight_bits']}-bit weights "
        f"({count_of(len(student), 'seed')}) has {at('student', 1)} % in one step, {at('student', 2)} % in two and "
        f"{at('student', 4)} % in four, its quantized network {at('QANN', 1)} %{longer}, the float one "
        f"{at('teacher', 1)} %; published for two steps: 82.3 % (SlipReLU, which is trained for it). "
        f"{_on_signed(records)}{_untrained(records)}"
    )


def _on_signed(records: Sequence[Record]) -> str:
    """What spikes of -1 give the same student; "" where it has no records."""
    student = _cifar10_flow(records, "resnet20-signed").get("student", [])
    one, two, four = (number(fmean(accuracies(student, t) or [math.nan]), 1) for t in (1, 2, 4))
    return f"With spikes of -1 too, which take early ones back, it has {one}, {two} and {four} %. " if student else ""


def _untrained(records: Sequence[Record]) -> str:
    """What the float ResNet-20 has at T = 2 without any training, beside SpikingJelly; "" without records."""
    by = by_method(records, "cifar10", "resnet20")
    best, ours = (
        best_of("SpikingJelly", by, ["T=2"], digits=1),
        [by.get(f"qsnn{more}") for more in ("", ", signed spikes")],
    )
    if not best or None in ours:
        return ""
    plain, signed = (number(fmean(r.metrics["T=2"] for r in rows or ()), 1) for rows in ours)
    return (
        f"Converted without any training, its float network has {plain} % in two steps, {signed} % with spikes of -1 "
        f"too, by SpikingJelly's best recipe {best[0]} %. "
    )


def compared(records: Sequence[Record]) -> str:
    """README's one table: the float network, the quantized one, students, and conversion without training."""
    found = _headline_records(records)
    by_precision = by_label(of_study("precision", records))
    peers = by_method(records, "fashion-mnist", "plain")
    if found is None or "32/32" not in by_precision or "qsnn" not in peers:
        return EMPTY
    by, keys = found[0], [f"T={t}" for t in (1, 2, 4)]

    def kib(label: str) -> str:
        return number(fmean(r.metrics["weight_bytes"] for r in by_precision[label]) / 1024, 1)

    def ann(rows: Sequence[Record], key: str) -> list[str]:
        return [f"*{plus_minus([r.metrics[key] for r in rows])}*"] * len(keys)

    def online(rows: Sequence[Record]) -> list[str]:
        return [plus_minus([r.metrics[key] for r in rows]) for key in keys]

    floats, net = kib("32/32"), peers["qsnn"]
    recipes = sum(name.startswith("SJ ") for name in peers)
    epochs = by["W4"][0].config["setting"]["epochs"]  # a stage: teacher, QANN, student; or trained on for as long
    theirs = best_of("SpikingJelly", peers, keys)
    rows = [
        [f"float network, {2 * epochs} epochs", floats, *ann(by_precision["32/32"], "qat")],
        [f"4-bit quantized network (Brevitas), {3 * epochs} epochs", kib("4/L2"), *ann(by["W4"], "qann on")],
        [f"**qsnn student, 4-bit weights**, {3 * epochs} epochs in all", kib("4/L2"), *online(by["W4"])],
        [f"**qsnn student, 1-bit weights**, {3 * epochs} epochs in all", kib("1/L2"), *online(by["W1"])],
        ["**qsnn, float network converted**, nothing trained", floats, *online(net)],
        [f"best of SpikingJelly's {recipes} recipes, nothing trained", floats, *theirs],
    ]
    head = ["fashion-mnist, test accuracy ± standard deviation", "weights [KiB]", *(f"T = {k[2:]} [%]" for k in keys)]
    words = (
        f"{count_of(len(by['W4']), 'seed')}; {by['W4'][0].n:,} test images, of the last two rows {net[0].n:,}; "
        f"italics: no time steps; commands, commits, devices: [RESULTS.md](benchmarks/RESULTS.md)."
    )
    figure = "![accuracy against time steps](benchmarks/figures/study-distill.svg)"
    return f"{grid(head, rows)}\n\n{words}\n\n{figure}"


def _above(points: float) -> str:
    return f"{number(abs(points))} points {'above' if points > 0 else 'below'}"


def in_short(records: Sequence[Record]) -> str:
    """README's results in five sentences; those without records are left out."""
    from studies import precision

    def mean(label: str, key: str) -> float:
        return fmean(r.metrics[key] for r in by[label])

    said = []
    rows = of_study("precision", records, "vgg-small")
    if lost := precision.points_lost(rows):
        shown = ", ".join(f"{label} {number(lost[label])}" for label in ("8/8", "4/L2", "1/L2", "1/1") if label in lost)
        data, net = rows[0].data, rows[0].config["setting"]["model"]
        said.append(f"Points that bits of weights/activations cost, trained ({data}, {net}): {shown}.")
    if whole("distill", records):
        by = by_label(whole("distill", records))
        two, qann, longer = (mean("W4", key) for key in ("T=2", "qann", "qann on"))
        said.append(
            f"A 4-bit student of two steps is {_above(two - qann)} the quantized network that taught it, "
            f"{_above(two - longer)} that network trained on for as long, and {_above(two - mean('W4', 'T=4'))} its "
            f"own answer after four steps."
        )
    if whole("certificates", records):
        said.append(studies.find("certificates").answer(whole("certificates", records)))  # type: ignore[misc]
    ahead, cells = cells_ahead(records)
    if cells:
        said.append(
            f"Converted without training, qsnn is ahead of every recipe of SpikingJelly, snnTorch and Norse in {ahead} "
            f"of {cells} cells (network, data set, T)."
        )
    for r in timed("curve", records):
        part = number(r.metrics["qsnn / spikingjelly"])
        said.append(f"Accuracy for every T from 1 to 32 takes {part} of the time of SpikingJelly's loop.")
    return f"{' '.join(said)} All tables, figures and answers: [RESULTS.md](benchmarks/RESULTS.md)." if said else EMPTY


def cells_ahead(records: Sequence[Record]) -> tuple[int, int]:
    """Of conversion without training: cells in which qsnn's mean is the highest of several methods, and all."""
    cells: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for r in peer_records(records):
        _, net, method = r.name.split("/", 2)
        for key in (key for key in r.metrics if key.startswith("T=")):
            cells.setdefault((r.data, net, key), {}).setdefault(method, []).append(r.metrics[key])
    # where no other method was measured, nobody is ahead
    means = [{m: fmean(values) for m, values in cell.items()} for cell in cells.values() if len(cell) > 1]
    return sum(max(cell, key=cell.__getitem__) == "qsnn" for cell in means), len(means)


# --- by name ----------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "headline": headline, "compared": compared, "in-short": in_short, "cifar10": cifar10_tables,
    "studies": all_studies, "study-list": study_list, "peers": peers_table, "throughput": throughput_table,
    "zoo": zoo_table, "deploy": deploy_table,
}  # fmt: skip


def make(name: str, records: Sequence[Record]) -> str:
    """The text of a block.

    Raises:
        ValueError: no block has that name.
    """
    if name.startswith("run-"):
        return run_tables(name.removeprefix("run-"), records)
    if name not in TABLES:
        raise ValueError(f"expected a block named run-DATA, contents, {', '.join(TABLES)}; got {name}")
    return TABLES[name](records)


def contents(text: str) -> str:
    """Links to the headings of a page, the second level indented."""
    lines = []
    for marks, title in re.findall(r"^(##+) (.+)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        lines.append(f"{'  ' * (len(marks) - 2)}- [{title}](#{anchor})")
    return "\n".join(lines)
