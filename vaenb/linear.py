"""The linear-Gaussian VAE x = W z + b + σ ε, where everything about the aggregate posterior is known exactly.

With z ~ N(0, I), the model's covariance is C = W Wᵀ + σ² I. The posterior is N(A (x − b), σ² M⁻¹) with M = Wᵀ W + σ² I and
A = M⁻¹ Wᵀ = Wᵀ C⁻¹ (Tipping & Bishop 1999), so an encoder that is linear and as free as that loses nothing: −ELBO is
−log p(x). S is the second moment of the data about b, and if b is the mean, their covariance. Everything is float64.
An unconstrained W stands for fully connected layers; a convolution of latents on a torus is a W whose columns are
shifted copies of a kernel (``shifts``). Images are size×size pixels, flattened by rows.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor


class ConvolutionFit(NamedTuple):
    """A maximum of the likelihood over convolutions: kernels (C, k, k), σ², and how stationary it is.

    ``gradient`` is the largest |∂(−ELBO)/∂parameter| over the kernels' weights and log σ², in nats per image.
    """

    kernels: Tensor
    variance: float
    gradient: float


def _check(weights: Tensor, variance: float | Tensor, covariance: Tensor | None = None) -> None:
    if weights.ndim != 2 or weights.dtype != torch.float64 or not weights.isfinite().all():
        raise ValueError(f"weights: need a finite float64 matrix (D, d), got {weights.dtype} {tuple(weights.shape)}")
    value = float(torch.as_tensor(variance).detach())
    if not 0 < value < math.inf:
        raise ValueError(f"variance is {value}: σ² must be positive and finite, or the model has no density")
    if covariance is not None:
        _check_covariance(covariance, len(weights))


def _check_covariance(covariance: Tensor, pixels: int) -> None:
    if covariance.shape != (pixels, pixels) or covariance.dtype != torch.float64 or not covariance.isfinite().all():
        raise ValueError(
            f"covariance: need a finite float64 matrix ({pixels}, {pixels}), one row per pixel, "
            f"got {covariance.dtype} {tuple(covariance.shape)}; does it hold NaN, or belong to other images?"
        )


def _check_torus(size: int, stride: int) -> int:
    if stride < 1 or size % stride:
        raise ValueError(f"stride {stride} does not divide size {size}: on a torus the positions must close up")
    return size // stride


def posterior(weights: Tensor, variance: float | Tensor) -> tuple[Tensor, Tensor]:
    """The exact posterior: A (d, D), its mean being A (x − b), and its covariance σ² M⁻¹ (d, d), the same for every x.

    Raises:
        ValueError: weights (D, d) not a finite float64 matrix, or variance not positive.
    """
    _check(weights, variance)
    root = torch.linalg.cholesky(weights.T @ weights + variance * torch.eye(weights.shape[1], dtype=torch.float64))
    inverse = torch.cholesky_inverse(root)
    return inverse @ weights.T, variance * inverse


def excess_covariance(weights: Tensor, variance: float | Tensor, covariance: Tensor) -> Tensor:
    """Δ = Wᵀ C⁻¹ (S − C) C⁻¹ W: the aggregate posterior of data with covariance S (D, D) has Cov_q(z) = I + Δ (d, d).

    ∂(−ELBO)/∂W = −G W with G = C⁻¹ (S − C) C⁻¹, and Δ = Wᵀ G W: wherever W is free and stationary, Δ = 0.

    Raises:
        ValueError: a shape that does not match, a value that is not finite, a variance that is not positive.
    """
    _check(weights, variance, covariance)
    mean, _ = posterior(weights, variance)
    model = weights @ weights.T + variance * torch.eye(len(weights), dtype=torch.float64)
    return mean @ (covariance - model) @ mean.T


def negative_elbo(weights: Tensor, variance: float | Tensor, covariance: Tensor) -> Tensor:
    """−ELBO = −log-likelihood = ½ (D log 2π + log |C| + tr C⁻¹ S), in nats per image; S may be singular.

    Raises:
        ValueError: as ``excess_covariance``.
    """
    _check(weights, variance, covariance)
    root = torch.linalg.cholesky(weights @ weights.T + variance * torch.eye(len(weights), dtype=torch.float64))
    trace = torch.cholesky_solve(covariance, root).trace()
    return 0.5 * (len(weights) * math.log(2 * math.pi) + trace) + root.diagonal().log().sum()


def rate_distortion(weights: Tensor, variance: float | Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of −ELBO with the exact posterior: mean KL(q(z|x) ‖ N(0, I)), mean −E_q log p(x|z); nats per image.

    Raises:
        ValueError: as ``excess_covariance``.
    """
    _check(weights, variance, covariance)
    mean, spread = posterior(weights, variance)
    rate = 0.5 * (spread.trace() + (mean @ covariance @ mean.T).trace() - len(spread) - spread.logdet())
    residual = torch.eye(len(weights), dtype=torch.float64) - weights @ mean
    error = (residual @ covariance @ residual.T).trace() + (weights @ spread @ weights.T).trace()
    return rate, 0.5 * (
        len(weights) * torch.log(2 * math.pi * torch.as_tensor(variance, dtype=torch.float64)) + error / variance
    )


