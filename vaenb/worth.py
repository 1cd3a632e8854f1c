"""What a learned prior is worth: in nats, in the quality of samples, and whether it copies.

Functions are for ``ladder.Repaired.measure``: they take a trained VAE and its fitted prior and return what is kept of them.
"""

import functools
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaenb import dependence, likelihood
from vaenb.classifier import classifier, extract
from vaenb.flows import FlowMatching
from vaenb.ladder import Repaired
from vaenb.priors import StandardNormal
from vaenb.quality import compare, connected_components, frechet_distance
from vaenb.samples import decoded, halves, known_features
from vaenb.train import Run

HELD_OUT = 11  # seed of the draws that are measured on
SLOW = 500  # latents whose density under flow matching is worth its time


def nats(repaired: Repaired) -> dict[str, float]:
    """Held-out nats per image gained over N(0, I): E_q[log r(z) − log N(z; 0, I)] over test images (T6), and its error."""
    z = dependence.aggregate(repaired.run.model, repaired.run.images.test, HELD_OUT)
    if isinstance(repaired.prior, FlowMatching):
        z = z[:SLOW]
    gain = (repaired.prior.log_prob(z) - StandardNormal(repaired.prior.shape).log_prob(z)).double()
    return {"gain": gain.mean().item(), "standard_error": (gain.std() / math.sqrt(len(gain))).item(), "n": len(gain)}


def bounds(repaired: Repaired, k: int = 100, subset: int = 500) -> dict[str, float]:
    """``likelihood.bounds`` with the fitted prior in place of N(0, I): what it is worth in −log p(x)."""
    return likelihood.bounds(repaired.run.model, repaired.run.images, k, subset, repaired.prior)


def prior_quality(repaired: Repaired) -> dict[str, Any]:
    """Pictures from the fitted prior against data and against reconstructions: ``against`` of them, and ``seconds``."""
    run = repaired.run
    started = time.perf_counter()
    z = repaired.prior.sample(len(halves(run.images)[1]), seed=HELD_OUT)
    seconds = time.perf_counter() - started
    return {**against(run, z), "seconds": seconds}


def reconstruction_quality(repaired: Repaired) -> dict[str, Any]:
    """The same for reconstructions of images other than the reference: what the best of all priors would reach.

    ``nearest`` is that of reconstructed test images, since a training image would find itself.
    """
    run = repaired.run
    test = decoded(run.model, dependence.aggregate(run.model, run.images.test[:500], HELD_OUT))
    encoded = dependence.aggregate(run.model, halves(run.images)[0], HELD_OUT)
    return {**against(run, encoded), "nearest": float(np.median(nearest(test, run.images.train)[0]))}


def against(run: Run, z: Tensor) -> dict[str, float]:
    """How pictures decoded from z compare with the reference images, and with reconstructions of these.

    Statistics of ``quality.compare`` against the images; ``to_reconstructions``: Fréchet distance to the reconstructions,
    which the same decoder has drawn; ``one_stroke``: share that is one connected component; ``nearest``: median distance to
    the nearest training image, root mean square over pixels, small if the prior copies.
    """
    pictures = decoded(run.model, z)
    features = extract(classifier(run.images.name), pictures)
    return {
        **compare(features, known_features(run.images.name)),
        "to_reconstructions": frechet_distance(features[0], _reconstructed(run)),
        "one_stroke": float((connected_components(pictures) == 1).mean()),
        "nearest": float(np.median(nearest(pictures[:500], run.images.train)[0])),
    }


@functools.lru_cache(maxsize=2)
def _reconstructed(run: Run) -> np.ndarray:
    """Features of reconstructions of the reference images, one draw each."""
    z = dependence.aggregate(run.model, halves(run.images)[1], HELD_OUT + 1)
    return extract(classifier(run.images.name), decoded(run.model, z))[0]


def nearest(pictures: Tensor, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of some images to each picture.

    Args:
        pictures: grey, (N, C, H, W) in [0, 1].
        images: uint8, (M, C, H, W).

    Returns:
        Distances, root mean square over pixels, and indices, (N,) each.
    """
    low, index = torch.full((len(pictures),), math.inf), torch.zeros(len(pictures), dtype=torch.long)
    for start in range(0, len(images), 5000):
        distance = torch.cdist(pictures.flatten(1), images[start : start + 5000].flatten(1).float() / 255)
        here, where = distance.min(dim=1)
        index = torch.where(here < low, where + start, index)
        low = torch.minimum(here, low)
    return (low / math.sqrt(pictures[0].numel())).numpy(), index.numpy()


def most_certain(pictures: Tensor, dataset: str, n: int) -> Tensor:
    """Indices of the ``n`` pictures whose class the classifier is most certain of."""
    return torch.from_numpy(extract(classifier(dataset), pictures)[1].max(axis=1).argsort()[::-1][:n].copy())
