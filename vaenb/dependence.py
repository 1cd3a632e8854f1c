"""How latents at different positions of a map depend on each other."""

import numpy as np


def squared_correlation(latents: np.ndarray) -> np.ndarray:
    """r² between every two positions, across images.

    Args:
        latents: (N, ...), one map per image.

    Returns:
        (d, d) for d positions; those that never vary correlate with nothing.
    """
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    scale = np.sqrt((flat**2).sum(axis=0))
    flat = np.divide(flat, scale, out=np.zeros_like(flat), where=scale > 0)
    return (flat.T @ flat) ** 2


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
    squares = squared_correlation(latents[:, used])
    shuffles = np.random.default_rng(seed).permuted(np.tile(np.arange(used.sum()), (permutations, 1)), axis=1)
    return squares[first, second].mean(), np.array([squares[p[first], p[second]].mean() for p in shuffles])


def p_value(observed: float, null: np.ndarray) -> float:
    """One-sided permutation p-value, counting the observation itself (Davison & Hinkley 1997, section 4.3)."""
    return (1 + int((null >= observed).sum())) / (1 + len(null))
