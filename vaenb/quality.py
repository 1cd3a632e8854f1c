"""How good a model is: bounds on the likelihood in nats per image, and what its samples look like in numbers.

Functions take models and tensors and know nothing of training.
"""

import math
from typing import Any

import numpy as np
import torch
from scipy import ndimage, stats
from torch import Tensor

from vaenb.data import ImageSet, binarise
from vaenb.models import BATCH, VAE, evaluate, noise_sources, reparametrise


@torch.no_grad()
def log_weights(model: VAE, images: Tensor, k: int, seed: int = 0) -> Tensor:
    """Log p(x, z_i) / q(z_i|x) for k draws z_i ~ q(z|x) of each image: the mean over draws estimates the ELBO.

    Args:
        images: uint8, (N, C, H, W); binarised once each, as in ``models.evaluate`` with the same seed.
        k: draws per image.

    Returns:
        (k, N), nats, on the CPU.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: the importance-weighted bound needs at least one draw per image")
    device = next(model.parameters()).device
    pixels, noise = noise_sources(seed)
    parts = []
    for batch in images.split(BATCH):
        x = binarise(batch, torch.rand(batch.shape, generator=pixels)).to(device)
        size = (x.shape[-2], x.shape[-1])
        q, prior = model.encode(x), model.prior(size)
        draws = (reparametrise(q, torch.randn(q.mean.shape, generator=noise).to(device)) for _ in range(k))
        parts.append(torch.stack([model.decode(z, size).log_prob(x) + prior.log_prob(z) - q.log_prob(z) for z in draws]))
    return torch.cat(parts, dim=1).cpu()


def negative_log_likelihood(weights: Tensor) -> Tensor:
    """The importance-weighted bound −log (1/k) Σ p(x, z_i) / q(z_i|x) on −log p(x) (Burda et al. 2016).

    An upper bound in expectation, tighter with every draw; k = 1 is −ELBO.

    Args:
        weights: of ``log_weights``, (k, N).

    Returns:
        (N,), nats per image.
    """
    return math.log(len(weights)) - torch.logsumexp(weights, dim=0)


def bounds(model: VAE, images: ImageSet, k: int = 100, subset: int = 1000) -> dict[str, Any]:
    """Test-set means in nats per image: ``rate``, ``distortion``, ``negative_elbo`` and ``negative_log_likelihood``.

    The importance-weighted bound takes k draws, so the slack −ELBO − bound is measured on a random ``subset`` of the test
    set and taken off the −ELBO of the whole test set (a control variate: the slack varies far less between images than
    the bound itself). ``standard_error`` is that of the slack, the only part that the subset makes uncertain.
    """
    means = elbo(model, images)
    weights = log_weights(model, images.test[_choose(len(images.test), subset)], k)
    slack = (-weights.mean(dim=0) - negative_log_likelihood(weights)).double()
    nll = means["negative_elbo"] - slack.mean().item()
    error = (slack.std() / math.sqrt(len(slack))).item() if len(slack) < len(images.test) else 0.0
    return {**means, "negative_log_likelihood": nll, "k": k, "subset": len(slack), "standard_error": error}


def elbo(model: VAE, images: ImageSet, split: str = "test", subset: int | None = None) -> dict[str, Any]:
    """Means over a split, or a random subset of it, in nats per image: ``rate``, ``distortion``, ``negative_elbo``."""
    pixels = getattr(images, split)
    rate, distortion = evaluate(model, pixels if subset is None else pixels[_choose(len(pixels), subset)])
    parts = {"rate": rate.double().mean().item(), "distortion": distortion.double().mean().item()}
    return {**parts, "negative_elbo": sum(parts.values())}


def posterior_activity(model: VAE, images: ImageSet) -> dict[str, Any]:
    """Which latents are used: KL(q(z_i|x) ‖ p(z_i)) of each latent, test mean, nats; nested like the latent shape."""
    with torch.no_grad():
        total = torch.zeros(model.latent_shape, dtype=torch.float64)
        pixels, _ = noise_sources(0)
        for batch in images.test.split(BATCH):
            q = model.encode(binarise(batch, torch.rand(batch.shape, generator=pixels))).base_dist
            total += torch.distributions.kl_divergence(q, model.prior().base_dist).double().sum(0)
    return {"rate_per_latent": (total / len(images.test)).tolist()}


def connected_components(images: Tensor, threshold: float = 0.5) -> np.ndarray:
    """Number of separate strokes in each image: 8-connected components of the pixels above the threshold.

    Args:
        images: grey values in [0, 1], (N, 1, H, W).

    Returns:
        (N,) whole numbers; 0 for an empty image.
    """
    inked = images[:, 0].cpu().numpy() > threshold
    return np.array([ndimage.label(image, structure=np.ones((3, 3)))[1] for image in inked])


@torch.no_grad()
def pictures(model: VAE, images: ImageSet, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Decoder means for ``n`` prior samples and the first ``n`` test images, beside those images: grey, (≤ n, C, H, W).

    ``samples``: z ~ N(0, I); ``reconstructions``: z ~ q(z|x); ``data``: x. The same decoder draws the first two, so that
    what differs between them is where z comes from.
    """
    pixels, noise = noise_sources(seed)
    samples, reconstructions = [], []
    for start in range(0, n, BATCH):
        z = torch.randn(min(BATCH, n - start), *model.latent_shape, generator=noise)
        samples.append(model.decode(z).mean)
    for batch in images.test[:n].split(BATCH):
        q = model.encode(binarise(batch, torch.rand(batch.shape, generator=pixels)))
        reconstructions.append(model.decode(reparametrise(q, torch.randn(q.mean.shape, generator=noise))).mean)
    data = images.test[:n].float() / 255
    return {"samples": torch.cat(samples), "reconstructions": torch.cat(reconstructions), "data": data}


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


def interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t confidence interval of the mean over training seeds.

    Raises:
        ValueError: fewer than two values have no spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 of them, got {len(values)}")
    low, high = stats.t.interval(confidence, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return float(low), float(high)


def _choose(count: int, subset: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:subset]
