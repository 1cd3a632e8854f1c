import math

import pytest
import torch

from vaenb import pixels
from vaenb.config import Config, ConfigError
from vaenb.models import VAE

LEVELS = torch.arange(256).double() / 255


@pytest.mark.parametrize("family", ["logistic", "gaussian"])
@pytest.mark.parametrize("location", [-0.4, 0.0, 0.3, 0.999, 1.7])
@pytest.mark.parametrize("scale", [3e-4, 2e-3, 0.05, 2.0])
def test_probabilities_of_all_grey_values_sum_to_one(family, location, scale):
    p = pixels.Discretised(torch.tensor(location).double().expand(256), torch.tensor(scale).double(), family)
    assert p.log_prob(LEVELS).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("family", ["logistic", "gaussian"])
def test_a_bin_has_the_probability_between_its_edges(family):
    location, scale = torch.tensor(0.42).double(), torch.tensor(0.07).double()
    cdf = torch.sigmoid if family == "logistic" else torch.special.ndtr
    edges = (LEVELS[:-1] + 0.5 / 255 - location) / scale
    expected = torch.diff(torch.cat([torch.zeros(1).double(), cdf(edges), torch.ones(1).double()]))
    p = pixels.Discretised(location.expand(256), scale, family).log_prob(LEVELS).exp()
    torch.testing.assert_close(p, expected, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("family", ["logistic", "gaussian"])
def test_each_channel_has_its_own_scale_and_the_layout_of_memory_does_not_matter(family):
    torch.manual_seed(0)
    location, log_scale = torch.rand(2, 3, 5, 7).double().requires_grad_(), torch.tensor([-1.5, -1.0, -0.5]).double()
    value = (torch.rand(2, 3, 5, 7) * 1.4 - 0.2).clamp(0, 1).mul(255).round().double() / 255
    scale = log_scale.exp()[:, None, None]
    cdf = torch.sigmoid if family == "logistic" else torch.special.ndtr
    edges = (value + 0.5 / 255 - location) / scale, (value - 0.5 / 255 - location) / scale
    upper, lower = torch.where(value == 1, 1, cdf(edges[0])), torch.where(value == 0, 0, cdf(edges[1]))
    expected = (upper - lower).log()
    (gradient,) = torch.autograd.grad(expected.sum(), location)
    last = location.detach().float().contiguous(memory_format=torch.channels_last).requires_grad_()
    single = pixels.Discretised(last, scale.float(), family).log_prob(value.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.autograd.grad(single.sum(), last)[0].double(), gradient, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["logistic", "gaussian"])
def test_tails_keep_finite_gradients_in_single_precision(family):
    location = torch.tensor([-2.0, 0.0, 0.5, 1.0, 3.0]).repeat_interleave(3).requires_grad_()
    log_scale = torch.full((15,), -7.0, requires_grad=True)
    value = torch.tensor([0.0, 0.5019608, 1.0]).repeat(5)
    log_p = pixels.Discretised(location, log_scale.exp(), family).log_prob(value)
    log_p.sum().backward()
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(location.grad).all()
    assert torch.isfinite(log_scale.grad).all()


@pytest.mark.parametrize("family", ["logistic", "gaussian"])
def test_samples_are_grey_values_and_as_frequent_as_they_are_probable(family):
    torch.manual_seed(0)
    p = pixels.Discretised(torch.full((200_000,), 0.02), torch.tensor(0.01), family)
    drawn = p.sample()
    levels, counts = (drawn * 255).round().unique(return_counts=True)
    torch.testing.assert_close(drawn * 255, (drawn * 255).round(), atol=1e-4, rtol=0)
    probable = pixels.Discretised(torch.full((len(levels),), 0.02), torch.tensor(0.01), family).log_prob(levels / 255).exp()
    assert (counts / 200_000 - probable).abs().max() < 5 * math.sqrt(0.25 / 200_000)


def test_bits_of_guessing_at_random():
    dimensions = 3 * 64 * 64
    assert pixels.bits_per_dimension(dimensions * math.log(256), dimensions) == pytest.approx(8)


@pytest.mark.parametrize("likelihood", pixels.LIKELIHOODS)
def test_each_likelihood_makes_an_elbo_with_gradients(likelihood):
    torch.manual_seed(0)
    model = VAE("spatial", (3, 16, 16), latent_channels=2, likelihood=likelihood)
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    x = model.observed(images, torch.rand(images.shape))
    rate, distortion = model(x, torch.randn(4, *model.latent_shape))
    (rate + distortion).mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.decode(torch.randn(2, *model.latent_shape)).mean.shape == (2, 3, 16, 16)
    if likelihood != "bernoulli":
        torch.testing.assert_close((x * 255).round().byte(), images)


def test_a_learned_scale_is_what_fits_best():
    """With the residuals given, the likelihood is largest at a scale that is theirs (the point of a σ-VAE)."""
    torch.manual_seed(0)
    location = torch.full((1, 1, 200, 200), 0.5)
    value = ((location + 0.04 * torch.randn_like(location)).clamp(0, 1) * 255).round() / 255
    scales = torch.linspace(0.02, 0.08, 61)
    best = max(scales, key=lambda s: pixels.distribution("gaussian", location - 0.5, s.log()[None]).log_prob(value).item())
    assert best.item() == pytest.approx(0.04, abs=0.002)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"likelihood": "laplace"}, "choose one of bernoulli, logistic, gaussian"),
        ({"hidden": (16,)}, "expected two whole numbers"),
        ({"hidden": (16, 0)}, "expected two whole numbers"),
    ],
)
def test_configurations_that_no_run_can_have(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Config(**wrong)


def test_scales_are_bounded_from_below_and_else_as_learned():
    found = pixels.scale(torch.tensor([-50.0, -1.0])).tolist()
    assert found == pytest.approx([math.exp(-7), math.exp(-1)], rel=0.01)


@pytest.mark.parametrize("likelihood", ["logistic", "gaussian"])
def test_pictures_are_grey_values_and_channels_have_their_own_scale(likelihood):
    torch.manual_seed(0)
    output, log_scale = torch.linspace(-2, 2, 24).view(2, 3, 2, 2), torch.tensor([-3.0, -2.0, -1.0])
    p, value = pixels.distribution(likelihood, output, log_scale), torch.rand(2, 3, 2, 2).mul(255).round() / 255
    assert 0 == p.mean.min() < p.mean.max() == 1
    each = [pixels.distribution(likelihood, output[:, c : c + 1], log_scale[c : c + 1]) for c in range(3)]
    torch.testing.assert_close(p.log_prob(value), sum(q.log_prob(value[:, c : c + 1]) for c, q in enumerate(each)))
