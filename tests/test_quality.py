import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from vaenb import checks, dependence, quality
from vaenb.config import Config
from vaenb.data import load
from vaenb.models import VAE, evaluate


def small():
    """A VAE small enough for its likelihood to be integrated: four pixels, one latent."""
    torch.manual_seed(3)
    model = VAE("dense", (1, 2, 2), stride=1, latents=1)
    for parameter in model.parameters():
        parameter.data.mul_(2.0)  # so that z matters
    return model.eval()


def exact(model, x):
    """log p(x) by numerical integration over the one latent."""
    grid = torch.linspace(-8, 8, 8001)[:, None]
    with torch.no_grad():
        joint = torch.stack([model.decode(grid).log_prob(image[None]) + model.prior().log_prob(grid) for image in x])
    return (joint.double().logsumexp(1) + math.log(16 / 8000)).float()


def test_importance_weighted_bound_reaches_the_integrated_likelihood():
    model = small()
    everything = torch.tensor(list(itertools.product([0, 255], repeat=4)), dtype=torch.uint8).view(-1, 1, 2, 2)
    truth = -exact(model, everything.float() / 255)
    assert (-truth).exp().sum().item() == pytest.approx(1, abs=1e-4)  # the integral is right: probabilities sum to one
    weights = quality.log_weights(model, everything, k=5000)
    torch.testing.assert_close(quality.negative_log_likelihood(weights), truth, atol=0.02, rtol=0)
    bounds = [quality.negative_log_likelihood(weights[:k]).mean() for k in (1, 10, 5000)]
    assert bounds[0] > bounds[1] > bounds[2]
    assert (-weights.mean(0) > truth).all()  # −ELBO bounds from above


def test_bounds_agree_with_a_direct_evaluation_on_the_whole_test_set():
    images, model = load("digits"), Config("digits", "dense", latents=8).build((1, 28, 28)).eval()
    measured = quality.bounds(model, images, k=10)
    rate, distortion = evaluate(model, images.test)
    assert measured["rate"] == pytest.approx(rate.mean().item(), rel=1e-5)
    assert measured["negative_elbo"] == pytest.approx((rate + distortion).mean().item(), rel=1e-5)
    direct = quality.negative_log_likelihood(quality.log_weights(model, images.test, 10)).mean().item()
    assert measured["negative_log_likelihood"] == pytest.approx(direct, abs=0.5)
    assert measured["standard_error"] == 0
    part = quality.bounds(model, images, k=10, subset=100)
    assert part["negative_log_likelihood"] == pytest.approx(direct, abs=0.5 + 5 * part["standard_error"])


def test_activity_sums_to_the_rate():
    images, model = load("digits"), Config("digits").build((1, 28, 28)).eval()
    activity = np.array(quality.posterior_activity(model, images)["rate_per_latent"])
    assert activity.shape == model.latent_shape
    assert activity.sum() == pytest.approx(quality.elbo(model, images)["rate"], rel=1e-3)


def test_connected_components_of_known_pictures():
    pictures = torch.zeros(4, 1, 8, 8)
    pictures[1, 0, 2:5, 2:5] = 1  # a square
    pictures[2, 0, [0, 1, 2], [0, 1, 2]] = 1  # a diagonal hangs together
    pictures[3, 0, [0, 0, 7], [0, 7, 3]] = 1  # three dots
    assert quality.connected_components(pictures).tolist() == [0, 1, 1, 3]


def test_data_are_mostly_one_stroke_and_noise_is_not():
    images = load("digits")
    statistics = quality.picture_statistics(Config("digits").build((1, 28, 28)).eval(), images, n=50)
    assert statistics["one_stroke_data"] > 0.9
    assert statistics["variety_samples"] < 0.1  # untrained: always the same grey
    noise = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert (quality.connected_components(noise, 0.8) > 1).mean() > 0.9


def test_interval_is_students_t():
    values = [1.0, 2.0, 4.0]
    low, high = quality.interval(values)
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    with pytest.raises(ValueError, match="at least 2"):
        quality.interval([1.0])


def test_too_few_draws():
    with pytest.raises(ValueError, match="at least one draw"):
        quality.log_weights(small(), torch.zeros(1, 1, 2, 2, dtype=torch.uint8), k=0)


