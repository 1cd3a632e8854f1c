"""Priors: densities that are densities, samples that follow them, and fits that find what is there."""

import copy
import functools
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from vaenb.autoregressive import REACH, Autoregressive
from vaenb.flows import Flow, FlowMatching
from vaenb.gaussians import FullGaussian, Mixture, PositionGaussian
from vaenb.models import VAE
from vaenb.priors import Prior, StandardNormal, minimise
from vaenb.two_stage import TwoStage, Vamp


@functools.lru_cache
def moons(n: int = 4000) -> Tensor:
    """Two latents at two positions, (n, 1, 1, 2): two arcs, so neither Gaussian nor independent."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(n, generator=generator) * torch.pi
    side = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    points = torch.stack([side * (angle.cos() - 0.4), side * (angle.sin() - 0.4)], dim=1)
    return (points + 0.2 * torch.randn(n, 2, generator=generator)).view(n, 1, 1, 2)


def vae() -> VAE:
    """A small untrained VAE with two latents, whose weights are large enough for its posteriors to differ."""
    torch.manual_seed(0)
    model = VAE("spatial", (1, 4, 8), 4, hidden=(4, 4))
    for parameter in model.parameters():
        parameter.data *= 2
    return model


SHAPE = (1, 1, 2)
FITTED = {
    "position": lambda: PositionGaussian(SHAPE),
    "gaussian": lambda: FullGaussian(SHAPE),
    "mixture": lambda: Mixture(SHAPE, components=8),
    "flow": lambda: Flow(SHAPE, hidden=32, epochs=5, learning_rate=5e-3),
    "autoregressive": lambda: Autoregressive(SHAPE, hidden=16, blocks=1, epochs=5, learning_rate=5e-3),
    "flow-matching": lambda: FlowMatching(
        SHAPE, hidden=32, dilations=(1, 1), position_aware=True, epochs=20, learning_rate=5e-3
    ),
    "from-mixture": lambda: FlowMatching(SHAPE, hidden=32, dilations=(1, 1), components=8, epochs=4, learning_rate=5e-3),
    "vamp": lambda: Vamp(vae(), components=20, epochs=5, learning_rate=5e-2),
    "two-stage": lambda: TwoStage(SHAPE, hidden=64, epochs=60),
}


@functools.lru_cache
def fitted(name: str) -> Prior:
    z, prior = moons().clone(), new(name)
    prior.fit(z)
    assert torch.equal(z, moons()), "other priors learn from the same latents"
    return prior


def new(name: str) -> Prior:
    torch.manual_seed(0)
    return FITTED[name]()


def quadrant(z: Tensor) -> Tensor:
    """Which of the four quadrants each point lies in."""
    right, upper = (z.flatten(1) > 0).long().unbind(dim=1)
    return right + 2 * upper


def plane(step: float = 0.04) -> Tensor:
    """Points of a grid over everything that has density, (n, 1, 1, 2)."""
    axis = torch.arange(-6, 6, step)
    return torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)


@pytest.mark.parametrize("name", FITTED)
def test_the_density_integrates_to_one(name):
    flow = name in ("flow-matching", "from-mixture")
    step = 0.1 if flow else 0.04
    mass = fitted(name).log_prob(plane(step)).double().exp().sum().item() * step**2
    if name == "two-stage":  # a bound from below: it may lose some, and its random draws may not add to it
        assert 0.85 < mass < 1.02
    else:
        assert mass == pytest.approx(1, abs=0.03 if flow else 5e-3)


@pytest.mark.parametrize("name", FITTED)
def test_samples_follow_the_density(name):
    # The share of samples in each quadrant against the integral of the density over it.
    prior, points = fitted(name), plane()
    drawn = torch.bincount(quadrant(prior.sample(8000, seed=3)), minlength=4) / 8000
    if name in (
        "flow-matching",
        "from-mixture",
        "two-stage",
    ):  # estimated densities: against the data that they have learned
        expected = torch.bincount(quadrant(moons()), minlength=4) / len(moons())
        tolerance = 0.05
    else:
        expected = torch.zeros(4).index_add(0, quadrant(points), prior.log_prob(points).exp() * 0.04**2)
        tolerance = 0.025
    assert (drawn - expected).abs().max() < tolerance


@pytest.mark.parametrize("name", FITTED)
def test_sample_moments_are_those_of_the_latents(name):
    if name == "vamp":
        pytest.skip("an untrained encoder's posteriors cannot make every mean and variance")
    drawn, z = fitted(name).sample(8000, seed=1).flatten(1), moons().flatten(1)
    assert torch.allclose(drawn.mean(dim=0), z.mean(dim=0), atol=0.12)
    assert torch.allclose(drawn.std(dim=0), z.std(dim=0), atol=0.1)


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_gains_nats(name):
    z = moons()
    # An untrained encoder's posteriors are no good start: its mixture is compared with itself before the fit.
    before = new(name) if name == "vamp" else StandardNormal(SHAPE)
    gain = (fitted(name).log_prob(z) - before.log_prob(z)).mean()
    assert gain > (0.0 if name in ("position", "gaussian", "vamp") else 0.15)


@pytest.mark.parametrize("name", FITTED)
def test_nothing_is_gained_where_the_latents_are_standard_normal(name):
    if name == "vamp":
        pytest.skip("a mixture of an untrained encoder's posteriors is not N(0, I)")
    z = torch.randn(24_000, *SHAPE, generator=torch.Generator().manual_seed(7))
    prior = new(name).fit(z[:12_000])
    gain = prior.log_prob(z[12_000:]) - StandardNormal(SHAPE).log_prob(z[12_000:])
    assert abs(gain.mean().item()) < 0.03


@pytest.mark.parametrize("name", FITTED)
def test_saved_and_loaded_it_is_the_same_to_the_bit(name):
    prior, other = fitted(name), new(name)
    state = safetensors.torch.load(safetensors.torch.save({k: v.contiguous() for k, v in prior.state_dict().items()}))
    other.load_state_dict(state)
    assert torch.equal(prior.sample(50, seed=2), other.sample(50, seed=2))
    assert torch.equal(prior.log_prob(moons()[:50]), other.log_prob(moons()[:50]))


@pytest.mark.parametrize("name", ["mixture", "autoregressive"])
def test_the_same_seed_gives_the_same_fit(name):
    again = new(name).fit(moons())
    assert torch.equal(again.sample(20), fitted(name).sample(20))
    other = new(name).fit(moons(), seed=1)
    assert not torch.equal(other.sample(20), fitted(name).sample(20))


@pytest.mark.parametrize("name", ["flow-matching", "two-stage"])
def test_estimates_of_densities_repeat_and_err_for_each_latent_by_itself(name, monkeypatch):
    """A batch after another must not be estimated with the same random numbers: errors would add up in a mean."""
    monkeypatch.setattr("vaenb.priors.BATCH", 3)
    z = moons()[:3]
    prior = fitted(name)
    first, second = prior.log_prob(torch.cat([z, z])).split(3)
    assert torch.equal(prior.log_prob(torch.cat([z, z])), torch.cat([first, second]))
    assert not torch.isclose(first, second, rtol=1e-6).any()
    state = torch.get_rng_state()
    prior.log_prob(z)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gaussian_of_latents_far_from_zero():
    z = 1000 + moons()
    near, far = FullGaussian(SHAPE), FullGaussian(SHAPE)
    near.fit(moons())
    far.fit(z)
    torch.testing.assert_close(far.log_prob(z).mean(), near.log_prob(moons()).mean(), atol=1e-2, rtol=0)


def test_gaussians_and_mixtures_have_the_densities_of_torch():
    z = moons()
    flat = z.flatten(1)
    position, full, mixture = (fitted(name) for name in ("position", "gaussian", "mixture"))
    expected = Independent(Normal(flat.mean(dim=0), flat.std(dim=0)), 1).log_prob(flat)
    assert torch.allclose(position.log_prob(z), expected, atol=1e-4)
    expected = MultivariateNormal(flat.mean(dim=0), flat.T.cov()).log_prob(flat)
    assert torch.allclose(full.log_prob(z), expected, atol=2e-2)
    components = MultivariateNormal(mixture.means, precision_matrix=mixture.whitening.mT @ mixture.whitening)
    expected = MixtureSameFamily(Categorical(logits=mixture.log_weights), components).log_prob(flat)
    assert torch.allclose(mixture.log_prob(z), expected, atol=1e-3)


def test_a_tempered_mixture_is_a_density_with_covariances_that_many_times_as_large():
    mixture, z = fitted("mixture"), moons()
    cold = mixture.tempered(0.5)
    precision = (mixture.whitening.mT @ mixture.whitening) / 0.5**2
    components = MultivariateNormal(mixture.means, precision_matrix=precision)
    expected = MixtureSameFamily(Categorical(logits=mixture.log_weights), components).log_prob(z.flatten(1))
    assert torch.allclose(cold.log_prob(z), expected, atol=1e-3)
    for unchanged in (mixture.tempered(1.0), cold.tempered(2.0)):
        assert torch.equal(unchanged.sample(50, seed=3), mixture.sample(50, seed=3))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_and_finite_is_refused(temperature):
    with pytest.raises(ValueError, match="expected a positive number"):
        fitted("mixture").tempered(temperature)


def network(kind: type, **options: int) -> Prior:
    """An untrained convolutional prior on a 7×7 map in double precision, with weights that make everything matter."""
    torch.manual_seed(0)
    depth = {"blocks": 2} if kind is Autoregressive else {"dilations": (1, 1)}
    prior = kind((2, 7, 7), hidden=8, **depth, **options).double()
    for parameter in prior.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter)
    return prior


@pytest.mark.parametrize("options", [{}, {"position_aware": True}])
def test_no_position_depends_on_itself_or_on_later_ones(options):
    prior = network(Autoregressive, **options)
    z = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    before = prior.conditionals(z)
    for changed in range(49):
        other = z.clone()
        other[0, :, changed // 7, changed % 7] += 1
        after = prior.conditionals(other)
        same = torch.stack([(a == b).flatten(1).all(dim=1) for a, b in zip(before, after, strict=True)]).all(dim=0)
        assert same[: changed + 1].all()
        assert changed == 48 or not same[changed + 1 :].any()  # no blind spot: every later position of a 7×7 map sees it


@pytest.mark.parametrize("options", [{}, {"position_aware": True}])
def test_autoregressive_samples_follow_the_conditionals(options):
    # Sampling keeps what earlier positions have computed. Drawn again from the whole network, they must be the same.
    prior = network(Autoregressive, **options).float()
    z = prior.sample(3, seed=5)
    log_weights, means, lower = (part.unflatten(0, (3, 49)) for part in prior.conditionals(z))
    generator = torch.Generator().manual_seed(5)
    for position in range(49):
        chosen = torch.multinomial(log_weights[:, position].exp(), 1, generator=generator)[:, 0]
        noise = torch.randn(3, 2, 1, generator=generator)
        each = torch.arange(3)
        expected = means[each, position, chosen] + torch.linalg.solve(lower[each, position, chosen], noise)[..., 0]
        assert torch.allclose(z[:, :, position // 7, position % 7], expected, atol=1e-4, rtol=1e-4)


def test_without_positions_the_interior_of_a_larger_map_is_translation_equivariant():
    torch.manual_seed(1)
    z = torch.randn(1, 2, 30, 30, dtype=torch.float64)
    shifted = z.roll((2, 3), dims=(2, 3))
    prior = network(Autoregressive)
    margin = REACH + 2 + 3  # what the network sees, and the shift
    maps = [torch.cat([p.flatten(1) for p in prior.conditionals(x)], dim=1).view(30, 30, -1) for x in (z, shifted)]
    assert torch.allclose(maps[0][margin:-3, margin:-margin], maps[1].roll((-2, -3), dims=(0, 1))[margin:-3, margin:-margin])
    flow = network(FlowMatching)
    speeds = [flow.velocity(x, torch.tensor([0.3], dtype=torch.float64)) for x in (z, shifted)]
    inner = slice(8, -8)
    assert torch.allclose(speeds[0][..., inner, inner], speeds[1].roll((-2, -3), dims=(2, 3))[..., inner, inner])
    aware = network(FlowMatching, position_aware=True)
    speeds = [aware.velocity(x, torch.tensor([0.3], dtype=torch.float64)) for x in (z, shifted)]
    assert not torch.allclose(speeds[0][..., inner, inner], speeds[1].roll((-2, -3), dims=(2, 3))[..., inner, inner])


@pytest.mark.parametrize("kind", [Autoregressive, FlowMatching])
def test_convolutional_priors_are_drawn_on_any_grid(kind):
    prior = network(kind).float()
    assert prior.sample(2, grid=(3, 11)).shape == (2, 2, 3, 11)
    assert prior.log_prob(torch.randn(2, 2, 3, 11)).shape == (2,)


def test_patches_hold_the_same_latents():
    prior = Autoregressive((1, 4, 6), hidden=8, patch=2)
    z = torch.randn(3, 1, 4, 6)
    assert prior.to_patches(z).shape == (3, 4, 2, 3)
    assert torch.equal(prior.from_patches(prior.to_patches(z)), z)
    assert Autoregressive((5,), hidden=8).sample(2).shape == (2, 5)


def test_bad_latents_are_refused_in_words():
    with pytest.raises(ValueError, match=r"expected \(N, 1, 1, 2\)"):
        FullGaussian(SHAPE).fit(torch.randn(10, 2))
    with pytest.raises(ValueError, match="NaN"):
        FullGaussian(SHAPE).fit(torch.full((10, *SHAPE), torch.nan))
    with pytest.raises(ValueError, match=r"10 latents.*needs at least 24"):
        Mixture(SHAPE, components=8).fit(torch.randn(10, *SHAPE))
    with pytest.raises(ValueError, match="never vary"):
        PositionGaussian(SHAPE).fit(torch.ones(10, *SHAPE))
    with pytest.raises(ValueError, match="none on a grid of"):
        fitted("gaussian").sample(1, grid=(3, 3))
    with pytest.raises(ValueError, match="none on a grid of"):
        StandardNormal((20,)).sample(1, grid=(3, 3))
    with pytest.raises(ValueError, match="at least 0"):
        fitted("gaussian").sample(-1)
    with pytest.raises(ValueError, match="never vary"):
        FullGaussian(SHAPE).fit(torch.ones(10, *SHAPE))
    with pytest.raises(ValueError, match="needs at least 24"):
        FlowMatching(SHAPE, hidden=8, components=8).fit(torch.randn(10, *SHAPE))
    with pytest.raises(ValueError, match="cannot be divided"):
        Autoregressive((1, 7, 7), hidden=8, patch=2)
    with pytest.raises(ValueError, match="lower its learning_rate"):
        TwoStage(SHAPE, learning_rate=1e6, hidden=8).fit(moons())


@pytest.mark.parametrize("name", [name for name, make in FITTED.items() if name not in ("vamp",) and make().differentiable])
def test_gradients_of_the_density_are_its_slopes(name):
    # In z, by central differences: what joint training hands to the encoder. In double precision and with a small step,
    # since splines have another slope on the other side of a knot.
    prior = copy.deepcopy(fitted(name)).double()
    z = moons()[:20].double().requires_grad_()
    (slope,) = torch.autograd.grad(prior.negative_log_prob(z).sum(), z)
    for latent in range(2):
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step.view(-1)[latent] = 1e-6
        difference = (prior.log_prob(z.detach() - step) - prior.log_prob(z.detach() + step)) / 2e-6
        assert torch.allclose(difference, slope[:, 0, 0, latent], atol=1e-4, rtol=1e-4)


def test_a_sweep_of_expectation_maximisation_never_loses_likelihood():
    z = moons()
    mixture = Mixture(SHAPE, components=8, sweeps=(0, 0), ridge=0.0, shrinkage=0.0).fit(z)
    likelihoods = [mixture.log_prob(z).mean().item()]
    for _ in range(5):
        mixture.refine(z)
        likelihoods.append(mixture.log_prob(z).mean().item())
    assert likelihoods == sorted(likelihoods)
    assert likelihoods[-1] > likelihoods[0] + 0.01


def test_a_flow_draws_from_its_density_in_as_many_passes_as_it_was_told():
    torch.manual_seed(0)
    flow = Flow((1, 4, 4), hidden=16, passes=4)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    transform, noise = flow.flow().transform, torch.randn(20, 16)
    calls = []
    networks = [layer.hyper for layer in flow.flow.transform.transforms if hasattr(layer, "hyper")]
    for network in networks:
        network.register_forward_hook(lambda network, *_: calls.append(network))
    with torch.no_grad():
        z = transform.inv(noise)
        assert [calls.count(network) for network in networks] == [4, 4]
        torch.testing.assert_close(transform(z), noise, atol=1e-4, rtol=1e-4)
    _, volume = transform.call_and_ladj(z[:1])
    jacobian = torch.autograd.functional.jacobian(lambda x: transform(x[None])[0], z[0])
    torch.testing.assert_close(volume[0], jacobian.slogdet().logabsdet, atol=1e-3, rtol=1e-3)


def test_a_mixture_drawn_in_parts_is_the_same_mixture(monkeypatch):
    mixture = fitted("mixture")
    whole = mixture.sample(20_000, seed=1)
    monkeypatch.setattr(mixture, "at_once", 3000)
    parts = mixture.sample(20_000, seed=1)
    assert parts.shape == whole.shape
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(parts, 0), statistic(whole, 0), atol=0.03, rtol=0)


def test_second_derivatives_of_a_mixture_are_refused_rather_than_wrong():
    mixture, z = fitted("mixture"), moons()[:5].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.negative_log_prob(z).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_of_a_mixture_are_those_of_finite_differences():
    torch.manual_seed(0)
    mixture = Mixture((3,), components=4).double()
    for parameter in mixture.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    z = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: mixture._log_prob(z), (z, *mixture.parameters()))  # changed in place


def test_sweeps_in_parts_that_follow_each_other_fit_better_than_as_many_over_all_latents_at_once(monkeypatch):
    z = moons()
    whole, parts = (Mixture(SHAPE, components=8, sweeps=(0, 0), ridge=0.0, shrinkage=0.0).fit(z) for _ in range(2))
    monkeypatch.setattr(parts, "PART", len(z) // 6)
    for mixture in (whole, parts):
        mixture.refine(z, 2)
    assert parts.log_prob(z).mean() > whole.log_prob(z).mean() + 0.001
    for mixture in (whole, parts):  # and end where those do
        mixture.refine(z, 300)
    assert abs(parts.log_prob(z).mean() - whole.log_prob(z).mean()) < 0.01


def test_responsibilities_are_the_shares_of_components_in_the_density():
    mixture = new("mixture").fit(moons()).double()
    mixture.log_weights.data += 3  # only their differences count
    flat = moons().flatten(1).double()
    exact = mixture._log_joint(flat).softmax(dim=1)
    assert torch.allclose(mixture._responsibilities()(flat).T, exact, atol=1e-9)
    assert (exact.max(dim=1).values < 0.99).any()


def test_responsibilities_of_many_latents_far_from_zero_are_precise_enough():
    torch.manual_seed(0)
    z = torch.randn(3000, 49) @ torch.randn(49, 49) / 7 + 20 + torch.randint(3, (3000, 1))
    mixture = Mixture((49,), components=5).fit(z)
    exact = mixture.double()._log_joint(z.double()).softmax(dim=1).float()
    assert torch.allclose(mixture.float()._responsibilities()(z).T, exact, atol=1e-3)


def test_a_sweep_that_asks_only_those_with_a_part_in_a_latent_is_one_that_asks_all(monkeypatch):
    z = moons()
    sparse, dense = (Mixture(SHAPE, components=8, sweeps=(0, 0)).fit(z) for _ in range(2))
    monkeypatch.setattr(sparse, "LEAST_SHARE", 1e-9)
    monkeypatch.setattr(dense, "ALL_AGAIN", 1)
    for mixture in (sparse, dense):
        monkeypatch.setattr(mixture, "PART", len(z) // 3)  # each part has members of its own
        mixture.refine(z, 4)
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    flat = z.flatten(1)
    members = [share.nonzero()[:, 0] for share in sparse._responsibilities()(flat) > sparse.LEAST_SHARE]
    assert sum(map(len, members)) < 0.9 * len(flat) * len(members)  # else nothing was left out
    torch.testing.assert_close(sparse._shares_of_members(flat, members), sparse._responsibilities()(flat), atol=1e-5, rtol=0)


def test_sweeps_that_ask_few_components_gain_likelihood_as_well():
    z = moons()
    mixture = Mixture(SHAPE, components=8, sweeps=(0, 0), ridge=0.0, shrinkage=0.0).fit(z)
    once, often = copy.deepcopy(mixture), copy.deepcopy(mixture)
    once.refine(z, 1)
    often.refine(z, Mixture.ALL_AGAIN)  # the first one asks all, the others do not
    assert often.log_prob(z).mean() > once.log_prob(z).mean() + 0.001


def test_shrinkage_takes_covariances_towards_what_all_have_within_their_components():
    z = moons()
    free, shrunk = (Mixture(SHAPE, components=8, sweeps=(5, 0), ridge=0.0, shrinkage=s).fit(z) for s in (0.0, 1e9))

    def covariances(mixture):
        precisions = mixture.whitening.mT @ mixture.whitening
        return torch.linalg.inv(precisions.detach())

    spread = [covariances(mixture).std(dim=0).max().item() for mixture in (free, shrunk)]
    assert spread[1] < 1e-4 < 1e-2 < spread[0]
    # Means are free, so that the mixture has still the covariance of the latents.
    weights, means = shrunk.log_weights.exp().detach(), shrunk.means.detach()
    centred = means - weights @ means
    whole = covariances(shrunk)[0] + (centred.T * weights) @ centred
    torch.testing.assert_close(whole, torch.cov(z.flatten(1).T, correction=0), atol=1e-3, rtol=1e-2)


def test_a_component_without_latents_keeps_a_width():
    z = moons()
    mixture = Mixture(SHAPE, components=2, sweeps=(0, 0), ridge=0.0).fit(z)
    mixture.means.data[1] = 1e3  # so far away that no latent is its own
    mixture.refine(z)
    assert mixture.log_prob(z).isfinite().all()
    assert mixture.log_weights[1].exp() < 1e-5
    torch.testing.assert_close(mixture.whitening[1], mixture.whitening[0], rtol=1e-2, atol=1e-2)  # all that there is within


def test_densities_of_many_components_are_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    mixture = Mixture((3,), components=120).double()
    for parameter in mixture.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    z = torch.randn(300, 3, dtype=torch.double)
    with_gradients = mixture._log_joint(z)
    assert with_gradients.requires_grad
    precisions = mixture.whitening.tril().mT @ mixture.whitening.tril()
    one = [MultivariateNormal(mean, precision_matrix=p) for mean, p in zip(mixture.means, precisions, strict=True)]
    exact = torch.stack([each.log_prob(z) for each in one], dim=1) + mixture.log_weights.log_softmax(dim=0)
    torch.testing.assert_close(with_gradients, exact)
    torch.testing.assert_close(mixture.requires_grad_(False)._log_joint(z), exact.detach())


def test_flipping_the_sign_of_a_whitening_changes_no_density():
    # Gradients may carry a diagonal entry through zero: W and −W have the same covariance.
    mixture, z = new("mixture").fit(moons()), moons()[:100]
    before = mixture.log_prob(z)
    mixture.whitening.data[:4] *= -1
    assert torch.allclose(mixture.log_prob(z), before, atol=1e-5)


def test_moving_a_vamp_prior_leaves_the_model_where_it_is():
    model = vae()
    prior = Vamp(model, components=3).to(torch.float64)
    assert next(model.parameters()).dtype == torch.float32
    assert prior.components()[0].dtype == torch.float64
    assert not [name for name in prior.state_dict() if "encoder" in name]  # the encoder is not part of the prior


@pytest.mark.parametrize("steps", [1, 18, 19, 20])
def test_a_fit_may_have_any_number_of_steps(steps):
    module = torch.nn.Linear(1, 1)
    minimise(lambda z: module(z).square().mean(), module, torch.ones(steps, 1), "fit", 1, 1, 1e-2)


def test_latents_in_double_precision_and_any_seed():
    z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).double()
    for prior in (FullGaussian((2,)), Mixture((2,), 2)):
        torch.testing.assert_close(prior.fit(z, seed=-1).log_prob(z), prior.log_prob(z.float()))


def test_a_ridge_is_added_to_the_variances():
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    mixture = Mixture((3,), components=1, sweeps=(1, 0), ridge=0.5).fit(z)
    covariance = torch.linalg.inv(mixture.whitening[0].mT @ mixture.whitening[0]).detach()
    torch.testing.assert_close(covariance, torch.cov(z.T, correction=0) + 0.5 * torch.eye(3), atol=1e-3, rtol=1e-3)


def test_the_midpoint_rule_errs_by_the_square_of_its_steps():
    """dz/dt = t² z, whose solution is known: z(1) = z(0) exp(1/3), and the density falls by as much in each latent."""
    errors = []
    for steps in (4, 8):
        flow = FlowMatching((1, 2, 2), hidden=4, steps=steps)
        flow.velocity = lambda z, t: t[:, None, None, None] ** 2 * z
        z, noise = (prior.sample(5, seed=1) for prior in (flow, StandardNormal((1, 2, 2))))
        exact = StandardNormal((1, 2, 2)).log_prob(z * math.exp(-1 / 3)) - 4 / 3
        errors.append([(z / noise - math.exp(1 / 3)).abs().max().item(), (flow.log_prob(z) - exact).abs().max().item()])
    ratios = np.divide(*errors)
    assert (ratios > 3).all(), ratios
    assert max(errors[1]) < 0.02


def test_densities_of_one_batch_are_estimated_in_directions_of_their_own():
    torch.manual_seed(0)
    flow = FlowMatching((1, 4, 4), hidden=8, dilations=(1,))
    for parameter in flow.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    assert len(flow.log_prob(torch.randn(1, 1, 4, 4).expand(50, -1, -1, -1)).unique()) > 40
