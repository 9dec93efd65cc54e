"""export(): a folded network in other people's formats."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsnn.options import seen

if TYPE_CHECKING:
    from qsnn.snn.network import SNN


@dataclass(frozen=True)
class Format:
    """How a format is written."""

    module: str
    function: str
    """(network, path, **options) -> what is to be said of the file beside its size, or its path."""
    options: tuple[str, ...]
    """What it takes."""
    libraries: tuple[str, ...] = ()
    """Looked for before it is called; a module may say itself what it lacks."""
    folded: bool = True
    """Whether the network must be folded."""


FORMATS = {
    "onnx": Format("qsnn.export.onnx", "write_onnx", ("timesteps", "firing", "input", "kernels"), ("onnx",)),
    "nir": Format("qsnn.export.nir", "write", ("timesteps",)),
    "c": Format("qsnn.export.c", "write", ("timesteps", "firing", "mean", "std")),
    "qonnx": Format("qsnn.export.qonnx", "write", ("batch",), folded=False),
    "hub": Format("qsnn.export.hub", "write", ("benchmark", "certificate", "repo_id", "push"), folded=False),
}


def export(folded: SNN, path: str | Path, *, format: str = "onnx", **options: Any) -> Path:
    r"""Write a folded network to a file that runs without qsnn, and return the file's path.

    "onnx": for ONNX Runtime and others. Deferred, each layer is one integer pass over spike counts n,

    .. math:: n_l = |\{k < T : W_l\,n_{l-1} \ge M_{T,k}\}|, \qquad \text{logits} = (g\,W n + T b) / T,

    with the integer thresholds M of the folded network; online, the pass is unrolled over the sums up to each step, and
    a neuron fires at most once a step. Every integer is the folded network's; where currents are real, which the file
    names, they are formed in float64.

    Args:
        folded: what :func:`qsnn.fold` returned.
        path: the file to write; it is written beside and renamed.
        format: "onnx"; "nir" (neuromorphic simulators), "c" (microcontrollers), "qonnx" (of a quantized network) or
            "hub" (a folder for a model hub): see the module ``qsnn.export.FORMAT``.
        options: of the format. onnx: ``timesteps`` and ``firing`` (default what the network is made for), ``input``
            ("float": normalised images; "uint8": raw pixels), ``kernels`` ("int8"; "float" for runtimes without
            8-bit products). nir: ``timesteps``. c: ``timesteps``, ``firing``, ``mean``, ``std``. qonnx: ``batch``.
            hub: ``benchmark``, ``certificate``, ``repo_id``, ``push``.
    Shape:
        of the ONNX file: images (B, C, H, W), or frames (B, T, C, H, W); logits (B, K) deferred, (T, B, K) online, the
        answer after each step; integer_logits, the readout's integer sums up to each step, likewise; of a second head
        logits_1 and integer_logits_1.
    Raises:
        TypeError: not a folded network, or an option that the format does not have.
        ValueError: an unknown format, an option out of range, or layers that cannot be written, all of them named.
        ImportError: the library of the format is missing.

    >>> import tempfile
    >>> import qsnn
    >>> data = qsnn.load_data("digits")
    >>> folded = qsnn.fold(qsnn.convert(qsnn.quantize(qsnn.create_model("study", data), data)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = qsnn.export(folded, f"{folder}/net.onnx", firing="deferred", input="uint8")
    ...     "QLinearConv" in path.read_bytes().decode("latin-1")
    True
    """
    written(folded, path, format, options)
    return Path(path)


def written(folded: Any, path: str | Path, format: str, options: Mapping[str, Any]) -> Any:
    """Do what :func:`export` does, and return what is to be said of the file: sizes, numbers of nodes, or nothing.

    Raises:
        TypeError, ValueError, ImportError: as there.
    """
    known = format_named(format)
    unknown = [name for name in options if name not in known.options]
    if unknown:
        raise TypeError(
            f"format {format!r} has no option {', '.join(unknown)}; it takes {', '.join(known.options)}; leave it away"
        )
    from qsnn.graph.arrived import arrived  # imports torch, which those who only ask for the formats need not have

    folded = arrived(folded)
    if known.folded and not getattr(folded, "folded", False):
        raise TypeError(
            f"expected a folded network, got {type(folded).__name__}; call qsnn.export(qsnn.fold(snn), path)"
        )
    if Path(path).is_dir() and format != "hub":
        raise ValueError(f"expected a file to write, {path} is a folder; name a file in it")
    for library in known.libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ImportError(
                f"format {format!r} needs {library} ({error}); install it with pip install qsnn[export]"
            ) from None
    found = getattr(importlib.import_module(known.module), known.function)(folded, path, **options)
    return None if isinstance(found, Path) else found


def format_named(format: str) -> Format:
    """Return how a format is written.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"expected format to be one of {', '.join(map(repr, FORMATS))}, got {seen(format)}")
    return FORMATS[format]
