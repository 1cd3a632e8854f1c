"""How well a model explains the data: bounds on the likelihood, and their parts, in nats per image.

Functions take models and tensors and know nothing of training.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vaenb import gpu
from vaenb.data import ImageSet
from vaenb.models import BATCH, VAE, evaluate, noise_sources, reparametrise
from vaenb.priors import Prior


@torch.no_grad()
def log_weights(model: VAE, images: Tensor, k: int, seed: int = 0, prior: Prior | None = None) -> Tensor:
    """Log p(x, z_i) / q(z_i|x) for k draws z_i ~ q(z|x) of each image: the mean over draws estimates the ELBO.

    Args:
        images: uint8, (N, C, H, W); shown to the model once each, as in ``models.evaluate`` with the same seed.
        k: draws per image.
        prior: instead of the model's own.

    Returns:
        (k, N), nats, on the CPU.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: the importance-weighted bound needs at least one draw per image")
    device, model, prior = gpu.device(), gpu.there(model), prior and gpu.there(prior)
    pixels, noise = noise_sources(seed)
    parts = []
    for batch in images.split(BATCH):
        x = model.observed(batch, torch.rand(batch.shape, generator=pixels)).to(device)
        size = (x.shape[-2], x.shape[-1])
        q, p = model.encode(x), prior or model.prior(size)
        draws = (reparametrise(q, torch.randn(q.mean.shape, generator=noise).to(device)) for _ in range(k))
        parts.append(torch.stack([model.decode(z, size).log_prob(x) + p.log_prob(z) - q.log_prob(z) for z in draws]))
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


def bounds(model: VAE, images: ImageSet, k: int = 100, subset: int = 500, prior: Prior | None = None) -> dict[str, Any]:
    """Test-set means in nats per image: ``rate``, ``distortion``, ``negative_elbo`` and ``negative_log_likelihood``.

    The importance-weighted bound takes k draws, so the slack −ELBO − bound is measured on a random ``subset`` of the test
    set and taken off the −ELBO of the whole test set (a control variate: the slack varies far less between images than
    the bound itself). ``standard_error`` is that of the slack, the only part that the subset makes uncertain. With another
    ``prior`` than the model's own, −ELBO is estimated from one draw per image, without its parts.
    """
    if prior is None:
        means = elbo(model, images)
    else:
        means = {"negative_elbo": -log_weights(model, images.test, 1, prior=prior).double().mean().item()}
    weights = log_weights(model, images.test[_choose(len(images.test), subset)], k, prior=prior)
    slack = (-weights.mean(dim=0) - negative_log_likelihood(weights)).double()
    nll = means["negative_elbo"] - slack.mean().item()
    error = (slack.std() / math.sqrt(len(slack))).item() if len(slack) < len(images.test) else 0.0
    return {**means, "negative_log_likelihood": nll, "k": k, "subset": len(slack), "standard_error": error}


def elbo(model: VAE, images: ImageSet, split: str = "test", subset: int | None = None) -> dict[str, Any]:
    """Means over a split, or a random subset of it, in nats per image: ``rate``, ``distortion``, ``negative_elbo``."""
    pixels = getattr(images, split)
    rate, distortion = evaluate(gpu.there(model), pixels if subset is None else pixels[_choose(len(pixels), subset)])
    parts = {"rate": rate.double().mean().item(), "distortion": distortion.double().mean().item()}
    return {**parts, "negative_elbo": sum(parts.values())}


def posterior_activity(model: VAE, images: ImageSet) -> dict[str, Any]:
    """Which latents are used: KL(q(z_i|x) ‖ p(z_i)) of each latent, test mean, nats; nested like the latent shape."""
    with torch.no_grad():
        total = torch.zeros(model.latent_shape, dtype=torch.float64)
        pixels, _ = noise_sources(0)
        for batch in images.test.split(BATCH):
            q = model.encode(model.observed(batch, torch.rand(batch.shape, generator=pixels))).base_dist
            total += torch.distributions.kl_divergence(q, model.prior().base_dist).double().sum(0)
    return {"rate_per_latent": (total / len(images.test)).tolist()}


def _choose(count: int, subset: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:subset]
