"""What becomes of a trained model's pictures when its latents come from elsewhere, encoder and decoder being frozen.

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

from vaenb import data
from vaenb.classifier import classifier, extract
from vaenb.data import ImageSet
from vaenb.dependence import aggregate, permute
from vaenb.models import BATCH, VAE
from vaenb.quality import compare, connected_components

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
    """Decoder means, (N, C, H, W) in [0, 1]."""
    return torch.cat([model.decode(batch).mean for batch in z.split(BATCH)])


def picture_quality(
    model: VAE, images: ImageSet, sources: Sequence[str] = ("reconstructions", "prior"), slow: bool = False, seed: int = 0
) -> dict[str, Any]:
    """How pictures from each source compare with the reference images: source -> statistic -> value.

    The statistics are those of ``quality.compare`` and ``one_stroke``: share that is one connected component; ``mean_image_error``: squared difference of the mean pictures,
    relative to the variance between data, summed over pixels: whether ink is where it should be on average.

    Args:
        model, images: see ``Run.measure``.
        sources: as in ``latents``.
        slow: as in ``quality.compare``.
        seed: of all draws.
    """
    network, known = classifier(images.name), known_features(images.name)
    grey = halves(images)[1].float() / 255
    results = {}
    for source in sources:
        pictures = decoded(model, latents(model, images, source, seed))
        offset = (pictures.mean(dim=0) - grey.mean(dim=0)).square().sum() / grey.var(dim=0).sum()
        results[source] = {
            **compare(extract(network, pictures), known, slow),
            "one_stroke": float((connected_components(pictures) == 1).mean()),
            "mean_image_error": offset.item(),
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
