"""The stationary prior: a Gaussian field of several widths, and flow matching from it."""

import numpy as np
import pytest
import torch

from vaenb.gaussians import PositionGaussian
from vaenb.samples import two_point_correlation
from vaenb.stationary import WIDTHS, GaussianField, StationaryFlow


@pytest.fixture
def field():
    """A field of two channels, mixed differently at every width."""
    field = GaussianField((2, 8, 8))
    field.mixing = 0.5 * torch.randn(len(WIDTHS), 2, 2, generator=torch.Generator().manual_seed(0))
    field.mean = torch.tensor([1.0, -2.0])
    return field


def test_draws_have_the_covariance_of_the_formula_on_any_grid(field):
    z = field.sample(20_000, (3, 5), seed=1)
    expected = field.covariance((3, 5))
    measured = z.flatten(1).T.cov()
    assert (measured - expected).abs().max() < 0.06 * expected.diagonal().max()
    np.testing.assert_allclose(z.mean(dim=(0, 2, 3)), field.mean, atol=0.05)


def test_the_field_of_a_small_map_is_a_part_of_that_of_a_large_one(field):
    large, small = field.covariance((6, 7)).view(2, 6, 7, 2, 6, 7), field.covariance((3, 4)).view(2, 3, 4, 2, 3, 4)
    torch.testing.assert_close(large[:, 2:5, 1:5, :, 2:5, 1:5], small)


def test_the_density_is_that_of_the_gaussian_and_integrates(field):
    z = field.sample(5, (4, 3), seed=2)
    covariance = field.covariance((4, 3)).double()
    centred = (z - field.mean[:, None, None]).flatten(1).double()
    quadratic = (centred @ covariance.inverse() * centred).sum(dim=1)
    expected = -0.5 * (quadratic + covariance.logdet() + 24 * np.log(2 * np.pi))
    torch.testing.assert_close(field.log_prob(z).double(), expected, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="at most 4096 at once"):
        field.log_prob(torch.zeros(1, 2, 64, 64))


def test_a_fit_finds_the_covariances_of_a_known_field(field):
    z = field.sample(4_000, (8, 8), seed=3)
    fitted, white = GaussianField((2, 8, 8)).fit(z), PositionGaussian((2, 8, 8)).fit(z)
    scale = field.covariance((1, 1)).abs().max()
    assert (fitted.covariance((8, 8)) - field.covariance((8, 8))).abs().max() < 0.15 * scale
    nats = {name: prior.log_prob(z[:500]).mean() for name, prior in {"white": white, "fitted": fitted, "true": field}.items()}
    assert nats["fitted"] - nats["white"] > 0.9 * (nats["true"] - nats["white"])


def test_a_fit_to_white_noise_gains_nothing():
    z = torch.randn(4_000, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    fitted = GaussianField((2, 8, 8)).fit(z[:3_000])
    normal = -0.5 * (z[3_000:].square() + np.log(2 * np.pi)).flatten(1).sum(dim=1)
    assert fitted.log_prob(z[3_000:]).mean() - normal.mean() == pytest.approx(0, abs=0.5)


def test_an_untrained_flow_draws_its_field_and_any_grid(field):
    torch.manual_seed(0)
    flow = StationaryFlow((2, 8, 8), hidden=8, steps=2)
    flow.start = field
    torch.nn.init.zeros_(flow.last.bias)  # as its weights are: nothing moves
    torch.testing.assert_close(flow.sample(3, (6, 10), seed=5), field.sample(3, (6, 10), seed=5))
    assert flow.sample(2, (7, 1), seed=5).shape == (2, 2, 7, 1)


def test_a_flow_moves_with_its_noise_away_from_the_borders():
    torch.manual_seed(0)
    flow = StationaryFlow((2, 8, 8), hidden=8, steps=2, dilations=(1, 2)).double()
    for parameter in flow.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    z = torch.randn(1, 8, 40, 40, dtype=torch.float64)  # in patches
    time = torch.full((1,), 0.3, dtype=torch.float64)
    moved = flow.velocity(z.roll((3, 5), dims=(2, 3)), time)
    inside = (..., slice(flow.halo + 3, -flow.halo), slice(flow.halo + 5, -flow.halo))
    torch.testing.assert_close(moved[inside], flow.velocity(z, time).roll((3, 5), dims=(2, 3))[inside])


def test_a_trained_flow_keeps_correlations_over_the_whole_tile():
    generator = torch.Generator().manual_seed(0)
    colour = torch.randn(1_500, 1, 1, 1, generator=generator).sign()  # one of two kinds of land all over a tile
    z = colour + 0.5 * torch.randn(1_500, 1, 8, 8, generator=generator)
    flow = StationaryFlow((1, 8, 8), hidden=16, steps=4, patch=1, epochs=10, learning_rate=5e-3).fit(z)
    drawn = flow.sample(1_000, seed=1)
    curves = [two_point_correlation(x[:, 0] - x.mean()) for x in (z, drawn)]
    np.testing.assert_allclose(curves[1], curves[0], atol=0.1)
    assert (drawn.mean(dim=(1, 2, 3)).abs() > 0.5).float().mean() > 0.7  # and both kinds, not their mean


def test_density_of_the_flow_agrees_with_its_field_before_training(field):
    torch.manual_seed(0)
    flow = StationaryFlow((2, 8, 8), hidden=8, steps=2)
    flow.start = field
    torch.nn.init.zeros_(flow.last.bias)  # as its weights are: nothing moves
    z = field.sample(4, seed=6)
    torch.testing.assert_close(flow.log_prob(z), field.log_prob(z))
