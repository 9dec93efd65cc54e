"""One image file as pixels: 8 and 16 bits, palettes, transparency, CMYK and animations, or one line that refuses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_PIXELS = 89_478_485
"""Largest image that is opened [pixel], 256 MiB of RGB: Pillow's own limit, above which it takes a file for a bomb."""
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's names for one channel of 16 or 32 bits; converted to 8 bits by Pillow they are cut off at 255."""
_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
_FULL_SCALES = (255, 1023, 4095, 16383, 65535, 2**24 - 1, 2**31 - 1)
"""What white is in integers of 8, 10, 12, 14, 16, 24 and 31 bits."""


@dataclass(frozen=True)
class Header:
    """What a file says of its image before any pixel is read."""

    size: tuple[int, int]
    """Height and width [pixel]."""
    grey: bool
    """No colour: one channel holds it all."""
    deep: bool
    """Integers of 16 or 32 bits, or floats."""
    alpha: bool
    """Partly transparent."""
    animated: bool
    """Several images in one file."""
    halved: bool
    """Colours of 16 bits, of which Pillow gives the upper 8."""


def read_header(path: str) -> Header:
    """Read a file's header.

    Raises:
        ValueError: no readable image, more than 89 megapixels, or a single pixel.
    """
    with opened_image(path) as image:
        mode, transparent = image.mode, "transparency" in image.info
        alpha = mode in _ALPHA or transparent
        grey = mode in ("1", "L", "LA", "La", *DEEP) or (mode == "P" and _grey_palette(image))
        animated = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photograph and its preview
        halved = mode not in DEEP and any(";16" in str(tile[3]) for tile in image.tile)
        return Header(image.size[::-1], grey, mode in DEEP, alpha, bool(animated), halved)


def read_pixels(
    path: str, *, channels: int, size: tuple[int, int] | None = None, full_scale: float = 65535.0
) -> Tensor:
    """Read an image: pixels from 0 (black) to 255 (white).

    Transparency is laid on white; of an animation the first image counts; colours become grey where one channel is
    asked for (ITU-R 601 luma), and grey three equal channels where three are.

    Args:
        path: the file.
        channels: 1 or 3.
        size: height and width [pixel]; another size is scaled and cut at the centre, so that the aspect ratio stays.
        full_scale: white in a file of 16 or 32 bits.
    Shape:
        returns (channels, H, W), uint8, or float32 from a file of 16 or 32 bits, which keeps its content.
    Raises:
        ValueError: no readable image.
    """
    from PIL import Image, ImageOps

    with opened_image(path) as image:
        if image.mode in DEEP:
            white = 1.0 if image.mode == "F" else full_scale
            pixels: Any = Image.fromarray(_deep_values(image) * np.float32(255.0 / white))
        else:
            if image.mode in _ALPHA or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
            pixels = image.convert("L" if channels == 1 else "RGB")
        if size not in (None, pixels.size[::-1]):
            pixels = ImageOps.fit(pixels, size[::-1], Image.Resampling.BILINEAR)  # type: ignore[index]
        found = torch.from_numpy(np.array(pixels))
    found = found[None] if found.dim() == 2 else found.permute(2, 0, 1)
    return found.expand(channels, -1, -1)


def full_scale(paths: list[str], most: int = 500) -> float:
    """Return what white is in files of 16 or 32 bits: the smallest full scale of a bit depth that holds their values.

    Args:
        paths: the files, in any order.
        most: look at no more than so many, evenly spread over their sorted names; a larger value elsewhere is kept as
            brighter than white.
    Raises:
        ValueError: no readable image, or floats outside [0, 1], whose white is not known.
    """
    paths = sorted(paths)
    top = 0.0
    for path in paths[:: max(1, -(-len(paths) // most))]:
        with opened_image(path) as image:
            top = max(top, 0.0 if image.mode == "F" else float(_deep_values(image).max()))
    return next(scale for scale in _FULL_SCALES if scale >= min(top, _FULL_SCALES[-1]))


def _deep_values(image: Any) -> np.ndarray:
    values: np.ndarray = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= (1.0 if image.mode == "F" else np.inf):  # NaN too
        want = "floats from 0 to 1" if image.mode == "F" else "values of at least 0"
        raise ValueError(f"expected {want}, got {low:g} to {high:g}")
    return values


def _grey_palette(image: Any) -> bool:
    colours = np.array(image.getpalette() or [0, 1, 2]).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


@contextmanager
def opened_image(path: str) -> Iterator[Any]:
    """The image of a file; every fault of the file, also one met while its pixels are read, is a line that names it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"it has {width}x{height} pixels, more than {MAX_PIXELS:,}")
            if width * height < 2:
                raise ValueError("it is a single pixel")
            yield image
    # Pillow raises SyntaxError for some damaged PNGs, and warnings may be errors
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"expected an image in {path}, cannot read it ({error}); repair or remove it") from error
