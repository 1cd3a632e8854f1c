"""Picture files: any format in, PNG out, written as it is made."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import png
from PIL import Image, UnidentifiedImageError
from torch import Tensor


class PictureError(ValueError):
    """A file is not the picture that it should be."""


def read(path: Path) -> np.ndarray:
    """A picture file as 8-bit RGB, (H, W, 3): grey is repeated, transparency laid on black, 16 bits are rounded to 8.

    Raises:
        PictureError: not a picture, damaged, or cut short; the message names the file.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode == "F" or picture.mode.startswith("I"):
                grey = np.asarray(picture, dtype=np.float64) / (1 if picture.mode == "F" else 65535)
                return np.repeat((grey.clip(0, 1) * 255).round().astype(np.uint8)[..., None], 3, axis=2)
            if picture.has_transparency_data:
                black = Image.new("RGBA", picture.size, "black")
                return np.asarray(Image.alpha_composite(black, picture.convert("RGBA")).convert("RGB"))
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} cannot be read as a picture: {error}") from error


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
