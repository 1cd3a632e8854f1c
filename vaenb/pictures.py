"""Picture files: many formats in, always as 8-bit RGB; PNG out, written as it is made."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import png
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from vaenb.runs import atomic

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "TGA", "JPEG2000", "AVIF")  # none that runs other programs
EXTENSIONS = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".webp", ".gif", ".bmp", ".dib", ".ppm", ".pgm",
    ".pbm", ".pnm", ".tga", ".jp2", ".j2k", ".avif",
}  # fmt: skip
Image.MAX_IMAGE_PIXELS = 10**9  # scenes have more than Pillow allows; of twice as many it makes an error


class PictureError(ValueError):
    """A file is not the picture that it should be."""


class Unreadable(PictureError):
    """A file that cannot be decoded, with the ``reason``."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} cannot be read as a picture: {reason}")
        self.reason = reason


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """A picture of which only the header has been read; of an animation, the first one.

    Raises:
        Unreadable: here, or while the picture is decoded inside the block.
    """
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.mode == "F":
                raise Unreadable(path, "pixels are floating-point numbers, of which nobody knows what is white")
            yield picture
    except Unreadable:
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise whatever they happen to run into
        reason = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise Unreadable(path, reason or type(error).__name__) from error


def rgb(picture: Image.Image) -> np.ndarray:
    """8 bits of red, green and blue, uint8, (H, W, 3): grey repeated, transparency on black, 16 bits scaled to 8."""
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        grey = np.asarray(picture).clip(0, 65_535).astype(np.uint32)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def read(path: Path) -> np.ndarray:
    """A whole picture, see ``rgb``, turned upright as its camera says.

    Raises:
        Unreadable: not a picture, damaged, cut short, or of floating-point numbers; the message names the file.
    """
    with opened(path) as picture:
        ImageOps.exif_transpose(picture, in_place=True)
        return rgb(picture)


def files(paths: Iterable[Path]) -> list[Path]:
    """These files, and for folders the picture files in them, told by their suffix.

    Raises:
        PictureError: there are none.
    """
    found = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        pictures = [p for p in inside if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
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
        runs.DiskFull, OSError: no space, or a folder that cannot be written to; nothing is left under either name.
    """
    height, width = size
    writer = png.Writer(width, height, greyscale=channels == 1, bitdepth=8, compression=3)
    rows = (row for band in bands for row in (band.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).flatten(1).numpy())
    with atomic(path) as file:
        writer.write(file, rows)
