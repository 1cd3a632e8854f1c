"""What the samples of a model look like in numbers, and how sure one can be of such numbers.

Likelihoods are in ``likelihood``. Statistics of whole sets of pictures are computed on features of ``classifier``: numpy
in, numbers out. None of them means much alone: put beside it what the same statistic says of reconstructions and of data.

Two samples are taken to be independent. Reconstructions *of the reference pictures* are closer to them than that.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage, stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vaenb import gpu
from vaenb.data import ImageSet
from vaenb.models import BATCH, VAE, noise_sources, reparametrise


@torch.no_grad()
def pictures(model: VAE, images: ImageSet, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Decoder means for ``n`` prior samples and the first ``n`` test images, beside those images: grey, (≤ n, C, H, W).

    ``samples``: z ~ N(0, I); ``reconstructions``: z ~ q(z|x); ``data``: x. The same decoder draws the first two, so that
    what differs between them is where z comes from.
    """
    model, place = gpu.there(model), gpu.device()
    pixels, noise = noise_sources(seed)
    samples, reconstructions = [], []
    for start in range(0, n, BATCH):
        z = torch.randn(min(BATCH, n - start), *model.latent_shape, generator=noise)
        samples.append(model.decode(z.to(place)).mean.cpu())
    for batch in images.test[:n].split(BATCH):
        q = model.encode(model.observed(batch, torch.rand(batch.shape, generator=pixels)).to(place))
        z = reparametrise(q, torch.randn(q.mean.shape, generator=noise).to(place))
        reconstructions.append(model.decode(z).mean.cpu())
    data = images.test[:n].float() / 255
    return {"samples": torch.cat(samples), "reconstructions": torch.cat(reconstructions), "data": data}


def connected_components(images: Tensor, threshold: float = 0.5) -> np.ndarray:
    """Number of separate strokes in each image: 8-connected components of the pixels above the threshold.

    Args:
        images: grey values in [0, 1], (N, 1, H, W).

    Returns:
        (N,) whole numbers; 0 for an empty image.
    """
    inked = images[:, 0].cpu().numpy() > threshold
    neighbours = np.zeros((3, 3, 3))
    neighbours[1] = 1  # within an image, and not from one to the next
    labels, count = ndimage.label(inked, structure=neighbours)
    image_of = np.zeros(count + 1, dtype=int)
    image_of[labels] = np.arange(len(labels))[:, None, None]
    return np.bincount(image_of[1:], minlength=len(labels))


