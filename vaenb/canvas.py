"""Images of any size: besides the picture or the map that goes in, in the memory of a band of tiles.

What a convolution puts out at a place depends on no input farther away than its *halo*. So a canvas is computed tile by
tile, each with a halo around it that is thrown away afterwards, and equals what would be computed at once. Where a tile
ends at the border of the canvas it has no halo, and is padded as the canvas is.

Images are (C, H, W); maps of latents (C, h, w), with a position for every ``model.stride`` pixels along each axis.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from vaenb.models import VAE
from vaenb.receptive import GlobalLayerError, field_of

TILE = 64  # positions along each side of a tile


def halos(model: VAE) -> tuple[int, int]:
    """How many positions a tile needs around it to be encoded and to be decoded, from the layers.

    Raises:
        GlobalLayerError: a layer across positions, or coordinates, which say where in the whole image a position lies.
        ValueError: circular padding, by which opposite borders are neighbours.
    """
    if model.arm != "spatial" or model.coordinates:
        raise GlobalLayerError(
            f"an image cannot be cut into tiles for the {model.arm} arm{' with coordinates' * model.coordinates}: what it "
            "computes at a position depends on the whole image. Use the spatial arm without coordinates"
        )
    if model.padding != "zeros":
        raise ValueError(f"padding={model.padding}: opposite borders are neighbours, so that a tile never has all it needs")
    count, found = 32, []
    while not found or max(found) >= count // 2 - 1:  # until no field touches the border
        count *= 2
        middle = count // 2
        decoding = field_of([*model.from_latent, *model.decoder], count)  # pixels × positions
        encoding = field_of([*model.encoder, *model.to_latent], count * model.stride)  # positions × pixels
        seen = np.nonzero(decoding[middle * model.stride : (middle + 1) * model.stride].any(axis=0))[0]
        looked_at = np.nonzero(encoding[middle])[0] // model.stride
        found = [int(max(middle - x.min(), x.max() - middle)) for x in (looked_at, seen)]
    return found[0], found[1]


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, halo: int, tile: int = TILE) -> Tensor:
    """``function(x)`` for one that keeps height and width and sees no farther than ``halo``, tile by tile; (N, C, H, W)."""
    bands = []
    for rows, above, below in _pieces(x.shape[-2], tile, halo):
        band = []
        for columns, left, right in _pieces(x.shape[-1], tile, halo):
            y = function(x[..., above:below, left:right])
            band.append(y[..., rows.start - above : rows.stop - above, columns.start - left : columns.stop - left])
        bands.append(torch.cat(band, dim=-1))
    return torch.cat(bands, dim=-2)


@torch.no_grad()
def encode_rows(model: VAE, image: Tensor, rows: range, halo: int, tile: int = TILE) -> Tensor:
    """Posterior means of some rows of the map of an image, (C, len(rows), w).

    Args:
        model: spatial, without coordinates.
        image: uint8, (C, H, W): a tensor in memory; only what the rows need is converted.
        rows: of the map.
        halo: the first of ``halos(model)``.
        tile: side of the tiles in positions.
    """
    stride = model.stride
    height, width = model.grid(image.shape[1:])
    above, below = max(rows.start - halo, 0), min(rows.stop + halo, height)
    parts = []
    for columns, left, right in _pieces(width, tile, halo):
        pixels = image[:, above * stride : below * stride, left * stride : right * stride].float() / 255
        mean = model.encode(pixels[None]).mean[0]
        parts.append(mean[:, rows.start - above : rows.stop - above, columns.start - left : columns.stop - left])
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def decode_rows(model: VAE, z: Tensor, rows: range, halo: int, tile: int = TILE) -> Tensor:
    """Decoder means of the pixels of some rows of a map, (C, len(rows)·stride, w·stride).

    Args:
        model: as for ``encode_rows``.
        z: the map, (C, h, w).
        rows, tile: as for ``encode_rows``.
        halo: the second of ``halos(model)``.
    """
    stride = model.stride
    above, below = max(rows.start - halo, 0), min(rows.stop + halo, z.shape[1])
    parts = []
    for columns, left, right in _pieces(z.shape[2], tile, halo):
        part = model.decode(z[None, :, above:below, left:right], (stride * (below - above), stride * (right - left))).mean[0]
        y, x = stride * (rows.start - above), stride * (columns.start - left)
        parts.append(part[:, y : y + stride * len(rows), x : x + stride * len(columns)])
    return torch.cat(parts, dim=-1)


def reconstruct(model: VAE, image: Tensor, tile: int = TILE) -> Iterator[Tensor]:
    """The image through encoder (posterior means) and decoder (means): bands of rows from the top, (C, ≤ rows, W).

    Args:
        model: spatial, without coordinates.
        image: uint8, (C, H, W), of any size from the stride on.
        tile: as in ``encode_rows``.
    """
    (encoding, decoding), done = halos(model), 0
    for rows, above, below in _pieces(model.grid(image.shape[1:])[0], tile, decoding):
        z = encode_rows(model, image, range(above, below), encoding, tile)
        band = decode_rows(model, z, range(rows.start - above, rows.stop - above), decoding, tile)
        band = band[:, : image.shape[1] - done, : image.shape[2]]
        done += band.shape[1]
        yield band


def render(model: VAE, z: Tensor, size: tuple[int, int] | None = None, tile: int = TILE) -> Iterator[Tensor]:
    """Decoder means of a map: bands of rows from the top, (C, ≤ rows, W).

    Args:
        model: as for ``reconstruct``.
        z: (C, h, w).
        size: height and width to crop to; by default all of it.
        tile: as in ``encode_rows``.
    """
    height, width = size or (model.stride * z.shape[1], model.stride * z.shape[2])
    halo, done = halos(model)[1], 0
    for rows, _, _ in _pieces(z.shape[1], tile, 0):
        band = decode_rows(model, z, rows, halo, tile)[:, : height - done, :width]
        done += band.shape[1]
        yield band


def _pieces(length: int, tile: int, halo: int) -> Iterator[tuple[range, int, int]]:
    """Ranges that cover 0 … length, each with where its halo begins and ends."""
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        yield range(start, stop), max(start - halo, 0), min(stop + halo, length)
