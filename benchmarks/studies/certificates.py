"""Is the spiking network the quantized one, at every precision?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from setting import Load, Row, Setting, teacher_of
from tables import grid

import qsnn
from qsnn.report.records import Record
from qsnn.report.terminal import NONE, si

QUESTION = "Is the spiking network the quantized one, at every precision?"
SIZE = "study net, calibrated only, all test images, one seed"
OPTIONS = "--seeds 0"
NOTE = "Calibrated only; deferred, T = L; with the number of integers compared."


WEIGHTS: dict[str, int] = {"1": 1, "2": 2, "4": 4, "8": 8, "fp16": 16}
ACTIVATIONS: dict[str, dict[str, int]] = {
    "1": {"act_bits": 1}, "L2": {"levels": 2}, "2": {"act_bits": 2}, "4": {"act_bits": 4}
}  # fmt: skip


def rows(setting: Setting, load: Load) -> Iterator[Row]:
    """Deferred firing at T = L against the QANN, every integer of every layer, on all test images; calibrated only."""
    data = load(setting.data)
    for weights, bits in WEIGHTS.items():
        for activations, options in ACTIVATIONS.items():
            config = {"weight_bits": bits, **options}
            yield f"{weights}/{activations}", {"quantize": config}, partial(_certificate_row, setting, data, config)


def _certificate_row(setting: Setting, data: qsnn.Data, options: dict[str, Any]) -> dict[str, Any]:
    qann = qsnn.quantize(teacher_of(setting, data), data, qsnn.QuantizeConfig(**options))
    found = qsnn.certify(qsnn.convert(qann), qann, data.test)
    return {
        "exact": int(found.exact),
        "T": found.timesteps,
        "integers": sum(layer.elements for layer in found.layers),
        "differ": sum(layer.elements - layer.equal for layer in found.layers),
        "ties": sum(layer.ties for layer in found.layers),
    }


def answer(records: Sequence[Record]) -> str:
    """One sentence."""
    exact, integers = [r for r in records if r.metrics["exact"]], sum(r.metrics["integers"] for r in records)
    verdict = "all" if len(exact) == len(records) else f"{len(exact)} of"
    return (
        f"The spiking network is the quantized one in {verdict} {len(records)} pairs of weights and activations: "
        f"{si(float(integers), gap=' ')} integers compared, "
        f"{sum(r.metrics['differ'] for r in records) or 'none'} of them different."
    )


def table(records: Sequence[Record]) -> str:
    """EXACT, or how many integers differ, by weights and activations."""
    by = {tuple(r.name.removeprefix("study-certificates/").split("/")): r.metrics for r in records}
    weights, acts = (list(dict.fromkeys(key[i] for key in by)) for i in (0, 1))
    cells = []
    for w in weights:
        row = [w]
        for m in (by.get((w, a)) for a in acts):
            verdict = NONE if m is None else "EXACT" if m["exact"] else f"{m['differ']:,} differ"
            row.append(verdict if m is None else f"{verdict}, {si(float(m['integers']), gap=' ')}")
        cells.append(row)
    return grid(["weights \\ activations [bit]", *acts], cells, left=1 + len(acts))