def picture_statistics(model: VAE, images: ImageSet, n: int = 10_000) -> dict[str, Any]:
    """What ``pictures`` look like in numbers, for ``n`` samples and the test set.

    ``one_stroke_*``: share of data, reconstructions and samples that are one connected stroke. ``variety_*``: variance
    between pictures, summed over pixels and relative to that of the data; 0 for a model that always draws the same.
    """
    drawn = pictures(model, images, n)
    spread = {name: p.var(dim=0).sum().item() for name, p in drawn.items()}
    return {
        **{f"one_stroke_{name}": float((connected_components(p) == 1).mean()) for name, p in drawn.items()},
        **{f"variety_{name}": spread[name] / spread["data"] for name in ("samples", "reconstructions")},
    }


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) between Gaussians fitted to two sets of features.

    Dowson & Landau 1982; Heusel et al. 2017. Never to be called "FID": that is this distance on the features of the
    Inception network, here it is on those of ``classifier``, and the two do not compare. Biased upwards by about 1/n, so
    only distances with the same numbers of images compare. With Σ = Rᵀ R from the eigenvectors of Σ, the last term is the
    sum of the singular values of R_a R_bᵀ, which singular covariances hardly disturb.

    Args:
        a, b: features, (N, d) and (M, d).

    Returns:
        In the square of the unit of the features.

    Raises:
        ValueError: NaN, another d, or at most d samples.
    """
    a, b = _pair(a, b)
    if (least := a.shape[1] + 1) > min(len(a), len(b)):
        raise ValueError(
            f"{len(a)} and {len(b)} samples of {a.shape[1]} features: a covariance of them needs at least {least} samples"
        )
    root_a, root_b = (_root(np.cov(x, rowvar=False)) for x in (a, b))
    common = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    shift = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(max(shift + np.square(root_a).sum() + np.square(root_b).sum() - 2 * common, 0))


def kernel_distance(a: np.ndarray, b: np.ndarray, block: int = 1000, seed: int = 0) -> tuple[float, float | None]:
    """Squared maximum mean discrepancy with the kernel (xᵀy / d + 1)³, unbiased, so it may be negative.

    Bińkowski et al. 2018 call it KID on features of Inception; these are of ``classifier``. All samples are used, in
    disjoint blocks of at least ``block``, after shuffling: the first half of MNIST's test images is cleaner than the second.

    Args:
        a, b: features, (N, d) and (M, d).
        block: samples per block of the smaller set; all of them in one block if there are fewer than two blocks.
        seed: of the shuffling.

    Returns:
        Mean over blocks and its standard error, None for a single block.

    Raises:
        ValueError: NaN, another d, or fewer than 2 samples.
    """
    a, b = _pair(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} samples: the unbiased estimate needs at least 2 of each")
    generator = np.random.default_rng(seed)
    blocks = max(min(len(a), len(b)) // block, 1)
    parts = zip(*(np.array_split(x[generator.permutation(len(x))], blocks) for x in (a, b)), strict=True)
    estimates = [_squared_discrepancy(x, y) for x, y in parts]
    return float(np.mean(estimates)), float(stats.sem(estimates)) if blocks > 1 else None


def density_coverage(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage: how full of samples the balls around reference images are, and how many are not empty.

    Naeem et al. 2020. The ball around an image reaches to its ``k``-th nearest neighbour among the other reference images.
    Two samples of one distribution, equally large: density 1, coverage 1 − 2^−k.

    Args:
        reference, samples: features, (N, d) and (M, d).
        k: neighbours.

    Returns:
        Density, ≥ 0 and not bounded by 1; coverage in [0, 1].

    Raises:
        ValueError: NaN, another d, or no ``k`` neighbours.
    """
    reference, samples = _pair(reference, samples)
    if not 0 < k < len(reference) or not len(samples):
        raise ValueError(
            f"k={k}: choose 1 to {len(reference) - 1} neighbours for {len(reference)} reference images, "
            f"and give at least one sample (there are {len(samples)})"
        )
    # |r − s|² − radius² < 0 as one matrix product, in parts that fit into a cache
    limits = np.square(reference).sum(axis=1) - np.square(_radii(reference.tobytes(), reference.shape[1], k))
    left = np.column_stack([-2 * reference, np.ones(len(reference)), limits])
    right = np.column_stack([samples, np.square(samples).sum(axis=1), np.ones(len(samples))]).T.copy()
    parts = (left[i : i + 64] @ right < 0 for i in range(0, len(left), 64))
    inside = np.concatenate([np.count_nonzero(part, axis=1) for part in parts])
    return float(inside.sum() / (k * len(samples))), float((inside > 0).mean())


@functools.lru_cache(maxsize=2)  # the same reference serves for many sets of samples
def _radii(reference: bytes, features: int, k: int) -> np.ndarray:
    """Distance of each row of a float64 array, (N, features), to its ``k``-th nearest neighbour among the others."""
    rows = np.frombuffer(reference).reshape(-1, features)
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows).kneighbors()[0][:, -1]


def two_sample_test(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Can a classifier tell two sets of pictures apart? Lopez-Paz & Oquab 2017.

    A small neural network learns on one half of each set, on standardised features, and is asked about the other half. Of
    the larger set as many are used as there are in the smaller one, so that chance is ½.

    Args:
        a, b: features, (N, d) and (M, d).
        seed: of the split and of the network; the same seed gives the same result.

    Returns:
        Accuracy on the held-out half, and the one-sided binomial p-value of being better than chance.

    Raises:
        ValueError: NaN, another d, or fewer than 4 samples.
    """
    a, b = _pair(a, b)
    half = min(len(a), len(b)) // 2
    if half < 2:
        raise ValueError(f"{len(a)} and {len(b)} samples: the test needs at least 4 of each, half of them to learn from")
    # The same order for both: a picture and its reconstruction must not be one learnt from and the other asked about.
    a, b = (x[np.random.default_rng(seed).permutation(len(x))[: 2 * half]] for x in (a, b))
    labels = np.repeat([0, 1], half)
    batch = min(max(half // 25, 16), 200, 2 * half)  # some hundreds of steps, however few images
    network = make_pipeline(StandardScaler(), MLPClassifier((64,), batch_size=batch, max_iter=20, random_state=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is fixed, and enough to tell
        network.fit(np.concatenate([a[:half], b[:half]]), labels)
    right = int((network.predict(np.concatenate([a[half:], b[half:]])) == labels).sum())
    return right / len(labels), float(stats.binomtest(right, len(labels), 0.5, alternative="greater").pvalue)


def class_statistics(probabilities: np.ndarray) -> dict[str, float]:
    """How sure a classifier is of single pictures, and how evenly they spread over its K classes.

    Args:
        probabilities: of the classes, (N, K).

    Returns:
        ``confidence``: mean of the highest probability of each picture, 1/K to 1. ``class_entropy``: entropy of the mean
        distribution over classes, nats, 0 (all pictures of one class) to ln K (all classes alike; ln 10 = 2.303).

    Raises:
        ValueError: rows that are not probabilities.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"class probabilities of shape {probabilities.shape}: expected (N, K), N ≥ 1")
    if not ((probabilities >= 0).all() and np.allclose(probabilities.sum(axis=1), 1)):
        raise ValueError("class probabilities must be at least 0 and sum to 1 in each row: were logits passed, or NaN?")
    return {
        "confidence": float(probabilities.max(axis=1).mean()),
        "class_entropy": float(stats.entropy(probabilities.mean(axis=0))),
    }


