"""The commands around a deployed network: writing it in other formats, and answering images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qsnn.export.runtime import OnnxNetwork, image_files, show
from qsnn.export.runtime import predict as answers
from qsnn.export.write import format_named, written

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# torch is imported where a checkpoint is read: an exported file is answered without it


def export(
    file: tyro.conf.Positional[Path],
    out: Path,
    format: str = "onnx",
    timesteps: int | None = None,
    firing: str | None = None,
    input: str | None = None,
    kernels: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    batch: int | None = None,
    repo_id: str | None = None,
    push: bool = False,
    model: tuple[str, ...] = (),
) -> None:
    """Write a folded network to a file that runs without qsnn.

    Args:
        file: Checkpoint that qsnn fold wrote; for qonnx that qsnn quantize wrote, for hub any.
        out: File to write; for hub a folder.
        format: onnx, nir, c, qonnx or hub.
        timesteps: (onnx, nir, c) Time steps T; default what the network is made for.
        firing: (onnx, c) online (an answer after every step) or deferred (one pass); default what it is made for.
        input: (onnx) float (normalised images) or uint8 (raw pixels, normalisation inside); default float.
        kernels: (onnx) int8, or float for runtimes without 8-bit products (OpenVINO); default int8.
        mean: (c) Of each channel, of pixels on [0, 1]; default as the file says.
        std: (c) Of each channel, of pixels on [0, 1]; default as the file says.
        batch: (qonnx) Images of a call; default 1, as FPGA tools want it.
        repo_id: (hub) user/name, named in the card; needed to push.
        push: (hub) Upload the folder; needs a login.
        model: Function that builds a network of your own, package.module:function, where the file names it.
    """
    from qsnn.cli.inputs import loaded, refuse_idle
    from qsnn.graph.recipe import recipe_of

    given = {
        "timesteps": timesteps, "firing": firing, "input": input, "kernels": kernels, "mean": mean, "std": std,
        "batch": batch, "repo_id": repo_id, "push": push or None,
    }  # fmt: skip
    options, known = {name: value for name, value in given.items() if value is not None}, format_named(format)
    unknown = [f"--{name.replace('_', '-')}" for name in options if name not in known.options]
    if unknown:
        takes = ", ".join(f"--{name.replace('_', '-')}" for name in given if name in known.options)
        raise ValueError(f"--format {format} has no {', '.join(unknown)}; it takes {takes}; leave it away")
    refuse_idle(model, [file])
    network: Any = loaded(file, model)
    if known.folded and not getattr(network, "folded", False):
        kind = recipe_of(network).get("kind")
        raise ValueError(f"{file} holds a {kind!r}; expected 'folded': qsnn fold {file} --out folded.safetensors first")
    found = written(network, out, format, options)
    print(f"wrote {out}" + (f" ({out.stat().st_size:,} bytes)" if out.is_file() else ""))
    if found is not None:
        print(found)


def predict(
    network: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[Path, ...]],
    top: int = 1,
    json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    exit_margin: float | None = None,
    memory: str | None = None,
) -> None:
    """Name the class of image files, one line each.

    Args:
        network: An exported .onnx file, or a checkpoint.
        images: Image files or folders.
        top: How many classes.
        json: Print JSON.
        exit_margin: Take the first answer in which the two likeliest classes are so far apart (0 to 1).
        memory: What the images of one batch may take, like 512M or 4G; default 1G. Of a checkpoint.
    """
    files = image_files(images)
    if network.suffix == ".onnx":
        runner = OnnxNetwork(network)
        found = answers(runner, files, runner.recipe, raw=runner.raw, top=top, exit_margin=exit_margin)
    else:
        import torch

        from qsnn.checkpoint import load
        from qsnn.data.memory import batch_within, limit_memory
        from qsnn.graph.recipe import recipe_of

        limit_memory(memory)
        model: Any = load(network)

        @torch.no_grad()
        def run(batch: NDArray[Any]) -> NDArray[np.float32]:
            images = torch.from_numpy(batch)
            parts = [model(part) for part in images.split(batch_within(model, images, len(images)))]
            logits = torch.cat([part if part.dim() == 3 else part[None] for part in parts], 1)
            return logits.numpy()  # type: ignore[no-any-return]

        found = answers(run, files, recipe_of(model), top=top, exit_margin=exit_margin)
    show(found, as_json=json)
