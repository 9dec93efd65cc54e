"""An exported file answers images, without torch: ``python -m qsnn.export.runtime net.onnx images/``.

It needs onnxruntime, numpy and pillow alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp", ".gif")
_BATCH = 64
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a network says of one image."""

    file: str
    classes: tuple[tuple[str, float], ...]
    """The likeliest classes and their shares [0 to 1], the first one first."""
    timesteps: int
    """Time steps after which it answered; 1 for a network without steps."""

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        top = [{"class": name, "share": share} for name, share in self.classes]
        return {"file": self.file, **top[0], "top": top, "timesteps": self.timesteps}

    def __str__(self) -> str:
        """One line: file, classes with their shares, steps."""
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.classes)
        return f"{self.file}: {shares}" + (f" (after {self.timesteps} steps)" if self.timesteps > 1 else "")


class OnnxNetwork:
    """A network that ``qsnn.export`` wrote, run by ONNX Runtime.

    Args:
        path: the file.
        threads: of one layer, which then sleep between calls; default as many as ONNX Runtime takes.
    Shape:
        called with images (B, C, H, W), float32 normalised or uint8 pixels as the file wants, or with frames
        (B, T, C, H, W); returned: the answer after each step, (T, B, K) float32; deferred the last alone, (1, B, K).
    Raises:
        FileNotFoundError: no such file.
        ValueError: no ONNX file, not written by qsnn, or with metadata that do not fit its inputs and outputs.
        ImportError: onnxruntime is missing.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.session = session(path, threads=threads)
        self.recipe = _recipe(self.session.get_modelmeta().custom_metadata_map.get("qsnn"), path)
        entry = self.session.get_inputs()[0]
        self.entry = entry.name
        self.heads = [out.name for out in self.session.get_outputs() if out.name.startswith("logits")]
        told, shape = self.recipe["export"], self.recipe["input_shape"]
        kind = "tensor(uint8)" if self.raw else "tensor(float)"
        if entry.type != kind or entry.shape[-len(shape) :] != shape or not self.heads:
            raise ValueError(
                f"{path} has damaged metadata: they say images of {tuple(shape)} as {told['input']}, and the network "
                f"takes {entry.type} of {entry.shape}; export the network again"
            )

    @property
    def raw(self) -> bool:
        """Whether it takes pixels as they are."""
        return bool(self.recipe["export"]["input"] == "uint8")

    @property
    def steps(self) -> tuple[int, ...]:
        """The T's after which it answers."""
        timesteps = self.recipe["export"]["timesteps"]
        return (timesteps,) if self.recipe["export"]["firing"] == "deferred" else tuple(range(1, timesteps + 1))

    def answers(self, images: NDArray[Any]) -> list[NDArray[np.float32]]:
        """The answers of every head, each (T, B, *); deferred (1, B, *)."""
        found = self.session.run(self.heads, {self.entry: images})
        return [head[None] for head in found] if self.recipe["export"]["firing"] == "deferred" else found

    def __call__(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """The answers of the first head."""
        return self.answers(images)[0]


def session(path: str | Path, *, threads: int | None = None) -> Any:
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        path: the file.
        threads: of one layer, which then sleep between calls; default as many as ONNX Runtime takes.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no ONNX file.
        ImportError: onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path} needs onnxruntime ({error}); install it with pip install onnxruntime") from None
    raw = _bytes(path)
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors alone
    try:
        return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many kinds for a file that is none
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot read {path} as an ONNX file: {reason}") from None


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """The image files that are named, and all that lie in the folders that are named, in order.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise FileNotFoundError(f"no image in {path}; expected files of {', '.join(SUFFIXES)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"no such file: {path}")
    if not found:
        raise FileNotFoundError("expected at least one image file or folder")
    return found


def read_pixels(path: str | Path, shape: Sequence[int]) -> NDArray[np.uint8]:
    """An image file as training reads it: grey or RGB, on white, scaled to cover (H, W) and cut at the centre.

    Args:
        path: the image file.
        shape: (C, H, W), C = 1 or 3.
    Shape:
        returned: (C, H, W) uint8.
    Raises:
        ValueError: not an image, one of more than 8 bit a channel, or a number of channels that no image has.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"the network takes {channels} channels; image files have 1 or 3")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode not in _EIGHT_BIT:
                    raise ValueError(f"expected an image of 8 bit a channel in {path}, got mode {image.mode}")
                opaque: Any = image
                if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
                    rgba = image.convert("RGBA")  # transparency is laid on white
                    opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
                converted = opaque.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"expected an image in {path}, cannot read it ({error}); repair or remove it") from None
    if converted.size != (width, height):
        converted = ImageOps.fit(converted, (width, height), Image.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(converted)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def normalised(pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Pixels (..., C, H, W) to ((x / 255) - mean) / std in float32, bit for bit as in training."""
    m, s = (np.asarray(x, dtype=np.float32).reshape(-1, 1, 1) for x in (mean, std))
    return (pixels.astype(np.float32) / np.float32(255) - m) / s  # type: ignore[no-any-return]


def predict(
    run: Callable[[NDArray[Any]], NDArray[Any]],
    files: Sequence[Path],
    recipe: dict[str, Any],
    *,
    raw: bool = False,
    top: int = 1,
    exit_margin: float | None = None,
) -> Iterator[Prediction]:
    """Answer image files, a batch at a time.

    Args:
        run: images to the answers after each step.
        files: the images.
        recipe: of the network: its image shape, normalisation and classes are read.
        raw: ``run`` takes pixels.
        top: how many classes.
        exit_margin: take the first answer in which the two likeliest classes are so far apart [0 to 1].
    Shape:
        of ``run``: (B, C, H, W) to (T, B, K).
    Raises:
        ValueError: an option out of range, a file that is no image, or a network that takes no images.
    """
    data, shape = recipe.get("data", {}), recipe.get("input_shape")
    if data.get("frames") is not None or not shape or len(shape) != 3 or not data.get("mean"):
        raise ValueError("this network takes no image files: its recipe names no normalisation of images")
    if top < 1:
        raise ValueError(f"expected top to be at least 1, got {top}")
    if exit_margin is not None and not 0 <= exit_margin <= 1:
        raise ValueError(f"expected exit_margin from 0 to 1, got {exit_margin}")
    for start in range(0, len(files), _BATCH):
        batch = files[start : start + _BATCH]
        images: NDArray[Any] = np.stack([read_pixels(path, shape) for path in batch])
        answers = run(images if raw else normalised(images, data["mean"], data["std"]))
        if exit_margin is not None and len(answers) == 1:
            raise ValueError("exit_margin needs an answer after every step: a network of online firing, T > 1")
        yield from _chosen(batch, answers, data.get("classes", ()), top, exit_margin)


def _chosen(
    files: Sequence[Path], answers: NDArray[Any], classes: Sequence[str], top: int, margin: float | None
) -> Iterator[Prediction]:
    z = answers.astype(np.float64)
    shares = np.exp(z - z.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    steps = np.full(len(files), len(z))
    if margin is not None:
        second, first = np.sort(shares, -1)[..., -2:].transpose(2, 0, 1)
        enough = first - second >= margin
        steps = np.where(enough.any(0), enough.argmax(0) + 1, len(z))
    for place, (file, step) in enumerate(zip(files, steps.tolist(), strict=True)):
        share = shares[step - 1, place]
        order = np.argsort(-share, kind="stable")[:top].tolist()
        names = tuple((classes[k] if k < len(classes) else str(k), float(share[k])) for k in order)
        yield Prediction(file=str(file), classes=names, timesteps=step)


def show(predictions: Iterator[Prediction], *, as_json: bool) -> None:
    """Print one line an image as it is answered, or all as one JSON list."""
    if as_json:
        print(json.dumps([prediction.as_dict() for prediction in predictions], indent=1))
    else:
        for prediction in predictions:
            print(prediction)


def main(args: Sequence[str] | None = None) -> None:
    """The command line; bad input ends with one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m qsnn.export.runtime", description="Answer images.")
    parser.add_argument("network", type=Path, help="file that qsnn export wrote")
    parser.add_argument("images", nargs="+", type=Path, help="image files or folders")
    parser.add_argument("--top", type=int, default=1, help="classes a line")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--exit-margin", type=float, help="answer once two classes are so far apart (0 to 1)")
    options = parser.parse_args(args)
    try:
        network = OnnxNetwork(options.network)
        found = predict(
            network, image_files(options.images), network.recipe, raw=network.raw, top=options.top,
            exit_margin=options.exit_margin,
        )  # fmt: skip
        show(found, as_json=options.json)
    except (ValueError, OSError, ImportError) as error:
        print(f"qsnn: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _recipe(text: str | None, path: str | Path) -> dict[str, Any]:
    """The recipe in a file's metadata, its parts of the types that are read here."""
    try:
        recipe = json.loads(text or "null")
        if recipe is not None:
            data, export = recipe.get("data", {}), recipe["export"]
            numbers = [*data.get("mean", []), *data.get("std", []), *recipe["input_shape"]]
            if export["input"] not in ("float", "uint8") or not all(isinstance(x, int | float) for x in numbers):
                raise ValueError("options that are not known")
            steps, firing = export["timesteps"], export["firing"]
            if firing not in ("online", "deferred") or not isinstance(steps, int) or not 1 <= steps <= 255:
                raise ValueError("time steps that no file has")
            if not all(isinstance(name, str) for name in data.get("classes", [])):
                raise ValueError("classes that are no names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has damaged metadata ({error!r}); export the network again") from None
    if recipe is None:
        raise ValueError(f"{path} was not written by qsnn; qsnn export FILE --format onnx --out {path} does that")
    return recipe  # type: ignore[no-any-return]


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file: {path}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
