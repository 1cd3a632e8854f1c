import itertools
import math

import numpy as np
import pytest
import torch

from vaenb import likelihood
from vaenb.config import Config
from vaenb.data import load
from vaenb.gaussians import PositionGaussian
from vaenb.models import BATCH, VAE, evaluate


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
    copies = likelihood.log_weights(model, everything.repeat(4, 1, 1, 1), k=5000)
    weights = copies.unflatten(1, (4, len(everything))).flatten(0, 1)  # 20,000 draws of each
    torch.testing.assert_close(likelihood.negative_log_likelihood(weights), truth, atol=0.02, rtol=0)
    groups = (weights.unflatten(0, (-1, k)).transpose(0, 1).flatten(1) for k in (1, 10, 20_000))  # k draws for each bound
    bounds = [likelihood.negative_log_likelihood(group).mean() for group in groups]
    assert bounds[0] > bounds[1] > bounds[2]
    assert (-weights.mean(0) > truth).all()  # −ELBO bounds from above


def test_bounds_agree_with_a_direct_evaluation_on_the_whole_test_set():
    images, model = load("digits"), Config("digits", "dense", latents=8).build((1, 28, 28)).eval()
    measured = likelihood.bounds(model, images, k=10)
    rate, distortion = evaluate(model, images.test)
    assert measured["rate"] == pytest.approx(rate.mean().item(), rel=1e-5)
    assert measured["negative_elbo"] == pytest.approx((rate + distortion).mean().item(), rel=1e-5)
    direct = likelihood.negative_log_likelihood(likelihood.log_weights(model, images.test, 10)).mean().item()
    assert measured["negative_log_likelihood"] == pytest.approx(direct, abs=0.5)
    assert measured["standard_error"] == 0
    part = likelihood.bounds(model, images, k=10, subset=100)
    assert part["negative_log_likelihood"] == pytest.approx(direct, abs=0.5 + 5 * part["standard_error"])


def test_activity_sums_to_the_rate():
    images, model = load("digits"), Config("digits").build((1, 28, 28)).eval()
    activity = np.array(likelihood.posterior_activity(model, images)["rate_per_latent"])
    assert activity.shape == model.latent_shape
    assert activity.sum() == pytest.approx(likelihood.elbo(model, images)["rate"], rel=1e-3)


def test_too_few_draws():
    with pytest.raises(ValueError, match="at least one draw"):
        likelihood.log_weights(small(), torch.zeros(1, 1, 2, 2, dtype=torch.uint8), k=0)


def test_bounds_are_tighter_than_the_elbo_by_the_slack_of_their_prior():
    images, model = load("digits"), Config("digits", "dense", latents=8).build((1, 28, 28)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # so that z matters, and draws differ in what they explain
    other = PositionGaussian((8,))
    other.mean += 1
    for prior in (None, other):
        weights = likelihood.log_weights(model, images.test, 10, prior=prior)
        slack = -weights.mean(dim=0) - likelihood.negative_log_likelihood(weights)
        whole, part = (likelihood.bounds(model, images, 10, n, prior) for n in (10_000, 100))
        assert slack.mean() > 1
        assert whole["negative_elbo"] == pytest.approx(-weights.mean().item(), abs=1)
        assert whole["negative_elbo"] - whole["negative_log_likelihood"] == pytest.approx(slack.mean().item(), rel=0.05)
        assert part["standard_error"] == pytest.approx(slack.std().item() / 100**0.5, rel=0.4)


def test_a_subset_is_of_random_images():
    chosen = likelihood._choose(1000, 500)
    assert len(chosen.unique()) == 500
    assert 200 < (chosen < 500).sum() < 300


def test_the_elbo_is_that_of_the_split_asked_for():
    images, model = load("digits"), Config("digits").build((1, 28, 28)).eval()
    for split in ("train", "test"):
        rate, distortion = evaluate(model, getattr(images, split))
        assert likelihood.elbo(model, images, split)["negative_elbo"] == pytest.approx((rate + distortion).mean().item())


def test_every_batch_has_draws_of_its_own():
    torch.manual_seed(0)
    image = torch.randint(2, (1, 1, 28, 28), dtype=torch.uint8) * 255  # binarisation changes nothing
    weights = likelihood.log_weights(VAE().eval(), image.expand(2 * BATCH, -1, -1, -1), 1)
    assert len(weights.unique()) > 1.9 * BATCH