def posterior():
    torch.manual_seed(0)
    q = torch.distributions.Normal(torch.randn(10, 30), torch.rand(10, 30) + 0.1)
    return torch.distributions.Independent(q, 1)


def test_reparametrisation_passes_and_a_wrong_one_is_caught(monkeypatch):
    scores = [*checks.moment_scores(posterior(), 2000), *checks.gradient_scores(posterior(), 2000)]
    assert min(map(checks.normality, scores)) > 0.001
    for wrong in (
        lambda q, noise: q.mean + q.base_dist.scale**2 * noise,  # variance for standard deviation
        lambda q, noise: q.mean + q.base_dist.scale * noise.abs(),
        lambda q, noise: q.mean + q.base_dist.scale.detach() * noise,  # no gradient to σ
    ):
        monkeypatch.setattr(checks, "reparametrise", wrong)
        with_mistake = [*checks.moment_scores(posterior(), 2000)]
        try:
            with_mistake += checks.gradient_scores(posterior(), 2000)
        except AttributeError:  # σ got no gradient at all
            continue
        assert min(map(checks.normality, with_mistake)) < 1e-6


def test_gradient_of_the_rate():
    assert checks.rate_gradient_error(posterior()) < 1e-12


def test_random_number_tests_pass_and_have_power(monkeypatch):
    pixels = load("digits").test
    assert min(checks.random_numbers(pixels).values()) > 0.001
    monkeypatch.setattr(checks, "binarise", lambda p, u: (u < p.float() / 250).float())
    assert checks.random_numbers(pixels)["pixels are one as often as they are grey"] < 1e-6


def test_neighbour_test_keeps_its_level_and_finds_a_pattern():
    generator = np.random.default_rng(0)
    p = []
    for seed in range(100):
        observed, null = dependence.neighbour_test(generator.normal(size=(50, 6, 6)), permutations=99, seed=seed)
        p.append(dependence.p_value(observed, null))
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) <= 0.05) < 0.13
    white = generator.normal(size=(50, 8, 8))
    smooth = white + np.roll(white, 1, axis=1) + np.roll(white, 1, axis=2)
    observed, null = dependence.neighbour_test(smooth)
    assert dependence.p_value(observed, null) == pytest.approx(0.001)


def test_neighbour_test_is_about_arrangement_not_dependence():
    generator = np.random.default_rng(1)
    common = generator.normal(size=(200, 1, 1))
    dependent = common + generator.normal(size=(200, 7, 7))  # strongly dependent, equally so everywhere
    observed, null = dependence.neighbour_test(dependent)
    assert observed > 0.1
    assert dependence.p_value(observed, null) > 0.01


def test_squared_correlation_is_numpys():
    latents = np.random.default_rng(2).normal(size=(40, 2, 3))
    np.testing.assert_allclose(dependence.squared_correlation(latents), np.corrcoef(latents.reshape(40, 6).T) ** 2)
    latents[:, 0, 0] = 1.0  # never varies
    assert dependence.squared_correlation(latents)[0].max() == 0


def test_neighbour_test_needs_maps():
    with pytest.raises(ValueError, match="need 3 images and adjacent positions"):
        dependence.neighbour_test(np.zeros((2, 5, 5)))
    apart = np.zeros((5, 5), dtype=bool)
    apart[[0, 2, 4], [0, 2, 4]] = True
    with pytest.raises(ValueError, match="3 positions used"):
        dependence.neighbour_test(np.zeros((10, 5, 5)), apart)


def test_a_blank_border_alone_is_not_arrangement_among_used_positions():
    generator = np.random.default_rng(3)
    common = generator.normal(size=(200, 1, 1))
    used = np.zeros((9, 9), dtype=bool)
    used[2:7, 2:7] = True
    latents = np.where(used, common, 0) + generator.normal(size=(200, 9, 9))  # equally dependent inside, nothing outside
    assert dependence.p_value(*dependence.neighbour_test(latents)) == pytest.approx(0.001)
    assert dependence.p_value(*dependence.neighbour_test(latents, used)) > 0.01