def kl_of_aggregate(excess: Tensor) -> float:
    """KL(N(0, I + Δ) ‖ N(0, I)) = ½ (tr Δ − log |I + Δ|) in nats: for Gaussian data, the price of sampling from the prior.

    For other data it is a lower bound on KL(q(z) ‖ N(0, I)), since the Gaussian of the same moments comes closest.

    Raises:
        ValueError: I + Δ is not positive definite, so Δ (d, d) is not the excess of a covariance.
    """
    values = torch.linalg.eigvalsh(excess.detach())
    if not values.min() > -1:
        raise ValueError(
            f"I + Δ has the eigenvalue {1 + values.min():.3g}: a covariance needs positive ones; is σ² too small?"
        )
    return 0.5 * float((values - values.log1p()).sum())


def principal_components(covariance: Tensor, latents: int) -> tuple[Tensor, float]:
    """The most likely unconstrained W (D, latents) and σ²: probabilistic PCA (Tipping & Bishop 1999, eqs. 7 and 8).

    Raises:
        ValueError: not 1 ≤ latents < D, or nothing is left for the noise to explain, where the likelihood is unbounded.
    """
    _check_covariance(covariance, len(covariance))
    if not 1 <= latents < len(covariance):
        raise ValueError(f"{latents} latents for {len(covariance)} pixels: need at least 1 and fewer than pixels")
    values, vectors = torch.linalg.eigh(covariance)
    variance = float(values[:-latents].mean())
    if variance <= 1e-12 * float(values[-1]):
        raise ValueError(f"{latents} latents explain all of the variance and leave σ² = {variance:.1e}: use fewer")
    return vectors[:, -latents:] * (values[-latents:] - variance).clamp(min=0).sqrt(), variance


