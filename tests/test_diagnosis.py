import pytest
import torch

from vaenb.diagnosis import diagnose


def draws(n, seed, make):
    generator = torch.Generator().manual_seed(seed)
    return make(torch.randn(n, 6, generator=generator))


def diagnosed(make):
    return diagnose(draws(20_000, 0, make), draws(5_000, 1, make), components=10)


def test_where_the_prior_fits_nothing_is_gained():
    found = diagnosed(lambda e: e)
    assert all(abs(gain) < 0.05 for gain in found.gains.values())
    assert "elsewhere" in found.verdict()


def test_wrong_marginals_are_told_from_dependence():
    found = diagnosed(lambda e: 2 * e + 1)
    exact = 6 * (0.5 * (4 + 1 - 1) - torch.log(torch.tensor(2.0)).item())  # KL(N(1, 4) ‖ N(0, 1)) for each latent
    for name in ("marginals", "a Gaussian each"):
        assert found.gains[name] == pytest.approx(exact, abs=4 * found.errors[name])
    assert "independent latents, each with a density of its own, repairs it" in found.verdict()

    mixing = torch.eye(6) + 0.9 * torch.ones(6, 6)
    mixing /= mixing.square().sum(dim=1, keepdim=True).sqrt()  # variances of 1
    found = diagnosed(lambda e: e @ mixing.T)
    exact = -0.5 * torch.logdet(mixing @ mixing.T).item()
    assert abs(found.gains["marginals"]) < 0.05
    assert found.gains["one Gaussian"] == pytest.approx(exact, abs=4 * found.errors["one Gaussian"])
    assert "no prior of independent latents can repair" in found.verdict()


def test_independent_latents_that_are_not_gaussian_are_no_dependence():
    found = diagnosed(lambda e: 0.3 * e + 0.95 * torch.sign(e.roll(1, dims=0)))
    assert found.gains["marginals"] > found.gains["a Gaussian each"] + 1
    assert "each with a density of its own, repairs it" in found.verdict()


@pytest.mark.parametrize("scale", [0.03, 0.3, 30.0])
def test_independent_latents_of_any_scale_are_no_dependence(scale):
    found = diagnosed(lambda e: scale * e)
    assert "each with a density of its own, repairs it" in found.verdict()
    assert found.gains["marginals"] == pytest.approx(found.gains["one Gaussian"], abs=0.05)


def test_dependence_that_no_covariance_shows_is_found():
    signs = torch.sign(torch.randn(20_000, 1, generator=torch.Generator().manual_seed(2)))
    z = 0.3 * torch.randn(20_000, 6, generator=torch.Generator().manual_seed(3)) + 0.95 * signs * torch.tensor([1.0, -1] * 3)
    found = diagnose(z[:15_000], z[15_000:])
    assert found.gains["mixture"] > found.gains["marginals"] + 2
    assert "no prior of independent latents can repair" in found.verdict()


def test_latents_to_look_at_are_real_ones_in_other_company():
    z = torch.randn(2_000, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    found = diagnose(z[:1_500], z[1_500:], show=500)
    sources = list(found.sources.values())
    assert all(source.shape == (500, 1, 3, 3) for source in sources)
    assert torch.equal(sources[1].flatten(1).sort(dim=0).values, sources[0].flatten(1).sort(dim=0).values)
    assert not torch.equal(sources[1], sources[0])


def test_bad_latents_are_refused():
    z = torch.randn(200, 4)
    with pytest.raises(ValueError, match="expected one shape"):
        diagnose(z, torch.randn(200, 5))
    with pytest.raises(ValueError, match="needs at least"):
        diagnose(z[:3], z)
    with pytest.raises(ValueError, match="NaN"):
        diagnose(torch.full((200, 4), torch.nan), z)
