"""The linear-Gaussian VAE: its formulas against sampling, brute force and gradient training."""

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from vaenb import linear
from vaenb.linear import (
    aggregate_sample,
    excess_covariance,
    fit_convolution,
    kl_of_aggregate,
    negative_elbo,
    position_average,
    posterior,
    principal_components,
    rate_distortion,
    shift_average,
    shifts,
)


@pytest.fixture(autouse=True)
def double_precision_on_one_thread():  # threads wait for each other longer than these matrices take
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_covariance(pixels, rank=None, seed=1):
    """Of rank ``rank``, with variances that differ a lot between pixels."""
    factor = random(pixels, rank or 2 * pixels, seed=seed) * torch.linspace(0.3, 2, pixels)[:, None]
    return factor @ factor.T / factor.shape[1]


def train(loss, *parameters):
    """Minimise by gradients until nothing is left of them."""
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=4000, tolerance_grad=1e-10, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    optimiser.step(closure)  # a restart forgets stale curvature
    assert max(p.grad.abs().max() for p in parameters) < 1e-6


def trained_elbo(weights, noise, encoder, spread, covariance):
    """−ELBO of an encoder N(V x, Λ), from its definition; it does not know that there is an exact posterior."""
    eye = torch.eye(len(weights))
    residual = eye - weights @ encoder
    error = torch.trace(residual @ covariance @ residual.T) + torch.trace(weights @ spread @ weights.T)
    rate = 0.5 * (torch.trace(spread + encoder @ covariance @ encoder.T) - len(spread) - torch.logdet(spread))
    return rate + 0.5 * (len(weights) * math.log(2 * math.pi) + len(weights) * noise + error * torch.exp(-noise))


def aggregate_of(encoder, spread, covariance):
    return (spread + encoder @ covariance @ encoder.T).detach()


