"""Statistical tests of the machinery that a VAE stands on: the reparametrisation, its gradient, the random numbers.

Each returns standardised errors or p-values, so that "it works" is a statement about a known distribution.
"""

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from vaenb.data import binarise
from vaenb.models import reparametrise


def moment_scores(q: Independent, draws: int = 10_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the mean and variance of z = μ + σε over ``draws`` draws, in standard errors: N(0, 1) if z ~ q.

    Args:
        q: diagonal Gaussian over (N, *latent shape).
        draws: per entry.
        seed: of the noise.

    Returns:
        Two arrays with an entry per entry of z.
    """
    noise = torch.randn(draws, *q.mean.shape, generator=torch.Generator().manual_seed(seed))
    z = reparametrise(q, noise).double()
    mean, scale = q.mean.double(), q.base_dist.scale.double()
    of_mean = (z.mean(0) - mean) / (scale / draws**0.5)
    of_variance = (z.var(0) / scale**2 - 1) / (2 / (draws - 1)) ** 0.5
    return of_mean.flatten().numpy(), of_variance.flatten().numpy()


def gradient_scores(q: Independent, draws: int = 10_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the pathwise gradient of E_q[½(z − 1)²] in μ and in σ, in standard errors: N(0, 1) if unbiased.

    In closed form the gradients are μ − 1 and σ; those of one draw have variances σ² and (μ − 1)² + 2σ².
    """
    mean = q.mean.detach().clone().requires_grad_()
    scale = q.base_dist.scale.detach().clone().requires_grad_()
    noise = torch.randn(draws, *mean.shape, generator=torch.Generator().manual_seed(seed))
    z = reparametrise(Independent(Normal(mean, scale), mean.ndim - 1), noise)
    (0.5 * (z - 1).square()).mean(0).sum().backward()
    offset, scale_value = mean.detach().double() - 1, scale.detach().double()
    of_mean = (mean.grad.double() - offset) / (scale_value / draws**0.5)
    of_scale = (scale.grad.double() - scale_value) / ((offset**2 + 2 * scale_value**2) / draws) ** 0.5
    return of_mean.flatten().numpy(), of_scale.flatten().numpy()


def rate_gradient_error(q: Independent) -> float:
    """Largest relative error of autograd's gradient of KL(q ‖ N(0, I)) against μ and σ − 1/σ."""
    mean = q.mean.detach().double().requires_grad_()
    scale = q.base_dist.scale.detach().double().requires_grad_()
    kl_divergence(Normal(mean, scale), Normal(torch.zeros_like(mean), torch.ones_like(scale))).sum().backward()
    exact = torch.stack([mean.detach(), scale.detach() - 1 / scale.detach()])
    return ((torch.stack([mean.grad, scale.grad]) - exact).abs().max() / exact.abs().max()).item()


def normality(scores: np.ndarray) -> float:
    """p-value of the Kolmogorov–Smirnov test that the scores are N(0, 1)."""
    return float(stats.kstest(scores, "norm").pvalue)


def random_numbers(pixels: Tensor, n: int = 1_000_000, seed: int = 0) -> dict[str, float]:
    """p-values of what training assumes of its random numbers; each is uniform on [0, 1] if the assumption is true.

    Args:
        pixels: uint8 images, (N, C, H, W), whose binarisation is checked.
        n: numbers per test.
        seed: of the first stream; the second has ``seed + 1``.
    """
    first, second = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1))
    normal, other = (torch.randn(n, generator=generator).double().numpy() for generator in (first, second))
    uniform = torch.rand(n, generator=first)
    grey = pixels.double().flatten() / 255
    drawn = binarise(pixels.flatten(), torch.rand(grey.shape, generator=first)).double()
    excess = (drawn - grey).sum() / (grey * (1 - grey)).sum().sqrt()
    return {
        "the noise is N(0, 1)": normality(normal),
        "the uniform numbers are uniform": float(stats.kstest(uniform.double().numpy(), "uniform").pvalue),
        "consecutive numbers are uncorrelated": _two_sided((normal[1:] * normal[:-1]).sum() / (n - 1) ** 0.5),
        "two seeds are uncorrelated": _two_sided((normal * other).sum() / n**0.5),
        "pixels are one as often as they are grey": _two_sided(excess.item()),
    }


def _two_sided(score: float) -> float:
    return float(2 * stats.norm.sf(abs(score)))
