"""export(): a folded network in other people's formats."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsnn.snn.network import SNN

FORMATS: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "onnx": ("qsnn.export.onnx", "write_onnx", ("onnx",), True),
    "nir": ("qsnn.export.nir", "write", (), True),
    "c": ("qsnn.export.c", "write", (), True),
    "qonnx": ("qsnn.export.qonnx", "write", (), False),
    "hub": ("qsnn.export.hub", "write", (), False),
}
"""For each format: the module and the function (network, path, **options) that write it, libraries that are looked for
here (a module may say itself what it lacks), and whether the network must be folded."""


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
            8-bit products).
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
    if format not in FORMATS:
        raise ValueError(f"expected format to be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
    from qsnn.graph.arrived import arrived  # imports torch, which those who only ask for the formats need not have

    folded = arrived(folded)  # type: ignore[assignment]
    module, function, libraries, whole = FORMATS[format]
    if whole and not getattr(folded, "folded", False):
        raise TypeError(
            f"expected a folded network, got {type(folded).__name__}; call qsnn.export(qsnn.fold(snn), path)"
        )
    if Path(path).is_dir() and format != "hub":
        raise ValueError(f"expected a file to write, {path} is a folder; name a file in it")
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise ImportError(
                f"format {format!r} needs {library} ({error}); install it with pip install qsnn[export]"
            ) from None
    getattr(importlib.import_module(module), function)(folded, path, **options)
    return Path(path)
