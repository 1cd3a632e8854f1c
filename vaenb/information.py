"""Dependence in nats: how far an aggregate posterior is from a prior, and how far data are from any local model.

Every estimate here is a lower bound in expectation: a density or a classifier that fits badly makes it smaller, not larger.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.linalg import solve_triangular
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from vaenb.data import ImageSet, binarise
from vaenb.dependence import SampleSizeError, correlation


class SingularCovarianceError(ValueError):
    """Some latents are constant or functions of others, and their density is infinite."""


def normal_scores(latents: np.ndarray) -> np.ndarray:
    """Each latent replaced by the normal quantile of its rank among the images: standard normal margins, (N, d)."""
    flat = latents.reshape(len(latents), -1)
    return stats.norm.ppf((stats.rankdata(flat, axis=0) - 0.5) / len(flat))


def total_correlation(latents: np.ndarray, permutations: int = 10, seed: int = 0) -> dict[str, float]:
    """Lower bound on the total correlation KL(q(z) ‖ Π q(z_i)), nats: −½ log|R|, R the correlation of the normal scores.

    Total correlation does not change when single latents are transformed, and among distributions with standard normal
    margins and correlation R the Gaussian's is the smallest. The plug-in value is too large by about d(d − 1)/4N, so the
    mean over permuted latents, whose total correlation is zero, is taken off.

    Args:
        latents: (N, ...).
        permutations: for the null, each latent on its own between images.
        seed: of the permutations.

    Returns:
        ``bound`` (the null subtracted), ``plug_in``, ``null_mean``, ``null_sd``.

    Raises:
        SampleSizeError: no more images than latents.
        SingularCovarianceError: constant or duplicate latents.
    """
    scores = normal_scores(latents)
    count, d = scores.shape
    if count < d + 2:
        raise SampleSizeError(f"{count} images for {d} latents: the bound on total correlation needs at least {d + 2}")
    generator = np.random.default_rng(seed)
    plug_in = -0.5 * _log_determinant(correlation(scores))
    null = [-0.5 * _log_determinant(correlation(generator.permuted(scores, axis=0))) for _ in range(permutations)]
    return {
        "bound": plug_in - float(np.mean(null)),
        "plug_in": plug_in,
        "null_mean": float(np.mean(null)),
        "null_sd": float(np.std(null, ddof=1)),
    }


def gaussian_gain(train: np.ndarray, test: np.ndarray, full: bool) -> tuple[float, float]:
    """Held-out lower bound on KL(q(z) ‖ N(0, I)), nats: E_test[log r(z) − log p(z)], r a Gaussian fitted to ``train``.

    Also what replacing the prior p by r gains in ELBO with encoder and decoder frozen (T6).

    Args:
        train, test: draws from the aggregate posterior for different images, (N, ...).
        full: a full covariance; else each latent has its own mean and variance, and the gain is that of the margins.

    Returns:
        The mean gain and its standard error over test images.

    Raises:
        SampleSizeError: no more training images than latents.
        SingularCovarianceError: constant or linearly dependent latents.
    """
    train, test = (part.reshape(len(part), -1).astype(np.float64) for part in (train, test))
    if len(train) < train.shape[1] + 2:
        raise SampleSizeError(
            f"{len(train)} training images for {train.shape[1]} latents: a Gaussian needs at least {train.shape[1] + 2}"
        )
    mean, covariance = train.mean(axis=0), np.cov(train, rowvar=False)
    covariance = np.atleast_2d(covariance) if full else np.diag(np.diag(np.atleast_2d(covariance)))
    log_determinant = _log_determinant(covariance)
    whitened = solve_triangular(np.linalg.cholesky(covariance), (test - mean).T, lower=True)
    gain = 0.5 * ((test**2).sum(axis=1) - (whitened**2).sum(axis=0) - log_determinant)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))


def information_floor(
    train: np.ndarray, test: np.ndarray, regions: Sequence[np.ndarray], labels: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Nats that no model loses less than if it draws these regions independently of each other (T3).

    If the model's regions are independent, KL(p_data ‖ p_model) ≥ TC_data(x_A1, …, x_Am) = Σ_i I(x_Ai ; x_A1 … x_Ai−1), and
    each term is at least I(c(x_Ai) ; x_A1 … x_Ai−1) for any labels c, which is at least H(c) minus the held-out
    cross-entropy of any classifier. Here c is a k-means cluster, the classifier a network with one hidden layer; both may be
    as bad as they like. With n test images no such bound can exceed about ln n (McAllester & Stratos 2020).

    Args:
        train, test: binary images, (N, H, W); labels and classifiers are fitted to ``train``, measured on ``test``.
        regions: boolean masks (H, W) of the pixels of each region.
        labels: number of clusters per region.
        seed: of k-means and of the networks.

    Returns:
        ``floor`` and its ``standard_error`` over test images, and the ``terms`` that it sums, in nats.

    Raises:
        ValueError: fewer than two regions, or regions that overlap.
        SampleSizeError: fewer than ten training images per label.
    """
    if len(regions) < 2 or np.sum(regions, axis=0).max() > 1:
        raise ValueError(f"{len(regions)} regions: expected at least two, none overlapping another")
    if len(train) < 10 * labels:
        raise SampleSizeError(f"{len(train)} training images for {labels} labels: needs at least {10 * labels}")
    gains = []
    for index in range(1, len(regions)):
        seen = np.any(regions[:index], axis=0)
        clusters = MiniBatchKMeans(labels, random_state=seed, n_init=3).fit(train[:, regions[index]])
        target, held_out = (clusters.predict(part[:, regions[index]]) for part in (train, test))
        network = MLPClassifier((128,), early_stopping=True, n_iter_no_change=2, max_iter=12, random_state=seed)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # it need not be the best one
            network.fit(train[:, seen], target)
        known = np.isin(held_out, network.classes_)
        guesses = np.clip(network.predict_proba(test[:, seen]), 1e-12, 1)
        log_guess = np.full(len(test), np.log(1e-12))
        log_guess[known] = np.log(guesses[known, np.searchsorted(network.classes_, held_out[known])])
        log_margin = np.log(np.bincount(held_out)[held_out] / len(test))
        gains.append(log_guess - log_margin)
    total = np.sum(gains, axis=0)
    return {
        "floor": float(total.mean()),
        "standard_error": float(total.std(ddof=1) / np.sqrt(len(total))),
        "terms": [float(gain.mean()) for gain in gains],
    }


