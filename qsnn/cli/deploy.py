"""The commands around a deployed network: writing it in other formats, and answering images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qsnn.export.runtime import OnnxNetwork, image_files, show
from qsnn.export.runtime import predict as answers
from qsnn.export.write import FORMATS
from qsnn.export.write import export as write

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
) -> None:
    """Write a folded network to a file that runs without qsnn.

    Args:
        file: Checkpoint that qsnn fold wrote.
        out: File to write.
        format: onnx, nir, c, qonnx or hub.
        timesteps: Time steps T; default what the network is made for.
        firing: online (an answer after every step) or deferred (one integer pass); default what it is made for.
        input: float (normalised images) or uint8 (raw pixels, normalisation inside); default float.
        kernels: int8, or float for runtimes without 8-bit products (OpenVINO); default int8.
    """
    from qsnn.checkpoint import load
    from qsnn.graph.recipe import recipe_of

    chosen = {"timesteps": timesteps, "firing": firing, "input": input, "kernels": kernels}
    folded: Any = load(file)
    if FORMATS.get(format, FORMATS["onnx"])[3] and not getattr(folded, "folded", False):
        kind = recipe_of(folded).get("kind")
        raise ValueError(f"{file} holds a {kind!r}; expected 'folded': qsnn fold {file} --out folded.safetensors first")
    write(folded, out, format=format, **{k: v for k, v in chosen.items() if v is not None})
    print(f"wrote {out}" + (f" ({out.stat().st_size:,} bytes)" if out.is_file() else ""))


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
