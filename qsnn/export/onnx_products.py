"""Products of counts as ONNX nodes: integers times integers in the smallest float that holds all sums."""

from __future__ import annotations

from qsnn.export.onnx_values import FLOAT32, FLOAT64, CannotWriteError, Values, Wire
from qsnn.folded.products import IntegerProduct
from qsnn.snn.counts import CountProduct

Shape = tuple[int, ...]


def integer_product(values: Values, name: str, module: IntegerProduct, shape: Shape, first: Wire, second: Wire) -> Wire:
    """Σ counts·counts: a value that is the same at every step, deferred."""
    bound = module.bound * values.timesteps**module.steps
    most = bound * values.timesteps
    dtype = "f32" if most < FLOAT32 else "f64"
    if most >= FLOAT64:
        raise CannotWriteError(f"{name}: its sums reach {most:.3g}, which float64 does not hold exactly")
    # counts are sums over all steps already; what comes of another product is one value for all of them
    names = [
        values.cast(wire, dtype).names[0] if not timed else values.summed(wire, dtype)[0]
        for wire, timed in zip((values.ready(first), values.ready(second)), module.timed, strict=True)
    ]
    values.note(name, f"products of counts, {'float32 below 2**24' if dtype == 'f32' else 'float64 below 2**53'}")
    product = values.graph.add("Einsum", *names, equation=module.equation)
    return Wire((product,), dtype, shape, bound, static=True)


def mean_product(values: Values, name: str, module: CountProduct, shape: Shape, first: Wire, second: Wire) -> Wire:
    """The product of two means in float64, where one of them is no integer of one gain."""
    graph, names = values.graph, []
    for wire, timed in zip((values.ready(first), values.ready(second)), module.timed, strict=True):
        total = values.summed(wire, "f64")[0] if timed else values.cast(wire, "f64").names[0]
        names.append(graph.add("Div", total, graph.const(float(values.timesteps), "f64")) if timed else total)
    values.note(name, "real: products of means in float64")
    product = graph.add("Einsum", *names, equation=module.equation)
    return Wire((product,), "f64", shape, real=True, static=True)
