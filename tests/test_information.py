import dataclasses

import numpy as np
import pytest
from scipy import stats

from vaenb import information
from vaenb.data import load
from vaenb.dependence import SampleSizeError


def gaussian(count, correlation, seed=0):
    return stats.multivariate_normal(cov=correlation, seed=seed).rvs(count)


BLOCKS = np.kron(np.eye(4), np.array([[1, 0.8], [0.8, 1]]))  # four pairs
TRUTH = -0.5 * np.linalg.slogdet(BLOCKS)[1]


def test_total_correlation_of_a_gaussian_and_of_its_transforms():
    z = gaussian(4000, BLOCKS)
    for latents in (z, np.exp(z), z.reshape(-1, 1, 2, 4) ** 3):  # monotone transforms of single latents change nothing
        result = information.total_correlation(latents)
        assert result["bound"] == pytest.approx(TRUTH, abs=0.08)
        assert result["plug_in"] == pytest.approx(result["bound"] + result["null_mean"])


def test_total_correlation_of_independent_latents_is_zero_where_the_plug_in_value_is_not():
    z = np.random.default_rng(0).standard_normal((2000, 100)) ** 3
    result = information.total_correlation(z)
    assert result["plug_in"] == pytest.approx(100 * 99 / (4 * 2000), rel=0.1)  # pure bias
    assert abs(result["bound"]) < 5 * result["null_sd"]


def test_total_correlation_is_a_lower_bound():
    """Dependence without correlation: it sees nothing, and claims nothing."""
    generator = np.random.default_rng(0)
    a = generator.standard_normal(5000)
    z = np.stack([a, np.abs(a) + 0.01 * generator.standard_normal(5000)], axis=1)
    assert information.total_correlation(z)["bound"] < 0.01


def test_gaussian_gain_is_the_divergence_of_gaussians():
    mean, covariance = np.array([0.5, -1, 0, 0, 0, 0, 0, 0]), 0.7 * BLOCKS
    train, test = (gaussian(40_000, covariance, seed) + mean for seed in (1, 2))
    trace, distance, log_determinant = np.trace(covariance), mean @ mean, np.linalg.slogdet(covariance)[1]
    divergence = 0.5 * (trace + distance - 8 - log_determinant)
    gain, error = information.gaussian_gain(train, test, full=True)
    assert gain == pytest.approx(divergence, abs=5 * error)
    margins, error = information.gaussian_gain(train, test, full=False)
    assert margins == pytest.approx(0.5 * (trace + distance - 8 - 8 * np.log(0.7)), abs=5 * error)
    assert gain - margins == pytest.approx(TRUTH, abs=0.05)


def test_gain_over_the_prior_itself_is_not_positive():
    z = np.random.default_rng(0).standard_normal((3000, 7, 7))
    gain, error = information.gaussian_gain(z[:1500], z[1500:], full=True)
    assert -1 < gain < 2 * error  # held out: overfitting costs, it never pays


def regions(*columns):
    masks = np.zeros((len(columns), 4, 12), dtype=bool)
    for mask, part in zip(masks, columns, strict=True):
        mask[:, part] = True
    return list(masks)


