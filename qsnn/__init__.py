"""Trained ANN in, spiking network of two time steps with low-precision weights out, and proof of what it lost."""

import importlib as _importlib
import sys as _sys
import types as _types
import typing as _typing

__version__ = "0.1.0"

_HOMES = {
    "SNN": "qsnn.snn.network",
    "Benchmark": "qsnn.measure.result",
    "Certificate": "qsnn.measure.certificate",
    "ConvertConfig": "qsnn.snn.config",
    "Data": "qsnn.data.images",
    "DistillConfig": "qsnn.distillation.config",
    "Gate": "qsnn.graph.modules",
    "IFNode": "qsnn.snn.neurons",
    "QsnnWarning": "qsnn.graph.arrived",
    "QuantizeConfig": "qsnn.quant.quantize",
    "Record": "qsnn.report.records",
    "Summary": "qsnn.measure.summary",
    "TrainConfig": "qsnn.training.config",
    "accuracy": "qsnn.measure.accuracy",
    "as_qann": "qsnn.snn.twin",
    "batches": "qsnn.data.batches",
    "benchmark": "qsnn.measure.benchmark",
    "certify": "qsnn.measure.certify",
    "check": "qsnn.measure.check",
    "convert": "qsnn.snn.convert",
    "create_model": "qsnn.models.create",
    "distill": "qsnn.distillation.distill",
    "distill_together": "qsnn.distillation.distill",
    "export": "qsnn.export.write",
    "fit": "qsnn.training.fit",
    "fold": "qsnn.folded.fold",
    "from_arrays": "qsnn.data.tables",
    "from_nir": "qsnn.export.nir_student",
    "integer_weights": "qsnn.quant.weights",
    "load": "qsnn.checkpoint",
    "load_data": "qsnn.data.sources",
    "load_weights": "qsnn.models.weights",
    "quantize": "qsnn.quant.quantize",
    "read_recipe": "qsnn.checkpoint",
    "save": "qsnn.checkpoint",
    "summary": "qsnn.measure.summary",
}
"""Where each public name is defined; it is loaded when it is first asked for, so that ``--help`` costs no torch."""

__all__ = [*_HOMES]

if _typing.TYPE_CHECKING:
    from qsnn.checkpoint import load as load
    from qsnn.checkpoint import read_recipe as read_recipe
    from qsnn.checkpoint import save as save
    from qsnn.data.batches import batches as batches
    from qsnn.data.images import Data as Data
    from qsnn.data.sources import load_data as load_data
    from qsnn.data.tables import from_arrays as from_arrays
    from qsnn.distillation.config import DistillConfig as DistillConfig
    from qsnn.distillation.distill import distill as distill
    from qsnn.distillation.distill import distill_together as distill_together
    from qsnn.export.nir_student import from_nir as from_nir
    from qsnn.export.write import export as export
    from qsnn.folded.fold import fold as fold
    from qsnn.graph.arrived import QsnnWarning as QsnnWarning
    from qsnn.graph.modules import Gate as Gate
    from qsnn.measure.accuracy import accuracy as accuracy
    from qsnn.measure.benchmark import benchmark as benchmark
    from qsnn.measure.certificate import Certificate as Certificate
    from qsnn.measure.certify import certify as certify
    from qsnn.measure.check import check as check
    from qsnn.measure.result import Benchmark as Benchmark
    from qsnn.measure.summary import Summary as Summary
    from qsnn.measure.summary import summary as summary
    from qsnn.models.create import create_model as create_model
    from qsnn.models.weights import load_weights as load_weights
    from qsnn.quant.quantize import QuantizeConfig as QuantizeConfig
    from qsnn.quant.quantize import quantize as quantize
    from qsnn.quant.weights import integer_weights as integer_weights
    from qsnn.report.records import Record as Record
    from qsnn.snn.config import ConvertConfig as ConvertConfig
    from qsnn.snn.convert import convert as convert
    from qsnn.snn.network import SNN as SNN
    from qsnn.snn.neurons import IFNode as IFNode
    from qsnn.snn.twin import as_qann as as_qann
    from qsnn.training.config import TrainConfig as TrainConfig
    from qsnn.training.fit import fit as fit


def __getattr__(name: str) -> _typing.Any:
    """Load a public name from its home.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _HOMES:
        raise AttributeError(f"module 'qsnn' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(_importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *_HOMES})


class _Package(_types.ModuleType):
    """``qsnn.export`` is a verb and a room: importing from the room must not put the room in the verb's place."""

    @property
    def export(self) -> _typing.Any:
        """The verb; what is imported of the room can be reached through it, as ``import qsnn.export.x as y`` does."""
        verb = _importlib.import_module(_HOMES["export"]).export
        room = "qsnn.export."
        inside = {name.removeprefix(room): found for name, found in _sys.modules.items() if name.startswith(room)}
        vars(verb).update(inside)
        return verb

    @export.setter
    def export(self, room: _typing.Any) -> None:
        """The import system hands the room over here; the verb stays."""


_sys.modules[__name__].__class__ = _Package
