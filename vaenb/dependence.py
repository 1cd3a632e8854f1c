"""How latents at different positions of a map depend on each other, across images.

Latents are those of the aggregate posterior: one draw z ~ q(z|x) per image, arrays (N, C, h, w), (N, h, w) or (N, d).
Draws and not means, since a latent that is hardly used varies as the prior does and must count as such.
"""

import numpy as np
import torch
from torch import Tensor

from vaenb import gpu
from vaenb.models import BATCH, VAE, noise_sources, reparametrise


class SampleSizeError(ValueError):
    """Too few images for an estimate; the message says how many it needs."""


@torch.no_grad()
def aggregate(model: VAE, images: Tensor, seed: int = 0, each: int = 1) -> Tensor:
    """Draws from the aggregate posterior q(z) = E_data q(z|x): (each · N, *latent shape), on the CPU.

    Args:
        images: uint8, (N, C, H, W); shown to the model once each, see ``pixels.observed``.
        seed: of what the model is shown and of latent noise.
        each: draws from each q(z|x); first one for every image, then the next for every image.
    """
    model = gpu.there(model)
    pixels, noise = noise_sources(seed)
    draws = []
    for batch in images.split(BATCH):
        q = model.encode(model.observed(batch, torch.rand(batch.shape, generator=pixels)).to(gpu.device()))
        noises = (torch.randn(q.mean.shape, generator=noise).to(gpu.device()) for _ in range(each))
        draws.append(torch.stack([reparametrise(q, epsilon).cpu() for epsilon in noises]))
    return torch.cat(draws, dim=1).flatten(0, 1)