def striped(count, seed):
    """Three regions that share a random choice of one of four patterns, each pixel flipped with probability 0.02."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).integers(0, 2, (4, 4, 3))
    images = np.tile(patterns[generator.integers(0, 4, count)], (1, 1, 4))
    return (images ^ (generator.random(images.shape) < 0.02)).astype(np.float32)


def test_floor_of_regions_that_share_two_bits():
    train, test = striped(6000, 0), striped(3000, 1)
    two = information.information_floor(train, test, regions(slice(0, 3), slice(6, 9)), labels=4)
    assert 0.75 * np.log(4) < two["floor"] <= np.log(4) + 0.01
    three = information.information_floor(train, test, regions(slice(0, 3), slice(3, 6), slice(9, 12)), labels=4)
    assert (
        0.8 * 2 * np.log(4) < three["floor"] <= 2 * np.log(4) + 0.01
    )  # total correlation: each further region adds its own
    assert three["floor"] == pytest.approx(sum(three["terms"]))


def test_floor_of_independent_regions_is_not_positive():
    train, test = striped(6000, 0), striped(3000, 1)
    for part, seed in ((train, 5), (test, 6)):
        part[:, :, 6:] = part[np.random.default_rng(seed).permutation(len(part)), :, 6:]
    result = information.information_floor(train, test, regions(slice(0, 6), slice(6, 12)), labels=4)
    assert result["floor"] < 2 * result["standard_error"] + 1e-3


def test_floor_of_halves_needs_parts_that_share_nothing():
    images = load("digits")
    with pytest.raises(ValueError, match="T3 gives no floor"):
        information.floor_of_halves(np.ones((28, 7), dtype=bool), images)
    colour = dataclasses.replace(images, train=images.train.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="3 channels"):
        information.floor_of_halves(np.eye(28, dtype=bool), colour)
    floor = information.floor_of_halves(np.eye(28, dtype=bool), images)  # every row on its own
    assert floor["below"] == floor["above"] + 1
    assert floor["floor"] > 4 * floor["standard_error"]  # halves of a digit know of each other


def test_on_a_torus_the_lower_part_must_not_meet_the_upper_one_from_below():
    neighbours = sum(np.roll(np.eye(28, dtype=int), shift, axis=1) for shift in (-1, 0, 1)) > 0
    with pytest.raises(ValueError, match="T3 gives no floor"):
        information.floor_of_halves(neighbours, load("digits"))


def test_estimators_say_how_many_images_they_need():
    few = np.zeros((30, 49))
    with pytest.raises(SampleSizeError, match="needs at least 51"):
        information.total_correlation(few)
    with pytest.raises(SampleSizeError, match="at least 51"):
        information.gaussian_gain(few, few, full=True)
    with pytest.raises(SampleSizeError, match="at least 640"):
        information.information_floor(striped(100, 0), striped(10, 0), regions(slice(0, 3), slice(3, 6)))
    with pytest.raises(ValueError, match="at least two, none overlapping"):
        information.information_floor(striped(100, 0), striped(10, 0), regions(slice(0, 3), slice(2, 6)))


def test_singular_covariances_are_refused():
    z = np.random.default_rng(0).standard_normal((100, 3))
    duplicated = np.concatenate([z, z[:, :1]], axis=1)
    with pytest.raises(information.SingularCovarianceError, match="functions of others"):
        information.total_correlation(duplicated)
    with pytest.raises(information.SingularCovarianceError, match="Draw z"):
        information.gaussian_gain(duplicated, duplicated, full=True)
    duplicated[:, 3] = 1
    with pytest.raises(information.SingularCovarianceError):
        information.gaussian_gain(duplicated, duplicated, full=False)


def test_errors_of_gains_and_floors_halve_with_four_times_as_many_images():
    train, test = gaussian(20_000, BLOCKS, 1), gaussian(500, BLOCKS, 2)
    _, error = information.gaussian_gain(train, test, full=True)
    assert information.gaussian_gain(train, np.tile(test, (4, 1)), full=True)[1] == pytest.approx(error / 2, rel=0.01)
    others = [information.gaussian_gain(train, gaussian(500, BLOCKS, seed), full=True)[0] for seed in range(3, 43)]
    assert error == pytest.approx(np.std(others, ddof=1), rel=0.4)
    train, test = striped(4000, 0), striped(500, 1)
    one, four = (
        information.information_floor(train, np.tile(test, (n, 1, 1)), regions(slice(0, 3), slice(6, 9)), labels=4)
        for n in (1, 4)
    )
    assert four["standard_error"] == pytest.approx(one["standard_error"] / 2, rel=0.01)


def test_a_floor_is_no_more_than_there_is_to_know():
    """Test images of one pattern alone leave nothing to know, whatever the training images were."""
    train, test = striped(4000, 0), np.repeat(striped(1, 1), 300, axis=0)
    assert information.information_floor(train, test, regions(slice(0, 3), slice(6, 9)), labels=4)["floor"] <= 0