def _on_torus(kernels: Tensor, size: int) -> Tensor:
    """Kernels (C, k, k) → (C, size, size), whose value at u is the weight of the pixel at stride·p + u (modulo size)."""
    if kernels.ndim != 3 or kernels.shape[1] != kernels.shape[2] or not 1 <= kernels.shape[1] <= size:
        raise ValueError(f"kernels {tuple(kernels.shape)}: need (C, k, k) with 1 ≤ k ≤ {size}, the size of the image")
    width = kernels.shape[1]
    padded = torch.nn.functional.pad(kernels, (0, size - width, 0, size - width))
    return padded.roll((-(width // 2), -(width // 2)), (1, 2))


def shifts(kernels: Tensor, size: int, stride: int) -> Tensor:
    """The W (size², C·(size/stride)²) of a transposed convolution on a torus; latents ordered channel, row, column.

    Latent (c, p) adds kernel c, (C, k, k), to the image; entry (i, j) falls on pixel stride·p + (i − k//2, j − k//2), modulo
    size. So Wᵀ is torch's ``conv2d`` with k//2 pixels of circular padding above and left.

    Raises:
        ValueError: stride does not divide size; kernels not square, or larger than the image.
    """
    grid = _check_torus(size, stride)
    offset = (torch.arange(size)[:, None] - stride * torch.arange(grid)) % size  # (pixel, position)
    image = _on_torus(kernels, size)[:, offset[:, None, :, None], offset[None, :, None, :]]  # (C, size, size, grid, grid)
    return image.permute(1, 2, 0, 3, 4).reshape(size**2, -1)


def position_average(excess: Tensor, channels: int, grid: int) -> Tensor:
    """Average Δ over positions: (channels, channels, grid, grid), [a, b, ℓ] the mean over p of Δ[(a, p), (b, p + ℓ)].

    What vanishes for W = ``shifts(kernels)``. Let g_b(v) = ∂(−ELBO)/∂k_b(v) = −Σ_p (G W)[stride·p + v, (b, p)] for every
    pixel v of the torus, in the support Ω of the kernels or not (G as in ``excess_covariance``). Insert
    W[x, (a, p)] = k_a(x − stride·p) in Δ = Wᵀ (G W), put x = stride·p + u and sum over p:
        average[a, b, ℓ] = −grid⁻² Σ_{u ∈ Ω} k_a(u) g_b(u − stride·ℓ),   at any W.
    Training makes g_b zero on Ω and nowhere else. So at every stationary point of the likelihood, whatever the data,
        lag 0 vanishes, for all pairs of channels and any kernel (a = b: the mean variance is 1), and
        lags ℓ ≠ 0 all vanish if the kernel is full, of the size of the image, for then Ω − stride·ℓ = Ω.
    With a shorter kernel the terms with u − stride·ℓ outside Ω remain, and no lag but 0 need vanish, even if S = S̄.
    What vanishes are averages of covariances: to make them correlations divide by the mean variance (1), not by the
    variance at each position. Wᵀ C⁻¹ (S̄ − C) C⁻¹ W has these averages at every position, whatever W.

    Raises:
        ValueError: Δ is not (channels·grid², channels·grid²).
    """
    if excess.shape != (channels * grid**2, channels * grid**2):
        raise ValueError(
            f"Δ is {tuple(excess.shape)}, but {channels} channels on a {grid}×{grid} grid are {channels * grid**2}"
        )
    moved = (torch.arange(grid)[:, None] + torch.arange(grid)) % grid  # (lag, position)
    here = torch.arange(grid)
    table = excess.reshape(channels, grid, grid, channels, grid, grid).permute(0, 3, 1, 2, 4, 5)
    pairs = table[:, :, here[:, None], here, moved[:, None, :, None], moved[None, :, None, :]]  # (C, C, lags, positions)
    return pairs.mean((-1, -2))


def _residues(size: int, stride: int) -> Tensor:
    """Pixels sorted like latents: by their place (row, column) within a stride, then by the position they belong to."""
    grid = _check_torus(size, stride)
    return torch.arange(size**2).reshape(grid, stride, grid, stride).permute(1, 3, 0, 2).reshape(-1)


def shift_average(covariance: Tensor, size: int, stride: int) -> Tensor:
    """S̄ (size², size²): the mean of S over all shifts of the torus by multiples of the stride.

    C = W Wᵀ + σ² I of a convolution is invariant to these shifts, so its likelihood depends on S only through S̄.

    Raises:
        ValueError: covariance not (size², size²); stride does not divide size.
    """
    _check_covariance(covariance, size**2)
    order, grid = _residues(size, stride), size // stride
    lags = position_average(covariance[order[:, None], order], stride**2, grid)
    lag = (torch.arange(grid) - torch.arange(grid)[:, None]) % grid  # (from, to)
    average = lags[:, :, lag[:, None, :, None], lag[None, :, None, :]].permute(0, 2, 3, 1, 4, 5).reshape(size**2, size**2)
    back = order.argsort()
    return average[back[:, None], back]


def fit_convolution(
    covariance: Tensor, size: int, stride: int, channels: int, kernel_size: int, seed: int = 0, iterations: int = 5000
) -> ConvolutionFit:
    """The most likely kernels and σ² of x = ``shifts(kernels)`` z + b + σ ε, by L-BFGS from a random start.

    Over shifts by the stride a Fourier transform turns C and S̄ into one block of stride² × stride² per frequency, and the
    likelihood into a sum over frequencies. Look at ``gradient`` before relying on a fit, and try several seeds where
    kernels are short: there may be several maxima. Two things the likelihood leaves open: a full kernel may be turned by a
    unitary matrix at each frequency, which moves the entries of Δ but not its eigenvalues; and with a full kernel and
    channels ≥ stride², σ² may be anything up to the smallest eigenvalue of S̄, on which Δ depends.

    Raises:
        ValueError: as ``shift_average`` and ``shifts``; channels < 1; covariance without variance.
    """
    _check_covariance(covariance, size**2)
    _on_torus(torch.zeros(1, kernel_size, kernel_size), size)  # is the kernel small enough?
    order, grid = _residues(size, stride), size // stride
    scale = float(covariance.trace()) / size**2
    if channels < 1 or scale <= 0:
        raise ValueError(f"{channels} channels, mean variance {scale}: need at least one channel and data that vary")
    lags = position_average(covariance[order[:, None], order], stride**2, grid)
    blocks = torch.fft.fft2(lags).conj().permute(2, 3, 0, 1).reshape(grid**2, stride**2, stride**2)
    start = np.random.default_rng(seed).standard_normal(channels * kernel_size**2) * math.sqrt(scale) / kernel_size

    def evaluate(vector: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.tensor(vector, requires_grad=True)
        kernels, noise = parameters[:-1].reshape(channels, kernel_size, kernel_size), parameters[-1].exp()
        image = _on_torus(kernels, size).reshape(channels, grid, stride, grid, stride).permute(1, 3, 2, 4, 0)
        filters = torch.fft.fft2(image, dim=(0, 1)).reshape(grid**2, stride**2, channels)
        root = torch.linalg.cholesky(filters @ filters.mH + noise * torch.eye(stride**2, dtype=torch.float64))
        trace = torch.cholesky_solve(blocks, root).diagonal(dim1=1, dim2=2).real.sum()
        loss = 0.5 * trace + root.diagonal(dim1=1, dim2=2).real.log().sum()
        loss.backward()
        return loss.item(), parameters.grad.numpy()

    options = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 50, "ftol": 0.0, "gtol": 1e-7}
    best = minimize(evaluate, np.append(start, math.log(scale / 2)), jac=True, method="L-BFGS-B", options=options)
    kernels = torch.tensor(best.x[:-1]).reshape(channels, kernel_size, kernel_size)
    return ConvolutionFit(kernels, math.exp(best.x[-1]), float(np.abs(best.jac).max()))


def aggregate_sample(weights: Tensor, variance: float | Tensor, images: Tensor, seed: int) -> Tensor:
    """One draw z (N, d) from the posterior of each image (N, D), float64, given as x − b.

    Raises:
        ValueError: as ``posterior``; images not (N, D).
    """
    mean, spread = posterior(weights, variance)
    if images.ndim != 2 or images.shape[1] != len(weights):
        raise ValueError(f"images {tuple(images.shape)}: need (N, {len(weights)}), centred and flattened")
    noise = torch.randn(len(images), len(spread), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return images @ mean.T + noise @ torch.linalg.cholesky(spread).T