def floor_of_halves(rows: np.ndarray, images: ImageSet, count: int = 20_000, seed: int = 0) -> dict[str, Any]:
    """``information_floor`` of an upper and a lower part of the image that see no common latent.

    Of all such pairs of parts the one whose less variable part varies most is taken.

    Args:
        rows: of ``receptive.receptive_field``, (H, h).
        images: grey images, binarised once.
        count: training images used.
        seed: of binarisation and estimator.

    Returns:
        As ``information_floor``, and ``above`` and ``below``: last row of the upper and first row of the lower part.

    Raises:
        ValueError: every two rows can see a common latent; images of several channels.
    """
    if images.image_shape[0] != 1:
        raise ValueError(f"images of {images.image_shape[0]} channels: the floor is defined here for binary images of one")
    meet = rows @ rows.T
    cuts = []
    for last in range(len(rows) - 1):
        first = int(np.nonzero(meet[: last + 1].any(axis=0))[0][-1]) + 1  # from there on none meets the upper part
        cuts += [(last, first)] * (first < len(rows))
    if not cuts:
        raise ValueError("every row of this model sees a latent in common with every other: T3 gives no floor")
    ink = images.train[:, 0].float().var(dim=0).sum(dim=1)  # variance of each row
    last, first = max(cuts, key=lambda cut: min(ink[: cut[0] + 1].sum().item(), ink[cut[1] :].sum().item()))
    regions = np.zeros((2, *images.image_shape[1:]), dtype=bool)
    regions[0, : last + 1], regions[1, first:] = True, True
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        binarise(part, torch.rand(part.shape, generator=generator))[:, 0].numpy()
        for part in (images.train[:count], images.test)
    )
    labels = min(128, len(train) // 10)
    return {**information_floor(train, test, list(regions), labels, seed), "above": last, "below": first}


def _log_determinant(matrix: np.ndarray) -> float:
    sign, value = np.linalg.slogdet(matrix)
    if sign <= 0 or not np.isfinite(value) or np.linalg.cond(matrix) > 1e12:
        raise SingularCovarianceError(
            f"the covariance of {len(matrix)} latents is singular: some never vary or are functions of others. Draw z ~ "
            "q(z|x), whose noise makes every latent vary, rather than take means, or leave those latents out"
        )
    return float(value)