def compare(
    pictures: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray], slow: bool = False
) -> dict[str, float | None]:
    """All statistics of this module on features, for pictures against reference pictures.

    Args:
        pictures, reference: features (N, d) and class probabilities (N, K), as ``classifier.extract`` returns them; the
            reference is extracted once for many comparisons. Equally many pictures each time, or distances do not compare.
        slow: with the two-sample test, and the bootstrapped standard error of the Fréchet distance: the reference is held
            fixed, as it is the same for all.

    Returns:
        ``frechet``, ``kernel``, ``kernel_error``, ``density``, ``coverage``, ``confidence``, ``class_entropy``; if slow also
        ``frechet_error``, ``two_sample_accuracy`` and ``two_sample_p``.
    """
    features, known = pictures[0], reference[0]
    kernel, kernel_error = kernel_distance(features, known)
    density, coverage = density_coverage(known, features)
    result = {
        "frechet": frechet_distance(features, known),
        "kernel": kernel,
        "kernel_error": kernel_error,
        "density": density,
        "coverage": coverage,
        **class_statistics(pictures[1]),
    }
    if slow:
        accuracy, p = two_sample_test(features, known)
        error = bootstrap_error(lambda resampled: frechet_distance(resampled, known), features)
        result |= {"frechet_error": error, "two_sample_accuracy": accuracy, "two_sample_p": p}
    return result


def bootstrap_error(statistic: Callable[..., float], *samples: np.ndarray, resamples: int = 100, seed: int = 0) -> float:
    """Standard error of ``statistic(*samples)`` from the choice of images: draws them again (Efron 1979).

    Only the spread of the resampled values means something. Their centre does not: a resample holds images twice, which
    makes it look less varied and moves a Fréchet distance upwards. It says nothing about other training seeds.

    Args:
        statistic: of as many arrays as there are ``samples``.
        samples: arrays, one row per image; resampled independently of each other.
        resamples: relative error of the result ≈ 1/√(2·resamples).
        seed: of the resampling.

    Raises:
        ValueError: fewer than two resamples have no spread.
    """
    if resamples < 2:
        raise ValueError(f"resamples={resamples}: a standard error needs at least 2")
    generator = np.random.default_rng(seed)
    values = [statistic(*(x[generator.integers(len(x), size=len(x))] for x in samples)) for _ in range(resamples)]
    return float(np.std(values, ddof=1))


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t confidence interval of the mean over training seeds.

    Raises:
        ValueError: fewer than two values have no spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, got {len(values)}")
    if len(set(values)) == 1:
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return float(low), float(high)


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features in double precision, checked."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {a.shape} and {b.shape}: expected (N, d) and (M, d) with the same d")
    for name, x in (("first", a), ("second", b)):
        if bad := int((~np.isfinite(x)).any(axis=1).sum()):
            raise ValueError(f"{bad} of {len(x)} rows of the {name} features are NaN or infinite: look at their pictures")
    return a, b


def _root(covariance: np.ndarray) -> np.ndarray:
    """R with Rᵀ R = covariance, (d, d)."""
    variances, directions = np.linalg.eigh(np.atleast_2d(covariance))
    return np.sqrt(variances.clip(0))[:, None] * directions.T


def _squared_discrepancy(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of MMD² with the cubic kernel: a picture is never compared with itself."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        value = x @ y.T / x.shape[1] + 1
        return value * value * value  # numpy's powers are slow

    def within(x: np.ndarray) -> float:
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()
