"""Pictures that a trained model decodes from latents of any source, and what is measured on them.

Each *source* of latents keeps some of what q(z|x) knows and loses the rest:

    reconstructions     z ~ q(z|x), one draw for each image of ``halves``
    permuted-b          the same, blocks of b×b positions shuffled between images: what is shared between blocks is lost
    per-position        independent Gaussians with each latent's own mean and variance
    prior               z ~ N(0, I)
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaenb import data, gpu
from vaenb.classifier import classifier, extract
from vaenb.data import ImageSet
from vaenb.dependence import aggregate, by_distance, correlation_products, permute
from vaenb.information import gaussian_gain, total_correlation
from vaenb.models import BATCH, VAE
from vaenb.quality import compare, connected_components
from vaenb.receptive import GlobalLayerError, receptive_field, share_a_latent

COUNT = 10_000  # pictures of a kind: Fréchet distances compare only at equal numbers


def halves(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Images to encode and, as many, the reference that pictures are compared with; no image is in both.

    Training images and test images where there are ``COUNT`` of both; else two halves of the training images, since a
    covariance of 64 features needs more than a few test images.
    """
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
    if len(images.test) >= COUNT:
        return images.train[order[:COUNT]], images.test[:COUNT]
    half = min(len(order) // 2, COUNT)
    return images.train[order[:half]], images.train[order[half : 2 * half]]


def latents(model: VAE, images: ImageSet, source: str, seed: int = 0) -> Tensor:
    """Latents from a source, as many as there are images in each of ``halves``: (N, *latent shape).

    ``per-position`` and ``prior`` take the same standard normal numbers, so that their pictures can be compared one by one.

    Raises:
        ValueError: unknown source.
    """
    encoded, _ = halves(images)
    noise = torch.randn(len(encoded), *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    if source == "prior":
        return noise
    z = aggregate(model, encoded, seed + 1)  # not with the noise of the prior again
    if source == "reconstructions":
        return z
    if source == "per-position":
        return z.mean(dim=0) + z.std(dim=0) * noise
    name, _, block = source.partition("-")
    if name != "permuted" or not block.isdecimal():
        raise ValueError(
            f"unknown source {source!r}: choose reconstructions, permuted-1, permuted-2 …, per-position or prior"
        )
    return permute(z, int(block), seed)


@torch.no_grad()
def decoded(model: VAE, z: Tensor) -> Tensor:
    """Decoder means, (N, C, H, W) in [0, 1], on the CPU."""
    model = gpu.there(model)
    return torch.cat([model.decode(batch.to(gpu.device())).mean.cpu() for batch in z.split(BATCH)])


def picture_quality(
    model: VAE, images: ImageSet, sources: Sequence[str] = ("prior",), slow: bool = False, seed: int = 0
) -> dict[str, Any]:
    """How pictures from each source compare with the reference images: source -> statistic -> value.

    Those of ``quality.compare``, and ``one_stroke``: the share that is one connected component; ``mean_image_error``:
    squared difference of the mean pictures, relative to the variance between data, both summed over pixels: is ink where it
    should be on average? ``mean_image_contrast``: variance over pixels of the mean picture, relative to that of the mean
    reference image: 0 where all places look alike on average, as T2 has it up to the total stride.

    Args:
        model, images: see ``Run.measure``.
        sources: as in ``latents``.
        slow: as in ``quality.compare``.
        seed: of all draws.
    """
    network, known = classifier(images.name), known_features(images.name)
    grey = halves(images)[1].float() / 255
    centre = grey.mean(dim=0)
    results = {}
    for source in sources:
        pictures = decoded(model, latents(model, images, source, seed))
        mean = pictures.mean(dim=0)
        results[source] = {
            **compare(extract(network, pictures), known, slow),
            "one_stroke": float((connected_components(pictures) == 1).mean()),
            "mean_image_error": ((mean - centre).square().sum() / grey.var(dim=0).sum()).item(),
            "mean_image_contrast": (mean.var() / centre.var()).item(),
        }
    return results


@functools.lru_cache(maxsize=2)
def known_features(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and class probabilities of the reference images."""
    return extract(classifier(dataset), halves(data.load(dataset))[1])


def floors(dataset: str) -> dict[str, Any]:
    """What the statistics say of data against data: two random halves of the reference images, half as many of each."""
    features, probabilities = known_features(dataset)
    order = np.random.default_rng(0).permutation(len(features))
    first, second = np.array_split(order, 2)
    return compare((features[first], probabilities[first]), (features[second], probabilities[second]), slow=True)


def aggregate_nats(model: VAE, images: ImageSet, count: int = 20_000) -> dict[str, float]:
    """How far the aggregate posterior is from N(0, I), in nats; lower bounds, all of linear dependence only.

    ``position`` and ``full``: held-out gain of a Gaussian for each latent and of a full one (``information.gaussian_gain``),
    fitted to 90 % of the latents of up to ``count`` training images. The second only where there are 20 images per latent:
    with fewer it overfits. ``total_correlation``: ``information.total_correlation`` of all of them.
    """
    z = aggregate(model, images.train[:count]).numpy()
    fitted, held_out = np.split(z, [len(z) * 9 // 10])
    nats = {
        "position": gaussian_gain(fitted, held_out, full=False)[0],
        "total_correlation": total_correlation(z)["bound"],
    }
    if len(fitted) >= 20 * z[0].size:
        nats["full"] = gaussian_gain(fitted, held_out, full=True)[0]
    return nats


def pixel_correlation(model: VAE, images: ImageSet, n: int = 20_000, splits: int = 20, seed: int = 0) -> dict[str, Any]:
    """Squared correlation of two pixels of prior samples, by their distance, and over the pairs independent by T1.

    Args:
        model, images: see ``Run.measure``.
        n: samples (decoder means, z ~ N(0, I)).
        splits: as in ``dependence.correlation_products``; each two give one unbiased estimate.
        seed: of the samples.

    Returns:
        ``by_distance``: per estimate, the mean at max(|Δy|, |Δx|) = 0, 1, …; ``independent``: per estimate, the mean over
        the independent pairs, None for models without a receptive field or without such pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    _one_channel(images)
    pictures = decoded(model, torch.randn(n, *model.latent_shape, generator=generator))[:, 0].numpy()
    products = correlation_products(pictures, splits)
    height, width = pictures.shape[1:]
    try:
        apart = ~share_a_latent(*receptive_field(model))
        independent = products[:, apart].mean(axis=1).tolist() if apart.any() else None
    except GlobalLayerError:
        independent = None
    return {"by_distance": by_distance(products, height, width).tolist(), "independent": independent}


def data_correlation(images: ImageSet, splits: int = 10) -> list[list[float]]:
    """The same for data: squared correlation of two pixels of the training images by distance, per estimate."""
    _one_channel(images)
    grey = images.train[:20_000, 0].numpy() / 255
    return by_distance(correlation_products(grey, splits), *grey.shape[1:]).tolist()


def two_point(
    model: VAE, images: ImageSet, sources: Sequence[str] = ("reconstructions", "prior"), seed: int = 0
) -> dict[str, Any]:
    """Two-point correlation of stationary pictures along rows and columns: source -> one value per distance from 0 on.

    The covariance of two pixels at a distance, averaged over the picture and relative to the variance; also ``data``, and
    ``variance``: source -> variance of a pixel, relative to that of data.
    """
    _one_channel(images)
    pictures = {source: decoded(model, latents(model, images, source, seed)) for source in sources}
    pictures["data"] = halves(images)[1].float() / 255
    variance = {source: p.var().item() for source, p in pictures.items()}
    curves = {source: two_point_correlation(p[:, 0] - p.mean()) for source, p in pictures.items()}
    return {**curves, "variance": {source: value / variance["data"] for source, value in variance.items()}}


def two_point_correlation(centred: Tensor) -> list[float]:
    """Covariance of two pixels r = 0, 1, … apart along rows or columns, relative to that at 0; (N, H, W) of mean 0."""
    side = min(centred.shape[1:])
    sums = [
        (centred[:, r:] * centred[:, : centred.shape[1] - r]).mean()
        + (centred[..., r:] * centred[..., : centred.shape[2] - r]).mean()
        for r in range(side - 4)  # few pairs are farther apart
    ]
    return [(value / sums[0]).item() for value in sums]


def _one_channel(images: ImageSet) -> None:
    if images.image_shape[0] != 1:
        raise ValueError(f"{images.name} has {images.image_shape[0]} channels: correlations of pixels are measured on one")
