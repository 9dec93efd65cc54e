"""Trained ANN in, spiking network of two time steps with low-precision weights out, and proof of what it lost."""

from qsnn.benchmark import Benchmark, benchmark
from qsnn.certify import Certificate, certify
from qsnn.checkpoint import load, load_weights, read_recipe, save
from qsnn.convert import ConvertConfig, as_qann, convert
from qsnn.data import Data, batches
from qsnn.datasets import load_data
from qsnn.distill import DistillConfig, distill, distill_together
from qsnn.fold import fold
from qsnn.models import create_model
from qsnn.neurons import SNN, IFNode
from qsnn.quantize import QuantizeConfig, quantize
from qsnn.records import Record
from qsnn.summary import Summary, summary
from qsnn.train import TrainConfig, accuracy, fit
from qsnn.weights import integer_weights

__version__ = "0.1.0"

__all__ = [
    "SNN",
    "Benchmark",
    "Certificate",
    "ConvertConfig",
    "Data",
    "DistillConfig",
    "IFNode",
    "QuantizeConfig",
    "Record",
    "Summary",
    "TrainConfig",
    "accuracy",
    "as_qann",
    "batches",
    "benchmark",
    "certify",
    "convert",
    "create_model",
    "distill",
    "distill_together",
    "fit",
    "fold",
    "integer_weights",
    "load",
    "load_data",
    "load_weights",
    "quantize",
    "read_recipe",
    "save",
    "summary",
]
