"""How latents at different positions of a map depend on each other."""

import numpy as np


def squared_correlation(latents: np.ndarray) -> np.ndarray:
    """r² between every two positions, across images.

    Args:
        latents: (N, h, w), one map per image.

    Returns:
        (h·w, h·w); positions that never vary correlate with nothing.
    """
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    scale = np.sqrt((flat**2).sum(axis=0))
    flat = np.divide(flat, scale, out=np.zeros_like(flat), where=scale > 0)
    return (flat.T @ flat) ** 2


def neighbour_test(latents: np.ndarray, permutations: int = 999, seed: int = 0) -> tuple[float, np.ndarray]:
    """Does it matter where a latent lies? Mean r² of adjacent positions, and the same with the positions shuffled.

    A map that is a picture of something has neighbours that say more about each other than strangers do. In a vector that
    was merely reshaped, order means nothing, and the observed value is like any of the shuffled ones. Unlike the sight of a
    single map, the statistic looks across images; unlike their independence, it is about arrangement only.

    Args:
        latents: (N, h, w), one map per image.
        permutations: of the h·w positions.
        seed: of the permutations.

    Returns:
        The observed value and the ``permutations`` values of the null.

    Raises:
        ValueError: fewer than 2 positions along an axis or fewer than 3 images.
    """
    count, height, width = latents.shape
    if min(height, width) < 2 or count < 3:
        raise ValueError(f"maps of shape {latents.shape}: need at least 3 images of at least 2×2 positions")
    squares = squared_correlation(latents)
    index = np.arange(height * width).reshape(height, width)
    first = np.concatenate([index[:, :-1].ravel(), index[:-1].ravel()])
    second = np.concatenate([index[:, 1:].ravel(), index[1:].ravel()])
    shuffles = np.random.default_rng(seed).permuted(np.tile(index.ravel(), (permutations, 1)), axis=1)
    return squares[first, second].mean(), np.array([squares[p[first], p[second]].mean() for p in shuffles])


def p_value(observed: float, null: np.ndarray) -> float:
    """One-sided permutation p-value, counting the observation itself (Davison & Hinkley 1997, section 4.3)."""
    return (1 + int((null >= observed).sum())) / (1 + len(null))