def stationary(size):
    """Covariance on a torus that is invariant to every shift: exp(−distance) plus noise."""
    lag = torch.minimum(torch.arange(size), size - torch.arange(size))
    kernel = torch.exp(-(lag[:, None] + lag)).roll((size // 2, size // 2), (0, 1))
    return shifts(kernel[None], size, 1) + 0.2 * torch.eye(size**2)


@pytest.mark.parametrize("rank", [None, 3])  # singular S too
def test_excess_is_the_covariance_of_the_exact_aggregate_posterior(rank):
    weights, variance, covariance = random(12, 5), 0.3, random_covariance(12, rank)
    model = weights @ weights.T + variance * torch.eye(12)
    # conditioning the joint Gaussian of (z, x): neither M nor the formula of the module
    gain = torch.linalg.solve(model, weights).T
    brute = (torch.eye(5) - gain @ weights) + gain @ covariance @ gain.T
    excess = excess_covariance(weights, variance, covariance)
    torch.testing.assert_close(torch.eye(5) + excess, brute, rtol=0, atol=1e-10)
    inverse = torch.linalg.inv(model)
    literal = weights.T @ inverse @ (covariance - model) @ inverse @ weights
    torch.testing.assert_close(excess, literal, rtol=0, atol=1e-10)


def test_excess_is_the_gradient_contracted_with_the_weights():
    weights, covariance = random(12, 5).requires_grad_(), random_covariance(12)
    (gradient,) = torch.autograd.grad(negative_elbo(weights, 0.3, covariance), weights)
    torch.testing.assert_close(excess_covariance(weights.detach(), 0.3, covariance), -weights.detach().T @ gradient)


def test_posterior_of_one_latent_and_one_pixel():
    mean, spread = posterior(torch.tensor([[2.0]]), 1.0)
    assert mean.item() == pytest.approx(0.4)
    assert spread.item() == pytest.approx(0.2)


def test_negative_elbo_is_the_gaussian_log_likelihood():
    weights, variance, images = random(6, 2), 0.5, random(40, 6, seed=3)
    model = torch.distributions.MultivariateNormal(torch.zeros(6), weights @ weights.T + variance * torch.eye(6))
    covariance = images.T @ images / len(images)
    torch.testing.assert_close(negative_elbo(weights, variance, covariance), -model.log_prob(images).mean())


def test_gradient_agrees_with_finite_differences():
    covariance = random_covariance(7)
    weights, noise = random(7, 3).requires_grad_(), torch.tensor(-0.5, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, n: negative_elbo(w, n.exp(), covariance), (weights, noise))


def test_rate_and_distortion_add_up_and_agree_with_sampling():
    weights, variance, covariance = random(10, 4), 0.4, random_covariance(10)
    rate, distortion = rate_distortion(weights, variance, covariance)
    torch.testing.assert_close(rate + distortion, negative_elbo(weights, variance, covariance))
    images = random(100_000, 10, seed=8) @ torch.linalg.cholesky(covariance).T
    mean, spread = posterior(weights, variance)
    z = aggregate_sample(weights, variance, images, seed=0)
    encoder = torch.distributions.MultivariateNormal(images @ mean.T, spread)
    rates = encoder.log_prob(z) - torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    distortions = -torch.distributions.Normal(z @ weights.T, math.sqrt(variance)).log_prob(images).sum(1)
    for exact, draws in [(rate, rates), (distortion, distortions)]:
        assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(len(draws))


def test_rate_and_distortion_add_up_in_double_precision_whatever_the_default():
    weights, covariance = random(200, 4).double(), random_covariance(200).double()
    expected = negative_elbo(weights, 0.3, covariance)
    torch.set_default_dtype(torch.float32)
    rate, distortion = rate_distortion(weights, 0.3, covariance)  # the fixture of this module resets the default
    assert (rate + distortion).item() == pytest.approx(expected.item(), rel=1e-12)


def test_sampled_aggregate_has_the_predicted_covariance():
    weights, variance, covariance = random(10, 4), 0.4, random_covariance(10, rank=6)
    values, vectors = torch.linalg.eigh(covariance)
    images = random(100_000, 10, seed=8) * values.clamp(min=0).sqrt() @ vectors.T
    measured = torch.cov(aggregate_sample(weights, variance, images, seed=0).T)
    predicted = torch.eye(4) + excess_covariance(weights, variance, covariance)
    error = ((predicted**2 + predicted.diagonal()[:, None] * predicted.diagonal()) / len(images)).sqrt()
    assert ((measured - predicted).abs() < 4.5 * error).all()
    assert (predicted - torch.eye(4)).abs().max() > 50 * error.max()  # there is something to measure


@pytest.mark.parametrize("diagonal", [False, True])
def test_training_an_unconstrained_linear_vae_makes_the_aggregate_the_prior(diagonal):
    # A diagonal posterior loses nothing here: training turns the columns of W until M is diagonal (Lucas et al. 2019).
    covariance = random_covariance(8)
    weights, noise = random(8, 3).requires_grad_(), torch.tensor(0.0, requires_grad=True)
    encoder, root = (0.1 * random(3, 8)).requires_grad_(), torch.eye(3).requires_grad_()

    def spread():
        lower = torch.diag(root.diagonal()) if diagonal else root.tril()
        return lower @ lower.T

    train(lambda: trained_elbo(weights, noise, encoder, spread(), covariance), weights, noise, encoder, root)
    measured = aggregate_of(encoder, spread(), covariance)
    torch.testing.assert_close(measured, torch.eye(3), rtol=0, atol=1e-6)
    excess = excess_covariance(weights.detach(), noise.exp().detach(), covariance)
    torch.testing.assert_close(excess, torch.zeros(3, 3), rtol=0, atol=1e-6)
    # and the optimum is that of principal components
    best, variance = principal_components(covariance, 3)
    assert noise.exp().item() == pytest.approx(variance, abs=1e-6)
    torch.testing.assert_close(weights.detach() @ weights.detach().T, best @ best.T, rtol=0, atol=1e-5)


def test_training_a_convolutional_linear_vae_hides_the_dependence_from_position_averages():
    # With full kernels M is circulant, so an encoder that is itself a convolution reaches the exact posterior.
    size, stride, grid = 6, 2, 3
    covariance = random_covariance(36)
    kernels, noise = (0.3 * random(1, size, size)).requires_grad_(), torch.tensor(0.0, requires_grad=True)
    encoder, root = (0.1 * random(1, size, size, seed=1)).requires_grad_(), torch.eye(grid**2).requires_grad_()

    def parts():
        return shifts(kernels, size, stride), noise, shifts(encoder, size, stride).T, root.tril() @ root.tril().T

    train(lambda: trained_elbo(*parts(), covariance), kernels, noise, encoder, root)
    weights, _, mean, spread = (part.detach() for part in parts())
    measured = aggregate_of(mean, spread, covariance) - torch.eye(grid**2)
    excess = excess_covariance(weights, noise.exp().detach(), covariance)
    torch.testing.assert_close(measured, excess, rtol=0, atol=1e-6)
    assert position_average(measured, 1, grid).abs().max() < 1e-6
    assert measured.abs().max() > 0.05


@pytest.mark.parametrize(("stride", "channels"), [(1, 1), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("kernel_size", [6, 4, 3])
def test_which_position_averages_vanish(stride, channels, kernel_size):
    covariance, grid = random_covariance(36), 6 // stride
    fit = fit_convolution(covariance, 6, stride, channels, kernel_size)
    excess = excess_covariance(shifts(fit.kernels, 6, stride), fit.variance, covariance)
    average = position_average(excess, channels, grid)
    assert excess.abs().max() > 0.05
    assert average[:, :, 0, 0].abs().max() < 1e-6
    if kernel_size == 6:
        assert average.abs().max() < 1e-6
    else:
        assert average.abs().max() > 1e-3


@pytest.mark.parametrize("kernel_size", [6, 3])
def test_position_average_is_the_kernel_contracted_with_the_gradient(kernel_size):
    # The formula of the docstring, at weights where nothing is stationary.
    size, stride, grid, channels = 6, 2, 3, 2
    kernels, covariance = random(channels, kernel_size, kernel_size), random_covariance(36)
    full = linear._on_torus(kernels, size).roll((3, 3), (1, 2)).requires_grad_()  # the same as a 6×6 kernel
    torch.testing.assert_close(shifts(full, size, stride), shifts(kernels, size, stride))
    (gradient,) = torch.autograd.grad(negative_elbo(shifts(full, size, stride), 0.3, covariance), full)
    average = position_average(excess_covariance(shifts(kernels, size, stride), 0.3, covariance), channels, grid)
    for a, b, row, column in product(range(channels), range(channels), range(grid), range(grid)):
        moved = gradient[b].roll((stride * row, stride * column), (0, 1))  # its value at u is g(u − stride·ℓ)
        assert average[a, b, row, column].item() == pytest.approx(-(full[a] * moved).sum().item() / grid**2, abs=1e-10)


def test_a_full_kernel_whitens_stationary_data_and_a_short_one_does_not():
    covariance = stationary(8)
    for kernel_size, white in [(8, True), (2, False)]:
        fit = fit_convolution(covariance, 8, 2, 1, kernel_size)
        excess = excess_covariance(shifts(fit.kernels, 8, 2), fit.variance, covariance)
        assert (excess.abs().max() < 1e-6) == white
        assert (kl_of_aggregate(excess) < 1e-9) == white


def test_fit_is_a_stationary_point_and_needs_only_the_shift_average():
    covariance = random_covariance(36)
    average = shift_average(covariance, 6, 2)
    fit = fit_convolution(covariance, 6, 2, 2, 4)
    other = fit_convolution(average, 6, 2, 2, 4)
    kernels, noise = fit.kernels.clone().requires_grad_(), torch.tensor(math.log(fit.variance), requires_grad=True)
    loss = negative_elbo(shifts(kernels, 6, 2), noise.exp(), covariance)
    gradients = torch.autograd.grad(loss, (kernels, noise))
    assert max(g.abs().max() for g in gradients) < 1e-5
    assert fit.gradient < 1e-5
    assert negative_elbo(shifts(other.kernels, 6, 2), other.variance, covariance).item() == pytest.approx(
        loss.item(), abs=1e-8
    )


def test_a_full_kernel_is_principal_components_of_the_shift_average_when_one_position_is_all():
    covariance = random_covariance(16)
    fit = fit_convolution(covariance, 4, 4, 3, 4)  # stride = size: no weights are shared
    weights, variance = principal_components(covariance, 3)
    assert fit.variance == pytest.approx(variance, rel=1e-6)
    found = shifts(fit.kernels, 4, 4)
    torch.testing.assert_close(found @ found.T, weights @ weights.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("stride", "kernel_size"), [(1, 3), (1, 4), (1, 8), (2, 5), (2, 8), (4, 2), (8, 8)])
def test_shifts_are_torch_convolutions_with_circular_padding(stride, kernel_size):
    size, channels, grid = 8, 2, 8 // stride
    kernels = random(channels, kernel_size, kernel_size)
    weights = shifts(kernels, size, stride)
    assert weights.shape == (size**2, channels * grid**2)
    before, after = kernel_size // 2, kernel_size - 1 - kernel_size // 2
    images = random(3, 1, size, size)
    down = F.conv2d(F.pad(images, (before, after, before, after), mode="circular"), kernels[:, None], stride=stride)
    torch.testing.assert_close(images.flatten(1) @ weights, down.flatten(1))
    z = random(3, channels, grid, grid)
    spread = torch.zeros(3, channels, size, size)
    spread[:, :, ::stride, ::stride] = z
    up = F.conv2d(F.pad(spread, (after, before, after, before), mode="circular"), kernels.flip(1, 2)[None])
    torch.testing.assert_close(z.flatten(1) @ weights.T, up.flatten(1))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shift_average_is_the_mean_over_shifts(stride):
    covariance = random_covariance(36)
    images = covariance.reshape(6, 6, 6, 6)
    moves = list(product(range(0, 6, stride), repeat=2))
    brute = sum(images.roll((i, j, i, j), (0, 1, 2, 3)) for i, j in moves) / len(moves)
    average = shift_average(covariance, 6, stride)
    torch.testing.assert_close(average, brute.reshape(36, 36))
    torch.testing.assert_close(shift_average(average, 6, stride), average)


def test_position_average_of_a_known_matrix():
    excess = torch.arange(64.0).reshape(8, 8)  # 2 channels on a 2×2 grid
    average = position_average(excess, 2, 2)
    assert average.shape == (2, 2, 2, 2)
    assert average[0, 1, 0, 0] == excess[:4, 4:].diagonal().mean()
    assert average[0, 1, 0, 1] == (excess[0, 5] + excess[1, 4] + excess[2, 7] + excess[3, 6]) / 4
    assert average[1, 0, 1, 0] == (excess[4, 2] + excess[5, 3] + excess[6, 0] + excess[7, 1]) / 4


def test_kl_of_known_gaussians():
    assert kl_of_aggregate(torch.zeros(3, 3)) == 0
    assert kl_of_aggregate(torch.diag(torch.tensor([1.0, 0.0]))) == pytest.approx(0.5 * (1 - math.log(2)))
    correlated = torch.tensor([[0.0, 0.6], [0.6, 0.0]])
    assert kl_of_aggregate(correlated) == pytest.approx(-0.5 * math.log(1 - 0.6**2))
    excess = random_covariance(5) - 0.1 * torch.eye(5)
    gaussians = [torch.distributions.MultivariateNormal(torch.zeros(5), c) for c in (torch.eye(5) + excess, torch.eye(5))]
    assert kl_of_aggregate(excess) == pytest.approx(torch.distributions.kl_divergence(*gaussians).item())


WEIGHTS = torch.ones(4, 2, dtype=torch.float64)
SQUARE = torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: posterior(WEIGHTS[0], 1.0), r"float64 matrix \(D, d\), got torch.float64 \(2,\)"),
        (lambda: posterior(WEIGHTS.float(), 1.0), "got torch.float32"),
        (lambda: posterior(WEIGHTS * math.nan, 1.0), "finite float64 matrix"),
        (lambda: posterior(WEIGHTS, 0.0), "variance is 0.0: σ² must be positive"),
        (lambda: posterior(WEIGHTS, math.nan), "variance is nan"),
        (lambda: excess_covariance(WEIGHTS, 1.0, SQUARE[:3]), r"finite float64 matrix \(4, 4\).*got torch.float64 \(3, 4\)"),
        (lambda: negative_elbo(WEIGHTS, 1.0, SQUARE / 0), "does it hold NaN"),
        (lambda: rate_distortion(WEIGHTS, -1.0, SQUARE), "variance is -1.0"),
        (lambda: kl_of_aggregate(-SQUARE), "I \\+ Δ has the eigenvalue 0"),
        (lambda: principal_components(SQUARE, 4), "4 latents for 4 pixels"),
        (lambda: principal_components(torch.diag(SQUARE[0]), 2), "2 latents explain all of the variance"),
        (lambda: shifts(torch.ones(1, 2, 2), 4, 3), "stride 3 does not divide size 4"),
        (lambda: shifts(torch.ones(1, 5, 5), 4, 2), r"kernels \(1, 5, 5\): need \(C, k, k\) with 1 ≤ k ≤ 4"),
        (lambda: shifts(torch.ones(1, 2, 3), 4, 2), "need \\(C, k, k\\)"),
        (lambda: shift_average(SQUARE, 2, 3), "stride 3 does not divide"),
        (lambda: shift_average(SQUARE, 3, 1), r"\(9, 9\), one row per pixel"),
        (lambda: position_average(SQUARE, 1, 3), "1 channels on a 3×3 grid are 9"),
        (lambda: fit_convolution(SQUARE, 2, 1, 1, 3), "1 ≤ k ≤ 2"),
        (lambda: fit_convolution(SQUARE, 2, 1, 0, 1), "at least one channel"),
        (lambda: fit_convolution(0 * SQUARE, 2, 1, 1, 1), "data that vary"),
        (lambda: aggregate_sample(WEIGHTS, 1.0, SQUARE[:, :3], 0), r"images \(4, 3\): need \(N, 4\)"),
    ],
)
def test_errors_say_what_was_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
