"""What a learned prior is worth: in nats, in the quality of samples, and whether it copies.

Functions are for ``ladder.Repaired.measure``: they take a trained VAE and its fitted prior and return what is kept of them.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaenb import dependence, gpu, likelihood
from vaenb.classifier import classifier, extract
from vaenb.flows import FlowMatching
from vaenb.gaussians import Mixture
from vaenb.ladder import Repaired
from vaenb.priors import Prior, StandardNormal
from vaenb.quality import bootstrap_error, compare, connected_components, frechet_distance
from vaenb.samples import decoded, halves, known_features
from vaenb.train import Run

NEAREST = 500  # pictures that are compared with all training images, for tables
COPIES = 2500  # the same where a claim depends on it: of 500, a twentieth are too few to tell 0.85 from 0.95
HELD_OUT = 11  # seed of the draws that are measured on
SLOW = 1000  # latents whose density under flow matching is worth its time


def nats(repaired: Repaired) -> dict[str, float]:
    """Nats per image gained over N(0, I): E_q[log r(z) − log N(z; 0, I)] over test images (T6), and its standard error.

    ``train_gain``: the same over as many training images; what it is higher by is overfitting.
    Flow matching's density is estimated (see there), on ``SLOW`` random images; that of a two-stage VAE is a lower bound.
    """
    model, images, prior = repaired.run.model, repaired.run.images, gpu.there(repaired.prior)
    results: dict[str, float] = {}
    for name, pixels, seed in (("gain", images.test, HELD_OUT), ("train_gain", images.train, 1)):
        count = SLOW if isinstance(prior, FlowMatching) else len(images.test)
        z = dependence.aggregate(model, _some(pixels, count), seed)
        gain = (prior.log_prob(z).cpu() - StandardNormal(prior.shape).log_prob(z)).double()
        results[name] = gain.mean().item()
        results["standard_error" if name == "gain" else "train_error"] = (gain.std() / math.sqrt(len(gain))).item()
    return results


def bounds(repaired: Repaired, k: int = 100, subset: int = 500) -> dict[str, float]:
    """``likelihood.bounds`` with the fitted prior in place of N(0, I): what it is worth in −log p(x)."""
    return likelihood.bounds(repaired.run.model, repaired.run.images, k, subset, repaired.prior)


def prior_quality(repaired: Repaired, temperature: float = 1.0, sets: int = 1) -> dict[str, Any]:
    """Pictures from the fitted prior against data and against reconstructions: ``against`` of them, and ``seconds``.

    Args:
        repaired: a VAE and its prior.
        temperature: of mixtures, see ``Mixture.tempered``; other priors have none but 1.
        sets: of pictures, over which the two Fréchet distances are averaged. Where they are small, those of single sets vary
            more than training seeds do.

    Raises:
        ValueError: another temperature for a prior that is no mixture; no set.
    """
    if sets < 1:
        raise ValueError(f"sets={sets}: expected at least one set of pictures")
    run, prior = repaired.run, _at(repaired, temperature)
    started = time.perf_counter()
    count = len(halves(run.images)[1])
    z = prior.sample(count, seed=HELD_OUT).cpu()
    result = {"seconds": time.perf_counter() - started, **against(run, z)}
    distances = [[result["frechet"], result["to_reconstructions"]]]
    known = known_features(run.images.name)[0], _reconstructed(run)
    for more in range(1, sets):
        drawn = decoded(run.model, prior.sample(count, seed=HELD_OUT + more))
        features = extract(classifier(run.images.name), drawn)[0]
        distances.append([frechet_distance(features, each) for each in known])
    return result | dict(zip(("frechet", "to_reconstructions"), np.mean(distances, axis=0).tolist(), strict=True))


def reconstruction_quality(repaired: Repaired) -> dict[str, Any]:
    """The same for reconstructions of images other than the reference: what the best of all priors would reach.

    ``nearest`` is that of reconstructed test images, since a training image would find itself.
    """
    run = repaired.run
    test = decoded(run.model, dependence.aggregate(run.model, _some(run.images.test, NEAREST), HELD_OUT))
    encoded = dependence.aggregate(run.model, halves(run.images)[0], HELD_OUT)
    return {**against(run, encoded), **_nearest(test, run.images.train)}


def copies(repaired: Repaired, temperature: float = 1.0, n: int = COPIES) -> dict[str, float]:
    """Does the prior copy? How near its pictures are to training images, relative to reconstructions of test images.

    Args:
        repaired: a VAE and its prior.
        temperature: see ``prior_quality``.
        n: pictures of both kinds, as far as there are test images.

    Returns:
        ``median`` and ``low``: that and the 5 % quantile of the distances to the nearest training image (``nearest``), as
        ratios of pictures to reconstructions; 1: as far as what nobody can have copied. ``error``: standard error of
        ``low`` from the choice of pictures.
    """
    run, prior = repaired.run, _at(repaired, temperature)
    test = _some(run.images.test, n)
    z = {"samples": prior.sample(len(test), seed=HELD_OUT), "test": dependence.aggregate(run.model, test, HELD_OUT)}
    samples, reconstructions = (nearest(decoded(run.model, each), run.images.train)[0] for each in z.values())

    def ratio(quantile: float) -> Callable[[np.ndarray, np.ndarray], float]:
        return lambda a, b: float(np.quantile(a, quantile) / np.quantile(b, quantile))

    found = {name: ratio(quantile)(samples, reconstructions) for name, quantile in (("median", 0.5), ("low", 0.05))}
    return found | {"error": bootstrap_error(ratio(0.05), samples, reconstructions)}


def against(run: Run, z: Tensor) -> dict[str, float]:
    """How pictures decoded from z compare with the reference images, and with reconstructions of these.

    Statistics of ``quality.compare`` against the images; ``to_reconstructions``: Fréchet distance to the reconstructions,
    which the same decoder has drawn; ``one_stroke``: share that is one connected component; ``nearest`` and
    ``nearest_low``: median and 5 % quantile of the distance to the nearest training image, root mean square over pixels,
    small if the prior copies (or if pictures are faint: compare pictures of one decoder).
    """
    pictures = decoded(run.model, z)
    features = extract(classifier(run.images.name), pictures)
    return {
        **compare(features, known_features(run.images.name)),
        "to_reconstructions": frechet_distance(features[0], _reconstructed(run)),
        "one_stroke": float((connected_components(pictures) == 1).mean()),
        **_nearest(pictures[:NEAREST], run.images.train),
    }


@functools.lru_cache(maxsize=4)  # a rung is measured for a few seeds, then the next one for the same
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
    pictures = pictures.to(gpu.device())
    low, index = pictures.new_full((len(pictures),), math.inf), pictures.new_zeros(len(pictures), dtype=torch.long)
    for start in range(0, len(images), 5000):
        distance = torch.cdist(
            pictures.flatten(1), images[start : start + 5000].to(pictures.device).flatten(1).float() / 255
        )
        here, where = distance.min(dim=1)
        index = torch.where(here < low, where + start, index)
        low = torch.minimum(here, low)
    return (low / math.sqrt(pictures[0].numel())).cpu().numpy(), index.cpu().numpy()


def most_certain(pictures: Tensor, dataset: str, n: int) -> Tensor:
    """Indices of the ``n`` pictures whose class the classifier is most certain of."""
    return torch.from_numpy(extract(classifier(dataset), pictures)[1].max(axis=1).argsort()[::-1][:n].copy())


def _at(repaired: Repaired, temperature: float) -> Prior:
    """The prior at a temperature, where to compute."""
    if temperature == 1:
        return gpu.there(repaired.prior)
    if not isinstance(repaired.prior, Mixture):
        raise ValueError(f"temperature {temperature} of {repaired.rung!r}: only mixtures have one, choose 1 for others")
    return gpu.there(repaired.prior.tempered(temperature))


def _nearest(pictures: Tensor, images: Tensor) -> dict[str, float]:
    low, median = np.quantile(nearest(pictures, images)[0], [0.05, 0.5])
    return {"nearest": float(median), "nearest_low": float(low)}


def _some(images: Tensor, count: int) -> Tensor:
    """Random images, always the same: the first half of MNIST's test images is cleaner than the second."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]
