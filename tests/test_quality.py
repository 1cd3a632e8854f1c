import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy import linalg, stats
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from vaenb import checks, quality
from vaenb.config import Config
from vaenb.data import load


def test_connected_components_of_known_pictures():
    pictures = torch.zeros(4, 1, 8, 8)
    pictures[1, 0, 2:5, 2:5] = 1  # a square
    pictures[2, 0, [0, 1, 2], [0, 1, 2]] = 1  # a diagonal hangs together
    pictures[3, 0, [0, 0, 7], [0, 7, 3]] = 1  # three dots
    assert quality.connected_components(pictures).tolist() == [0, 1, 1, 3]


def test_connected_components_do_not_reach_from_one_picture_to_the_next():
    pictures = torch.rand(300, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    pictures[::7] = 0
    pictures[100:110] = 1
    alone = [quality.connected_components(picture[None]).item() for picture in pictures]
    assert quality.connected_components(pictures).tolist() == alone
    assert {0, 1, 2} < set(alone)
    assert quality.connected_components(pictures[:0]).shape == (0,)


def test_data_are_mostly_one_stroke_and_noise_is_not():
    images = load("digits")
    statistics = quality.picture_statistics(Config("digits").build((1, 28, 28)).eval(), images, n=50)
    assert statistics["one_stroke_data"] > 0.9
    assert statistics["variety_samples"] < 0.1  # untrained: always the same grey
    noise = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert (quality.connected_components(noise, 0.8) > 1).mean() > 0.9


def test_interval_of_equal_values_is_their_value():
    assert quality.interval([3.0, 3.0]) == (3.0, 3.0)


def test_interval_is_students_t():
    values = [1.0, 2.0, 4.0]
    low, high = quality.interval(values)
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    with pytest.raises(ValueError, match="at least 2"):
        quality.interval([1.0])


def gaussian(n, d=8, seed=0, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * scale + shift


class Identity(torch.nn.Module):
    """Takes features for pictures, as torchmetrics wants a network."""

    num_features = 8

    def forward(self, x):
        return x


def test_frechet_distance_is_that_of_torchmetrics():
    a, b = gaussian(300), np.tanh(gaussian(200, seed=1, scale=0.7, shift=0.4)) ** 2
    reference = FrechetInceptionDistance(Identity())
    reference.update(torch.from_numpy(a), real=True)
    reference.update(torch.from_numpy(b), real=False)
    assert quality.frechet_distance(a, b) == pytest.approx(reference.compute().item(), rel=1e-9)


def with_moments(mean, covariance, n=50):
    """Samples with exactly this mean and covariance."""
    white = gaussian(n, len(mean))
    white = np.linalg.qr(white - white.mean(axis=0))[0] * np.sqrt(n - 1)
    values, vectors = np.linalg.eigh(covariance)
    return white * np.sqrt(values.clip(0)) @ vectors.T + mean


def test_frechet_distance_of_known_gaussians():
    along, other = np.diag([4.0, 1.0, 0.0]), np.diag([1.0, 9.0, 0.0])  # singular, and so is what the two have in common
    a, b = with_moments([0, 0, 0], along), with_moments([1, 2, 0], other)
    assert quality.frechet_distance(a, b) == pytest.approx(5 + (2 - 1) ** 2 + (1 - 3) ** 2, rel=1e-12)
    turned, _ = np.linalg.qr(gaussian(3, 3))
    assert quality.frechet_distance(a @ turned, b @ turned) == pytest.approx(10, rel=1e-12)
    general = np.array([[2.0, 0.8, 0], [0.8, 1, 0], [0, 0, 3]])  # no common eigenvectors: Dowson & Landau's formula itself
    regular = np.diag([4.0, 1.0, 2.0])
    expected = 5 + np.trace(regular + general) - 2 * np.trace(linalg.sqrtm(regular @ general).real)
    measured = quality.frechet_distance(with_moments([0, 0, 0], regular), with_moments([1, 2, 0], general))
    assert measured == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_a_distance():
    a, b = gaussian(100), gaussian(120, seed=1, shift=0.3)
    assert quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert quality.frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-12)
    assert quality.frechet_distance(a, b) == pytest.approx(quality.frechet_distance(b, a), rel=1e-12)
    assert quality.frechet_distance(a, b) > 0.5


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (gaussian(8), gaussian(100), "at least 9 samples"),
        (gaussian(100), np.where(np.arange(800).reshape(100, 8) == 3, np.nan, 1.0), "1 of 100 rows of the second"),
        (gaussian(100), gaussian(100, d=7), "same d"),
        (gaussian(100)[:, :, None], gaussian(100), "same d"),
    ],
)
def test_features_that_cannot_be_compared(a, b, message):
    with pytest.raises(ValueError, match=message):
        quality.frechet_distance(a, b)


