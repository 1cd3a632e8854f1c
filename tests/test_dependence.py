import itertools

import numpy as np
import pytest
import torch
from esda.moran import Moran
from libpysal.weights import lat2W

from vaenb import dependence
from vaenb.models import VAE


@pytest.fixture(scope="module")
def smooth():
    """Maps whose neighbours are alike."""
    noise = np.random.default_rng(0).standard_normal((400, 8, 9))
    return noise[:, 1:, 1:] + noise[:, :-1, 1:] + noise[:, 1:, :-1] + noise[:, :-1, :-1]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 9])
def test_permuting_keeps_every_marginal_and_every_block(block):
    z = torch.arange(50 * 2 * 7 * 7.0).view(50, 2, 7, 7)
    shuffled = dependence.permute(z, block, seed=3)
    torch.testing.assert_close(shuffled.sort(0).values, z.sort(0).values, rtol=0, atol=0)
    origin = (shuffled // (2 * 7 * 7)).long()  # which image an entry is from
    for top in range(0, 7, block):
        for left in range(0, 7, block):
            part = origin[:, :, top : top + block, left : left + block].flatten(1)
            assert (part == part[:, :1]).all()
    moved = (origin[:, :, 0, 0] != origin[:, :, 6, 6]).float().mean()
    assert moved == 0 if block >= 7 else moved > 0.8


def test_permuting_destroys_dependence():
    shared = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    z = shared + 0.1 * torch.randn(4000, 5, generator=torch.Generator().manual_seed(1))
    assert np.abs(dependence.off_diagonal(dependence.correlation(z.numpy()))).min() > 0.9
    assert np.abs(dependence.off_diagonal(dependence.correlation(dependence.permute(z).numpy()))).max() < 0.08


def test_permuting_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="expected a whole number"):
        dependence.permute(torch.zeros(3, 1, 7, 7), 0)
    with pytest.raises(ValueError, match="1 for vectors"):
        dependence.permute(torch.zeros(3, 20), 2)
    with pytest.raises(ValueError, match="expected \\(N, C, h, w\\)"):
        dependence.permute(torch.zeros(3, 7, 7))


def test_aggregate_has_the_moments_of_the_posteriors():
    torch.manual_seed(0)
    vae = VAE()
    image = torch.full((1, 1, 28, 28), 255, dtype=torch.uint8)  # ink everywhere: binarisation changes nothing
    q = vae.encode(torch.ones(1, 1, 28, 28))
    z = dependence.aggregate(vae, image.expand(4000, -1, -1, -1))
    torch.testing.assert_close(z.mean(0), q.mean[0], atol=5 * q.stddev.max().item() / 4000**0.5, rtol=0)
    torch.testing.assert_close(z.std(0), q.stddev[0], atol=0, rtol=0.06)


def test_correlation_is_numpys():
    latents = np.random.default_rng(0).normal(size=(40, 2, 3))
    np.testing.assert_allclose(dependence.correlation(latents), np.corrcoef(latents.reshape(40, 6).T))
    latents[:, 0, 0] = 7
    assert dependence.correlation(latents)[0].max() == 0


def test_correlogram_is_the_average_over_positions(smooth):
    centred = smooth - smooth.mean(0)
    lag = (centred[:, 2:, :-1] * centred[:, :-2, 1:]).mean() / (centred**2).mean()  # two rows down, one column left
    averaged = dependence.correlogram(smooth)
    assert averaged.shape == (13, 15)
    assert averaged[6, 7] == pytest.approx(1)
    assert averaged[8, 6] == pytest.approx(lag)
    np.testing.assert_allclose(averaged, averaged[::-1, ::-1], atol=1e-12)


def test_correlogram_and_morans_i_are_blind_to_what_cancels():
    """Neighbours that agree in one half of the map and disagree in the other."""
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((2, 5000, 6, 2))
    maps = np.concatenate([left[:, :, :1], left[:, :, :1] + 0.5 * left[:, :, 1:],
                           right[:, :, :1], -right[:, :, :1] + 0.5 * right[:, :, 1:]], axis=2)  # fmt: skip
    maps /= maps.std(axis=0)
    assert np.abs(dependence.off_diagonal(dependence.correlation(maps))).max() > 0.85
    lag = dependence.correlogram(maps)[5, 4]  # one column to the right
    assert abs(lag) < 0.02
    assert abs(dependence.morans_i(maps).mean() + 1 / 23) < 0.02


