"""Picture files: any format in, PNG out, written as it is made."""

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import png
from PIL import Image, ImageOps
from torch import Tensor


Image.MAX_IMAGE_PIXELS = None  # satellite scenes are larger than what Pillow takes for an attack
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error)  # as decoders say it


class PictureError(ValueError):
    """A file is not the picture that it should be."""


def read(path: Path) -> np.ndarray:
    """A picture file as 8-bit RGB, (H, W, 3), turned upright as its camera says.

    Grey is repeated, transparency laid on black. Of 16 bits the upper 8 are kept; grey floats are from 0 to 1.

    Raises:
        PictureError: not a picture, damaged, cut short, or with floats outside [0, 1]; the message names the file.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode == "F" or picture.mode.startswith("I"):
                grey = np.asarray(picture, dtype=np.float64) / (1 if picture.mode == "F" else 65535)
                if not (grey.min() >= 0 and grey.max() <= 1):
                    raise ValueError(f"grey values from {grey.min():g} to {grey.max():g}, expected 0 to 1 (or 16 bits)")
                return np.repeat((grey * 255).round().astype(np.uint8)[..., None], 3, axis=2)
            if picture.has_transparency_data:
                black = Image.new("RGBA", picture.size, "black")
                return np.asarray(Image.alpha_composite(black, picture.convert("RGBA")).convert("RGB"))
            return np.asarray(picture.convert("RGB"))
    except DAMAGE as error:
        raise PictureError(f"{path} cannot be read as a picture: {error}") from error


def files(paths: Iterable[Path]) -> list[Path]:
    """These files, and for folders the picture files in them, told by their suffix.

    Raises:
        PictureError: there are none.
    """
    found = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        pictures = [p for p in inside if p.suffix.lower() in Image.registered_extensions() and not p.name.startswith(".")]
        found += pictures if path.is_dir() else [path]
    if not found:
        raise PictureError(f"no picture files in {', '.join(map(str, paths))}")
    return found


def write_png(path: Path, bands: Iterable[Tensor], size: tuple[int, int], channels: int) -> None:
    """Write a picture as it is made, band by band, under a temporary name that becomes ``path`` when it is complete.

    Args:
        path: of the file, ending in .png.
        bands: rows from the top, (C, rows, W) with values in [0, 1].
        size: height and width.
        channels: 1 or 3.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; nothing is left under either name.
    """
    height, width = size
    writer = png.Writer(width, height, greyscale=channels == 1, bitdepth=8, compression=3)
    rows = (row for band in bands for row in (band.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).flatten(1).numpy())
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            writer.write(file, rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