def permute(latents: Tensor, block: int = 1, seed: int = 0) -> Tensor:
    """Shuffle blocks of positions between images, each block on its own: marginals stay, dependence between blocks goes.

    With blocks of one position this is FactorVAE's sample from the product of marginals (Kim & Mnih 2018); one block as
    large as the map only reorders the images. Channels of a position stay together.

    Args:
        latents: (N, C, h, w), or (N, d), whose every entry is a position.
        block: side of the blocks; those at the lower and right border are what is left.
        seed: of the permutations.

    Raises:
        ValueError: another shape, or a block that is not a whole number of positions ≥ 1.
    """
    if latents.ndim not in (2, 4):
        raise ValueError(f"latents of shape {tuple(latents.shape)}: expected (N, C, h, w) or (N, d)")
    if block < 1 or block != int(block) or (latents.ndim == 2 and block != 1):
        raise ValueError(
            f"block={block}: expected a whole number of at least 1, and 1 for vectors, which have no neighbours"
        )
    maps = latents if latents.ndim == 4 else latents[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.empty_like(maps)
    height = block if latents.ndim == 4 else 1
    for top in range(0, maps.shape[2], height):
        for left in range(0, maps.shape[3], block):
            order = torch.randperm(len(maps), generator=generator)
            shuffled[:, :, top : top + height, left : left + block] = maps[order, :, top : top + height, left : left + block]
    return shuffled.view_as(latents)


def correlation(latents: np.ndarray) -> np.ndarray:
    """Pearson correlation between every two latents, across images.

    Args:
        latents: (N, ...).

    Returns:
        (d, d) for d latents per image; those that never vary correlate with nothing, not even themselves.
    """
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    varies = np.ptp(flat, axis=0) > 0  # told before rounding: the mean of equal numbers may differ from them
    flat = flat - flat.mean(axis=0)
    scale = np.sqrt((flat**2).sum(axis=0))
    flat = np.divide(flat, scale, out=np.zeros_like(flat), where=varies)
    return flat.T @ flat


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """The entries of a square matrix that belong to two different latents, flat."""
    return matrix[~np.eye(len(matrix), dtype=bool)]


def correlogram(latents: np.ndarray) -> np.ndarray:
    """Position-averaged autocorrelation: one number per lag, as if all positions of the map were alike.

    The average over positions i of Cov(z_i, z_{i + lag}), each about its own position's mean, over the average variance.
    T4: in a circulant linear model with full kernels it is exactly that of white noise while single pairs are correlated.

    Args:
        latents: (N, h, w).

    Returns:
        (2h − 1, 2w − 1), lag (0, 0) in the middle, where it is 1.

    Raises:
        ValueError: not maps of one channel.
    """
    _, height, width = _check_maps(latents)
    centred = latents.astype(np.float64) - latents.mean(axis=0)
    spectrum = np.abs(np.fft.fft2(centred, s=(2 * height, 2 * width))) ** 2
    sums = np.fft.fftshift(np.fft.ifft2(spectrum.mean(axis=0)).real)[1:, 1:]
    rows, columns = (side - np.abs(np.arange(1 - side, side)) for side in (height, width))
    average = sums / np.outer(rows, columns)
    return average / average[height - 1, width - 1]


def lag_averages(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each entry of a matrix over position pairs replaced by the mean over all pairs with its lag: what averages can see.

    Args:
        matrix: (h·w, h·w), positions by rows.
        height, width: of the map.
    """
    y, x = np.divmod(np.arange(height * width), width)
    lag = (y - y[:, None] + height - 1) * (2 * width - 1) + x - x[:, None] + width - 1
    sums, counts = np.bincount(lag.ravel(), weights=matrix.ravel()), np.bincount(lag.ravel())
    return (sums / counts)[lag]


def morans_i(maps: np.ndarray) -> np.ndarray:
    """Moran's I of each map with the four nearest neighbours (Moran 1950): Σ w_ij z_i z_j · n / (Σ w_ij · Σ z_i²).

    z is about the map's own mean; under exchangeable positions its mean is −1/(n − 1). It looks at one map at a time, so it
    cannot see a dependence that is positive between some neighbours and negative between others.

    Args:
        maps: (N, h, w).

    Returns:
        (N,).

    Raises:
        ValueError: not maps of one channel, or a map that is the same everywhere.
    """
    _, height, width = _check_maps(maps)
    centred = maps.astype(np.float64) - maps.mean(axis=(1, 2), keepdims=True)
    squares = (centred**2).sum(axis=(1, 2))
    varies = np.ptp(maps, axis=(1, 2)) > 0  # a mean that is rounded leaves squares that are not 0
    if not varies.all():
        raise ValueError(f"map {int(np.argmin(varies))} is the same everywhere: Moran's I is not defined for it")
    across = (centred[:, :, :-1] * centred[:, :, 1:]).sum(axis=(1, 2))
    down = (centred[:, :-1] * centred[:, 1:]).sum(axis=(1, 2))
    pairs = height * (width - 1) + (height - 1) * width
    return (across + down) / pairs * height * width / squares


def correlation_products(pictures: np.ndarray, splits: int) -> np.ndarray:
    """Unbiased estimates of the squared correlation of every two pixels: r in one split times r in the next.

    A squared correlation is about 1/N even for independent pixels. The product of two from separate images has mean ρ² up
    to terms of order 1/N, and exactly zero for independent pixels.

    Args:
        pictures: (N, H, W).
        splits: number of equal parts, even.

    Returns:
        (splits / 2, H·W, H·W), independent of each other.

    Raises:
        ValueError: an odd number of splits.
        SampleSizeError: fewer than 3 pictures per split.
    """
    if splits < 2 or splits % 2:
        raise ValueError(f"splits={splits}: expected an even number of at least 2")
    if len(pictures) < 3 * splits:
        raise SampleSizeError(f"{len(pictures)} pictures in {splits} splits: needs at least {3 * splits}")
    each = len(pictures) // splits
    parts = [correlation(pictures[i * each : (i + 1) * each]) for i in range(splits)]
    return np.stack([parts[i] * parts[i + 1] for i in range(0, splits, 2)])


def by_distance(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean of a matrix over pixel pairs at each distance max(|Δy|, |Δx|) from 0 on; (..., H·W, H·W) -> (..., distances)."""
    y, x = np.divmod(np.arange(height * width), width)
    distance = np.maximum(np.abs(y[:, None] - y), np.abs(x[:, None] - x)).ravel()
    flat = matrix.reshape(-1, distance.size)
    sums = np.stack([np.bincount(distance, weights=row) for row in flat])
    return (sums / np.bincount(distance)).reshape(*matrix.shape[:-2], -1)


def neighbour_test(
    latents: np.ndarray, used: np.ndarray | None = None, permutations: int = 999, seed: int = 0
) -> tuple[float, np.ndarray]:
    """Does it matter where a latent lies? Mean r² of adjacent positions, and the same with the positions shuffled.

    In a map, neighbours say more about each other than strangers do. In a vector that was merely reshaped, order means
    nothing, and the observed value is like any of the shuffled ones. The mean of the null is the average r² of any two
    positions: how dependent they are, wherever they lie. Draw ``latents`` from q(z|x) rather than take its mean, or what a
    latent that is hardly used whispers counts as much as what a used one says.

    Args:
        latents: (N, h, w), one map per image.
        used: (h, w); only these positions take part, and are shuffled among themselves. Without it, a map with a blank
            border is arranged already because its used positions lie together.
        permutations: of the positions.
        seed: of the permutations.

    Returns:
        The observed value and the ``permutations`` values of the null.

    Raises:
        ValueError: fewer than 3 images, or no two adjacent positions.
    """
    count, height, width = latents.shape
    used = np.ones((height, width), dtype=bool) if used is None else used
    index = np.where(used, np.cumsum(used).reshape(used.shape) - 1, -1)  # among the used positions
    pairs = np.concatenate([
        np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()], axis=1),
        np.stack([index[:-1].ravel(), index[1:].ravel()], axis=1),
    ])  # fmt: skip
    first, second = pairs[(pairs >= 0).all(axis=1)].T
    if count < 3 or len(first) == 0:
        raise ValueError(f"maps of shape {latents.shape}, {used.sum()} positions used: need 3 images and adjacent positions")
    squares = correlation(latents[:, used]) ** 2
    shuffles = np.random.default_rng(seed).permuted(np.tile(np.arange(used.sum()), (permutations, 1)), axis=1)
    return squares[first, second].mean(), np.array([squares[p[first], p[second]].mean() for p in shuffles])


def p_value(observed: float, null: np.ndarray) -> float:
    """One-sided permutation p-value, counting the observation itself (Davison & Hinkley 1997, section 4.3)."""
    return (1 + int((null >= observed).sum())) / (1 + len(null))


def _check_maps(maps: np.ndarray) -> tuple[int, int, int]:
    if maps.ndim != 3:
        raise ValueError(f"maps of shape {maps.shape}: expected (N, h, w), one channel at a time")
    return maps.shape