def test_morans_i_is_esdas(smooth):
    weights = lat2W(7, 8)
    expected = [Moran(image.ravel(), weights, transformation="B", permutations=0).I for image in smooth[:20]]
    np.testing.assert_allclose(dependence.morans_i(smooth[:20]), expected)


def test_morans_i_under_the_null_has_its_expectation():
    values = dependence.morans_i(np.random.default_rng(0).normal(size=(4000, 7, 7)))
    assert values.mean() == pytest.approx(-1 / 48, abs=4 * values.std() / 4000**0.5)


def test_statistics_of_maps_refuse_other_shapes():
    for function in (dependence.morans_i, dependence.correlogram):
        with pytest.raises(ValueError, match="one channel at a time"):
            function(np.zeros((3, 1, 7, 7)))
    with pytest.raises(ValueError, match="the same everywhere"):
        dependence.morans_i(np.zeros((3, 7, 7)))
    with pytest.raises(ValueError, match="map 1 is the same everywhere"):  # 0.1: whose mean is rounded
        dependence.morans_i(np.stack([np.arange(49.0).reshape(7, 7), np.full((7, 7), 0.1)]))


def test_products_of_correlations_are_unbiased_for_the_squared_correlation():
    generator = np.random.default_rng(0)
    common = generator.standard_normal((20_000, 1, 1))
    pictures = generator.standard_normal((20_000, 1, 3)) + np.array([1, 1, 0.0]) * common  # rho = 1/2, 0, 0
    products = dependence.correlation_products(pictures, 40)
    assert products.shape == (20, 3, 3)
    for (a, b), expected in {(0, 1): 0.25, (0, 2): 0, (1, 2): 0}.items():
        estimates = products[:, a, b]
        assert estimates.mean() == pytest.approx(expected, abs=4 * estimates.std(ddof=1) / 20**0.5)
    assert products[:, 0, 2].std() > 0  # it is an estimate, not a constant


def test_products_of_correlations_need_pictures_enough():
    with pytest.raises(dependence.SampleSizeError, match="at least 30"):
        dependence.correlation_products(np.zeros((29, 2, 2)), 10)
    with pytest.raises(ValueError, match="even number"):
        dependence.correlation_products(np.zeros((29, 2, 2)), 3)


def test_by_distance_averages_over_pairs():
    y, x = np.divmod(np.arange(12), 4)
    distance = np.maximum(abs(y[:, None] - y), abs(x[:, None] - x))
    np.testing.assert_allclose(dependence.by_distance(distance.astype(float), 3, 4), np.arange(4))


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


def test_latents_that_never_vary_correlate_with_nothing():
    z = np.stack([np.full(50, 0.1), np.full(50, 0.3), np.arange(50.0)], axis=1)  # constants whose mean rounds to another
    assert dependence.correlation(z) == pytest.approx(np.diag([0, 0, 1]))


def test_a_tie_counts_against_the_observation():
    assert dependence.p_value(1.0, np.array([0.0, 1.0, 2.0])) == 0.75


def test_lag_averages_are_means_over_all_pairs_of_a_lag():
    height, width = 3, 4
    matrix = np.random.default_rng(0).normal(size=(height * width,) * 2)
    places = list(itertools.product(range(height), range(width)))
    lags = np.array([[(b[0] - a[0], b[1] - a[1]) for b in places] for a in places])
    averaged = dependence.lag_averages(matrix, height, width)
    for i, j in itertools.product(range(height * width), repeat=2):
        alike = (lags == lags[i, j]).all(axis=2)
        assert averaged[i, j] == pytest.approx(matrix[alike].mean())


def test_neighbours_lie_along_rows_and_along_columns():
    generator = np.random.default_rng(0)
    striped = generator.normal(size=(200, 1, 8)) + generator.normal(size=(200, 8, 8))  # alike along columns only
    for maps in (striped, striped.transpose(0, 2, 1)):
        assert dependence.p_value(*dependence.neighbour_test(maps, permutations=199)) == pytest.approx(1 / 200)
