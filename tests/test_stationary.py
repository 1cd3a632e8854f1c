"""The stationary prior: Gaussian fields of several widths, a patchwork of them, and flow matching from it."""

import numpy as np
import pytest
import torch

from vaenb.gaussians import PositionGaussian
from vaenb.samples import two_point_correlation
from vaenb.stationary import COARSE, WIDTHS, GaussianField, Patchwork, StationaryFlow


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
    nats = {
        name: prior.log_prob(z[:500]).mean() for name, prior in {"white": white, "fitted": fitted, "true": field}.items()
    }
    assert nats["fitted"] - nats["white"] > 0.9 * (nats["true"] - nats["white"])


def test_a_fit_to_white_noise_gains_nothing():
    z = torch.randn(4_000, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    fitted = GaussianField((2, 8, 8)).fit(z[:3_000])
    normal = -0.5 * (z[3_000:].square() + np.log(2 * np.pi)).flatten(1).sum(dim=1)
    assert fitted.log_prob(z[3_000:]).mean() - normal.mean() == pytest.approx(0, abs=0.5)


def two_kinds(count, generator):
    """Maps of two channels: three in four calm with mean 2, the others rough with mean −1."""
    calm = torch.rand(count, generator=generator) < 0.75
    noise = torch.randn(count, 2, 8, 8, generator=generator)
    return torch.where(calm[:, None, None, None], 2 + 0.2 * noise, -1 + 1.5 * noise), calm


def test_a_patchwork_finds_the_kinds_and_how_frequent_they_are():
    z, calm = two_kinds(2_000, torch.Generator().manual_seed(0))
    patchwork = Patchwork((2, 8, 8), kinds=2).fit(z)
    found = patchwork.kinds_of(z)
    assert max((found == calm).float().mean(), (found != calm).float().mean()) > 0.99
    drawn = patchwork.draw_kinds(4_000, (2, 3), torch.Generator().manual_seed(1))
    frequency = (drawn == found[calm][0]).float().mean(dim=0)
    np.testing.assert_allclose(frequency, 0.75, atol=0.03)  # at every position
    for kind, mean, scale in ((found[calm][0], 2, 0.2), (found[~calm][0], -1, 1.5)):
        everywhere = patchwork.one_hot(torch.full((3_000, 4, 4), int(kind)))
        z = patchwork.draw(everywhere, torch.Generator().manual_seed(2))
        np.testing.assert_allclose(z.mean(dim=(0, 2, 3)), mean, atol=0.1)
        np.testing.assert_allclose(z.std(dim=(0, 2, 3)), scale, rtol=0.1)


def test_kinds_go_on_for_longer_than_a_tile():
    patchwork = Patchwork((1, 16, 16), kinds=6)
    kinds = patchwork.draw_kinds(200, (1, 400), torch.Generator().manual_seed(0))[:, 0]
    same = [(kinds[:, r:] == kinds[:, : 400 - r]).float().mean().item() for r in (1, 16, 390)]
    assert same[0] > 0.97
    assert same[1] > 0.6
    assert same[2] == pytest.approx(1 / 6, abs=0.06)  # far apart, chance


def test_a_patchwork_has_no_density():
    with pytest.raises(ValueError, match="no density in closed form"):
        Patchwork((1, 4, 4)).log_prob(torch.zeros(1, 1, 4, 4))


def test_an_untrained_flow_draws_its_patchwork_on_any_grid():
    torch.manual_seed(0)
    flow = StationaryFlow((2, 8, 8), hidden=8, steps=2, kinds=3)
    torch.nn.init.zeros_(flow.last.bias)  # as its weights are: nothing moves
    flow.start.mean = torch.randn(3, 2)
    torch.testing.assert_close(flow.sample(3, (6, 10), seed=5), flow.start.sample(3, (6, 10), seed=5))
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


def test_a_trained_flow_keeps_the_kinds_and_correlations_over_the_whole_tile():
    z = two_kinds(1_500, torch.Generator().manual_seed(0))[0]
    flow = StationaryFlow((2, 8, 8), hidden=16, steps=4, patch=1, epochs=4, kinds=2, learning_rate=5e-3).fit(z)
    drawn = flow.sample(1_000, seed=1)
    curves = [two_point_correlation(x[:, 0] - x[:, 0].mean()) for x in (z, drawn)]
    np.testing.assert_allclose(curves[1], curves[0], atol=0.15)
    mean = drawn.mean(dim=(1, 2, 3))
    assert ((mean - 2).abs() < 0.5).float().mean() == pytest.approx(0.75, abs=0.15)
    assert ((mean - 2).abs() < 0.5).float().mean() + ((mean + 1).abs() < 1).float().mean() > 0.85


def test_a_patchwork_of_one_kind_is_its_field(field):
    patchwork = Patchwork((2, 8, 8), kinds=1)
    patchwork.mean, patchwork.mixing = field.mean[None], field.mixing[None]
    drawn = patchwork.draw(torch.ones(50, 1, 3, 5), torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, field.sample(50, (3, 5), seed=1))


def test_a_flow_cannot_tell_where_the_border_is():
    torch.manual_seed(0)
    flow = StationaryFlow((2, 8, 8), hidden=8, dilations=(1, 2)).double()
    for parameter in flow.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    same = torch.randn(1, 8, 1, 1, dtype=torch.float64).expand(-1, -1, 12, 12)
    speed = flow.velocity(same, torch.full((1,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(speed, speed[..., :1, :1].expand_as(speed))


def test_noise_is_paired_with_latents_of_its_kind(monkeypatch):
    pairs = []
    monkeypatch.setattr("vaenb.stationary.Learned._fit", lambda _, both: pairs.append(both))
    z, calm = two_kinds(400, torch.Generator().manual_seed(0))
    StationaryFlow((2, 8, 8), hidden=8, kinds=2, patch=1).fit(z)
    noise, latents = pairs[0].unbind(dim=1)
    assert torch.equal(latents, z)
    assert ((noise.mean(dim=(1, 2, 3)) > 0.5) == calm).float().mean() > 0.99


def test_kinds_do_not_depend_on_the_unit_of_the_latents():
    z, _ = two_kinds(400, torch.Generator().manual_seed(0))
    found = [Patchwork((2, 8, 8), kinds=2).fit(unit * z).kinds_of(unit * z) for unit in (1.0, 0.01)]
    assert (found[0] == found[1]).float().mean() in (0, 1)
    assert len(found[1].unique()) == 2


def test_kinds_change_between_the_points_of_the_lattice():
    kinds = Patchwork((1, 16, 16), kinds=6).draw_kinds(50, (50, 50 * COARSE + 1), torch.Generator().manual_seed(0))
    changes = (kinds[..., 1:] != kinds[..., :-1]).float().mean(dim=(0, 1)).view(-1, COARSE).mean(dim=0)
    assert changes.min() > 0.5 * changes.max()