def test_kernel_distance_is_that_of_torchmetrics():
    a, b = gaussian(150), gaussian(150, seed=1, scale=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it keeps all features
        reference = KernelInceptionDistance(Identity(), subsets=1, subset_size=150)
    reference.update(torch.from_numpy(a), real=True)
    reference.update(torch.from_numpy(b), real=False)
    estimate, error = quality.kernel_distance(a, b)
    assert estimate == pytest.approx(reference.compute()[0].item(), rel=1e-9)
    assert error is None


def test_kernel_distance_is_unbiased_and_knows_its_error():
    sets = [(gaussian(230, seed=2 * i), gaussian(200, seed=2 * i + 1)) for i in range(100)]
    estimates, errors = np.transpose([quality.kernel_distance(*pair, block=50) for pair in sets])
    assert abs(estimates.mean()) < 3 * stats.sem(estimates)
    assert (estimates < 0).any()
    assert np.sqrt((errors**2).mean()) == pytest.approx(estimates.std(), rel=0.3)
    far, error = quality.kernel_distance(gaussian(200), gaussian(200, seed=1, shift=0.5), block=50)
    assert far > 5 * error


def test_order_makes_a_kernel_distance_no_less_certain():
    """In blocks of sorted samples each block would be compared with the wrong part of the other set."""
    a, b = gaussian(400), gaussian(400, seed=1)
    shuffled, usual = quality.kernel_distance(a, b, block=100)
    ordered, error = quality.kernel_distance(a[a[:, 0].argsort()], b[b[:, 0].argsort()[::-1]], block=100)
    assert abs(ordered - shuffled) < 4 * usual
    assert error < 4 * usual


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_are_those_of_prdc(k):
    reference, samples = gaussian(700), gaussian(400, seed=1, scale=0.6)
    expected = compute_prdc(reference, samples, nearest_k=k)
    assert quality.density_coverage(reference, samples, k) == pytest.approx((expected["density"], expected["coverage"]))


def test_density_and_coverage_of_one_distribution_and_of_others():
    reference = gaussian(1000)
    density, coverage = quality.density_coverage(reference, gaussian(1000, seed=1))
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert quality.density_coverage(reference, gaussian(1000, seed=1, shift=50)) == (0, 0)
    density, coverage = quality.density_coverage(reference, gaussian(1000, seed=1, scale=0.1))  # one spot
    assert density > 1
    assert coverage < 0.5
    with pytest.raises(ValueError, match="choose 1 to 4 neighbours"):
        quality.density_coverage(gaussian(5), gaussian(5))


def test_two_sample_test_keeps_its_level_and_has_power():
    pairs = [(gaussian(150, seed=2 * i), gaussian(140, seed=2 * i + 1)) for i in range(40)]
    accuracies, p = np.transpose([quality.two_sample_test(*pair) for pair in pairs])
    assert accuracies.mean() == pytest.approx(0.5, abs=0.02)
    assert stats.kstest(p, "uniform").pvalue > 0.001
    accuracy, p = quality.two_sample_test(gaussian(150), gaussian(150, seed=1, shift=3))
    assert accuracy > 0.98
    assert p < 1e-20
    accuracy, p = quality.two_sample_test(gaussian(500), gaussian(500, seed=1, scale=2.0))  # no line separates these
    assert accuracy > 0.75
    assert p < 1e-10
    with pytest.raises(ValueError, match="at least 4 of each"):
        quality.two_sample_test(gaussian(3), gaussian(100))


def test_two_sample_test_is_not_misled_by_pairs():
    """Learning one of a pair by heart must not lower the accuracy on the other: both are on the same side of the split."""
    a = gaussian(1000)
    accuracy, _ = quality.two_sample_test(a, a + 0.05 * gaussian(1000, seed=1))
    assert accuracy == pytest.approx(0.5, abs=0.05)


def test_two_sample_test_repeats():
    a, b = gaussian(100), gaussian(100, seed=1, shift=0.2)
    assert quality.two_sample_test(a, b, seed=3) == quality.two_sample_test(a, b, seed=3)


def test_class_statistics_of_known_cases():
    sure = quality.class_statistics(np.eye(10))  # one picture of each class
    assert sure == pytest.approx({"confidence": 1, "class_entropy": math.log(10)})
    collapsed = quality.class_statistics(np.eye(10)[[3, 3, 3]])
    assert collapsed == pytest.approx({"confidence": 1, "class_entropy": 0})
    undecided = quality.class_statistics(np.full((5, 10), 0.1))
    assert undecided == pytest.approx({"confidence": 0.1, "class_entropy": math.log(10)})
    for wrong in (np.eye(10) * 2 - 0.1, np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="logits"):
            quality.class_statistics(wrong)
    with pytest.raises(ValueError, match="expected \\(N, K\\)"):
        quality.class_statistics(np.ones(3))


def test_bootstrap_error_of_means_is_the_known_one():
    a, b = gaussian(400, d=1), gaussian(100, d=1, seed=1)
    error = quality.bootstrap_error(lambda x: float(x.mean()), a, resamples=1000)
    assert error == pytest.approx(a.std() / 20, rel=0.08)
    error = quality.bootstrap_error(lambda x, y: float(x.mean() - y.mean()), a, b, resamples=1000)
    assert error == pytest.approx(math.hypot(a.std() / 20, b.std() / 10), rel=0.08)
    with pytest.raises(ValueError, match="at least 2"):
        quality.bootstrap_error(np.mean, a, resamples=1)


def test_comparison_tells_data_from_worse_and_can_be_stored():
    generator = np.random.default_rng(0)
    reference, same, worse = (
        (gaussian(400, seed=i, shift=0.4 * (i == 2)), generator.dirichlet(np.ones(10), 400)) for i in range(3)
    )
    floor, measured = (quality.compare(pictures, reference, slow=True) for pictures in (same, worse))
    assert json.loads(json.dumps(measured)) == measured
    assert floor["frechet"] + 3 * floor["frechet_error"] < measured["frechet"]
    assert floor["kernel"] < measured["kernel"]
    assert floor["two_sample_p"] > 0.01 > measured["two_sample_p"]
    assert floor["density"] > measured["density"]
    quick = quality.compare(worse, reference)
    assert quick == {name: measured[name] for name in quick}
    assert set(measured) - set(quick) == {"frechet_error", "two_sample_accuracy", "two_sample_p"}


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


def test_a_comparison_is_of_pictures_with_the_reference():
    (few, many), sure = (gaussian(300, scale=0.5), gaussian(500, seed=1)), np.eye(10)[np.arange(500) % 10]
    measured = quality.compare((few, sure[:300]), (many, sure), slow=True)
    assert (measured["density"], measured["coverage"]) == quality.density_coverage(many, few)
    again = quality.bootstrap_error(lambda drawn: quality.frechet_distance(drawn, many), few)
    assert measured["frechet_error"] == pytest.approx(again)


def test_samples_come_from_the_prior_and_reconstructions_from_the_images():
    images, model = load("digits"), Config("digits").build((1, 28, 28)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2)
    model.to_latent[-1].weight[1:], model.to_latent[-1].bias[1:] = 0, -20  # z is the mean
    images = dataclasses.replace(images, test=(images.test > 127).to(torch.uint8) * 255)  # binarisation changes nothing
    drawn = quality.pictures(model, images, 60)
    expected = model.decode(model.encode(images.test[:60].float() / 255).mean).mean
    torch.testing.assert_close(drawn["reconstructions"], expected, atol=1e-3, rtol=0)
    assert len(drawn["samples"].flatten(1).unique(dim=0)) == 60
    measured = quality.picture_statistics(model, images, 60)
    for name in ("samples", "reconstructions"):
        ratio = drawn[name].var(dim=0).sum() / drawn["data"].var(dim=0).sum()
        assert measured[f"variety_{name}"] == pytest.approx(ratio.item(), rel=1e-4)


def test_samples_are_resampled_independently_of_each_other():
    a = gaussian(400, d=1)
    error = quality.bootstrap_error(lambda x, y: float(x.mean() - y.mean()), a, a, resamples=400)
    assert error == pytest.approx(math.sqrt(2) * a.std() / 20, rel=0.15)


def test_a_p_value_is_the_smaller_the_more_was_right():
    pairs = [(gaussian(60, seed=2 * i), gaussian(60, seed=2 * i + 1)) for i in range(12)]
    accuracies, p = np.transpose([quality.two_sample_test(*pair) for pair in pairs])
    assert accuracies.min() < 0.5 < accuracies.max()
    assert (np.diff(p[accuracies.argsort(kind="stable")]) <= 0).all()
